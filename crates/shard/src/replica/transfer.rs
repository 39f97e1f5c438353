//! Giving the reign to another member of the ISR, without its end being noticed (T5).
//!
//! A primary that is asked to stops beginning requests, lets those under way end, and only then gives
//! back what it was promised (RELEASE) and proposes. From that moment it neither reads nor orders
//! anything in this configuration: the next primary serves as soon as it has the new one and the
//! RELEASE. Whether the proposal was stored is known only from a newer configuration (section 2). One
//! that still names this life primary makes it void, because it was for an epoch that is past, and the
//! reign goes on; any other ends the reign as always. What cannot be drained in a moment is not
//! transferred: until the RELEASE nothing has happened.

use super::{Ctx, Effect, Mutant, Replica, Role};
use crate::conf::CopyId;
use crate::conf::transition::Transition;
use proto::Tick;

/// How long requests under way may take to end; those that come meanwhile wait.
const DRAIN_MS: u64 = 1_000;

/// A reign that is being given away.
pub(super) struct Leaving {
    to: CopyId,
    since: Tick,
    /// The promises were given back: this reign serves nothing more in this configuration.
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
    /// The conductor asks for a transfer. It asks again, if it still wants to: what does not fit the
    /// present state is passed over.
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

    /// Go on with a transfer as far as the requests under way allow.
    pub(super) fn drain(&mut self, ctx: &mut Ctx<'_, '_>) {
        let Some(reign) = &mut self.reign else { return };
        let Some(leaving) = reign.leaving.as_mut().filter(|leaving| !leaving.is_released) else {
            return;
        };
        let is_drained = reign.open.is_empty() && reign.clients.is_idle() && !reign.is_suspended;
        if is_drained {
            leaving.is_released = true;
            let transition = Transition::Transfer { copy: leaving.to };
            ctx.out.push(Effect::Release);
            self.set_role(ctx, Role::Leaving);
            self.propose(ctx, transition);
            if self.mutant(Mutant::ReleasedGoesOn) {
                self.reign().leaving = None;
                self.unpark(ctx);
            }
        } else if ctx.now >= leaving.since.after_millis(DRAIN_MS) {
            reign.leaving = None;
            self.unpark(ctx);
        }
    }
}
