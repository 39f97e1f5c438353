//! Which role a configuration gives, what outlives a restart, and what each role refuses.

use super::bench::{B, BLOCKS, Bench, C, conf, context, copy, life, lsn, prepare, shard};
use crate::conf::ShardConf;
use crate::conf::transition::Transition;
use crate::mutant::Mutant;
use crate::replica::{Event, Note, Role, context_of};
use lane::record::RangeKind;
use lane::{Op, Problem, REGION_BLOCKS};
use proto::disk::DiskError;
use proto::wire::{Content, Opcode, PeerContext, RequestOp};
use proto::{Epoch, Seq, Status};

const NONE: Mutant = Mutant::None;

fn follower(conf: ShardConf) -> Bench {
    Bench::follower(NONE, conf)
}

fn primary(conf: ShardConf) -> Bench {
    Bench::primary(NONE, conf)
}

/// Settling as primary of {A, B} with operations of the last reign in blocks 0 and 10.
fn settling() -> Bench {
    let mut bench = Bench::new(NONE);
    bench.has(lsn(4, 1), 0, 0);
    bench.has(lsn(4, 2), 10, 0);
    bench.learn(conf(5, 0, &[0, 1], &[]));
    bench.obey(B);
    bench.run_lane(|_| true);
    bench
}

fn commit_of(op: &RequestOp) -> Seq {
    context_of(op).expect("replicas ask with a context").commit_lsn.seq
}

// -------------------------------------------------------------------------------------- restarts --

#[test]
fn a_restarted_replica_is_out_and_keeps_its_promise() {
    let mut bench = follower(conf(5, 1, &[0, 1, 2], &[]));
    bench.learn(conf(6, 1, &[0, 1, 2], &[]));
    bench.restart(21);
    assert_eq!((bench.replica.role(), bench.replica.promised()), (Role::Out, Epoch(6)));
    bench.asks(B, 1, 5, prepare(context(lsn(5, 1), 0), 0));
    assert_eq!(bench.refused(1), Some(Status::StaleEpoch), "promised in an earlier life");
    assert_eq!(bench.answers[&1].epoch, Epoch(6), "and told why");
    bench.asks(B, 2, 6, prepare(context(lsn(6, 1), 0), 0));
    assert_eq!(bench.refused(2), Some(Status::Fenced), "meant for the earlier life");
    let peer = PeerContext { incarnation: 21, ..context(lsn(6, 1), 0) };
    bench.asks(B, 3, 6, prepare(peer, 0));
    assert_eq!(bench.refused(3), Some(Status::NotPrimary), "it is no member");
    assert!(bench.lane.is_empty());
}

#[test]
fn a_promise_that_is_not_stored_is_not_followed() {
    let mut bench = follower(conf(5, 1, &[0, 1, 2], &[]));
    bench.step(Event::Conf(conf(6, 1, &[0, 1, 2], &[])));
    assert!(bench.is_asked(|op| matches!(op, Op::Conf { .. })));
    assert_eq!(bench.replica.promised(), Epoch(6), "nothing older is accepted from here on");
    bench.asks(B, 1, 5, prepare(context(lsn(5, 1), 0), 0));
    assert_eq!(bench.refused(1), Some(Status::StaleEpoch));
    bench.asks(B, 2, 6, prepare(context(lsn(5, 1), 0), 0));
    assert!(!bench.is_asked(|op| matches!(op, Op::Range { .. })), "nor anything newer yet");
    assert_eq!(bench.replica.conf().map(|conf| conf.epoch), Some(Epoch(5)));
    bench.run_lane(|_| true);
    assert!(bench.answers[&2].result.is_ok(), "stored: what was held is carried out");
}

#[test]
fn a_watermark_learnt_outside_the_isr_is_not_its_own() {
    let mut bench = Bench::new(NONE);
    bench.learn(conf(5, 1, &[0, 1, 2], &[]));
    bench.has(lsn(5, 3), 0, 3);
    bench.learn(conf(6, 1, &[1, 2], &[]));
    assert_eq!(bench.replica.role(), Role::Out);
    bench.learn(conf(7, 1, &[1, 2], &[0]));
    bench.asks(B, 1, 7, prepare(context(lsn(5, 10), 9), 5));
    bench.run_lane(|_| true);
    bench.asks(B, 2, 7, RequestOp::Tails(context(lsn(5, 10), 9)));
    let tails = bench.tails(2).expect("answered at once");
    assert_eq!(tails.complete_lsn.seq, Seq(3), "complete up to where it left");
    bench.restart(21);
    let mut again = conf(8, 1, &[1, 2], &[0]);
    again.members[0].incarnation = 21;
    bench.learn(again);
    let peer = PeerContext { incarnation: 21, ..context(lsn(5, 10), 9) };
    bench.asks(B, 3, 8, RequestOp::Tails(peer));
    let tails = bench.tails(3).expect("answered at once");
    assert_eq!(tails.complete_lsn.seq, Seq(3), "also across a restart");
}

// ------------------------------------------------------------------------------ the own disk fails --

/// One in-sync replica is enough for writes.
fn of_one_or_more(epoch: u64, isr: &[u8]) -> ShardConf {
    ShardConf { min_write: 1, ..conf(epoch, 0, isr, &[]) }
}

fn is_solo_write(op: &Op) -> bool {
    matches!(op, Op::Write { solo: true, .. })
}

fn is_shared_write(op: &Op) -> bool {
    matches!(op, Op::Write { solo: false, .. })
}

fn media() -> Problem {
    Problem::Media { block: 0, error: proto::disk::DiskError::Errno(5) }
}

#[test]
fn t2_a_primary_whose_disk_fails_a_write_gives_its_place_away() {
    let mut bench = primary(of_one_or_more(5, &[0, 1, 2]));
    bench.fill(1, 0);
    bench.fail_lane(&media(), is_shared_write);
    [B, C].into_iter().for_each(|store| bench.obey(store));
    bench.pass(100);
    assert_eq!(bench.proposals, [Transition::Promote { copy: 1 }]);
    assert!(!bench.replies.contains_key(&1), "neither acknowledged nor an error");
    assert!(!bench.is_asked(is_solo_write), "the others have it: nothing moves here");
    bench.learn(conf(6, 1, &[1, 2], &[]));
    assert_eq!(bench.replica.role(), Role::Out);
    assert!(!bench.is_done(1), "who comes next answers for it");
}

#[test]
fn a_lone_primary_lets_its_lane_try_another_slot_before_it_is_an_error() {
    let mut bench = primary(of_one_or_more(5, &[0]));
    bench.fill(1, 0);
    assert!(bench.is_asked(is_solo_write), "the lane is told");
    // The lane has tried; there is nobody else.
    bench.fail_lane(&media(), is_solo_write);
    assert_eq!(bench.refusal(1), Some(Status::MediaError));
    bench.pass(100);
    assert_eq!(bench.proposals, [], "the last in-sync replica is never removed");
    bench.fill(2, 0);
    bench.run_lane(|_| true);
    assert!(bench.is_done(2), "the block is not locked, and overwriting heals it");
}

#[test]
fn a_write_that_failed_among_others_is_tried_again_when_they_have_gone() {
    let mut bench = primary(of_one_or_more(5, &[0, 1]));
    bench.fill(1, 0);
    bench.fail_lane(&media(), is_shared_write);
    bench.learn(of_one_or_more(6, &[0]));
    assert!(bench.is_done(1), "this time the lane may move the slot");
}

// ----------------------------------------------------------------------------------- transitions --

#[test]
fn t1_parked_writes_go_on_when_the_removal_is_known() {
    let mut bench = primary(conf(5, 0, &[0, 1, 2], &[]));
    bench.write(1, 0);
    bench.run_lane(|_| true);
    bench.obey(B);
    bench.pass(1_999);
    assert_eq!(bench.proposals, [], "two seconds are not over");
    bench.obey(B);
    bench.pass(100);
    assert_eq!(bench.proposals, [Transition::Remove { copy: 2 }]);
    assert!(!bench.is_done(1), "proposed is not known");
    bench.learn(conf(6, 0, &[0, 1], &[]));
    assert!(bench.is_done(1));
    assert_eq!(bench.replica.role(), Role::Active);
    assert_eq!(bench.claimed, Some(vec![B]), "its lease is no longer needed");
}

#[test]
fn writes_park_below_min_write_and_reads_do_not() {
    let mut bench = primary(conf(5, 0, &[0, 1], &[]));
    bench.learn(conf(6, 0, &[0], &[]));
    bench.write(1, 0);
    bench.read(2, 9);
    bench.run_lane(|_| true);
    assert!(!bench.replies.contains_key(&1) && bench.is_done(2));
    // Parked requests are of an older epoch by then, which the client learns.
    bench.learn(conf(7, 0, &[0, 1], &[]));
    assert_eq!(bench.refusal(1), Some(Status::StaleEpoch), "a definite \"no effect\"");
}

#[test]
fn t2_a_secondary_proposes_itself_after_the_grace_or_a_death() {
    let mut bench = follower(conf(5, 1, &[0, 1, 2], &[]));
    let promote = [Transition::Promote { copy: 0 }];
    bench.pass(2_249);
    assert_eq!(bench.proposals, []);
    bench.pass(1);
    assert_eq!(bench.proposals, promote);

    let mut bench = follower(conf(5, 1, &[0, 1, 2], &[]));
    bench.pass(2_000);
    bench.leases.heard.insert(B, bench.now);
    bench.pass(2_000);
    assert_eq!(bench.proposals, [], "it was heard");
    bench.step(Event::Dead { store: B, incarnation: life(B) - 1 });
    assert_eq!(bench.proposals, [], "of an earlier life");
    bench.step(Event::Dead { store: B, incarnation: life(B) });
    assert_eq!(bench.proposals, promote);
    bench.learn(conf(6, 0, &[0, 2], &[]));
    assert_eq!(bench.replica.role(), Role::Settling);
    let asked = |bench: &mut Bench, store| {
        bench.sent_to(store).iter().any(|request| request.op.opcode() == Opcode::Tails)
    };
    assert!(!asked(&mut bench, B) && asked(&mut bench, C), "who is left in the ISR is asked");
}

#[test]
fn t2_the_old_primary_is_fenced() {
    let mut bench = primary(conf(5, 0, &[0, 1, 2], &[]));
    bench.write(1, 0);
    bench.run_lane(|_| true);
    let (to_b, to_c) = (bench.operation_to(B, 1), bench.operation_to(C, 1));
    bench.acknowledge(B, &to_b);
    bench.learn(conf(6, 1, &[1, 2], &[]));
    assert_eq!(bench.replica.role(), Role::Out);
    assert_eq!(bench.claimed, None);
    assert_eq!(bench.refusal(1), Some(Status::NotPrimary), "its outcome is unknown here");
    bench.acknowledge(C, &to_c);
    bench.write(2, 0);
    assert_eq!(bench.refusal(2), Some(Status::NotPrimary));
    let is_fenced = |note| matches!(note, &super::super::Note::Role { role: Role::Fenced, .. });
    assert!(bench.notes.iter().any(is_fenced), "serving has ended before the promise is stored");
}

#[test]
fn a_refused_primary_is_fenced_by_a_configuration_that_names_another() {
    let mut bench = primary(conf(5, 0, &[0, 1, 2], &[]));
    bench.write(1, 0);
    let to_b = bench.operation_to(B, 1);
    bench.nack(B, &to_b, 5);
    assert_eq!(bench.replica.role(), Role::Active, "its own epoch is no newer one");
    bench.step(Event::Newer { epoch: Epoch(6) });
    assert_eq!(bench.replica.role(), Role::Suspended, "a refused heartbeat says the same");
    bench.learn(conf(6, 1, &[0, 1, 2], &[]));
    assert_eq!(bench.replica.role(), Role::Secondary);
}

#[test]
fn t4_an_admitted_learner_is_in_doubt_of_nothing() {
    let mut bench = Bench::new(NONE);
    bench.suspects(1);
    bench.learn(conf(5, 1, &[1, 2], &[0]));
    assert_eq!(bench.replica.role(), Role::Learner);
    bench.asks(B, 1, 5, RequestOp::Tails(context(lsn(5, 0), 0)));
    let tails = bench.tails(1).expect("answered at once");
    let ranges: Vec<(u64, u32)> =
        tails.records.iter().map(|record| (record.range.offset(), record.range.length())).collect();
    let (start, rest) = (REGION_BLOCKS * 4096, (BLOCKS - REGION_BLOCKS) * 4096);
    assert_eq!(ranges, [(u64::from(start), rest)], "it says what it is in doubt of");
    bench.learn(conf(6, 1, &[0, 1, 2], &[]));
    assert_eq!(bench.replica.role(), Role::Secondary);
    let suspects = |bench: &Bench| {
        let shard = bench.tables.shard(0).expect("created");
        shard.regions.iter().filter(|value| **value & 1 == 1).count()
    };
    assert_eq!(suspects(&bench), 0);
}

#[test]
fn t5_a_transfer_keeps_the_old_primary_in_the_isr() {
    let mut bench = primary(conf(5, 0, &[0, 1, 2], &[]));
    bench.learn(conf(6, 1, &[0, 1, 2], &[]));
    assert_eq!(bench.replica.role(), Role::Secondary);
    bench.asks(B, 1, 6, prepare(context(lsn(6, 1), 0), 0));
    bench.run_lane(|_| true);
    assert!(bench.answers[&1].result.is_ok());
}

#[test]
fn t5_what_cannot_be_drained_stays_and_what_waited_goes_on() {
    let mut bench = primary(conf(5, 0, &[0, 1, 2], &[]));
    bench.write(1, 0);
    bench.step(Event::Transfer { to: 1 });
    bench.read(2, 9);
    bench.pass(1_000);
    bench.run_lane(|_| true);
    assert!(bench.is_done(2), "the read has waited long enough");
    assert_eq!((bench.proposals.len(), bench.replica.role()), (0, Role::Active));
    [B, C].into_iter().for_each(|store| bench.obey(store));
    assert!(bench.is_done(1));
}

#[test]
fn t5_another_configuration_of_this_life_lets_it_go_on_at_once() {
    for is_refused in [false, true] {
        let mut bench = primary(conf(5, 0, &[0, 1, 2], &[]));
        bench.step(Event::Transfer { to: 1 });
        assert_eq!((bench.replica.role(), bench.claimed.is_some()), (Role::Leaving, false));
        if is_refused {
            bench.step(Event::Newer { epoch: Epoch(6) });
            assert_eq!(bench.replica.role(), Role::Suspended);
            bench.pass(1_000);
            assert_eq!(bench.replica.role(), Role::Suspended, "it knows that there is a newer one");
        }
        bench.learn(conf(6, 0, &[0, 1], &[]));
        assert_eq!((bench.replica.role(), bench.claimed.is_some()), (Role::Active, true));
        bench.read(2, 9);
        bench.run_lane(|_| true);
        assert!(bench.is_done(2));
    }
}

#[test]
fn t5_is_for_other_members_of_an_isr_without_learners() {
    for (to, conf) in [
        (0, conf(5, 0, &[0, 1, 2], &[])),
        (2, conf(5, 0, &[0, 1], &[])),
        (1, conf(5, 0, &[0, 1], &[2])),
    ] {
        let mut bench = primary(conf);
        bench.step(Event::Transfer { to });
        assert_eq!((bench.proposals.len(), bench.replica.role()), (0, Role::Active), "to {to}");
    }
    let mut bench = follower(conf(5, 1, &[0, 1, 2], &[]));
    bench.step(Event::Transfer { to: 0 });
    assert!(bench.proposals.is_empty());
}

#[test]
fn t6_reopens_with_the_new_life_only() {
    for (is_renamed, role) in [(true, Role::Secondary), (false, Role::Out)] {
        let mut bench = follower(conf(5, 1, &[0, 1, 2], &[]));
        bench.restart(21);
        let mut reopened = conf(6, 2, &[0, 2], &[]);
        if is_renamed {
            reopened.members[0].incarnation = 21;
        }
        bench.learn(reopened);
        assert_eq!(bench.replica.role(), role);
    }
}

#[test]
fn t8_a_learner_that_is_given_up_takes_nothing_more() {
    let mut bench = follower(conf(5, 1, &[1, 2], &[0]));
    bench.learn(conf(6, 1, &[1, 2], &[]));
    assert_eq!(bench.replica.role(), Role::Out);
    bench.asks(B, 1, 6, copy(context(lsn(5, 1), 0), 1, 0));
    bench.asks(B, 2, 6, prepare(context(lsn(5, 1), 0), 0));
    assert_eq!(bench.refused(1), Some(Status::NotPrimary));
    assert_eq!(bench.refused(2), Some(Status::NotPrimary));
    assert!(bench.lane.is_empty());
}

#[test]
fn older_and_foreign_configurations_change_nothing() {
    let mut bench = primary(conf(5, 0, &[0, 1], &[]));
    bench.learn(conf(4, 1, &[0, 1], &[]));
    bench.learn(conf(5, 1, &[0, 1], &[]));
    let mut foreign = conf(9, 1, &[0, 1], &[]);
    foreign.shard.index = shard().index + 1;
    bench.learn(foreign);
    assert_eq!((bench.replica.role(), bench.replica.promised()), (Role::Active, Epoch(5)));
}

// ------------------------------------------------------------------------------------ each role --

/// Simulator seed 1198: a member that was told of the first half of a beginning forgot its tail, and
/// the next primary did not settle the second half.
#[test]
fn the_watermark_stands_until_the_whole_beginning_is_committed() {
    let mut bench = settling();
    let (first, second) = {
        let sent = bench.sent_to(B);
        assert_eq!(sent.len(), 2, "one SETTLE for each block");
        assert!(sent.iter().all(|request| request.op.opcode() == Opcode::Settle));
        assert!(sent.iter().all(|request| commit_of(&request.op) == Seq(0)));
        (sent[0].clone(), sent[1].clone())
    };
    let seq = |op: &RequestOp| context_of(op).expect("a SETTLE has one").lsn;
    let mut lsns = [seq(&first.op), seq(&second.op)];
    lsns.sort_unstable();
    assert_eq!(lsns, [lsn(5, 3), lsn(5, 4)], "new lsns of the new epoch");
    let (low, high) = if seq(&first.op) == lsns[0] { (first, second) } else { (second, first) };
    bench.acknowledge(B, &low);
    assert_eq!(bench.replica.role(), Role::Settling);
    bench.pass(500);
    let again = bench.operation_to(B, 4);
    assert_eq!(commit_of(&again.op), Seq(0), "the rest of the beginning is not committed");
    bench.acknowledge(B, &high);
    assert_eq!(bench.replica.role(), Role::Active);
    bench.write(1, 20);
    let write = bench.operation_to(B, 5);
    assert_eq!(commit_of(&write.op), Seq(4));
}

fn is_read(op: &Op) -> bool {
    matches!(op, Op::Read { .. })
}

fn is_poison(op: &Op) -> bool {
    matches!(op, Op::Range { kind: RangeKind::Poison, .. })
}

/// The only member of the ISR, settling, with an operation of the last reign in block 0.
fn settling_alone() -> Bench {
    let mut bench = Bench::new(NONE);
    bench.holds(lsn(4, 1), 0);
    bench.step(Event::Conf(conf(5, 0, &[0], &[])));
    bench.run_lane(|op| !is_read(op));
    assert!(bench.is_asked(is_read), "it reads the block to settle it");
    bench
}

#[test]
fn a_block_that_cannot_be_read_for_a_moment_is_settled_all_the_same() {
    let problem = Problem::Media { block: 0, error: DiskError::Errno(5) };
    let mut bench = settling_alone();
    for _ in 0..10 {
        bench.fail_lane(&problem, is_read);
        assert_eq!(bench.replica.role(), Role::Settling, "a block is in doubt");
        assert!(!bench.is_asked(is_read), "not again at once");
        bench.pass(500);
    }
    bench.run_lane(|_| true);
    assert_eq!(bench.replica.role(), Role::Active);
    assert!(!bench.tables.is_poisoned(0, 0), "its content was written again");
}

#[test]
fn a_block_that_nobody_can_read_is_poisoned_and_not_left_in_doubt() {
    let problem = Problem::Media { block: 0, error: DiskError::Errno(5) };
    let mut bench = settling_alone();
    while !bench.is_asked(is_poison) {
        assert_eq!(bench.replica.role(), Role::Settling);
        bench.fail_lane(&problem, is_read);
        bench.pass(500);
    }
    bench.run_lane(|_| true);
    assert_eq!(bench.replica.role(), Role::Active);
    assert!(bench.tables.is_poisoned(0, 0));
    assert!(bench.notes.contains(&Note::Lost { block: 0 }));
    // What is damaged here, with nobody else to ask, is lost without waiting.
    let mut bench = settling_alone();
    bench.fail_lane(&Problem::BadChecksum { block: 0 }, is_read);
    bench.run_lane(|_| true);
    assert_eq!(bench.replica.role(), Role::Active);
    assert!(bench.tables.is_poisoned(0, 0));
}

#[test]
fn a_poisoned_block_does_not_stand_against_a_new_copy() {
    let mut bench = settling_alone();
    bench.fail_lane(&Problem::BadChecksum { block: 0 }, is_read);
    bench.run_lane(|_| true);
    bench.learn(conf(6, 0, &[0], &[1]));
    bench.pass(100);
    bench.learner_tails(B, 0, &[0]);
    bench.run_lane(|_| true);
    let sent = bench.sent_to(B);
    let contents: Vec<&Content> = sent.iter().filter_map(|request| copied(&request.op)).collect();
    let [Content::Poison(lost), Content::Inherit(rest)] = contents[..] else {
        panic!("a lost block and zeros, not {contents:?}");
    };
    assert_eq!((lost.offset(), lost.length()), (0, 4096));
    assert_eq!(rest.offset(), 4096);
}

fn copied(op: &RequestOp) -> Option<&Content> {
    if let RequestOp::Copy(copy) = op { Some(&copy.content) } else { None }
}

#[test]
fn an_acknowledgement_that_comes_after_the_commitment_makes_no_copy() {
    let mut bench = primary(conf(5, 0, &[0, 1], &[2]));
    let regions_left = |bench: &Bench| bench.replica.resyncs()[0].regions_left;
    bench.pass(100);
    bench.learner_tails(C, 0, &[REGION_BLOCKS]);
    bench.run_lane(|_| true);
    assert_eq!(regions_left(&bench), 1, "its doubtful region is on its way");
    bench.write(1, 3);
    bench.run_lane(|_| true);
    bench.obey(B);
    assert!(bench.is_done(1), "a learner is not waited for");
    let late = bench.operation_to(C, 1);
    bench.acknowledge(C, &late);
    bench.pass(1_000);
    assert_eq!(regions_left(&bench), 1, "it has the write");
    bench.write(2, 3);
    bench.run_lane(|_| true);
    bench.obey(B);
    assert!(bench.is_done(2));
    assert_eq!(regions_left(&bench), 1, "it may have it in a moment");
    bench.pass(1_000);
    assert_eq!(regions_left(&bench), 2, "it does not have the write");
}

#[test]
fn clients_wait_for_the_beginning() {
    let mut bench = settling();
    bench.read(1, 0);
    bench.write(2, 10);
    bench.run_lane(|_| true);
    assert!(bench.replies.is_empty() && bench.replica.role() == Role::Settling);
    bench.obey(B);
    assert_eq!(bench.replica.role(), Role::Active);
    bench.run_lane(|_| true);
    bench.obey(B);
    assert!(bench.is_done(1) && bench.is_done(2));
}

#[test]
fn a_duplicate_is_acknowledged_when_it_is_durable_and_the_same() {
    let mut bench = follower(conf(5, 1, &[0, 1, 2], &[]));
    let peer = context(lsn(5, 1), 0);
    bench.asks(B, 1, 5, prepare(peer, 4));
    bench.asks(B, 2, 5, prepare(peer, 4));
    assert!(bench.answers.is_empty(), "neither is durable");
    assert_eq!(bench.lane.len(), 1, "it is written once");
    bench.asks(B, 3, 5, prepare(peer, 5));
    assert_eq!(bench.refused(3), Some(Status::Invalid), "another operation of the same lsn");
    bench.run_lane(|_| true);
    assert!(bench.answers[&1].result.is_ok() && bench.answers[&2].result.is_ok());
    bench.asks(B, 4, 5, prepare(peer, 4));
    assert!(bench.answers[&4].result.is_ok() && bench.lane.is_empty());
    bench.asks(B, 5, 5, prepare(context(lsn(5, 2), 0), 4));
    bench.run_lane(|_| true);
    bench.asks(B, 6, 5, prepare(context(lsn(5, 3), 2), 4));
    bench.asks(B, 7, 5, prepare(peer, 4));
    assert_eq!(bench.refused(7), Some(Status::Cancelled), "committed, and overwritten since");
}

#[test]
fn a_copy_never_replaces_what_is_newer() {
    let mut bench = follower(conf(5, 1, &[1, 2], &[0]));
    bench.asks(B, 1, 5, prepare(context(lsn(5, 9), 0), 3));
    bench.run_lane(|_| true);
    bench.asks(B, 2, 5, copy(context(lsn(5, 4), 0), 7, 0));
    assert_eq!(bench.refused(2), Some(Status::Busy), "read before the live write");
    bench.asks(B, 3, 5, copy(context(lsn(5, 9), 0), 7, 0));
    bench.run_lane(|_| true);
    assert!(bench.answers[&3].result.is_ok());
    bench.asks(B, 4, 5, copy(context(lsn(5, 9), 0), 6, REGION_BLOCKS));
    assert_eq!(bench.refused(4), Some(Status::Cancelled), "of a resync that is over");
    bench.asks(B, 5, 5, prepare(context(lsn(5, 8), 0), 200));
    assert_eq!(bench.refused(5), Some(Status::Cancelled), "what the COPY has brought already");
    bench.asks(B, 6, 5, prepare(context(lsn(5, 10), 0), BLOCKS));
    assert_eq!(bench.refused(6), Some(Status::OutOfRange));
}

#[test]
fn only_the_primary_of_the_epoch_is_obeyed() {
    let mut bench = follower(conf(5, 1, &[0, 1, 2], &[]));
    bench.asks(C, 1, 5, prepare(context(lsn(5, 1), 0), 0));
    assert_eq!(bench.refused(1), Some(Status::NotPrimary));
    let peer = PeerContext { history_id: 99, ..context(lsn(5, 1), 0) };
    bench.asks(B, 2, 5, prepare(peer, 0));
    assert_eq!(bench.refused(2), Some(Status::Fenced), "of another history");
    assert!(bench.lane.is_empty());
}

/// What a learner knows of its content counts in one reign: the seqs of the last one may lie above
/// those of a new primary, which never saw them.
#[test]
fn a_late_copy_is_refused_and_that_of_a_new_primary_is_not() {
    let mut bench = Bench::follower(NONE, conf(5, 1, &[1, 2], &[0]));
    for (token, seq) in [(1, 50), (2, 40)] {
        bench.asks(B, token, 5, copy(context(lsn(5, seq), 8), 1, 3));
        bench.run_lane(|_| true);
    }
    assert!(bench.answers[&1].result.is_ok());
    assert_eq!(bench.refused(2), Some(Status::Busy), "it is older than what is there");
    bench.learn(conf(6, 2, &[1, 2], &[0]));
    bench.asks(C, 3, 6, copy(context(lsn(6, 20), 8), 2, 3));
    bench.run_lane(|_| true);
    assert!(bench.answers[&3].result.is_ok());
}
