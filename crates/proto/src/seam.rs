//! The seam between a machine and the world.
//!
//! A machine is synchronous and single-threaded: an event in, effects out, no clock, no socket, no
//! callback. Production, the simulator and Python tests drive the same types through it.

/// A point on the monotonic clock (`CLOCK_BOOTTIME`), or on the simulator's virtual clock.
///
/// Units: nanoseconds since an arbitrary start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Tick(pub u64);

impl Tick {
    /// This point plus `nanos` nanoseconds.
    #[must_use]
    pub fn after_nanos(self, nanos: u64) -> Tick {
        Tick(self.0 + nanos)
    }

    /// This point plus `millis` milliseconds.
    #[must_use]
    pub fn after_millis(self, millis: u64) -> Tick {
        Tick(self.0 + millis * 1_000_000)
    }
}

/// What every machine is: one function from an event to effects.
pub trait Machine {
    /// What the world tells the machine.
    type Event;
    /// What the machine asks of the world. Appended to, never cleared, by `step`.
    type Effects;

    /// Handle one event at `now`.
    fn step(&mut self, now: Tick, event: Self::Event, out: &mut Self::Effects);
}
