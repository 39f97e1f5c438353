//! The heartbeat thread: leases asked for and given, apart from all other traffic.
//!
//! It has a reactor and connections of its own, so that bulk traffic cannot starve it. The machine
//! (`shard::heartbeat`) is behind a lock, because the data thread asks it on every read and tells it
//! of claims and promises at once; both hold the lock for some nanoseconds.
//!
//! **Vouching.** This thread vouches only for a data thread that is alive and whose devices answer
//! ([`Limits`]): when the data thread has not begun an iteration for too long, or an operation at a
//! device has been under way for too long, no heartbeat is sent and none is answered. The store's
//! leases run out, so others take its shards over; the promises that it holds for others are not
//! renewed, so as a secondary it is removed. A device that hangs without an error needs just that:
//! its lane would wait for ever, and with the lane every write of its shards. As one thread runs
//! all lanes of a store, one hanging device stops the vouching for all of them. When the device
//! answers again, the next heartbeat is sent, and the shards that are still this store's to serve
//! go on.
//!
//! **The conductor.** What this store was told of its conductor rides in every heartbeat and every
//! answer, and what other stores say of theirs is kept ([`Conductor`]), if they have proved to be
//! of this cluster, and whether or not this thread vouches.

use super::app::Command;
use super::conductor::{Conductor, Followed};
use super::identity::Identity;
use super::links::{Answered, Links, PeerAddress};
use crate::framing::Opener;
use proto::disk::DiskDone;
use proto::frame::Frame;
use proto::id_map::IdMap;
use proto::wire::{Header, Kind, Ping, Reply, ReplyOp, Request, RequestOp};
use proto::{Epoch, Seq, ShardId, Status, Tick};
use runtime::clock;
use runtime::reactor::{
    Application, CloseReason, ConnId, Context, DiskIndex, Handle, ListenerId, Opened,
};
use shard::conf::{Incarnation, StoreId};
use shard::heartbeat::{Effect, Event, Heartbeats, Leases};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

/// From what age on this thread does not vouch for the data thread.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Of its latest iteration.
    pub(super) thread_ms: u64,
    /// Of the oldest operation that a device of any of its lanes has not answered.
    pub(super) device_ms: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        // A healthy iteration takes a millisecond. A healthy device may take seconds for one
        // operation (garbage collection, a reset, a busy host): fail-over in 5 s is what a client
        // sees at worst, and a shorter time would depose primaries for nothing.
        Limits { thread_ms: 500, device_ms: 5_000 }
    }
}

/// The machine, as both threads see it.
#[derive(Clone)]
pub(super) struct Shared(Arc<Mutex<Heartbeats>>);

impl Shared {
    pub(super) fn new(machine: Heartbeats) -> Shared {
        Shared(Arc::new(Mutex::new(machine)))
    }

    fn lock(&self) -> MutexGuard<'_, Heartbeats> {
        self.0.lock().expect("a panic under this lock has ended the process")
    }

    pub(super) fn step(&self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.lock().step(clock::now(), event, &mut effects);
        effects
    }
}

impl Leases for Shared {
    fn lease_until(&self, shard: ShardId, store: StoreId, incarnation: Incarnation) -> Tick {
        self.lock().lease_until(shard, store, incarnation)
    }

    fn promised_until(&self, shard: ShardId) -> Tick {
        self.lock().promised_until(shard)
    }

    fn heard_at(&self, shard: ShardId, store: StoreId) -> Option<Tick> {
        self.lock().heard_at(shard, store)
    }
}

/// What the data thread tells this one.
pub(super) enum HeartCommand {
    /// What a claim, a promise or a death has brought.
    Effects(Vec<Effect>),
    /// Where the stores are.
    Peers(Vec<PeerAddress>),
    /// A connection whose caller has proved to be this store.
    Adopt { socket: OwnedFd, leftover: Vec<u8>, store: StoreId },
}

pub(super) struct HeartApp {
    machine: Shared,
    conductor: Conductor,
    links: Links,
    /// Connections of other stores.
    callers: IdMap<ConnId, StoreId>,
    /// PINGs that are being answered.
    asked: IdMap<u64, (ConnId, Header)>,
    next_token: u64,
    data: Handle<Command>,
    limits: Limits,
    wake: Option<Tick>,
}

impl HeartApp {
    pub(super) fn new(
        machine: Shared,
        conductor: Conductor,
        identity: Identity,
        data: Handle<Command>,
        limits: Limits,
    ) -> HeartApp {
        HeartApp {
            machine,
            conductor,
            links: Links::new(Kind::Heartbeat, identity),
            callers: IdMap::default(),
            asked: IdMap::default(),
            next_token: 1,
            data,
            limits,
            wake: None,
        }
    }

    /// Whether the data thread runs, and its devices answer.
    fn vouches(&self) -> bool {
        let now = clock::now();
        self.data.age_nanos(now) < self.limits.thread_ms * 1_000_000
            && self.data.oldest_io_nanos(now) < self.limits.device_ms * 1_000_000
    }

    /// Add what the lease machine leaves zero: the conductor that this store follows.
    fn complete(&self, ping: Ping) -> Ping {
        let Followed { term, lineage, revision } = self.conductor.told();
        Ping { term, lineage, revision, ..ping }
    }

    /// Keep what a PING tells of its conductor, if it names the store that the connection proved.
    fn hear(&self, from: StoreId, ping: &Ping) {
        if ping.store == from {
            let &Ping { term, lineage, revision, .. } = ping;
            self.conductor.hear(Followed { term, lineage, revision });
        }
    }

    fn step(&mut self, ctx: &mut Context, event: Event) {
        let effects = self.machine.step(event);
        self.carry_out(ctx, effects);
    }

    fn carry_out(&mut self, ctx: &mut Context, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Send { to, ping } => {
                    if self.vouches() {
                        self.links.send(ctx, to, request_of(self.complete(ping)));
                    }
                }
                Effect::Answer { token, ping } => {
                    let Some((conn, header)) = self.asked.remove(&token) else { continue };
                    let reply = Reply {
                        command_id: header.command_id,
                        shard: header.shard,
                        epoch: Epoch(0),
                        seq: Seq(0),
                        result: Ok(ReplyOp::Ping(self.complete(ping))),
                    };
                    let _ = ctx.send(conn, reply.encode());
                }
                Effect::Newer { shard, epoch } => {
                    // Said again with the next heartbeat if the queue is full.
                    let _ = self.data.try_send(Command::Newer(shard, epoch));
                }
                Effect::Wake(at) => {
                    self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
                }
            }
        }
    }
}

fn request_of(ping: Ping) -> Request {
    Request {
        command_id: 0,
        shard: ShardId::default(),
        epoch: Epoch(0),
        attach_epoch: 0,
        is_fua: false,
        op: RequestOp::Ping(ping),
    }
}

impl Application for HeartApp {
    type Command = HeartCommand;

    fn start(&mut self, _ctx: &mut Context) {}

    fn command(&mut self, ctx: &mut Context, command: HeartCommand) {
        match command {
            HeartCommand::Effects(effects) => self.carry_out(ctx, effects),
            HeartCommand::Peers(peers) => self.links.set_peers(ctx, &peers),
            HeartCommand::Adopt { socket, leftover, store } => {
                let opener = Opener::default();
                opener.open();
                if let Ok(conn) = ctx.adopt(socket, opener.framing(), &leftover) {
                    self.callers.insert(conn, store);
                }
            }
        }
    }

    fn disk(&mut self, _ctx: &mut Context, _disk: DiskIndex, _done: &mut Vec<DiskDone>) {}

    fn accepted(&mut self, _ctx: &mut Context, _listener: ListenerId, _socket: OwnedFd) {}

    fn opened(&mut self, _ctx: &mut Context, _conn: ConnId, _how: Opened) {}

    fn frame(&mut self, ctx: &mut Context, conn: ConnId, frame: Frame) {
        if self.links.owns(conn) {
            if let Some(Answered { from, reply, .. }) = self.links.frame(ctx, conn, frame)
                && let Ok(ReplyOp::Ping(ping)) = reply.result
            {
                self.hear(from, &ping);
                self.step(ctx, Event::Pong { from, ping });
            }
            return;
        }
        let Some(&from) = self.callers.get(&conn) else { return };
        let header = Header::parse(&frame.header).expect("the framing has checked it");
        match Request::parse(&header, frame).map(|request| request.op) {
            Ok(RequestOp::Ping(ping)) if ping.store == from => {
                self.hear(from, &ping);
                if self.vouches() {
                    let token = self.next_token;
                    self.next_token += 1;
                    self.asked.insert(token, (conn, header));
                    self.step(ctx, Event::Ping { from, token, ping });
                }
            }
            Ok(_) | Err(_) => {
                let reply = Reply::refuse(&header, Epoch(0), Status::Invalid, 0);
                let _ = ctx.send(conn, reply.encode());
                ctx.finish(conn);
            }
        }
    }

    fn closed(&mut self, ctx: &mut Context, conn: ConnId, _reason: CloseReason) {
        if self.links.closed(ctx, conn) {
            return;
        }
        self.callers.remove(&conn);

        self.asked.retain(|_, (asker, _)| *asker != conn);
    }

    fn timer(&mut self, _ctx: &mut Context) {}

    fn idle(&mut self, ctx: &mut Context) {
        if self.wake.is_some_and(|at| at <= clock::now()) {
            self.wake = None;
            self.step(ctx, Event::Tick);
        }
        ctx.set_timer(self.wake);
    }
}
