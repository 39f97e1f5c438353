//! Following configurations: the promise, what is stored, and the role that results.
//!
//! "On a higher epoch a replica (1) stops accepting, (2) waits until every accepted operation is
//! durable or failed, (3) persists the promise, (4) only then answers or computes its own tail"
//! (section 3). A primary that stays primary goes on serving meanwhile: the configuration that it
//! leaves requires at least as much.

use super::follower::Follower;
use super::{Ctx, Effect, Mutant, Replica, Role, ShardConf, Stored, Work};
use crate::replica::Note;
use lane::{Op, Outcome, Problem};
use proto::{Seq, Status};

/// A configuration on its way from known to followed.
pub(super) struct Adopting {
    conf: ShardConf,
    /// A still newer one that came meanwhile.
    next: Option<ShardConf>,
    stage: Stage,
}

#[derive(PartialEq, Eq)]
enum Stage {
    /// Accepted operations are still in flight.
    Quiescing,
    /// It is being stored.
    Storing(Stored),
}

impl Replica {
    /// A configuration has come, from whomever.
    pub(super) fn learn(&mut self, ctx: &mut Ctx<'_, '_>, conf: ShardConf) {
        let known = self
            .adopting
            .as_ref()
            .map(|adopting| adopting.next.as_ref().map_or(adopting.conf.epoch, |next| next.epoch));
        if conf.shard != self.shard || conf.epoch <= known.unwrap_or_else(|| self.epoch()) {
            return;
        }
        self.promised = self.promised.max(conf.epoch);
        ctx.out.push(Effect::Promise { epoch: self.promised });
        match &mut self.adopting {
            Some(adopting) => adopting.next = Some(conf),
            None => self.begin_adoption(ctx, conf),
        }
    }

    /// A reign does not outlive its history: a person may choose the copy of a primary that was out
    /// of sight while others were primary, and such a primary knows nothing of their reigns.
    fn stays_primary(&self, conf: &ShardConf) -> bool {
        let is_same_history =
            self.stored.conf.as_ref().is_some_and(|old| old.history_id == conf.history_id);
        self.reign.is_some() && self.is_me(conf.primary_member()) && is_same_history
    }

    fn begin_adoption(&mut self, ctx: &mut Ctx<'_, '_>, conf: ShardConf) {
        if self.reign.is_some() && !self.stays_primary(&conf) {
            self.end_reign(ctx);
        }
        self.adopting = Some(Adopting { conf, next: None, stage: Stage::Quiescing });
        self.settle_adoption(ctx);
    }

    /// Store the configuration once nothing accepted under the old one is in flight.
    pub(super) fn settle_adoption(&mut self, ctx: &mut Ctx<'_, '_>) {
        let Some(adopting) = &self.adopting else { return };
        let may_go_on = self.stays_primary(&adopting.conf)
            || self.changes_open == 0
            || self.mutant(Mutant::NoQuiesceAtPromise);
        if adopting.stage != Stage::Quiescing || !may_go_on {
            return;
        }
        let conf = adopting.conf.clone();
        let stored = Stored {
            promised: self.promised,
            frozen: self.frozen_under(ctx, &conf),
            conf: Some(conf),
        };
        let blob = stored.encode();
        self.adopting.as_mut().expect("looked at above").stage = Stage::Storing(stored);
        if self.mutant(Mutant::PromiseNotPersisted) {
            return self.persisted(ctx, Ok(Outcome::Done));
        }
        let request = Op::Conf { shard_ix: self.options.shard_ix, blob };
        self.lane(ctx, Work::Persist, request);
    }

    /// complete_lsn under a configuration: frozen at the moment of leaving the ISR, and thawed when
    /// taken in again, because admission has shown that everything is there.
    fn frozen_under(&self, ctx: &Ctx<'_, '_>, conf: &ShardConf) -> Option<Seq> {
        let me = conf.on_store(self.options.store).filter(|member| self.is_me(member));
        if me.is_some_and(|me| conf.isr.contains(&me.copy)) {
            return None;
        }
        match &self.stored.conf {
            Some(old) if old.history_id == conf.history_id => Some(self.complete(ctx.view)),
            // Nothing that this replica holds is of the new history.
            Some(_) | None => Some(Seq(0)),
        }
    }

    pub(super) fn persisted(&mut self, ctx: &mut Ctx<'_, '_>, result: Result<Outcome, Problem>) {
        let Some(Adopting { stage: Stage::Storing(stored), next, .. }) = self.adopting.take()
        else {
            unreachable!("only an adoption stores");
        };
        if result.is_err() {
            // The lane has stopped: this replica promises nothing and serves nothing any more.
            if self.reign.is_some() {
                self.end_reign(ctx);
            }
            self.set_role(ctx, Role::Fenced);
            return;
        }
        let epoch = stored.promised;
        let before = std::mem::replace(&mut self.stored, stored).conf;
        ctx.out.push(Effect::Note(Note::Promised { epoch }));
        self.adopted_at = Some(ctx.now);
        self.fetched_at = None;
        self.proposed_at = None;
        if self.reign.is_some() {
            self.reconfigured(ctx);
        } else {
            self.take_role(ctx, before.as_ref());
        }
        for held in std::mem::take(&mut self.held) {
            self.peer_asks(ctx, held);
        }
        self.unpark(ctx);
        if let Some(next) = next {
            self.begin_adoption(ctx, next);
        }
    }

    /// The role that the configuration gives.
    fn take_role(&mut self, ctx: &mut Ctx<'_, '_>, before: Option<&ShardConf>) {
        let conf = self.stored.conf.as_ref().expect("just stored");
        let me = conf.on_store(self.options.store).filter(|member| self.is_me(member));
        let role = match me.map(|me| me.copy) {
            Some(copy) if conf.primary == copy => Role::Settling,
            Some(copy) if conf.isr.contains(&copy) => Role::Secondary,
            Some(copy) if conf.learners.contains(&copy) => Role::Learner,
            Some(_) | None => Role::Out,
        };
        let primary = *conf.primary_member();
        // What a learner knows of its content counts in one reign: seqs of the last one may be
        // above those of a new primary that never saw them.
        let is_new_reign = before.is_none_or(|before| *before.primary_member() != primary);
        let was = self.role;
        self.set_role(ctx, role);
        match role {
            Role::Settling => self.begin_reign(ctx),
            Role::Learner if was != Role::Learner || is_new_reign => {
                self.follower.begin_learning();
            }
            Role::Secondary if was == Role::Learner => self.clear_suspects(ctx),
            Role::Secondary | Role::Learner => {}
            Role::Out => self.follower = Follower::new(self.follower.commit),
            Role::Active | Role::Suspended | Role::Leaving | Role::Fenced => {
                unreachable!("no configuration gives it")
            }
        }
        if role != Role::Settling {
            for request in std::mem::take(&mut self.parked) {
                let result = Err(Status::NotPrimary);
                ctx.out.push(Effect::Reply { token: request.token, result });
            }
        }
    }

    /// Admitted: every region was shown to be equal, nothing of it is in doubt any more.
    fn clear_suspects(&mut self, ctx: &mut Ctx<'_, '_>) {
        let shard_ix = self.options.shard_ix;
        let shard = ctx.view.tables.shard(shard_ix).expect("the lane holds the replica");
        let suspect = shard.regions.iter().enumerate().filter(|(_, value)| **value & 1 == 1);
        let clean: Vec<(u32, u64)> =
            suspect.map(|(region, value)| (region as u32, value & !1)).collect();
        for (region, value) in clean {
            self.lane(ctx, Work::Unwatched, Op::Region { shard_ix, region, value });
        }
    }
}
