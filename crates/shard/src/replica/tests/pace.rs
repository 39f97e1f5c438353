//! How fast learners are made equal, with disks that take as long for a region as the test says.

use super::bench::{B, Bench, C, conf, context, lsn, prepare};
use crate::conf::ShardConf;
use crate::conf::transition::Transition;
use crate::mutant::Mutant;
use crate::replica::{Event, Note};
use lane::{Op, REGION_BLOCKS};
use proto::Tick;
use proto::wire::Opcode;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;
/// Of the shard. The last one is where clients read.
const REGIONS: u32 = 128;
const CANCEL: Transition = Transition::Cancel { copy: 2 };

/// A primary, disks and a learner that need so long for a region together, and perhaps a client.
struct Scene {
    bench: Bench,
    region_nanos: u64,
    /// A region is done then.
    done: Option<Tick>,
    has_client: bool,
    token: u64,
}

impl Scene {
    /// The learner lacks every region but the last.
    fn new(conf: ShardConf, region_nanos: u64, has_client: bool) -> Scene {
        let mut bench = Bench::primary(Mutant::None, conf);
        bench.grow(REGIONS);
        let mut scene = Scene { bench, region_nanos, done: None, has_client, token: 0 };
        scene.client();
        scene.bench.pass(100);
        let lacking: Vec<u32> = (0..REGIONS - 1).map(|region| region * REGION_BLOCKS).collect();
        scene.bench.learner_tails(C, 0, &lacking);
        scene
    }

    fn client(&mut self) {
        if self.has_client {
            self.token += 1;
            self.bench.read(self.token, (REGIONS - 1) * REGION_BLOCKS);
            self.bench.run_lane(|op| !is_region(op));
            assert!(self.bench.is_done(self.token), "clients do not wait for a resync");
        }
    }

    /// Let time pass; gives how many regions were copied in it.
    fn run(&mut self, nanos: u64) -> usize {
        let (before, end) = (self.copied(), self.bench.now.after_nanos(nanos));
        while self.bench.now < end {
            if self.done.is_none() && self.bench.is_asked(is_region) {
                self.done = Some(self.bench.now.after_nanos(self.region_nanos));
            }
            // The client comes every 10 ms, sooner if something else happens before.
            let next = self.done.unwrap_or(end).min(end).0 - self.bench.now.0;
            self.bench.wait(next.min(10 * MS));
            self.client();
            if self.done.is_some_and(|done| done <= self.bench.now) {
                self.done = None;
                self.bench.run_lane(is_region);
                self.bench.obey(C);
            }
        }
        self.copied() - before
    }

    fn copied(&self) -> usize {
        self.bench.notes.iter().filter(|note| matches!(note, Note::Copied { .. })).count()
    }

    fn is_proposed(&self, is_it: impl Fn(&Transition) -> bool) -> bool {
        self.bench.proposals.iter().any(is_it)
    }
}

fn is_region(op: &Op) -> bool {
    matches!(op, Op::Read { count: REGION_BLOCKS, .. })
}

/// In sync on two of three stores.
fn degraded() -> ShardConf {
    conf(5, 0, &[0, 1], &[2])
}

#[test]
fn without_clients_a_resync_takes_what_there_is() {
    let mut scene = Scene::new(degraded(), 3 * MS, false);
    assert_eq!(scene.run(300 * MS), 100, "one region after the other");
}

#[test]
fn with_clients_it_takes_a_fifth_of_the_time() {
    let mut scene = Scene::new(degraded(), 3 * MS, true);
    assert_eq!(scene.run(300 * MS), 20, "3 ms of every 15");
    scene.region_nanos = 6 * MS;
    assert_eq!(scene.run(300 * MS), 10, "disks that have more to do are left alone longer");
}

#[test]
fn with_one_copy_only_it_takes_more() {
    let mut scene = Scene::new(conf(5, 0, &[0], &[2]), 3 * MS, true);
    assert_eq!(scene.run(300 * MS), 60, "3 ms of every 5");
}

#[test]
fn slow_disks_never_make_it_slower_than_32_regions_a_second() {
    let mut scene = Scene::new(degraded(), 20 * MS, true);
    assert_eq!(scene.run(3 * SECOND), 96, "a fifth of the time would be 30");
    let mut scene = Scene::new(degraded(), 100 * MS, true);
    assert_eq!(scene.run(5 * SECOND), 50, "as fast as these disks are, which is slower");
}

#[test]
fn clients_that_are_gone_are_not_waited_for() {
    let mut scene = Scene::new(degraded(), 3 * MS, true);
    assert_eq!(scene.run(150 * MS), 10);
    scene.has_client = false;
    assert_eq!(scene.run(900 * MS), 60, "they may be thinking");
    scene.run(115 * MS);
    assert_eq!(scene.run(90 * MS), 30, "they have not come back");
}

#[test]
fn under_steady_load_it_comes_to_its_end_and_comparing_has_a_share_too() {
    let mut scene = Scene::new(degraded(), 3 * MS, true);
    let all = (REGIONS - 1) as usize;
    assert_eq!(scene.run(u64::from(REGIONS) * 15 * MS), all, "copied");
    assert!(!scene.is_proposed(|_| true), "not compared yet");
    let is_admission = |transition: &Transition| matches!(transition, Transition::Admit { .. });
    scene.run(u64::from(REGIONS) * 4 * MS);
    assert!(!scene.is_proposed(is_admission), "3 ms of every 5: a fifth of it is left");
    scene.run(u64::from(REGIONS) * MS);
    assert!(scene.is_proposed(is_admission));
    assert_eq!(scene.copied(), all, "nothing was copied twice");
}

/// A store that comes back needs all of its shards at once.
#[test]
fn waiting_for_the_turn_of_another_shard_is_not_the_learners_silence() {
    let mut scene = Scene::new(degraded(), 3 * MS, true);
    scene.run(30 * MS);
    // Another shard of the lane is quicker, turn by turn, for longer than a learner may be silent.
    let until = scene.bench.now.after_nanos(5 * SECOND);
    let mut copied = 0;
    while scene.bench.now < until {
        let now = scene.bench.now;
        let other = scene.bench.pace.copies(false).begin(now, false, false);
        assert!(other.is_ok(), "it takes its turn");
        copied += scene.run(5 * MS);
    }
    assert!(copied <= 1, "one region was under way, then the turn was another's: {copied}");
    assert!(!scene.is_proposed(|transition| *transition == CANCEL), "it was asked for nothing");
    assert!(scene.run(SECOND) > 60, "its turn has come");
    assert!(!scene.is_proposed(|transition| *transition == CANCEL), "it answers at once");
}

#[test]
fn a_learner_that_does_not_answer_is_given_up_under_load_too() {
    let mut scene = Scene::new(degraded(), 3 * MS, true);
    scene.run(30 * MS);
    // Regions are read here, and nothing comes back from there.
    let began = scene.bench.now;
    while !scene.is_proposed(|transition| *transition == CANCEL) {
        assert!(scene.bench.now < began.after_nanos(3 * SECOND), "nobody notices");
        scene.bench.wait(10 * MS);
        scene.bench.run_lane(is_region);
        scene.bench.sent_to(C);
        scene.client();
    }
    assert!(scene.bench.now >= began.after_nanos(3 * SECOND / 2), "a moment is no silence");
}

#[test]
fn a_write_at_a_follower_is_a_clients_and_a_copy_is_not() {
    let mut bench = Bench::follower(Mutant::None, conf(5, 1, &[1], &[0]));
    bench.asks(B, 1, 5, super::bench::copy(context(lsn(5, 1), 0), 1, 0));
    assert!(!bench.pace.is_busy(bench.now), "resyncs are not to slow one another down for good");
    let write = prepare(context(lsn(5, 2), 0), 4);
    assert_eq!(write.opcode(), Opcode::Prepare);
    bench.asks(B, 2, 5, write);
    assert!(bench.pace.is_busy(bench.now), "the disk is the client's, too");
    bench.now = bench.now.after_nanos(SECOND);
    bench.step(Event::Tick);
    assert!(!bench.pace.is_busy(bench.now), "for a second");
}
