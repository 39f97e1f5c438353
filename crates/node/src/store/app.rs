//! The application of a store's reactor: connections, shards, lanes and control commands meet here.

use super::heart::{HeartCommand, Shared};
use super::hops::{Hops, LaneWork, is_prepare};
use super::identity::{Identity, Prover, nonce};
use super::links::{Answered, Links, PeerAddress};
use super::{ControlOp, DiskFacts, ReplicaFacts, StoreConfig, StoreEvent, StoreFacts};
use crate::disk::OpenDisk;
use crate::framing::Opener;
use crate::lanes::{Finished, Lanes};
use crate::status;
use crossbeam_channel::Sender;
use hmac::{Hmac, KeyInit, Mac};
use lane::{Op, Outcome, Problem};
use proto::disk::DiskDone;
use proto::frame::Frame;
use proto::id_map::IdMap;
use proto::wire::{
    ByteRange, CheckedData, Header, Hello, HelloReply, Kind, Limits, Peer, Reply, ReplyOp, Request,
    RequestOp, Rights, Side, SignedTicket, Ticket, VersionRange, Who,
};
use proto::{BLOCK_BYTES, Epoch, Lsn, Pool, ReplicaId, Seq, ShardId, Status, Tick};
use runtime::clock;
use runtime::reactor::{
    Application, CloseReason, ConnId, Context, DiskIndex, HANDSHAKE_MS, Handle, ListenerId, Opened,
};
use runtime::wake::Wake;
use sha2::Sha256;
use shard::client::{Answer, ClientOp, ClientRequest};
use shard::conf::{Incarnation, ShardConf, StoreId};
use shard::heartbeat::{Event as HeartEvent, Timing};
use shard::mutant::Mutant;
use shard::paths::Paths;
use shard::replica::{Effect, Event, Options, Replica, View};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

pub(super) enum Command {
    Control(u64, ControlOp),
    Look(Sender<StoreFacts>),
    Peers(Vec<PeerAddress>),
    Dead(StoreId, Incarnation),
    /// A heartbeat was refused by somebody who has promised this epoch.
    Newer(ShardId, Epoch),
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

struct Served {
    lane: usize,
    replica: Replica,
    /// When it wants to be woken.
    wake: Option<Tick>,
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

/// A client's request that a shard works on.
struct Pending {
    conn: ConnId,
    header: Header,
    bytes: u64,
    /// The reply to a success without data; `None` for a read.
    done: Option<ReplyOp>,
    start_in_block: u32,
    since: Tick,
}

/// A request of another store that a replica works on.
struct Asked {
    conn: ConnId,
    command_id: u64,
    since: Tick,
    is_prepare: bool,
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
    asked: IdMap<u64, Asked>,
    hops: Hops,
    links: Links,
    identity: Identity,
    booted: Tick,
    leases: Shared,
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

/// True when the cluster key has signed the ticket and it has not expired.
#[must_use]
pub fn verify_ticket(key: &[u8], signed: &SignedTicket, now_seconds: u64) -> bool {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(&signed.ticket.signed_bytes());
    // Constant time: how much of a forged MAC is right must not show.
    mac.verify_slice(&signed.mac).is_ok() && signed.ticket.expires > now_seconds
}

fn zero(range: ByteRange) -> ClientOp {
    ClientOp::Zero { offset: range.offset(), length: range.length() }
}

fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
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
            asked: IdMap::default(),
            hops: Hops::default(),
            links: Links::new(Kind::Peer, identity.clone()),
            identity,
            booted: outlets.booted,
            leases: outlets.leases,
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

    // ----------------------------------------------------------------------------- connections --

    fn hello(&mut self, ctx: &mut Context, id: ConnId, header: &Header, hello: &Hello) {
        let verdict = match (&hello.who, hello.versions.agree(VersionRange::OWN)) {
            (_, None) => Err(Status::Unsupported),
            _ if hello.cluster_id != self.config.cluster_id => Err(Status::WrongCluster),
            (Who::Client(signed), Some(version)) => {
                if verify_ticket(&self.config.cluster_key, signed, now_seconds()) {
                    self.hello_client(id, signed.ticket, hello).map(|peer| (peer, version))
                } else {
                    Err(Status::Unauthenticated)
                }
            }
            (Who::Peer(peer), Some(version)) => {
                self.hello_store(id, Kind::Peer, *peer).map(|peer| (peer, version))
            }
            (Who::Heartbeat(peer), Some(version)) => {
                self.hello_store(id, Kind::Heartbeat, *peer).map(|peer| (peer, version))
            }
        };
        let (peer, version) = match verdict {
            Ok(accepted) => accepted,
            Err(status) => {
                self.send(ctx, id, &Reply::refuse(header, Epoch(0), status, 0));
                ctx.finish(id);
                return;
            }
        };
        let limits = hello.limits.agree(Limits::DEFAULT);
        let reply =
            HelloReply { version, features: 0, lanes: self.lanes.count() as u16, limits, peer };
        self.reply_ok(ctx, id, header, Seq(0), ReplyOp::Hello(Box::new(reply)));
        let Some(conn) = self.conns.get(&id) else { return };
        match conn.caller {
            Caller::Client(_) => ctx.set_conn_deadline(id, None),
            Caller::Store(store) => {
                ctx.set_conn_deadline(id, None);
                if matches!(hello.who, Who::Heartbeat(_)) {
                    self.hand_over(ctx, id, store);
                }
            }
            // The deadline of the handshake stands until the proof has come.
            Caller::Claims(..) | Caller::Unknown => {}
        }
    }

    fn hello_client(&mut self, id: ConnId, ticket: Ticket, hello: &Hello) -> Result<Peer, Status> {
        let (slot, generation) = (hello.path.slot, hello.path.generation);
        self.paths.hello(id, ticket.session, slot, generation)?;
        let Some(conn) = self.conns.get_mut(&id) else { return Err(Status::Cancelled) };
        conn.caller = Caller::Client(ticket);
        conn.opener.open();
        Ok(self.identity.peer([0; 32], [0; 32]))
    }

    /// First and second HELLO of another store.
    fn hello_store(&mut self, id: ConnId, kind: Kind, peer: Peer) -> Result<Peer, Status> {
        let Some(conn) = self.conns.get_mut(&id) else { return Err(Status::Cancelled) };
        match conn.caller {
            Caller::Unknown if peer.store == self.identity.store => Err(Status::Invalid),
            Caller::Unknown => {
                let mut own = self.identity.peer(nonce(), [0; 32]);
                own.proof = self.identity.prove(kind, Prover::Called, &peer, &own);
                conn.caller = Caller::Claims(kind, own, peer);
                Ok(own)
            }
            Caller::Claims(claimed, own, first) => {
                let is_same = claimed == kind
                    && (first.store, first.incarnation, first.nonce)
                        == (peer.store, peer.incarnation, peer.nonce);
                let sides = (&first, &own);
                if !is_same || !self.identity.verify(kind, Prover::Caller, sides, &peer.proof) {
                    return Err(Status::Unauthenticated);
                }
                conn.caller = Caller::Store(peer.store);
                conn.opener.open();
                Ok(own)
            }
            Caller::Client(_) | Caller::Store(_) => Err(Status::Invalid),
        }
    }

    /// Heartbeats have a thread of their own.
    fn hand_over(&mut self, ctx: &mut Context, id: ConnId, store: StoreId) {
        match ctx.release(id) {
            Some((socket, leftover)) => {
                self.conns.remove(&id);
                let adopt = HeartCommand::Adopt { socket, leftover, store };
                // A full queue drops the connection, and the other side begins it again.
                let _ = self.heart.try_send(adopt);
            }
            None => ctx.close(id),
        }
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
        let epoch = self.epoch_of(header.shard);
        let (command_id, shard) = (header.command_id, header.shard);
        self.send(ctx, id, &Reply { command_id, shard, epoch, seq, result: Ok(op) });
    }

    fn refuse(&self, ctx: &mut Context, id: ConnId, header: &Header, status: Status) {
        let epoch = self.epoch_of(header.shard);
        self.send(ctx, id, &Reply::refuse(header, epoch, status, 0));
    }

    fn request(&mut self, ctx: &mut Context, id: ConnId, header: Header, request: Request) {
        let ticket = match self.conns.get(&id).map(|conn| &conn.caller) {
            Some(Caller::Client(ticket)) => *ticket,
            Some(Caller::Store(store)) => {
                let store = *store;
                return self.peer_request(ctx, id, store, request);
            }
            Some(Caller::Unknown | Caller::Claims(..)) | None => return,
        };
        let (client_op, done, start_in_block) = match request.op {
            RequestOp::Ping(ping) => {
                return self.reply_ok(ctx, id, &header, Seq(0), ReplyOp::Ping(ping));
            }
            RequestOp::FencePath { slot, generation } => {
                for conn in self.paths.fence(id, header, slot, generation) {
                    ctx.close(conn);
                }
                return self.answer_fences(ctx);
            }
            RequestOp::Read { range, snap_seq: None } => {
                let op = ClientOp::Read { offset: range.offset(), length: range.length() };
                (op, None, (range.offset() % BLOCK_BYTES as u64) as u32)
            }
            RequestOp::Write(data) => {
                let (range, crcs, data) = data.into_parts();
                let op = ClientOp::Write { offset: range.offset(), crcs, data };
                (op, Some(ReplyOp::Write), 0)
            }
            RequestOp::Discard(range) => (zero(range), Some(ReplyOp::Discard), 0),
            RequestOp::WriteZeroes { range, .. } => (zero(range), Some(ReplyOp::WriteZeroes), 0),
            RequestOp::Flush => (ClientOp::Flush, Some(ReplyOp::Flush), 0),
            RequestOp::Read { snap_seq: Some(_), .. }
            | RequestOp::CompareAndWrite { .. }
            | RequestOp::Hello(_)
            | RequestOp::Prepare(_)
            | RequestOp::Settle(_)
            | RequestOp::Tails(_)
            | RequestOp::Copy(_)
            | RequestOp::Digest(_)
            | RequestOp::Snap(_)
            | RequestOp::Attach(..)
            | RequestOp::NeedConf(_) => {
                return self.refuse(ctx, id, &header, Status::Unsupported);
            }
        };
        let changes = matches!(client_op, ClientOp::Write { .. } | ClientOp::Zero { .. });
        // What the header says of attaching must be what the conductor has signed.
        if ticket.volume != header.shard.volume || request.attach_epoch > ticket.attach_epoch {
            return self.refuse(ctx, id, &header, Status::Denied);
        }
        if changes && ticket.rights != Rights::READ_WRITE {
            return self.refuse(ctx, id, &header, Status::ReadOnly);
        }
        if !self.shards.contains_key(&header.shard) {
            return self.refuse(ctx, id, &header, Status::NotPrimary);
        }
        let bytes = match &client_op {
            ClientOp::Read { length, .. } => u64::from(*length),
            ClientOp::Write { data, .. } => data.iter().map(|buf| buf.len() as u64).sum(),
            ClientOp::Zero { .. } | ClientOp::Flush => 0,
        };
        let token = self.next_token;
        self.next_token += 1;
        let shard = header.shard;
        if !self.paths.begin(id, &header, token) {
            // Its slot is fenced: the client has been told that this has no effect.
            return;
        }
        self.charge(ctx, id, bytes);
        let since = clock::now();
        let pending = Pending { conn: id, header, bytes, done, start_in_block, since };
        self.pending.insert(token, pending);
        let request = ClientRequest {
            token,
            epoch: request.epoch,
            attach_epoch: request.attach_epoch,
            op: client_op,
        };
        self.step(ctx, shard, Event::Client(request));
    }

    /// A request of another store's replica.
    fn peer_request(&mut self, ctx: &mut Context, id: ConnId, from: StoreId, request: Request) {
        let (shard, command_id) = (request.shard, request.command_id);
        if !self.shards.contains_key(&shard) {
            let failure = proto::wire::Failure {
                opcode: request.op.opcode(),
                status: Status::NotFound,
                detail: 0,
            };
            let (epoch, seq, result) = (Epoch(0), Seq(0), Err(failure));
            return self.send(ctx, id, &Reply { command_id, shard, epoch, seq, result });
        }
        let token = self.next_token;
        self.next_token += 1;
        let (since, is_prepare) = (clock::now(), is_prepare(&request.op));
        self.asked.insert(token, Asked { conn: id, command_id, since, is_prepare });
        self.step(ctx, shard, Event::Peer { from, token, request });
    }

    /// Count a request of a connection; a connection at its limits is not read for a while.
    fn charge(&mut self, ctx: &mut Context, id: ConnId, bytes: u64) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.requests += 1;
        conn.bytes += bytes;
        if conn.is_full() && !conn.is_paused {
            conn.is_paused = true;
            ctx.pause(id);
        }
    }

    /// Give a replica an event, and do what it asks for.
    fn step(&mut self, ctx: &mut Context, shard: ShardId, event: Event) {
        let Some(served) = self.shards.get_mut(&shard) else { return };
        let lane = served.lane;
        let view = View { tables: self.lanes.lane(lane).tables(), leases: &self.leases };
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
                Effect::Answer { token, mut reply } => {
                    if let Some(asked) = self.asked.remove(&token) {
                        if asked.is_prepare {
                            self.hops.served_writes.over(asked.since);
                        }
                        reply.command_id = asked.command_id;
                        self.send(ctx, asked.conn, &reply);
                    }
                }
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
                // The roles are in the facts that the control plane asks for.
                Effect::Note(_) => {}
            }
        }
        self.effects = effects;
    }

    /// A life of a store, and every earlier one, is over.
    fn died(&mut self, ctx: &mut Context, store: StoreId, incarnation: Incarnation) {
        let newest = self.dead.entry(store).or_default();
        if incarnation <= *newest {
            return;
        }
        *newest = incarnation;
        self.beat(HeartEvent::Dead { store, incarnation });
        let shards: Vec<ShardId> = self.shards.keys().copied().collect();
        for shard in shards {
            self.step(ctx, shard, Event::Dead { store, incarnation });
        }
    }

    /// Tell the heartbeat machine at once, and its thread what follows.
    fn beat(&self, event: HeartEvent) {
        let effects = self.leases.step(event);
        if !effects.is_empty() {
            // A full queue loses a PING or a wake, which the thread's own tick makes up for.
            let _ = self.heart.try_send(HeartCommand::Effects(effects));
        }
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

    fn settle_conf_waiters(&mut self) {
        let mut waiters = std::mem::take(&mut self.conf_waiters);
        waiters.retain(|&(shard, epoch, request_id)| {
            let is_over = !self.shards.contains_key(&shard) || self.epoch_of(shard) >= epoch;
            if is_over {
                self.event(StoreEvent::Done { request_id });
            }
            !is_over
        });
        self.conf_waiters.append(&mut waiters);
    }

    fn answer(&mut self, ctx: &mut Context, token: u64, result: Result<Answer, Status>) {
        let pending = self.pending.remove(&token).expect("one answer per request");
        let header = &pending.header;
        if let Some(conn) = self.conns.get_mut(&pending.conn) {
            conn.requests -= 1;
            conn.bytes -= pending.bytes;
            if conn.is_paused && !conn.is_full() {
                conn.is_paused = false;
                ctx.resume(pending.conn);
            }
        }
        match pending.done {
            None => self.hops.client_reads.over(pending.since),
            Some(_) => self.hops.client_writes.over(pending.since),
        }
        let (lsn, status) = match &result {
            // A change that needed no operation has no lsn.
            Ok(Answer::Done(seq)) if *seq > Seq(0) => {
                (Some(Lsn { epoch: Epoch(header.epoch), seq: *seq }), Status::Ok)
            }
            Ok(Answer::Done(_) | Answer::Read { .. }) => (None, Status::Ok),
            Err(status) => (None, *status),
        };
        self.paths.finish(token, lsn, status);
        match result {
            Ok(Answer::Done(seq)) => {
                let op = pending.done.clone().expect("only a read brings data");
                self.reply_ok(ctx, pending.conn, header, seq, op);
            }
            Ok(Answer::Read { crcs, data }) => {
                let data = CheckedData::assume(pending.start_in_block, crcs, data);
                self.reply_ok(ctx, pending.conn, header, Seq(0), ReplyOp::Read(data));
            }
            Err(status) => self.refuse(ctx, pending.conn, header, status),
        }
        self.answer_fences(ctx);
    }

    fn answer_fences(&mut self, ctx: &mut Context) {
        for (conn, header, outcomes) in self.paths.ready_fences() {
            self.reply_ok(ctx, conn, &header, Seq(0), ReplyOp::FencePath(outcomes));
        }
    }

    // ---------------------------------------------------------------------------------- control --

    fn control(&mut self, ctx: &mut Context, request_id: u64, op: ControlOp) {
        let done = match op {
            ControlOp::Create { disk_uuid, replica, blocks, conf } => {
                self.create(ctx, request_id, (replica, blocks), conf, &disk_uuid)
            }
            ControlOp::Delete(shard) => match self.place(shard) {
                None => Ok(true),
                Some((lane, shard_ix)) => {
                    // No new requests from here on; the lane waits for those under way.
                    let then = Then::Forget(shard);
                    let waiter = Waiter::Control { request_id, then };
                    self.lanes.request(ctx, lane, Op::Delete { shard_ix }, waiter);
                    Ok(false)
                }
            },
            ControlOp::Resize(shard, blocks) => self.with(ctx, shard, request_id, |ix| {
                (Op::Resize { shard_ix: ix, blocks }, Then::Grow(shard))
            }),
            ControlOp::SetConf(conf) => self.set_conf(ctx, request_id, conf),
            ControlOp::Verify(shard) if self.shards.contains_key(&shard) => {
                self.step(ctx, shard, Event::Verify { token: request_id });
                Ok(false)
            }
            ControlOp::Verify(shard) => {
                Err((Status::NotFound, format!("no replica of shard {shard} on this store")))
            }
        };
        match done {
            Ok(false) => {}
            Ok(true) => self.event(StoreEvent::Done { request_id }),
            Err((status, message)) => {
                self.event(StoreEvent::Failed { request_id, status, message });
            }
        }
    }

    /// Pass a configuration on; done when it, or a newer one, is followed.
    fn set_conf(
        &mut self,
        ctx: &mut Context,
        request_id: u64,
        conf: ShardConf,
    ) -> Result<bool, (Status, String)> {
        let (shard, epoch) = (conf.shard, conf.epoch);
        if !self.shards.contains_key(&shard) {
            return Err((Status::NotFound, format!("no replica of shard {shard} on this store")));
        }
        self.conf_waiters.push((shard, epoch, request_id));
        self.step(ctx, shard, Event::Conf(conf));
        Ok(false)
    }

    fn with(
        &mut self,
        ctx: &mut Context,
        shard: ShardId,
        request_id: u64,
        make: impl FnOnce(u32) -> (Op, Then),
    ) -> Result<bool, (Status, String)> {
        let Some((lane, shard_ix)) = self.place(shard) else {
            return Err((Status::NotFound, format!("no replica of shard {shard} on this store")));
        };
        let (op, then) = make(shard_ix);
        self.lanes.request(ctx, lane, op, Waiter::Control { request_id, then });
        Ok(false)
    }

    /// Lane and shard index of a shard's replica.
    fn place(&self, shard: ShardId) -> Option<(usize, u32)> {
        (0..self.lanes.count())
            .find_map(|lane| Some((lane, self.lanes.lane(lane).tables().find(shard)?)))
    }

    fn create(
        &mut self,
        ctx: &mut Context,
        request_id: u64,
        (replica, blocks): (ReplicaId, u32),
        conf: ShardConf,
        disk_uuid: &str,
    ) -> Result<bool, (Status, String)> {
        let shard = replica.shard;
        if let Some((lane, shard_ix)) = self.place(shard) {
            let held = self.lanes.lane(lane).tables().shard(shard_ix).expect("just found").blocks;
            if held != blocks {
                let text = format!("shard {shard} exists with {held} blocks, not {blocks}");
                return Err((Status::AlreadyExists, text));
            }
            return self.set_conf(ctx, request_id, conf);
        }
        let Some(disk) = self.disks.iter().find(|disk| disk.facts.uuid == disk_uuid) else {
            return Err((Status::NotFound, format!("this store has no disk {disk_uuid}")));
        };
        let working = disk.lanes.clone().filter(|&lane| self.lanes.lane(lane).failure().is_none());
        let Some(lane) = working.max_by_key(|&lane| self.lanes.lane(lane).free_slots()) else {
            return Err((Status::DiskFailed, format!("disk {disk_uuid} has stopped")));
        };
        let op = Op::Create { replica, blocks, family: shard.volume };
        let waiter = Waiter::Created { request_id, lane, conf };
        self.lanes.request(ctx, lane, op, waiter);
        Ok(false)
    }

    fn finished(&mut self, ctx: &mut Context, finished: Finished<Waiter>) {
        match finished.waiter {
            Waiter::Shard { shard, op, since, work } => {
                match work {
                    LaneWork::Read => self.hops.lane_reads.over(since),
                    LaneWork::Write => self.hops.lane_writes.over(since),
                    LaneWork::Other => {}
                }
                // A deleted shard's operations were all answered before it went.
                self.step(ctx, shard, Event::Lane { op, result: finished.result });
            }
            Waiter::Created { request_id, lane, conf } => match finished.result {
                Ok(Outcome::Created { shard_ix }) => {
                    self.host(lane, shard_ix);
                    self.catch_up(ctx, conf.shard);
                    // The replica is known to the control plane once its configuration is durable.
                    if let Err((status, message)) = self.set_conf(ctx, request_id, conf) {
                        self.event(StoreEvent::Failed { request_id, status, message });
                    }
                }
                Ok(_) => unreachable!("a creation answers so"),
                Err(problem) => self.failed(request_id, &problem),
            },
            // Deleted twice: the second finds nothing, which is what was asked for.
            Waiter::Control { request_id, then: Then::Forget(_) }
                if matches!(finished.result, Err(Problem::NotFound { .. })) =>
            {
                self.event(StoreEvent::Done { request_id });
            }
            Waiter::Control { request_id, then } => match finished.result {
                Ok(_) => {
                    match then {
                        Then::Forget(shard) => self.forget(ctx, shard),
                        Then::Grow(shard) => self.step(ctx, shard, Event::Grown),
                    }
                    self.event(StoreEvent::Done { request_id });
                }
                Err(problem) => self.failed(request_id, &problem),
            },
            Waiter::Closed => {
                if let Some((_, left)) = &mut self.closing {
                    *left -= 1;
                }
            }
        }
    }

    fn failed(&self, request_id: u64, problem: &Problem) {
        let (status, message) = (status::of_lane(problem), problem.to_string());
        self.event(StoreEvent::Failed { request_id, status, message });
    }

    /// Run the machine of a replica that a lane holds.
    fn host(&mut self, lane: usize, shard_ix: u32) {
        let tables = self.lanes.lane(lane).tables();
        let id = tables.shard(shard_ix).expect("the lane holds it").replica.shard;
        let options = Options {
            shard_ix,
            store: self.identity.store,
            incarnation: self.identity.incarnation,
            booted: self.booted,
            timing: Timing::default(),
            pool: self.pool.clone(),
            mutant: Mutant::None,
        };
        let view = View { tables, leases: &self.leases };
        let replica = Replica::open(options, &view).expect("looked at before the start");
        self.timers.insert((Tick(0), id));
        self.shards.insert(id, Served { lane, replica, wake: Some(Tick(0)) });
    }

    /// Tell a replica that was just made what the others were told before.
    fn catch_up(&mut self, ctx: &mut Context, shard: ShardId) {
        for (store, incarnation) in self.dead.clone() {
            self.step(ctx, shard, Event::Dead { store, incarnation });
        }
    }

    /// The replica is gone: what its clients still wait for will not be done here.
    fn forget(&mut self, ctx: &mut Context, shard: ShardId) {
        if let Some(wake) = self.shards.remove(&shard).and_then(|served| served.wake) {
            self.timers.remove(&(wake, shard));
        }
        self.beat(HeartEvent::Unclaim { shard });
        let open = self.pending.iter().filter(|(_, pending)| pending.header.shard == shard);
        let tokens: Vec<u64> = open.map(|(&token, _)| token).collect();
        for token in tokens {
            self.answer(ctx, token, Err(Status::NotPrimary));
        }
    }

    fn facts(&self) -> StoreFacts {
        let mut replicas = Vec::new();
        let mut disks = Vec::new();
        for (disk_ix, disk) in self.disks.iter().enumerate() {
            let mut facts = disk.facts.clone();
            for lane_ix in disk.lanes.clone() {
                let lane = self.lanes.lane(lane_ix);
                let slot = lane::format::SLOT_BYTES;
                facts.bytes.0 += u64::from(lane.space().total()) * slot;
                facts.bytes.1 += u64::from(lane.free_slots()) * slot;
                facts.failure = facts.failure.or_else(|| lane.failure().map(str::to_owned));
                facts.counters.push(lane.counters());
                facts.reports.push(self.lanes.report(lane_ix));
                for shard in lane.tables().shards.iter().flatten() {
                    let served = self.shards.get(&shard.replica.shard);
                    let tables = lane.tables();
                    let view = View { tables, leases: &self.leases };
                    replicas.push(ReplicaFacts {
                        epoch: self.epoch_of(shard.replica.shard).0,
                        promised: served.map_or(0, |served| served.replica.promised().0),
                        complete: served.map_or(0, |served| served.replica.complete(&view).0),
                        role: served.map(|served| served.replica.role()),
                        resyncs: served.map_or(Vec::new(), |served| served.replica.resyncs()),
                        verifying: served.and_then(|served| served.replica.verifying()),
                        replica: shard.replica,
                        blocks: shard.blocks,
                        disk: disk_ix,
                        lane: lane_ix,
                        commit: shard.commit.0,
                        used_bytes: u64::from(shard.used_slots) * slot,
                    });
                }
            }
            disks.push(facts);
        }
        let sessions = self.clients();
        StoreFacts { replicas, disks, sessions, hops: self.hops }
    }

    fn clients(&self) -> usize {
        let is_client = |conn: &&Conn| matches!(conn.caller, Caller::Client(_));
        self.conns.values().filter(is_client).count()
    }

    fn report_failures(&mut self) {
        for (index, disk) in self.disks.iter_mut().enumerate() {
            let failure = disk.lanes.clone().find_map(|lane| self.lanes.lane(lane).failure());
            if let Some(message) = failure.filter(|_| !disk.is_reported) {
                disk.is_reported = true;
                let message = message.to_owned();
                let _ = self.events.send(StoreEvent::DiskFailed { disk: index, message });
                self.wake.signal();
            }
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
            Command::Look(waiter) => drop(waiter.send(self.facts())),
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
        let framing = opener.framing(Side::Called);
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
                    // Epochs are nobody's business before that.
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
            self.asked.retain(|_, asked| asked.conn != id);
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
