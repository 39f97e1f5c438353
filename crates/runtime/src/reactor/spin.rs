//! How long to look for events before sleeping.
//!
//! A sleep and its wake-up cost some 5 us of latency and more in a virtual machine; at queue depth
//! 1 that is most of a round trip. A spin costs a core. So the limit halves whenever a spin found
//! nothing and doubles when it did; below [`SPIN_MIN_NANOS`] it is off, and every
//! [`SLEEPS_BETWEEN_TRIALS`] sleeps it is tried again.

use std::time::Duration;

/// Below this a spin is hardly longer than its own look at the sockets.
const SPIN_MIN_NANOS: u64 = 2_000;
/// A failed trial costs at most [`SPIN_MIN_NANOS`] in this many sleeps.
const SLEEPS_BETWEEN_TRIALS: u32 = 64;

pub(super) struct Spin {
    max_nanos: u64,
    limit_nanos: u64,
    sleeps: u32,
}

impl Spin {
    pub fn new(max: Duration) -> Spin {
        // On a single processor the spin keeps away the very thread that it waits for.
        let is_alone = std::thread::available_parallelism().is_ok_and(|count| count.get() == 1);
        let max_nanos = if is_alone { 0 } else { max.as_nanos() as u64 };
        Spin { max_nanos, limit_nanos: max_nanos, sleeps: 0 }
    }

    /// How long to spin now; `None` for not at all.
    pub fn limit_nanos(&mut self) -> Option<u64> {
        if self.limit_nanos >= SPIN_MIN_NANOS {
            return Some(self.limit_nanos);
        }
        self.sleeps += 1;
        if self.sleeps >= SLEEPS_BETWEEN_TRIALS && self.max_nanos >= SPIN_MIN_NANOS {
            self.sleeps = 0;
            return Some(SPIN_MIN_NANOS);
        }
        None
    }

    /// A spin has ended, with or without an event.
    pub fn learn(&mut self, found: bool) {
        self.limit_nanos = if found {
            (2 * self.limit_nanos.max(SPIN_MIN_NANOS)).min(self.max_nanos)
        } else {
            self.limit_nanos / 2
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spin(max_nanos: u64) -> Spin {
        Spin { max_nanos, limit_nanos: max_nanos, sleeps: 0 }
    }

    #[test]
    fn useless_spins_end_and_useful_ones_come_back() {
        let mut spin = spin(20_000);
        let mut spent = 0;
        while let Some(nanos) = spin.limit_nanos() {
            spent += nanos;
            spin.learn(false);
        }
        assert!(spent <= 40_000, "{spent} ns before it gave up");
        let silent = (0..1000).filter(|_| spin.limit_nanos().is_none()).count();
        assert!((980..990).contains(&silent), "a trial every 64 sleeps: {silent}");
        spin.learn(true);
        assert_eq!(spin.limit_nanos(), Some(4_000));
        (0..5).for_each(|_| spin.learn(true));
        assert_eq!(spin.limit_nanos(), Some(20_000), "never above what was allowed");
    }

    #[test]
    fn none_allowed_means_none() {
        let mut spin = spin(0);
        assert!((0..1000).all(|_| spin.limit_nanos().is_none()));
    }
}
