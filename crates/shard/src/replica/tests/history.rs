//! What a history that a person has forced (T7) means to the replica that was chosen, and to those
//! that went on without it before.

use super::bench::{B, Bench, HISTORY, conf, context, lsn, prepare};
use crate::conf::ShardConf;
use crate::mutant::Mutant;
use crate::replica::{Note, Role};
use lane::REGION_BLOCKS;
use proto::wire::{PeerContext, RequestOp};
use proto::{Seq, Status};

/// Seqs of the first history that was forced are above this.
const FLOOR: u64 = 1 << 44;

/// A configuration after a person has chosen its primary, which then may write alone.
fn forced(epoch: u64, primary: u8, learners: &[u8]) -> ShardConf {
    let old = conf(epoch, primary, &[primary], learners);
    ShardConf { history_id: old.next_history(), min_write: 1, ..old }
}

/// What the primary of that history says.
fn of_new(seq: u64, commit: u64) -> PeerContext {
    PeerContext { history_id: forced(9, 1, &[]).history_id, ..context(lsn(6, seq), commit) }
}

fn assigned(bench: &Bench) -> Vec<u64> {
    let seq = |note: &Note| match note {
        Note::Assigned { lsn, .. } => Some(lsn.seq.0),
        Note::Role { .. }
        | Note::Promised { .. }
        | Note::Durable { .. }
        | Note::Committed { .. }
        | Note::Copied { .. }
        | Note::CaughtUp { .. }
        | Note::Different { .. }
        | Note::Healing { .. }
        | Note::Mended { .. }
        | Note::Lost { .. } => None,
    };
    bench.notes.iter().filter_map(seq).collect()
}

#[test]
fn the_chosen_one_goes_on_above_whatever_the_others_have_reached() {
    let mut bench = Bench::new(Mutant::None);
    bench.learn(conf(4, 1, &[0, 1], &[]));
    bench.has(lsn(4, 300), 0, 300);
    bench.has(lsn(4, 301), 10, 300);
    bench.has(lsn(4, 302), 300, 300);
    bench.learn(conf(5, 1, &[1], &[]));
    assert_eq!(bench.replica.role(), Role::Out, "store 2 goes on alone, nobody knows how far");
    bench.learn(forced(6, 0, &[]));
    assert_eq!(bench.replica.role(), Role::Active, "what was in doubt is settled");
    bench.write(1, 20);
    bench.run_lane(|_| true);
    assert!(bench.is_done(1), "alone, as min_write allows");
    assert_eq!(assigned(&bench), [FLOOR + 1, FLOOR + 2, FLOOR + 3]);
}

#[test]
fn its_seqs_are_kept_when_it_is_opened_again() {
    let mut bench = Bench::new(Mutant::None);
    bench.learn(conf(5, 1, &[1], &[]));
    bench.learn(forced(6, 0, &[]));
    bench.write(1, 20);
    bench.run_lane(|_| true);
    bench.restart(21);
    let mut again = forced(7, 0, &[]);
    again.members[0].incarnation = 21;
    bench.notes.clear();
    bench.now = bench.now.after_millis(60_000);
    bench.learn(again);
    bench.write(2, 30);
    bench.run_lane(|_| true);
    assert!(bench.is_done(2));
    let seqs = assigned(&bench);
    assert!(seqs.iter().all(|&seq| seq > FLOOR + 1), "none is given twice: {seqs:?}");
}

#[test]
fn a_reign_ends_with_its_history_although_the_same_life_is_chosen() {
    let mut bench = Bench::primary(Mutant::None, conf(5, 0, &[0, 1, 2], &[]));
    bench.write(1, 0);
    bench.run_lane(|_| true);
    assert!(!bench.is_done(1), "nobody answers");
    // Others were primary in epochs that this one has never seen, and all of them are lost.
    bench.learn(forced(9, 0, &[]));
    assert_eq!(bench.refusal(1), Some(Status::NotPrimary), "its client asks again");
    bench.write(2, 20);
    bench.run_lane(|_| true);
    assert!(bench.is_done(2));
    assert_eq!(assigned(&bench), [1, FLOOR + 1, FLOOR + 2], "in doubt: settled anew");
}

/// A replica that had committed up to seq 1,000 in both regions, alone, before store 2 was chosen.
fn left_behind() -> Bench {
    let mut bench = Bench::new(Mutant::None);
    bench.learn(conf(5, 0, &[0], &[]));
    bench.has(lsn(5, 999), 0, 998);
    bench.has(lsn(5, 1_000), REGION_BLOCKS, 1_000);
    bench.learn(forced(6, 1, &[]));
    bench
}

#[test]
fn a_replica_of_the_old_history_vouches_for_nothing() {
    let mut bench = left_behind();
    assert_eq!(bench.replica.role(), Role::Out, "it serves nobody any more");
    bench.learn(forced(7, 1, &[0]));
    assert_eq!(bench.replica.role(), Role::Learner);
    bench.asks(B, 1, 7, RequestOp::Tails(of_new(0, FLOOR)));
    let tails = bench.tails(1).expect("answered at once");
    assert_eq!(tails.complete_lsn.seq, Seq(0), "a full copy");
    let regions: Vec<u64> = tails.records.iter().map(|record| record.range.offset()).collect();
    assert_eq!(regions, [0, 1 << 20], "also of what only it has written");
    // And so it stays when its store restarts in the middle of the copy.
    bench.restart(21);
    let mut again = forced(8, 1, &[0]);
    again.members[0].incarnation = 21;
    bench.learn(again);
    let peer = PeerContext { incarnation: 21, ..of_new(0, FLOOR) };
    bench.asks(B, 2, 8, RequestOp::Tails(peer));
    assert_eq!(bench.tails(2).expect("answered at once").complete_lsn.seq, Seq(0));
}

#[test]
fn messages_of_the_old_history_are_refused() {
    let mut bench = left_behind();
    bench.learn(forced(7, 1, &[0]));
    let old = PeerContext { history_id: HISTORY, ..of_new(1_001, 1_000) };
    bench.asks(B, 1, 7, prepare(old, 5));
    assert_eq!(bench.refused(1), Some(Status::Fenced));
    assert!(bench.lane.is_empty());
}

#[test]
fn its_watermark_counts_in_the_new_history_only_after_it_was_admitted() {
    let mut bench = left_behind();
    bench.learn(forced(7, 1, &[0]));
    bench.asks(B, 1, 7, prepare(of_new(FLOOR + 1, FLOOR), 5));
    bench.run_lane(|_| true);
    assert!(bench.answers[&1].result.is_ok(), "not a late duplicate of the old history");
    let admitted = ShardConf { isr: vec![0, 1], learners: vec![], ..forced(8, 1, &[]) };
    bench.learn(admitted);
    bench.asks(B, 2, 8, prepare(of_new(FLOOR + 2, FLOOR + 1), 6));
    bench.run_lane(|_| true);
    assert!(bench.answers[&2].result.is_ok());
    bench.learn(forced(9, 1, &[]));
    bench.learn(forced(10, 1, &[0]));
    bench.asks(B, 3, 10, RequestOp::Tails(of_new(0, FLOOR + 9)));
    let tails = bench.tails(3).expect("answered at once");
    assert_eq!(tails.complete_lsn.seq, Seq(FLOOR + 1), "what it knew when it left the ISR");
}
