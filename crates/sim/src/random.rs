//! Seeded numbers (splitmix64): one seed decides a whole world, on every machine alike.

/// A stream of numbers. Streams with different seeds have nothing to do with one another.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    /// The next number, all 64 bits.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to `n - 1`; `n` is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        // The upper half of the product: no bias worth speaking of, and no division.
        ((u128::from(self.number()) * u128::from(n)) >> 64) as u64
    }

    /// True `chance` times in ten thousand.
    pub fn chance(&mut self, chance: u64) -> bool {
        chance > 0 && self.below(10_000) < chance
    }

    /// A time around `mean` with the long tail that real delays have: the minimum is a quarter of
    /// it, one in a thousand is seven times as long.
    pub fn around(&mut self, mean: u64) -> u64 {
        // 2^-53 of the unit interval is never 0, so the logarithm is finite.
        let unit = ((self.number() >> 11) + 1) as f64 / (1u64 << 53) as f64;
        mean / 4 + (-(unit.ln()) * mean as f64 * 0.75) as u64
    }

    /// One of these; the list is not empty.
    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_stream_and_another_seed_is_another_one() {
        let stream = |seed| {
            let mut random = Random::new(seed);
            (0..64).map(|_| random.number()).collect::<Vec<_>>()
        };
        assert_eq!(stream(7), stream(7));
        assert_ne!(stream(7), stream(8));
    }

    #[test]
    fn chances_and_delays_are_about_what_they_say() {
        let mut random = Random::new(1);
        let hits = (0..100_000).filter(|_| random.chance(2_500)).count();
        assert!((24_000..26_000).contains(&hits), "{hits} of 100,000 at one in four");
        assert!(!(0..1000).any(|_| random.chance(0)));
        let delays: Vec<u64> = (0..100_000).map(|_| random.around(1_000)).collect();
        let mean = delays.iter().sum::<u64>() / delays.len() as u64;
        assert!((970..1_030).contains(&mean), "mean {mean}");
        assert!(delays.iter().all(|&delay| delay >= 250));
        assert!(delays.iter().any(|&delay| delay > 6_000), "the tail is long");
    }
}
