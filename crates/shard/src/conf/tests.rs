//! Each guard of T1 to T9 by name, and random walks over all of them.

use super::codec::ConfError;
use super::transition::{Facts, Proposer, Refusal, Registration, Transition, apply, is_legal_step};
use super::{CopyId, HISTORY_SHIFT, Incarnation, Member, ShardConf, StoreId};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use proto::{Epoch, Lsn, Seq, ShardId, VolumeId};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// Copy `copy` on `store`, in the life 10 x store + 1.
pub(super) fn member(copy: CopyId, store: StoreId) -> Member {
    let fill = u8::try_from(store).expect("a small number");
    Member {
        copy,
        store,
        incarnation: store * 10 + 1,
        disk: [fill; 16],
        format_uuid: [fill + 1; 16],
    }
}

/// Copies 0 (primary), 1 and 2 in the ISR, on stores 1, 2 and 3.
pub(super) fn three() -> ShardConf {
    let shard = ShardId { volume: VolumeId(7), index: 1 };
    let members = (0..3).map(|copy| member(copy, u64::from(copy) + 1)).collect();
    ShardConf::first(shard, (3, 2), 0, members, (7, 4)).expect("a sound configuration")
}

/// Copies 0 and 1 in the ISR, 2 a learner, 3 out.
fn mixed() -> ShardConf {
    let mut conf = three();
    conf.members.push(member(3, 4));
    (conf.isr, conf.learners, conf.epoch) = (vec![0, 1], vec![2], Epoch(9));
    conf
}

prop_compose! {
    /// Any sound configuration.
    pub(super) fn any_conf()(
        copies in proptest::sample::subsequence((0..16u8).collect::<Vec<_>>(), 1..=8),
        stores in proptest::sample::subsequence((1..40u64).collect::<Vec<_>>(), 8).prop_shuffle(),
        roles in proptest::collection::vec(0..3u8, 8),
        numbers in (0..1u64 << 53, 1..1u64 << 53, 0..1u64 << 53, 0..1u64 << 53),
        index in any::<u32>(),
        (rf, min_write) in (1..=8u8).prop_flat_map(|rf| (Just(rf), 1..=rf)),
        primary in any::<proptest::sample::Index>(),
    ) -> ShardConf {
        let members: Vec<_> =
            copies.iter().zip(stores).map(|(copy, store)| member(*copy, store)).collect();
        let primary = copies[primary.index(copies.len())];
        let with_role = |role: u8| {
            copies.iter().copied().zip(&roles).filter(move |(copy, found)| {
                if *copy == primary { role == 0 } else { **found == role }
            }).map(|(copy, _)| copy).collect()
        };
        let (volume, epoch, history_id, attach_epoch) = numbers;
        ShardConf {
            shard: ShardId { volume: VolumeId(volume), index },
            epoch: Epoch(epoch),
            rf,
            min_write,
            primary,
            isr: with_role(0),
            learners: with_role(1),
            members,
            history_id,
            attach_epoch,
        }
    }
}

fn registration(incarnation: Incarnation) -> Registration {
    Registration { incarnation, is_reachable: true, has_good_journal: true }
}

/// Every member registered in its life, reachable, with a good journal.
fn facts(conf: &ShardConf, proposer: Proposer) -> Facts {
    let registered =
        conf.members.iter().map(|one| (one.store, registration(one.incarnation))).collect();
    Facts { proposer, registered, complete: BTreeMap::new(), ended: BTreeMap::new() }
}

fn replica(conf: &ShardConf, copy: CopyId) -> Proposer {
    let incarnation = conf.member(copy).expect("a member").incarnation;
    Proposer::Replica { copy, incarnation }
}

fn lsn(epoch: u64, seq: u64) -> Lsn {
    Lsn { epoch: Epoch(epoch), seq: Seq(seq) }
}

/// Where the members of a shard stand, so that a test says only what is different.
struct Case {
    conf: ShardConf,
    facts: Facts,
}

impl Case {
    fn of(conf: ShardConf, by: impl Fn(&ShardConf) -> Proposer) -> Case {
        let facts = facts(&conf, by(&conf));
        Case { conf, facts }
    }

    fn store(&mut self, store: StoreId) -> &mut Registration {
        self.facts.registered.get_mut(&store).expect("registered")
    }

    fn apply(&self, transition: &Transition) -> Result<ShardConf, Refusal> {
        let result = apply(&self.conf, self.conf.epoch, transition, &self.facts);
        if let Ok(next) = &result {
            assert_eq!(next.check(), Ok(()));
            assert_eq!(next.epoch.0, self.conf.epoch.0 + 1);
            assert_eq!(is_legal_step(&self.conf, next), Some(transition.name()));
        }
        result
    }
}

fn by_conductor(_: &ShardConf) -> Proposer {
    Proposer::Conductor
}

fn by_human(_: &ShardConf) -> Proposer {
    Proposer::Human
}

fn by_primary(conf: &ShardConf) -> Proposer {
    replica(conf, conf.primary)
}

fn remove(copy: CopyId) -> Transition {
    Transition::Remove { copy }
}

fn promote(copy: CopyId) -> Transition {
    Transition::Promote { copy }
}

/// Every member crashed and came back: new life = old + 1; copies 0 and 1 complete up to 5.3.
fn all_back() -> Case {
    let mut case = Case::of(mixed(), by_conductor);
    for found in case.facts.registered.values_mut() {
        found.incarnation += 1;
    }
    case.facts.complete = BTreeMap::from([(0, lsn(5, 3)), (1, lsn(5, 3))]);
    case
}

fn reborn(copy: CopyId, store: StoreId) -> Member {
    let old = member(copy, store);
    Member { incarnation: old.incarnation + 1, ..old }
}

fn reopen(primary: CopyId, present: &[Member]) -> Transition {
    Transition::Reopen { primary, present: present.to_vec() }
}

fn one_of_each() -> Vec<Transition> {
    vec![
        remove(1),
        promote(1),
        Transition::AddLearner { member: member(3, 4) },
        Transition::Admit { copy: 2, incarnation: 31 },
        Transition::Transfer { copy: 1 },
        reopen(0, &[reborn(0, 1), reborn(1, 2)]),
        Transition::ForceAccept { member: member(2, 3), history_id: 8 },
        Transition::Cancel { copy: 2 },
        Transition::Attach { attach_epoch: 5 },
        Transition::Properties { rf: 2, min_write: 1 },
    ]
}

#[test]
fn another_epoch_is_refused() {
    let case = Case::of(mixed(), by_primary);
    for proposed in [0, 8, 10] {
        let refusal = apply(&case.conf, Epoch(proposed), &remove(1), &case.facts);
        let (proposed, stored) = (Epoch(proposed), Epoch(9));
        assert_eq!(refusal, Err(Refusal::WrongEpoch { proposed, stored }));
    }
    assert!(case.apply(&remove(1)).is_ok());
}

#[test]
fn the_table_says_who_may_propose() {
    // Columns: conductor, primary, the secondary that is named, another replica, a person.
    let table = [
        [true, true, false, false, false],
        [true, true, true, false, false],
        [true, false, false, false, false],
        [false, true, false, false, false],
        [false, true, false, false, false],
        [true, false, false, false, false],
        [false, false, false, false, true],
        [true, true, false, false, false],
        [true, false, false, false, false],
        [true, false, false, false, false],
    ];
    for (transition, row) in one_of_each().iter().zip(table) {
        let conf = mixed();
        let proposers = [
            Proposer::Conductor,
            replica(&conf, 0),
            replica(&conf, 1),
            replica(&conf, 3),
            Proposer::Human,
        ];
        for (proposer, is_entitled) in proposers.into_iter().zip(row) {
            let result =
                Case { facts: facts(&conf, proposer), conf: conf.clone() }.apply(transition);
            let refusal = Refusal::NotEntitled { transition: transition.name(), proposer };
            assert_eq!(result != Err(refusal), is_entitled, "{transition:?} by {proposer:?}");
        }
    }
}

#[test]
fn a_replica_is_heard_only_in_the_life_that_counts() {
    let primary = |incarnation| Proposer::Replica { copy: 0, incarnation };
    for transition in [remove(1), promote(1), Transition::Cancel { copy: 2 }] {
        let mut case = Case::of(mixed(), |_| primary(12));
        let refusal = Refusal::OtherLife { copy: 0, meant: 12, known: 11 };
        assert_eq!(case.apply(&transition), Err(refusal.clone()));
        case.store(1).incarnation = 12;
        assert_eq!(case.apply(&transition), Err(refusal), "registered, and not the one meant");
        case.facts.proposer = primary(11);
        let refusal = Refusal::OtherLife { copy: 0, meant: 11, known: 12 };
        assert_eq!(case.apply(&transition), Err(refusal), "meant, and not the one registered");
        case.facts.registered.remove(&1);
        assert_eq!(case.apply(&transition), Err(Refusal::NotRegistered(1)));
    }
}

#[test]
fn t1_removes_a_secondary_and_nothing_else() {
    let case = Case::of(three(), by_primary);
    let next = case.apply(&remove(1)).expect("by the primary");
    assert_eq!((next.isr, next.learners, next.members.len()), (vec![0, 2], vec![], 3));
    assert_eq!(case.apply(&remove(0)), Err(Refusal::IsPrimary(0)));
    let case = Case::of(mixed(), by_primary);
    assert_eq!(case.apply(&remove(2)), Err(Refusal::NotInIsr(2)));
    assert_eq!(case.apply(&remove(9)), Err(Refusal::NotInIsr(9)));
    assert_eq!(case.apply(&remove(1)).map(|next| next.learners), Ok(vec![2]));
}

#[test]
fn t1_by_the_conductor_needs_a_new_life_and_somebody_who_stays() {
    let mut case = Case::of(three(), by_conductor);
    case.store(2).incarnation = 22;
    assert_eq!(case.apply(&remove(1)).map(|next| next.isr), Ok(vec![0, 2]));
    case.store(1).is_reachable = false;
    assert!(case.apply(&remove(1)).is_ok(), "copy 2 is there");
    case.store(3).is_reachable = false;
    assert_eq!(case.apply(&remove(1)), Err(Refusal::NobodyElse));
    case.store(3).is_reachable = true;
    case.store(3).incarnation = 32;
    assert_eq!(case.apply(&remove(1)), Err(Refusal::NobodyElse), "in another life");
    case.facts.registered.remove(&2);
    assert_eq!(case.apply(&remove(1)), Err(Refusal::NotRegistered(2)));
}

#[test]
fn t1_by_the_conductor_spares_one_that_lives_where_enough_others_are_there() {
    let mut case = Case::of(three(), by_conductor);
    assert_eq!(case.apply(&remove(1)).map(|next| next.isr), Ok(vec![0, 2]));
    assert_eq!(case.apply(&remove(0)), Err(Refusal::IsPrimary(0)));
    case.conf.min_write = 3;
    assert_eq!(case.apply(&remove(1)), Err(Refusal::NotToSpare(1)), "a write needs three");
    case.conf.min_write = 1;
    assert!(case.apply(&remove(1)).is_ok());
    case.store(3).is_reachable = false;
    assert_eq!(case.apply(&remove(1)), Err(Refusal::NotToSpare(1)), "one of two is away");
    case.store(3).is_reachable = true;
    case.store(3).incarnation = 32;
    assert_eq!(case.apply(&remove(1)), Err(Refusal::NotToSpare(1)), "one is in another life");
    let mut two = Case::of(mixed(), by_conductor);
    two.conf.min_write = 1;
    assert_eq!(two.apply(&remove(1)), Err(Refusal::NotToSpare(1)), "one copy would be left");
}

#[test]
fn t2_moves_the_primary_and_drops_the_old_one() {
    let proposers: [fn(&ShardConf) -> Proposer; 3] =
        [by_conductor, by_primary, |conf| replica(conf, 1)];
    for by in proposers {
        let mut conf = mixed();
        conf.members[3].copy = 4;
        let next = Case::of(conf, by).apply(&promote(1)).expect("a good secondary");
        assert_eq!((next.primary, &*next.isr, &*next.learners), (1, &[1][..], &[2][..]));
        assert!(next.member(0).is_some(), "the old primary stays a member");
    }
    let case = Case::of(mixed(), by_conductor);
    assert_eq!(case.apply(&promote(0)), Err(Refusal::IsPrimary(0)));
    assert_eq!(case.apply(&promote(2)), Err(Refusal::NotInIsr(2)), "a learner");
    assert_eq!(case.apply(&promote(3)), Err(Refusal::NotInIsr(3)), "one that is out");
}

#[test]
fn t2_needs_the_registered_life_reachable_with_a_good_journal() {
    for by in [by_conductor as fn(&ShardConf) -> Proposer, by_primary] {
        let mut case = Case::of(mixed(), by);
        case.store(2).is_reachable = false;
        assert_eq!(case.apply(&promote(1)), Err(Refusal::NotReachable(2)));
        case.store(2).is_reachable = true;
        case.store(2).has_good_journal = false;
        assert_eq!(case.apply(&promote(1)), Err(Refusal::BadJournal(2)));
        case.store(2).has_good_journal = true;
        case.store(2).incarnation = 22;
        let refusal = Refusal::OtherLife { copy: 1, meant: 21, known: 22 };
        assert_eq!(case.apply(&promote(1)), Err(refusal));
        case.facts.registered.remove(&2);
        assert_eq!(case.apply(&promote(1)), Err(Refusal::NotRegistered(2)));
    }
}

#[test]
fn t3_begins_one_that_is_out_in_its_registered_life() {
    let add = |member| Transition::AddLearner { member };
    let mut case = Case::of(mixed(), by_conductor);
    let next = case.apply(&add(member(3, 4))).expect("one that is out");
    assert_eq!((next.learners, next.isr), (vec![2, 3], vec![0, 1]));
    assert_eq!(case.apply(&add(member(1, 2))), Err(Refusal::InIsr(1)));
    assert_eq!(case.apply(&add(member(2, 3))), Err(Refusal::AlreadyLearner(2)));
    assert_eq!(case.apply(&add(member(3, 6))), Err(Refusal::NotRegistered(6)));
    case.facts.registered.insert(6, registration(61));
    let next = case.apply(&add(member(3, 6))).expect("the number of one that is out, elsewhere");
    assert_eq!(next.member(3), Some(&member(3, 6)));
    let next = case.apply(&add(member(7, 6))).expect("a new number");
    assert_eq!((next.members.len(), next.learners), (5, vec![2, 7]));
    case.store(4).incarnation = 42;
    let refusal = Refusal::OtherLife { copy: 3, meant: 41, known: 42 };
    assert_eq!(case.apply(&add(member(3, 4))), Err(refusal));
    assert_eq!(case.apply(&add(reborn(3, 4))).map(|next| next.learners), Ok(vec![2, 3]));
    let twice = Refusal::Unsound(ConfError::StoreTwice(4));
    assert_eq!(case.apply(&add(Member { copy: 5, ..reborn(3, 4) })), Err(twice));
}

#[test]
fn t3_of_a_learner_that_restarted_begins_it_anew() {
    let mut case = Case::of(mixed(), by_conductor);
    case.store(3).incarnation = 32;
    let next = case.apply(&Transition::AddLearner { member: reborn(2, 3) }).expect("a new life");
    assert_eq!((&*next.learners, next.member(2)), (&[2][..], Some(&reborn(2, 3))));
}

#[test]
fn t3_keeps_the_limit_of_members() {
    let mut conf = three();
    conf.members = (0..8).map(|copy| member(copy, u64::from(copy) + 1)).collect();
    let mut case = Case::of(conf, by_conductor);
    case.facts.registered.insert(9, registration(91));
    let refusal = Refusal::Unsound(ConfError::TooMany { list: "members", found: 9 });
    let transition = Transition::AddLearner { member: member(8, 9) };
    assert_eq!(case.apply(&transition), Err(refusal));
}

#[test]
fn t4_admits_a_learner_in_the_life_that_request_registry_and_conf_name() {
    let admit = |copy, incarnation| Transition::Admit { copy, incarnation };
    let mut case = Case::of(mixed(), by_primary);
    let next = case.apply(&admit(2, 31)).expect("equal in all three");
    assert_eq!((next.isr, next.learners), (vec![0, 1, 2], vec![]));
    assert_eq!(case.apply(&admit(3, 41)), Err(Refusal::NotALearner(3)));
    assert_eq!(case.apply(&admit(1, 21)), Err(Refusal::NotALearner(1)));
    let refusal = Refusal::OtherLife { copy: 2, meant: 32, known: 31 };
    assert_eq!(case.apply(&admit(2, 32)), Err(refusal.clone()), "the request differs");
    case.store(3).incarnation = 32;
    assert_eq!(case.apply(&admit(2, 32)), Err(refusal), "the configuration differs");
    let refusal = Refusal::OtherLife { copy: 2, meant: 31, known: 32 };
    assert_eq!(case.apply(&admit(2, 31)), Err(refusal), "the registry differs");
    case.facts.registered.remove(&3);
    assert_eq!(case.apply(&admit(2, 31)), Err(Refusal::NotRegistered(3)));
}

#[test]
fn t4_is_the_primarys_in_its_registered_life_alone() {
    let mut case = Case::of(mixed(), by_primary);
    case.store(1).incarnation = 12;
    let refusal = Refusal::OtherLife { copy: 0, meant: 11, known: 12 };
    let admit = Transition::Admit { copy: 2, incarnation: 31 };
    assert_eq!(case.apply(&admit), Err(refusal));
    case.facts.proposer = replica(&case.conf, 2);
    let refusal = Refusal::NotEntitled { transition: "T4", proposer: case.facts.proposer };
    assert_eq!(case.apply(&admit), Err(refusal), "the learner itself");
}

#[test]
fn t5_keeps_the_isr() {
    let transfer = |copy| Transition::Transfer { copy };
    let mut case = Case::of(mixed(), by_primary);
    let next = case.apply(&transfer(1)).expect("a secondary");
    assert_eq!((next.primary, next.isr, next.learners), (1, vec![0, 1], vec![2]));
    assert_eq!(case.apply(&transfer(0)), Err(Refusal::IsPrimary(0)));
    assert_eq!(case.apply(&transfer(2)), Err(Refusal::NotInIsr(2)));
    case.store(2).incarnation = 22;
    let refusal = Refusal::OtherLife { copy: 1, meant: 21, known: 22 };
    assert_eq!(case.apply(&transfer(1)), Err(refusal));
}

#[test]
fn t6_reopens_with_all_good_members_that_are_there() {
    let case = all_back();
    let present = [reborn(0, 1), reborn(1, 2), reborn(3, 4)];
    let next = case.apply(&reopen(1, &present)).expect("all are back");
    assert_eq!((next.primary, &*next.isr, &*next.learners), (1, &[0, 1][..], &[][..]));
    assert_eq!(next.member(1), Some(&reborn(1, 2)));
    assert_eq!(next.member(3), Some(&reborn(3, 4)), "one that is out has its new life too");
    assert_eq!(next.member(2), Some(&member(2, 3)), "one that is not present stays a member");
}

#[test]
fn t6_does_with_one_survivor() {
    let mut case = all_back();
    case.facts.registered.remove(&1);
    case.facts.complete.remove(&0);
    let next = case.apply(&reopen(1, &[reborn(1, 2)])).expect("copy 0 never came back");
    assert_eq!((next.primary, next.isr, next.members.len()), (1, vec![1], 4));
}

#[test]
fn t6_waits_for_nobody_but_whoever_is_there() {
    let mut case = all_back();
    case.store(1).incarnation = 11;
    let present = [reborn(1, 2)];
    assert_eq!(case.apply(&reopen(1, &present)), Err(Refusal::StillThere(0)));
    case.store(1).has_good_journal = false;
    assert_eq!(case.apply(&reopen(1, &present)), Err(Refusal::StillThere(0)));
    case.store(1).is_reachable = false;
    assert!(case.apply(&reopen(1, &present)).is_ok());
}

#[test]
fn t6_takes_a_candidate_of_the_last_isr_that_is_present_and_good() {
    let mut case = all_back();
    let both = [reborn(0, 1), reborn(1, 2)];
    assert_eq!(case.apply(&reopen(2, &[reborn(2, 3)])), Err(Refusal::NotInIsr(2)), "a learner");
    assert_eq!(case.apply(&reopen(0, &both[1..])), Err(Refusal::PrimaryNotPresent(0)));
    assert_eq!(case.apply(&reopen(0, &[both[0]])), Err(Refusal::LeftOut(1)));
    assert_eq!(case.apply(&reopen(0, &[both[0]; 2])), Err(Refusal::PresentTwice(0)));
    let stranger = [both[0], both[1], member(9, 9)];
    assert_eq!(case.apply(&reopen(0, &stranger)), Err(Refusal::NotAMember(9)));
    case.store(1).has_good_journal = false;
    assert_eq!(case.apply(&reopen(0, &both)), Err(Refusal::BadJournal(1)));
    let next = case.apply(&reopen(1, &both[1..])).expect("copy 0 is not good and stays out");
    assert_eq!(next.isr, [1]);
    case.store(1).is_reachable = false;
    assert_eq!(case.apply(&reopen(0, &both)), Err(Refusal::NotReachable(1)));
}

#[test]
fn t6_takes_the_lives_that_are_registered_at_the_places_that_are_known() {
    let case = all_back();
    let refusal = Refusal::OtherLife { copy: 0, meant: 11, known: 12 };
    let old = [member(0, 1), reborn(1, 2)];
    assert_eq!(case.apply(&reopen(1, &old)), Err(refusal));
    for change in [
        |one: &mut Member| one.store = 3,
        |one: &mut Member| one.disk = [0; 16],
        |one: &mut Member| one.format_uuid = [0; 16],
    ] {
        let mut present = [reborn(0, 1), reborn(1, 2)];
        change(&mut present[0]);
        assert_eq!(case.apply(&reopen(1, &present)), Err(Refusal::OtherPlace(0)));
    }
}

#[test]
fn t6_takes_the_most_complete() {
    let mut case = all_back();
    let both = [reborn(0, 1), reborn(1, 2)];
    for best in [lsn(5, 4), lsn(6, 1)] {
        case.facts.complete.insert(1, best);
        let refusal = Refusal::Behind { copy: 0, complete: lsn(5, 3), better: 1, best };
        assert_eq!(case.apply(&reopen(0, &both)), Err(refusal));
        assert_eq!(case.apply(&reopen(1, &both)).map(|next| next.isr), Ok(vec![0, 1]));
    }
    case.facts.complete.remove(&1);
    assert_eq!(case.apply(&reopen(0, &both)), Err(Refusal::UnknownComplete(1)));
    case.facts.complete.clear();
    assert_eq!(case.apply(&reopen(0, &both)), Err(Refusal::UnknownComplete(0)));
}

/// What a history's number grows by when it is forced.
const FORCED: u64 = 1 << HISTORY_SHIFT;

/// Copies 0 and 1, the whole ISR, are gone for certain.
fn lost() -> Case {
    let mut case = Case::of(mixed(), by_human);
    for (store, incarnation) in [(1, 11), (2, 21)] {
        case.store(store).is_reachable = false;
        case.facts.ended.insert(store, incarnation);
    }
    case
}

fn force(member: Member, history_id: u64) -> Transition {
    Transition::ForceAccept { member, history_id }
}

#[test]
fn t7_begins_a_new_history_with_one_replica() {
    let mut case = lost();
    let history_id = case.conf.next_history();
    assert_eq!(history_id, 7 + FORCED);
    let next = case.apply(&force(member(3, 4), history_id)).expect("a person decided");
    assert_eq!((next.primary, &*next.isr, &*next.learners), (3, &[3][..], &[][..]));
    assert_eq!((next.history_id, next.attach_epoch, next.members.len()), (7 + FORCED, 5, 4));
    case.apply(&force(member(2, 3), history_id)).expect("a half-copied one, if a person insists");
    for proposed in [6, 7, 8, FORCED - 1] {
        let refusal = Refusal::HistoryNotNew { proposed, stored: 7 };
        assert_eq!(case.apply(&force(member(3, 4), proposed)), Err(refusal));
    }
    assert_eq!(case.apply(&force(member(5, 4), history_id)), Err(Refusal::NotAMember(5)));
    let salvaged = Member { format_uuid: [9; 16], ..member(3, 4) };
    let next = case.apply(&force(salvaged, history_id)).expect("its disk was formatted anew");
    assert_eq!(next.member(3), Some(&salvaged));
    case.store(4).has_good_journal = false;
    assert_eq!(case.apply(&force(member(3, 4), history_id)), Err(Refusal::BadJournal(4)));
    case.store(4).is_reachable = false;
    assert_eq!(case.apply(&force(member(3, 4), history_id)), Err(Refusal::NotReachable(4)));
    case.store(4).incarnation = 42;
    let refusal = Refusal::OtherLife { copy: 3, meant: 41, known: 42 };
    assert_eq!(case.apply(&force(member(3, 4), history_id)), Err(refusal));
    case.facts.registered.remove(&4);
    assert_eq!(case.apply(&force(member(3, 4), history_id)), Err(Refusal::NotRegistered(4)));
}

#[test]
fn t7_waits_for_proof_that_nobody_else_serves() {
    let forced = |case: &Case| case.apply(&force(member(3, 4), case.conf.next_history()));
    let mut case = lost();
    assert_eq!(
        case.apply(&force(member(0, 1), 7 + FORCED)),
        Err(Refusal::InIsr(0)),
        "what is in sync is opened without loss"
    );
    case.facts.ended.remove(&2);
    assert_eq!(forced(&case), Err(Refusal::MayServe(1)), "it may only be out of our sight");
    case.facts.ended.insert(2, 20);
    assert_eq!(forced(&case), Err(Refusal::MayServe(1)), "an earlier life ended");
    case.store(2).incarnation = 22;
    assert!(forced(&case).is_ok(), "a newer life needed the lock on its disk");
    case.store(2).is_reachable = true;
    assert_eq!(forced(&case), Err(Refusal::StillGood(1)), "it is opened again without loss");
    case.store(2).has_good_journal = false;
    assert!(forced(&case).is_ok(), "its content is gone");
    // Members outside the ISR serve nothing, whatever their stores do.
    case.facts.ended.clear();
    case.store(1).incarnation = 12;
    assert!(forced(&case).is_ok());
}

#[test]
fn a_forced_history_has_seqs_above_all_before() {
    let mut conf = three();
    assert_eq!((conf.first_seq(), conf.next_history()), (Seq(0), 7 + FORCED));
    conf.history_id = conf.next_history();
    assert_eq!(conf.first_seq(), Seq(1 << 44));
    conf.history_id = conf.next_history();
    assert_eq!(conf.first_seq(), Seq(2 << 44), "room for 2^44 operations each");
    let last = 511 * FORCED + 7;
    assert!(ShardConf { history_id: last, ..three() }.check().is_ok());
    assert!(ShardConf { history_id: last + FORCED, ..three() }.check().is_err(), "no 512th");
}

#[test]
fn t8_cancels_a_learner() {
    for by in [by_conductor as fn(&ShardConf) -> Proposer, by_primary] {
        let case = Case::of(mixed(), by);
        let next = case.apply(&Transition::Cancel { copy: 2 }).expect("a learner");
        assert_eq!((next.learners, next.members.len()), (vec![], 4));
        for copy in [0, 1, 3, 9] {
            let refusal = case.apply(&Transition::Cancel { copy });
            assert_eq!(refusal, Err(Refusal::NotALearner(copy)));
        }
    }
}

#[test]
fn t9_changes_numbers_only_forward() {
    let case = Case::of(mixed(), by_conductor);
    let attach = |attach_epoch| case.apply(&Transition::Attach { attach_epoch });
    assert_eq!(attach(5).map(|next| next.attach_epoch), Ok(5));
    for proposed in [3, 4] {
        assert_eq!(attach(proposed), Err(Refusal::AttachNotNewer { proposed, stored: 4 }));
    }
    let set = |rf, min_write| case.apply(&Transition::Properties { rf, min_write });
    assert_eq!(set(2, 1).map(|next| (next.rf, next.min_write)), Ok((2, 1)));
    assert_eq!(set(3, 2), Err(Refusal::Unchanged));
    assert_eq!(set(9, 2), Err(Refusal::Unsound(ConfError::Rf(9))));
    let refusal = ConfError::MinWrite { min_write: 3, rf: 2 };
    assert_eq!(set(2, 3), Err(Refusal::Unsound(refusal)));
}

#[test]
fn the_first_configuration_is_checked_too() {
    let shard = three().shard;
    let first = |primary, members| ShardConf::first(shard, (2, 1), primary, members, (7, 1));
    let conf = first(1, vec![member(1, 2), member(0, 1)]).expect("in any order");
    assert_eq!((conf.epoch, conf.isr, conf.members[0].copy), (Epoch(1), vec![0, 1], 0));
    assert_eq!(first(0, vec![]), Err(ConfError::NoIsr));
    assert_eq!(first(2, vec![member(0, 1)]), Err(ConfError::PrimaryOutside(2)));
    let twice = vec![member(0, 1), member(1, 1)];
    assert_eq!(first(0, twice), Err(ConfError::StoreTwice(1)));
}

#[test]
fn steps_that_no_transition_makes_have_no_name() {
    let old = mixed();
    let with = |change: fn(&mut ShardConf)| {
        let mut new = old.clone();
        new.epoch = Epoch(10);
        change(&mut new);
        is_legal_step(&old, &new)
    };
    assert_eq!(with(|conf| conf.isr = vec![0]), Some("T1"), "the change before each of these");
    assert_eq!(with(|_| ()), None, "nothing changed");
    assert_eq!(
        with(|conf| (conf.isr, conf.epoch) = (vec![0], Epoch(11))),
        None,
        "an epoch skipped"
    );
    assert_eq!(with(|conf| (conf.isr, conf.epoch) = (vec![0], Epoch(9))), None, "the same epoch");
    assert_eq!(with(|conf| (conf.isr, conf.shard.index) = (vec![0], 2)), None, "another shard");
    assert_eq!(with(|conf| (conf.isr, conf.rf) = (vec![0], 2)), None, "two steps in one");
    assert_eq!(with(|conf| conf.isr = vec![0, 1, 3]), None, "admitted, never a learner");
    assert_eq!(with(|conf| conf.isr = vec![0, 1, 2]), None, "a learner still, and in the ISR");
    assert_eq!(with(|conf| (conf.primary, conf.isr) = (2, vec![2])), None, "a learner promoted");
    assert_eq!(with(|conf| conf.history_id = 8), None, "a history without its member");
    assert_eq!(with(|conf| conf.attach_epoch = 3), None, "backwards");
    assert_eq!(with(|conf| conf.members[0].incarnation = 12), None, "a new life in the ISR");
    assert_eq!(with(|conf| conf.members[3].incarnation = 42), None, "a new life, unasked");
    assert_eq!(with(|conf| conf.members.truncate(3)), None, "a member is forgotten");
    assert_eq!(
        with(|conf| {
            (conf.isr, conf.learners) = (vec![0, 1], vec![]);
            conf.members[0].incarnation = 12;
        }),
        None,
        "reopened with a member in its old life"
    );
}

/// One random proposal: mostly sensible, now and then nonsense.
#[derive(Clone, Debug)]
struct Draw {
    kind: u8,
    by: u8,
    copy: CopyId,
    number: u64,
    reregister: Option<StoreId>,
    unreachable: u8,
    bad: u8,
}

prop_compose! {
    fn any_draw()(
        (kind, by, copy) in (0..10u8, 0..6u8, 0..6u8),
        number in 0..12u64,
        reregister in proptest::option::weighted(0.2, 1..9u64),
        (unreachable, bad) in (0..20u8, 0..20u8),
    ) -> Draw {
        Draw { kind, by, copy, number, reregister, unreachable, bad }
    }
}

/// What the draw proposes of `conf`: lives and places are those that the registry and the
/// configuration have, but for a tenth of the draws.
fn proposal(draw: &Draw, conf: &ShardConf, facts: &Facts) -> Transition {
    let known = |copy: CopyId| {
        let base = conf.member(copy).copied().unwrap_or(member(copy, u64::from(copy) + 1));
        let found = facts.registered.get(&base.store).map_or(1, |found| found.incarnation);
        let incarnation = if draw.number == 0 { found + 1 } else { found };
        Member { incarnation, ..base }
    };
    // Half of the draws name one of those to whom the transition could apply.
    let among = |copies: &[CopyId]| match copies.get(usize::from(draw.copy) % copies.len().max(1)) {
        Some(copy) if draw.number % 2 == 1 => *copy,
        Some(_) | None => draw.copy,
    };
    let copy = match draw.kind {
        0 | 1 | 5..=7 => among(&conf.isr),
        4 | 8 => among(&conf.learners),
        _ => draw.copy,
    };
    match draw.kind {
        0 => remove(copy),
        1 => promote(copy),
        2 | 3 => Transition::AddLearner { member: known(copy) },
        4 => Transition::Admit { copy, incarnation: known(copy).incarnation },
        5 => Transition::Transfer { copy },
        6 | 7 => {
            let is_good = |copy: &CopyId| check_good(&known(*copy), facts);
            let present: Vec<_> = (0..6).filter(is_good).map(known).collect();
            Transition::Reopen { primary: copy, present }
        }
        8 => Transition::Cancel { copy },
        9 if draw.number < 4 => Transition::ForceAccept {
            member: known(copy),
            history_id: conf.history_id + draw.number.min(1) * FORCED,
        },
        _ if draw.number < 8 => {
            Transition::Attach { attach_epoch: conf.attach_epoch + draw.number - 5 }
        }
        _ => Transition::Properties { rf: 3, min_write: 1 + copy % 3 },
    }
}

fn check_good(member: &Member, facts: &Facts) -> bool {
    facts.registered.get(&member.store).is_some_and(|found| {
        found.incarnation == member.incarnation && found.is_reachable && found.has_good_journal
    })
}

/// Whatever is proposed in whatever order: sound, named by its transition, never an empty ISR
/// (`check`), and nobody enters the ISR or becomes primary in a life that is not registered (I8).
#[test]
fn random_walks_keep_every_invariant() {
    let config = ProptestConfig { cases: 10_000, failure_persistence: None, ..Default::default() };
    let generator = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, generator);
    let steps = RefCell::new(BTreeMap::<&'static str, u32>::new());
    let walks = proptest::collection::vec(any_draw(), 1..60);
    runner
        .run(&walks, |draws| {
            let mut conf = three();
            let mut lives = (1..7).map(|store| (store, store * 10 + 1)).collect();
            for draw in &draws {
                if let Some(name) = walk(draw, &mut conf, &mut lives)? {
                    *steps.borrow_mut().entry(name).or_default() += 1;
                }
            }
            Ok(())
        })
        .expect("every walk keeps them");
    for name in ["T1", "T2", "T3", "T4", "T5", "T6", "T7", "T8", "T9"] {
        let count = steps.borrow().get(name).copied().unwrap_or(0);
        assert!(count >= 100, "{name} was taken {count} times: {steps:?}");
    }
}

/// One proposal of a walk; the name of the transition if it was applied.
fn walk(
    draw: &Draw,
    conf: &mut ShardConf,
    lives: &mut BTreeMap<StoreId, Incarnation>,
) -> Result<Option<&'static str>, TestCaseError> {
    // Numbers that are no store stand for all at once: a power failure.
    let crashed = |store: StoreId| draw.reregister == Some(store) || draw.reregister > Some(6);
    for (_, life) in lives.iter_mut().filter(|(store, _)| crashed(**store)) {
        *life += 1;
    }
    let mut known = Facts {
        proposer: Proposer::Conductor,
        registered: lives.iter().map(|(id, life)| (*id, registration(*life))).collect(),
        complete: (0..6).map(|copy| (copy, lsn(1, draw.number % 2 * u64::from(copy)))).collect(),
        ended: BTreeMap::new(),
    };
    for (number, found) in (0u8..).zip(known.registered.values_mut()) {
        found.is_reachable = number != draw.unreachable;
        found.has_good_journal = number != draw.bad;
    }
    let transition = proposal(draw, conf, &known);
    known.proposer = match draw.by {
        0 | 1 => Proposer::Conductor,
        2 | 3 => replica(conf, conf.primary),
        4 => conf.member(draw.copy).map_or(Proposer::Human, |_| replica(conf, draw.copy)),
        _ => Proposer::Human,
    };
    if known.proposer == Proposer::Human && !draw.bad.is_multiple_of(4) {
        // A person comes when everything is lost.
        for lost in conf.isr_members() {
            known.ended.insert(lost.store, lost.incarnation);
            known.registered.get_mut(&lost.store).expect("all are").is_reachable = false;
        }
    }
    let Ok(next) = apply(conf, conf.epoch, &transition, &known) else { return Ok(None) };
    prop_assert_eq!(next.check(), Ok(()));
    prop_assert_eq!(next.epoch.0, conf.epoch.0 + 1);
    prop_assert_eq!(is_legal_step(conf, &next), Some(transition.name()));
    for one in next.isr_members() {
        let stays = conf.isr.contains(&one.copy) && conf.member(one.copy) == Some(one);
        prop_assert!(stays || lives[&one.store] == one.incarnation, "{:?}", transition);
    }
    if next.primary != conf.primary {
        let primary = next.primary_member();
        prop_assert_eq!(lives[&primary.store], primary.incarnation, "{:?}", transition);
    }
    prop_assert!(next.attach_epoch >= conf.attach_epoch);
    prop_assert!(next.history_id >= conf.history_id);
    *conf = next;
    Ok(Some(transition.name()))
}
