//! The world's own idea of the truth, and the invariants of docs/internals/replication.md section
//! 9.
//!
//! It is told everything that happens, believes nobody, and remembers the first contradiction. It
//! looks at no machine from inside: what a replica claims in its notes is compared with what the
//! register stored, what the lanes were asked to write and what clients were told.
//!
//! Where which invariant is checked: I2, I4, I6, I8, I9, I10, I13, I20, I21 here, with every fact;
//! I3, I15, I20, I27 in `history`; I7 here with every stored configuration; I1, I5, I14, I16, I17,
//! I22, I23, I29 and I30 by the world at marked points, with what `history` allows; I12 by the
//! world, which knows the connections; I19 here, when a primary compares a region with what a
//! learner made of it; I28 is the trace's hash.

use crate::history::History;
use proto::{Epoch, Lsn};
use shard::conf::transition::is_legal_step;
use shard::conf::{Incarnation, ShardConf, StoreId};
use shard::replica::{Note, Role};
use std::collections::{BTreeMap, BTreeSet};

/// One life of one replica.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    /// Index of the shard in its volume.
    pub shard: u32,
    /// The store.
    pub store: StoreId,
    /// Its life.
    pub incarnation: Incarnation,
}

/// What an operation put into its blocks: first block, one value each (0: zeros).
type Logged = (u32, Vec<u64>);

#[derive(Default)]
struct Shard {
    confs: Vec<ShardConf>,
    /// What the lanes were asked to log, by lsn.
    logged: BTreeMap<Lsn, Logged>,
    /// Who says that the operation is durable there.
    durable: BTreeMap<Lsn, BTreeSet<(StoreId, Incarnation)>>,
    /// Who committed in each epoch.
    committers: BTreeMap<Epoch, StoreId>,
    committed: BTreeSet<Lsn>,
    /// Operations of a primary that are not committed.
    open: BTreeMap<(StoreId, Incarnation), BTreeMap<Lsn, (u32, u32)>>,
    /// When somebody became active: moment, store, epoch.
    active: Vec<(u64, StoreId, Epoch)>,
    roles: BTreeMap<(StoreId, Incarnation), Role>,
    /// When a client's operation on a block last got an lsn.
    assigned: BTreeMap<u32, u64>,
    promised: BTreeMap<StoreId, Epoch>,
    /// Its history is not its first.
    is_forced: bool,
}

impl Shard {
    /// The last stored configuration of the reign that began in this epoch.
    fn last_of_reign(&self, began: Epoch, primary: Place) -> Option<&ShardConf> {
        let from = self.confs.iter().position(|conf| conf.epoch == began)?;
        let is_its = |conf: &&ShardConf| {
            let member = conf.primary_member();
            (member.store, member.incarnation) == (primary.store, primary.incarnation)
        };
        self.confs[from..].iter().take_while(is_its).last()
    }
}

/// The checker of one world.
pub struct Check {
    /// What clients saw.
    pub history: History,
    shards: Vec<Shard>,
    /// Newest registration of each store, and all earlier ones.
    registered: BTreeMap<StoreId, Vec<Incarnation>>,
    /// Values that were committed: I4 asks for every value that is read.
    committed_values: BTreeSet<u64>,
    violation: Option<String>,
}

impl Check {
    /// Nothing has happened in this many shards.
    #[must_use]
    pub fn new(shards: usize) -> Check {
        Check {
            history: History::default(),
            shards: (0..shards).map(|_| Shard::default()).collect(),
            registered: BTreeMap::new(),
            committed_values: BTreeSet::new(),
            violation: None,
        }
    }

    /// The first contradiction.
    #[must_use]
    pub fn violation(&self) -> Option<&str> {
        self.violation.as_deref()
    }

    /// A contradiction found by somebody else.
    pub fn fail(&mut self, why: impl Into<String>) {
        self.violation.get_or_insert_with(|| why.into());
    }

    /// As `fail`, if there is one.
    pub fn expect(&mut self, result: Result<(), String>) {
        if let Err(why) = result {
            self.fail(why);
        }
    }

    fn shard(&mut self, shard: u32) -> &mut Shard {
        &mut self.shards[shard as usize]
    }

    /// The configuration that is stored now.
    #[must_use]
    pub fn conf(&self, shard: u32) -> &ShardConf {
        self.shards[shard as usize].confs.last().expect("the first one is stored at the start")
    }

    /// The role that this life last said to have.
    #[must_use]
    pub fn role(&self, place: Place) -> Option<Role> {
        let shard = &self.shards[place.shard as usize];
        shard.roles.get(&(place.store, place.incarnation)).copied()
    }

    /// Whether a client's operation on this block got an lsn since this moment.
    #[must_use]
    pub fn is_changing(&self, shard: u32, block: u32, since: u64) -> bool {
        let assigned = self.shards[shard as usize].assigned.get(&block);
        assigned.is_some_and(|&moment| moment > since)
    }

    /// A person has decided which copy of a shard counts: what it holds of these blocks may be any
    /// value that was ever written there, and some that nobody has may be lost for good.
    pub fn forced(&mut self, shard: u32, blocks: &[u64]) {
        self.shard(shard).is_forced = true;
        let values = self.history.forced(blocks);
        self.committed_values.extend(values);
    }

    /// A life of a store is registered.
    pub fn registered(&mut self, store: StoreId, incarnation: Incarnation) {
        let lives = self.registered.entry(store).or_default();
        match lives.last() {
            Some(&last) if last == incarnation => {}
            Some(&last) if last > incarnation => {
                let why = format!("I6: store {store} registers life {incarnation} after {last}");
                self.fail(why);
            }
            Some(_) | None => lives.push(incarnation),
        }
    }

    /// A configuration is stored; nobody was told yet.
    pub fn stored(&mut self, now: u64, conf: &ShardConf) {
        let index = conf.shard.index;
        let shard = &self.shards[index as usize];
        let mut why = None;
        if let Some(before) = shard.confs.last() {
            if is_legal_step(before, conf).is_none() {
                why = Some(format!("I7: no transition leads from {before:?} to {conf:?}"));
            }
            if conf.attach_epoch < before.attach_epoch {
                why = Some(format!("I6: shard {index} goes back to attach epoch {conf:?}"));
            }
        }
        for member in conf.isr_members() {
            let lives = self.registered.get(&member.store);
            if !lives.is_some_and(|lives| lives.contains(&member.incarnation)) {
                why = Some(format!(
                    "I8: at {now} ns the ISR of shard {index} names life {} of store {}, which \
                     never registered",
                    member.incarnation, member.store
                ));
            }
            let was_in = shard.confs.last().is_some_and(|before| {
                before.isr_members().any(|other| {
                    (other.store, other.incarnation) == (member.store, member.incarnation)
                })
            });
            let newest = lives.and_then(|lives| lives.last());
            if !was_in && newest != Some(&member.incarnation) {
                why = Some(format!(
                    "I8: at {now} ns store {} enters the ISR of shard {index} in life {}, {newest:?} \
                     is registered",
                    member.store, member.incarnation
                ));
            }
        }
        if let Some(why) = why {
            self.fail(why);
        }
        self.shard(index).confs.push(conf.clone());
    }

    /// A replica was opened with this promise.
    pub fn opened(&mut self, now: u64, place: Place, promised: Epoch) {
        let Place { shard, store, .. } = place;
        let before = self.shard(shard).promised.get(&store).copied().unwrap_or_default();
        if promised < before {
            self.fail(format!(
                "I6: at {now} ns shard {shard} on store {store} comes back with promise {}, it had \
                 promised {}",
                promised.0, before.0
            ));
        }
    }

    /// A replica follows a configuration: it must have been stored.
    pub fn follows(&mut self, now: u64, place: Place, conf: &ShardConf) {
        let stored = &self.shards[place.shard as usize].confs;
        if !stored.iter().rev().any(|known| known == conf) {
            self.fail(format!(
                "I21: at {now} ns {place:?} follows {conf:?}, which was never stored"
            ));
        }
    }

    /// A lane was asked to log an operation that is not part of a resync.
    pub fn logged(&mut self, now: u64, place: Place, lsn: Lsn, first: u32, values: &[u64]) {
        let shard = self.shard(place.shard);
        let Some((known_first, known)) = shard.logged.get(&lsn) else {
            shard.logged.insert(lsn, (first, values.to_vec()));
            return;
        };
        if (*known_first, &known[..]) != (first, values) {
            let why = format!(
                "I5: at {now} ns {place:?} logs {lsn} as block {first} with {values:x?}; elsewhere \
                 it is block {known_first} with {known:x?}"
            );
            self.fail(why);
        }
    }

    /// What a replica says of itself.
    pub fn note(&mut self, now: u64, moment: u64, place: Place, note: &Note) {
        match note {
            Note::Role { epoch, role } => self.changes_role(moment, place, *epoch, *role),
            Note::Promised { epoch } => {
                let promised = self.shard(place.shard).promised.entry(place.store).or_default();
                if *epoch < *promised {
                    let why =
                        format!("I6: at {now} ns {place:?} promises {epoch:?} after {promised:?}");
                    self.fail(why);
                } else {
                    *promised = *epoch;
                }
            }
            Note::Assigned { lsn, first, count, is_settle, .. } => {
                if !is_settle {
                    let latest = &mut self.shard(place.shard).assigned;
                    latest.extend((*first..first + count).map(|block| (block, moment)));
                }
                self.assigned(now, place, *lsn, (*first, *count));
            }
            Note::Durable { lsn } => {
                let life = (place.store, place.incarnation);
                self.shard(place.shard).durable.entry(*lsn).or_default().insert(life);
            }
            Note::Committed { lsn, acked } => self.committed(now, place, *lsn, acked),
            // Equality is looked at region by region; each was copied with everything that came
            // since, so it must hold the first time.
            Note::Different { store, region } => {
                let why = format!(
                    "I19: at {now} ns {place:?} finds region {region} of the learner on store {store} \
                     different after it was copied"
                );
                self.fail(why);
            }
            // The fault budget leaves one good copy of everything.
            Note::Lost { .. } if self.shards[place.shard as usize].is_forced => {}
            Note::Lost { block } => {
                let why = format!("I1: at {now} ns {place:?} says that nobody has block {block}");
                self.fail(why);
            }
            Note::Copied { .. }
            | Note::CaughtUp { .. }
            | Note::Healing { .. }
            | Note::Mended { .. } => {}
        }
    }

    fn changes_role(&mut self, moment: u64, place: Place, epoch: Epoch, role: Role) {
        let shard = self.shard(place.shard);
        let life = (place.store, place.incarnation);
        shard.roles.insert(life, role);
        match role {
            Role::Active => shard.active.push((moment, place.store, epoch)),
            Role::Suspended | Role::Leaving => {}
            // The reign is over: what was open is no longer its business.
            Role::Out | Role::Learner | Role::Secondary | Role::Settling | Role::Fenced => {
                shard.open.remove(&life);
            }
        }
    }

    fn assigned(&mut self, now: u64, place: Place, lsn: Lsn, (first, count): (u32, u32)) {
        let open = self.shard(place.shard).open.entry((place.store, place.incarnation));
        let open = open.or_default();
        let end = first + count;
        let other = open.iter().find(|(_, range)| range.0 < end && first < range.0 + range.1);
        if let Some((other, range)) = other {
            let why = format!(
                "I13: at {now} ns {place:?} gives {lsn} to blocks {first}+{count} while {other} of \
                 {}+{} is not committed",
                range.0, range.1
            );
            return self.fail(why);
        }
        open.insert(lsn, (first, count));
    }

    fn committed(&mut self, now: u64, place: Place, lsn: Lsn, acked: &[StoreId]) {
        let index = place.shard;
        let shard = self.shard(index);
        if let Some(open) = shard.open.get_mut(&(place.store, place.incarnation)) {
            open.remove(&lsn);
        }
        let mut why = None;
        let committer = *shard.committers.entry(lsn.epoch).or_insert(place.store);
        let primary = shard
            .confs
            .iter()
            .find(|conf| conf.epoch == lsn.epoch)
            .map(|c| c.primary_member().store);
        if committer != place.store || primary != Some(place.store) {
            why = Some(format!(
                "I2: at {now} ns store {} commits {lsn} of shard {index}; the primary of that epoch \
                 is store {primary:?}, and store {committer} committed in it",
                place.store
            ));
        }
        // A primary may learn of its last acknowledgements after another has followed it: those
        // were given before the promise, so the operation was in a tail that the other has settled.
        let of_reign = shard.last_of_reign(lsn.epoch, place);
        let conf = of_reign.unwrap_or_else(|| shard.confs.last().expect("stored at the start"));
        for member in conf.isr_members() {
            if !acked.contains(&member.store) {
                why = Some(format!(
                    "I9: at {now} ns {lsn} of shard {index} is committed with {acked:?}; store {} is \
                     in the ISR of epoch {}",
                    member.store, conf.epoch.0
                ));
            }
        }
        let none = BTreeSet::new();
        let durable = shard.durable.get(&lsn).unwrap_or(&none);
        for store in acked {
            if why.is_none() && !durable.iter().any(|(other, _)| other == store) {
                why = Some(format!(
                    "I9: at {now} ns {lsn} of shard {index} is committed with {acked:?}; it was never \
                     durable on store {store}"
                ));
            }
        }
        shard.committed.insert(lsn);
        if let Some((_, values)) = shard.logged.get(&lsn) {
            let values = values.clone();
            self.committed_values.extend(values);
        }
        if let Some(why) = why {
            self.fail(why);
        }
    }

    /// A client's read was answered with these values.
    pub fn read(&mut self, now: u64, first: u64, values: &[u64]) {
        for (block, value) in (first..).zip(values) {
            if *value != 0 && !self.committed_values.contains(value) {
                self.fail(format!(
                    "I4: at {now} ns block {block} reads as {value:#x}, which is not committed"
                ));
            }
        }
    }

    /// A replica answered a read of a client that it had received at `arrived`, following the
    /// configuration with this epoch.
    pub fn served(&mut self, now: u64, place: Place, epoch: Epoch, arrived: u64) {
        let active = &self.shards[place.shard as usize].active;
        let other = active.iter().find(|(moment, store, reign)| {
            *moment < arrived && *store != place.store && *reign > epoch
        });
        if let Some((_, store, reign)) = other {
            let why = format!(
                "I10: at {now} ns store {} serves a read of shard {} in epoch {}; store {store} was \
                 active in epoch {} before the read came",
                place.store, place.shard, epoch.0, reign.0
            );
            self.fail(why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Kind;
    use proto::{Seq, ShardId, VolumeId};
    use shard::conf::Member;

    fn member(copy: u8, incarnation: u64) -> Member {
        let store = u64::from(copy) + 1;
        Member { copy, store, incarnation, disk: [copy; 16], format_uuid: [1; 16] }
    }

    fn conf(epoch: u64, primary: u8, isr: &[u8]) -> ShardConf {
        ShardConf {
            shard: ShardId { volume: VolumeId(7), index: 0 },
            epoch: Epoch(epoch),
            rf: 3,
            min_write: 2,
            primary,
            isr: isr.to_vec(),
            learners: Vec::new(),
            members: (0..3).map(|copy| member(copy, 10 + u64::from(copy))).collect(),
            history_id: 1,
            attach_epoch: 1,
        }
    }

    fn lsn(epoch: u64, seq: u64) -> Lsn {
        Lsn { epoch: Epoch(epoch), seq: Seq(seq) }
    }

    fn place(store: u64) -> Place {
        Place { shard: 0, store, incarnation: 9 + store }
    }

    fn check() -> Check {
        let mut check = Check::new(1);
        for store in 1..=3 {
            check.registered(store, 9 + store);
        }
        check.stored(0, &conf(1, 0, &[0, 1, 2]));
        check
    }

    fn durable(check: &mut Check, lsn: Lsn, stores: &[u64]) {
        for &store in stores {
            check.note(1, 1, place(store), &Note::Durable { lsn });
        }
    }

    fn committed(check: &mut Check, store: u64, lsn: Lsn, acked: &[u64]) {
        let acked = acked.to_vec();
        check.note(2, 2, place(store), &Note::Committed { lsn, acked });
    }

    fn assert_fires(check: &Check, name: &str) {
        let why = check.violation().unwrap_or_else(|| panic!("{name} does not fire"));
        assert!(why.starts_with(name), "{name} expected: {why}");
    }

    #[test]
    fn a_lawful_write_breaks_nothing() {
        let mut check = check();
        let assigned =
            Note::Assigned { lsn: lsn(1, 1), first: 4, count: 1, is_settle: false, is_heal: false };
        check.note(1, 1, place(1), &assigned);
        for store in 1..=3 {
            check.logged(1, place(store), lsn(1, 1), 4, &[77]);
        }
        durable(&mut check, lsn(1, 1), &[1, 2, 3]);
        committed(&mut check, 1, lsn(1, 1), &[1, 2, 3]);
        check.note(3, 3, place(1), &assigned);
        check.read(3, 4, &[77]);
        assert_eq!(check.violation(), None);
    }

    #[test]
    fn i2_two_committers_of_an_epoch() {
        let mut check = check();
        durable(&mut check, lsn(1, 1), &[1, 2, 3]);
        committed(&mut check, 2, lsn(1, 1), &[1, 2, 3]);
        assert_fires(&check, "I2");
    }

    #[test]
    fn i3_i20_i27_come_from_the_history() {
        let mut check = check();
        check.history.begin(1, (1, 1), Kind::Read, 0, &[0]);
        let read = check.history.end(2, (1, 1), Ok(&[5]));
        check.expect(read);
        assert_fires(&check, "I3");
    }

    #[test]
    fn i4_a_value_that_is_not_committed() {
        let mut check = check();
        check.logged(1, place(1), lsn(1, 1), 4, &[77]);
        check.read(3, 4, &[77]);
        assert_fires(&check, "I4");
    }

    #[test]
    fn i5_two_contents_for_one_lsn() {
        let mut check = check();
        check.logged(1, place(1), lsn(1, 1), 4, &[77]);
        check.logged(1, place(2), lsn(1, 1), 4, &[78]);
        assert_fires(&check, "I5");
    }

    #[test]
    fn i6_promises_and_lives_go_back() {
        let mut first = check();
        first.note(1, 1, place(2), &Note::Promised { epoch: Epoch(4) });
        first.opened(2, place(2), Epoch(4));
        assert_eq!(first.violation(), None);
        first.opened(3, place(2), Epoch(3));
        assert_fires(&first, "I6");
        let mut second = check();
        second.registered(1, 3);
        assert_fires(&second, "I6");
    }

    #[test]
    fn i7_a_step_that_no_transition_makes() {
        let mut check = check();
        check.stored(1, &conf(2, 1, &[0, 1]));
        assert_fires(&check, "I7");
    }

    #[test]
    fn i8_a_life_that_never_registered() {
        let mut check = Check::new(1);
        check.registered(1, 10);
        check.stored(0, &conf(1, 0, &[0, 1, 2]));
        assert_fires(&check, "I8");
    }

    #[test]
    fn i9_acknowledgements_that_do_not_cover_the_isr_or_are_not_true() {
        let mut first = check();
        durable(&mut first, lsn(1, 1), &[1, 2]);
        committed(&mut first, 1, lsn(1, 1), &[1, 2]);
        assert_fires(&first, "I9");
        let mut second = check();
        durable(&mut second, lsn(1, 1), &[1, 2]);
        committed(&mut second, 1, lsn(1, 1), &[1, 2, 3]);
        assert_fires(&second, "I9");
    }

    #[test]
    fn i9_a_deposed_primary_needs_what_its_last_configuration_asked_for() {
        let mut check = check();
        check.stored(1, &conf(2, 0, &[0, 1]));
        check.stored(2, &conf(3, 1, &[1]));
        durable(&mut check, lsn(1, 1), &[1, 2]);
        committed(&mut check, 1, lsn(1, 1), &[1, 2]);
        assert_eq!(check.violation(), None);
        committed(&mut check, 1, lsn(1, 1), &[1]);
        assert_fires(&check, "I9");
    }

    #[test]
    fn i10_a_deposed_primary_serves() {
        let mut check = check();
        let active = Note::Role { epoch: Epoch(2), role: Role::Active };
        check.note(5, 5, place(2), &active);
        check.served(6, place(1), Epoch(1), 4);
        assert_eq!(check.violation(), None, "it came before");
        check.served(7, place(1), Epoch(1), 6);
        assert_fires(&check, "I10");
    }

    #[test]
    fn i13_two_open_operations_on_a_block() {
        let mut check = check();
        for seq in 1..=2 {
            let note = Note::Assigned {
                lsn: lsn(1, seq),
                first: 4,
                count: 2,
                is_settle: false,
                is_heal: false,
            };
            check.note(1, 1, place(1), &note);
        }
        assert_fires(&check, "I13");
    }

    #[test]
    fn i19_i1_a_learner_that_differs_and_a_block_that_nobody_has() {
        let mut first = check();
        first.note(1, 1, place(1), &Note::Different { store: 3, region: 2 });
        assert_fires(&first, "I19");
        let mut second = check();
        second.note(1, 1, place(1), &Note::Lost { block: 9 });
        assert_fires(&second, "I1:");
    }

    #[test]
    fn i21_a_configuration_that_was_never_stored() {
        let mut check = check();
        check.follows(1, place(2), &conf(1, 0, &[0, 1, 2]));
        assert_eq!(check.violation(), None);
        check.follows(1, place(2), &conf(2, 1, &[1, 2]));
        assert_fires(&check, "I21");
    }
}
