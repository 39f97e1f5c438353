//! The lane machine: requests and disk completions in, disk operations and replies out.
//!
//! The path of a write is in `write.rs`, of a write whose slot is bad in `relocate.rs`, of a read
//! in `read.rs`, of a checkpoint in `checkpoint.rs`; this file holds the state that they share, the
//! dispatch of events, and what happens at the end of a turn (frames are built, flushes issued,
//! checkpoints and materialising started). The driver sends `Event::Turn` after each batch of
//! events: whatever arrived together shares frames and flushes.

mod read;
mod relocate;
mod request;
mod write;

use crate::alloc::{Allocator, Space};
use crate::checkpoint::Checkpoint;
use crate::format::{Durability, Geometry, Pages, Run, RunKind};
use crate::journal::{Journal, Owner};
use crate::locks::{OpIx, RangeLocks};
use crate::mutant::Mutant;
use crate::record::{Body, CONF_BYTES_MAX, RangeKind, Record, ShardChange};
use crate::recover::Mounted;
use crate::tables::{SHARDS_MAX, Tables};
use crate::{REGION_BLOCKS, SHARD_BLOCKS_MAX, SLOT_BLOCKS};
use proto::disk::{BufList, DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use proto::id_map::{IdMap, IdSet};
use proto::seam::Machine;
use proto::{Buf, Lsn, Pool, ReplicaId, Seq, Tick, VolumeId};
use read::Reading;
use relocate::Relocation;
pub(crate) use relocate::{Unplaced, records_of_a_move};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use write::{Part, Plan};

pub use request::{Counters, Effects, Event, Op, Outcome, POISON_CRC, Problem, Reply, Request};

/// Largest read or write, in blocks (1 MiB, the wire's payload limit).
pub const REQUEST_BLOCKS_MAX: u32 = 256;
/// A checkpoint begins when the journal is this full.
const CHECKPOINT_PERCENT: u32 = 25;
/// ... or holds this many records.
const CHECKPOINT_RECORDS: u64 = 1_000_000;
/// Above this share of the ring new data operations start one at a time.
const THROTTLE_PERCENT: u32 = 60;
/// Idle time after which a SEAL frame makes rot of the last frame visible.
const SEAL_AFTER_MS: u64 = 50;
/// Slots that the materialise job writes at a time: 64 MiB.
const MATERIALISE_SLOTS: u32 = 1024;
/// Bytes of one write of the materialise job.
const MATERIALISE_BYTES: u64 = 1 << 20;
/// Pause after the host had no room for the materialise job.
const MATERIALISE_RETRY_MS: u64 = 1000;
/// Owner of records that nobody waits for.
const NOBODY: Owner = u64::MAX;
/// Owner of the last record of recovery.
const RECOVERY: Owner = u64::MAX - 1;
/// Owner of the records by which slots are moved.
const RELOCATION: Owner = u64::MAX - 2;

/// What an operation is, while it runs.
pub(crate) enum Kind {
    Write {
        plan: Option<Plan>,
        /// The parts that are logged.
        parts: Vec<Part>,
        payload: BufList,
        crcs: SmallVec<[u32; 4]>,
        solo: bool,
        is_granted: bool,
    },
    Range {
        range: RangeKind,
        parts: Vec<Part>,
    },
    Read(Reading),
    Control(Part),
}

pub(crate) struct Running {
    token: Option<u64>,
    shard_ix: u32,
    first: u32,
    count: u32,
    flags: u8,
    lsn: Lsn,
    commit: Seq,
    kind: Kind,
    locked: bool,
    open_parts: u32,
    undurable_parts: u32,
    credit: u32,
    problem: Option<Problem>,
}

/// A position of an extent that a write in flight uses: its slot must not change hands meanwhile.
pub(crate) struct Pin {
    slot: u32,
    users: u32,
}

/// What an outstanding disk operation is for.
pub(crate) enum Io {
    Frame {
        seq: u64,
    },
    /// `count` blocks of a part, the first of which is its block `at`.
    Data {
        op: OpIx,
        part: u32,
        at: u32,
        count: u32,
    },
    /// Content of a slot on its way to another.
    Moved,
    Read {
        op: OpIx,
        piece: u32,
    },
    TagPage {
        page: u32,
    },
    Flush,
    Checkpoint,
    Materialise,
}

/// What becomes true when a completed write is also durable.
#[derive(Clone, Copy)]
pub(crate) enum Settle {
    Frame { seq: u64 },
    Data { op: OpIx, part: u32 },
    Moved,
    Checkpoint,
    Materialise,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Recovery's decisions are being logged.
    Opening,
    Open,
    Closing {
        token: u64,
    },
    Closed,
}

/// The machine.
pub struct Lane {
    pub(crate) geometry: Geometry,
    pub(crate) durability: Durability,
    pub(crate) mutant: Mutant,
    pub(crate) pool: Pool,
    pub(crate) tables: Tables,
    pub(crate) allocator: Allocator,
    pub(crate) journal: Journal,
    pub(crate) runs: BTreeMap<(RunKind, u64), Run>,
    pub(crate) manifest: Pages,
    /// Slots that hold runs and the manifest of the last checkpoint.
    pub(crate) metadata_slots: BTreeSet<u32>,
    pub(crate) version: u64,
    pub(crate) checkpoint: Option<Checkpoint>,
    pub(crate) checkpoint_waiters: Vec<u64>,
    /// Merge CRC pages at every checkpoint (small lanes of tests).
    pub(crate) merge_always: bool,
    pub(crate) counters: Counters,
    pub(crate) out: Effects,
    atomic_bytes: u32,
    /// The ring was too full for recovery's decisions: a checkpoint holds them instead, then this
    /// record opens the journal.
    unlogged: Option<Record>,
    stage: Stage,
    ops: Vec<Option<Running>>,
    free_ops: Vec<OpIx>,
    ios: Vec<Option<Io>>,
    free_ios: Vec<u32>,
    locks: BTreeMap<u32, RangeLocks>,
    pins: IdMap<(u32, u32, u32), Pin>,
    pinned_slots: IdSet<u32>,
    /// REDO writes that are acknowledged but not placed, per shard.
    placing: BTreeMap<u32, Vec<OpIx>>,
    /// Granted data operations that wait for room in the journal.
    stalled: VecDeque<OpIx>,
    /// Writes that wait for the materialise job to bring space.
    awaiting_space: VecDeque<OpIx>,
    tag_waiters: BTreeMap<u32, Vec<OpIx>>,
    relocation: Relocation,
    unflushed: Vec<Settle>,
    flushing: Option<Vec<Settle>>,
    materialising: Option<u32>,
    materialise_failed: bool,
    /// The host's file system is nearly full: nothing more of it may be taken.
    is_growth_held: bool,
    materialise_retry: Tick,
    /// Indices that must not be reused before a checkpoint has forgotten them.
    retired: BTreeMap<u32, u64>,
    busy_indices: BTreeSet<u32>,
    data_running: u32,
    last_work: Tick,
    failed: Option<String>,
    zero: Buf,
    zero_crc: u32,
}

impl Lane {
    /// Open a recovered lane. It serves requests once recovery's decisions are durable; what arrives
    /// before that waits.
    #[must_use]
    pub fn open(mounted: Mounted, pool: Pool) -> Lane {
        let Mounted { mut journal, resolved, unplaced, mount, .. } = mounted;
        // Seeded bugs of the nonce: a mount that leaves no mark of its own in the chain.
        let marked =
            !(mounted.mutant.is(Mutant::NoNonce) || mounted.mutant.is(Mutant::NonceSequential));
        let first = marked.then(|| mount.clone());
        let records: Vec<Record> = first.into_iter().chain(resolved).collect();
        if records.is_empty() {
            journal.release_hold();
        }
        let stage = if records.is_empty() { Stage::Open } else { Stage::Opening };
        let unlogged = if journal.has_room_for(&records) {
            log_decisions(&mut journal, &records);
            None
        } else {
            Some(mount)
        };
        let zero = pool.zeroed(REQUEST_BLOCKS_MAX as usize * proto::BLOCK_BYTES).freeze();
        let zero_crc = proto::checksum::crc32c(&zero.block(0));
        let mut lane = Lane {
            geometry: mounted.geometry,
            durability: mounted.durability,
            mutant: mounted.mutant,
            pool,
            tables: mounted.tables,
            allocator: mounted.allocator,
            journal,
            runs: mounted.runs,
            manifest: mounted.manifest,
            metadata_slots: mounted.metadata_slots,
            version: mounted.version,
            checkpoint: None,
            checkpoint_waiters: Vec::new(),
            merge_always: mounted.merge_always,
            counters: Counters::default(),
            out: Effects::default(),
            atomic_bytes: mounted.atomic_bytes,
            unlogged,
            stage,
            ops: Vec::new(),
            free_ops: Vec::new(),
            ios: Vec::new(),
            free_ios: Vec::new(),
            locks: BTreeMap::new(),
            pins: IdMap::default(),
            pinned_slots: IdSet::default(),
            placing: BTreeMap::new(),
            stalled: VecDeque::new(),
            awaiting_space: VecDeque::new(),
            tag_waiters: BTreeMap::new(),
            relocation: Relocation::default(),
            unflushed: Vec::new(),
            flushing: None,
            materialising: None,
            materialise_failed: false,
            is_growth_held: false,
            materialise_retry: Tick(0),
            retired: BTreeMap::new(),
            busy_indices: BTreeSet::new(),
            data_running: 0,
            last_work: Tick(0),
            failed: None,
            zero,
            zero_crc,
        };
        unplaced.into_iter().for_each(|blocks| lane.place_again(&blocks));
        lane
    }

    /// True once requests are served.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.stage == Stage::Open && self.failed.is_none()
    }

    /// True once `Close` was answered.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.stage == Stage::Closed
    }

    /// Why the lane stopped itself, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// Whether the device may fail this operation with nobody worse off: it writes data that the lane
    /// would put elsewhere. For those who inject faults.
    #[must_use]
    pub fn takes_write_error(&self, id: IoId) -> bool {
        match self.ios.get(id.0 as usize).and_then(Option::as_ref) {
            Some(Io::Data { op, .. }) => !self.relocation.is_active() && self.is_solo(*op),
            Some(
                Io::Frame { .. }
                | Io::Moved
                | Io::Read { .. }
                | Io::TagPage { .. }
                | Io::Flush
                | Io::Checkpoint
                | Io::Materialise,
            )
            | None => false,
        }
    }

    /// Counters since the lane was opened.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters { bad_slots: u64::from(self.allocator.space().bad), ..self.counters }
    }

    /// Slots by use.
    #[must_use]
    pub fn space(&self) -> Space {
        self.allocator.space()
    }

    /// Slots that clients may still take.
    #[must_use]
    pub fn free_slots(&self) -> u32 {
        let space = self.allocator.space();
        let coming = if self.may_grow() { space.unmaterialised } else { 0 };
        (space.free + space.soft + coming).saturating_sub(self.allocator.reserve())
    }

    /// Take nothing more of the host's file system, or do again. What was taken goes on working.
    pub fn hold_growth(&mut self, is_held: bool) {
        self.is_growth_held = is_held;
    }

    fn may_grow(&self) -> bool {
        !self.materialise_failed && !self.is_growth_held
    }

    /// One line about what is under way, for logs and failing tests.
    #[must_use]
    pub fn describe(&self) -> String {
        format!(
            "ring {} % used: {}; {} data operations run, {} stalled, {} await space, \
             checkpoint {:?}, {} to flush, {:?}",
            self.journal.fill_percent(),
            self.journal.describe(),
            self.data_running,
            self.stalled.len(),
            self.awaiting_space.len(),
            self.checkpoint.as_ref().map(Checkpoint::progress),
            self.unflushed.len(),
            self.allocator.space()
        )
    }

    /// What the lane knows: shards, map, region maps, tails.
    #[must_use]
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Stop for good: everything in flight is answered with the reason, nothing more is written.
    pub(crate) fn fail(&mut self, reason: String) {
        if self.failed.is_some() {
            return;
        }
        let problem = Problem::Stopped { reason: reason.clone() };
        self.failed = Some(reason);
        let tokens = self.ops.iter_mut().flatten().filter_map(|op| op.token.take());
        let waiting = self.checkpoint_waiters.drain(..);
        for token in tokens.chain(waiting).collect::<Vec<_>>() {
            self.out.replies.push(Reply { token, result: Err(problem.clone()) });
        }
        if let Stage::Closing { token } = self.stage {
            self.stage = Stage::Closed;
            self.out.replies.push(Reply { token, result: Err(problem) });
        }
    }

    // -------------------------------------------------------------------------------- requests --

    fn request(&mut self, request: Request) {
        let Request { token, op } = request;
        let refusal = match (&self.failed, self.stage) {
            (Some(reason), _) => Some(Problem::Stopped { reason: reason.clone() }),
            (None, Stage::Closing { .. } | Stage::Closed) => {
                Some(Problem::Stopped { reason: "it is being closed".into() })
            }
            (None, Stage::Opening | Stage::Open) => None,
        };
        let accepted = match refusal {
            Some(problem) => Err(problem),
            None => self.accept(token, op),
        };
        if let Err(problem) = accepted {
            self.out.replies.push(Reply { token, result: Err(problem) });
        }
    }

    fn accept(&mut self, token: u64, op: Op) -> Result<(), Problem> {
        match op {
            Op::Write { shard_ix, lsn, commit, first, crcs, data, flags, solo, is_granted } => {
                let count = crcs.len() as u32;
                self.check_range(shard_ix, first, count, REQUEST_BLOCKS_MAX)?;
                let bytes: usize = data.iter().map(|buf| buf.len()).sum();
                assert_eq!(bytes, count as usize * proto::BLOCK_BYTES, "one CRC per block");
                self.counters.writes += 1;
                self.counters.blocks_written += u64::from(count);
                let (plan, parts) = (None, Vec::new());
                let kind = Kind::Write { plan, parts, payload: data, crcs, solo, is_granted };
                let op = self.new_op(Some(token), shard_ix, first..first + count, kind);
                let running = self.op_mut(op);
                (running.lsn, running.commit, running.flags) = (lsn, commit, flags);
                self.admit_write(op);
            }
            Op::Range { shard_ix, lsn, commit, first, count, kind, flags } => {
                self.check_range(shard_ix, first, count, SHARD_BLOCKS_MAX)?;
                let kind = Kind::Range { range: kind, parts: Vec::new() };
                let op = self.new_op(Some(token), shard_ix, first..first + count, kind);
                let running = self.op_mut(op);
                (running.lsn, running.commit, running.flags) = (lsn, commit, flags);
                self.lock_and_start(op, true);
            }
            Op::Read { shard_ix, first, count, with_poison } => {
                self.check_range(shard_ix, first, count, REQUEST_BLOCKS_MAX)?;
                self.counters.reads += 1;
                self.counters.blocks_read += u64::from(count);
                let kind = Kind::Read(Reading::new(with_poison));
                let op = self.new_op(Some(token), shard_ix, first..first + count, kind);
                self.lock_and_start(op, false);
            }
            Op::Create { replica, blocks, family } => {
                self.create(token, replica, blocks, family)?
            }
            Op::Delete { shard_ix } => {
                self.existing(shard_ix)?;
                let body = Body::Shard(ShardChange::Delete);
                let op = self.control(Some(token), shard_ix, body);
                // Waits for every operation on the shard, and lets none pass.
                let running = self.op_mut(op);
                (running.first, running.count) = (0, u32::MAX);
                self.lock_and_start(op, true);
            }
            Op::Resize { shard_ix, blocks } => {
                if blocks < self.existing(shard_ix)? || blocks > SHARD_BLOCKS_MAX {
                    return Err(Problem::OutOfRange { first: 0, count: blocks });
                }
                let op = self.control(
                    Some(token),
                    shard_ix,
                    Body::Shard(ShardChange::Resize { blocks }),
                );
                self.start(op);
            }
            Op::Conf { shard_ix, blob } => {
                self.existing(shard_ix)?;
                if blob.len() > CONF_BYTES_MAX {
                    return Err(Problem::Limit { what: "a shard configuration has at most 1 KiB" });
                }
                let op = self.control(Some(token), shard_ix, Body::Conf(blob));
                self.start(op);
            }
            Op::Commit { shard_ix, commit } => {
                self.existing(shard_ix)?;
                let op = self.control(Some(token), shard_ix, Body::Commit);
                self.op_mut(op).commit = commit;
                self.start(op);
            }
            Op::Region { shard_ix, region, value } => {
                let blocks = self.existing(shard_ix)?;
                if region >= blocks.div_ceil(REGION_BLOCKS) {
                    return Err(Problem::OutOfRange { first: region, count: 1 });
                }
                let op = self.control(Some(token), shard_ix, Body::Region { region, value });
                self.start(op);
            }
            Op::Checkpoint => self.checkpoint_waiters.push(token),
            Op::Close => self.stage = Stage::Closing { token },
        }
        Ok(())
    }

    fn existing(&self, shard_ix: u32) -> Result<u32, Problem> {
        self.tables.shard(shard_ix).map(|shard| shard.blocks).ok_or(Problem::NotFound { shard_ix })
    }

    fn check_range(&self, shard_ix: u32, first: u32, count: u32, max: u32) -> Result<(), Problem> {
        let blocks = self.existing(shard_ix)?;
        let fits = first.checked_add(count).is_some_and(|end| end <= blocks);
        if count == 0 || count > max || !fits {
            return Err(Problem::OutOfRange { first, count });
        }
        Ok(())
    }

    fn create(
        &mut self,
        token: u64,
        replica: ReplicaId,
        blocks: u32,
        family: VolumeId,
    ) -> Result<(), Problem> {
        let creating = |op: &Running| match &op.kind {
            Kind::Control(part) => part.creates() == Some(replica.shard),
            Kind::Write { .. } | Kind::Range { .. } | Kind::Read(_) => false,
        };
        if self.tables.find(replica.shard).is_some() || self.ops.iter().flatten().any(creating) {
            return Err(Problem::AlreadyExists { replica });
        }
        if blocks == 0 || blocks > SHARD_BLOCKS_MAX {
            return Err(Problem::Limit { what: "a shard has 1 block to 64 GiB" });
        }
        // One head layer per shard, under the same index.
        let index = (0..SHARDS_MAX).find(|&ix| {
            self.tables.shard(ix).is_none()
                && !self.retired.contains_key(&ix)
                && !self.busy_indices.contains(&ix)
        });
        let ix = index.ok_or(Problem::Limit { what: "a lane holds at most 4,096 replicas" })?;
        self.busy_indices.insert(ix);
        let change = ShardChange::Create { replica, blocks, layer: ix, family };
        let op = self.control(Some(token), ix, Body::Shard(change));
        self.start(op);
        Ok(())
    }

    fn control(&mut self, token: Option<u64>, shard_ix: u32, body: Body) -> OpIx {
        let mut record = Record::of_lane(body);
        record.shard_ix = shard_ix;
        let part = Part::control(record);
        self.new_op(token, shard_ix, 0..0, Kind::Control(part))
    }

    /// Remember in the journal that a region's content is in doubt.
    pub(crate) fn suspect(&mut self, shard_ix: u32, block: u32) {
        let region = block / REGION_BLOCKS;
        let Some(shard) = self.tables.shard(shard_ix) else { return };
        if shard.regions[region as usize] & 1 == 1 {
            // It is remembered already; the same damage may be read again and again.
            return;
        }
        let value = shard.regions[region as usize] | 1;
        let op = self.control(None, shard_ix, Body::Region { region, value });
        self.start(op);
    }

    fn new_op(
        &mut self,
        token: Option<u64>,
        shard_ix: u32,
        blocks: std::ops::Range<u32>,
        kind: Kind,
    ) -> OpIx {
        let running = Running {
            token,
            shard_ix,
            first: blocks.start,
            count: blocks.end - blocks.start,
            flags: 0,
            lsn: Lsn::default(),
            commit: Seq(0),
            kind,
            locked: false,
            open_parts: 0,
            undurable_parts: 0,
            credit: 0,
            problem: None,
        };
        match self.free_ops.pop() {
            Some(ix) => {
                self.ops[ix as usize] = Some(running);
                ix
            }
            None => {
                self.ops.push(Some(running));
                self.ops.len() as u32 - 1
            }
        }
    }

    fn op(&self, ix: OpIx) -> &Running {
        self.ops[ix as usize].as_ref().expect("the operation runs")
    }

    fn op_mut(&mut self, ix: OpIx) -> &mut Running {
        self.ops[ix as usize].as_mut().expect("the operation runs")
    }

    /// Take the operation's range lock; start it when the lock is granted.
    fn lock_and_start(&mut self, ix: OpIx, exclusive: bool) {
        let op = self.op_mut(ix);
        op.locked = true;
        let (shard_ix, blocks) = (op.shard_ix, op.first..op.first.saturating_add(op.count));
        if self.locks.entry(shard_ix).or_default().acquire(ix, blocks, exclusive) {
            self.start(ix);
        }
    }

    fn start(&mut self, ix: OpIx) {
        if self.failed.is_some() {
            return;
        }
        if self.stage == Stage::Opening {
            self.stalled.push_back(ix);
            return;
        }
        let shard_ix = self.op(ix).shard_ix;
        let creates = matches!(&self.op(ix).kind, Kind::Control(part) if part.creates().is_some());
        if !creates && self.tables.shard(shard_ix).is_none() {
            // Deleted while it waited.
            self.op_mut(ix).problem = Some(Problem::NotFound { shard_ix });
            self.finish(ix);
            return;
        }
        match &self.op(ix).kind {
            Kind::Read(_) => self.start_read(ix),
            Kind::Control(_) => self.start_control(ix),
            Kind::Write { .. } | Kind::Range { .. } => {
                if self.must_stall() || !self.stalled.is_empty() || !self.start_data(ix) {
                    self.stalled.push_back(ix);
                }
            }
        }
    }

    /// Above the throttle mark one data operation runs at a time; none starts while slots are moved.
    fn must_stall(&self) -> bool {
        if self.relocation.is_active() {
            return true;
        }
        self.journal.fill_percent() >= THROTTLE_PERCENT && self.data_running > 0
    }

    /// The operation is over: give back what it holds, and answer.
    fn finish(&mut self, ix: OpIx) {
        let op = self.ops[ix as usize].take().expect("the operation runs");
        self.free_ops.push(ix);
        self.allocator.return_credit(op.credit);
        if let Kind::Control(part) = &op.kind {
            self.busy_indices.remove(&part.record.shard_ix);
        }
        let is_read = matches!(op.kind, Kind::Read(_));
        let outcome = match op.kind {
            Kind::Read(reading) if op.problem.is_none() => {
                let (data, crcs) = reading.into_reply();
                Outcome::Read { data, crcs }
            }
            Kind::Control(part) if part.creates().is_some() => {
                Outcome::Created { shard_ix: op.shard_ix }
            }
            Kind::Control(_) | Kind::Read(_) | Kind::Write { .. } | Kind::Range { .. } => {
                Outcome::Done
            }
        };
        let result = op.problem.map_or(Ok(outcome), Err);
        match (op.token, result) {
            (Some(token), result) => self.out.replies.push(Reply { token, result }),
            // A read without a token has no caller: it is of a slot that is about to move.
            (None, Ok(Outcome::Read { data, crcs })) => self.moving_read(ix, Some((data, crcs))),
            (None, Err(_)) if is_read => self.moving_read(ix, None),
            (None, Ok(Outcome::Done | Outcome::Created { .. }) | Err(_)) => {}
        }
        if op.locked {
            let mut ready = Vec::new();
            let locks = self.locks.get_mut(&op.shard_ix).expect("the operation holds a lock");
            locks.release(ix, &mut ready);
            if locks.is_empty() {
                self.locks.remove(&op.shard_ix);
            }
            ready.into_iter().for_each(|ix| self.start(ix));
        }
    }

    // ------------------------------------------------------------------------------------ disk --

    pub(crate) fn submit(&mut self, purpose: Io, op: DiskOp) {
        let id = match self.free_ios.pop() {
            Some(id) => {
                self.ios[id as usize] = Some(purpose);
                id
            }
            None => {
                self.ios.push(Some(purpose));
                self.ios.len() as u32 - 1
            }
        };
        self.out.disk.push(DiskRequest { id: IoId(u64::from(id)), op });
    }

    fn disk(&mut self, done: DiskDone) {
        let id = done.id.0 as u32;
        let io = self.ios[id as usize].take().expect("a completion of an outstanding operation");
        self.free_ios.push(id);
        if self.failed.is_some() {
            return;
        }
        match (io, done.result) {
            (Io::Frame { seq }, Ok(_)) => self.settle(Settle::Frame { seq }),
            (Io::Frame { seq }, Err(error)) => self.fail(format!("journal frame {seq}: {error}")),
            (Io::Data { op, part, .. }, Ok(_)) => self.settle(Settle::Data { op, part }),
            (Io::Data { op, part, at, count }, Err(error)) => {
                self.data_failed((op, part), (at, count), error);
            }
            (Io::Moved, Ok(_)) => self.settle(Settle::Moved),
            (Io::Moved, Err(_)) => self.move_failed(),
            (Io::Read { op, piece }, result) => self.read_done(op, piece, result),
            (Io::TagPage { page }, result) => self.tag_page_done(page, result),
            (Io::Flush, Ok(_)) => {
                let settled = self.flushing.take().expect("a flush was outstanding");
                settled.into_iter().for_each(|what| self.settled(what));
            }
            (Io::Flush, Err(error)) => self.fail(format!("flush failed: {error}")),
            (Io::Checkpoint, Ok(_)) => self.settle(Settle::Checkpoint),
            (Io::Checkpoint, Err(error)) => self.fail(format!("checkpoint: {error}")),
            (Io::Materialise, Ok(_)) => self.materialise_written(),
            (Io::Materialise, Err(error)) => self.materialise_error(error),
        }
    }

    /// A write completed: what it stands for is true now, or after the next flush.
    fn settle(&mut self, what: Settle) {
        match self.durability {
            Durability::Plp => self.settled(what),
            Durability::Volatile if self.mutant.is(Mutant::AckBeforeFlush) => self.settled(what),
            Durability::Volatile => self.unflushed.push(what),
        }
    }

    fn settled(&mut self, what: Settle) {
        if self.failed.is_some() {
            return;
        }
        match what {
            Settle::Frame { seq } => {
                let mut owners = Vec::new();
                self.journal.durable(seq, &mut owners);
                for (record, owner) in owners {
                    self.record_durable(record, owner);
                }
            }
            Settle::Data { op, part } => self.data_settled(op, part),
            Settle::Moved => self.move_step_over(),
            Settle::Checkpoint => self.checkpoint_settled(),
            Settle::Materialise => self.materialise_done(),
        }
    }

    fn record_durable(&mut self, record: u64, owner: Owner) {
        match owner {
            NOBODY => self.journal.done(record),
            RECOVERY => {
                self.journal.done(record);
                self.journal.release_hold();
                self.stage = if let Stage::Opening = self.stage { Stage::Open } else { self.stage };
                for ix in std::mem::take(&mut self.stalled) {
                    self.start(ix);
                }
            }
            RELOCATION => self.moves_durable(record),
            _ => self.part_durable((owner >> 32) as OpIx, (owner & 0xffff_ffff) as u32, record),
        }
    }

    // ------------------------------------------------------------------------------ end of turn --

    fn turn(&mut self, now: Tick) {
        if self.failed.is_some() {
            return;
        }
        self.relocate_if_due();
        self.start_stalled();
        self.close_if_idle();
        while let Some(frame) = self.journal.build(&self.pool) {
            self.counters.frames += 1;
            self.counters.journal_wraps += u64::from(frame.ring_page == 0);
            let offset = self.geometry.ring(frame.ring_page);
            self.submit(Io::Frame { seq: frame.seq }, DiskOp::Write { offset, data: frame.data });
            self.last_work = now;
        }
        self.start_checkpoint_if_due();
        self.start_materialise_if_due(now);
        if self.flushing.is_none() && !self.unflushed.is_empty() {
            self.flushing = Some(std::mem::take(&mut self.unflushed));
            self.counters.flushes += 1;
            self.submit(Io::Flush, DiskOp::Flush);
        }
        self.seal_if_idle(now);
    }

    /// Let operations go on that waited for room in the journal, first come first served.
    fn start_stalled(&mut self) {
        while let Some(&ix) = self.stalled.front() {
            let is_new = match &self.op(ix).kind {
                Kind::Write { plan, .. } => plan.is_none(),
                Kind::Range { .. } | Kind::Read(_) | Kind::Control(_) => true,
            };
            let is_moving = self.relocation.is_active();
            if self.stage == Stage::Opening || is_moving || (is_new && self.must_stall()) {
                return;
            }
            if self.tables.shard(self.op(ix).shard_ix).is_none() {
                // Deleted while it waited; `start` answers.
                self.stalled.pop_front();
                self.start(ix);
            } else if self.start_data(ix) {
                self.stalled.pop_front();
            } else {
                return;
            }
        }
    }

    fn start_checkpoint_if_due(&mut self) {
        if self.unlogged.is_some() && self.checkpoint.is_none() {
            self.begin_checkpoint(false);
        }
        if self.checkpoint.is_some() || self.stage == Stage::Opening {
            return;
        }
        let due = self.journal.fill_percent() >= CHECKPOINT_PERCENT
            || self.journal.records_held() >= CHECKPOINT_RECORDS
            || !self.checkpoint_waiters.is_empty();
        if due {
            self.begin_checkpoint(false);
        }
    }

    fn close_if_idle(&mut self) {
        let idle = self.free_ops.len() == self.ops.len() && self.checkpoint.is_none();
        if !matches!(self.stage, Stage::Closing { .. }) || !idle || self.materialising.is_some() {
            return;
        }
        if !self.journal.is_sealed() {
            self.journal.append(&Record::of_lane(Body::Seal), std::iter::empty(), NOBODY);
        } else if self.journal.is_idle() {
            self.begin_checkpoint(true);
        }
    }

    /// A clean checkpoint is durable: the lane is closed.
    pub(crate) fn closed(&mut self) {
        if let Stage::Closing { token } = self.stage {
            self.stage = Stage::Closed;
            self.out.replies.push(Reply { token, result: Ok(Outcome::Done) });
        }
    }

    /// True while the next checkpoint is the place where recovery's decisions become durable.
    pub(crate) fn holds_decisions(&self) -> bool {
        self.unlogged.is_some()
    }

    /// The checkpoint that holds recovery's decisions is durable: nothing is left to replay.
    pub(crate) fn open_journal(&mut self) {
        if let Some(mount) = self.unlogged.take() {
            log_decisions(&mut self.journal, &[mount]);
        }
    }

    /// A checkpoint with this stable record is durable: indices deleted before it may be reused,
    /// because no record of their old owner is ever replayed again.
    pub(crate) fn forget_retired(&mut self, stable: u64) {
        self.retired.retain(|_, &mut deleted| deleted > stable);
    }

    fn seal_if_idle(&mut self, now: Tick) {
        if self.stage != Stage::Open || self.journal.is_sealed() {
            return;
        }
        if !self.journal.is_idle() {
            // The journal waits for a disk operation, whose end brings the next turn.
            return;
        }
        let due = self.last_work.after_millis(SEAL_AFTER_MS);
        if now < due {
            self.out.wake = Some(due);
            return;
        }
        self.journal.append(&Record::of_lane(Body::Seal), std::iter::empty(), NOBODY);
        self.out.wake = Some(now);
    }

    // ------------------------------------------------------------------------------ materialise --

    fn start_materialise_if_due(&mut self, now: Tick) {
        if self.materialise_failed && self.materialising.is_none() && now >= self.materialise_retry
        {
            self.materialise_failed = false;
        }
        let space = self.allocator.space();
        let low = space.free + space.soft < self.allocator.floor() + 2 * MATERIALISE_SLOTS;
        let closing = matches!(self.stage, Stage::Closing { .. } | Stage::Closed);
        if self.is_growth_held {
            self.admit_waiting();
        }
        if space.unmaterialised == 0 || !low || closing || !self.may_grow() {
            return;
        }
        if self.materialising.is_some() {
            return;
        }
        let from = self.allocator.limit();
        let to = (from / MATERIALISE_SLOTS * MATERIALISE_SLOTS + MATERIALISE_SLOTS)
            .min(self.geometry.slots);
        let (mut at, end) = (self.geometry.slot(from, 0), self.geometry.slot_end(to - 1));
        let mut writes = 0;
        while at < end {
            let len = MATERIALISE_BYTES.min(end - at);
            let data = proto::block::single(self.zero.slice(0..len as usize));
            self.submit(Io::Materialise, DiskOp::Write { offset: at, data });
            at += len;
            writes += 1;
        }
        self.materialising = Some(writes);
    }

    fn materialise_written(&mut self) {
        let left = self.materialising.as_mut().expect("the job runs");
        *left -= 1;
        if *left == 0 && self.materialise_failed {
            self.materialising = None;
            self.materialise_retry = self.last_work.after_millis(MATERIALISE_RETRY_MS);
        } else if *left == 0 {
            // Extents become written only when the file system commits: always a flush.
            self.unflushed.push(Settle::Materialise);
        }
    }

    fn materialise_done(&mut self) {
        self.materialising = None;
        let from = self.allocator.limit();
        let to = (from / MATERIALISE_SLOTS * MATERIALISE_SLOTS + MATERIALISE_SLOTS)
            .min(self.geometry.slots);
        self.allocator.materialise(to);
        self.admit_waiting();
    }

    /// The host has no room for this disk file any more: what is materialised goes on working.
    fn materialise_error(&mut self, _error: DiskError) {
        self.materialise_failed = true;
        self.materialise_written();
        self.admit_waiting();
    }

    fn admit_waiting(&mut self) {
        for ix in std::mem::take(&mut self.awaiting_space) {
            self.admit_write(ix);
        }
    }
}

/// Queue what recovery decided; the lane opens when the last record is durable.
fn log_decisions(journal: &mut Journal, records: &[Record]) {
    for (index, record) in records.iter().enumerate() {
        let owner = if index + 1 == records.len() { RECOVERY } else { NOBODY };
        journal.append(record, std::iter::empty(), owner);
    }
}

impl Machine for Lane {
    type Event = Event;
    type Effects = Effects;

    fn step(&mut self, now: Tick, event: Event, out: &mut Effects) {
        match event {
            Event::Request(request) => {
                self.last_work = now;
                self.request(request);
            }
            Event::Disk(done) => self.disk(done),
            Event::Fail { reason } => self.fail(reason),
            Event::Turn => self.turn(now),
        }
        out.disk.append(&mut self.out.disk);
        out.replies.append(&mut self.out.replies);
        out.wake = self.out.wake.take().or(out.wake);
    }
}

const _: () = assert!(REQUEST_BLOCKS_MAX.is_multiple_of(SLOT_BLOCKS));
