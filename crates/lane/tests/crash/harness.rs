//! One lane over the crashing disk, with an oracle that knows what each block may hold.

use crate::disk::{Disk, Fate};
use crate::random::Random;
use lane::format::{DiskHeader, Durability, Geometry};
use lane::record::{FLAG_LEARNER, RangeKind};
use lane::{
    Effects, Event, FormatRequest, Lane, Mount, MountParameters, MountStep, Mutant, Op, Outcome,
    Problem, REGION_BLOCKS, Request, format_disk,
};
use proto::disk::{BufList, DiskError, DiskOp, DiskRequest, IoId};
use proto::seam::Machine;
use proto::{BLOCK_BYTES, Epoch, Lsn, Pool, ReplicaId, Seq, ShardId, Tick, VolumeId, checksum};
use std::collections::{BTreeMap, BTreeSet};

/// Blocks of the test shard: two extents, so that writes across the edge exist.
pub const SHARD_BLOCKS: u32 = 1024 + 64;

/// What a trial runs on.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub volatile: bool,
    pub atomic_blocks: bool,
    /// The only replica: a torn overwrite may not lose the old content.
    pub solo: bool,
    pub sparse: bool,
    pub journal_pages: u32,
    pub slots: u32,
    pub mutant: Mutant,
}

impl Config {
    pub const PLAIN: Config = Config {
        volatile: false,
        atomic_blocks: true,
        solo: false,
        sparse: false,
        journal_pages: 24,
        slots: 150,
        mutant: Mutant::None,
    };

    /// May a crash turn a block that was being overwritten into a known-lost one?
    fn may_poison(self) -> bool {
        !self.atomic_blocks && !self.solo
    }
}

/// Byte of the disk where the journal of the test lane begins.
pub const JOURNAL_START: u64 = (2 << 20) + (256 << 10);

/// Value 0 is zeros; any other names the write that made it.
pub type Value = u64;
/// The value of a block that was poisoned on purpose.
pub const POISONED: Value = u64::MAX;

#[derive(Clone, Debug)]
struct Attempt {
    value: Value,
    seq: u64,
    learner: bool,
    /// The lane may never have started it (refused, or lost with the process).
    token: u64,
}

/// What the oracle knows of one block.
#[derive(Clone, Debug, Default)]
struct Block {
    /// Content that is certain.
    certain: Value,
    /// Its seq, 0 when a learner wrote it.
    certain_seq: u64,
    /// Acknowledged as lost by the lane itself (EIO after a failed write).
    lost: bool,
    /// Writes since, in order of issue.
    attempts: Vec<Attempt>,
    /// Contents of writes that have failed with a media error: perhaps there, perhaps not.
    failed: Vec<Value>,
}

#[derive(Clone, Debug)]
enum Asked {
    /// `value` of the first block, `None` for a discard.
    Write {
        first: u32,
        count: u32,
        value: Option<Value>,
    },
    Read {
        first: u32,
        before: Vec<Vec<Value>>,
    },
    Control,
}

/// Counts of what happened, to prove that the trials were not idle.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub acked: u64,
    pub crashes: u64,
    pub crash_states: u64,
    pub nested: u64,
    pub checkpoints: u64,
    pub wraps: u64,
    pub torn: u64,
    pub verified: u64,
    pub restored: u64,
    pub placed: u64,
    pub poisoned: u64,
    pub no_space: u64,
    pub media: u64,
    pub redos: u64,
    pub intents: u64,
    pub touches: u64,
    pub relocated: u64,
    pub not_relocated: u64,
    /// Journaled writes that had to wait for their slot, for want of room in the ring.
    pub unplaceable: u64,
    /// Reads of rotten blocks: nothing but `Disk::rot` may cause one.
    pub refused_reads: u64,
}

impl Stats {
    pub fn add(&mut self, other: &Stats) {
        self.acked += other.acked;
        self.crashes += other.crashes;
        self.crash_states += other.crash_states;
        self.nested += other.nested;
        self.checkpoints += other.checkpoints;
        self.wraps += other.wraps;
        self.torn += other.torn;
        self.verified += other.verified;
        self.restored += other.restored;
        self.placed += other.placed;
        self.poisoned += other.poisoned;
        self.no_space += other.no_space;
        self.media += other.media;
        self.redos += other.redos;
        self.intents += other.intents;
        self.touches += other.touches;
        self.relocated += other.relocated;
        self.not_relocated += other.not_relocated;
        self.unplaceable += other.unplaceable;
        self.refused_reads += other.refused_reads;
    }
}

/// What the trial knows and the lane must agree with. Survives every crash.
#[derive(Clone)]
struct Oracle {
    next_token: u64,
    next_value: Value,
    next_seq: u64,
    /// Highest seq below which everything is acknowledged: sent as the commit watermark.
    commit: u64,
    asked: BTreeMap<u64, Asked>,
    blocks: BTreeMap<u32, Block>,
    /// Per region: highest seq of a non-learner write that was issued.
    issued: BTreeMap<u32, u64>,
    mounts: u64,
    /// Writes and discards that the last crash left without an answer, in order of issue.
    unanswered: Vec<(u32, u32, Option<Value>)>,
}

pub struct Harness {
    pub config: Config,
    pub disk: Disk,
    /// `None` only while the process is down.
    machine: Option<Lane>,
    pub stats: Stats,
    header: DiskHeader,
    pool: Pool,
    now: u64,
    oracle: Oracle,
}

type Violation = String;

fn slots_from(header: &DiskHeader) -> Result<u64, Violation> {
    let geometry = Geometry::new(&header.lanes[0]).map_err(|fault| fault.to_string())?;
    Ok(geometry.slot(0, 0))
}

fn lane_parameters(config: Config, header: &DiskHeader, nonce: u64) -> MountParameters {
    MountParameters {
        entry: header.lanes[0].clone(),
        nonce,
        incarnation: nonce,
        durability: if config.volatile { Durability::Volatile } else { Durability::Plp },
        atomic_bytes: if config.atomic_blocks { 4096 } else { 512 },
        merge_always: true,
        mutant: config.mutant,
    }
}

impl Harness {
    /// A fresh lane with one replica.
    pub fn new(config: Config) -> Result<Harness, Violation> {
        let pool = Pool::new(4 << 20);
        let mut disk = Disk::new(config.volatile, config.atomic_blocks, pool.clone());
        let size = (2 << 20) + (512 << 10) + u64::from(config.slots + 4) * (64 << 10);
        let plan = format_disk(&FormatRequest {
            size,
            cluster_id: [1; 16],
            disk_uuid: [2; 16],
            format_uuid: [3; 16],
            lane_uuids: vec![[4; 16]],
            journal_bytes: Some(u64::from(config.journal_pages) * BLOCK_BYTES as u64),
            durability: if config.volatile { Durability::Volatile } else { Durability::Plp },
            durability_override: false,
            atomic_bytes: if config.atomic_blocks { 4096 } else { 512 },
            sparse: config.sparse,
        })
        .map_err(|problem| problem.to_string())?;
        for (offset, bytes) in plan.structures.iter().chain(&plan.headers) {
            disk.poke(*offset, bytes);
        }
        disk.slots_from = slots_from(&plan.header)?;
        let (lane, _) = mount(&mut disk, config, &plan.header, 1, pool.clone(), None)?
            .expect("nothing interrupts the first mount");
        let mut harness = Harness {
            config,
            disk,
            machine: Some(lane),
            stats: Stats::default(),
            header: plan.header,
            pool,
            now: 0,
            oracle: Oracle {
                next_token: 1,
                next_value: 1,
                next_seq: 1,
                commit: 0,
                asked: BTreeMap::new(),
                blocks: BTreeMap::new(),
                issued: BTreeMap::new(),
                mounts: 1,
                unanswered: Vec::new(),
            },
        };
        let shard = ShardId { volume: VolumeId(7), index: 3 };
        let replica = ReplicaId { shard, copy: 0 };
        harness.control(Op::Create { replica, blocks: SHARD_BLOCKS, family: VolumeId(7) });
        harness.settle()?;
        assert!(harness.lane().tables().shard(0).is_some(), "the replica exists");
        Ok(harness)
    }

    // ------------------------------------------------------------------------------- operations --

    pub fn control(&mut self, op: Op) {
        let token = self.token(Asked::Control);
        self.step(Event::Request(Request { token, op }));
    }

    fn token(&mut self, asked: Asked) -> u64 {
        let token = self.oracle.next_token;
        self.oracle.next_token += 1;
        self.oracle.asked.insert(token, asked);
        token
    }

    pub fn write(&mut self, first: u32, count: u32, learner: bool) {
        let value = self.oracle.next_value;
        self.oracle.next_value += u64::from(count);
        self.write_values(first, count, learner, value);
    }

    /// A client whose requests were not answered sends `count` of them again, as they were.
    pub fn resend(&mut self, count: usize) {
        for (first, count, value) in self.oracle.unanswered.clone().into_iter().take(count) {
            match value {
                Some(value) => self.write_values(first, count, false, value),
                None => self.take_data(first, count, RangeKind::Inherit),
            }
            self.turn();
        }
    }

    fn write_values(&mut self, first: u32, count: u32, learner: bool, value: Value) {
        let token = self.token(Asked::Write { first, count, value: Some(value) });
        let seq = self.take_seq();
        let mut bytes = self.pool.alloc(count as usize * BLOCK_BYTES);
        let mut crcs = smallvec::SmallVec::new();
        for (index, chunk) in bytes.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            let value = value + index as u64;
            fill(value, chunk);
            crcs.push(checksum::crc32c(chunk));
            self.attempt(first + index as u32, Attempt { value, seq, learner, token });
        }
        let mut data = BufList::new();
        data.push(bytes.freeze());
        let op = Op::Write {
            shard_ix: 0,
            lsn: Lsn { epoch: Epoch(1), seq: Seq(seq) },
            commit: Seq(self.oracle.commit),
            first,
            crcs,
            data,
            flags: if learner { FLAG_LEARNER } else { 0 },
            solo: self.config.solo,
            is_granted: false,
        };
        self.step(Event::Request(Request { token, op }));
    }

    pub fn take_data(&mut self, first: u32, count: u32, kind: RangeKind) {
        let value = if kind == RangeKind::Poison { POISONED } else { 0 };
        let token = self.token(Asked::Write { first, count, value: None });
        let seq = self.take_seq();
        for block in first..first + count {
            self.attempt(block, Attempt { value, seq, learner: false, token });
        }
        let op = Op::Range {
            shard_ix: 0,
            lsn: Lsn { epoch: Epoch(1), seq: Seq(seq) },
            commit: Seq(self.oracle.commit),
            first,
            count,
            kind,
            flags: 0,
        };
        self.step(Event::Request(Request { token, op }));
    }

    pub fn read(&mut self, first: u32, count: u32) {
        let before = (first..first + count).map(|block| self.allowed(block)).collect();
        let token = self.token(Asked::Read { first, before });
        let op = Op::Read { shard_ix: 0, first, count, with_poison: false };
        self.step(Event::Request(Request { token, op }));
    }

    fn take_seq(&mut self) -> u64 {
        let seq = self.oracle.next_seq;
        self.oracle.next_seq += 1;
        seq
    }

    fn attempt(&mut self, block: u32, attempt: Attempt) {
        if !attempt.learner {
            let issued = self.oracle.issued.entry(block / REGION_BLOCKS).or_default();
            *issued = attempt.seq.max(*issued);
        }
        self.oracle.blocks.entry(block).or_default().attempts.push(attempt);
    }

    /// Contents that the block may have now.
    fn allowed(&self, block: u32) -> Vec<Value> {
        let Some(known) = self.oracle.blocks.get(&block) else { return vec![0] };
        let attempts = known.attempts.iter().map(|attempt| attempt.value);
        std::iter::once(known.certain).chain(attempts).chain(known.failed.clone()).collect()
    }

    // --------------------------------------------------------------------------------- the world --

    pub fn step(&mut self, event: Event) {
        let (now, mut out) = (Tick(self.now), Effects::default());
        self.lane_mut().step(now, event, &mut out);
        out.disk.into_iter().for_each(|request| self.disk.submit(request));
        for reply in out.replies {
            let asked =
                self.oracle.asked.remove(&reply.token).expect("exactly one reply per request");
            self.replied(reply.token, asked, reply.result);
        }
    }

    pub fn turn(&mut self) {
        self.step(Event::Turn);
    }

    pub fn complete(&mut self, index: usize) {
        let done = self.disk.complete(index);
        self.step(Event::Disk(done));
    }

    /// Let time pass, so that idle work (SEAL) happens.
    pub fn idle(&mut self) {
        self.now += 60_000_000;
        self.turn();
    }

    fn replied(&mut self, token: u64, asked: Asked, result: Result<Outcome, Problem>) {
        match (asked, result) {
            // The lane stopped itself: like a crash, the effect of what was open is unknown.
            (_, Err(Problem::Stopped { .. })) => {}
            (Asked::Write { first, count, .. }, Ok(_)) => {
                self.stats.acked += 1;
                for block in first..first + count {
                    self.acknowledged(block, token);
                }
                self.raise_commit();
            }
            (Asked::Write { first, count, .. }, Err(problem)) => {
                let without_effect = matches!(problem, Problem::NoSpace { .. });
                self.stats.no_space += u64::from(without_effect);
                self.stats.media += u64::from(matches!(problem, Problem::Media { .. }));
                for block in first..first + count {
                    let known = self.oracle.blocks.get_mut(&block).expect("it was attempted");
                    if !without_effect {
                        known.lost = true;
                        let own = known.attempts.iter().filter(|attempt| attempt.token == token);
                        known.failed.extend(own.map(|attempt| attempt.value));
                    }
                    known.attempts.retain(|attempt| attempt.token != token);
                }
            }
            (Asked::Read { first, before }, Ok(Outcome::Read { data, crcs })) => {
                let bytes: Vec<u8> = data.iter().flat_map(|buf| buf.to_vec()).collect();
                assert_eq!(bytes.len(), crcs.len() * BLOCK_BYTES);
                for (index, chunk) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
                    let block = first + index as u32;
                    assert_eq!(checksum::crc32c(chunk), crcs[index], "CRC of the reply");
                    let found = value_of(chunk).unwrap_or_else(|| panic!("block {block} is torn"));
                    let allowed =
                        before[index].contains(&found) || self.allowed(block).contains(&found);
                    assert!(allowed, "block {block} reads as write {found}");
                    self.seen(block, found);
                }
            }
            (Asked::Read { .. }, Err(Problem::BadChecksum { .. })) => self.stats.refused_reads += 1,
            (Asked::Read { first, before }, Err(Problem::Poisoned { block }))
                if before[(block - first) as usize].contains(&POISONED)
                    || self.allowed(block).contains(&POISONED) => {}
            (Asked::Read { first, before }, Err(problem)) => {
                let lost = (first..first + before.len() as u32)
                    .any(|block| self.oracle.blocks.get(&block).is_some_and(|known| known.lost));
                assert!(lost, "read of {first}: {problem}");
            }
            (Asked::Control, Ok(_)) => {}
            (Asked::Control, Err(problem)) => panic!("control operation: {problem}"),
            (Asked::Read { .. }, Ok(_)) => panic!("a read brings data"),
        }
    }

    /// A failed write whose content was read has happened: it must not vanish again.
    fn seen(&mut self, block: u32, found: Value) {
        let Some(known) = self.oracle.blocks.get_mut(&block) else { return };
        if known.failed.contains(&found) {
            known.failed.clear();
            (known.certain, known.lost) = (found, false);
        }
    }

    fn acknowledged(&mut self, block: u32, token: u64) {
        let known = self.oracle.blocks.get_mut(&block).expect("it was attempted");
        let at = known.attempts.iter().position(|attempt| attempt.token == token);
        let at = at.expect("it is among the attempts");
        // Earlier attempts that are still open wait for space: they take effect after this one.
        let attempt = &known.attempts[at];
        known.certain = attempt.value;
        known.certain_seq = if attempt.learner { 0 } else { attempt.seq };
        known.lost = false;
        known.failed.clear();
        known.attempts.remove(at);
    }

    /// The commit watermark follows the acknowledged prefix.
    fn raise_commit(&mut self) {
        let open = self
            .oracle
            .blocks
            .values()
            .flat_map(|known| &known.attempts)
            .map(|attempt| attempt.seq);
        let lowest = open.min().unwrap_or(self.oracle.next_seq);
        self.oracle.commit = self.oracle.commit.max(lowest - 1);
    }

    /// Ring page of the last frame written, in a ring that has not wrapped.
    pub fn last_frame_page(&self) -> u32 {
        (0..self.config.journal_pages)
            .rev()
            .find(|&page| {
                let page = self.disk.read(JOURNAL_START + u64::from(page) * 4096, 4096);
                page.iter().any(|&byte| byte != 0)
            })
            .expect("something was written")
    }

    /// One of the slots that the map names.
    pub fn any_slot(&self, choice: u64) -> Option<u32> {
        let extents = self.lane().tables().layers.iter().flatten().flat_map(|layer| &layer.extents);
        let slots: Vec<u32> =
            extents.flat_map(|extent| extent.slots().map(|(_, slot)| slot)).collect();
        slots.get(choice.checked_rem(slots.len() as u64)? as usize).copied()
    }

    /// Slots that nobody has found out to be bad take writes again: the next checkpoint may pick
    /// them, and a checkpoint that fails stops the lane.
    pub fn heal_free_slots(&mut self) {
        if self.disk.bad.is_empty() {
            return;
        }
        let tables = self.machine.as_ref().expect("the process is up").tables();
        let extents = tables.layers.iter().flatten().flat_map(|layer| &layer.extents);
        let mapped = extents.flat_map(|extent| extent.slots().map(|(_, slot)| slot));
        let kept: BTreeSet<u32> = mapped.chain(tables.bad_slots.iter().copied()).collect();
        self.disk.bad.retain(|&slot| kept.contains(&(slot as u32)));
    }

    /// Slot in which a block of the shard lies.
    pub fn slot_of(&self, block: u32) -> u32 {
        let extent = self.lane().tables().extent(0, block / 1024).expect("inside the shard");
        extent.slot(block % 1024 / 16).expect("the block was written")
    }

    /// Byte of the disk where a block of the shard lies.
    pub fn place_of(&self, block: u32) -> u64 {
        let geometry = Geometry::new(&self.header.lanes[0]).expect("the lane is open");
        geometry.slot(self.slot_of(block), block % 16) + 5
    }

    /// Run until nothing is left to do.
    pub fn settle(&mut self) -> Result<(), Violation> {
        for _ in 0..100_000 {
            self.turn();
            if self.disk.outstanding() == 0 {
                self.turn();
                if self.disk.outstanding() == 0 {
                    break;
                }
            }
            self.complete(0);
        }
        if let Some(reason) = self.lane().failure() {
            return Err(format!("the lane stopped: {reason}"));
        }
        match self.oracle.asked.len() {
            0 => Ok(()),
            count => Err(format!(
                "{count} requests are never answered: {:?}, {} disk operations outstanding: {}",
                self.oracle.asked,
                self.disk.outstanding(),
                self.lane().describe()
            )),
        }
    }

    // ------------------------------------------------------------------------------------ crash --

    /// A copy of this moment with the process down: `crash` it, many times over.
    pub fn fork(&self) -> Harness {
        Harness {
            config: self.config,
            disk: self.disk.clone(),
            machine: None,
            stats: Stats::default(),
            header: self.header.clone(),
            pool: self.pool.clone(),
            now: self.now,
            oracle: self.oracle.clone(),
        }
    }

    /// The lane; the process must be up.
    pub fn lane(&self) -> &Lane {
        self.machine.as_ref().expect("the process is up")
    }

    fn lane_mut(&mut self) -> &mut Lane {
        self.machine.as_mut().expect("the process is up")
    }

    /// The process and the power fail; what is not durable meets `fates`. Recover, perhaps crash
    /// again `nested` operations into recovery, and compare everything with the oracle.
    pub fn crash(&mut self, fates: &[Fate], nested: Option<u64>) -> Result<(), Violation> {
        self.stats.crashes += 1;
        self.stats.torn += fates.iter().filter(|fate| matches!(fate, Fate::Torn(_))).count() as u64;
        self.count_lane();
        // The data of an unfinished write failed: its RESOLVE may be there and its reply not.
        let failed = self.disk.has_failed;
        self.disk = self.disk.crashed(fates);
        let asked = std::mem::take(&mut self.oracle.asked).into_values();
        self.oracle.unanswered = asked
            .filter_map(|asked| match asked {
                Asked::Write { first, count, value } => Some((first, count, value)),
                Asked::Read { .. } | Asked::Control => None,
            })
            .collect();
        self.oracle.mounts += 1;
        let mut interrupt = nested;
        loop {
            self.oracle.mounts += 1;
            let nonce = self.oracle.mounts.wrapping_mul(0x2545_f491_4f6c_dd1d);
            let found = mount(
                &mut self.disk,
                self.config,
                &self.header,
                nonce,
                self.pool.clone(),
                interrupt,
            );
            // A tiny ring or a full lane has no room for the move of what a slot does not take; it opens
            // when the device has come to its senses.
            let is_place = |why: &Violation| {
                why.contains("place of a journaled write") || why.contains("finds no slot")
            };
            if !self.disk.bad.is_empty() && found.as_ref().is_err_and(is_place) {
                self.disk.bad.clear();
                self.stats.unplaceable += 1;
                continue;
            }
            let found = found?;
            if let Some((lane, report)) = found {
                self.machine = Some(lane);
                self.stats.verified += report.verified_blocks;
                self.stats.restored += report.restored_blocks;
                self.stats.placed += report.placed_blocks;
                self.stats.poisoned += report.poisoned_blocks;
                break;
            }
            self.stats.nested += 1;
            interrupt = None;
        }
        self.heal_free_slots();
        match self.check_all(failed) {
            // A full lane has no other slot: once more, with the device in its senses.
            Err(why) if why.contains("finds no slot") && !self.disk.bad.is_empty() => {
                self.disk.bad.clear();
                self.stats.unplaceable += 1;
                return self.crash(&vec![Fate::Lost; self.disk.undecided()], None);
            }
            result => result?,
        }
        // What the lane does not know of never happened: its numbers are given out again.
        let shard = self.lane().tables().shard(0).ok_or("the replica is gone")?;
        self.oracle.next_seq = shard.applied.seq.0.max(self.oracle.commit) + 1;
        Ok(())
    }

    fn count_lane(&mut self) {
        let Some(lane) = &self.machine else { return };
        let counters = lane.counters();
        self.stats.checkpoints += counters.checkpoints;
        self.stats.wraps += counters.journal_wraps;
        self.stats.redos += counters.redos;
        self.stats.intents += counters.intents;
        self.stats.touches += counters.touches;
        self.stats.relocated += counters.slots_relocated;
        self.stats.not_relocated += counters.relocations_failed;
    }

    /// Compare every block ever touched, the region map and the space counters with the oracle.
    fn check_all(&mut self, failed: bool) -> Result<(), Violation> {
        let blocks: Vec<u32> = self.oracle.blocks.keys().copied().collect();
        for block in blocks {
            let found = self.read_now(block)?;
            self.check_block(block, found, failed)?;
        }
        for block in [0, 17, 1023, 1024, SHARD_BLOCKS - 1] {
            if !self.oracle.blocks.contains_key(&block) && self.read_now(block)? != Some(0) {
                return Err(format!("block {block} was never written and is not zeros"));
            }
        }
        self.check_regions()?;
        // What recovery could not place goes to another slot by itself.
        for _ in 0..1000 {
            if self.lane().space().inflight == 0 || self.disk.outstanding() == 0 {
                break;
            }
            self.complete(0);
            self.turn();
        }
        self.check_space()
    }

    fn check_block(
        &mut self,
        block: u32,
        found: Option<Value>,
        failed: bool,
    ) -> Result<(), Violation> {
        let may_poison = failed || self.config.may_poison();
        let region = self.region(block);
        let known = self.oracle.blocks.get_mut(&block).expect("it was touched");
        // What is there after a crash is decided.
        known.failed.clear();
        let in_flight = known.attempts.last().cloned();
        let mut values = known.attempts.iter().map(|attempt| attempt.value);
        let is_poisoned = known.certain == POISONED || values.any(|value| value == POISONED);
        let found = found.or(is_poisoned.then_some(POISONED));
        match found {
            None if known.lost || (may_poison && in_flight.is_some()) => {
                if region & 1 == 0 {
                    return Err(format!("block {block} is lost but its region is not SUSPECT"));
                }
                (known.lost, known.certain) = (true, 0);
                known.attempts.clear();
                return Ok(());
            }
            None => return Err(format!("block {block} cannot be read, its content is lost")),
            Some(_) if known.lost => known.lost = false,
            Some(value) => {
                let values: Vec<Value> =
                    known.attempts.iter().map(|attempt| attempt.value).collect();
                if value != known.certain && !values.contains(&value) {
                    return Err(format!(
                        "block {block} holds write {value}, allowed are {} and {values:?}",
                        known.certain
                    ));
                }
                // Resync copies what changed after some seq: a region's may be too high, never too
                // low.
                let oldest = known.attempts.iter().find(|attempt| attempt.value == value);
                let seq = oldest.filter(|_| known.certain != value);
                let seq = seq.map_or(known.certain_seq, |a| if a.learner { 0 } else { a.seq });
                // Zeros and poison do not tell which of several operations left them.
                if region >> 1 < seq && value != 0 && value != POISONED {
                    return Err(format!(
                        "block {block} holds a write with seq {seq}, its region says {}",
                        region >> 1
                    ));
                }
                known.certain_seq = seq;
            }
        }
        known.certain = found.expect("lost blocks were handled");
        known.attempts.clear();
        Ok(())
    }

    fn region(&self, block: u32) -> u64 {
        let shard = self.lane().tables().shard(0).expect("the replica is there");
        shard.regions[(block / REGION_BLOCKS) as usize]
    }

    fn check_regions(&self) -> Result<(), Violation> {
        let shard = self.lane().tables().shard(0).ok_or("the replica is gone")?;
        for (region, &value) in shard.regions.iter().enumerate() {
            let issued = self.oracle.issued.get(&(region as u32)).copied().unwrap_or(0);
            if value >> 1 > issued {
                return Err(format!("region {region} claims seq {}, issued {issued}", value >> 1));
            }
        }
        Ok(())
    }

    fn check_space(&self) -> Result<(), Violation> {
        let tables = self.lane().tables();
        let extents = tables.layers.iter().flatten().flat_map(|layer| &layer.extents);
        let mapped = extents.flat_map(|extent| extent.slots()).count() as u32;
        let space = self.lane().space();
        let bad = tables.bad_slots.len() as u32;
        let is_mapped = |slot: &u32| {
            let mut extents = tables.layers.iter().flatten().flat_map(|layer| &layer.extents);
            extents.any(|extent| extent.slots().any(|(_, mapped)| mapped == *slot))
        };
        let in_use = tables.bad_slots.iter().filter(|slot| is_mapped(slot)).count() as u32;
        if space.bad != bad - in_use {
            return Err(format!(
                "{bad} slots are bad, {in_use} in use, the counters say {space:?}"
            ));
        }
        if space.mapped != mapped || space.inflight != 0 || space.reserved != 0 {
            return Err(format!("the map names {mapped} slots, the counters say {space:?}"));
        }
        let used = tables.shard(0).map_or(0, |shard| shard.used_slots);
        if used != mapped {
            return Err(format!("the map names {mapped} slots, the shard counts {used}"));
        }
        Ok(())
    }

    /// Read one block to the end; `None` when it is known to be lost.
    fn read_now(&mut self, block: u32) -> Result<Option<Value>, Violation> {
        let (now, mut out) = (Tick(self.now), Effects::default());
        let op = Op::Read { shard_ix: 0, first: block, count: 1, with_poison: false };
        let token = self.oracle.next_token;
        self.oracle.next_token += 1;
        self.lane_mut().step(now, Event::Request(Request { token, op }), &mut out);
        for _ in 0..1000 {
            if let Some(reply) = out.replies.pop() {
                return match reply.result {
                    Ok(Outcome::Read { data, .. }) => match value_of(&data[0]) {
                        Some(value) => Ok(Some(value)),
                        None => Err(format!("block {block} is torn and was returned")),
                    },
                    Ok(_) => Err("a read brings data".into()),
                    Err(Problem::Poisoned { .. }) => Ok(None),
                    Err(problem) => Err(format!("block {block}: {problem}")),
                };
            }
            self.lane_mut().step(now, Event::Turn, &mut out);
            out.disk.drain(..).for_each(|request| self.disk.submit(request));
            if self.disk.outstanding() > 0 {
                let done = self.disk.complete(0);
                self.lane_mut().step(now, Event::Disk(done), &mut out);
            }
        }
        Err(format!("a read of block {block} is never answered: {:?}", self.lane().failure()))
    }

    /// Close cleanly and mount again: nothing may need recovery, everything must be there.
    pub fn close_and_reopen(&mut self) -> Result<(), Violation> {
        self.control(Op::Close);
        self.settle()?;
        if !self.lane().is_closed() {
            return Err("the lane does not close".into());
        }
        let fates = vec![Fate::Lost; self.disk.undecided()];
        let verified = self.stats.verified;
        self.crash(&fates, None)?;
        if self.stats.verified != verified {
            return Err("a clean close left blocks to verify".into());
        }
        Ok(())
    }
}

/// Blocks in doubt are in SUSPECT regions, whatever was decided.
fn check_decided(mounted: &lane::recover::Mounted) -> Result<(), Violation> {
    for (shard_ix, first, count) in mounted.decided() {
        let shard = mounted.tables().shard(shard_ix).ok_or("decided blocks of no shard")?;
        for block in first..first + count {
            if shard.regions[(block / REGION_BLOCKS) as usize] & 1 == 0 {
                return Err(format!("block {block} was in doubt, its region is not SUSPECT"));
            }
        }
    }
    Ok(())
}

/// Recover a lane; `None` when it was interrupted after `interrupt` disk writes.
fn mount(
    disk: &mut Disk,
    config: Config,
    header: &DiskHeader,
    nonce: u64,
    pool: Pool,
    interrupt: Option<u64>,
) -> Result<Option<(Lane, lane::recover::RecoveryReport)>, Violation> {
    let mut random = Random::new(interrupt.unwrap_or(0));
    let mut left = interrupt.map(|choice| choice % 4);
    let mut interrupted = |disk: &mut Disk, random: &mut Random| {
        if left == Some(0) {
            let fates: Vec<Fate> = (0..disk.undecided()).map(|_| random_fate(random)).collect();
            *disk = disk.crashed(&fates);
            return true;
        }
        left = left.map(|left| left - 1);
        false
    };
    let parameters = lane_parameters(config, header, nonce);
    let mut machine = Mount::new(parameters, pool.clone()).map_err(|fault| fault.to_string())?;
    // The first read of some blocks that recovery verifies fails: a device's error may pass.
    let slots = slots_from(header)?;
    let mut failed = BTreeSet::new();
    let mut results = Vec::new();
    let mounted = loop {
        match machine.next(std::mem::take(&mut results)) {
            MountStep::Io(batch) => {
                for op in batch {
                    let is_write = matches!(op, DiskOp::Write { .. });
                    if let DiskOp::Read { offset, .. } = op
                        && offset >= slots
                        && (offset / BLOCK_BYTES as u64 + nonce).is_multiple_of(3)
                        && failed.insert(offset)
                    {
                        results.push(Err(DiskError::Errno(5)));
                        continue;
                    }
                    disk.submit(DiskRequest { id: IoId(0), op });
                    if is_write && interrupted(disk, &mut random) {
                        return Ok(None);
                    }
                    results.push(disk.complete(0).result);
                }
            }
            MountStep::Mounted(mounted) => {
                check_decided(&mounted)?;
                break mounted;
            }
            MountStep::Faulted(fault) => return Err(format!("the lane is FAULTED: {fault}")),
        }
    };
    let report = mounted.report;
    let mut lane = Lane::open(*mounted, pool);
    let mut out = Effects::default();
    for _ in 0..1000 {
        lane.step(Tick(0), Event::Turn, &mut out);
        out.disk.drain(..).for_each(|request| disk.submit(request));
        if lane.is_open() {
            return Ok(Some((lane, report)));
        }
        if interrupted(disk, &mut random) {
            return Ok(None);
        }
        if disk.outstanding() > 0 {
            let done = disk.complete(random.below(disk.outstanding() as u64) as usize);
            lane.step(Tick(0), Event::Disk(done), &mut out);
        }
    }
    Err(format!("the lane does not open: {:?}", lane.failure()))
}

pub fn random_fate(random: &mut Random) -> Fate {
    match random.below(5) {
        0 | 1 => Fate::Lost,
        2 | 3 => Fate::Landed,
        _ => Fate::Torn(random.next()),
    }
}

/// The content that names `value`: every word differs, so any mixture is recognised.
fn fill(value: Value, block: &mut [u8]) {
    for (index, word) in block.chunks_exact_mut(8).enumerate() {
        let mixed = value.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (index as u64) << 48;
        word.copy_from_slice(&(if index == 0 { value } else { mixed }).to_le_bytes());
    }
}

/// The value that a block names, `None` for a mixture.
fn value_of(block: &[u8]) -> Option<Value> {
    if block.iter().all(|&byte| byte == 0) {
        return Some(0);
    }
    let value = u64::from_le_bytes(block[..8].try_into().expect("eight bytes"));
    let mut expected = vec![0; BLOCK_BYTES];
    fill(value, &mut expected);
    (expected == block).then_some(value)
}
