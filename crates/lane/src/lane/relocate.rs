//! The way out for a write whose slot is bad and whose replica is the only one (R8).
//!
//! With other in-sync replicas a failed data write is their affair: this replica leaves. Alone, the
//! lane tries one other slot. The whole position moves, sixteen blocks, because a position has one
//! slot: what the failed writes bring comes from their buffers, the rest is read from the old slot
//! and verified like any read. Nothing refers to the new slot before all of it is durable there;
//! then BADSLOT (the old slot is never used again) and RESOLVE (the position is here now, with
//! these states and tags) are logged, and with them durable the writes take effect and are answered.
//! A crash before that leaves what any unfinished write leaves.
//!
//! No data operation starts in the lane meanwhile, and the move waits for those that run: then
//! neither map nor tags of the position can change under it. That pauses all writers of the lane for
//! a few device writes, in a case that is rare; reads go on, for nobody writes to the old slot again.
//! If the second slot fails too, or something in the old one cannot be read, or no slot is free, the
//! old slot keeps what it has, nothing is called bad, and the write is an error (RESOLVE, SUSPECT).
//! A REDO write was acknowledged before it was placed: for it that is the end of the lane.
//!
//! Recovery meets the same fault when it cannot place a journaled payload. It leaves the block
//! undecided, lets the record count as not in place, and hands both to the lane, which tries once
//! more under the range lock; when that fails too, the payload's position moves as for any other
//! write.

use super::read::Reading;
use super::write::{Mode, Part, Plan, slice_list};
use super::{Io, Kind, Lane, RELOCATION};
use crate::format::physical_block;
use crate::locks::OpIx;
use crate::map::BlockState;
use crate::mutant::Mutant;
use crate::record::{Body, DataPart, Decided, Record, ResolvePart, positions};
use crate::{EXTENT_BLOCKS, SLOT_BLOCKS};
use proto::checksum::{crc32c, tag_mask};
use proto::disk::{BufList, DiskOp};
use proto::{BLOCK_BYTES, Buf, Lsn};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet};

/// Times that an old slot is read before its failure is believed: a device's error may pass.
const READ_TRIES: u32 = 5;

/// A journaled payload of one block that could not be placed.
#[derive(Clone, Debug)]
pub(crate) struct Unplaced {
    /// Number of its record.
    pub(crate) number: u64,
    pub(crate) shard_ix: u32,
    pub(crate) layer: u32,
    pub(crate) block: u32,
    pub(crate) lsn: Lsn,
    pub(crate) flags: u8,
    pub(crate) tag: u32,
    pub(crate) payload: Buf,
}

/// A position of an extent: layer, extent, position.
type Place = (u32, u32, u32);

/// What one part of an operation is called.
type PartName = (OpIx, u32);

/// The lane's moves: one group of parts at a time.
#[derive(Default)]
pub(crate) struct Relocation {
    /// Parts whose data write has failed, with their record durable and no operation of theirs
    /// outstanding.
    waiting: Vec<PartName>,
    group: Option<Group>,
}

impl Relocation {
    /// Whether a failed write is to be decided.
    pub(super) fn is_active(&self) -> bool {
        !self.waiting.is_empty() || self.group.is_some()
    }

    /// A part has failed and cannot go on by itself.
    pub(super) fn await_turn(&mut self, op: OpIx, part: u32) {
        self.waiting.push((op, part));
    }

    fn group(&mut self) -> &mut Group {
        self.group.as_mut().expect("a group is moved")
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Reading,
    Writing,
    Logging,
}

/// Failed parts that share positions, and the slots that are moved for them.
struct Group {
    phase: Phase,
    parts: Vec<PartName>,
    moves: Vec<Move>,
    /// Reads of old slots.
    reads: BTreeMap<OpIx, Wanted>,
    /// Operations outstanding.
    left: u32,
    is_given_up: bool,
    /// What was logged, oldest first.
    logged: Vec<(u64, Record)>,
}

/// Blocks of an old slot that are being read.
#[derive(Clone, Copy)]
struct Wanted {
    /// Which move it is for.
    index: usize,
    /// First block in the slot.
    first: u32,
    count: u32,
    tries: u32,
}

/// One slot on its way to another.
struct Move {
    shard_ix: u32,
    place: Place,
    from: u32,
    to: u32,
    /// Blocks of the slot that hold data: bytes and plain CRC.
    content: BTreeMap<u32, (BufList, u32)>,
}

impl Lane {
    /// Place adjacent blocks of one journal record that recovery could not place.
    pub(super) fn place_again(&mut self, blocks: &[Unplaced]) {
        let Unplaced { number, shard_ix, layer, block: first, lsn, flags, .. } = blocks[0];
        let shard = self.tables.shard(shard_ix).expect("recovered blocks have a shard");
        assert_eq!(shard.head, layer, "a shard has one layer in this version");
        let (commit, count) = (shard.commit, blocks.len() as u32);
        let crcs: SmallVec<[u32; 4]> = blocks.iter().map(|block| crc32c(&block.payload)).collect();
        let data: BufList = blocks.iter().map(|block| block.payload.clone()).collect();
        let (extent, in_extent) = (first / EXTENT_BLOCKS, first % EXTENT_BLOCKS);
        let kind = Kind::Write {
            plan: Some(Plan::of_journaled(layer, first, count)),
            parts: Vec::new(),
            payload: BufList::new(),
            crcs,
            solo: true,
            is_granted: true,
        };
        let ix = self.new_op(None, shard_ix, first..first + count, kind);
        let slots = positions(in_extent, count)
            .map(|position| self.pin_slot(ix, layer, extent, position))
            .collect();
        let tags = blocks.iter().map(|block| block.tag).collect();
        let body = Body::Redo(DataPart { layer, extent, first: in_extent, slots, tags });
        let op = self.op_mut(ix);
        (op.lsn, op.commit, op.flags) = (lsn, commit, flags);
        (op.open_parts, op.locked) = (1, true);
        let record = Record { flags, shard_ix, lsn, commit, body };
        let Kind::Write { parts, .. } = &mut op.kind else { unreachable!("a write") };
        parts.push(Part::journaled(number, record, data));
        let locks = self.locks.entry(shard_ix).or_default();
        let is_first = locks.acquire(ix, first..first + count, true);
        assert!(is_first, "one record is the last of a block");
        locks.placing(ix, &mut Vec::new());
        self.placing.entry(shard_ix).or_default().push(ix);
        self.data_running += 1;
        self.write_data(ix, 0);
    }

    /// Begin to move slots, once every data operation that runs is over or has failed itself.
    pub(super) fn relocate_if_due(&mut self) {
        while self.failed.is_none()
            && self.relocation.group.is_none()
            && !self.relocation.waiting.is_empty()
            && self.parts_under_way() == self.relocation.waiting.len()
        {
            self.begin_group();
        }
    }

    /// Parts of data operations that are logged and not over.
    fn parts_under_way(&self) -> usize {
        let logged = self.ops.iter().flatten().map(|op| match &op.kind {
            Kind::Write { plan, parts, .. } => {
                let pieces = plan.as_ref().map_or(0, |plan| plan.parts());
                op.open_parts as usize - (pieces - parts.len())
            }
            Kind::Range { .. } => op.open_parts as usize,
            Kind::Read(_) | Kind::Control(_) => 0,
        });
        logged.sum()
    }

    /// Take the first failed part and all that share a position to be moved with it.
    fn begin_group(&mut self) {
        let mut parts = vec![self.relocation.waiting.remove(0)];
        let mut places = BTreeSet::new();
        let mut at = 0;
        while let Some(&name) = parts.get(at) {
            places.extend(self.bad_places(name));
            at += 1;
            let waiting = std::mem::take(&mut self.relocation.waiting);
            let (joining, others): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|&other| {
                places_of(self.data_part(other)).any(|place| places.contains(&place))
            });
            parts.extend(joining);
            self.relocation.waiting = others;
        }
        let count = places.len();
        // When no free slot is left, `give_up` gives back the slots that were picked until then.
        let moves: Vec<Move> =
            places.into_iter().map_while(|place| self.new_move(&parts, place)).collect();
        let is_given_up = moves.len() < count;
        let (reads, logged) = (BTreeMap::new(), Vec::new());
        let phase = Phase::Reading;
        let group = Group { phase, parts, moves, reads, left: 0, is_given_up, logged };
        self.relocation.group = Some(group);
        if is_given_up {
            self.give_up();
        } else {
            self.read_old_slots();
        }
    }

    fn data_part(&self, (op, part): PartName) -> &DataPart {
        let Kind::Write { parts, .. } = &self.op(op).kind else { unreachable!("a write") };
        parts[part as usize].data_part().expect("a data part")
    }

    fn bad_places(&self, (op, part): PartName) -> Vec<Place> {
        let Kind::Write { parts, .. } = &self.op(op).kind else { unreachable!("a write") };
        let piece = self.data_part((op, part));
        let bad = &parts[part as usize].bad;
        bad.iter().map(|&position| (piece.layer, piece.extent, position)).collect()
    }

    /// Pick the new slot of a position, and gather what the failed parts bring for it. `None`: no
    /// slot is free beside those that the next checkpoint needs.
    fn new_move(&mut self, parts: &[PartName], place: Place) -> Option<Move> {
        let mut content = BTreeMap::new();
        let mut shard_ix = 0;
        for &(op, part) in parts {
            let piece = self.data_part((op, part));
            if !places_of(piece).any(|other| other == place) {
                continue;
            }
            let first = piece.extent * EXTENT_BLOCKS + piece.first;
            let running = self.op(op);
            shard_ix = running.shard_ix;
            let Kind::Write { parts, crcs, .. } = &running.kind else { unreachable!("a write") };
            for (index, (block, _, in_slot, _)) in piece.blocks().enumerate() {
                if block / SLOT_BLOCKS == place.2 {
                    let data = &parts[part as usize].data;
                    let bytes = slice_list(data, index * BLOCK_BYTES, BLOCK_BYTES);
                    let crc = crcs[(first - running.first) as usize + index];
                    content.insert(in_slot, (bytes, crc));
                }
            }
        }
        if !self.allocator.take_credit(1, true) {
            return None;
        }
        let to = self.allocator.pick_other();
        let from = self.pins[&place].slot;
        Some(Move { shard_ix, place, from, to, content })
    }

    // --------------------------------------------------------------------------------- content --

    /// Read what else the old slots hold, past the range locks: no writer runs that could change it,
    /// and those that wait hold locks.
    fn read_old_slots(&mut self) {
        let mut wanted = Vec::new();
        for (index, moving) in self.relocation.group().moves.iter().enumerate() {
            let (layer, extent, position) = moving.place;
            let entry = self.tables.extent(layer, extent).expect("inside the shard");
            let is_wanted = |in_slot: &u32| {
                entry.state(position * SLOT_BLOCKS + in_slot) == BlockState::Data
                    && !moving.content.contains_key(in_slot)
            };
            let runs = runs((0..SLOT_BLOCKS).filter(is_wanted)).into_iter();
            wanted.extend(runs.map(|(first, count)| Wanted { index, first, count, tries: 0 }));
        }
        if wanted.is_empty() || self.mutant.is(Mutant::MoveWithoutNeighbours) {
            return self.content_complete();
        }
        self.relocation.group().left = wanted.len() as u32;
        wanted.into_iter().for_each(|wanted| self.read_old_slot(wanted));
    }

    fn read_old_slot(&mut self, wanted: Wanted) {
        let moving = &self.relocation.group().moves[wanted.index];
        let (shard_ix, (_, extent, position)) = (moving.shard_ix, moving.place);
        let first = extent * EXTENT_BLOCKS + position * SLOT_BLOCKS + wanted.first;
        let blocks = first..first + wanted.count;
        let op = self.new_op(None, shard_ix, blocks, Kind::Read(Reading::new(false)));
        self.relocation.group().reads.insert(op, wanted);
        self.start_read(op);
    }

    /// What an old slot holds was read and verified, or could not be.
    pub(super) fn moving_read(&mut self, op: OpIx, content: Option<(BufList, SmallVec<[u32; 4]>)>) {
        let group = self.relocation.group();
        let mut wanted = group.reads.remove(&op).expect("read for a move");
        match content {
            Some((data, crcs)) => {
                for (at, &crc) in crcs.iter().enumerate() {
                    let bytes = slice_list(&data, at * BLOCK_BYTES, BLOCK_BYTES);
                    let moving = &mut group.moves[wanted.index];
                    moving.content.insert(wanted.first + at as u32, (bytes, crc));
                }
            }
            None => {
                wanted.tries += 1;
                if wanted.tries < READ_TRIES {
                    return self.read_old_slot(wanted);
                }
                group.is_given_up = true;
            }
        }
        group.left -= 1;
        if group.left == 0 {
            self.content_complete();
        }
    }

    fn content_complete(&mut self) {
        if self.relocation.group().is_given_up {
            return self.give_up();
        }
        let mut writes = Vec::new();
        for moving in &self.relocation.group().moves {
            for (in_slot, count) in runs(moving.content.keys().copied()) {
                let blocks = moving.content.range(in_slot..in_slot + count);
                let data: BufList = blocks.flat_map(|(_, (bytes, _))| bytes.clone()).collect();
                writes.push((moving.to, in_slot, data));
            }
        }
        let group = self.relocation.group();
        (group.phase, group.left) = (Phase::Writing, writes.len() as u32);
        for (slot, in_slot, data) in writes {
            let offset = self.geometry.slot(slot, in_slot);
            self.submit(Io::Moved, DiskOp::Write { offset, data });
        }
        if self.mutant.is(Mutant::MoveBeforeWritten) {
            self.log_moves();
        }
    }

    /// The device did not take the new place either.
    pub(super) fn move_failed(&mut self) {
        self.counters.media_errors += 1;
        if let Some(group) = &mut self.relocation.group {
            group.is_given_up = true;
        }
        self.move_step_over();
    }

    /// A write to a new slot is over: durable, or failed.
    pub(super) fn move_step_over(&mut self) {
        if self.mutant.is(Mutant::MoveBeforeWritten) {
            return;
        }
        let group = self.relocation.group();
        assert!(group.phase == Phase::Writing, "nothing else is written for a move");
        group.left -= 1;
        if group.left > 0 {
            return;
        }
        if group.is_given_up {
            self.give_up();
        } else {
            self.log_moves();
        }
    }

    // --------------------------------------------------------------------------------- outcome --

    fn log_moves(&mut self) {
        let mut group = self.relocation.group.take().expect("a group is moved");
        group.phase = Phase::Logging;
        let records: Vec<Record> = group
            .moves
            .iter()
            .flat_map(|moving| {
                let bad = Record::of_lane(Body::BadSlot { slot: moving.from });
                [bad, self.resolve_of(&group.parts, moving)]
            })
            .collect();
        for record in records {
            let number = self.journal.append(&record, std::iter::empty(), RELOCATION);
            group.logged.push((number, record));
        }
        self.journal.hurry();
        self.relocation.group = Some(group);
    }

    /// The position in its new slot, as one after-image.
    fn resolve_of(&self, parts: &[PartName], moving: &Move) -> Record {
        let (layer, extent, position) = moving.place;
        let entry = self.tables.extent(layer, extent).expect("inside the shard");
        let shard = self.tables.shard(moving.shard_ix).expect("its operations hold locks");
        let shard_index = shard.replica.shard.index;
        let family = self.tables.layers[layer as usize].as_ref().expect("head layer").family;
        let first = position * SLOT_BLOCKS;
        let decided = (0..SLOT_BLOCKS)
            .map(|in_slot| match moving.content.get(&in_slot) {
                Some((_, crc)) => {
                    let block = extent * EXTENT_BLOCKS + first + in_slot;
                    let physical = physical_block(moving.to, in_slot);
                    let tag = crc ^ tag_mask(family, shard_index, block, physical);
                    Decided { state: BlockState::Data, tag }
                }
                None => Decided { state: entry.state(first + in_slot), tag: 0 },
            })
            .collect();
        let slots = SmallVec::from_elem(Some(moving.to), 1);
        let body = Body::Resolve(ResolvePart { layer, extent, first, slots, decided });
        self.record_of(parts[0].0, body, true)
    }

    /// A record of the group is durable; with the last one the writes take effect.
    pub(super) fn moves_durable(&mut self, number: u64) {
        let group = self.relocation.group();
        if group.logged.last().is_some_and(|&(last, _)| last != number) {
            return;
        }
        let group = self.relocation.group.take().expect("looked at above");
        let mut parts = group.parts;
        parts.sort_by_key(|&(op, part)| self.op_mut(op).part_mut(part).number);
        for &(op, part) in &parts {
            self.part_effect(op, part);
        }
        for moving in &group.moves {
            self.pins.get_mut(&moving.place).expect("its parts pin it").slot = moving.to;
            self.pinned_slots.remove(&moving.from);
            self.pinned_slots.insert(moving.to);
        }
        for (number, record) in &group.logged {
            self.apply(record);
            self.journal.done(*number);
        }
        self.counters.slots_relocated += group.moves.len() as u64;
        for (op, part) in parts {
            self.part_over(op, part);
        }
    }

    /// There is no way out: the old slots keep what they hold, the writes are errors.
    fn give_up(&mut self) {
        let group = self.relocation.group.take().expect("a group is moved");
        for moving in &group.moves {
            self.allocator.abandon(moving.to);
        }
        self.counters.relocations_failed += group.parts.len() as u64;
        for (op, part) in group.parts {
            let entry = self.op_mut(op).part_mut(part);
            if entry.mode() == Mode::Redo {
                // It was acknowledged and its payload is in the journal: a restart places it.
                let error = entry.failed.expect("only failed parts are moved");
                return self
                    .fail(format!("a journaled write finds no slot that takes it: {error}"));
            }
            self.resolve_failed(op, part);
        }
    }
}

/// Records as long as those by which one slot is moved.
pub(crate) fn records_of_a_move() -> [Record; 2] {
    let decided = vec![Decided { state: BlockState::Data, tag: 0 }; SLOT_BLOCKS as usize];
    let slots = SmallVec::from_elem(Some(0), 1);
    let moved = ResolvePart { layer: 0, extent: 0, first: 0, slots, decided };
    [Body::BadSlot { slot: 0 }, Body::Resolve(moved)].map(Record::of_lane)
}

/// Positions that a part touches.
fn places_of(piece: &DataPart) -> impl Iterator<Item = Place> + '_ {
    positions(piece.first, piece.count()).map(|position| (piece.layer, piece.extent, position))
}

/// Ascending numbers as runs: first and length.
fn runs(numbers: impl Iterator<Item = u32>) -> Vec<(u32, u32)> {
    let mut out: Vec<(u32, u32)> = Vec::new();
    for number in numbers {
        match out.last_mut() {
            Some((first, count)) if *first + *count == number => *count += 1,
            _ => out.push((number, 1)),
        }
    }
    out
}
