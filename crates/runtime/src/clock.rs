//! The one clock of the data path.
//!
//! `CLOCK_BOOTTIME` and not `CLOCK_MONOTONIC`: leases must go on running while a machine sleeps, or
//! a resumed primary would believe in a lease that the others gave up long ago. A reading goes
//! through the vDSO (about 25 ns, no system call). Called by the reactor once per loop; machines
//! get the value as a parameter.

use proto::Tick;
use rustix::time::{ClockId, clock_gettime};

/// The time now. Units: nanoseconds since boot, suspended time included.
#[must_use]
pub fn now() -> Tick {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).expect("boot time is never negative");
    let nanos = u64::try_from(time.tv_nsec).expect("a normalised timespec has tv_nsec >= 0");
    Tick(seconds * 1_000_000_000 + nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_never_runs_backwards() {
        let mut before = now();
        assert!(before.0 > 0);
        for _ in 0..1000 {
            let after = now();
            assert!(after >= before);
            before = after;
        }
    }
}
