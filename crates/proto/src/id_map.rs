//! Hash tables whose keys are numbers that we have made ourselves.
//!
//! The standard hasher withstands an enemy who chooses the keys, at some 20 ns a look; a request
//! passes ten such tables. Numbers that count up need no such protection: one multiplication spreads
//! them. Never for keys that come from a network or a disk.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// A map from numbers of ours.
pub type IdMap<K, V> = HashMap<K, V, BuildHasherDefault<IdHasher>>;
/// A set of numbers of ours.
pub type IdSet<K> = HashSet<K, BuildHasherDefault<IdHasher>>;

/// Odd, and near 2^64 divided by the golden ratio: neighbours land far apart (Knuth, volume 3, 6.4).
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

/// See the head of this module.
#[derive(Clone, Copy, Default, Debug)]
pub struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, number: u8) {
        self.write_u64(number.into());
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(number.into());
    }

    fn write_u64(&mut self, number: u64) {
        let wide = u128::from(self.0.rotate_left(29) ^ number) * u128::from(SPREAD);
        // Both halves: a table takes its place from the low bits, and of a number whose own low bits
        // are all the same only the upper half of the product still differs.
        self.0 = wide as u64 ^ (wide >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::hash::{BuildHasher, Hash};

    fn hash(key: impl Hash) -> u64 {
        BuildHasherDefault::<IdHasher>::default().hash_one(key)
    }

    #[test]
    fn numbers_that_count_up_fill_a_table_evenly() {
        // A table takes its place from the low bits and tells neighbours apart by the top seven. 4,096
        // keys thrown at random would put 6 or 7 into the fullest of 4,096 places.
        for shift in [0, 3, 12, 20, 40] {
            let (mut places, mut tags) = (vec![0u32; 4096], [0u32; 128]);
            for n in 0..4096u64 {
                let hash = hash(n << shift);
                places[(hash % 4096) as usize] += 1;
                tags[(hash >> 57) as usize] += 1;
            }
            let most = places.iter().max().expect("4,096 places");
            assert!(*most <= 8, "shift {shift}: {most} in one place");
            assert!(tags.iter().all(|count| (8..=96).contains(count)), "shift {shift}: {tags:?}");
        }
    }

    #[test]
    fn pairs_and_bytes_are_told_apart() {
        assert_ne!(hash((1u32, 2u32)), hash((2u32, 1u32)));
        assert_ne!(hash([1u8, 2].as_slice()), hash([2u8, 1].as_slice()));
        let map: IdMap<u64, u64> = (0..1000).map(|n| (n, n * n)).collect();
        assert!((0..1000).all(|n| map.get(&n) == Some(&(n * n))));
    }
}
