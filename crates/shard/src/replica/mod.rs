//! One replica of one shard, in whatever role its configuration gives it.
//!
//! **What it owns.** Everything that a replica decides: which configuration it follows and what it
//! has promised (`adopt.rs`, `stored.rs`), what it accepts from a primary as secondary or learner
//! (`follower.rs`), and as primary the order of operations and their commitment (`reign.rs`),
//! clients (`serve.rs`), reads and mending of damaged blocks (`repair.rs`), the beginning of a
//! reign (`settle.rs`), its transfer (`transfer.rs`) and learners (`resync.rs`, and how fast:
//! `pace.rs`); and which blocks are unreadable (`damage.rs`). It has no clock, disk or socket:
//! events in, effects out, and a look at what its lane and its store's leases know.
//!
//! **What it guarantees** is docs/internals/replication.md; the comments cite its sections.
//! Messages may be lost, doubled, delayed and reordered: whatever matters is sent again until a
//! newer state makes it pointless, and every handler is idempotent.
//!
//! **What it does not know.** Whether a proposal succeeded: "the outcome is known only when a
//! configuration with a greater epoch has been read" (section 2).

mod adopt;
mod damage;
mod follower;
mod pace;
mod reign;
mod repair;
mod resync;
mod role;
mod serve;
mod settle;
mod stored;
#[cfg(test)]
pub(crate) mod tests;
mod transfer;
mod verify;

use crate::client::{Answer, ClientRequest};
use crate::conf::transition::Transition;
use crate::conf::{CopyId, Incarnation, Member, ShardConf, StoreId};
use crate::heartbeat::{Leases, Timing};
use crate::mutant::Mutant;
use crate::table::Table;
use adopt::Adopting;
pub use damage::DamageFacts;
use damage::{Damage, Probe, Touch};
use follower::Follower;
use lane::tables::Tables;
use lane::{Lane, Op, Outcome, Problem};
pub use pace::Pace;
use proto::wire::{
    Ack, ByteRange, Failure, Opcode, PeerContext, Reply, ReplyOp, Request, RequestOp,
};
use proto::{BLOCK_BYTES, Epoch, Lsn, Pool, Seq, ShardId, Status, Tick};
use reign::Reign;
pub use resync::ResyncFacts;
pub use role::Role;
use std::collections::{BTreeMap, VecDeque};
pub use stored::Stored;
pub use verify::VerifyReport;

/// What a replica is made with.
#[derive(Clone)]
pub struct Options {
    /// Its index in the lane.
    pub shard_ix: u32,
    /// The store that holds it.
    pub store: StoreId,
    /// That store's life.
    pub incarnation: Incarnation,
    /// When that life began.
    pub booted: Tick,
    /// Lease times.
    pub timing: Timing,
    /// Where merged blocks come from.
    pub pool: Pool,
    /// Seeded bug, `Mutant::None` outside tests.
    pub mutant: Mutant,
}

/// What a replica may look at while it handles an event.
pub struct View<'a> {
    /// What its lane knows: the map's block states, region map, tail, watermark.
    pub tables: &'a Tables,
    /// Slots that the lane has for new data.
    pub free_slots: u32,
    /// Leases of the store.
    pub leases: &'a dyn Leases,
    /// What the resyncs in that lane share.
    pub pace: &'a Pace,
}

impl<'a> View<'a> {
    /// What a lane and the store's heartbeats show now; `pace` is one per lane.
    #[must_use]
    pub fn of(lane: &'a Lane, leases: &'a dyn Leases, pace: &'a Pace) -> View<'a> {
        View { tables: lane.tables(), free_slots: lane.free_slots(), leases, pace }
    }
}

/// What the world tells a replica.
#[derive(Debug)]
pub enum Event {
    /// A client's request; answered by exactly one `Effect::Reply`.
    Client(ClientRequest),
    /// The lane has answered.
    Lane {
        /// As in `Effect::Lane`.
        op: u32,
        /// What became of it.
        result: Result<Outcome, Problem>,
    },
    /// Another store's replica asks (PREPARE, SETTLE, TAILS, COPY, DIGEST, NEED_CONF, READ);
    /// answered by exactly one `Effect::Answer`, perhaps much later.
    Peer {
        /// The store.
        from: StoreId,
        /// Comes back with the answer.
        token: u64,
        /// What it asks.
        request: Request,
    },
    /// Another store's answer to an `Effect::Send`. Lost answers simply do not come.
    PeerReply {
        /// The store.
        from: StoreId,
        /// What it answers.
        reply: Reply,
    },
    /// A configuration, from the conductor.
    Conf(ShardConf),
    /// This life of a store has ended for certain: a newer one is registered (which needs the lock
    /// on its disk), or its supervisor has seen the exit.
    Dead {
        /// The store.
        store: StoreId,
        /// Its life that is over.
        incarnation: Incarnation,
    },
    /// A heartbeat of this store was refused by one that has promised this newer epoch.
    Newer {
        /// The epoch.
        epoch: Epoch,
    },
    /// Compare all in-sync replicas; answered by exactly one `Effect::Verified`.
    Verify {
        /// Comes back with the answer.
        token: u64,
        /// Write damaged blocks again wherever a good copy exists.
        is_repairing: bool,
    },
    /// Read these blocks (first, number) here again, to learn whether they are damaged. What lies
    /// outside the shard is left out.
    CheckBlocks {
        /// Runs of them.
        runs: Vec<(u32, u32)>,
    },
    /// Give the reign to this member of the ISR (T5), if it is one's own and nothing stands against
    /// it.
    Transfer {
        /// The member.
        to: CopyId,
    },
    /// The replica has grown (the lane has done it).
    Grown,
    /// The time of `Effect::Wake` has come.
    Tick,
}

/// What a replica asks of the world.
#[derive(Debug)]
pub enum Effect {
    /// Ask the lane; the answer comes as `Event::Lane` with this number.
    Lane {
        /// The operation's number.
        op: u32,
        /// What to do.
        request: Op,
    },
    /// Answer a client.
    Reply {
        /// The request's.
        token: u64,
        /// What became of it.
        result: Result<Answer, Status>,
    },
    /// Ask the replica on another store.
    Send {
        /// Which store.
        to: StoreId,
        /// What.
        request: Request,
    },
    /// Answer `Event::Peer`.
    Answer {
        /// The request's.
        token: u64,
        /// The answer.
        reply: Reply,
    },
    /// Ask the conductor for a transition of the configuration with this epoch. Its outcome is
    /// known only when a newer configuration comes; until then this is said again from time to
    /// time.
    Propose {
        /// Of the configuration that it changes.
        epoch: Epoch,
        /// What to do.
        transition: Transition,
    },
    /// Ask the conductor for a configuration newer than this.
    FetchConf {
        /// The newest one known.
        newer_than: Epoch,
    },
    /// From now on, list the shard as primary in the heartbeats to these stores, in this epoch. A
    /// lease counts only from the first acknowledged heartbeat that listed it in this `reign`.
    Claim {
        /// Epoch in which the reign began.
        reign: Epoch,
        /// Present epoch, which the heartbeats carry.
        epoch: Epoch,
        /// Whose leases are needed.
        stores: Vec<(StoreId, Incarnation)>,
    },
    /// List the shard no longer.
    Unclaim,
    /// Give back what other stores have promised for the shard, and list it no longer.
    Release,
    /// From now on, refuse heartbeats that list the shard in an epoch below this, and answer them
    /// with it.
    Promise {
        /// The epoch.
        epoch: Epoch,
    },
    /// Send `Event::Tick` at this time at the latest (the earliest of a step counts).
    Wake(Tick),
    /// The answer to `Event::Verify`.
    Verified {
        /// The request's.
        token: u64,
        /// What was found, or why it was not looked.
        result: Result<VerifyReport, Status>,
    },
    /// For logs, metrics and the checkers of the simulator.
    Note(Note),
}

/// What a replica does, told as it does it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Note {
    /// Its role has changed.
    Role {
        /// The epoch of the configuration that it follows.
        epoch: Epoch,
        /// The new role.
        role: Role,
    },
    /// The promise not to follow anything below this epoch is durable.
    Promised {
        /// The epoch.
        epoch: Epoch,
    },
    /// As primary: an operation got its lsn.
    Assigned {
        /// Its place in the order.
        lsn: Lsn,
        /// First block.
        first: u32,
        /// Blocks.
        count: u32,
        /// SETTLE, not a client's.
        is_settle: bool,
        /// It writes a damaged block again, which changes nothing that a client could see.
        is_heal: bool,
    },
    /// An operation is durable here.
    Durable {
        /// Its place in the order.
        lsn: Lsn,
    },
    /// As primary: an operation is committed.
    Committed {
        /// Its place in the order.
        lsn: Lsn,
        /// Stores whose copy of it is durable, as known here.
        acked: Vec<StoreId>,
    },
    /// As primary: a region was sent to a learner and acknowledged.
    Copied {
        /// The learner's store.
        to: StoreId,
        /// Which region.
        region: u32,
    },
    /// As primary: a learner has everything and is proposed for admission.
    CaughtUp {
        /// The learner's store.
        store: StoreId,
        /// Regions copied to it.
        regions: u32,
    },
    /// As primary: a region of a learner was not equal after it had been copied.
    Different {
        /// The learner's store.
        store: StoreId,
        /// Which region.
        region: u32,
    },
    /// As primary: a copy of this block is damaged, here or at a member, and it is written again.
    Healing {
        /// Which block.
        block: u32,
    },
    /// As primary: a damaged block was written again, at every member.
    Mended {
        /// Which block.
        block: u32,
    },
    /// As primary: no member has this block any more; it is an error until it is overwritten.
    Lost {
        /// Which block.
        block: u32,
    },
}

/// A request of another store that is not answered yet.
#[derive(Clone, Copy, Debug)]
struct Asked {
    token: u64,
    command_id: u64,
    epoch: Epoch,
    opcode: Opcode,
}

/// A request that needs a newer configuration than the one followed.
struct Held {
    from: StoreId,
    asked: Asked,
    request: Request,
}

/// What an outstanding lane operation is for.
#[derive(Debug)]
enum Work {
    /// The stored part is being replaced.
    Persist,
    /// An operation of the primary, at a follower.
    Prepare(Lsn),
    /// Content of a region, at a learner.
    Copy { asked: Asked, lsn: Lsn, resync_id: u64 },
    /// A region is read for a digest that another store asked for.
    DigestFor { asked: Asked, lsn: Lsn, resync_id: u64 },
    /// The primary's own copy of an operation.
    Local(Seq),
    /// A client's read, or the read of a merge.
    Client { reign: Epoch, task: u32, first: u32, count: u32 },
    /// Own content of a tail range.
    Settle { reign: Epoch, first: u32, count: u32 },
    /// A region is read for a learner.
    CopyRead { reign: Epoch, store: StoreId, job: u32 },
    /// A region is read to compare it with a learner's.
    DigestRead { reign: Epoch, store: StoreId, job: u32 },
    /// A block is read for the primary, which cannot read its own.
    ReadFor { asked: Asked },
    /// A region is read to compare it with all in-sync replicas.
    VerifyRead { reign: Epoch, number: u32 },
    /// A part of a read that the lane could not do as a whole.
    Piece { reign: Epoch, number: u32 },
    /// Blocks are read again, to know which of them are damaged.
    Probe(Probe),
    /// Bookkeeping that nobody waits for.
    Unwatched,
}

impl Work {
    /// Whether a promise has to wait for it.
    fn is_change(&self) -> bool {
        matches!(self, Work::Prepare(_) | Work::Copy { .. } | Work::Local(_))
    }
}

/// The machine.
pub struct Replica {
    options: Options,
    shard: ShardId,
    blocks: u32,
    role: Role,
    stored: Stored,
    /// Given in memory before it is stored.
    promised: Epoch,
    is_promise_told: bool,
    adopting: Option<Adopting>,
    work: Table<(Work, Touch)>,
    damage: Damage,
    /// Slots that the lane has for new data, at the last event.
    free_slots: u32,
    /// Outstanding lane operations that change content.
    changes_open: u32,
    held: VecDeque<Held>,
    follower: Follower,
    reign: Option<Reign>,
    /// Epoch in which the present reign began, or the last one that is over.
    last_reign: Epoch,
    /// Clients' requests that wait for this replica to serve, or for more replicas.
    parked: VecDeque<ClientRequest>,
    /// Lives of stores that are over, up to and including.
    dead: BTreeMap<StoreId, Incarnation>,
    /// Primary of the configuration that an earlier life followed: it may hold that life's promise.
    boot_primary: Option<(StoreId, Incarnation)>,
    /// When the present configuration was taken up; `None`: not in this life.
    adopted_at: Option<Tick>,
    fetched_at: Option<Tick>,
    proposed_at: Option<Tick>,
    woken_for: Option<Tick>,
    /// Numbers of regions on their way, and of reads done elsewhere.
    jobs: u32,
}

/// Requests held for a newer configuration.
const HELD_MAX: usize = 256;
/// Clients' requests that wait.
const PARKED_MAX: usize = 4096;
/// Between two looks at what is due.
const TICK_MS: u64 = 100;
/// After this long without answer a message is sent again.
const RESEND_MS: u64 = 500;
/// Between two fetches of a configuration, and between two proposals.
const REPEAT_MS: u64 = 500;
/// A member that is silent so long is proposed for removal.
const SILENT_MS: u64 = 2_000;

impl Replica {
    /// Continue from what the lane holds: the configuration, promise and watermark stored there.
    ///
    /// A replica that is new to its lane begins with nothing and is OUT until its first
    /// `Event::Conf`. Errors: the stored part is of another version, in words.
    pub fn open(options: Options, view: &View<'_>) -> Result<Replica, String> {
        let shard = view.tables.shard(options.shard_ix).expect("the lane holds the replica");
        let stored = Stored::decode(&shard.conf)?;
        let boot_primary = stored.conf.as_ref().map(|conf| {
            let primary = conf.primary_member();
            (primary.store, primary.incarnation)
        });
        Ok(Replica {
            shard: shard.replica.shard,
            blocks: shard.blocks,
            role: Role::Out,
            promised: stored.promised,
            stored,
            is_promise_told: false,
            adopting: None,
            work: Table::new(),
            damage: Damage::of_poisoned(view.tables.poisoned(options.shard_ix)),
            free_slots: view.free_slots,
            changes_open: 0,
            held: VecDeque::new(),
            follower: Follower::new(shard.commit),
            reign: None,
            last_reign: Epoch(0),
            parked: VecDeque::new(),
            dead: BTreeMap::new(),
            boot_primary,
            adopted_at: None,
            fetched_at: None,
            proposed_at: None,
            woken_for: None,
            // Answers to an earlier life may still be on their way.
            jobs: (options.incarnation << 16 & 0xffff_ffff) as u32,
            options,
        })
    }

    /// Handle one event.
    pub fn step(&mut self, now: Tick, event: Event, view: &View<'_>, out: &mut Vec<Effect>) {
        if let Some(reign) = &self.reign {
            self.last_reign = reign.epoch;
        }
        let mut ctx = Ctx { now, view, out };
        self.free_slots = view.free_slots;
        if !std::mem::replace(&mut self.is_promise_told, true) && self.promised > Epoch(0) {
            // The promise was read from the lane: the heartbeats of this life know nothing of it
            // yet.
            ctx.out.push(Effect::Promise { epoch: self.promised });
        }
        match event {
            Event::Client(request) => {
                view.pace.client(now);
                self.client(&mut ctx, request);
            }
            Event::Lane { op, result } => self.lane_done(&mut ctx, op, result),
            Event::Peer { from, token, request } => {
                if request.op.opcode() == Opcode::Prepare {
                    view.pace.client(now);
                }
                self.peer(&mut ctx, from, token, request);
            }
            Event::PeerReply { from, reply } => self.peer_reply(&mut ctx, from, reply),
            Event::Conf(conf) => self.learn(&mut ctx, conf),
            Event::Dead { store, incarnation } => self.died(&mut ctx, store, incarnation),
            Event::Newer { epoch } => self.nacked(&mut ctx, epoch, None),
            Event::Verify { token, is_repairing } => self.verify(&mut ctx, token, is_repairing),
            Event::CheckBlocks { runs } => self.check_blocks(&mut ctx, &runs),
            Event::Transfer { to } => self.begin_transfer(&mut ctx, to),
            Event::Grown => {
                let shard = view.tables.shard(self.options.shard_ix);
                self.blocks = shard.map_or(self.blocks, |shard| shard.blocks);
            }
            Event::Tick => {
                if self.woken_for.is_some_and(|at| at <= now) {
                    self.woken_for = None;
                }
                self.tick(&mut ctx);
            }
        }
        self.drain(&mut ctx);
        if self.woken_for.is_none() && self.stored.conf.is_some() {
            let at = now.after_millis(TICK_MS);
            self.woken_for = Some(at);
            out.push(Effect::Wake(at));
        }
    }

    /// Epoch of the lsns that its latest answers to clients speak of: an operation that it has
    /// ordered carries the epoch in which the reign began, however often the configuration has
    /// changed since.
    #[must_use]
    pub fn reign_epoch(&self) -> Epoch {
        self.last_reign
    }

    /// What it is now.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// The configuration it follows, once it has one.
    #[must_use]
    pub fn conf(&self) -> Option<&ShardConf> {
        self.stored.conf.as_ref()
    }

    /// The epoch below which it refuses everything.
    #[must_use]
    pub fn promised(&self) -> Epoch {
        self.promised
    }

    /// complete_lsn: everything committed up to here is in this replica.
    #[must_use]
    pub fn complete(&self, view: &View<'_>) -> Seq {
        let shard = view.tables.shard(self.options.shard_ix);
        self.stored.frozen.unwrap_or_else(|| shard.map_or(Seq(0), |shard| shard.commit))
    }

    fn epoch(&self) -> Epoch {
        self.stored.conf.as_ref().map_or(Epoch(0), |conf| conf.epoch)
    }

    fn mutant(&self, which: Mutant) -> bool {
        self.options.mutant.is(which)
    }

    /// Whether a configuration means this life of this store.
    fn is_me(&self, member: &Member) -> bool {
        member.store == self.options.store && member.incarnation == self.options.incarnation
    }

    fn set_role(&mut self, ctx: &mut Ctx<'_, '_>, role: Role) {
        if self.role != role {
            assert!(self.role.may_become(role), "{:?} never becomes {role:?}", self.role);
            self.role = role;
            ctx.out.push(Effect::Note(Note::Role { epoch: self.epoch(), role }));
        }
    }

    fn lane(&mut self, ctx: &mut Ctx<'_, '_>, work: Work, request: Op) {
        self.changes_open += u32::from(work.is_change());
        let op = self.work.insert((work, Touch::of(&request)));
        ctx.out.push(Effect::Lane { op, request });
    }

    fn lane_done(&mut self, ctx: &mut Ctx<'_, '_>, op: u32, result: Result<Outcome, Problem>) {
        let (work, touch) = self.work.take(op).expect("the lane answers once");
        self.changes_open -= u32::from(work.is_change());
        self.seen(ctx, &work, touch, &result);
        match work {
            Work::Persist => self.persisted(ctx, result),
            Work::Prepare(lsn) => self.prepared(ctx, lsn, result),
            Work::Copy { asked, lsn, resync_id } => {
                self.copy_done(ctx, asked, (lsn, resync_id), result);
            }
            Work::DigestFor { asked, lsn, resync_id } => {
                self.digest_for(ctx, asked, (lsn, resync_id), result);
            }
            Work::ReadFor { asked } => self.read_for_done(ctx, asked, result),
            Work::Local(seq) => self.local_done(ctx, seq, result),
            // A read that was begun in a reign that is over is dropped: nothing in the present
            // reign waits for it.
            Work::Client { reign, .. }
            | Work::Settle { reign, .. }
            | Work::CopyRead { reign, .. }
            | Work::DigestRead { reign, .. }
            | Work::VerifyRead { reign, .. }
            | Work::Piece { reign, .. }
                if self.reign.as_ref().is_none_or(|present| present.epoch != reign) => {}
            Work::Client { task, first, count, .. } => {
                self.client_read(ctx, (task, first, count), result);
            }
            Work::Settle { first, count, .. } => self.settle_read(ctx, (first, count), result),
            Work::CopyRead { store, job, .. } => self.copy_read(ctx, store, job, result),
            Work::DigestRead { store, job, .. } => self.digest_read(ctx, store, job, result),
            Work::VerifyRead { number, .. } => self.verify_read(ctx, number, result),
            Work::Piece { number, .. } => self.piece_read(ctx, number, result),
            Work::Probe(probe) => self.probed(ctx, probe, result),
            Work::Unwatched => {}
        }
        self.settle_adoption(ctx);
    }

    // -------------------------------------------------------------------------- other stores --

    fn peer(&mut self, ctx: &mut Ctx<'_, '_>, from: StoreId, token: u64, request: Request) {
        let asked = Asked {
            token,
            command_id: request.command_id,
            epoch: request.epoch,
            opcode: request.op.opcode(),
        };
        self.peer_asks(ctx, Held { from, asked, request });
    }

    fn peer_asks(&mut self, ctx: &mut Ctx<'_, '_>, held: Held) {
        let Held { from, asked, request } = held;
        let known = self.epoch();
        if let RequestOp::NeedConf(_) = request.op {
            let newer = self.stored.conf.as_ref().filter(|conf| conf.epoch > asked.epoch);
            let result = newer.map(|conf| conf.encode()).ok_or(Status::NotFound);
            match result {
                Ok(bytes) => {
                    let op = ReplyOp::NeedConf(self.ack(Lsn::default(), 0), bytes);
                    self.answer(ctx, asked, Seq(0), Ok(op));
                }
                Err(status) => self.answer(ctx, asked, Seq(0), Err(status)),
            }
            return;
        }
        if asked.epoch < self.promised && !self.mutant(Mutant::NoEpochCheck) {
            return self.answer(ctx, asked, Seq(0), Err(Status::StaleEpoch));
        }
        if asked.epoch > known {
            if self.held.len() >= HELD_MAX {
                return self.answer(ctx, asked, Seq(0), Err(Status::Busy));
            }
            self.held.push_back(Held { from, asked, request });
            self.fetch(ctx, Some(from));
            return;
        }
        if let RequestOp::Read { range, snap_seq: None } = request.op {
            return self.read_for(ctx, from, asked, range);
        }
        let Some(peer) = context_of(&request.op) else {
            return self.answer(ctx, asked, Seq(0), Err(Status::Unsupported));
        };
        let conf = self.stored.conf.as_ref().expect("its epoch is known");
        let is_meant =
            peer.incarnation == self.options.incarnation || self.mutant(Mutant::NoIncarnationCheck);
        if !is_meant || peer.history_id != conf.history_id {
            return self.answer(ctx, asked, Seq(0), Err(Status::Fenced));
        }
        let is_primary = conf.primary_member().store == from;
        let follows = is_primary && matches!(self.role, Role::Secondary | Role::Learner);
        if !follows && !self.mutant(Mutant::NoEpochCheck) {
            return self.answer(ctx, asked, Seq(0), Err(Status::NotPrimary));
        }
        self.follow(ctx, asked, request.op);
    }

    fn answer(
        &self,
        ctx: &mut Ctx<'_, '_>,
        asked: Asked,
        seq: Seq,
        result: Result<ReplyOp, Status>,
    ) {
        let result = result.map_err(|status| Failure { opcode: asked.opcode, status, detail: 0 });
        let reply = Reply {
            command_id: asked.command_id,
            shard: self.shard,
            epoch: self.promised,
            seq,
            result,
        };
        ctx.out.push(Effect::Answer { token: asked.token, reply });
    }

    fn ack(&self, lsn: Lsn, resync_id: u64) -> Ack {
        Ack {
            incarnation: self.options.incarnation,
            history_id: self.stored.conf.as_ref().map_or(0, |conf| conf.history_id),
            lsn_epoch: lsn.epoch,
            resync_id,
            credit: u64::from(self.free_slots),
        }
    }

    fn send(
        &self,
        ctx: &mut Ctx<'_, '_>,
        to: (StoreId, Incarnation),
        command_id: u64,
        lsn: Lsn,
        make: impl FnOnce(PeerContext) -> RequestOp,
    ) {
        let conf = self.stored.conf.as_ref().expect("only a primary asks others");
        let commit = self.reign.as_ref().map_or(Lsn::default(), Reign::commit_lsn);
        let peer = PeerContext {
            lsn,
            commit_lsn: commit,
            snap_seq: 0,
            incarnation: to.1,
            history_id: conf.history_id,
        };
        let request = Request {
            command_id,
            shard: self.shard,
            epoch: conf.epoch,
            attach_epoch: conf.attach_epoch,
            is_fua: false,
            op: make(peer),
        };
        ctx.out.push(Effect::Send { to: to.0, request });
    }

    fn peer_reply(&mut self, ctx: &mut Ctx<'_, '_>, from: StoreId, reply: Reply) {
        let Command { kind, number } = Command::of(reply.command_id);
        match reply.result {
            Ok(ReplyOp::NeedConf(_, bytes)) => {
                // A damaged configuration is not followed; the conductor or another store has it
                // too.
                if let Ok(conf) = ShardConf::decode(&bytes) {
                    self.learn(ctx, conf);
                }
            }
            Ok(ReplyOp::Read(content)) if kind == Kind::Read => {
                self.content_came(ctx, number, Some(content));
            }
            Ok(ReplyOp::Read(content)) if kind == Kind::Repair => {
                self.read_elsewhere(ctx, (from, number), Ok(content));
            }
            Ok(op) => self.acknowledged(ctx, from, kind, number, op),
            Err(failure) if failure.status == Status::StaleEpoch => {
                self.nacked(ctx, reply.epoch, Some(from));
                // The job was begun in the epoch before; give it up, so that it is begun again in
                // this epoch. Else the refused request leaves the learner owing an answer, until it
                // counts as silent.
                if self.reign.is_some() && matches!(kind, Kind::Copy | Kind::Digest) {
                    self.abandon_job(ctx, from, number);
                }
            }
            Err(failure) => self.peer_failed(ctx, from, kind, number, failure.status),
        }
    }

    fn next_job(&mut self) -> u32 {
        self.jobs = self.jobs.wrapping_add(1);
        self.jobs
    }

    /// Ask another member for the content of some blocks.
    fn ask_blocks(
        &self,
        ctx: &mut Ctx<'_, '_>,
        to: StoreId,
        command: Command,
        first: u32,
        count: u32,
    ) {
        let conf = self.stored.conf.as_ref().expect("only a primary asks others");
        let (offset, length) = (u64::from(first) * BLOCK_BYTES as u64, count * BLOCK_BYTES as u32);
        let range = ByteRange::new(offset, length).expect("blocks of the shard");
        let request = Request {
            command_id: command.id(),
            shard: self.shard,
            epoch: conf.epoch,
            attach_epoch: conf.attach_epoch,
            is_fua: false,
            op: RequestOp::Read { range, snap_seq: None },
        };
        ctx.out.push(Effect::Send { to, request });
    }

    /// Ask for a newer configuration: the conductor, and the store that seems to have it.
    fn fetch(&mut self, ctx: &mut Ctx<'_, '_>, from: Option<StoreId>) {
        let is_due = self.fetched_at.is_none_or(|at| ctx.now >= at.after_millis(REPEAT_MS));
        if !is_due {
            return;
        }
        self.fetched_at = Some(ctx.now);
        ctx.out.push(Effect::FetchConf { newer_than: self.epoch() });
        if let Some(to) = from {
            let request = Request {
                command_id: Command { kind: Kind::NeedConf, number: 0 }.id(),
                shard: self.shard,
                epoch: self.epoch(),
                attach_epoch: 0,
                is_fua: false,
                op: RequestOp::NeedConf(PeerContext::default()),
            };
            ctx.out.push(Effect::Send { to, request });
        }
    }

    /// Somebody has promised a newer epoch than the one followed here.
    fn nacked(&mut self, ctx: &mut Ctx<'_, '_>, epoch: Epoch, from: Option<StoreId>) {
        if epoch <= self.epoch() {
            return;
        }
        if self.reign.is_some() && !self.mutant(Mutant::NackedGoesOn) {
            self.suspend(ctx);
        }
        self.fetch(ctx, from);
    }

    fn died(&mut self, ctx: &mut Ctx<'_, '_>, store: StoreId, incarnation: Incarnation) {
        let newest = self.dead.entry(store).or_default();
        *newest = incarnation.max(*newest);
        self.tick(ctx);
    }

    fn is_dead(&self, member: &Member) -> bool {
        self.dead.get(&member.store).is_some_and(|&newest| member.incarnation <= newest)
    }

    /// Ask for a Tick sooner than the next look at what is due.
    fn wake_at(&mut self, ctx: &mut Ctx<'_, '_>, at: Tick) {
        if self.woken_for.is_none_or(|woken_for| at < woken_for) {
            self.woken_for = Some(at);
            ctx.out.push(Effect::Wake(at));
        }
    }

    /// Say a proposal, at most so often.
    fn propose(&mut self, ctx: &mut Ctx<'_, '_>, transition: Transition) {
        self.proposed_at = Some(ctx.now);
        ctx.out.push(Effect::Propose { epoch: self.epoch(), transition });
    }

    fn may_propose(&self, now: Tick) -> bool {
        self.proposed_at.is_none_or(|at| now >= at.after_millis(REPEAT_MS))
    }

    fn tick(&mut self, ctx: &mut Ctx<'_, '_>) {
        if self.reign.is_some() {
            self.tick_reign(ctx);
            return;
        }
        let Some(conf) = &self.stored.conf else { return };
        let primary = *conf.primary_member();
        let heard = ctx.view.leases.heard_at(self.shard, primary.store);
        let grace = self.options.timing.grace_nanos;
        let since = self.adopted_at.map(|adopted| heard.map_or(adopted, |at| at.max(adopted)));
        let is_silent = since.is_none_or(|since| ctx.now >= since.after_nanos(grace));
        if self.role == Role::Secondary
            && (is_silent || self.is_dead(&primary))
            && self.may_propose(ctx.now)
        {
            let me = conf.on_store(self.options.store).expect("a secondary is a member").copy;
            self.propose(ctx, Transition::Promote { copy: me });
        }
        if is_silent || !self.held.is_empty() {
            self.fetch(ctx, Some(primary.store).filter(|&store| store != self.options.store));
        }
    }
}

/// What a message between replicas says beside its operation.
fn context_of(op: &RequestOp) -> Option<&PeerContext> {
    match op {
        RequestOp::Prepare(prepare) => Some(&prepare.peer),
        RequestOp::Settle(settle) => Some(&settle.peer),
        RequestOp::Tails(peer) => Some(peer),
        RequestOp::Copy(copy) => Some(&copy.peer),
        RequestOp::Digest(digest) => Some(&digest.peer),
        RequestOp::Hello(_)
        | RequestOp::FencePath { .. }
        | RequestOp::Ping(_)
        | RequestOp::Read { .. }
        | RequestOp::Write(_)
        | RequestOp::Flush
        | RequestOp::Discard(_)
        | RequestOp::WriteZeroes { .. }
        | RequestOp::CompareAndWrite { .. }
        | RequestOp::Snap(_)
        | RequestOp::Attach(..)
        | RequestOp::NeedConf(_) => None,
    }
}

/// What a message was for, in its command id: nothing has to be remembered for a lost answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Command {
    kind: Kind,
    number: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Kind {
    Unknown = 0,
    /// Number: seq.
    Prepare = 1,
    /// Number: none.
    Tails = 2,
    /// Number: job << 16 | part.
    Copy = 3,
    /// Number: job.
    Digest = 4,
    NeedConf = 5,
    /// Number: reign << 32 | block.
    Read = 6,
    /// Number: of the read that it is for.
    Repair = 7,
    /// Number: of the attempt.
    Verify = 8,
}

const KIND_SHIFT: u32 = 56;

impl Command {
    fn id(self) -> u64 {
        assert!(self.number < 1 << KIND_SHIFT, "numbers count operations of one shard");
        (self.kind as u64) << KIND_SHIFT | self.number
    }

    fn of(id: u64) -> Command {
        let kind = match id >> KIND_SHIFT {
            1 => Kind::Prepare,
            2 => Kind::Tails,
            3 => Kind::Copy,
            4 => Kind::Digest,
            5 => Kind::NeedConf,
            6 => Kind::Read,
            7 => Kind::Repair,
            8 => Kind::Verify,
            _ => Kind::Unknown,
        };
        Command { kind, number: id & ((1 << KIND_SHIFT) - 1) }
    }
}

/// What every part of a step needs.
struct Ctx<'a, 'v> {
    now: Tick,
    view: &'a View<'v>,
    out: &'a mut Vec<Effect>,
}
