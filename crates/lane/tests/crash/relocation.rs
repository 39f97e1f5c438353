//! A slot that takes no write, at a replica that is alone: the lane moves what the slot holds, loses
//! nothing when it is stopped on the way, and never uses the slot again.

use crate::disk::Fate;
use crate::fates_of;
use crate::harness::{Config, Harness, Stats};
use crate::random::Random;
use lane::Op;
use lane::record::RangeKind;

const ALONE: Config = Config { solo: true, ..Config::PLAIN };
/// Ring and lane so large that no checkpoint comes by itself.
const ROOMY: Config = Config { journal_pages: 256, ..ALONE };

/// A write whose slot takes none, in each of the modes: first touch, journaled, overwrite.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Case {
    Touch,
    Redo,
    Intent,
}

const CASES: [Case; 3] = [Case::Touch, Case::Redo, Case::Intent];

/// A lane with two written slots of which the first takes no write any more, and a discarded block
/// in it. The write that meets it follows.
fn prepared(config: Config, case: Case) -> Harness {
    lane_with_a_bad_slot(config, case, false)
}

fn lane_with_a_bad_slot(config: Config, case: Case, is_twin: bool) -> Harness {
    let mut harness = Harness::new(config).expect("a fresh lane");
    harness.write(0, 20, false);
    harness.settle().expect("first touches");
    harness.take_data(10, 1, RangeKind::Inherit);
    harness.settle().expect("a discard");
    let slot = match case {
        // A twin shows which slot a first touch takes.
        Case::Touch if !is_twin => {
            let mut twin = lane_with_a_bad_slot(config, case, true);
            write(&mut twin, case);
            twin.settle().expect("a first touch");
            twin.slot_of(33)
        }
        Case::Touch => return harness,
        Case::Redo | Case::Intent => harness.slot_of(0),
    };
    harness.disk.bad.insert(u64::from(slot));
    harness
}

fn write(harness: &mut Harness, case: Case) {
    match case {
        Case::Touch => harness.write(33, 3, false),
        Case::Redo => harness.write(3, 2, false),
        Case::Intent => harness.write(3, 6, false),
    }
}

fn read_all(harness: &mut Harness) {
    (0..48).for_each(|block| harness.read(block, 1));
    harness.settle().expect("every read is answered");
    assert_eq!(harness.stats.refused_reads, 0, "every block verifies");
}

#[test]
fn alone_a_write_goes_to_another_slot_and_the_bad_one_is_never_used_again() {
    for case in CASES {
        let mut harness = prepared(ROOMY, case);
        let bad = *harness.disk.bad.first().expect("one is bad");
        let acked = harness.stats.acked;
        write(&mut harness, case);
        harness.settle().expect("the lane goes on");
        assert_eq!((harness.stats.acked - acked, harness.stats.media), (1, 0), "{case:?}");
        let counters = harness.lane().counters();
        assert_eq!((counters.slots_relocated, counters.relocations_failed), (1, 0), "{case:?}");
        let is_mode = match case {
            Case::Touch => counters.redos + counters.intents == 0,
            Case::Redo => counters.redos == 1,
            Case::Intent => counters.intents == 1,
        };
        assert!(is_mode, "{case:?}: {counters:?}");
        assert_eq!(harness.lane().space().bad, 1, "{case:?}");
        let place = if case == Case::Touch { 33 } else { 3 };
        assert_ne!(u64::from(harness.slot_of(place)), bad, "{case:?}: it has moved");
        read_all(&mut harness);
        // Known from the journal, then from a checkpoint.
        harness.crash(&[], None).expect("recovery from the journal");
        assert_eq!(harness.lane().space().bad, 1, "{case:?}: from the journal");
        harness.close_and_reopen().expect("recovery from the checkpoint");
        assert_eq!(harness.lane().space().bad, 1, "{case:?}: from the checkpoint");
        read_all(&mut harness);
        // Whatever is written from here on goes elsewhere, up to the last slot.
        for first in (0..1024).step_by(64) {
            harness.write(first, 64, false);
            harness.settle().expect("room, or an answer that there is none");
        }
        assert_eq!(harness.lane().counters().media_errors, 0, "{case:?}: nobody tried it");
        harness.close_and_reopen().expect("a clean close");
    }
}

#[test]
fn every_crash_on_the_way_to_another_slot_loses_nothing() {
    let mut stats = Stats::default();
    for case in CASES {
        for volatile in [false, true] {
            let config = Config { volatile, ..ROOMY };
            let mut has_ended = false;
            for boundary in 0..60 {
                let mut harness = prepared(config, case);
                write(&mut harness, case);
                harness.turn();
                for _ in 0..boundary {
                    has_ended = harness.disk.outstanding() == 0;
                    if !has_ended {
                        harness.complete(0);
                        harness.turn();
                    }
                }
                let mut random = Random::new(boundary);
                for fates in fates_of(harness.disk.undecided(), &mut random) {
                    for nested in [None, Some(random.next())] {
                        let mut crashed = harness.fork();
                        crashed.crash(&fates, nested).unwrap_or_else(|why| {
                            panic!("{case:?} {config:?} boundary {boundary}, {fates:?}: {why}")
                        });
                        // It goes on: the same write again, and all that is there can be read.
                        crashed.resend(1);
                        crashed.settle().expect("the lane goes on");
                        read_all(&mut crashed);
                        crashed.close_and_reopen().expect("and closes");
                        stats.add(&crashed.stats);
                    }
                }
                if has_ended {
                    break;
                }
            }
            assert!(has_ended, "{case:?}: the move comes to an end");
        }
    }
    println!("relocation: {stats:?}");
    assert!(stats.crashes > 200 && stats.relocated > 50, "{stats:?}");
}

#[test]
fn writes_that_share_a_bad_slot_move_together() {
    let mut harness = prepared(ROOMY, Case::Intent);
    // Three in flight at once: two of the bad slot, one of both slots; one more waits meanwhile.
    harness.write(0, 5, false);
    harness.write(5, 5, false);
    harness.write(14, 6, false);
    harness.turn();
    while harness.lane().counters().media_errors == 0 {
        harness.complete(0);
        harness.turn();
    }
    harness.write(10, 2, false);
    harness.take_data(12, 1, RangeKind::Inherit);
    harness.read(0, 20);
    harness.settle().expect("the lane goes on");
    assert_eq!(harness.stats.media, 0, "none of them is an error");
    assert_eq!(harness.lane().counters().slots_relocated, 1, "one slot was bad");
    read_all(&mut harness);
    harness.close_and_reopen().expect("a clean close");
    read_all(&mut harness);
}

#[test]
fn of_a_write_over_many_slots_only_the_bad_one_moves() {
    let mut harness = Harness::new(ROOMY).expect("a fresh lane");
    harness.write(0, 64, false);
    harness.settle().expect("first touches");
    let bad = harness.slot_of(32);
    harness.disk.bad.insert(u64::from(bad));
    harness.write(0, 64, false);
    harness.settle().expect("the lane goes on");
    assert_eq!(harness.lane().counters().slots_relocated, 1);
    assert_eq!(harness.lane().space().bad, 1);
    harness.close_and_reopen().expect("a clean close");
}

#[test]
fn when_the_second_slot_fails_too_it_is_an_error_and_the_next_write_tries_another() {
    for case in [Case::Touch, Case::Intent] {
        let mut harness = prepared(ROOMY, case);
        write(&mut harness, case);
        harness.turn();
        while harness.lane().counters().media_errors == 0 {
            harness.complete(0);
            harness.turn();
        }
        harness.disk.fail_slot_write_in = Some(0);
        harness.settle().expect("the lane goes on");
        let counters = harness.lane().counters();
        assert_eq!(harness.stats.media, 1, "{case:?}: the client is told");
        assert_eq!((counters.slots_relocated, counters.relocations_failed), (0, 1), "{case:?}");
        assert_eq!(harness.lane().space().bad, 0, "a disk that fails twice has no bad slot");
        // The lock is free and the lane alive; what else the slot holds is there.
        (10..20).for_each(|block| harness.read(block, 1));
        harness.settle().expect("every read is answered");
        assert_eq!(harness.stats.refused_reads, 0, "the rest of the slot is as it was");
        let acked = harness.stats.acked;
        write(&mut harness, case);
        harness.settle().expect("the lane goes on");
        assert_eq!(harness.stats.acked - acked, 1, "{case:?}: this one has luck");
        read_all(&mut harness);
        harness.close_and_reopen().expect("a clean close");
    }
}

#[test]
fn a_journaled_write_that_no_slot_takes_stops_the_lane_and_is_there_afterwards() {
    let mut harness = prepared(ROOMY, Case::Redo);
    write(&mut harness, Case::Redo);
    harness.turn();
    while harness.lane().counters().media_errors == 0 {
        harness.complete(0);
        harness.turn();
    }
    harness.disk.fail_slot_write_in = Some(0);
    let problem = harness.settle().expect_err("an acknowledged write has no place");
    assert!(problem.contains("finds no slot that takes it"), "{problem}");
    harness.disk.bad.clear();
    harness.crash(&vec![Fate::Lost; harness.disk.undecided()], None).expect("a restart places it");
    read_all(&mut harness);
}

#[test]
fn what_cannot_be_read_is_not_moved() {
    let mut harness = prepared(ROOMY, Case::Intent);
    harness.control(Op::Checkpoint);
    harness.settle().expect("a checkpoint");
    let place = harness.place_of(12);
    harness.disk.rot(place);
    write(&mut harness, Case::Intent);
    harness.settle().expect("the lane goes on");
    assert_eq!(harness.stats.media, 1, "the client is told");
    assert_eq!(harness.lane().counters().relocations_failed, 1);
    harness.read(0, 3);
    harness.read(13, 7);
    harness.settle().expect("every read is answered");
    assert_eq!(harness.stats.refused_reads, 0, "the sound blocks are where they were");
    // Writing the rotten block as well leaves nothing to be read.
    harness.write(0, 16, false);
    harness.settle().expect("the lane goes on");
    assert_eq!(harness.lane().counters().slots_relocated, 1);
    read_all(&mut harness);
}

#[test]
fn without_a_free_slot_it_is_an_error() {
    let config = Config { slots: 40, ..ROOMY };
    let mut harness = Harness::new(config).expect("a fresh lane");
    for first in (0..1024).step_by(16) {
        harness.write(first, 16, false);
        harness.settle().expect("room, or an answer that there is none");
    }
    assert!(harness.stats.no_space > 0, "the lane is full");
    // What is free is for the next checkpoint.
    let slot = harness.slot_of(0);
    harness.disk.bad.insert(u64::from(slot));
    harness.write(0, 6, false);
    harness.settle().expect("the lane goes on");
    assert_eq!(harness.stats.media, 1, "the client is told");
    assert_eq!(harness.lane().counters().relocations_failed, 1);
    // With some room again it moves.
    harness.take_data(64, 64, RangeKind::Inherit);
    harness.settle().expect("a discard");
    harness.write(0, 6, false);
    harness.settle().expect("the lane goes on");
    assert_eq!(harness.lane().counters().slots_relocated, 1);
    read_all(&mut harness);
    harness.close_and_reopen().expect("checkpoints have room");
}

#[test]
fn with_others_nothing_moves() {
    let config = Config { solo: false, ..ROOMY };
    let mut harness = prepared(config, Case::Intent);
    write(&mut harness, Case::Intent);
    harness.settle().expect("the lane goes on");
    assert_eq!(harness.stats.media, 1, "the replica tells");
    let counters = harness.lane().counters();
    assert_eq!((counters.slots_relocated, counters.relocations_failed), (0, 0));
    let mut harness = prepared(config, Case::Redo);
    write(&mut harness, Case::Redo);
    let problem = harness.settle().expect_err("the lane stops, as without relocation");
    assert!(problem.contains("placing a journaled write failed"), "{problem}");
}
