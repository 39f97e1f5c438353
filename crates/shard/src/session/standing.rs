//! Whether the attach that a session stands on is still the newest of its volume.
//!
//! ```text
//! ATTACHED --a store refuses with FENCED--> FENCED --5 s--> TAKEN_OVER
//!    ^                                         |                |
//!    +--------- a newer attach epoch ----------+----------------+
//! ```
//!
//! FENCED is final for the attach epoch that heard it: attach epochs of a shard only grow. But a
//! session may be about to get a newer one, because a gateway's export follows its volume. So the
//! requests stay parked for [`FENCED_MS`] and are tried again meanwhile; if no newer ticket has come
//! by then, somebody else writes the volume, and whoever waits here must be told instead of waiting
//! for ever. That answer revokes no request: a write that was sent before the fence, over a
//! connection that was lost, may have been carried out, so a failed write's outcome is unknown.

use super::{Effect, Session, Timer};
use proto::{Status, Tick};

/// Time that requests which were refused with FENCED wait for a newer ticket: ten times the pause
/// after which a client that follows its volume has asked for one, and longer than a conductor takes
/// to push one.
pub const FENCED_MS: u64 = 5_000;

/// See the module's head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Standing {
    /// As far as is known it is the newest.
    Attached,
    /// There is a newer one. A ticket for it is waited for.
    Fenced {
        /// Not longer than this.
        until: Tick,
    },
    /// The newer one is somebody else's: every request fails.
    TakenOver,
}

impl Session {
    /// A store has refused a request because it knows a newer attach.
    pub(super) fn hear_fenced(&mut self, now: Tick) {
        match self.standing {
            Standing::Attached => {
                let until = now.after_millis(FENCED_MS);
                self.standing = Standing::Fenced { until };
                self.timers.insert((until, Timer::Standing));
            }
            // The time runs from the first refusal.
            Standing::Fenced { .. } => {}
            Standing::TakenOver => unreachable!("nothing is under way that could be refused"),
        }
    }

    /// A ticket of a newer attach has come.
    pub(super) fn attach_again(&mut self) {
        match std::mem::replace(&mut self.standing, Standing::Attached) {
            Standing::Attached | Standing::TakenOver => {}
            Standing::Fenced { until } => {
                self.timers.remove(&(until, Timer::Standing));
            }
        }
    }

    /// No newer ticket has come in time: whoever waits is told.
    pub(super) fn yield_attach(&mut self, out: &mut Vec<Effect>) {
        assert!(matches!(self.standing, Standing::Fenced { .. }), "its timer ends with it");
        self.standing = Standing::TakenOver;
        for key in self.wholes.keys() {
            self.abandon(key, Status::Fenced, out);
        }
        assert!(self.pieces.len() == 0, "all pieces were of requests that were answered");
    }
}
