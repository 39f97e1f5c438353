//! Cutting a range of a volume at shard edges and at the limits of one message. Pure arithmetic.
//!
//! A piece that ends because of the message limit ends at a block's end: only the two ends of the
//! caller's own range can be fragments of a block, and no block is shared by two pieces.

use proto::BLOCK_BYTES;
use proto::disk::BufList;

/// The part of a request that goes into one message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Cut {
    /// Which shard.
    pub shard: u32,
    /// First byte in the shard.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

/// Cut the first piece off `offset..end` of a volume; the rest begins `length` bytes later.
///
/// Units: all in bytes; `limit_bytes` is what one message may carry, a multiple of 4,096.
pub(super) fn first_piece(offset: u64, end: u64, shard_bytes: u64, limit_bytes: u32) -> Cut {
    assert!(offset < end, "an empty range has no piece");
    assert!(limit_bytes.is_multiple_of(BLOCK_BYTES as u32) && limit_bytes > 0, "whole blocks");
    let shard = u32::try_from(offset / shard_bytes).expect("a configuration has 2^32 shards");
    let inside = offset % shard_bytes;
    let to_edge = shard_bytes - inside;
    let to_limit = u64::from(limit_bytes) - inside % BLOCK_BYTES as u64;
    let length = (end - offset).min(to_edge).min(to_limit);
    Cut { shard, offset: inside, length: u32::try_from(length).expect("within the limit") }
}

/// Bytes `start..start + length` of a list of buffers, sharing their pages.
pub(super) fn slice(list: &BufList, start: u64, length: u32) -> BufList {
    let mut part = BufList::new();
    let (mut skip, mut left) = (start, u64::from(length));
    for buf in list {
        let bytes = buf.len() as u64;
        if skip >= bytes {
            skip -= bytes;
            continue;
        }
        let count = (bytes - skip).min(left);
        if count == 0 {
            break;
        }
        // Both are bounded by the length of a buffer in memory.
        part.push(buf.slice(skip as usize..(skip + count) as usize));
        (skip, left) = (0, left - count);
    }
    assert_eq!(left, 0, "the buffers hold the range");
    part
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proto::Pool;

    proptest! {
        #[test]
        fn pieces_tile_the_range_sector_by_sector(
            first_sector in 0u64..400, sectors in 1u64..400,
            shard_blocks in 1u64..20, limit_blocks in 1u32..8,
        ) {
            let (offset, end) = (first_sector * 512, (first_sector + sectors) * 512);
            let (shard_bytes, limit) = (shard_blocks * 4096, limit_blocks * 4096);
            // Oracle: each sector by itself, where it lies.
            let mut expected: Vec<(u32, u64)> = Vec::new();
            for sector in first_sector..first_sector + sectors {
                let mut shard = 0;
                let mut inside = sector * 512;
                while inside >= shard_bytes {
                    inside -= shard_bytes;
                    shard += 1;
                }
                expected.push((shard, inside));
            }
            let (mut found, mut at, mut count) = (Vec::new(), offset, 0);
            while at < end {
                let cut = first_piece(at, end, shard_bytes, limit);
                prop_assert!(cut.length > 0 && cut.length <= limit);
                at += u64::from(cut.length);
                let ends_early = at < end;
                prop_assert!(!ends_early || (cut.offset + u64::from(cut.length)).is_multiple_of(4096));
                found.extend((0..cut.length as u64 / 512).map(|n| (cut.shard, cut.offset + n * 512)));
                count += 1;
            }
            prop_assert_eq!(at, end);
            prop_assert_eq!(found, expected);
            // No more messages than edges and limits ask for.
            prop_assert!(count <= 2 + (end - offset) / shard_bytes + (end - offset) / u64::from(limit));
        }

        #[test]
        fn slices_are_the_bytes(lengths in prop::collection::vec(1usize..3000, 1..6),
                                cut in any::<(u16, u16)>()) {
            let pool = Pool::new(0);
            let mut all = Vec::new();
            let mut list = BufList::new();
            for (n, length) in lengths.iter().enumerate() {
                let bytes: Vec<u8> = (0..*length).map(|i| (i * 7 + n) as u8).collect();
                list.push(pool.copy_of(&bytes).freeze());
                all.extend(bytes);
            }
            let start = usize::from(cut.0) % all.len();
            let length = 1 + usize::from(cut.1) % (all.len() - start);
            let part = slice(&list, start as u64, length as u32);
            let bytes: Vec<u8> = part.iter().flat_map(|buf| buf.to_vec()).collect();
            prop_assert_eq!(&bytes[..], &all[start..start + length]);
        }
    }
}
