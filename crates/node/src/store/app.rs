//! The application of a store's reactor: connections, shards, lanes and control commands meet here.

use super::{ControlOp, DiskFacts, ReplicaFacts, Serving, StoreConfig, StoreEvent, StoreFacts};
use crate::disk::OpenDisk;
use crate::framing::Opener;
use crate::lanes::{Finished, Lanes};
use crate::status;
use crossbeam_channel::Sender;
use hmac::{Hmac, KeyInit, Mac};
use lane::{Op, Outcome, Problem};
use proto::disk::DiskDone;
use proto::frame::Frame;
use proto::wire::{
    ByteRange, CheckedData, Header, Hello, HelloReply, Limits, Peer, Reply, ReplyOp, Request,
    RequestOp, Rights, Side, SignedTicket, Ticket, VersionRange, Who,
};
use proto::{BLOCK_BYTES, Epoch, Lsn, Pool, ReplicaId, Seq, ShardId, Status};
use runtime::reactor::{
    Application, CloseReason, ConnId, Context, DiskIndex, HANDSHAKE_MS, ListenerId, Opened,
};
use runtime::wake::Wake;
use sha2::Sha256;
use shard::client::{Answer, ClientOp, ClientRequest};
use shard::paths::Paths;
use shard::primary::{Effect, Primary};
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

pub(super) enum Command {
    Control(u64, ControlOp),
    Look(Sender<StoreFacts>),
    Close(Sender<()>),
}

/// Who waits for a lane.
enum Waiter {
    Shard { shard: ShardId, op: u32 },
    Created { request_id: u64, lane: usize, conf: Vec<u8>, serving: Serving },
    Control { request_id: u64, then: Then },
    Closed,
}

enum Then {
    Nothing,
    Forget(ShardId),
    Grow(ShardId, u32),
    Follow(ShardId, Serving),
}

struct Served {
    lane: usize,
    primary: Primary,
}

struct Conn {
    opener: Opener,
    /// Set by HELLO.
    ticket: Option<Ticket>,
    requests: u32,
    bytes: u64,
    is_paused: bool,
}

/// A client's request that a shard works on.
struct Pending {
    conn: ConnId,
    header: Header,
    bytes: u64,
    /// The reply to a success without data; `None` for a read.
    done: Option<ReplyOp>,
    start_in_block: u32,
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
    conns: HashMap<ConnId, Conn>,
    paths: Paths<ConnId>,
    pending: HashMap<u64, Pending>,
    next_token: u64,
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
}

impl StoreApp {
    /// Serve the lanes of `disks`; `serving` says what the stored configurations mean.
    pub(super) fn new(
        config: StoreConfig,
        disks: Vec<OpenDisk>,
        hosted: Vec<HostedDisk>,
        serving: BTreeMap<ShardId, Serving>,
        outlets: Outlets,
        pool: Pool,
    ) -> StoreApp {
        let mut app = StoreApp {
            config,
            lanes: Lanes::new(disks, &pool),
            disks: hosted,
            shards: BTreeMap::new(),
            conns: HashMap::new(),
            paths: Paths::new(),
            pending: HashMap::new(),
            next_token: 1,
            events: outlets.events,
            wake: outlets.wake,
            listening: Some(outlets.listening),
            closing: None,
            pool,
        };
        for (shard, serving) in serving {
            app.follow(shard, serving);
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
        let refuse = |status| Reply::refuse(header, Epoch(0), status, 0);
        let verdict = match (&hello.who, hello.versions.agree(VersionRange::OWN)) {
            (_, None) => Err(Status::Unsupported),
            _ if hello.cluster_id != self.config.cluster_id => Err(Status::WrongCluster),
            (Who::Client(signed), Some(version)) => {
                if verify_ticket(&self.config.cluster_key, signed, now_seconds()) {
                    Ok((signed.ticket, version))
                } else {
                    Err(Status::Unauthenticated)
                }
            }
            // Replication between stores arrives with the three-replica landing.
            (Who::Peer(_) | Who::Heartbeat(_), Some(_)) => Err(Status::Unsupported),
        };
        let (ticket, version) = match verdict {
            Ok(accepted) => accepted,
            Err(status) => {
                self.send(ctx, id, &refuse(status));
                ctx.finish(id);
                return;
            }
        };
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let (slot, generation) = (hello.path.slot, hello.path.generation);
        if let Err(status) = self.paths.hello(id, ticket.session, slot, generation) {
            self.send(ctx, id, &refuse(status));
            ctx.finish(id);
            return;
        }
        let limits = hello.limits.agree(Limits::DEFAULT);
        conn.ticket = Some(ticket);
        conn.opener.open();
        ctx.set_conn_deadline(id, None);
        let peer = Peer {
            store: self.config.store_id,
            incarnation: self.config.incarnation,
            nonce: [0; 32],
            proof: [0; 32],
        };
        let reply =
            HelloReply { version, features: 0, lanes: self.lanes.count() as u16, limits, peer };
        self.reply_ok(ctx, id, header, Seq(0), ReplyOp::Hello(Box::new(reply)));
    }

    fn send(&self, ctx: &mut Context, id: ConnId, reply: &Reply) {
        // An ended connection has no reader; a full queue ends it.
        let _ = ctx.send(id, reply.encode());
    }

    fn reply_ok(&self, ctx: &mut Context, id: ConnId, header: &Header, seq: Seq, op: ReplyOp) {
        let epoch = self.shards.get(&header.shard).map_or(Epoch(0), |s| s.primary.epoch());
        let (command_id, shard) = (header.command_id, header.shard);
        self.send(ctx, id, &Reply { command_id, shard, epoch, seq, result: Ok(op) });
    }

    fn refuse(&self, ctx: &mut Context, id: ConnId, header: &Header, status: Status) {
        let epoch = self.shards.get(&header.shard).map_or(Epoch(0), |s| s.primary.epoch());
        self.send(ctx, id, &Reply::refuse(header, epoch, status, 0));
    }

    fn request(&mut self, ctx: &mut Context, id: ConnId, header: Header, request: Request) {
        let Some(ticket) = self.conns.get(&id).and_then(|conn| conn.ticket) else { return };
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
        let pending = Pending { conn: id, header, bytes, done, start_in_block };
        self.pending.insert(token, pending);
        let request = ClientRequest {
            token,
            epoch: request.epoch,
            attach_epoch: request.attach_epoch,
            op: client_op,
        };
        let mut effects = Vec::new();
        let served = self.shards.get_mut(&shard).expect("looked up above");
        served.primary.request(request, &mut effects);
        self.carry_out(ctx, shard, effects);
    }

    /// Count a request of a connection; a connection at its limits is not read for a while.
    fn charge(&mut self, ctx: &mut Context, id: ConnId, bytes: u64) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.requests += 1;
        conn.bytes += bytes;
        let limits = Limits::DEFAULT;
        let is_full = conn.requests >= limits.requests_max
            || conn.bytes >= u64::from(limits.inflight_bytes_max);
        if is_full && !conn.is_paused {
            conn.is_paused = true;
            ctx.pause(id);
        }
    }

    fn carry_out(&mut self, ctx: &mut Context, shard: ShardId, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Lane { op, request } => {
                    let lane = self.shards[&shard].lane;
                    self.lanes.request(ctx, lane, request, Waiter::Shard { shard, op });
                }
                Effect::Reply { token, result } => self.answer(ctx, token, result),
            }
        }
    }

    fn answer(&mut self, ctx: &mut Context, token: u64, result: Result<Answer, Status>) {
        let pending = self.pending.remove(&token).expect("one answer per request");
        let header = &pending.header;
        if let Some(conn) = self.conns.get_mut(&pending.conn) {
            conn.requests -= 1;
            conn.bytes -= pending.bytes;
            if std::mem::replace(&mut conn.is_paused, false) {
                ctx.resume(pending.conn);
            }
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
            ControlOp::Create { disk_uuid, replica, blocks, conf, serving } => {
                self.create(ctx, request_id, (replica, blocks), (conf, serving), &disk_uuid)
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
                (Op::Resize { shard_ix: ix, blocks }, Then::Grow(shard, blocks))
            }),
            ControlOp::SetConf(shard, blob, serving) => self.with(ctx, shard, request_id, |ix| {
                (Op::Conf { shard_ix: ix, blob }, Then::Follow(shard, serving))
            }),
        };
        match done {
            Ok(false) => {}
            Ok(true) => self.event(StoreEvent::Done { request_id }),
            Err((status, message)) => {
                self.event(StoreEvent::Failed { request_id, status, message });
            }
        }
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
        (conf, serving): (Vec<u8>, Serving),
        disk_uuid: &str,
    ) -> Result<bool, (Status, String)> {
        let shard = replica.shard;
        if let Some((lane, shard_ix)) = self.place(shard) {
            let held = self.lanes.lane(lane).tables().shard(shard_ix).expect("just found").blocks;
            if held != blocks {
                let text = format!("shard {shard} exists with {held} blocks, not {blocks}");
                return Err((Status::AlreadyExists, text));
            }
            let op = Op::Conf { shard_ix, blob: conf };
            let then = Then::Follow(shard, serving);
            self.lanes.request(ctx, lane, op, Waiter::Control { request_id, then });
            return Ok(false);
        }
        let Some(disk) = self.disks.iter().find(|disk| disk.facts.uuid == disk_uuid) else {
            return Err((Status::NotFound, format!("this store has no disk {disk_uuid}")));
        };
        let working = disk.lanes.clone().filter(|&lane| self.lanes.lane(lane).failure().is_none());
        let Some(lane) = working.max_by_key(|&lane| self.lanes.lane(lane).free_slots()) else {
            return Err((Status::DiskFailed, format!("disk {disk_uuid} has stopped")));
        };
        let op = Op::Create { replica, blocks, family: shard.volume };
        let waiter = Waiter::Created { request_id, lane, conf, serving };
        self.lanes.request(ctx, lane, op, waiter);
        Ok(false)
    }

    fn finished(&mut self, ctx: &mut Context, finished: Finished<Waiter>) {
        match finished.waiter {
            Waiter::Shard { shard, op } => {
                // A deleted shard's operations were all answered before it went.
                let Some(served) = self.shards.get_mut(&shard) else { return };
                let mut effects = Vec::new();
                served.primary.lane_done(op, finished.result, &mut effects);
                self.carry_out(ctx, shard, effects);
            }
            Waiter::Created { request_id, lane, conf, serving } => match finished.result {
                Ok(Outcome::Created { shard_ix }) => {
                    self.serve(lane, shard_ix, serving);
                    // The replica is known to the control plane once its configuration is durable.
                    let waiter = Waiter::Control { request_id, then: Then::Nothing };
                    self.lanes.request(ctx, lane, Op::Conf { shard_ix, blob: conf }, waiter);
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
                        Then::Nothing => {}
                        Then::Forget(shard) => self.forget(ctx, shard),
                        Then::Grow(shard, blocks) => {
                            if let Some(served) = self.shards.get_mut(&shard) {
                                served.primary.grow(blocks);
                            }
                        }
                        Then::Follow(shard, serving) => self.follow(shard, serving),
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

    fn serve(&mut self, lane: usize, shard_ix: u32, serving: Serving) {
        let shard = self.lanes.lane(lane).tables().shard(shard_ix).expect("the lane holds it");
        let (id, blocks, applied) = (shard.replica.shard, shard.blocks, shard.applied);
        let confs = (Epoch(serving.epoch), serving.attach_epoch);
        let primary = Primary::new(shard_ix, blocks, confs, applied, self.pool.clone());
        self.shards.insert(id, Served { lane, primary });
    }

    fn follow(&mut self, shard: ShardId, serving: Serving) {
        match self.shards.get_mut(&shard) {
            Some(served) => served.primary.follow(Epoch(serving.epoch), serving.attach_epoch),
            None => {
                if let Some((lane, shard_ix)) = self.place(shard) {
                    self.serve(lane, shard_ix, serving);
                }
            }
        }
    }

    /// The replica is gone: what its clients still wait for will not be done here.
    fn forget(&mut self, ctx: &mut Context, shard: ShardId) {
        self.shards.remove(&shard);
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
                    replicas.push(ReplicaFacts {
                        replica: shard.replica,
                        blocks: shard.blocks,
                        disk: disk_ix,
                        lane: lane_ix,
                        conf: shard.conf.clone(),
                        commit: shard.commit.0,
                        used_bytes: u64::from(shard.used_slots) * slot,
                    });
                }
            }
            disks.push(facts);
        }
        let sessions = self.conns.values().filter(|conn| conn.ticket.is_some()).count();
        StoreFacts { replicas, disks, sessions }
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
        let opener = Opener::default();
        let framing = opener.framing(Side::Called);
        // A socket that cannot be taken over is closed by being dropped, and counted.
        let Ok(id) = ctx.adopt(socket, framing, &[]) else { return };
        ctx.set_conn_deadline(id, Some(ctx.now().after_millis(HANDSHAKE_MS)));
        let conn = Conn { opener, ticket: None, requests: 0, bytes: 0, is_paused: false };
        self.conns.insert(id, conn);
    }

    fn opened(&mut self, _ctx: &mut Context, _conn: ConnId, _how: Opened) {}

    fn frame(&mut self, ctx: &mut Context, id: ConnId, frame: Frame) {
        let header = Header::parse(&frame.header).expect("the framing has checked it");
        match Request::parse(&header, frame) {
            Ok(Request { op: RequestOp::Hello(hello), .. }) => self.hello(ctx, id, &header, &hello),
            Ok(request) => self.request(ctx, id, header, request),
            Err(problem) => {
                self.refuse(ctx, id, &header, problem.status());
                let said_hello = self.conns.get(&id).is_some_and(|conn| conn.ticket.is_some());
                if !problem.is_answerable() || !said_hello {
                    ctx.finish(id);
                }
            }
        }
    }

    fn closed(&mut self, _ctx: &mut Context, id: ConnId, _reason: CloseReason) {
        self.conns.remove(&id);
        self.paths.closed(id);
    }

    fn timer(&mut self, _ctx: &mut Context) {}

    fn idle(&mut self, ctx: &mut Context) {
        loop {
            let finished = self.lanes.turn(ctx);
            if finished.is_empty() {
                break;
            }
            finished.into_iter().for_each(|finished| self.finished(ctx, finished));
        }
        self.report_failures();
        ctx.set_timer(self.lanes.take_wake());
        if let Some((waiter, _)) = self.closing.take_if(|(_, left)| *left == 0) {
            let _ = waiter.send(());
            ctx.stop();
        }
    }
}
