//! What a block of a client holds: a value that names the write that made it, spread over the whole
//! block so that a mixture of two contents, or a block at the wrong end of its buffer, is seen.

use proto::{BLOCK_BYTES, Buf, Pool};

const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

fn word(value: u64, index: u64) -> u64 {
    if index == 0 { value } else { value.wrapping_mul(MIX) ^ index << 48 }
}

/// The value of a block that is known to be lost.
pub const LOST: u64 = u64::MAX;

/// A buffer with one block per value; 0 makes zeros.
#[must_use]
pub fn fill(pool: &Pool, values: &[u64]) -> Buf {
    let mut buf = pool.alloc(values.len() * BLOCK_BYTES);
    for (chunk, &value) in buf.chunks_exact_mut(BLOCK_BYTES).zip(values) {
        if value == 0 {
            chunk.fill(0);
            continue;
        }
        for (index, bytes) in (0..).zip(chunk.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word(value, index).to_le_bytes());
        }
    }
    buf.freeze()
}

/// The value of a block; `None` for a mixture.
#[must_use]
pub fn value_of(block: &[u8]) -> Option<u64> {
    let at = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("chunks of eight"));
    let value = at(&block[..8]);
    let is_whole = if value == 0 {
        block.iter().all(|&byte| byte == 0)
    } else {
        (0..).zip(block.chunks_exact(8)).all(|(index, bytes)| at(bytes) == word(value, index))
    };
    is_whole.then_some(value)
}

/// The first word of a block, which is its value if it is whole. Cheap: for what was just made.
#[must_use]
pub fn name_of(block: &[u8]) -> u64 {
    u64::from_le_bytes(block[..8].try_into().expect("a block is longer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_name_their_write_and_mixtures_are_seen() {
        let pool = Pool::new(1 << 20);
        let buf = fill(&pool, &[5, 0, 6]);
        assert_eq!(value_of(&buf.block(0)), Some(5));
        assert_eq!(value_of(&buf.block(1)), Some(0));
        assert_eq!((value_of(&buf.block(2)), name_of(&buf.block(2))), (Some(6), 6));
        let mut torn = buf.block(0).to_vec();
        torn[512..1024].copy_from_slice(&buf.block(2)[512..1024]);
        assert_eq!(value_of(&torn), None);
        let mut zeroed = buf.block(0).to_vec();
        zeroed[..512].fill(0);
        assert_eq!(value_of(&zeroed), None);
    }
}
