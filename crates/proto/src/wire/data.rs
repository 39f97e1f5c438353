//! Ranges of a shard and data with one CRC32C per started 4 KiB block.
//!
//! A range that starts or ends inside a block has a *fragment* there; its CRC covers the fragment
//! only. The primary verifies it, merges it into the block and computes the block's own CRC.

use super::{SECTOR_BYTES, WireError};
use crate::BLOCK_BYTES;
use crate::checksum::crc32c_append;
use crate::disk::BufList;
use smallvec::SmallVec;

const BLOCK: u32 = BLOCK_BYTES as u32;

/// How many 4 KiB blocks `length` bytes touch when the first lies at `start_in_block`.
#[must_use]
pub fn started_blocks(start_in_block: u32, length: u32) -> u32 {
    if length == 0 {
        return 0;
    }
    let end = u64::from(start_in_block % BLOCK) + u64::from(length);
    u32::try_from(end.div_ceil(u64::from(BLOCK))).expect("at most 2^20 + 1 blocks")
}

/// Part of a shard: not empty, a multiple of 512 bytes, and it ends below 2^64.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ByteRange {
    offset: u64,
    length: u32,
}

impl ByteRange {
    /// Check offset and length.
    pub fn new(offset: u64, length: u32) -> Result<ByteRange, WireError> {
        if length == 0 || offset.checked_add(u64::from(length)).is_none() {
            return Err(WireError::Range { offset, length });
        }
        if !offset.is_multiple_of(u64::from(SECTOR_BYTES)) || !length.is_multiple_of(SECTOR_BYTES) {
            return Err(WireError::Misaligned { offset, length });
        }
        Ok(ByteRange { offset, length })
    }

    /// First byte in the shard.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes.
    #[must_use]
    pub fn length(&self) -> u32 {
        self.length
    }

    /// One behind the last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.length)
    }

    pub(super) fn start_in_block(&self) -> u32 {
        (self.offset % u64::from(BLOCK)) as u32
    }
}

/// Data whose every started block matches its CRC32C.
#[derive(Clone, Debug)]
pub struct CheckedData {
    start_in_block: u32,
    length: u32,
    crcs: SmallVec<[u32; 4]>,
    data: BufList,
}

impl CheckedData {
    /// Compute the CRCs of data that were made here.
    #[must_use]
    pub fn compute(start_in_block: u32, data: BufList) -> CheckedData {
        assert!(start_in_block < BLOCK, "a place inside one block");
        let length = length_of(&data);
        let mut crcs = SmallVec::new();
        for_each_crc(start_in_block, &data, |_, crc| crcs.push(crc));
        CheckedData { start_in_block, length, crcs, data }
    }

    /// Adopt data with CRCs that are known to be right, because they were verified on the way in.
    #[must_use]
    pub fn assume(start_in_block: u32, crcs: SmallVec<[u32; 4]>, data: BufList) -> CheckedData {
        assert!(start_in_block < BLOCK, "a place inside one block");
        let length = length_of(&data);
        assert_eq!(crcs.len() as u32, started_blocks(start_in_block, length), "one CRC per block");
        CheckedData { start_in_block, length, crcs, data }
    }

    /// Check received data against received CRCs.
    ///
    /// Shapes: `crcs` holds one little-endian u32 per started block.
    pub fn verify(
        start_in_block: u32,
        crcs: &[u8],
        data: BufList,
    ) -> Result<CheckedData, WireError> {
        let length = length_of(&data);
        let expected = 4 * u64::from(started_blocks(start_in_block, length));
        if crcs.len() as u64 != expected {
            let found = crcs.len() as u64;
            return Err(WireError::Truncated { what: "data CRCs", expected, found });
        }
        let crcs: SmallVec<[u32; 4]> = crcs
            .chunks_exact(4)
            .map(|crc| u32::from_le_bytes(crc.try_into().expect("chunks of four")))
            .collect();
        let mut wrong = None;
        for_each_crc(start_in_block, &data, |index, found| {
            let expected = crcs[index as usize];
            if found != expected && wrong.is_none() {
                wrong = Some(WireError::DataChecksum { index, expected, found });
            }
        });
        match wrong {
            Some(error) => Err(error),
            None => Ok(CheckedData { start_in_block, length, crcs, data }),
        }
    }

    /// Where the first byte lies in its block.
    #[must_use]
    pub fn start_in_block(&self) -> u32 {
        self.start_in_block
    }

    /// Bytes.
    #[must_use]
    pub fn length(&self) -> u32 {
        self.length
    }

    /// One CRC per started block.
    #[must_use]
    pub fn crcs(&self) -> &[u32] {
        &self.crcs
    }

    /// The buffers in order.
    #[must_use]
    pub fn data(&self) -> &BufList {
        &self.data
    }

    /// Give up the pairing.
    #[must_use]
    pub fn into_parts(self) -> (SmallVec<[u32; 4]>, BufList) {
        (self.crcs, self.data)
    }

    /// All bytes in one piece; copies.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.data.iter().flat_map(|buf| buf.iter().copied()).collect()
    }
}

/// Two are equal when their bytes are, however these are cut into buffers.
impl PartialEq for CheckedData {
    fn eq(&self, other: &CheckedData) -> bool {
        (self.start_in_block, &self.crcs) == (other.start_in_block, &other.crcs)
            && self.to_vec() == other.to_vec()
    }
}

impl Eq for CheckedData {}

/// Checked data and where in the shard they belong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RangeData {
    range: ByteRange,
    data: CheckedData,
}

impl RangeData {
    /// Compute the CRCs of data that were made here.
    pub fn compute(offset: u64, data: BufList) -> Result<RangeData, WireError> {
        let range = ByteRange::new(offset, length_of(&data))?;
        Ok(RangeData { range, data: CheckedData::compute(range.start_in_block(), data) })
    }

    /// Join a range and data that lie at the same place of a block and are equally long.
    #[must_use]
    pub fn join(range: ByteRange, data: CheckedData) -> RangeData {
        assert_eq!(range.length(), data.length(), "as many data as the range says");
        assert_eq!(range.start_in_block(), data.start_in_block(), "cut at the same blocks");
        RangeData { range, data }
    }

    /// Where the data belong.
    #[must_use]
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// The data.
    #[must_use]
    pub fn checked(&self) -> &CheckedData {
        &self.data
    }

    /// CRCs and buffers.
    #[must_use]
    pub fn into_parts(self) -> (ByteRange, SmallVec<[u32; 4]>, BufList) {
        let (crcs, data) = self.data.into_parts();
        (self.range, crcs, data)
    }
}

/// Bytes in a list of buffers, which come from messages of at most 2^32 - 1 bytes.
pub(super) fn length_of(data: &BufList) -> u32 {
    let bytes: usize = data.iter().map(|buf| buf.len()).sum();
    u32::try_from(bytes).expect("messages are far below 4 GiB")
}

/// Call `found` with index and CRC of every started block, wherever the buffers are cut.
fn for_each_crc(start_in_block: u32, data: &BufList, mut found: impl FnMut(u32, u32)) {
    let mut room = (BLOCK - start_in_block) as usize;
    let (mut index, mut crc, mut is_started) = (0, 0, false);
    for buf in data {
        let mut bytes: &[u8] = buf;
        while !bytes.is_empty() {
            let (part, rest) = bytes.split_at(bytes.len().min(room));
            crc = if is_started { crc32c_append(crc, part) } else { crate::checksum::crc32c(part) };
            is_started = true;
            room -= part.len();
            bytes = rest;
            if room == 0 {
                found(index, crc);
                (index, crc, is_started, room) = (index + 1, 0, false, BLOCK_BYTES);
            }
        }
    }
    if is_started {
        found(index, crc);
    }
}
