//! CRC32C (Castagnoli), the one checksum of the wire and of the disk, and the tag that binds a
//! block's checksum to the place where it belongs.

use crate::{BLOCK_BYTES, VolumeId};
use crc_fast::{CrcAlgorithm, Digest};

/// CRC32C of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// CRC32C of `bytes` appended to data whose CRC32C is `crc`.
#[must_use]
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    // The library continues from the register, which is the CRC before its final inversion.
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!crc));
    digest.update(bytes);
    // The library holds every CRC in 64 bits; a 32-bit one leaves the upper half zero.
    (digest.finalize() & 0xffff_ffff) as u32
}

/// CRC32C of each 4 KiB block of `data`.
///
/// Shapes: `data.len()` is a multiple of 4,096; one u32 per block is appended to `out`.
pub fn crc32c_blocks(data: &[u8], out: &mut Vec<u32>) {
    assert_eq!(data.len() % BLOCK_BYTES, 0, "whole blocks only");
    out.extend(data.chunks_exact(BLOCK_BYTES).map(crc32c));
}

/// The mask that turns a client's CRC into the tag stored for a block, and back (XOR).
///
/// A block read from the wrong place, or through a wrong map entry, carries the mask of another
/// place and fails verification although its own CRC is right.
///
/// Units: `logical_block` counts 4 KiB blocks of the shard, `physical_block` of the lane's slots.
#[must_use]
pub fn tag_mask(
    family: VolumeId,
    shard_index: u32,
    logical_block: u32,
    physical_block: u64,
) -> u32 {
    let mut key = [0u8; 24];
    key[0..8].copy_from_slice(&family.0.to_le_bytes());
    key[8..12].copy_from_slice(&shard_index.to_le_bytes());
    key[12..16].copy_from_slice(&logical_block.to_le_bytes());
    key[16..24].copy_from_slice(&physical_block.to_le_bytes());
    // The low 32 bits are the defined part of the format; the cast is the definition.
    (xxhash_rust::xxh3::xxh3_64(&key) & 0xffff_ffff) as u32
}

/// XXH3-128 of the visible content of some blocks, by which two replicas are shown to be equal.
///
/// Each block counts as its own hash, a block of zeros as a hash of nothing: whether zeros are
/// stored or merely not there makes no difference. Blocks that are known to be lost are not zeros.
///
/// Shapes: `data` are whole blocks in order, however they are cut into buffers; `poisoned` are the
/// indices of lost ones, ascending.
#[must_use]
pub fn content_digest<'a>(data: impl Iterator<Item = &'a [u8]>, poisoned: &[u32]) -> u128 {
    let mut hashes: Vec<u8> = poisoned.iter().flat_map(|index| index.to_le_bytes()).collect();
    for block in data.flat_map(|bytes| bytes.chunks_exact(BLOCK_BYTES)) {
        let hash = if is_zero(block) { 0 } else { xxhash_rust::xxh3::xxh3_128(block) };
        hashes.extend_from_slice(&hash.to_le_bytes());
    }
    xxhash_rust::xxh3::xxh3_128(&hashes)
}

/// Whether a block is all zeros.
///
/// Blocks that nobody has written are most of what is compared, in a sparse volume as in a simulated
/// world; a byte at a time this was nearly half of the simulator's time. A block whose first byte is
/// zero and that is equal to itself moved by one byte is zero throughout, and comparing is the
/// library's fastest loop.
fn is_zero(block: &[u8]) -> bool {
    match block.split_first() {
        None => true,
        Some((&first, rest)) => first == 0 && *rest == block[..rest.len()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_see_content_and_place_and_not_how_it_is_cut() {
        let mut bytes = vec![0; 3 * BLOCK_BYTES];
        bytes[BLOCK_BYTES] = 1;
        let whole = content_digest([&bytes[..]].into_iter(), &[]);
        let cut = content_digest(bytes.chunks_exact(BLOCK_BYTES), &[]);
        assert_eq!(whole, cut);
        bytes.rotate_left(BLOCK_BYTES);
        assert_ne!(whole, content_digest([&bytes[..]].into_iter(), &[]), "elsewhere");
    }

    #[test]
    fn one_byte_anywhere_is_not_zero() {
        for len in [0, 1, 63, 64, 65, 200] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len} bytes");
            for at in 0..len {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "byte {at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn crc32c_of_the_standard_check_string() {
        // RFC 3720 appendix B.4 and every CRC catalogue: "123456789" -> e3069283.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c_append(crc32c(b"12345"), b"6789"), 0xe306_9283);
    }

    #[test]
    fn every_length_and_every_split_agrees_with_the_bitwise_definition() {
        // The library picks another kernel by length and by processor; the definition is the
        // reflected polynomial 0x82f63b78, one bit at a time.
        let bitwise = |bytes: &[u8]| {
            !bytes.iter().fold(!0u32, |register, &byte| {
                (0..8).fold(register ^ u32::from(byte), |crc, _| {
                    (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
                })
            })
        };
        let data: Vec<u8> = (0..4200u32).map(|i| (i.wrapping_mul(167) >> 3) as u8).collect();
        for len in (0..600).chain([1023, 1024, 4095, 4096, 4200]) {
            let expected = bitwise(&data[..len]);
            assert_eq!(crc32c(&data[..len]), expected, "{len} bytes");
            let (head, tail) = data[..len].split_at(len / 3);
            assert_eq!(crc32c_append(crc32c(head), tail), expected, "{len} bytes in two parts");
        }
    }

    #[test]
    fn tag_masks_differ_by_every_part_of_the_place() {
        let base = tag_mask(VolumeId(1), 0, 0, 0);
        for other in [
            tag_mask(VolumeId(2), 0, 0, 0),
            tag_mask(VolumeId(1), 1, 0, 0),
            tag_mask(VolumeId(1), 0, 1, 0),
            tag_mask(VolumeId(1), 0, 0, 1),
        ] {
            assert_ne!(base, other);
        }
    }
}
