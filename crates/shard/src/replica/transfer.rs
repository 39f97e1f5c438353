//! Giving the reign to another member of the ISR, without its end being noticed (T5).
//!
//! A primary that is asked for a transfer begins no more requests, lets those under way end, and
//! only then gives back the promises that others made to it (RELEASE) and proposes the transfer.
//! From that moment it neither reads nor orders anything: the next primary serves as soon as it has
//! the new configuration and the RELEASE. A newer configuration says what became of the transfer.
//! When none comes for a while, the reign goes on as if it had begun just now: it claims its leases
//! anew and counts nothing that was promised before. That the proposal may still be stored later
//! does no harm: the next primary then waits until the promises that it has made since have ended,
//! and settles what was not committed, as after any failover.
//!
//! So neither a conductor that dies in between nor requests that do not end stop the shard for long.

use super::{Ctx, Effect, Mutant, Replica, Role};
use crate::conf::CopyId;
use crate::conf::transition::Transition;
use proto::Tick;

/// How long requests under way may take to end, and after that the answer; new requests wait
/// meanwhile.
const PATIENCE_MS: u64 = 1_000;

/// A reign that is being given away.
pub(super) struct Leaving {
    to: CopyId,
    /// When it began to wait: for requests under way, then for a configuration.
    since: Tick,
    /// The promises were given back.
    is_released: bool,
}

impl Leaving {
    pub(super) fn is_released(&self) -> bool {
        self.is_released
    }

    pub(super) fn proposal(&self) -> Option<Transition> {
        self.is_released.then_some(Transition::Transfer { copy: self.to })
    }
}

impl Replica {
    /// The conductor asks for a transfer. The conductor asks again while it wants the transfer, so
    /// a request that does not fit the present state is passed over.
    pub(super) fn begin_transfer(&mut self, ctx: &mut Ctx<'_, '_>, to: CopyId) {
        let is_fit = self.stored.conf.as_ref().is_some_and(|conf| {
            conf.isr.contains(&to) && to != conf.primary && conf.learners.is_empty()
        });
        let now = ctx.now;
        let Some(reign) = self.reign.as_mut().filter(|reign| reign.is_serving()) else { return };
        if is_fit && reign.leaving.is_none() && reign.verify.is_none() {
            reign.leaving = Some(Leaving { to, since: now, is_released: false });
        }
    }

    /// Go on with a transfer as far as requests under way and the conductor allow.
    pub(super) fn drain(&mut self, ctx: &mut Ctx<'_, '_>) {
        let Some(reign) = &mut self.reign else { return };
        let Some(leaving) = &mut reign.leaving else { return };
        if reign.is_suspended {
            // Somebody has promised a newer configuration: that one decides.
            reign.leaving = None;
            return;
        }
        let is_late = ctx.now >= leaving.since.after_millis(PATIENCE_MS);
        if leaving.is_released && is_late {
            reign.leaving = None;
            self.set_role(ctx, Role::Active);
            self.claim(ctx);
            self.unpark(ctx);
        } else if !leaving.is_released && reign.open.is_empty() && reign.clients.is_idle() {
            (leaving.is_released, leaving.since) = (true, ctx.now);
            let transition = Transition::Transfer { copy: leaving.to };
            ctx.out.push(Effect::Release);
            self.set_role(ctx, Role::Leaving);
            self.propose(ctx, transition);
            if self.mutant(Mutant::ReleasedGoesOn) {
                self.reign().leaving = None;
                self.unpark(ctx);
            }
        } else if is_late {
            reign.leaving = None;
            self.unpark(ctx);
        }
    }
}
