//! Recovery: from the bytes of a disk to an open lane. Idempotent: a crash anywhere in it means that
//! it runs again and comes to the same answer.
//!
//! A machine in batches: `Mount::next` takes the results of the last batch of disk operations and
//! returns the next one. Steps: superblocks, manifest, runs, walk of the journal chain, scan of the
//! rest of the ring (is the end a torn tail, or rot of something relied upon?), verification of the
//! blocks whose *last* record is not known to be in place, placement of journaled payloads. The
//! decisions are logged as RESOLVE records by the lane when it opens, before it serves anything.

use crate::alloc::Allocator;
use crate::checkpoint::metadata_slots;
use crate::format::{
    Durability, FormatError, FrameHeader, Geometry, LaneEntry, Pages, Replay, Run, RunKind,
    Superblock, Uuid, parse_manifest, physical_block,
};
use crate::journal::{Journal, JournalStart, payload_crc};
use crate::lane::{Unplaced, records_of_a_move};
use crate::map::BlockState;
use crate::mutant::Mutant;
use crate::record::{
    Body, Decided, FLAG_LAST_PART, RESOLVE_BLOCKS_MAX, Record, ResolvePart, positions,
};
use crate::tables::Tables;
use crate::tags::Lookup;
use crate::{EXTENT_BLOCKS, SLOT_BLOCKS};
use proto::checksum::{crc32c, tag_mask};
use proto::disk::{DiskError, DiskOp};
use proto::{BLOCK_BYTES, Buf, Lsn, Pool, Seq};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Disk operations of one batch.
const BATCH_MAX: usize = 32;
/// Times that a read is tried before its failure is believed: a device's error may pass.
const READ_TRIES: u32 = 5;
/// Bytes of one read of the ring.
const RING_READ_PAGES: u32 = 64;

/// Why a lane cannot be opened. Nothing was changed on the disk.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// A structure was refused.
    #[error("{0}")]
    Format(#[from] FormatError),
    /// No superblock is good.
    #[error("no superblock of the lane is good: {0}")]
    NoSuperblock(FormatError),
    /// Manifest or run damaged.
    #[error("checkpoint {version}: {what} is damaged; the replica must be rebuilt from the others")]
    Checkpoint {
        /// Superblock version.
        version: u64,
        /// Which part.
        what: String,
    },
    /// The journal has lost frames that were durable.
    #[error(
        "journal frame {missing} is damaged although frame {witness} proves that it was durable: \
         acknowledged writes may be lost; the replica must be rebuilt from the others"
    )]
    JournalRot {
        /// First frame that does not verify.
        missing: u64,
        /// Frame that was written after it had been durable.
        witness: u64,
    },
    /// The journal and the checkpoint contradict each other.
    #[error("journal: {0}")]
    Contradiction(String),
    /// The map names a slot twice.
    #[error("map: {0}")]
    Map(String),
    /// A read failed during recovery.
    #[error("reading the {what} failed: {error}")]
    Io {
        /// Which structure.
        what: &'static str,
        /// What the device said.
        error: DiskError,
    },
}

/// How to open a lane.
#[derive(Clone, Debug)]
pub struct MountParameters {
    /// The lane's entry in the disk header.
    pub entry: LaneEntry,
    /// Fresh random number; never derived from an earlier one.
    pub nonce: u64,
    /// Incarnation of the store.
    pub incarnation: u64,
    /// What a completed write means on this device.
    pub durability: Durability,
    /// Bytes that power failure leaves either old or new.
    pub atomic_bytes: u32,
    /// Merge CRC pages at every checkpoint (tests with small lanes).
    pub merge_always: bool,
    /// Seeded bug, `Mutant::None` outside tests.
    pub mutant: Mutant,
}

/// What recovery found and decided.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RecoveryReport {
    /// Frames replayed.
    pub frames: u64,
    /// Records applied.
    pub records: u64,
    /// Blocks whose content was compared with their last record.
    pub verified_blocks: u64,
    /// Blocks that kept the content before an unfinished write.
    pub restored_blocks: u64,
    /// Journaled payloads written in place.
    pub placed_blocks: u64,
    /// Blocks that are lost: neither the old nor the new content is there.
    pub poisoned_blocks: u64,
    /// ... of which acknowledged by every in-sync replica: damage, not a torn write.
    pub damaged_blocks: u64,
}

/// A recovered lane, ready for `Lane::open`.
pub struct Mounted {
    pub(crate) geometry: Geometry,
    pub(crate) durability: Durability,
    pub(crate) atomic_bytes: u32,
    pub(crate) mutant: Mutant,
    pub(crate) merge_always: bool,
    pub(crate) tables: Tables,
    pub(crate) allocator: Allocator,
    pub(crate) journal: Journal,
    pub(crate) runs: BTreeMap<(RunKind, u64), Run>,
    pub(crate) manifest: Pages,
    pub(crate) metadata_slots: BTreeSet<u32>,
    pub(crate) version: u64,
    pub(crate) mount: Record,
    pub(crate) resolved: Vec<Record>,
    /// Journaled payloads whose place takes no write, by adjacent blocks of one record.
    pub(crate) unplaced: Vec<Vec<Unplaced>>,
    /// What was found.
    pub report: RecoveryReport,
}

impl Mounted {
    /// What the disk held, with recovery's decisions.
    #[must_use]
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Stretches of blocks that recovery had to decide: (shard index, first block, count).
    pub fn decided(&self) -> impl Iterator<Item = (u32, u32, u32)> + '_ {
        self.resolved.iter().filter_map(|record| match &record.body {
            Body::Resolve(part) => {
                let first = part.extent * EXTENT_BLOCKS + part.first;
                Some((record.shard_ix, first, part.decided.len() as u32))
            }
            Body::Intent(_)
            | Body::Redo(_)
            | Body::Range { .. }
            | Body::Conf(_)
            | Body::Commit
            | Body::Region { .. }
            | Body::Shard(_)
            | Body::BadSlot { .. }
            | Body::Mount { .. }
            | Body::Seal
            | Body::Pad => None,
        })
    }
}

/// What recovery wants next.
pub enum MountStep {
    /// Do these, in any order but flushes last, and give all results to `next`.
    Io(Vec<DiskOp>),
    /// Done.
    Mounted(Box<Mounted>),
    /// The lane cannot be opened.
    Faulted(Fault),
}

/// Result of one operation of a batch, in the order of the batch.
pub type MountResult = Result<Option<Buf>, DiskError>;

/// The last data record of a block that is not known to be in place.
struct Candidate {
    number: u64,
    shard_ix: u32,
    lsn: Lsn,
    flags: u8,
    physical: u64,
    tag: u32,
    /// Before this record: state and tag (`None`: look it up, or the block held no data).
    before: BlockState,
    before_tag: Option<u32>,
    payload: Option<Buf>,
}

enum Phase {
    Superblocks,
    Manifest,
    Runs { queue: VecDeque<Run>, reading: Vec<Run> },
    Ring { next: u32, left: u32 },
    TagPages { reading: Vec<u32> },
    Verify { queue: VecDeque<(u32, u32)>, reading: Vec<(u32, u32)> },
    Place,
}

/// Operations under way. Reads that the device fails are tried again, writes and flushes are not.
#[derive(Default)]
struct Batch {
    ops: Vec<DiskOp>,
    results: Vec<MountResult>,
    /// Which of `ops` the next results are for.
    asked: Vec<usize>,
    tries: u32,
}

impl Batch {
    fn begin(&mut self, ops: &[DiskOp]) {
        self.ops = ops.to_vec();
        self.asked = (0..ops.len()).collect();
    }

    fn add(&mut self, results: Vec<MountResult>) {
        assert_eq!(self.asked.len(), results.len(), "one result for each operation");
        self.tries += 1;
        if self.results.is_empty() {
            self.results = results;
            return;
        }
        for (&at, result) in self.asked.iter().zip(results) {
            self.results[at] = result;
        }
    }

    /// Reads that are worth another try.
    fn failed_reads(&mut self) -> Option<Vec<DiskOp>> {
        let is_failed =
            |&at: &usize| self.results[at].is_err() && matches!(self.ops[at], DiskOp::Read { .. });
        self.asked = (0..self.ops.len()).filter(is_failed).collect();
        let is_over = self.asked.is_empty() || self.tries >= READ_TRIES;
        (!is_over).then(|| self.asked.iter().map(|&at| self.ops[at].clone()).collect())
    }
}

/// The recovery machine of one lane.
pub struct Mount {
    parameters: MountParameters,
    geometry: Geometry,
    pool: Pool,
    phase: Option<Phase>,
    batch: Batch,
    superblock: Option<Superblock>,
    tables: Tables,
    runs: BTreeMap<(RunKind, u64), Run>,
    walk: Walk,
    candidates: BTreeMap<(u32, u32), Candidate>,
    /// Layer and block, and what belongs there.
    placements: Vec<((u32, u32), Buf)>,
    unplaced: Vec<Vec<Unplaced>>,
    /// Why.
    place_error: Option<DiskError>,
    decided: BTreeMap<(u32, u32), Decided>,
    report: RecoveryReport,
}

/// Progress through the ring.
struct Walk {
    /// Next frame expected.
    next: Replay,
    /// Pages read; those from `consumed` on begin at `next.ring_page`.
    pending: Vec<u8>,
    consumed: usize,
    ended: bool,
    frames: Vec<(Replay, u32, u64)>,
    stable: u64,
    last_record: u64,
    last_nonce: u64,
    /// Ring page of the first page in `pending` while scanning after the end of the chain.
    scan_page: u32,
}

impl Mount {
    /// Prepare recovery of the lane in `parameters.entry`.
    pub fn new(parameters: MountParameters, pool: Pool) -> Result<Mount, Fault> {
        let geometry = Geometry::new(&parameters.entry)?;
        let tables = Tables::new(geometry.slots, geometry.tag_pages);
        let walk = Walk {
            next: Replay { ring_page: 0, frame_seq: 1, prev_crc: 0 },
            pending: Vec::new(),
            consumed: 0,
            ended: false,
            frames: Vec::new(),
            stable: 0,
            last_record: 0,
            last_nonce: 0,
            scan_page: 0,
        };
        Ok(Mount {
            parameters,
            geometry,
            pool,
            phase: None,
            batch: Batch::default(),
            superblock: None,
            tables,
            runs: BTreeMap::new(),
            walk,
            candidates: BTreeMap::new(),
            placements: Vec::new(),
            unplaced: Vec::new(),
            place_error: None,
            decided: BTreeMap::new(),
            report: RecoveryReport::default(),
        })
    }

    /// Go on with the results of the last batch (empty at first).
    pub fn next(&mut self, results: Vec<MountResult>) -> MountStep {
        self.batch.add(results);
        if let Some(again) = self.batch.failed_reads() {
            return MountStep::Io(again);
        }
        let results = std::mem::take(&mut self.batch).results;
        let step = self.advance(results);
        if let MountStep::Io(ops) = &step {
            self.batch.begin(ops);
        }
        step
    }

    fn advance(&mut self, results: Vec<MountResult>) -> MountStep {
        let step = match self.phase.take() {
            None => Ok(self.read_superblocks()),
            Some(Phase::Superblocks) => self.superblocks_read(&results),
            Some(Phase::Manifest) => self.manifest_read(results),
            Some(Phase::Runs { queue, reading }) => self.runs_read(queue, &reading, results),
            Some(Phase::Ring { next, left }) => self.ring_read(next, left, results),
            Some(Phase::TagPages { reading }) => self.tag_pages_read(&reading, results),
            Some(Phase::Verify { queue, reading }) => self.verify_read(queue, &reading, results),
            Some(Phase::Place) => self.placed(&results),
        };
        step.unwrap_or_else(MountStep::Faulted)
    }

    fn read_superblocks(&mut self) -> MountStep {
        self.phase = Some(Phase::Superblocks);
        let places = [0, 1].into_iter().flat_map(|pair| self.geometry.superblocks(pair));
        MountStep::Io(places.map(read_page).collect())
    }

    fn superblocks_read(&mut self, results: &[MountResult]) -> Result<MountStep, Fault> {
        let (mut best, mut problem): (Option<Superblock>, _) = (None, None);
        for result in results {
            match result {
                Ok(bytes) => {
                    let bytes = bytes.as_ref().expect("a read brings data");
                    match Superblock::parse(bytes, &self.geometry) {
                        Ok(found) if best.as_ref().is_none_or(|b| found.version > b.version) => {
                            best = Some(found);
                        }
                        Ok(_) => {}
                        Err(found) => problem = Some(Fault::NoSuperblock(found)),
                    }
                }
                Err(error) => problem = Some(Fault::Io { what: "superblock", error: *error }),
            }
        }
        let superblock = best.ok_or_else(|| problem.expect("four copies were looked at"))?;
        let manifest = superblock.manifest;
        self.walk.next = superblock.replay;
        self.walk.stable = superblock.stable_rec;
        self.walk.last_record = superblock.stable_rec;
        self.superblock = Some(superblock);
        self.phase = Some(Phase::Manifest);
        Ok(MountStep::Io(vec![self.read_pages(manifest)]))
    }

    fn read_pages(&self, pages: Pages) -> DiskOp {
        let offset = self.geometry.slot(pages.slot, u32::from(pages.page));
        DiskOp::Read { offset, len: u32::from(pages.pages) * BLOCK_BYTES as u32 }
    }

    fn version(&self) -> u64 {
        self.superblock.as_ref().expect("read first").version
    }

    fn manifest_read(&mut self, mut results: Vec<MountResult>) -> Result<MountStep, Fault> {
        let superblock = self.superblock.as_ref().expect("read first");
        let bytes = data(results.remove(0), "manifest")?;
        let damaged = |what: String| Fault::Checkpoint { version: superblock.version, what };
        if crc32c(&bytes) != superblock.manifest_crc {
            return Err(damaged("the manifest".into()));
        }
        let mut runs = parse_manifest(&bytes, &self.geometry, superblock.version)?;
        // Layers before shards before what refers to them.
        runs.sort_by_key(|run| {
            let order = match run.kind {
                RunKind::Layer => 0,
                RunKind::Shard => 1,
                RunKind::Map
                | RunKind::Tail
                | RunKind::Region
                | RunKind::TagSide
                | RunKind::TagDelta
                | RunKind::BadSlot => 2,
            };
            (order, run.kind, run.key)
        });
        self.runs = runs.iter().map(|run| ((run.kind, run.key), *run)).collect();
        self.read_runs(runs.into())
    }

    fn read_runs(&mut self, mut queue: VecDeque<Run>) -> Result<MountStep, Fault> {
        let count = queue.len().min(BATCH_MAX);
        if count == 0 {
            return Ok(self.begin_ring());
        }
        let reading: Vec<Run> = queue.drain(..count).collect();
        let batch = reading.iter().map(|run| self.read_pages(run.pages)).collect();
        self.phase = Some(Phase::Runs { queue, reading });
        Ok(MountStep::Io(batch))
    }

    fn runs_read(
        &mut self,
        queue: VecDeque<Run>,
        reading: &[Run],
        results: Vec<MountResult>,
    ) -> Result<MountStep, Fault> {
        for (run, result) in reading.iter().zip(results) {
            let bytes = data(result, "checkpoint run")?;
            let bytes = &bytes[..run.bytes as usize];
            let what = format!("run {:?} {:#x}", run.kind, run.key);
            let version = self.version();
            if crc32c(bytes) != run.crc {
                return Err(Fault::Checkpoint { version, what });
            }
            self.tables.decode_run(run.kind, run.key, bytes).map_err(|problem| {
                Fault::Checkpoint { version, what: format!("{what} ({problem})") }
            })?;
        }
        self.read_runs(queue)
    }

    // ---------------------------------------------------------------------------- the journal --

    fn begin_ring(&mut self) -> MountStep {
        self.tables.replaying = true;
        self.walk.scan_page = self.walk.next.ring_page;
        self.read_ring(self.walk.next.ring_page, self.geometry.ring_pages)
    }

    /// Read on from page `next`; `left` pages of the ring have not been read.
    fn read_ring(&mut self, mut next: u32, mut left: u32) -> MountStep {
        let mut batch = Vec::new();
        while left > 0 && batch.len() < BATCH_MAX / 2 {
            let pages = RING_READ_PAGES.min(left).min(self.geometry.ring_pages - next);
            let offset = self.geometry.ring(next);
            batch.push(DiskOp::Read { offset, len: pages * BLOCK_BYTES as u32 });
            next = (next + pages) % self.geometry.ring_pages;
            left -= pages;
        }
        self.phase = Some(Phase::Ring { next, left });
        MountStep::Io(batch)
    }

    fn ring_read(
        &mut self,
        next: u32,
        left: u32,
        results: Vec<MountResult>,
    ) -> Result<MountStep, Fault> {
        // Moved together once per batch, not once per frame.
        self.walk.pending.drain(..std::mem::take(&mut self.walk.consumed));
        for result in results {
            let bytes = data(result, "journal")?;
            self.walk.pending.extend_from_slice(&bytes);
        }
        while !self.walk.ended && self.walk_frame(left == 0)? {}
        if self.walk.ended {
            self.scan()?;
        }
        if left > 0 { Ok(self.read_ring(next, left)) } else { self.walk_over() }
    }

    /// Take one frame from the pending pages. False: more pages are needed, or the chain has ended.
    fn walk_frame(&mut self, all_read: bool) -> Result<bool, Fault> {
        let walk = &mut self.walk;
        let pending = &walk.pending[walk.consumed..];
        if pending.len() < BLOCK_BYTES {
            walk.ended = all_read;
            return Ok(false);
        }
        let page = &pending[..BLOCK_BYTES];
        let parsed = FrameHeader::parse(page, &self.geometry.uuid);
        let expected = |header: &FrameHeader| {
            header.frame_seq == walk.next.frame_seq
                && header.prev_crc == walk.next.prev_crc
                && header.ring_page == walk.next.ring_page
                && header.ring_page + u32::from(header.payload_pages) < self.geometry.ring_pages
        };
        let Some((header, crc, records)) = parsed.ok().filter(|(header, _, _)| expected(header))
        else {
            walk.ended = true;
            return Ok(false);
        };
        let bytes = (1 + usize::from(header.payload_pages)) * BLOCK_BYTES;
        if pending.len() < bytes {
            walk.ended = all_read;
            return Ok(false);
        }
        let payload = &pending[BLOCK_BYTES..bytes];
        // A PAD frame (no records) has pages but no payload.
        if header.rec_count > 0 && payload_crc(payload) != header.payload_crc {
            walk.ended = true;
            return Ok(false);
        }
        let records = Record::decode_all(records, header.rec_count)
            .map_err(|problem| Fault::Contradiction(problem.to_string()))?;
        let payload = payload.to_vec();
        walk.consumed += bytes;
        let pages = 1 + u32::from(header.payload_pages);
        walk.last_record = header.first_rec + u64::from(header.rec_count) - 1;
        walk.frames.push((walk.next, pages, walk.last_record));
        walk.stable = walk.stable.max(header.stable_rec);
        walk.last_nonce = header.mount_nonce;
        walk.next = Replay {
            ring_page: (header.ring_page + pages) % self.geometry.ring_pages,
            frame_seq: header.frame_seq + 1,
            prev_crc: crc,
        };
        walk.scan_page = walk.next.ring_page;
        self.report.frames += 1;
        self.replay(header.first_rec, records, &payload)?;
        Ok(true)
    }

    /// After the end of the chain: a frame that was built after the missing one had been durable
    /// means rot, not a torn tail.
    fn scan(&mut self) -> Result<(), Fault> {
        let missing = self.walk.next.frame_seq;
        for page in self.walk.pending[self.walk.consumed..].chunks_exact(BLOCK_BYTES) {
            if let Ok((header, _, _)) = FrameHeader::parse(page, &self.geometry.uuid)
                && header.ring_page == self.walk.scan_page
                && header.durable_seq >= missing
            {
                return Err(Fault::JournalRot { missing, witness: header.frame_seq });
            }
            self.walk.scan_page = (self.walk.scan_page + 1) % self.geometry.ring_pages;
        }
        self.walk.consumed = self.walk.pending.len();
        Ok(())
    }

    fn replay(
        &mut self,
        first: u64,
        records: Vec<Option<Record>>,
        payload: &[u8],
    ) -> Result<(), Fault> {
        let mut pages = payload.chunks_exact(BLOCK_BYTES);
        for (index, record) in records.into_iter().enumerate() {
            let Some(record) = record else { continue };
            let number = first + index as u64;
            self.report.records += 1;
            let blocks: Vec<Buf> = pages
                .by_ref()
                .take(record.payload_pages())
                .map(|page| self.pool.copy_of(page).freeze())
                .collect();
            self.note_candidates(number, &record, blocks);
            self.tables
                .apply(&record)
                .map_err(|problem| Fault::Contradiction(problem.to_string()))?;
        }
        Ok(())
    }

    /// Remember, for each block, its last data record and what was there before it (step 5).
    fn note_candidates(&mut self, number: u64, record: &Record, mut payload: Vec<Buf>) {
        let forget =
            |candidates: &mut BTreeMap<(u32, u32), Candidate>, layer: u32, first, count| {
                let range = (layer, first)..(layer, first + count);
                let blocks: Vec<_> = candidates.range(range).map(|(&key, _)| key).collect();
                blocks.iter().for_each(|key| drop(candidates.remove(key)));
            };
        match &record.body {
            Body::Intent(piece) | Body::Redo(piece) => {
                if number <= self.walk.stable || self.tables.shard(record.shard_ix).is_none() {
                    let first = piece.extent * EXTENT_BLOCKS + piece.first;
                    forget(&mut self.candidates, piece.layer, first, piece.count());
                    return;
                }
                payload.reverse();
                for (block, slot, in_slot, tag) in piece.blocks() {
                    let key = (piece.layer, piece.extent * EXTENT_BLOCKS + block);
                    let (before, before_tag) = self.before(piece.layer, piece.extent, block);
                    let candidate = Candidate {
                        number,
                        shard_ix: record.shard_ix,
                        lsn: record.lsn,
                        flags: record.flags,
                        physical: physical_block(slot, in_slot),
                        tag,
                        before,
                        before_tag,
                        payload: payload.pop(),
                    };
                    if self.parameters.mutant.is(Mutant::VerifyPerRecord) {
                        // Seeded bug: an older record of the block is what gets verified.
                        self.candidates.entry(key).or_insert(candidate);
                    } else {
                        self.candidates.insert(key, candidate);
                    }
                }
            }
            Body::Range { layer, first, count, .. } => {
                if !self.parameters.mutant.is(Mutant::VerifyPerRecord) {
                    forget(&mut self.candidates, *layer, *first, *count);
                }
            }
            Body::Resolve(piece) => {
                let first = piece.extent * EXTENT_BLOCKS + piece.first;
                forget(&mut self.candidates, piece.layer, first, piece.decided.len() as u32);
            }
            Body::Shard(_) => {
                self.candidates.retain(|_, candidate| candidate.shard_ix != record.shard_ix);
            }
            Body::Conf(_)
            | Body::Commit
            | Body::Region { .. }
            | Body::BadSlot { .. }
            | Body::Mount { .. }
            | Body::Seal
            | Body::Pad => {}
        }
    }

    /// State and tag of a block as replayed so far. The tag of a block that has not been touched by
    /// the journal is in its CRC page, which does not change: it is looked up later.
    fn before(&self, layer: u32, extent: u32, block: u32) -> (BlockState, Option<u32>) {
        let Some(entry) = self.tables.extent(layer, extent) else {
            return (BlockState::Inherit, None);
        };
        let state = entry.state(block);
        let slot = entry.slot(block / SLOT_BLOCKS).filter(|_| state == BlockState::Data);
        let tag = slot.and_then(|slot| {
            match self.tables.tags.lookup(physical_block(slot, block % SLOT_BLOCKS)) {
                Lookup::Known(tag) => Some(tag),
                Lookup::Missing(_) | Lookup::Never => None,
            }
        });
        (state, tag)
    }

    fn walk_over(&mut self) -> Result<MountStep, Fault> {
        if let Some(ix) = self.tables.skipped.first() {
            let text = format!("records of shard index {ix}, which does not exist");
            return Err(Fault::Contradiction(text));
        }
        let stable = self.walk.stable;
        self.candidates.retain(|_, candidate| candidate.number > stable);
        // Old tags that are only in CRC pages.
        let pages: BTreeSet<u32> = self
            .candidates
            .values()
            .filter(|candidate| {
                candidate.before == BlockState::Data && candidate.before_tag.is_none()
            })
            .map(|candidate| (candidate.physical / crate::format::TAGS_PER_PAGE) as u32)
            .filter(|&page| self.tables.tags.side(page).is_some())
            .collect();
        let reading: Vec<u32> = pages.into_iter().collect();
        let batch = reading
            .iter()
            .map(|&page| {
                let (side, _) = self.tables.tags.side(page).expect("filtered above");
                read_page(self.geometry.tag_page(side, page))
            })
            .collect::<Vec<_>>();
        if batch.is_empty() {
            return self.begin_verify();
        }
        self.phase = Some(Phase::TagPages { reading });
        Ok(MountStep::Io(batch))
    }

    fn tag_pages_read(
        &mut self,
        reading: &[u32],
        results: Vec<MountResult>,
    ) -> Result<MountStep, Fault> {
        for (&page, result) in reading.iter().zip(results) {
            let bytes = data(result, "CRC page")?;
            let (_, crc) = self.tables.tags.side(page).expect("it was read");
            if crc32c(&bytes) != crc {
                // Its tags are unknown: the blocks before an unfinished write cannot be recognised.
                continue;
            }
            for candidate in self.candidates.values_mut() {
                let own = (candidate.physical / crate::format::TAGS_PER_PAGE) as u32 == page;
                if own && candidate.before == BlockState::Data && candidate.before_tag.is_none() {
                    let at = (candidate.physical % crate::format::TAGS_PER_PAGE) as usize * 4;
                    let tag = bytes[at..at + 4].try_into().expect("four bytes");
                    candidate.before_tag = Some(u32::from_le_bytes(tag));
                }
            }
        }
        self.begin_verify()
    }

    // --------------------------------------------------------------------------- verification --

    fn begin_verify(&mut self) -> Result<MountStep, Fault> {
        let queue: VecDeque<_> = self.candidates.keys().copied().collect();
        self.verify_more(queue)
    }

    fn verify_more(&mut self, mut queue: VecDeque<(u32, u32)>) -> Result<MountStep, Fault> {
        let count = queue.len().min(BATCH_MAX);
        if count == 0 {
            return self.place();
        }
        let reading: Vec<_> = queue.drain(..count).collect();
        let batch = reading.iter().map(|key| read_page(self.offset(self.candidates[key].physical)));
        let batch = batch.collect();
        self.phase = Some(Phase::Verify { queue, reading });
        Ok(MountStep::Io(batch))
    }

    fn offset(&self, physical: u64) -> u64 {
        let slot = (physical / u64::from(SLOT_BLOCKS)) as u32;
        self.geometry.slot(slot, (physical % u64::from(SLOT_BLOCKS)) as u32)
    }

    fn verify_read(
        &mut self,
        queue: VecDeque<(u32, u32)>,
        reading: &[(u32, u32)],
        results: Vec<MountResult>,
    ) -> Result<MountStep, Fault> {
        for (&key, result) in reading.iter().zip(results) {
            self.report.verified_blocks += 1;
            let decided = self.decide(key, result.ok().flatten());
            self.decided.insert(key, decided);
        }
        self.verify_more(queue)
    }

    /// What a block is whose last record may or may not have reached the disk (step 5).
    fn decide(&mut self, key: (u32, u32), content: Option<Buf>) -> Decided {
        let candidate = &self.candidates[&key];
        let shard = self.tables.shard(candidate.shard_ix).expect("candidates have a shard");
        let family = self.tables.layers[key.0 as usize].as_ref().expect("and a layer").family;
        let mask = tag_mask(family, shard.replica.shard.index, key.1, candidate.physical);
        let found = content.map(|bytes| crc32c(&bytes) ^ mask);
        let keep = Decided { state: BlockState::Data, tag: candidate.tag };
        if found == Some(candidate.tag) {
            return keep;
        }
        if let Some(payload) = &candidate.payload {
            self.placements.push((key, payload.clone()));
            self.report.placed_blocks += 1;
            return keep;
        }
        // Committed: every in-sync replica had it in place, this one included.
        let committed = candidate.lsn.seq > Seq(0) && candidate.lsn.seq <= shard.commit;
        // A block that cannot be read may hold an acknowledged write: no older content may replace
        // it.
        if !committed && found.is_some() {
            if candidate.before != BlockState::Data {
                self.report.restored_blocks += 1;
                return Decided { state: candidate.before, tag: 0 };
            }
            if let Some(tag) = candidate.before_tag.filter(|&tag| found == Some(tag)) {
                self.report.restored_blocks += 1;
                return Decided { state: BlockState::Data, tag };
            }
        }
        self.report.poisoned_blocks += 1;
        self.report.damaged_blocks += u64::from(committed);
        Decided { state: BlockState::Poison, tag: 0 }
    }

    fn place(&mut self) -> Result<MountStep, Fault> {
        if self.placements.is_empty() {
            return self.finish();
        }
        let mut batch: Vec<DiskOp> = Vec::with_capacity(self.placements.len() + 1);
        for (key, data) in &self.placements {
            let offset = self.offset(self.candidates[key].physical);
            batch.push(DiskOp::Write { offset, data: proto::block::single(data.clone()) });
        }
        if self.parameters.durability == Durability::Volatile {
            batch.push(DiskOp::Flush);
        }
        self.phase = Some(Phase::Place);
        Ok(MountStep::Io(batch))
    }

    /// A payload that its slot does not take stays journaled and undecided: the lane writes it
    /// anew.
    fn placed(&mut self, results: &[MountResult]) -> Result<MountStep, Fault> {
        let what = "place of a journaled write";
        let placements = std::mem::take(&mut self.placements);
        if let Some(Err(error)) = results.get(placements.len()) {
            return Err(Fault::Io { what, error: *error });
        }
        for ((key, payload), result) in placements.into_iter().zip(results) {
            let Err(error) = result else { continue };
            self.decided.remove(&key);
            self.report.placed_blocks -= 1;
            let Candidate { number, shard_ix, lsn, flags, tag, .. } = self.candidates[&key];
            let (layer, block) = key;
            let found = Unplaced { number, shard_ix, layer, block, lsn, flags, tag, payload };
            let follows = |last: &Unplaced| last.number == number && last.block + 1 == block;
            match self.unplaced.last_mut() {
                Some(run) if run.last().is_some_and(follows) => run.push(found),
                _ => self.unplaced.push(vec![found]),
            }
            self.place_error = Some(*error);
        }
        self.finish()
    }

    // ------------------------------------------------------------------------------- the result --

    fn finish(&mut self) -> Result<MountStep, Fault> {
        let mut resolved = self.resolve_records();
        for record in &resolved {
            self.tables
                .apply(record)
                .map_err(|problem| Fault::Contradiction(problem.to_string()))?;
        }
        let mutant = self.parameters.mutant;
        if mutant.is(Mutant::ResolveWithoutSuspect) {
            self.clear_suspects(&resolved);
        }
        if mutant.is(Mutant::NoResolve) {
            resolved.clear();
        }
        self.tables.replaying = false;
        self.tables.count_slots();
        let superblock = self.superblock.take().expect("read first");
        let metadata_slots = metadata_slots(self.runs.values(), superblock.manifest);
        let allocator = self.rebuild_allocator(&superblock, &metadata_slots)?;
        let nonce = if mutant.is(Mutant::NoNonce) {
            0
        } else if mutant.is(Mutant::NonceSequential) {
            self.walk.last_nonce + 1
        } else {
            self.parameters.nonce
        };
        let start = JournalStart {
            replay: superblock.replay,
            next: self.walk.next,
            last_record: self.walk.last_record,
            stable_record: self.walk.stable,
            nonce,
        };
        let uuid: Uuid = self.geometry.uuid;
        let mut journal =
            Journal::new(uuid, self.geometry.ring_pages, start, &self.walk.frames, mutant);
        self.reopen(&mut journal, &resolved)?;
        let incarnation = self.parameters.incarnation;
        let empty = Tables::new(self.geometry.slots, self.geometry.tag_pages);
        Ok(MountStep::Mounted(Box::new(Mounted {
            geometry: self.geometry.clone(),
            durability: self.parameters.durability,
            atomic_bytes: self.parameters.atomic_bytes,
            mutant,
            merge_always: self.parameters.merge_always,
            tables: std::mem::replace(&mut self.tables, empty),
            allocator,
            journal,
            runs: std::mem::take(&mut self.runs),
            manifest: superblock.manifest,
            metadata_slots,
            version: superblock.version,
            mount: Record::of_lane(Body::Mount { nonce, incarnation }),
            resolved,
            unplaced: std::mem::take(&mut self.unplaced),
            report: self.report,
        })))
    }

    /// Records of unplaced payloads wait for `done` again; the ring must have room for their moves.
    fn reopen(&self, journal: &mut Journal, resolved: &[Record]) -> Result<(), Fault> {
        let Some(error) = self.place_error else { return Ok(()) };
        let mut times: BTreeMap<u64, u32> = BTreeMap::new();
        for run in &self.unplaced {
            *times.entry(run[0].number).or_default() += 1;
        }
        journal.reopen(&times);
        // A move is two records; a run lies in two slots at most.
        let moves = (0..self.unplaced.len() * 2).flat_map(|_| records_of_a_move());
        let all: Vec<Record> = resolved.iter().cloned().chain(moves).collect();
        if journal.has_room_for(&all) {
            Ok(())
        } else {
            Err(Fault::Io { what: "place of a journaled write", error })
        }
    }

    /// The decisions as RESOLVE records, one per stretch of blocks of one shard.
    fn resolve_records(&mut self) -> Vec<Record> {
        let mut records: Vec<Record> = Vec::new();
        let decided = std::mem::take(&mut self.decided);
        let mut open: Option<(u32, u32, ResolvePart)> = None;
        for ((layer, block), decided) in decided {
            let shard_ix = self.candidates[&(layer, block)].shard_ix;
            let joins = open.as_ref().is_some_and(|(open_shard, next, part)| {
                *open_shard == shard_ix
                    && part.layer == layer
                    && *next == block
                    && !block.is_multiple_of(EXTENT_BLOCKS)
                    && part.decided.len() < RESOLVE_BLOCKS_MAX as usize
            });
            if !joins {
                records.extend(open.take().map(|open| self.resolve_record(open)));
                let part = ResolvePart {
                    layer,
                    extent: block / EXTENT_BLOCKS,
                    first: block % EXTENT_BLOCKS,
                    slots: Default::default(),
                    decided: Vec::new(),
                };
                open = Some((shard_ix, block, part));
            }
            let (_, next, part) = open.as_mut().expect("just opened");
            part.decided.push(decided);
            *next = block + 1;
        }
        records.extend(open.take().map(|open| self.resolve_record(open)));
        records
    }

    fn resolve_record(&self, (shard_ix, _, mut part): (u32, u32, ResolvePart)) -> Record {
        let extent = self.tables.extent(part.layer, part.extent).expect("a candidate's extent");
        part.slots = positions(part.first, part.decided.len() as u32)
            .map(|position| extent.slot(position))
            .collect();
        Record { flags: FLAG_LAST_PART, shard_ix, ..Record::of_lane(Body::Resolve(part)) }
    }

    /// Seeded bug: regions with decided blocks are not marked as suspect.
    fn clear_suspects(&mut self, resolved: &[Record]) {
        for record in resolved {
            let ix = record.shard_ix as usize;
            let shard = self.tables.shards[ix].as_mut().expect("resolved blocks have a shard");
            shard.regions.iter_mut().for_each(|value| *value &= !1);
        }
    }

    fn rebuild_allocator(
        &self,
        superblock: &Superblock,
        metadata_slots: &BTreeSet<u32>,
    ) -> Result<Allocator, Fault> {
        let extents = || self.tables.layers.iter().flatten().flat_map(|layer| &layer.extents);
        let mapped = || extents().flat_map(|extent| extent.slots().map(|(_, slot)| slot));
        let bad = self.tables.bad_slots.iter().copied();
        let highest = mapped().chain(metadata_slots.iter().copied()).chain(bad).max();
        let highest = highest.map_or(0, |slot| slot + 1);
        if highest > self.geometry.slots {
            return Err(Fault::Map(format!("slot {} is outside the lane", highest - 1)));
        }
        // The superblock's value may be older than what was handed out since.
        let limit = superblock.materialised.max(highest);
        let mut allocator = Allocator::new(self.geometry.slots, limit);
        for &slot in metadata_slots {
            allocator.claim(slot, true).map_err(|problem| Fault::Map(problem.to_string()))?;
        }
        for slot in mapped() {
            allocator.claim(slot, false).map_err(|problem| Fault::Map(problem.to_string()))?;
        }
        for &slot in &self.tables.bad_slots {
            // A bad slot that the map still names is retired when it is freed.
            if !allocator.is_used(slot) {
                allocator.retire(slot).map_err(|problem| Fault::Map(problem.to_string()))?;
            }
        }
        Ok(allocator)
    }
}

fn read_page(offset: u64) -> DiskOp {
    DiskOp::Read { offset, len: BLOCK_BYTES as u32 }
}

fn data(result: MountResult, what: &'static str) -> Result<Buf, Fault> {
    match result {
        Ok(bytes) => Ok(bytes.expect("a read brings data")),
        Err(error) => Err(Fault::Io { what, error }),
    }
}
