//! Counters and latency histograms of one thread, readable by all others.
//!
//! One thread writes, any thread reads. So a counter is a plain load, add and store (no locked
//! instruction), and a reader sees each number at some recent moment; the numbers of one snapshot
//! may be a few I/Os apart. That is what rates and quantiles need, and it costs the I/O path about
//! a nanosecond. There is no lock, and nothing to register: whoever makes a metric shares it in an
//! `Arc` with whoever shows it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A number that only its own thread changes.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Add `count`. Only ever called by the owning thread: two writers would lose counts.
    pub fn add(&self, count: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(count), Relaxed);
    }

    /// Replace the value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// The value now, or a moment ago.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Bits of a value that are kept: 16 buckets per power of two, so a quantile is at most 1/16 off.
const SUB_BITS: u32 = 4;
const SUB_BUCKETS: usize = 1 << SUB_BITS;
/// Values from 2^42 on share the last bucket: 73 minutes in nanoseconds.
const EXPONENT_MAX: u32 = 42;
const BUCKETS: usize = (EXPONENT_MAX - SUB_BITS + 1) as usize * SUB_BUCKETS + 1;

/// How often each value came up, in logarithmic buckets. For latencies in nanoseconds. 5 KiB.
#[derive(Debug)]
pub struct Histogram {
    counts: Box<[Counter]>,
    sum: Counter,
}

impl Default for Histogram {
    fn default() -> Histogram {
        let counts = (0..BUCKETS).map(|_| Counter::default()).collect();
        Histogram { counts, sum: Counter::default() }
    }
}

impl Histogram {
    /// Count one value. Only ever called by the owning thread.
    pub fn record(&self, value: u64) {
        self.counts[bucket_of(value)].add(1);
        self.sum.add(value);
    }

    /// Copy the counts.
    #[must_use]
    pub fn snapshot(&self) -> HistogramSnapshot {
        let counts = self.counts.iter().map(Counter::get).collect();
        HistogramSnapshot { counts, sum: self.sum.get() }
    }
}

/// A histogram at one moment: can be added to others and asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HistogramSnapshot {
    counts: Vec<u64>,
    sum: u64,
}

impl Default for HistogramSnapshot {
    fn default() -> HistogramSnapshot {
        HistogramSnapshot { counts: vec![0; BUCKETS], sum: 0 }
    }
}

impl HistogramSnapshot {
    /// Values counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Sum of the values counted.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// Add another histogram's counts: that of another lane, say.
    pub fn merge(&mut self, other: &HistogramSnapshot) {
        for (own, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *own += theirs;
        }
        self.sum = self.sum.wrapping_add(other.sum);
    }

    /// The smallest bucket's upper end that covers `per_mille` of the values; 0 if there are none.
    #[must_use]
    pub fn quantile(&self, per_mille: u64) -> u64 {
        assert!(per_mille <= 1000, "{per_mille} of 1000");
        let rank = (self.count() * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return upper_end(bucket);
            }
        }
        0
    }

    /// (upper end, count) of each bucket that is not empty, ascending: for an exporter.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> {
        let all = self.counts.iter().enumerate();
        all.filter(|(_, count)| **count > 0).map(|(bucket, count)| (upper_end(bucket), *count))
    }
}

fn bucket_of(value: u64) -> usize {
    if value < SUB_BUCKETS as u64 {
        return value as usize;
    }
    let exponent = value.ilog2();
    if exponent >= EXPONENT_MAX {
        return BUCKETS - 1;
    }
    let within = (value >> (exponent - SUB_BITS)) as usize - SUB_BUCKETS;
    (exponent - SUB_BITS + 1) as usize * SUB_BUCKETS + within
}

/// Largest value that falls into the bucket.
fn upper_end(bucket: usize) -> u64 {
    if bucket == BUCKETS - 1 {
        return u64::MAX;
    }
    if bucket < SUB_BUCKETS {
        return bucket as u64;
    }
    let shift = (bucket / SUB_BUCKETS - 1) as u32;
    let within = (bucket % SUB_BUCKETS + SUB_BUCKETS) as u64;
    ((within + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn buckets_tile_the_numbers() {
        let mut lowest = 0;
        for bucket in 0..BUCKETS - 1 {
            let highest = upper_end(bucket);
            assert_eq!(bucket_of(lowest), bucket);
            assert_eq!(bucket_of(highest), bucket);
            assert!(highest - lowest <= lowest / 16, "bucket {bucket}: {lowest}..={highest}");
            lowest = highest + 1;
        }
        assert_eq!(lowest, 1 << EXPONENT_MAX);
        assert_eq!(bucket_of(lowest), BUCKETS - 1);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_agree_with_a_sorted_list() {
        let histogram = Histogram::default();
        let mut values = Vec::new();
        let mut random = 0x2545_F491_4F6C_DD1D_u64;
        for _ in 0..10_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            values.push(random >> (random % 30 + 25));
        }
        values.iter().for_each(|&value| histogram.record(value));
        values.sort_unstable();
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.count(), 10_000);
        assert_eq!(snapshot.sum(), values.iter().sum::<u64>());
        for per_mille in [1, 10, 250, 500, 990, 999, 1000] {
            let exact = values[(10 * per_mille as usize) - 1];
            let shown = snapshot.quantile(per_mille);
            assert!(shown >= exact && shown <= exact + exact / 16, "{per_mille}: {exact} {shown}");
        }
        let mut twice = snapshot.clone();
        twice.merge(&snapshot);
        assert_eq!(twice.count(), 20_000);
        assert_eq!(twice.quantile(500), snapshot.quantile(500));
        assert_eq!(twice.buckets().map(|(_, count)| count).sum::<u64>(), 20_000);
        assert_eq!(HistogramSnapshot::default().quantile(500), 0);
    }

    #[test]
    fn a_reader_on_another_thread_sees_the_end() {
        let counter = Arc::new(Counter::default());
        let shown = Arc::clone(&counter);
        let writer = std::thread::spawn(move || (0..1000).for_each(|_| shown.add(2)));
        writer.join().expect("counted");
        assert_eq!(counter.get(), 2000);
    }
}
