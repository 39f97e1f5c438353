//! The application of a store's reactor: connections, shards, lanes and control commands meet here.
//!
//! This file owns the state and what is common: it hands out events to replicas, carries out what
//! they ask for, and is what the reactor calls. `clients` serves the connections of clients, `peers`
//! those of other stores, `control` what the control plane wants. Everything runs on one thread.

mod asks;
mod clients;
mod control;
mod peers;

use super::heart::{HeartCommand, Shared};
use super::hops::{Hops, LaneWork};
use super::identity::Identity;
use super::links::{Answered, Links, PeerAddress};
use super::{ControlOp, DiskFacts, StoreConfig, StoreEvent, StoreFacts};
use crate::disk::OpenDisk;
use crate::framing::Opener;
use crate::lanes::Lanes;
use asks::Asks;
use clients::Pending;
use crossbeam_channel::Sender;
use lane::Op;
use proto::disk::DiskDone;
use proto::frame::Frame;
use proto::id_map::IdMap;
use proto::wire::{Header, Kind, Limits, Peer, Reply, ReplyOp, Request, RequestOp, Ticket};
use proto::{Epoch, Pool, Seq, ShardId, Status, Tick};
use runtime::clock;
use runtime::reactor::{
    Application, CloseReason, ConnId, Context, DiskIndex, HANDSHAKE_MS, Handle, ListenerId, Opened,
};
use runtime::wake::Wake;
use shard::conf::{Incarnation, ShardConf, StoreId};
use shard::exchange::reply_to;
use shard::heartbeat::Event as HeartEvent;
use shard::paths::Paths;
use shard::replica::{Effect, Event, Note, Pace, Replica, View};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use clients::verify_ticket;

pub(super) enum Command {
    Control(u64, ControlOp),
    Look(Sender<StoreFacts>),
    Peers(Vec<PeerAddress>),
    Dead(StoreId, Incarnation),
    /// A heartbeat was refused by somebody who has promised this epoch.
    Newer(ShardId, Epoch),
    /// Whether a disk's host has no more room for it.
    HoldGrowth(usize, bool),
    /// A disk is not what it was, and why.
    FailDisk(usize, String),
    CheckBlocks(ShardId, Vec<(u32, u32)>),
    Close(Sender<()>),
}

/// Who waits for a lane.
enum Waiter {
    Shard { shard: ShardId, op: u32, since: Tick, work: LaneWork },
    Created { request_id: u64, lane: usize, conf: ShardConf },
    Control { request_id: u64, then: Then },
    Closed,
}

enum Then {
    Forget(ShardId),
    Grow(ShardId),
}

/// Who is at the other end of an accepted connection.
enum Caller {
    /// It has not said.
    Unknown,
    /// It has said that it is this store, and has to prove it: (kind, own side, its side).
    Claims(Kind, Peer, Peer),
    Client(Ticket),
    Store(StoreId),
}

struct Conn {
    opener: Opener,
    caller: Caller,
    requests: u32,
    bytes: u64,
    is_paused: bool,
}

impl Conn {
    /// Whether as much is in flight as a connection may have.
    fn is_full(&self) -> bool {
        let limits = Limits::DEFAULT;
        self.requests >= limits.requests_max || self.bytes >= u64::from(limits.inflight_bytes_max)
    }
}

struct Served {
    lane: usize,
    replica: Replica,
    /// When it wants to be woken.
    wake: Option<Tick>,
}

/// A disk with its lanes, by their place in the store.
pub(super) struct HostedDisk {
    pub(super) facts: DiskFacts,
    pub(super) lanes: std::ops::Range<usize>,
    pub(super) is_reported: bool,
}

pub(super) struct StoreApp {
    config: StoreConfig,
    lanes: Lanes<Waiter>,
    disks: Vec<HostedDisk>,
    shards: BTreeMap<ShardId, Served>,
    conns: IdMap<ConnId, Conn>,
    paths: Paths<ConnId>,
    pending: IdMap<u64, Pending>,
    /// Requests of other stores that a replica works on.
    asked: Asks<ConnId>,
    hops: Hops,
    /// Damaged blocks that primaries here have written again.
    blocks_mended: u64,
    links: Links,
    identity: Identity,
    booted: Tick,
    leases: Shared,
    /// Of each lane.
    paces: Vec<Pace>,
    heart: Handle<HeartCommand>,
    /// Lives of stores that are over, up to and including.
    dead: BTreeMap<StoreId, Incarnation>,
    /// When replicas want to be woken.
    timers: BTreeSet<(Tick, ShardId)>,
    /// Commands that are done when the replica follows this epoch.
    conf_waiters: Vec<(ShardId, Epoch, u64)>,
    next_token: u64,
    /// Kept between steps for its memory.
    effects: Vec<Effect>,
    events: Sender<StoreEvent>,
    wake: Arc<Wake>,
    listening: Option<Sender<std::io::Result<SocketAddr>>>,
    closing: Option<(Sender<()>, usize)>,
    pool: Pool,
}

/// Where a store's thread tells what happened.
pub(super) struct Outlets {
    pub(super) events: Sender<StoreEvent>,
    pub(super) wake: Arc<Wake>,
    /// The address in use, once.
    pub(super) listening: Sender<std::io::Result<SocketAddr>>,
    pub(super) identity: Identity,
    /// When this life began.
    pub(super) booted: Tick,
    pub(super) leases: Shared,
    pub(super) heart: Handle<HeartCommand>,
}

impl StoreApp {
    /// Serve the lanes of `disks` and the replicas in them, whose records were looked at before.
    pub(super) fn new(
        config: StoreConfig,
        disks: Vec<OpenDisk>,
        hosted: Vec<HostedDisk>,
        outlets: Outlets,
        pool: Pool,
    ) -> StoreApp {
        let identity = outlets.identity;
        let mut app = StoreApp {
            config,
            lanes: Lanes::new(disks, &pool),
            disks: hosted,
            shards: BTreeMap::new(),
            conns: IdMap::default(),
            paths: Paths::new(),
            pending: IdMap::default(),
            asked: Asks::new(),
            hops: Hops::default(),
            blocks_mended: 0,
            links: Links::new(Kind::Peer, identity.clone()),
            identity,
            booted: outlets.booted,
            leases: outlets.leases,
            paces: Vec::new(),
            heart: outlets.heart,
            dead: BTreeMap::new(),
            timers: BTreeSet::new(),
            conf_waiters: Vec::new(),
            next_token: 1,
            effects: Vec::new(),
            events: outlets.events,
            wake: outlets.wake,
            listening: Some(outlets.listening),
            closing: None,
            pool,
        };
        app.paces.resize_with(app.lanes.count(), Pace::default);
        for lane in 0..app.lanes.count() {
            let shards = app.lanes.lane(lane).tables().shards.iter().enumerate();
            let held: Vec<u32> =
                shards.filter(|(_, held)| held.is_some()).map(|(ix, _)| ix as u32).collect();
            held.into_iter().for_each(|shard_ix| app.host(lane, shard_ix));
        }
        app
    }

    fn event(&self, event: StoreEvent) {
        // The control plane may be gone at the very end.
        let _ = self.events.send(event);
        self.wake.signal();
    }

    fn send(&self, ctx: &mut Context, id: ConnId, reply: &Reply) {
        // An ended connection has no reader; a full queue ends it.
        let _ = ctx.send(id, reply.encode());
    }

    fn epoch_of(&self, shard: ShardId) -> Epoch {
        let conf = self.shards.get(&shard).and_then(|served| served.replica.conf());
        conf.map_or(Epoch(0), |conf| conf.epoch)
    }

    fn reply_ok(&self, ctx: &mut Context, id: ConnId, header: &Header, seq: Seq, op: ReplyOp) {
        self.send(ctx, id, &reply_to(header, self.epoch_of(header.shard), seq, op));
    }

    fn refuse(&self, ctx: &mut Context, id: ConnId, header: &Header, status: Status) {
        let epoch = self.epoch_of(header.shard);
        self.send(ctx, id, &Reply::refuse(header, epoch, status, 0));
    }

    fn request(&mut self, ctx: &mut Context, id: ConnId, header: Header, request: Request) {
        match self.conns.get(&id).map(|conn| &conn.caller) {
            Some(Caller::Client(ticket)) => {
                let ticket = *ticket;
                self.client_request(ctx, id, header, request, &ticket);
            }
            Some(Caller::Store(store)) => {
                let store = *store;
                self.peer_request(ctx, id, &header, store, request);
            }
            Some(Caller::Unknown | Caller::Claims(..)) | None => {}
        }
    }

    /// Give a replica an event, and do what it asks for.
    fn step(&mut self, ctx: &mut Context, shard: ShardId, event: Event) {
        let Some(served) = self.shards.get_mut(&shard) else { return };
        let lane = served.lane;
        let view = View::of(self.lanes.lane(lane), &self.leases, &self.paces[lane]);
        let mut effects = std::mem::take(&mut self.effects);
        // Not the time at which the iteration began: a process that was stopped since then must not
        // take its leases for valid.
        served.replica.step(clock::now(), event, &view, &mut effects);
        for effect in effects.drain(..) {
            match effect {
                Effect::Lane { op, request } => {
                    let (since, work) = (clock::now(), LaneWork::of(&request));
                    let waiter = Waiter::Shard { shard, op, since, work };
                    self.lanes.request(ctx, lane, request, waiter);
                }
                Effect::Reply { token, result } => self.answer(ctx, token, result),
                Effect::Send { to, request } => self.links.send(ctx, to, request),
                Effect::Answer { token, reply } => self.answer_peer(ctx, token, reply),
                Effect::Propose { epoch, transition } => {
                    self.event(StoreEvent::Proposal { shard, epoch: epoch.0, transition });
                }
                Effect::FetchConf { newer_than } => {
                    self.event(StoreEvent::FetchConf { shard, newer_than: newer_than.0 });
                }
                Effect::Claim { reign, epoch, stores } => {
                    self.beat(HeartEvent::Claim { shard, reign, epoch, stores });
                }
                Effect::Unclaim => self.beat(HeartEvent::Unclaim { shard }),
                Effect::Release => self.beat(HeartEvent::Release { shard }),
                Effect::Promise { epoch } => self.beat(HeartEvent::Promise { shard, epoch }),
                Effect::Wake(at) => {
                    let served = self.shards.get_mut(&shard).expect("it has just been stepped");
                    if served.wake.is_none_or(|wake| at < wake) {
                        if let Some(before) = served.wake.replace(at) {
                            self.timers.remove(&(before, shard));
                        }
                        self.timers.insert((at, shard));
                    }
                }
                Effect::Verified { token: request_id, result: Ok(report) } => {
                    self.event(StoreEvent::Verified { request_id, report });
                }
                Effect::Verified { token: request_id, result: Err(status) } => {
                    let message = format!("shard {shard} was not compared: {status}");
                    self.event(StoreEvent::Failed { request_id, status, message });
                }
                Effect::Note(Note::Mended { .. }) => self.blocks_mended += 1,
                // The roles are in the facts that the control plane asks for.
                Effect::Note(_) => {}
            }
        }
        self.effects = effects;
    }

    fn wake_replicas(&mut self, ctx: &mut Context) {
        let now = clock::now();
        while let Some((at, shard)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            self.timers.remove(&(at, shard));
            if let Some(served) = self.shards.get_mut(&shard) {
                served.wake = None;
            }
            self.step(ctx, shard, Event::Tick);
        }
    }
}

impl Application for StoreApp {
    type Command = Command;

    fn start(&mut self, ctx: &mut Context) {
        let listening = self.listening.take().expect("started once");
        let bound = ctx.listen(self.config.listen).map(|(_, address)| address);
        // The starter waits for this.
        let _ = listening.send(bound);
    }

    fn command(&mut self, ctx: &mut Context, command: Command) {
        match command {
            Command::Control(request_id, op) => self.control(ctx, request_id, op),
            Command::Look(waiter) => drop(waiter.send(self.facts(ctx))),
            Command::Peers(peers) => {
                self.links.set_peers(ctx, &peers);
                for peer in &peers {
                    // Whoever registers holds the lock on its disks: earlier lives are over.
                    self.died(ctx, peer.store, peer.incarnation.saturating_sub(1));
                }
                let _ = self.heart.try_send(HeartCommand::Peers(peers));
            }
            Command::Dead(store, incarnation) => self.died(ctx, store, incarnation),
            Command::Newer(shard, epoch) => self.step(ctx, shard, Event::Newer { epoch }),
            Command::HoldGrowth(disk, is_held) => {
                let lanes = self.disks.get(disk).map(|disk| disk.lanes.clone());
                for lane in lanes.into_iter().flatten() {
                    self.lanes.hold_growth(lane, is_held);
                }
            }
            Command::FailDisk(disk, reason) => {
                let lanes = self.disks.get(disk).map(|disk| disk.lanes.clone());
                for lane in lanes.into_iter().flatten() {
                    self.lanes.fail(ctx, lane, reason.clone());
                }
            }
            Command::CheckBlocks(shard, runs) => {
                self.step(ctx, shard, Event::CheckBlocks { runs });
            }
            Command::Close(waiter) => {
                self.closing = Some((waiter, self.lanes.count()));
                for conn in self.conns.keys() {
                    ctx.close(*conn);
                }
                for lane in 0..self.lanes.count() {
                    self.lanes.request(ctx, lane, Op::Close, Waiter::Closed);
                }
            }
        }
    }

    fn disk(&mut self, ctx: &mut Context, disk: DiskIndex, done: &mut Vec<DiskDone>) {
        self.lanes.disk(ctx, disk, done);
    }

    fn accepted(&mut self, ctx: &mut Context, _listener: ListenerId, socket: OwnedFd) {
        if self.closing.is_some() {
            return;
        }
        let opener = Opener::default();
        let framing = opener.framing();
        // A socket that cannot be taken over is closed by being dropped, and counted.
        let Ok(id) = ctx.adopt(socket, framing, &[]) else { return };
        ctx.set_conn_deadline(id, Some(ctx.now().after_millis(HANDSHAKE_MS)));
        let caller = Caller::Unknown;
        let conn = Conn { opener, caller, requests: 0, bytes: 0, is_paused: false };
        self.conns.insert(id, conn);
    }

    fn opened(&mut self, _ctx: &mut Context, _conn: ConnId, _how: Opened) {}

    fn frame(&mut self, ctx: &mut Context, id: ConnId, frame: Frame) {
        if self.links.owns(id) {
            if let Some(Answered { from, reply, since }) = self.links.frame(ctx, id, frame) {
                if let Some(since) = since {
                    self.hops.peer_writes.over(since);
                }
                let shard = reply.shard;
                self.step(ctx, shard, Event::PeerReply { from, reply });
            }
            return;
        }
        let header = Header::parse(&frame.header).expect("the framing has checked it");
        match Request::parse(&header, frame) {
            Ok(Request { op: RequestOp::Hello(hello), .. }) => self.hello(ctx, id, &header, &hello),
            Ok(request) => self.request(ctx, id, header, request),
            Err(problem) => {
                let said_hello = self.conns.get(&id).is_some_and(|conn| conn.opener.is_open());
                if said_hello {
                    self.refuse(ctx, id, &header, problem.status());
                } else {
                    // A caller that has not said HELLO is told no epoch.
                    let reply = Reply::refuse(&header, Epoch(0), problem.status(), 0);
                    self.send(ctx, id, &reply);
                }
                if !problem.is_answerable() || !said_hello {
                    ctx.finish(id);
                }
            }
        }
    }

    fn closed(&mut self, ctx: &mut Context, id: ConnId, _reason: CloseReason) {
        if self.links.closed(ctx, id) {
            return;
        }
        if let Some(Conn { caller: Caller::Store(_), .. }) = self.conns.remove(&id) {
            self.asked.closed(id);
        }
        self.paths.closed(id);
    }

    fn timer(&mut self, _ctx: &mut Context) {}

    fn idle(&mut self, ctx: &mut Context) {
        self.wake_replicas(ctx);
        loop {
            let finished = self.lanes.turn(ctx);
            if finished.is_empty() {
                break;
            }
            finished.into_iter().for_each(|finished| self.finished(ctx, finished));
        }
        self.report_failures();
        self.settle_conf_waiters();
        let wake = self.timers.first().map(|(at, _)| *at);
        ctx.set_timer([self.lanes.take_wake(), wake].into_iter().flatten().min());
        if let Some((waiter, _)) = self.closing.take_if(|(_, left)| *left == 0) {
            let _ = waiter.send(());
            ctx.stop();
        }
    }
}
