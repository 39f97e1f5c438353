//! Journal records: what changed, as after-images.
//!
//! A record is a 32-byte header and a body, padded to 8 bytes. It never spans frames; a write that
//! touches several extents becomes several records of which the last carries `LAST_PART`. Replaying
//! a record twice, or over a checkpoint that already holds its effect, changes nothing.
//!
//! Decoding is the only place that looks at record bytes; what it returns is in range of its own
//! fields (counts, states, positions), while references to layers and shards are checked where the
//! tables are known (`apply`).

use crate::map::BlockState;
use crate::{EXTENT_BLOCKS, EXTENT_SLOTS, SLOT_BLOCKS};
use proto::{BLOCK_BYTES, Epoch, Lsn, ReplicaId, Seq, ShardId, VolumeId};
use smallvec::SmallVec;

/// Bytes of a record header.
pub const RECORD_HEADER_BYTES: usize = 32;
/// Largest conf blob in a CONF record.
pub const CONF_BYTES_MAX: usize = 1024;
/// Most blocks of one data record.
pub const DATA_BLOCKS_MAX: u32 = 256;
/// Most blocks of one RANGE record: 64 MiB.
pub const RANGE_BLOCKS_MAX: u32 = (64 << 20) / BLOCK_BYTES as u32;
/// Most blocks of one RESOLVE record.
pub const RESOLVE_BLOCKS_MAX: u32 = 256;

/// Written by a replica that is not in the ISR yet: does not raise region lsns.
pub const FLAG_LEARNER: u8 = 1;
/// Resync traffic.
pub const FLAG_COPY: u8 = 2;
/// A program that does not know the record type must refuse the mount.
pub const FLAG_REFUSE_IF_UNKNOWN: u8 = 4;
/// Last record of its operation.
pub const FLAG_LAST_PART: u8 = 8;

/// A damaged or unknown record inside a frame whose CRC is right: our own bug, or a newer program.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("journal record of type {kind}: {problem}")]
pub struct RecordError {
    /// Type byte.
    pub kind: u8,
    /// What is wrong.
    pub problem: &'static str,
}

/// A contiguous piece of one extent that received data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DataPart {
    /// Layer index.
    pub layer: u32,
    /// Extent index in the shard.
    pub extent: u32,
    /// First block in the extent.
    pub first: u32,
    /// Slot of every position touched, in order.
    pub slots: SmallVec<[u32; 2]>,
    /// Tag of every block, in order.
    pub tags: SmallVec<[u32; 4]>,
}

impl DataPart {
    /// Number of blocks.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.tags.len() as u32
    }

    /// Blocks with their place: (block in extent, slot, block in slot, tag).
    pub fn blocks(&self) -> impl Iterator<Item = (u32, u32, u32, u32)> + '_ {
        let first_position = self.first / SLOT_BLOCKS;
        self.tags.iter().enumerate().map(move |(index, &tag)| {
            let block = self.first + index as u32;
            let slot = self.slots[(block / SLOT_BLOCKS - first_position) as usize];
            (block, slot, block % SLOT_BLOCKS, tag)
        })
    }
}

/// Decided content of one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decided {
    /// State of the block.
    pub state: BlockState,
    /// Its tag when the state is data.
    pub tag: u32,
}

/// A contiguous piece of one extent whose content recovery, settling or a failed write decided.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ResolvePart {
    /// Layer index.
    pub layer: u32,
    /// Extent index in the shard.
    pub extent: u32,
    /// First block in the extent.
    pub first: u32,
    /// Slot of every position touched; `None` where the position owns none.
    pub slots: SmallVec<[Option<u32>; 2]>,
    /// Content of every block.
    pub decided: Vec<Decided>,
}

/// What a RANGE record does to its blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RangeKind {
    /// Show what the ancestors show (zeros without ancestors).
    Inherit,
    /// Show zeros although an ancestor shows something.
    Zero,
    /// Known to be lost: an error until they are overwritten.
    Poison,
}

/// Creation, deletion or growth of a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShardChange {
    /// A new replica with an empty head layer.
    Create {
        /// Which replica.
        replica: ReplicaId,
        /// Its size.
        blocks: u32,
        /// Index of its head layer.
        layer: u32,
        /// Volume family for tags.
        family: VolumeId,
    },
    /// All layers and slots of the replica are freed.
    Delete,
    /// The replica now has this many blocks (growth only).
    Resize {
        /// New size.
        blocks: u32,
    },
}

/// The type-specific part of a record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// Data goes to these places (written in place beside or after this record).
    Intent(DataPart),
    /// The same, with the payload in this frame; placed later.
    Redo(DataPart),
    /// Blocks that no longer hold data. Units: blocks of the shard.
    Range {
        /// Layer index.
        layer: u32,
        /// What they show now.
        kind: RangeKind,
        /// First block.
        first: u32,
        /// Number of blocks.
        count: u32,
    },
    /// Decided content.
    Resolve(ResolvePart),
    /// The shard's configuration, opaque to the lane.
    Conf(Vec<u8>),
    /// Moves the commit watermark of the shard (`commit` in the header).
    Commit,
    /// Sets the region map entry (`seq << 1 | SUSPECT`).
    Region {
        /// Region index.
        region: u32,
        /// New value.
        value: u64,
    },
    /// Replica created, deleted or grown.
    Shard(ShardChange),
    /// A slot that must never be used again.
    BadSlot {
        /// Slot id.
        slot: u32,
    },
    /// First record of every mount.
    Mount {
        /// The mount's nonce.
        nonce: u64,
        /// Incarnation of the store.
        incarnation: u64,
    },
    /// Nothing; makes the frame before it not the last one.
    Seal,
    /// The rest of the ring is skipped.
    Pad,
}

/// One journal record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// `FLAG_*` bits.
    pub flags: u8,
    /// Index of the shard in the lane's shard table; 0 where the body concerns no shard.
    pub shard_ix: u32,
    /// Position of the operation; zero where the body has none.
    pub lsn: Lsn,
    /// Commit watermark known when the record was made.
    pub commit: Seq,
    /// The rest.
    pub body: Body,
}

impl Record {
    /// A record that concerns the lane, not a shard.
    #[must_use]
    pub fn of_lane(body: Body) -> Record {
        Record { flags: 0, shard_ix: 0, lsn: Lsn::default(), commit: Seq(0), body }
    }

    /// Payload pages that the record has in its frame.
    #[must_use]
    pub fn payload_pages(&self) -> usize {
        match &self.body {
            Body::Redo(part) => part.tags.len(),
            Body::Intent(_)
            | Body::Range { .. }
            | Body::Resolve(_)
            | Body::Conf(_)
            | Body::Commit
            | Body::Region { .. }
            | Body::Shard(_)
            | Body::BadSlot { .. }
            | Body::Mount { .. }
            | Body::Seal
            | Body::Pad => 0,
        }
    }

    /// True for records that change a shard which must exist.
    #[must_use]
    pub fn needs_shard(&self) -> bool {
        match &self.body {
            Body::Intent(_)
            | Body::Redo(_)
            | Body::Range { .. }
            | Body::Resolve(_)
            | Body::Conf(_)
            | Body::Commit
            | Body::Region { .. }
            | Body::Shard(ShardChange::Resize { .. }) => true,
            Body::Shard(ShardChange::Create { .. } | ShardChange::Delete)
            | Body::BadSlot { .. }
            | Body::Mount { .. }
            | Body::Seal
            | Body::Pad => false,
        }
    }

    fn kind(&self) -> u8 {
        match &self.body {
            Body::Intent(_) => 1,
            Body::Redo(_) => 2,
            Body::Range { .. } => 3,
            Body::Resolve(_) => 7,
            Body::Conf(_) => 8,
            Body::Commit => 9,
            Body::Region { .. } => 10,
            Body::Shard(_) => 11,
            Body::BadSlot { .. } => 12,
            Body::Mount { .. } => 13,
            Body::Seal => 14,
            Body::Pad => 15,
        }
    }

    /// Append the encoded record to `out`; its length is a multiple of 8.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0, 0, self.kind(), self.flags]);
        put32(out, self.shard_ix);
        put64(out, self.lsn.epoch.0);
        put64(out, self.lsn.seq.0);
        put64(out, self.commit.0);
        self.encode_body(out);
        while !(out.len() - start).is_multiple_of(8) {
            out.push(0);
        }
        let len = u16::try_from(out.len() - start).expect("a record fits a page");
        out[start..start + 2].copy_from_slice(&len.to_le_bytes());
    }

    fn encode_body(&self, out: &mut Vec<u8>) {
        match &self.body {
            Body::Intent(part) | Body::Redo(part) => {
                put32(out, part.layer);
                put32(out, part.extent);
                put16(out, part.first as u16);
                put16(out, part.tags.len() as u16);
                part.slots.iter().for_each(|&slot| put32(out, slot));
                part.tags.iter().for_each(|&tag| put32(out, tag));
            }
            Body::Range { layer, kind, first, count } => {
                put32(out, *layer);
                put32(out, *first);
                put32(out, *count);
                out.push(match kind {
                    RangeKind::Inherit => 0,
                    RangeKind::Zero => 2,
                    RangeKind::Poison => 3,
                });
            }
            Body::Resolve(part) => {
                put32(out, part.layer);
                put32(out, part.extent);
                put16(out, part.first as u16);
                put16(out, part.decided.len() as u16);
                part.slots.iter().for_each(|slot| put32(out, slot.unwrap_or(crate::NO_SLOT)));
                part.decided.iter().for_each(|decided| put32(out, decided.tag));
                part.decided.iter().for_each(|decided| out.push(decided.state as u8));
            }
            Body::Conf(blob) => {
                put16(out, blob.len() as u16);
                out.extend_from_slice(blob);
            }
            Body::Region { region, value } => {
                put32(out, *region);
                put64(out, *value);
            }
            Body::Shard(change) => encode_change(change, out),
            Body::BadSlot { slot } => put32(out, *slot),
            Body::Mount { nonce, incarnation } => {
                put64(out, *nonce);
                put64(out, *incarnation);
            }
            Body::Commit | Body::Seal | Body::Pad => {}
        }
    }

    /// Decode the record at the start of `bytes`; returns it and its length, or `None` for an
    /// unknown type that may be skipped.
    pub fn decode(bytes: &[u8]) -> Result<(Option<Record>, usize), RecordError> {
        let kind = bytes.get(2).copied().unwrap_or(0);
        let fail = |problem| RecordError { kind, problem };
        if bytes.len() < RECORD_HEADER_BYTES {
            return Err(fail("shorter than its header"));
        }
        let mut cursor = Cursor { bytes, at: 0, kind };
        let len = usize::from(cursor.u16()?);
        cursor.at = 3;
        let flags = cursor.u8()?;
        if len < RECORD_HEADER_BYTES || !len.is_multiple_of(8) || len > bytes.len() {
            return Err(fail("length outside its frame"));
        }
        cursor.bytes = &bytes[..len];
        let shard_ix = cursor.u32()?;
        let lsn = Lsn { epoch: Epoch(cursor.u64()?), seq: Seq(cursor.u64()?) };
        let commit = Seq(cursor.u64()?);
        let body = match kind {
            1 => Body::Intent(cursor.data_part()?),
            2 => Body::Redo(cursor.data_part()?),
            3 => cursor.range()?,
            7 => Body::Resolve(cursor.resolve_part()?),
            8 => {
                let count = usize::from(cursor.u16()?);
                if count > CONF_BYTES_MAX {
                    return Err(fail("conf longer than 1 KiB"));
                }
                Body::Conf(cursor.take(count)?.to_vec())
            }
            9 => Body::Commit,
            10 => Body::Region { region: cursor.u32()?, value: cursor.u64()? },
            11 => Body::Shard(cursor.change()?),
            12 => Body::BadSlot { slot: cursor.u32()? },
            13 => Body::Mount { nonce: cursor.u64()?, incarnation: cursor.u64()? },
            14 => Body::Seal,
            15 => Body::Pad,
            _ if flags & FLAG_REFUSE_IF_UNKNOWN != 0 => {
                return Err(fail("unknown, and the disk says it must not be ignored"));
            }
            _ => return Ok((None, len)),
        };
        Ok((Some(Record { flags, shard_ix, lsn, commit, body }), len))
    }

    /// Decode the `count` records at the start of `bytes`.
    pub fn decode_all(mut bytes: &[u8], count: u16) -> Result<Vec<Option<Record>>, RecordError> {
        let mut records = Vec::with_capacity(usize::from(count).min(128));
        for _ in 0..count {
            let (record, len) = Record::decode(bytes)?;
            records.push(record);
            bytes = &bytes[len..];
        }
        Ok(records)
    }
}

fn encode_change(change: &ShardChange, out: &mut Vec<u8>) {
    match change {
        ShardChange::Create { replica, blocks, layer, family } => {
            out.extend_from_slice(&[1, replica.copy, 0, 0]);
            put32(out, *blocks);
            put64(out, replica.shard.volume.0);
            put32(out, replica.shard.index);
            put32(out, *layer);
            put64(out, family.0);
        }
        ShardChange::Delete => out.extend_from_slice(&[2, 0, 0, 0]),
        ShardChange::Resize { blocks } => {
            out.extend_from_slice(&[3, 0, 0, 0]);
            put32(out, *blocks);
        }
    }
}

/// Positions (slots of an extent) that `count` blocks from `first` touch.
#[must_use]
pub fn positions(first: u32, count: u32) -> std::ops::Range<u32> {
    first / SLOT_BLOCKS..(first + count).div_ceil(SLOT_BLOCKS)
}

pub(crate) fn put16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(crate) fn put32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(crate) fn put64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Bounds-checked reader of little-endian fields, for records and checkpoint runs.
pub(crate) struct Cursor<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) at: usize,
    pub(crate) kind: u8,
}

impl<'a> Cursor<'a> {
    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], RecordError> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| self.fail("shorter than its fields"))?;
        let bytes = &self.bytes[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    pub(crate) fn fail(&self, problem: &'static str) -> RecordError {
        RecordError { kind: self.kind, problem }
    }

    pub(crate) fn u8(&mut self) -> Result<u8, RecordError> {
        Ok(self.take(1)?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, RecordError> {
        Ok(u16::from_le_bytes(self.take(2)?.try_into().expect("two bytes were taken")))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, RecordError> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four bytes were taken")))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, RecordError> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("eight bytes were taken")))
    }

    /// layer, extent, first, count of a piece of one extent with at most `max` blocks.
    fn piece(&mut self, max: u32) -> Result<(u32, u32, u32, u32), RecordError> {
        let (layer, extent) = (self.u32()?, self.u32()?);
        let (first, count) = (u32::from(self.u16()?), u32::from(self.u16()?));
        if count == 0 || count > max || first + count > EXTENT_BLOCKS {
            return Err(self.fail("blocks outside their extent"));
        }
        Ok((layer, extent, first, count))
    }

    fn data_part(&mut self) -> Result<DataPart, RecordError> {
        let (layer, extent, first, count) = self.piece(DATA_BLOCKS_MAX)?;
        let slots = positions(first, count).map(|_| self.u32()).collect::<Result<_, _>>()?;
        let tags = (0..count).map(|_| self.u32()).collect::<Result<_, _>>()?;
        Ok(DataPart { layer, extent, first, slots, tags })
    }

    fn resolve_part(&mut self) -> Result<ResolvePart, RecordError> {
        let (layer, extent, first, count) = self.piece(RESOLVE_BLOCKS_MAX)?;
        let slots = positions(first, count)
            .map(|_| Ok(Some(self.u32()?).filter(|&slot| slot != crate::NO_SLOT)))
            .collect::<Result<SmallVec<[Option<u32>; 2]>, _>>()?;
        let tags = (0..count).map(|_| self.u32()).collect::<Result<Vec<_>, _>>()?;
        let mut decided = Vec::with_capacity(tags.len());
        for (index, tag) in tags.into_iter().enumerate() {
            let state = BlockState::parse(self.u8()?).ok_or_else(|| self.fail("unknown state"))?;
            let block = first + index as u32;
            let position = (block / SLOT_BLOCKS - first / SLOT_BLOCKS) as usize;
            if state == BlockState::Data && slots[position].is_none() {
                return Err(self.fail("data without a slot"));
            }
            decided.push(Decided { state, tag });
        }
        Ok(ResolvePart { layer, extent, first, slots, decided })
    }

    fn range(&mut self) -> Result<Body, RecordError> {
        let (layer, first, count) = (self.u32()?, self.u32()?, self.u32()?);
        let kind = match self.u8()? {
            0 => RangeKind::Inherit,
            2 => RangeKind::Zero,
            3 => RangeKind::Poison,
            _ => return Err(self.fail("unknown range kind")),
        };
        if count == 0 || count > RANGE_BLOCKS_MAX || first.checked_add(count).is_none() {
            return Err(self.fail("range longer than 64 MiB"));
        }
        Ok(Body::Range { layer, kind, first, count })
    }

    fn change(&mut self) -> Result<ShardChange, RecordError> {
        let (op, copy) = (self.u8()?, self.u8()?);
        self.u16()?;
        match op {
            1 => {
                let blocks = self.u32()?;
                let shard = ShardId { volume: VolumeId(self.u64()?), index: self.u32()? };
                let layer = self.u32()?;
                let family = VolumeId(self.u64()?);
                Ok(ShardChange::Create {
                    replica: ReplicaId { shard, copy },
                    blocks,
                    layer,
                    family,
                })
            }
            2 => Ok(ShardChange::Delete),
            3 => Ok(ShardChange::Resize { blocks: self.u32()? }),
            _ => Err(self.fail("unknown shard change")),
        }
    }
}

const _: () = assert!(EXTENT_SLOTS * SLOT_BLOCKS == EXTENT_BLOCKS);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn state() -> impl Strategy<Value = BlockState> {
        (0u8..4).prop_map(|value| BlockState::parse(value).expect("four states"))
    }

    fn data_part() -> impl Strategy<Value = DataPart> {
        (any::<u32>(), any::<u32>(), 0u32..EXTENT_BLOCKS)
            .prop_flat_map(|(layer, extent, first)| {
                let most = DATA_BLOCKS_MAX.min(EXTENT_BLOCKS - first);
                (
                    Just((layer, extent, first)),
                    prop::collection::vec(any::<u32>(), 1..=most as usize),
                )
            })
            .prop_map(|((layer, extent, first), tags)| {
                let slots =
                    positions(first, tags.len() as u32).map(|position| position * 7).collect();
                DataPart { layer, extent, first, slots, tags: tags.into() }
            })
    }

    fn range_kind() -> impl Strategy<Value = RangeKind> {
        prop_oneof![Just(RangeKind::Inherit), Just(RangeKind::Zero), Just(RangeKind::Poison)]
    }

    fn body() -> impl Strategy<Value = Body> {
        prop_oneof![
            data_part().prop_map(Body::Intent),
            data_part().prop_map(Body::Redo),
            (any::<u32>(), 0u32..1 << 30, 1..=RANGE_BLOCKS_MAX, range_kind())
                .prop_map(|(layer, first, count, kind)| Body::Range { layer, kind, first, count }),
            (data_part(), prop::collection::vec(state(), 256)).prop_map(|(part, states)| {
                Body::Resolve(ResolvePart {
                    layer: part.layer,
                    extent: part.extent,
                    first: part.first,
                    slots: part.slots.iter().map(|&slot| Some(slot)).collect(),
                    decided: part
                        .tags
                        .iter()
                        .zip(states)
                        .map(|(&tag, state)| Decided { state, tag })
                        .collect(),
                })
            }),
            prop::collection::vec(any::<u8>(), 0..=CONF_BYTES_MAX).prop_map(Body::Conf),
            Just(Body::Commit),
            (any::<u32>(), any::<u64>()).prop_map(|(region, value)| Body::Region { region, value }),
            (any::<u64>(), any::<u32>(), any::<u8>(), any::<u32>(), any::<u32>()).prop_map(
                |(volume, index, copy, blocks, layer)| Body::Shard(ShardChange::Create {
                    replica: ReplicaId { shard: ShardId { volume: VolumeId(volume), index }, copy },
                    blocks,
                    layer,
                    family: VolumeId(volume),
                })
            ),
            Just(Body::Shard(ShardChange::Delete)),
            any::<u32>().prop_map(|blocks| Body::Shard(ShardChange::Resize { blocks })),
            any::<u32>().prop_map(|slot| Body::BadSlot { slot }),
            any::<(u64, u64)>().prop_map(|(nonce, incarnation)| Body::Mount { nonce, incarnation }),
            Just(Body::Seal),
            Just(Body::Pad),
        ]
    }

    proptest! {
        #[test]
        fn every_record_survives_a_round_trip(
            flags in 0u8..16, shard_ix: u32, epoch: u64, seq: u64, commit: u64, body in body()
        ) {
            let lsn = Lsn { epoch: Epoch(epoch), seq: Seq(seq) };
            let record = Record { flags, shard_ix, lsn, commit: Seq(commit), body };
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            prop_assert!(bytes.len() <= crate::format::FRAME_RECORD_BYTES);
            let (decoded, len) = Record::decode(&bytes).expect("what we encode we decode");
            prop_assert_eq!(len, bytes.len());
            prop_assert_eq!(decoded, Some(record));
        }

        #[test]
        fn arbitrary_bytes_are_refused_or_decoded_but_never_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..600), kind in 0u8..20
        ) {
            if bytes.len() > 3 {
                let len = (bytes.len() / 8 * 8) as u16;
                bytes[..2].copy_from_slice(&len.to_le_bytes());
                bytes[2] = kind;
            }
            if let Ok((Some(record), _)) = Record::decode(&bytes) {
                let mut again = Vec::new();
                record.encode(&mut again);
                let (twice, _) = Record::decode(&again).expect("canonical bytes decode");
                prop_assert_eq!(twice, Some(record));
            }
        }
    }
}
