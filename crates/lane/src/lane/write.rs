//! The path of writes, discards and control records through a lane.
//!
//! A write is split into *parts*, one journal record each, and its mode decides the order (R1):
//! TOUCH writes data and INTENT in parallel, because nothing points to the blocks yet; REDO carries
//! the payload in the frame, is acknowledged when that is durable and placed afterwards; INTENT
//! waits for its record before it overwrites data. The map and the tags change at completion only,
//! by applying the very record that recovery would replay.

use super::{Io, Kind, Lane, Pin, Problem, Running};
use crate::format::{Durability, physical_block};
use crate::journal::Owner;
use crate::locks::OpIx;
use crate::map::BlockState;
use crate::mutant::Mutant;
use crate::record::{
    Body, DATA_BLOCKS_MAX, DataPart, Decided, FLAG_LAST_PART, FLAG_LEARNER, RANGE_BLOCKS_MAX,
    RangeKind, Record, ResolvePart, ShardChange, positions,
};
use crate::{EXTENT_BLOCKS, SLOT_BLOCKS};
use proto::checksum::tag_mask;
use proto::disk::{BufList, DiskError, DiskOp};
use proto::{BLOCK_BYTES, Buf, ShardId};
use smallvec::SmallVec;

/// Largest overwrite that is journaled with its payload when the journal is not busy.
const REDO_BLOCKS_MAX: u32 = 4;
/// ... and on a volatile cache, where it saves a flush.
const REDO_VOLATILE_BLOCKS_MAX: u32 = 16;
/// "Not busy": fewer records waiting than this.
const REDO_WAITING_MAX: usize = 3;

/// Order of journal and data for one part.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mode {
    Touch,
    Redo,
    Intent,
    /// A record without data.
    Control,
    /// The data write failed; a RESOLVE record is on its way.
    Resolving,
}

/// How a write is cut: decided once, when it holds its lock.
pub(crate) struct Plan {
    head: u32,
    mode: Mode,
    /// First block and number of blocks of each part.
    pieces: SmallVec<[(u32, u32); 2]>,
}

/// One journal record of an operation, and the data that belongs to it.
pub(crate) struct Part {
    pub(super) record: Record,
    pub(super) number: u64,
    mode: Mode,
    journal_durable: bool,
    io_left: u32,
    pub(super) failed: Option<DiskError>,
    /// Positions of the extent whose slot could not be written.
    pub(super) bad: SmallVec<[u32; 1]>,
    /// What was decided about a part whose data write failed.
    resolve: Option<Record>,
    /// Payload of this part.
    pub(super) data: BufList,
}

impl Plan {
    /// Of a write whose only record, of these blocks, is in the journal with its payload.
    pub(super) fn of_journaled(head: u32, first: u32, count: u32) -> Plan {
        Plan { head, mode: Mode::Redo, pieces: SmallVec::from_elem((first, count), 1) }
    }

    /// Number of parts.
    pub(super) fn parts(&self) -> usize {
        self.pieces.len()
    }
}

impl Part {
    /// Its order of journal and data.
    pub(super) fn mode(&self) -> Mode {
        self.mode
    }

    /// A record without data.
    pub(super) fn control(record: Record) -> Part {
        Part {
            record,
            number: 0,
            mode: Mode::Control,
            journal_durable: false,
            io_left: 0,
            failed: None,
            bad: SmallVec::new(),
            resolve: None,
            data: BufList::new(),
        }
    }

    /// A record that is durable with its payload, and to be placed.
    pub(super) fn journaled(number: u64, record: Record, data: BufList) -> Part {
        Part { number, mode: Mode::Redo, journal_durable: true, data, ..Part::control(record) }
    }

    /// The shard that this part creates.
    pub(super) fn creates(&self) -> Option<ShardId> {
        match &self.record.body {
            Body::Shard(ShardChange::Create { replica, .. }) => Some(replica.shard),
            Body::Shard(ShardChange::Delete | ShardChange::Resize { .. })
            | Body::Intent(_)
            | Body::Redo(_)
            | Body::Range { .. }
            | Body::Resolve(_)
            | Body::Conf(_)
            | Body::Commit
            | Body::Region { .. }
            | Body::BadSlot { .. }
            | Body::Mount { .. }
            | Body::Seal
            | Body::Pad => None,
        }
    }

    pub(super) fn data_part(&self) -> Option<&DataPart> {
        match &self.record.body {
            Body::Intent(part) | Body::Redo(part) => Some(part),
            Body::Range { .. }
            | Body::Resolve(_)
            | Body::Conf(_)
            | Body::Commit
            | Body::Region { .. }
            | Body::Shard(_)
            | Body::BadSlot { .. }
            | Body::Mount { .. }
            | Body::Seal
            | Body::Pad => None,
        }
    }
}

impl Running {
    fn parts_mut(&mut self) -> &mut [Part] {
        match &mut self.kind {
            Kind::Write { parts, .. } | Kind::Range { parts, .. } => parts,
            Kind::Control(part) => std::slice::from_mut(part),
            Kind::Read(_) => &mut [],
        }
    }

    pub(super) fn part_mut(&mut self, part: u32) -> &mut Part {
        &mut self.parts_mut()[part as usize]
    }
}

fn owner(ix: OpIx, part: u32) -> Owner {
    u64::from(ix) << 32 | u64::from(part)
}

impl Lane {
    /// Take space credit for a new write, then its lock. Without room it fails before it has any
    /// effect; while the materialise job is at work it waits for that instead.
    pub(super) fn admit_write(&mut self, ix: OpIx) {
        let op = self.op(ix);
        let (shard_ix, first, count) = (op.shard_ix, op.first, op.count);
        if self.tables.shard(shard_ix).is_none() {
            self.op_mut(ix).problem = Some(Problem::NotFound { shard_ix });
            self.finish(ix);
            return;
        }
        let Kind::Write { is_granted, .. } = op.kind else { unreachable!("a write") };
        let needed = self.tables.slots_needed(shard_ix, first, count);
        if self.allocator.take_credit(needed, is_granted) {
            self.op_mut(ix).credit = needed;
            self.lock_and_start(ix, true);
        } else if self.allocator.space().unmaterialised > 0 && self.may_grow() {
            self.awaiting_space.push_back(ix);
        } else {
            let free = self.free_slots();
            self.op_mut(ix).problem = Some(Problem::NoSpace { needed, free });
            self.finish(ix);
        }
    }

    /// A write or discard holds its lock: log it, or what the journal has room for. False when
    /// something of it is still to be logged.
    pub(super) fn start_data(&mut self, ix: OpIx) -> bool {
        match &self.op(ix).kind {
            Kind::Write { plan, .. } => {
                if plan.is_none() {
                    self.data_running += 1;
                    self.plan_write(ix);
                }
                self.log_parts(ix)
            }
            Kind::Range { .. } => {
                // At least 40 records of 48 B share a frame.
                let pages = 1 + self.op(ix).count.div_ceil(RANGE_BLOCKS_MAX) / 40;
                if !self.journal.has_room_for_data(pages) {
                    return false;
                }
                self.data_running += 1;
                self.start_range(ix);
                true
            }
            Kind::Read(_) | Kind::Control(_) => unreachable!("only data operations stall"),
        }
    }

    pub(super) fn start_control(&mut self, ix: OpIx) {
        let op = self.ops[ix as usize].as_mut().expect("the operation runs");
        let Kind::Control(part) = &mut op.kind else { unreachable!("a control operation") };
        part.record.commit = op.commit;
        part.number = self.journal.append(&part.record, std::iter::empty(), owner(ix, 0));
        (op.open_parts, op.undurable_parts) = (1, 1);
    }

    fn start_range(&mut self, ix: OpIx) {
        let op = self.op(ix);
        let Kind::Range { range, .. } = op.kind else { unreachable!("takes data from blocks") };
        let layer = self.tables.shard(op.shard_ix).expect("checked by start").head;
        let (mut first, end) = (op.first, op.first + op.count);
        let mut records = Vec::new();
        while first < end {
            let count = RANGE_BLOCKS_MAX.min(end - first);
            let body = Body::Range { layer, kind: range, first, count };
            records.push(self.record_of(ix, body, first + count == end));
            first += count;
        }
        if self.mutant.is(Mutant::EarlyReuse) {
            self.free_early(layer, ix);
        }
        let mut parts = Vec::with_capacity(records.len());
        for (index, record) in records.into_iter().enumerate() {
            let number = self.journal.append(&record, std::iter::empty(), owner(ix, index as u32));
            parts.push(Part { number, ..Part::control(record) });
        }
        let op = self.op_mut(ix);
        (op.open_parts, op.undurable_parts) = (parts.len() as u32, parts.len() as u32);
        op.kind = Kind::Range { range, parts };
    }

    /// Seeded bug: slots become reusable before their free is durable.
    fn free_early(&mut self, layer: u32, ix: OpIx) {
        let (first, count) = (self.op(ix).first, self.op(ix).count);
        let mut record =
            Record::of_lane(Body::Range { layer, kind: RangeKind::Inherit, first, count });
        record.shard_ix = self.op(ix).shard_ix;
        self.apply(&record);
    }

    pub(super) fn record_of(&self, ix: OpIx, body: Body, last: bool) -> Record {
        let op = self.op(ix);
        // A learner's flag is what keeps its live writes from raising region lsns.
        let dropped = if self.mutant.is(Mutant::LearnerRaisesRegion) { FLAG_LEARNER } else { 0 };
        let flags = (op.flags & !dropped) | if last { FLAG_LAST_PART } else { 0 };
        Record { flags, shard_ix: op.shard_ix, lsn: op.lsn, commit: op.commit, body }
    }

    fn choose_mode(&self, ix: OpIx, head: u32) -> Mode {
        let op = self.op(ix);
        let Kind::Write { solo, .. } = &op.kind else { unreachable!("a write") };
        let overwrites = (op.first..op.first + op.count).any(|block| {
            self.tables
                .extent(head, block / EXTENT_BLOCKS)
                .is_some_and(|extent| extent.state(block % EXTENT_BLOCKS) == BlockState::Data)
        });
        let small = op.count <= REDO_BLOCKS_MAX && self.journal.waiting() < REDO_WAITING_MAX;
        let saves_flush =
            self.durability == Durability::Volatile && op.count <= REDO_VOLATILE_BLOCKS_MAX;
        let tearable = *solo && self.atomic_bytes < BLOCK_BYTES as u32;
        if !overwrites {
            Mode::Touch
        } else if self.mutant.is(Mutant::ParallelOverwrite) {
            // Seeded bug: data over data in parallel with its record.
            Mode::Touch
        } else if small || saves_flush || tearable {
            Mode::Redo
        } else {
            Mode::Intent
        }
    }

    /// Decide mode and parts of a write, then log as many parts as the journal has room for.
    fn plan_write(&mut self, ix: OpIx) {
        let op = self.op(ix);
        let (shard_ix, first, end) = (op.shard_ix, op.first, op.first + op.count);
        let head = self.tables.shard(shard_ix).expect("checked by start").head;
        let mode = self.choose_mode(ix, head);
        match mode {
            Mode::Touch => self.counters.touches += 1,
            Mode::Redo => {
                self.counters.redos += 1;
                self.placing.entry(shard_ix).or_default().push(ix);
            }
            Mode::Intent => self.counters.intents += 1,
            Mode::Control | Mode::Resolving => unreachable!("not a mode of a write"),
        }
        let most = if mode == Mode::Redo { self.journal.payload_max() } else { DATA_BLOCKS_MAX };
        let mut pieces: SmallVec<[(u32, u32); 2]> = SmallVec::new();
        let mut block = first;
        while block < end {
            let count = most.min(end - block).min(EXTENT_BLOCKS - block % EXTENT_BLOCKS);
            pieces.push((block, count));
            block += count;
        }
        let op = self.op_mut(ix);
        (op.open_parts, op.undurable_parts) = (pieces.len() as u32, pieces.len() as u32);
        let Kind::Write { plan, .. } = &mut op.kind else { unreachable!("a write") };
        *plan = Some(Plan { head, mode, pieces });
    }

    /// Log the parts of a write that are not logged yet. False when the journal has no room: what
    /// is queued must always fit without waiting for a checkpoint, because a RESOLVE behind it may
    /// be what the checkpoint waits for.
    fn log_parts(&mut self, ix: OpIx) -> bool {
        loop {
            let Kind::Write { plan, parts, .. } = &self.op(ix).kind else {
                unreachable!("a write")
            };
            let plan = plan.as_ref().expect("planned first");
            let index = parts.len();
            let (head, mode) = (plan.head, plan.mode);
            let Some(&piece) = plan.pieces.get(index) else { break };
            let pages = if mode == Mode::Redo { piece.1 + 1 } else { 1 };
            if !self.journal.has_room_for_data(pages) {
                return false;
            }
            let part = self.log_part(ix, head, mode, piece, index as u32);
            let op = self.op_mut(ix);
            let Kind::Write { parts, .. } = &mut op.kind else { unreachable!("a write") };
            parts.push(part);
            if mode == Mode::Touch {
                self.write_data(ix, index as u32);
            }
        }
        let Kind::Write { payload, .. } = &mut self.op_mut(ix).kind else {
            unreachable!("a write")
        };
        payload.clear();
        true
    }

    /// Pick slots for one part, make its record and queue it.
    fn log_part(
        &mut self,
        ix: OpIx,
        layer: u32,
        mode: Mode,
        (block, count): (u32, u32),
        index: u32,
    ) -> Part {
        let (extent, in_extent) = (block / EXTENT_BLOCKS, block % EXTENT_BLOCKS);
        let slots: SmallVec<[u32; 2]> = positions(in_extent, count)
            .map(|position| self.pin_slot(ix, layer, extent, position))
            .collect();
        let shard = self.tables.shard(self.op(ix).shard_ix).expect("checked by start");
        let shard_index = shard.replica.shard.index;
        let family = self.tables.layers[layer as usize].as_ref().expect("head layer").family;
        let op = self.op(ix);
        let Kind::Write { payload, crcs, .. } = &op.kind else { unreachable!("a write") };
        let at = (block - op.first) as usize;
        let crcs = &crcs[at..at + count as usize];
        let data = slice_list(payload, at * BLOCK_BYTES, count as usize * BLOCK_BYTES);
        let first_position = in_extent / SLOT_BLOCKS;
        let tags = crcs
            .iter()
            .enumerate()
            .map(|(index, crc)| {
                let in_extent = in_extent + index as u32;
                let slot = slots[(in_extent / SLOT_BLOCKS - first_position) as usize];
                let physical = physical_block(slot, in_extent % SLOT_BLOCKS);
                crc ^ tag_mask(family, shard_index, block + index as u32, physical)
            })
            .collect();
        let piece = DataPart { layer, extent, first: in_extent, slots, tags };
        let body = if mode == Mode::Redo { Body::Redo(piece) } else { Body::Intent(piece) };
        let record = self.record_of(ix, body, block + count == op.first + op.count);
        let blocks: SmallVec<[(Buf, u32); 4]> = if mode == Mode::Redo {
            let buffers = (0..count as usize)
                .map(|index| slice_list(&data, index * BLOCK_BYTES, BLOCK_BYTES).remove(0));
            buffers.zip(crcs.iter().copied()).collect()
        } else {
            SmallVec::new()
        };
        let number = self.journal.append(&record, blocks.into_iter(), owner(ix, index));
        Part { number, mode, data, ..Part::control(record) }
    }

    /// The slot of a position: of the map, of a write in flight that was first (R5), or a new one.
    pub(super) fn pin_slot(&mut self, ix: OpIx, layer: u32, extent: u32, position: u32) -> u32 {
        if let Some(pin) = self.pins.get_mut(&(layer, extent, position)) {
            pin.users += 1;
            return pin.slot;
        }
        let entry = self.tables.extent(layer, extent).expect("inside the shard");
        let slot = match entry.slot(position) {
            Some(slot) => slot,
            None => {
                let base = entry.natural_base();
                let op = self.ops[ix as usize].as_mut().expect("the operation runs");
                // The map had a slot here when the credit was counted; it was freed since.
                if op.credit > 0 {
                    op.credit -= 1;
                } else if !self.allocator.take_credit_from_reserve() {
                    self.fail("the metadata reserve is exhausted".into());
                    return 0;
                }
                self.allocator.pick(base, position)
            }
        };
        self.pins.insert((layer, extent, position), Pin { slot, users: 1 });
        self.pinned_slots.insert(slot);
        slot
    }

    /// Write a part's payload in place, one operation per stretch of adjacent slots.
    pub(super) fn write_data(&mut self, ix: OpIx, part: u32) {
        let (piece, data) = {
            let part = self.op_mut(ix).part_mut(part);
            (part.data_part().expect("a data part").clone(), part.data.clone())
        };
        let stretches = stretches(&piece);
        self.op_mut(ix).part_mut(part).io_left = stretches.len() as u32;
        let mut at = 0;
        for (slot, in_slot, count) in stretches {
            self.write_stretch((ix, part), &data, (slot, in_slot), (at, count));
            at += count;
        }
    }

    /// Write `count` blocks of a part, the first of which is its block `at`, to adjacent places.
    fn write_stretch(
        &mut self,
        (op, part): (OpIx, u32),
        data: &BufList,
        (slot, in_slot): (u32, u32),
        (at, count): (u32, u32),
    ) {
        let offset = self.geometry.slot(slot, in_slot);
        let data = slice_list(data, at as usize * BLOCK_BYTES, count as usize * BLOCK_BYTES);
        self.submit(Io::Data { op, part, at, count }, DiskOp::Write { offset, data });
    }

    /// The record of a part is durable by prefix.
    pub(super) fn part_durable(&mut self, ix: OpIx, part: u32, record: u64) {
        let entry = self.op_mut(ix).part_mut(part);
        if entry.mode == Mode::Resolving {
            if record == entry.number {
                return;
            }
            self.resolved(ix, part, record);
            return;
        }
        entry.journal_durable = true;
        match entry.mode {
            Mode::Touch if entry.io_left == 0 && entry.failed.is_some() => {
                self.relocation.await_turn(ix, part);
            }
            Mode::Touch if entry.io_left == 0 => self.part_complete(ix, part),
            Mode::Touch => {}
            Mode::Intent => self.write_data(ix, part),
            Mode::Control => self.part_complete(ix, part),
            Mode::Redo => {
                if self.mutant.is(Mutant::StableBeforePlaced) {
                    self.journal.done(record);
                }
                let op = self.op_mut(ix);
                op.undurable_parts -= 1;
                if op.undurable_parts == 0 {
                    self.acknowledge_redo(ix);
                }
                self.write_data(ix, part);
            }
            Mode::Resolving => unreachable!("handled above"),
        }
    }

    /// All frames of a REDO write are durable: it is done for its caller, and readers may pass.
    fn acknowledge_redo(&mut self, ix: OpIx) {
        let op = self.op_mut(ix);
        let (token, shard_ix) = (op.token.take(), op.shard_ix);
        let records: SmallVec<[Record; 2]> =
            op.parts_mut().iter().map(|part| part.record.clone()).collect();
        for record in records {
            if let Err(problem) = self.tables.announce(&record) {
                return self.fail(problem.to_string());
            }
        }
        if let Some(token) = token {
            self.out.replies.push(super::Reply { token, result: Ok(super::Outcome::Done) });
        }
        let mut ready = Vec::new();
        self.locks.get_mut(&shard_ix).expect("the writer holds it").placing(ix, &mut ready);
        ready.into_iter().for_each(|ix| self.start(ix));
    }

    /// A data write is durable.
    pub(super) fn data_settled(&mut self, ix: OpIx, part: u32) {
        let entry = self.op_mut(ix).part_mut(part);
        entry.io_left -= 1;
        self.data_progress(ix, part);
    }

    /// A data write failed: its blocks hold neither the old nor the new content for certain.
    pub(super) fn data_failed(
        &mut self,
        (ix, part): (OpIx, u32),
        (at, count): (u32, u32),
        error: DiskError,
    ) {
        self.counters.media_errors += 1;
        let is_solo = self.is_solo(ix);
        if is_solo && self.write_slot_by_slot((ix, part), (at, count)) {
            return;
        }
        let entry = self.op_mut(ix).part_mut(part);
        entry.io_left -= 1;
        entry.failed = Some(error);
        if is_solo {
            let first = entry.data_part().expect("a data part").first;
            entry.bad.push((first + at) / SLOT_BLOCKS);
        } else if entry.mode == Mode::Redo {
            // It was acknowledged and its payload is in the journal: a restart places it.
            self.fail(format!("placing a journaled write failed: {error}"));
            return;
        }
        self.data_progress(ix, part);
    }

    /// Nobody else has the content: a failed write over several slots is tried again slot by slot,
    /// to learn which of them is bad. False when it was of one slot.
    fn write_slot_by_slot(&mut self, (ix, part): (OpIx, u32), (at, count): (u32, u32)) -> bool {
        let entry = self.op_mut(ix).part_mut(part);
        let piece = entry.data_part().expect("a data part").clone();
        let touched = positions(piece.first + at, count);
        if touched.end - touched.start == 1 {
            return false;
        }
        entry.io_left += touched.end - touched.start - 1;
        let (data, end) = (entry.data.clone(), piece.first + at + count);
        for position in touched {
            let first = (position * SLOT_BLOCKS).max(piece.first + at);
            let blocks = ((position + 1) * SLOT_BLOCKS).min(end) - first;
            let slot = piece.slots[(position - piece.first / SLOT_BLOCKS) as usize];
            let place = (slot, first % SLOT_BLOCKS);
            self.write_stretch((ix, part), &data, place, (first - piece.first, blocks));
        }
        true
    }

    pub(super) fn is_solo(&self, ix: OpIx) -> bool {
        matches!(self.op(ix).kind, Kind::Write { solo: true, .. })
    }

    fn data_progress(&mut self, ix: OpIx, part: u32) {
        let entry = self.op_mut(ix).part_mut(part);
        if entry.io_left > 0 {
            return;
        }
        let (has_failed, is_durable) = (entry.failed.is_some(), entry.journal_durable);
        if has_failed && self.is_solo(ix) {
            // A record that is not durable yet comes back through `part_durable`.
            if is_durable {
                self.relocation.await_turn(ix, part);
            }
        } else if has_failed {
            self.resolve_failed(ix, part);
        } else if is_durable {
            self.part_complete(ix, part);
        }
    }

    /// The record of a part takes effect, and needs no replay any more.
    pub(super) fn part_effect(&mut self, ix: OpIx, part: u32) -> Record {
        let entry = self.op_mut(ix).part_mut(part);
        let (number, mode, record) = (entry.number, entry.mode, entry.record.clone());
        self.apply(&record);
        if !(mode == Mode::Redo && self.mutant.is(Mutant::StableBeforePlaced)) {
            self.journal.done(number);
        }
        record
    }

    /// Everything of a part is durable: its record takes effect.
    fn part_complete(&mut self, ix: OpIx, part: u32) {
        let record = self.part_effect(ix, part);
        let number = self.op_mut(ix).part_mut(part).number;
        if matches!(record.body, Body::Shard(ShardChange::Delete)) {
            self.retired.insert(record.shard_ix, number);
        }
        self.part_over(ix, part);
    }

    pub(super) fn part_over(&mut self, ix: OpIx, part: u32) {
        let piece = self.op_mut(ix).part_mut(part).data_part().cloned();
        if let Some(piece) = piece {
            self.unpin(&piece);
        }
        let op = self.op_mut(ix);
        op.open_parts -= 1;
        if op.open_parts > 0 {
            return;
        }
        let (shard_ix, is_data) =
            (op.shard_ix, matches!(op.kind, Kind::Write { .. } | Kind::Range { .. }));
        if is_data {
            self.data_running -= 1;
            if let Some(list) = self.placing.get_mut(&shard_ix) {
                list.retain(|&placing| placing != ix);
            }
        }
        self.finish(ix);
    }

    /// Apply a record to the tables and keep the allocator in step.
    pub(super) fn apply(&mut self, record: &Record) {
        let changes = match self.tables.apply(record) {
            Ok(changes) => changes,
            Err(problem) => {
                self.fail(problem.to_string());
                return;
            }
        };
        if let Some(Some(shard)) = self.tables.shards.get_mut(record.shard_ix as usize) {
            shard.used_slots += changes.claimed.len() as u32;
            shard.used_slots -= changes.freed.len() as u32;
        }
        changes.claimed.iter().for_each(|_| self.allocator.settle());
        for slot in changes.freed {
            self.free_unless_pinned(slot);
        }
        changes.released.into_iter().for_each(|base| self.allocator.release_natural(base));
        if let Body::BadSlot { slot } = record.body
            && !self.allocator.is_used(slot)
        {
            self.allocator.retire(slot).expect("it was free");
        }
    }

    /// A slot that a write in flight uses goes back to "picked": that write will claim it.
    fn free_unless_pinned(&mut self, slot: u32) {
        if self.pinned_slots.contains(&slot) {
            self.allocator.unsettle();
        } else {
            self.allocator.free(slot);
            self.retire_if_bad(slot);
        }
    }

    /// A slot that just became free must not be used again if it is bad.
    fn retire_if_bad(&mut self, slot: u32) {
        if self.tables.bad_slots.contains(&slot) {
            self.allocator.retire(slot).expect("it was just freed");
        }
    }

    fn unpin(&mut self, piece: &DataPart) {
        let first = piece.first / SLOT_BLOCKS;
        for position in first..first + piece.slots.len() as u32 {
            let key = (piece.layer, piece.extent, position);
            let pin = self.pins.get_mut(&key).expect("pinned when logged");
            pin.users -= 1;
            if pin.users > 0 {
                continue;
            }
            // The pin's slot, not the record's: the position may have moved to another slot since.
            let slot = pin.slot;
            self.pins.remove(&key);
            self.pinned_slots.remove(&slot);
            let named = self
                .tables
                .extent(piece.layer, piece.extent)
                .is_some_and(|entry| entry.slot(position) == Some(slot));
            if !named {
                self.allocator.abandon(slot);
                self.retire_if_bad(slot);
            }
        }
    }

    // ------------------------------------------------------------------------- failed data write --

    /// Decide the content of a failed part and log that (R8).
    pub(super) fn resolve_failed(&mut self, ix: OpIx, part: u32) {
        let entry = self.op_mut(ix).part_mut(part);
        let piece = entry.data_part().expect("a data part").clone();
        let error = entry.failed.expect("it failed");
        entry.mode = Mode::Resolving;
        let extent = self.tables.extent(piece.layer, piece.extent).expect("inside the shard");
        let decided = (piece.first..piece.first + piece.count())
            .map(|block| match extent.state(block) {
                // Half overwritten: neither content is certain.
                BlockState::Data | BlockState::Poison => {
                    Decided { state: BlockState::Poison, tag: 0 }
                }
                state @ (BlockState::Inherit | BlockState::Zero) => Decided { state, tag: 0 },
            })
            .collect();
        let slots =
            positions(piece.first, piece.count()).map(|position| extent.slot(position)).collect();
        let resolve = ResolvePart {
            layer: piece.layer,
            extent: piece.extent,
            first: piece.first,
            slots,
            decided,
        };
        let record = self.record_of(ix, Body::Resolve(resolve), true);
        self.journal.append(&record, std::iter::empty(), owner(ix, part));
        self.journal.hurry();
        let op = self.op_mut(ix);
        let block = piece.extent * EXTENT_BLOCKS + piece.first;
        op.problem = Some(Problem::Media { block, error });
        op.part_mut(part).resolve = Some(record);
    }

    fn resolved(&mut self, ix: OpIx, part: u32, number: u64) {
        let entry = self.op_mut(ix).part_mut(part);
        let first = entry.number;
        let record = entry.resolve.take().expect("queued when the data failed");
        self.apply(&record);
        self.journal.done(first);
        self.journal.done(number);
        self.part_over(ix, part);
    }
}

/// Adjacent physical blocks of a part: (first slot, block in it, number of blocks).
pub(super) fn stretches(piece: &DataPart) -> SmallVec<[(u32, u32, u32); 4]> {
    let mut out: SmallVec<[(u32, u32, u32); 4]> = SmallVec::new();
    let mut previous: Option<u64> = None;
    for (_, slot, in_slot, _) in piece.blocks() {
        let physical = physical_block(slot, in_slot);
        match (previous, out.last_mut()) {
            (Some(before), Some(last)) if before + 1 == physical => last.2 += 1,
            _ => out.push((slot, in_slot, 1)),
        }
        previous = Some(physical);
    }
    out
}

/// Bytes `at..at + len` of a list of buffers, sharing their pages.
pub(super) fn slice_list(list: &BufList, mut at: usize, mut len: usize) -> BufList {
    let mut out = BufList::new();
    for buf in list {
        if at >= buf.len() {
            at -= buf.len();
            continue;
        }
        let take = len.min(buf.len() - at);
        out.push(buf.slice(at..at + take));
        (at, len) = (0, len - take);
        if len == 0 {
            break;
        }
    }
    assert_eq!(len, 0, "the list is long enough");
    out
}
