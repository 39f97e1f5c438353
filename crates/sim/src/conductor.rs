//! The conductor as the stores see it: one linearizable register per shard, registrations, a failure
//! detector, and the transitions that it proposes itself.
//!
//! A configuration changes only by `shard::conf::transition::apply`, and is stored before anybody is
//! told. Everything it knows of stores comes over the network, so it is late, and sometimes wrong.

use proto::{Epoch, Lsn, Seq};
use shard::conf::transition::{Facts, Proposer, Refusal, Registration, Transition, apply};
use shard::conf::{CopyId, Incarnation, Member, ShardConf, StoreId};
use std::collections::BTreeMap;

const MILLI: u64 = 1_000_000;
/// Silence after which a store is suspected: as long as the promise of a heartbeat (G).
const SUSPECT_AFTER: u64 = 2_250 * MILLI;
/// A store that was heard within this time answers *now*.
const REACHABLE_WITHIN: u64 = 750 * MILLI;
/// How long the members of a lost ISR are waited for. At most 10 s by the rules; the shorter it is,
/// the more often a member comes back too late.
const GATHER: u64 = 3_000 * MILLI;

/// What a store's agent says from time to time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    /// Which store.
    pub store: StoreId,
    /// Its life.
    pub incarnation: Incarnation,
    /// Recovery found its journal whole.
    pub has_good_journal: bool,
    /// Of each shard: complete_lsn and the epoch that it follows.
    pub shards: Vec<(Seq, Epoch)>,
}

#[derive(Clone, Debug)]
struct Known {
    status: Status,
    heard: u64,
}

/// What the conductor wants told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Tell {
    /// This configuration to this store.
    Conf(StoreId, ShardConf),
    /// To every other store: this life is over.
    Dead(StoreId, Incarnation),
}

/// A configuration that was stored just now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stored {
    /// It.
    pub conf: ShardConf,
    /// T1 to T9.
    pub transition: &'static str,
    /// The store that proposed it, 0 for the conductor.
    pub by: StoreId,
}

/// The conductor.
pub struct Conductor {
    confs: Vec<ShardConf>,
    known: BTreeMap<StoreId, Known>,
    /// Identity of each store's disk.
    disks: BTreeMap<StoreId, Member>,
    /// Since when nobody of the ISR is there.
    gathering: Vec<Option<u64>>,
    /// Lives that are over for certain.
    ended: BTreeMap<StoreId, Incarnation>,
}

impl Conductor {
    /// The first configurations, and the disk of each store as a member that is not placed yet.
    #[must_use]
    pub fn new(confs: Vec<ShardConf>, disks: Vec<Member>) -> Conductor {
        let gathering = vec![None; confs.len()];
        let disks = disks.into_iter().map(|member| (member.store, member)).collect();
        Conductor { confs, known: BTreeMap::new(), disks, gathering, ended: BTreeMap::new() }
    }

    /// What is stored.
    #[must_use]
    pub fn conf(&self, shard: u32) -> &ShardConf {
        &self.confs[shard as usize]
    }

    /// A store's agent has spoken. True if it is a life that was not registered yet.
    pub fn heard(&mut self, now: u64, status: Status, out: &mut Vec<Tell>) -> bool {
        let before = self.known.get(&status.store).map(|known| known.status.incarnation);
        if before.is_some_and(|before| before > status.incarnation) {
            // A message that was under way when the store restarted.
            return false;
        }
        let is_new = before != Some(status.incarnation);
        if let Some(before) = before.filter(|_| is_new) {
            out.push(Tell::Dead(status.store, before));
        }
        for (conf, (_, epoch)) in self.confs.iter().zip(&status.shards) {
            if conf.on_store(status.store).is_some() && *epoch < conf.epoch {
                out.push(Tell::Conf(status.store, conf.clone()));
            }
        }
        self.known.insert(status.store, Known { status, heard: now });
        is_new
    }

    /// A replica proposes.
    pub fn proposed(
        &mut self,
        now: u64,
        (store, incarnation): (StoreId, Incarnation),
        (shard, epoch): (u32, Epoch),
        transition: &Transition,
    ) -> Result<Stored, Refusal> {
        let copy = self.conf(shard).on_store(store).map_or(CopyId::MAX, |member| member.copy);
        let proposer = Proposer::Replica { copy, incarnation };
        self.store(now, shard, epoch, transition, proposer, store)
    }

    fn store(
        &mut self,
        now: u64,
        shard: u32,
        epoch: Epoch,
        transition: &Transition,
        proposer: Proposer,
        by: StoreId,
    ) -> Result<Stored, Refusal> {
        let facts = self.facts(now, shard, proposer);
        let conf = apply(self.conf(shard), epoch, transition, &facts)?;
        self.confs[shard as usize] = conf.clone();
        Ok(Stored { conf, transition: transition.name(), by })
    }

    fn facts(&self, now: u64, shard: u32, proposer: Proposer) -> Facts {
        let registered = self.known.iter().map(|(&store, known)| {
            let registration = Registration {
                incarnation: known.status.incarnation,
                is_reachable: now <= known.heard + REACHABLE_WITHIN,
                has_good_journal: known.status.has_good_journal,
            };
            (store, registration)
        });
        let conf = self.conf(shard);
        let complete = conf.isr_members().filter_map(|member| {
            let (seq, _) = *self.known.get(&member.store)?.status.shards.get(shard as usize)?;
            // seq alone is compared: it is dense and never reused along one history.
            Some((member.copy, Lsn { epoch: Epoch(0), seq }))
        });
        let (registered, complete) = (registered.collect(), complete.collect());
        Facts { proposer, registered, complete, ended: self.ended.clone() }
    }

    fn is_reachable(&self, now: u64, store: StoreId) -> bool {
        self.known.get(&store).is_some_and(|known| now <= known.heard + REACHABLE_WITHIN)
    }

    fn is_suspected(&self, now: u64, store: StoreId) -> bool {
        self.known.get(&store).is_none_or(|known| now > known.heard + SUSPECT_AFTER)
    }

    /// Another life than the one that the configuration names has registered.
    fn is_stale(&self, member: &Member) -> bool {
        let known = self.known.get(&member.store);
        known.is_some_and(|known| known.status.incarnation != member.incarnation)
    }

    fn is_there(&self, now: u64, member: &Member) -> bool {
        !self.is_stale(member) && self.is_reachable(now, member.store)
    }

    /// Look at every shard; at most one transition each.
    pub fn tick(&mut self, now: u64, out: &mut Vec<Stored>) {
        for shard in 0..self.confs.len() as u32 {
            let Some(transition) = self.decide(now, shard) else { continue };
            let epoch = self.conf(shard).epoch;
            let stored = self.store(now, shard, epoch, &transition, Proposer::Conductor, 0);
            // A guard that is stricter than the plan above: it is looked at again soon.
            out.extend(stored.ok());
        }
    }

    /// Fence the writers of every attach before this one.
    pub fn attach(&mut self, now: u64, attach_epoch: u64, out: &mut Vec<Stored>) {
        for shard in 0..self.confs.len() as u32 {
            let epoch = self.conf(shard).epoch;
            let transition = Transition::Attach { attach_epoch };
            let stored = self.store(now, shard, epoch, &transition, Proposer::Conductor, 0);
            out.extend(stored.ok());
        }
    }

    /// Leave a member out of its ISR although it is well, if the guards say that it can be spared.
    pub fn demote(&mut self, now: u64, shard: u32, copy: CopyId) -> Option<Stored> {
        let (epoch, transition) = (self.conf(shard).epoch, Transition::Remove { copy });
        self.store(now, shard, epoch, &transition, Proposer::Conductor, 0).ok()
    }

    /// The end of a life was seen, by somebody who can be believed.
    pub fn ended(&mut self, store: StoreId, incarnation: Incarnation) {
        self.ended.insert(store, incarnation);
    }

    /// A person lets the copy outside the ISR count that has the most, if the guards allow any (T7).
    pub fn force_accept(&mut self, now: u64, shard: u32) -> Option<Stored> {
        let conf = self.conf(shard).clone();
        let seq = |member: &Member| {
            let known = self.known.get(&member.store)?;
            known.status.shards.get(shard as usize).map(|(seq, _)| *seq)
        };
        let is_out = |member: &&Member| !conf.isr.contains(&member.copy);
        let mut outside: Vec<Member> = conf.members.iter().filter(is_out).copied().collect();
        outside.sort_by_key(|member| std::cmp::Reverse(seq(member)));
        let history_id = conf.next_history();
        outside.into_iter().find_map(|member| {
            let incarnation = self.known.get(&member.store)?.status.incarnation;
            let member = Member { incarnation, ..member };
            let transition = Transition::ForceAccept { member, history_id };
            self.store(now, shard, conf.epoch, &transition, Proposer::Human, 0).ok()
        })
    }

    fn decide(&mut self, now: u64, shard: u32) -> Option<Transition> {
        let conf = self.confs[shard as usize].clone();
        if !conf.isr_members().any(|member| self.is_there(now, member)) {
            return self.reopen(now, shard, &conf);
        }
        self.gathering[shard as usize] = None;
        let primary = conf.primary_member();
        if self.is_stale(primary) || self.is_suspected(now, primary.store) {
            let mut others = conf.isr_members().filter(|member| member.copy != conf.primary);
            let next = others.find(|member| self.is_there(now, member))?;
            return Some(Transition::Promote { copy: next.copy });
        }
        let stale = conf.isr_members().find(|member| self.is_stale(member));
        if let Some(member) = stale {
            return Some(Transition::Remove { copy: member.copy });
        }
        let is_lost =
            |member: &&Member| self.is_stale(member) || self.is_suspected(now, member.store);
        if let Some(member) = conf.learner_members().find(is_lost) {
            return Some(Transition::Cancel { copy: member.copy });
        }
        if conf.isr.len() + conf.learners.len() < usize::from(conf.rf) {
            return self.add_learner(now, &conf);
        }
        None
    }

    /// Every member of the ISR is lost at once: wait for those that come back, then go on with the
    /// one that has the most.
    fn reopen(&mut self, now: u64, shard: u32, conf: &ShardConf) -> Option<Transition> {
        let since = *self.gathering[shard as usize].get_or_insert(now);
        let back = |member: &&Member| self.is_stale(member) && self.is_reachable(now, member.store);
        let is_whole = conf.isr_members().all(|member| back(&member));
        if !is_whole && now < since + GATHER {
            return None;
        }
        let present: Vec<Member> = conf
            .isr_members()
            .filter(back)
            .filter(|member| self.known[&member.store].status.has_good_journal)
            .map(|member| {
                let incarnation = self.known[&member.store].status.incarnation;
                Member { incarnation, ..*member }
            })
            .collect();
        let complete = |member: &Member| {
            let shards = &self.known[&member.store].status.shards;
            shards.get(shard as usize).map_or(Seq(0), |(seq, _)| *seq)
        };
        let primary = present.iter().max_by_key(|member| complete(member))?.copy;
        Some(Transition::Reopen { primary, present })
    }

    fn add_learner(&self, now: u64, conf: &ShardConf) -> Option<Transition> {
        let is_free = |store: &StoreId| {
            let copy = conf.on_store(*store).map(|member| member.copy);
            copy.is_none_or(|copy| !conf.isr.contains(&copy) && !conf.learners.contains(&copy))
        };
        // Members first: they have most of the content.
        let mut stores: Vec<StoreId> = self.disks.keys().copied().filter(is_free).collect();
        stores.sort_by_key(|store| (conf.on_store(*store).is_none(), *store));
        let store = stores.into_iter().find(|store| self.is_reachable(now, *store))?;
        let incarnation = self.known[&store].status.incarnation;
        Some(Transition::AddLearner { member: Member { incarnation, ..self.disks[&store] } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::shard_id;

    fn member(copy: u8) -> Member {
        let store = StoreId::from(copy) + 1;
        Member { copy, store, incarnation: store, disk: [copy; 16], format_uuid: [9; 16] }
    }

    fn conductor() -> Conductor {
        let members: Vec<Member> = (0..3).map(member).collect();
        let conf = ShardConf::first(shard_id(0), (3, 2), 0, members.clone(), (1, 1));
        Conductor::new(vec![conf.expect("sound")], members)
    }

    fn hear(conductor: &mut Conductor, now: u64, lives: &[(StoreId, Incarnation)]) -> Vec<Tell> {
        let mut out = Vec::new();
        for &(store, incarnation) in lives {
            let shards = vec![(Seq(incarnation), Epoch(1))];
            let status = Status { store, incarnation, has_good_journal: true, shards };
            conductor.heard(now, status, &mut out);
        }
        out
    }

    fn tick(conductor: &mut Conductor, now: u64) -> Vec<&'static str> {
        let mut out = Vec::new();
        conductor.tick(now, &mut out);
        out.iter().map(|stored| stored.transition).collect()
    }

    #[test]
    fn a_silent_primary_is_replaced_and_comes_back_as_a_learner() {
        let mut conductor = conductor();
        hear(&mut conductor, 0, &[(1, 1), (2, 2), (3, 3)]);
        assert!(tick(&mut conductor, 1).is_empty(), "all is well");
        let now = SUSPECT_AFTER + 1;
        hear(&mut conductor, now, &[(2, 2), (3, 3)]);
        assert_eq!(tick(&mut conductor, now), ["T2"]);
        assert_eq!((conductor.conf(0).primary, &conductor.conf(0).isr[..]), (1, &[1, 2][..]));
        let told = hear(&mut conductor, now + 1, &[(1, 7)]);
        assert_eq!(told[0], Tell::Dead(1, 1));
        assert!(matches!(&told[1], Tell::Conf(1, conf) if conf.epoch == Epoch(2)));
        assert_eq!(tick(&mut conductor, now + 2), ["T3"]);
        assert_eq!(conductor.conf(0).member(0).expect("a member").incarnation, 7);
    }

    #[test]
    fn a_restarted_secondary_is_removed() {
        let mut conductor = conductor();
        hear(&mut conductor, 0, &[(1, 1), (2, 2), (3, 3)]);
        hear(&mut conductor, 1, &[(3, 8)]);
        assert_eq!(tick(&mut conductor, 2), ["T1"]);
        assert_eq!(conductor.conf(0).isr, [0, 1]);
    }

    #[test]
    fn a_member_that_is_well_is_left_out_while_two_others_are() {
        let mut conductor = conductor();
        hear(&mut conductor, 0, &[(1, 1), (2, 2), (3, 3)]);
        let stored = conductor.demote(1, 0, 2).expect("two others are there");
        assert_eq!((stored.transition, &stored.conf.isr[..]), ("T1", &[0, 1][..]));
        assert_eq!(conductor.demote(2, 0, 1), None, "one would be left");
        assert_eq!(tick(&mut conductor, 3), ["T3"]);
    }

    #[test]
    fn a_lost_isr_is_gathered_before_it_is_opened_again() {
        let mut conductor = conductor();
        hear(&mut conductor, 0, &[(1, 1), (2, 2), (3, 3)]);
        hear(&mut conductor, 1, &[(1, 11), (2, 12)]);
        let later = 1 + SUSPECT_AFTER;
        hear(&mut conductor, later, &[(1, 11), (2, 12)]);
        assert!(tick(&mut conductor, later).is_empty(), "store 3 may come back");
        let late = later + GATHER;
        hear(&mut conductor, late, &[(1, 11), (2, 12)]);
        assert_eq!(tick(&mut conductor, late), ["T6"]);
        let conf = conductor.conf(0);
        assert_eq!((conf.primary, &conf.isr[..]), (1, &[0, 1][..]), "most complete");
    }
}
