//! The path of a read through a lane.
//!
//! A read holds its shared lock for its whole life, so neither map nor tags of its blocks can change
//! under it (R11 asks for a second look otherwise). It is cut into pieces: zeros, slices of the
//! buffer of a REDO write that is acknowledged but not placed, and stretches of disk. Tags that are
//! not in memory are loaded first. Every block from the disk is verified against its tag.

use super::write::slice_list;
use super::{Io, Kind, Lane, POISON_CRC, Problem};
use crate::format::physical_block;
use crate::locks::OpIx;
use crate::map::BlockState;
use crate::record::DataPart;
use crate::tags::Lookup;
use crate::{EXTENT_BLOCKS, SLOT_BLOCKS};
use proto::checksum::{crc32c, tag_mask};
use proto::disk::{BufList, DiskError, DiskOp};
use proto::{BLOCK_BYTES, Buf};
use smallvec::SmallVec;

/// Where the bytes of consecutive blocks come from.
#[derive(Debug)]
enum Source {
    Zeros,
    /// Of a write that is acknowledged and not placed yet.
    Buffer(BufList),
    /// From disk; the expected plain CRCs, and the data once it is there.
    Disk(Option<Buf>),
}

#[derive(Debug)]
struct Piece {
    /// First block in the shard.
    block: u32,
    count: u32,
    source: Source,
}

/// State of one read.
#[derive(Debug, Default)]
pub(crate) struct Reading {
    pieces: SmallVec<[Piece; 2]>,
    crcs: SmallVec<[u32; 4]>,
    io_left: u32,
    zero: Option<Buf>,
    with_poison: bool,
}

impl Reading {
    pub(super) fn new(with_poison: bool) -> Reading {
        Reading { with_poison, ..Reading::default() }
    }

    pub(super) fn into_reply(self) -> (BufList, SmallVec<[u32; 4]>) {
        let mut data = BufList::new();
        for piece in self.pieces {
            match piece.source {
                Source::Zeros => {
                    let zero = self.zero.as_ref().expect("set when the read started");
                    data.push(zero.slice(0..piece.count as usize * BLOCK_BYTES));
                }
                Source::Buffer(list) => data.extend(list),
                Source::Disk(buf) => data.push(buf.expect("every piece was read")),
            }
        }
        (data, self.crcs)
    }
}

/// What one block is, before adjacent ones are joined.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Zero,
    Placing { op: OpIx, part: u32, index: u32 },
    Disk { physical: u64 },
}

impl Lane {
    pub(super) fn start_read(&mut self, ix: OpIx) {
        let op = self.op(ix);
        let (shard_ix, first, count) = (op.shard_ix, op.first, op.count);
        let Kind::Read(Reading { with_poison, .. }) = op.kind else { unreachable!("a read") };
        let mut places: SmallVec<[Place; 4]> = SmallVec::new();
        let mut crcs: SmallVec<[u32; 4]> = SmallVec::new();
        for block in first..first + count {
            match self.locate(shard_ix, block) {
                Ok(Some((place, crc))) => {
                    places.push(place);
                    crcs.push(crc);
                }
                Ok(None) => {
                    let page = self.missing_page(shard_ix, block);
                    self.load_tag_page(page, ix);
                    return;
                }
                Err(Problem::Poisoned { .. }) if with_poison => {
                    places.push(Place::Zero);
                    crcs.push(POISON_CRC);
                }
                Err(problem) => {
                    self.suspect(shard_ix, block);
                    self.op_mut(ix).problem = Some(problem);
                    self.finish(ix);
                    return;
                }
            }
        }
        let mut reading =
            Reading { crcs, zero: Some(self.zero.clone()), ..Reading::new(with_poison) };
        let mut reads: SmallVec<[(u32, u64, u32); 4]> = SmallVec::new();
        let mut at = 0;
        while at < places.len() {
            let end = (at + 1..places.len())
                .find(|&next| !continues(places[next - 1], places[next]))
                .unwrap_or(places.len());
            let (block, blocks) = (first + at as u32, (end - at) as u32);
            let source = match places[at] {
                Place::Zero => Source::Zeros,
                Place::Placing { op, part, index } => {
                    Source::Buffer(self.placing_data(op, part, index, blocks))
                }
                Place::Disk { physical } => {
                    reads.push((reading.pieces.len() as u32, physical, blocks));
                    Source::Disk(None)
                }
            };
            reading.pieces.push(Piece { block, count: blocks, source });
            at = end;
        }
        reading.io_left = reads.len() as u32;
        self.op_mut(ix).kind = Kind::Read(reading);
        for &(piece, physical, blocks) in &reads {
            let (slot, in_slot) = (
                (physical / u64::from(SLOT_BLOCKS)) as u32,
                (physical % u64::from(SLOT_BLOCKS)) as u32,
            );
            let offset = self.geometry.slot(slot, in_slot);
            let len = blocks * BLOCK_BYTES as u32;
            self.submit(Io::Read { op: ix, piece }, DiskOp::Read { offset, len });
        }
        if reads.is_empty() {
            self.finish(ix);
        }
    }

    /// Where one block is and its plain CRC; `None` when its tag must be loaded first.
    fn locate(&self, shard_ix: u32, block: u32) -> Result<Option<(Place, u32)>, Problem> {
        let shard = self.tables.shard(shard_ix).expect("checked by start");
        for &op in self.placing.get(&shard_ix).map_or(&[][..], Vec::as_slice) {
            if let Some((part, piece, index)) = self.placed_block(op, shard.head, block) {
                let tag = piece.tags[index as usize];
                let crc = tag ^ self.mask_of(shard_ix, block, physical_of(piece, index));
                return Ok(Some((Place::Placing { op, part, index }, crc)));
            }
        }
        let extent =
            self.tables.extent(shard.head, block / EXTENT_BLOCKS).expect("inside the shard");
        let in_extent = block % EXTENT_BLOCKS;
        match extent.state(in_extent) {
            BlockState::Inherit | BlockState::Zero => Ok(Some((Place::Zero, self.zero_crc))),
            BlockState::Poison => Err(Problem::Poisoned { block }),
            BlockState::Data => {
                let slot = extent.slot(in_extent / SLOT_BLOCKS).expect("data has a slot");
                let physical = physical_block(slot, in_extent % SLOT_BLOCKS);
                match self.tables.tags.lookup(physical) {
                    Lookup::Known(tag) => {
                        let crc = tag ^ self.mask_of(shard_ix, block, physical);
                        Ok(Some((Place::Disk { physical }, crc)))
                    }
                    Lookup::Missing(_) => Ok(None),
                    Lookup::Never => Err(Problem::BadChecksum { block }),
                }
            }
        }
    }

    /// The part of a REDO write that holds `block`, and the block's index in it.
    fn placed_block(&self, op: OpIx, layer: u32, block: u32) -> Option<(u32, &DataPart, u32)> {
        let running = self.op(op);
        if running.undurable_parts > 0
            || block < running.first
            || block >= running.first + running.count
        {
            return None;
        }
        let Kind::Write { parts, .. } = &running.kind else { return None };
        parts.iter().enumerate().find_map(|(index, part)| {
            let piece = part.data_part().filter(|piece| piece.layer == layer)?;
            let start = piece.extent * EXTENT_BLOCKS + piece.first;
            (block >= start && block < start + piece.count())
                .then(|| (index as u32, piece, block - start))
        })
    }

    fn placing_data(&self, op: OpIx, part: u32, index: u32, blocks: u32) -> BufList {
        let Kind::Write { parts, .. } = &self.op(op).kind else { unreachable!("a write places") };
        let data = &parts[part as usize].data;
        slice_list(data, index as usize * BLOCK_BYTES, blocks as usize * BLOCK_BYTES)
    }

    fn mask_of(&self, shard_ix: u32, block: u32, physical: u64) -> u32 {
        let shard = self.tables.shard(shard_ix).expect("checked by start");
        let family = self.tables.layers[shard.head as usize].as_ref().expect("head layer").family;
        tag_mask(family, shard.replica.shard.index, block, physical)
    }

    fn missing_page(&self, shard_ix: u32, block: u32) -> u32 {
        let head = self.tables.shard(shard_ix).expect("checked by start").head;
        let extent = self.tables.extent(head, block / EXTENT_BLOCKS).expect("inside the shard");
        let in_extent = block % EXTENT_BLOCKS;
        let slot = extent.slot(in_extent / SLOT_BLOCKS).expect("data has a slot");
        match self.tables.tags.lookup(physical_block(slot, in_extent % SLOT_BLOCKS)) {
            Lookup::Missing(page) => page,
            Lookup::Known(_) | Lookup::Never => unreachable!("asked for a missing page only"),
        }
    }

    /// Bring a CRC page into memory; `ix` starts again when it is there.
    fn load_tag_page(&mut self, page: u32, ix: OpIx) {
        let waiters = self.tag_waiters.entry(page).or_default();
        waiters.push(ix);
        if waiters.len() == 1 {
            self.submit_tag_page(page);
        }
    }

    /// Read a CRC page from its valid side.
    pub(crate) fn submit_tag_page(&mut self, page: u32) {
        let (side, _) = self.tables.tags.side(page).expect("only existing pages are loaded");
        let offset = self.geometry.tag_page(side, page);
        self.counters.tag_page_loads += 1;
        self.submit(Io::TagPage { page }, DiskOp::Read { offset, len: BLOCK_BYTES as u32 });
    }

    pub(super) fn tag_page_done(&mut self, page: u32, result: Result<Option<Buf>, DiskError>) {
        let (loaded, error) = match result {
            Ok(Some(bytes)) => (self.tables.tags.load(page, &bytes), None),
            Ok(None) => unreachable!("a read brings data"),
            Err(error) => (false, Some(error)),
        };
        self.checkpoint_page_loaded(page, loaded);
        for ix in self.tag_waiters.remove(&page).unwrap_or_default() {
            if loaded {
                self.start_read(ix);
            } else {
                let block = self.op(ix).first;
                // The device's error may pass; damaged tags verify nothing any more.
                let problem = if let Some(error) = error {
                    self.counters.media_errors += 1;
                    Problem::Media { block, error }
                } else {
                    self.counters.checksum_errors += 1;
                    Problem::BadChecksum { block }
                };
                self.op_mut(ix).problem = Some(problem);
                self.finish(ix);
            }
        }
    }

    pub(super) fn read_done(
        &mut self,
        ix: OpIx,
        piece: u32,
        result: Result<Option<Buf>, DiskError>,
    ) {
        let op = self.ops[ix as usize].as_mut().expect("the operation runs");
        let Kind::Read(reading) = &mut op.kind else { unreachable!("a read") };
        reading.io_left -= 1;
        let entry = &mut reading.pieces[piece as usize];
        let mut damaged = None;
        match result {
            Ok(buf) => {
                let buf = buf.expect("a read brings data");
                let at = (entry.block - op.first) as usize;
                let expected = &reading.crcs[at..at + entry.count as usize];
                let bad = buf
                    .chunks_exact(BLOCK_BYTES)
                    .zip(expected)
                    .position(|(block, &expected)| crc32c(block) != expected);
                if let Some(index) = bad {
                    let block = entry.block + index as u32;
                    damaged = Some((block, Problem::BadChecksum { block }));
                    self.counters.checksum_errors += 1;
                }
                entry.source = Source::Disk(Some(buf));
            }
            Err(error) => {
                self.counters.media_errors += 1;
                let block = entry.block;
                damaged = Some((block, Problem::Media { block, error }));
            }
        }
        let over = reading.io_left == 0;
        if let Some((block, problem)) = damaged {
            op.problem.get_or_insert(problem);
            let shard_ix = op.shard_ix;
            self.suspect(shard_ix, block);
        }
        if over {
            self.finish(ix);
        }
    }
}

fn physical_of(piece: &DataPart, index: u32) -> u64 {
    let (_, slot, in_slot, _) = piece.blocks().nth(index as usize).expect("inside the part");
    physical_block(slot, in_slot)
}

/// True when `next` can be served by the same piece as the block before it.
fn continues(before: Place, next: Place) -> bool {
    match (before, next) {
        (Place::Zero, Place::Zero) => true,
        (
            Place::Placing { op, part, index },
            Place::Placing { op: next_op, part: next_part, index: next_index },
        ) => op == next_op && part == next_part && index + 1 == next_index,
        (Place::Disk { physical }, Place::Disk { physical: next }) => physical + 1 == next,
        _ => false,
    }
}
