//! Damaged blocks: found one by one, mended wherever a good copy exists, told until it is over.
//!
//! All content is zeros here; that what is mended is right the simulator shows. What these tests
//! look at is which blocks are read where, which are written again, and what is told of the others.

use super::bench::{
    B, BLOCKS, Bench, C, ME, conf, context, done, life, lsn, nothing, prepare, range,
};
use crate::conf::transition::Transition;
use crate::conf::{ShardConf, StoreId};
use crate::mutant::Mutant;
use crate::replica::follower::blocks_of;
use crate::replica::{DamageFacts, Event, Note, Role, VerifyReport};
use crate::seeded::demand;
use lane::{Op, Outcome, Problem, REGION_BLOCKS};
use proto::disk::DiskError;
use proto::wire::{
    ByteRange, CheckedData, Digest, Failure, Opcode, PrepareOp, Reply, ReplyOp, Request, RequestOp,
};
use proto::{Pool, Status};
use std::collections::{BTreeMap, BTreeSet};

const NONE: Mutant = Mutant::None;

/// Which blocks are damaged on which store; whatever is written is good again.
#[derive(Default)]
struct Rot {
    damaged: BTreeMap<StoreId, BTreeSet<u32>>,
    /// Blocks that the own device fails to read, and how often it still will.
    failing: BTreeMap<u32, u32>,
    /// Stores whose disk has stopped: they cannot say what they hold.
    stopped: BTreeSet<StoreId>,
    /// Stores whose damaged blocks stay so when they are written.
    hopeless: BTreeSet<StoreId>,
    /// Reads of the own lane.
    reads: usize,
}

impl Rot {
    fn of<const N: usize>(damaged: [(StoreId, &[u32]); N]) -> Rot {
        let sets = damaged.map(|(store, blocks)| (store, blocks.iter().copied().collect()));
        Rot { damaged: BTreeMap::from(sets), ..Rot::default() }
    }

    fn at(&self, store: StoreId) -> Vec<u32> {
        self.damaged.get(&store).into_iter().flatten().copied().collect()
    }

    fn first_in(&self, store: StoreId, first: u32, count: u32) -> Option<u32> {
        self.damaged.get(&store)?.range(first..first + count).next().copied()
    }

    fn written(&mut self, store: StoreId, (first, count): (u32, u32)) {
        if self.hopeless.contains(&store) {
            return;
        }
        if let Some(damaged) = self.damaged.get_mut(&store) {
            damaged.retain(|block| !(first..first + count).contains(block));
        }
    }

    /// The own lane's answer.
    fn perform(&mut self, bench: &mut Bench, op: Op) -> Result<Outcome, Problem> {
        match &op {
            &Op::Read { first, count, with_poison, .. } => {
                self.reads += 1;
                for block in first..first + count {
                    if let Some(left) = self.failing.get_mut(&block).filter(|left| **left > 0) {
                        *left -= 1;
                        return Err(Problem::Media { block: first, error: DiskError::Errno(5) });
                    }
                }
                let is_poisoned = |block: &u32| bench.tables.is_poisoned(0, *block);
                let poisoned = (first..first + count).find(is_poisoned);
                if let Some(block) = poisoned.filter(|_| !with_poison) {
                    return Err(Problem::Poisoned { block });
                }
                if let Some(block) = self.first_in(ME, first, count) {
                    return Err(Problem::BadChecksum { block });
                }
            }
            Op::Write { first, crcs, .. } => self.written(ME, (*first, crcs.len() as u32)),
            Op::Range { first, count, .. } => self.written(ME, (*first, *count)),
            Op::Create { .. }
            | Op::Delete { .. }
            | Op::Resize { .. }
            | Op::Conf { .. }
            | Op::Commit { .. }
            | Op::Region { .. }
            | Op::Checkpoint
            | Op::Close => {}
        }
        Ok(bench.perform(op))
    }

    /// Another store's answer.
    fn answer(&mut self, store: StoreId, request: &Request, pool: &Pool) -> Reply {
        let refuse = |status| {
            let opcode = request.op.opcode();
            let Request { command_id, shard, epoch, .. } = *request;
            let result = Err(Failure { opcode, status, detail: 0 });
            Reply { command_id, shard, epoch, seq: proto::Seq(0), result }
        };
        let (first, count) = match &request.op {
            RequestOp::Read { .. } if self.stopped.contains(&store) => {
                return refuse(Status::DiskFailed);
            }
            RequestOp::Read { range, .. } => blocks_of(*range),
            RequestOp::Digest(digest) => (digest.first_region * REGION_BLOCKS, REGION_BLOCKS),
            RequestOp::Prepare(prepare) => match &prepare.op {
                PrepareOp::Write(data) => {
                    return self.wrote(store, request, blocks_of(data.range()));
                }
                PrepareOp::Discard(range) => return self.wrote(store, request, blocks_of(*range)),
                PrepareOp::WriteZeroes { .. } | PrepareOp::CompareAndWrite { .. } => {
                    panic!("no test leads to {:?}", prepare.op)
                }
            },
            RequestOp::Copy(copy) => {
                return self.wrote(store, request, blocks_of(copy.content.range()));
            }
            RequestOp::Settle(settle) => {
                return self.wrote(store, request, blocks_of(settle.content.range()));
            }
            RequestOp::Hello(_)
            | RequestOp::FencePath { .. }
            | RequestOp::Ping(_)
            | RequestOp::Write(_)
            | RequestOp::Flush
            | RequestOp::Discard(_)
            | RequestOp::WriteZeroes { .. }
            | RequestOp::CompareAndWrite { .. }
            | RequestOp::Tails(_)
            | RequestOp::Snap(_)
            | RequestOp::Attach(..)
            | RequestOp::NeedConf(_) => return done(request, life(store), (1_000, BLOCKS), pool),
        };
        if self.first_in(store, first, count).is_some() {
            return refuse(Status::BadChecksum);
        }
        if !matches!(request.op, RequestOp::Read { .. }) {
            return done(request, life(store), (1_000, BLOCKS), pool);
        }
        let Outcome::Read { data, crcs } = nothing(count, pool) else { unreachable!("a read") };
        let Request { command_id, shard, epoch, .. } = *request;
        let result = Ok(ReplyOp::Read(CheckedData::assume(0, crcs, data)));
        Reply { command_id, shard, epoch, seq: proto::Seq(0), result }
    }

    fn wrote(&mut self, store: StoreId, request: &Request, blocks: (u32, u32)) -> Reply {
        self.written(store, blocks);
        done(request, life(store), (1_000, BLOCKS), &Pool::new(0))
    }

    /// Let everything go on that is under way, until nothing is.
    fn settle(&mut self, bench: &mut Bench) {
        let pool = Pool::new(0);
        for _ in 0..20_000 {
            if let Some((&op, _)) = bench.lane.first_key_value() {
                let request = bench.lane.remove(&op).expect("just found");
                let result = self.perform(bench, request);
                bench.step(Event::Lane { op, result });
            } else if bench.sent.is_empty() {
                return;
            } else {
                let (store, request) = bench.sent.remove(0);
                let reply = self.answer(store, &request, &pool);
                bench.step(Event::PeerReply { from: store, reply });
            }
        }
        panic!("it never comes to rest");
    }

    /// The same for so many milliseconds.
    fn pass(&mut self, bench: &mut Bench, millis: u64) {
        for _ in 0..millis / 100 {
            bench.pass(100);
            self.settle(bench);
        }
    }
}

fn three() -> ShardConf {
    conf(5, 0, &[0, 1, 2], &[])
}

fn alone() -> ShardConf {
    ShardConf { min_write: 1, ..conf(5, 0, &[0], &[]) }
}

fn primary(mutant: Mutant) -> Bench {
    Bench::primary(mutant, three())
}

fn mended(bench: &Bench) -> Vec<u32> {
    let block = |note: &Note| if let Note::Mended { block } = note { Some(*block) } else { None };
    let blocks: BTreeSet<u32> = bench.notes.iter().filter_map(block).collect();
    blocks.into_iter().collect()
}

fn told(facts: &DamageFacts) -> (&[(u32, u32)], u64) {
    (&facts.runs, facts.blocks)
}

/// A request of eight blocks, of which each copy has another damaged one: none of them can serve it
/// as a whole, and every block is there.
pub(crate) fn other_blocks(mutant: Mutant) -> Result<(), String> {
    let mut bench = primary(mutant);
    let mut rot = Rot::of([(ME, &[1]), (B, &[2]), (C, &[3])]);
    bench.read_run(1, 0, 8);
    rot.settle(&mut bench);
    demand(bench.is_done(1), "a read failed although each of its blocks has a good copy")
}

/// Three damaged blocks of one read.
pub(crate) fn every_block(mutant: Mutant) -> Result<(), String> {
    let mut bench = primary(mutant);
    let mut rot = Rot::of([(ME, &[1, 4, 6])]);
    bench.read_run(1, 0, 8);
    rot.settle(&mut bench);
    demand(bench.is_done(1), "a read failed although others have all of it")?;
    demand(rot.at(ME).is_empty(), "a read that met three damaged blocks did not mend all of them")
}

/// Blocks that only a secondary cannot read: a verification that repairs finds them.
pub(crate) fn at_a_member(mutant: Mutant) -> Result<(), String> {
    let mut bench = primary(mutant);
    let mut rot = Rot::of([(B, &[7, 300])]);
    bench.step(Event::Verify { token: 1, is_repairing: true });
    rot.settle(&mut bench);
    let report = bench.verified.pop().expect("nothing stands against it").expect("it serves");
    demand(rot.at(B).is_empty(), "what a secondary could not read was left so")?;
    demand(report.mended_blocks == 2, "blocks that were mended were not counted")
}

#[test]
fn a_block_is_read_where_it_is_good_and_the_others_are_not_asked_for_it() {
    let mut bench = primary(NONE);
    let mut rot = Rot::of([(ME, &[1, 2]), (B, &[2])]);
    bench.read_run(1, 0, 8);
    rot.settle(&mut bench);
    assert!(bench.is_done(1));
    assert_eq!((rot.at(ME), rot.at(B)), (vec![], vec![]), "both copies of block 2 are mended");
    assert_eq!(mended(&bench), [1, 2]);
    assert_eq!(told(&bench.replica.damaged()), (&[][..], 0), "it is over");
    assert_eq!(bench.replica.damage_found(), 2, "it was there");
    assert_eq!(told(&bench.replica.lost()), (&[][..], 0));
}

#[test]
fn what_nobody_has_fails_and_is_told_until_it_is_overwritten() {
    let mut bench = primary(NONE);
    let mut rot = Rot::of([(ME, &[1, 5]), (B, &[1]), (C, &[1])]);
    bench.read_run(1, 0, 8);
    rot.settle(&mut bench);
    assert_eq!(bench.refusal(1), Some(Status::BadChecksum));
    assert_eq!(rot.at(ME), [1], "the other damaged block of the request is mended all the same");
    assert_eq!(told(&bench.replica.damaged()), (&[(1, 1)][..], 1));
    assert_eq!(told(&bench.replica.lost()), (&[(1, 1)][..], 1));
    bench.read_run(2, 2, 6);
    rot.settle(&mut bench);
    assert!(bench.is_done(2), "its neighbours are served");
    bench.fill(3, 1);
    rot.settle(&mut bench);
    assert!(bench.is_done(3));
    assert_eq!(bench.replica.damaged().blocks + bench.replica.lost().blocks, 0);
    bench.read_run(4, 0, 8);
    rot.settle(&mut bench);
    assert!(bench.is_done(4));
}

#[test]
fn a_discard_ends_damage_too() {
    let mut bench = primary(NONE);
    let mut rot = Rot::of([(ME, &[1]), (B, &[1]), (C, &[1])]);
    bench.read(1, 1);
    rot.settle(&mut bench);
    assert_eq!((bench.replica.damaged().blocks, bench.replica.lost().blocks), (1, 1));
    bench.write(2, 1);
    rot.settle(&mut bench);
    assert_eq!((bench.replica.damaged().blocks, bench.replica.lost().blocks), (0, 0));
}

#[test]
fn a_single_copy_tells_what_is_lost_and_takes_it_back_when_it_can_be_read() {
    let mut bench = Bench::new(NONE);
    bench.learn(alone());
    assert_eq!(bench.replica.role(), Role::Active);
    let mut rot = Rot::of([(ME, &[1, 2, 9])]);
    bench.read_run(1, 0, 16);
    rot.settle(&mut bench);
    assert_eq!(bench.refusal(1), Some(Status::BadChecksum));
    assert_eq!(told(&bench.replica.lost()), (&[(1, 2), (9, 1)][..], 3));
    assert_eq!(bench.replica.damaged(), bench.replica.lost());
    assert!(!bench.tables.is_poisoned(0, 1), "no copy waits for it: it may be readable again");
    rot.damaged.clear();
    bench.read_run(2, 0, 16);
    rot.settle(&mut bench);
    assert!(bench.is_done(2));
    assert_eq!((bench.replica.damaged().blocks, bench.replica.lost().blocks), (0, 0));
}

#[test]
fn an_error_of_the_device_that_passes_is_no_damage() {
    let mut bench = primary(NONE);
    let mut rot = Rot { failing: BTreeMap::from([(3, 2)]), ..Rot::default() };
    bench.read_run(1, 0, 8);
    rot.settle(&mut bench);
    assert!(bench.is_done(1));
    assert_eq!((bench.replica.damage_found(), mended(&bench)), (0, vec![]));
    let mut rot = Rot { failing: BTreeMap::from([(3, 100)]), ..Rot::default() };
    bench.read(2, 3);
    rot.settle(&mut bench);
    assert!(bench.is_done(2), "a member has it");
    assert_eq!((bench.replica.damage_found(), mended(&bench)), (1, vec![3]));
}

#[test]
fn a_member_that_cannot_say_is_asked_again_and_nothing_is_called_lost() {
    let mut bench = primary(NONE);
    let mut rot = Rot::of([(ME, &[1])]);
    bench.read(1, 1);
    bench.run_lane(|_| false);
    let (&op, _) = bench.lane.first_key_value().expect("the read");
    bench.lane.remove(&op);
    bench.step(Event::Lane { op, result: Err(Problem::BadChecksum { block: 1 }) });
    assert_eq!(bench.sent_to(B).len(), 1, "and the answer is lost");
    assert_eq!(bench.replica.lost().blocks, 0);
    bench.pass(500);
    rot.settle(&mut bench);
    assert!(bench.is_done(1));
    assert_eq!(mended(&bench), [1]);
}

#[test]
fn the_only_other_member_is_asked_again_when_its_answer_is_lost() {
    let mut bench = Bench::primary(NONE, conf(5, 0, &[0, 1], &[]));
    let mut rot = Rot::of([(ME, &[1])]);
    bench.read(1, 1);
    bench.fail_lane(&Problem::BadChecksum { block: 1 }, |op| matches!(op, Op::Read { .. }));
    assert_eq!(bench.sent_to(B).len(), 1, "and the answer is lost");
    bench.pass(500);
    rot.settle(&mut bench);
    assert!(bench.is_done(1));
    assert_eq!((mended(&bench), bench.replica.lost().blocks), (vec![1], 0));
}

#[test]
fn what_a_member_could_not_say_is_not_called_lost() {
    let mut bench = primary(NONE);
    let mut rot = Rot::of([(ME, &[1]), (C, &[1])]);
    rot.stopped.insert(B);
    bench.read(1, 1);
    rot.settle(&mut bench);
    assert_eq!(bench.refusal(1), Some(Status::BadChecksum));
    assert_eq!((bench.replica.damaged().blocks, bench.replica.lost().blocks), (1, 0));
}

/// A secondary that is asked for the digest of a region.
fn digest(region: u32) -> RequestOp {
    let peer = context(lsn(5, 9), 8);
    let (resync_id, layer_snap_seq, region_count) = (0, 0, 1);
    RequestOp::Digest(Digest {
        peer,
        resync_id,
        layer_snap_seq,
        first_region: region,
        region_count,
    })
}

#[test]
fn a_secondary_knows_every_damaged_block_of_what_it_was_asked_to_read() {
    let mut bench = Bench::follower(NONE, conf(5, 1, &[0, 1, 2], &[]));
    let mut rot = Rot::of([(ME, &[3, 4, 200])]);
    bench.asks(B, 1, 5, digest(0));
    rot.settle(&mut bench);
    assert_eq!(bench.refused(1), Some(Status::BadChecksum));
    assert_eq!(told(&bench.replica.damaged()), (&[(3, 2), (200, 1)][..], 3));
    assert_eq!(bench.replica.lost().blocks, 0, "the others are not its business");
    bench.asks(B, 2, 5, prepare(context(lsn(5, 10), 8), 4));
    rot.settle(&mut bench);
    assert_eq!(told(&bench.replica.damaged()), (&[(3, 1), (200, 1)][..], 2));
    bench.step(Event::CheckBlocks { runs: vec![(0, 10), (200, 1), (BLOCKS, 7), (500, u32::MAX)] });
    rot.settle(&mut bench);
    assert_eq!(bench.replica.damaged().blocks, 2, "still so");
    rot.damaged.clear();
    bench.step(Event::CheckBlocks { runs: vec![(3, 1), (200, 1)] });
    rot.settle(&mut bench);
    assert_eq!(bench.replica.damaged().blocks, 0);
}

/// Halving loses no block, whatever the length of what is halved.
#[test]
fn every_damaged_block_of_a_run_of_any_length_is_found() {
    for count in 1..=12 {
        let all: Vec<u32> = (0..count).collect();
        let mut bench = Bench::follower(NONE, conf(5, 1, &[0, 1, 2], &[]));
        let mut rot = Rot::of([(ME, &all)]);
        bench.step(Event::CheckBlocks { runs: vec![(0, count)] });
        rot.settle(&mut bench);
        assert_eq!(told(&bench.replica.damaged()), (&[(0, count)][..], u64::from(count)));
        let mut bench = primary(NONE);
        bench.read_run(1, 0, count);
        rot.settle(&mut bench);
        assert!(bench.is_done(1));
        assert_eq!((rot.at(ME), mended(&bench)), (vec![], all));
    }
}

#[test]
fn a_write_that_fails_ends_no_damage() {
    let mut bench = Bench::follower(NONE, conf(5, 1, &[0, 1, 2], &[]));
    let mut rot = Rot::of([(ME, &[3])]);
    bench.step(Event::CheckBlocks { runs: vec![(3, 1)] });
    rot.settle(&mut bench);
    bench.asks(B, 1, 5, prepare(context(lsn(5, 10), 8), 3));
    bench.fail_lane(&Problem::Media { block: 3, error: DiskError::Errno(5) }, |op| {
        matches!(op, Op::Range { .. })
    });
    assert_eq!(told(&bench.replica.damaged()), (&[(3, 1)][..], 1), "it holds what it held");
}

/// Poison names one block for certain, and says nothing of its neighbours.
#[test]
fn damage_beside_a_poisoned_block_is_found_too() {
    let mut bench = Bench::follower(NONE, conf(5, 1, &[0, 1, 2], &[]));
    bench.poisons(lsn(5, 1), 17);
    let mut rot = Rot::of([(ME, &[14, 20])]);
    let range = ByteRange::new(12 * 4096, 12 * 4096).expect("whole blocks");
    bench.asks(B, 1, 5, RequestOp::Read { range, snap_seq: None });
    rot.settle(&mut bench);
    assert_eq!(told(&bench.replica.damaged()), (&[(14, 1), (17, 1), (20, 1)][..], 3));
}

/// Whoever has promised more belongs to another reign: this one must not count its copy.
#[test]
fn what_is_read_while_a_newer_epoch_is_promised_is_not_told() {
    let mut bench = Bench::follower(NONE, conf(5, 1, &[0, 1, 2], &[]));
    bench.asks(B, 1, 5, digest(0));
    bench.asks(B, 2, 5, RequestOp::Read { range: range(3), snap_seq: None });
    bench.step(Event::Conf(conf(6, 2, &[0, 2], &[])));
    bench.run_lane(|_| true);
    assert_eq!([1, 2].map(|token| bench.refused(token)), [Some(Status::StaleEpoch); 2]);
}

/// What nobody can give is the knowledge of one reign: a later one has asked nobody yet.
#[test]
fn what_is_lost_is_told_by_the_reign_that_has_found_it() {
    let mut bench = primary(NONE);
    let mut rot = Rot::of([(ME, &[1]), (B, &[1]), (C, &[1])]);
    bench.read(1, 1);
    rot.settle(&mut bench);
    assert_eq!(bench.replica.lost().blocks, 1);
    bench.learn(conf(6, 1, &[0, 1, 2], &[]));
    assert_eq!((bench.replica.damaged().blocks, bench.replica.lost().blocks), (1, 0));
    rot.damaged.remove(&B);
    bench.learn(conf(7, 0, &[0, 1, 2], &[]));
    rot.settle(&mut bench);
    assert_eq!(bench.replica.role(), Role::Active);
    assert_eq!((mended(&bench), bench.replica.lost().blocks), (vec![1], 0));
}

#[test]
fn a_new_primary_mends_what_it_has_known_as_a_secondary() {
    let mut bench = Bench::follower(NONE, conf(5, 1, &[0, 1, 2], &[]));
    let mut rot = Rot::of([(ME, &[3, 200])]);
    bench.asks(B, 1, 5, digest(0));
    rot.settle(&mut bench);
    assert_eq!(bench.replica.damaged().blocks, 2);
    bench.learn(conf(6, 0, &[0, 1, 2], &[]));
    rot.settle(&mut bench);
    assert_eq!(bench.replica.role(), Role::Active);
    assert_eq!((mended(&bench), bench.replica.damaged().blocks), (vec![3, 200], 0));
}

#[test]
fn blocks_that_are_poisoned_in_the_map_are_known_from_the_start() {
    let mut bench = Bench::follower(NONE, conf(5, 1, &[0, 1, 2], &[]));
    bench.poisons(lsn(5, 1), 17);
    bench.poisons(lsn(5, 2), 18);
    bench.restart(99);
    assert_eq!(told(&bench.replica.damaged()), (&[(17, 2)][..], 2));
}

#[test]
fn checked_blocks_are_mended_by_a_primary() {
    let mut bench = primary(NONE);
    let mut rot = Rot::of([(ME, &[3, 300, BLOCKS - 1])]);
    bench.step(Event::CheckBlocks { runs: vec![(0, 8), (290, 20), (BLOCKS - 3, 9)] });
    rot.settle(&mut bench);
    assert_eq!((mended(&bench), rot.at(ME)), (vec![3, 300, BLOCKS - 1], vec![]));
}

// ------------------------------------------------------------------------------- verifications --

fn verify(bench: &mut Bench, rot: &mut Rot, is_repairing: bool) -> VerifyReport {
    bench.step(Event::Verify { token: 1, is_repairing });
    rot.settle(bench);
    bench.verified.pop().expect("nothing stands against it").expect("it serves")
}

#[test]
fn a_verification_that_only_looks_mends_nothing_and_knows_the_own_damage() {
    let mut bench = primary(NONE);
    let mut rot = Rot::of([(ME, &[3, 9]), (B, &[7])]);
    let report = verify(&mut bench, &mut rot, false);
    assert_eq!(report.unreadable, [(0, ME), (0, B)]);
    assert_eq!((report.mended_blocks, mended(&bench)), (0, vec![]));
    assert_eq!(told(&bench.replica.damaged()), (&[(3, 1), (9, 1)][..], 2));
}

#[test]
fn a_verification_that_repairs_tells_only_what_stays_unreadable() {
    let mut bench = primary(NONE);
    let mut rot = Rot::of([(ME, &[3, 9, 11]), (B, &[7, 11, 400]), (C, &[9, 11])]);
    let report = verify(&mut bench, &mut rot, true);
    let all = [(0, ME), (0, B), (0, C)];
    assert_eq!((report.regions, &report.unreadable[..]), (2, &all[..]), "block 11 is nowhere");
    assert_eq!(report.mended_blocks, 4, "3, 7, 9 and 400");
    assert_eq!((rot.at(ME), rot.at(B), rot.at(C)), (vec![11], vec![11], vec![11]));
    assert_eq!(told(&bench.replica.lost()), (&[(11, 1)][..], 1));
    bench.fill(7, 11);
    rot.settle(&mut bench);
    let report = verify(&mut bench, &mut rot, true);
    assert_eq!((report.unreadable, report.mended_blocks), (vec![], 0));
}

#[test]
fn a_verification_of_a_single_copy_tells_what_is_lost() {
    let mut bench = Bench::new(NONE);
    bench.learn(alone());
    let mut rot = Rot::of([(ME, &[3, 300])]);
    let report = verify(&mut bench, &mut rot, true);
    assert_eq!((report.unreadable, report.mended_blocks), (vec![(0, ME), (1, ME)], 0));
    assert_eq!(bench.replica.lost().blocks, 2);
}

#[test]
fn a_member_that_leaves_is_not_searched_any_more() {
    let mut bench = primary(NONE);
    let mut rot = Rot::of([(B, &[7])]);
    bench.step(Event::Verify { token: 1, is_repairing: true });
    let pool = Pool::new(0);
    // B says that it cannot read the region, and nothing more.
    loop {
        bench.run_lane(|_| true);
        if bench.sent.iter().any(|(_, request)| request.op.opcode() == Opcode::Read) {
            break;
        }
        let (store, request) = bench.sent.remove(0);
        let reply = rot.answer(store, &request, &pool);
        bench.step(Event::PeerReply { from: store, reply });
    }
    bench.sent.clear();
    rot.stopped.insert(B);
    bench.learn(conf(6, 0, &[0, 2], &[]));
    rot.pass(&mut bench, 500);
    let report = bench.verified.pop().expect("nothing stands against it").expect("it serves");
    assert_eq!((report.regions, report.copies, report.unreadable), (2, 2, vec![]));
}

/// A verification beside a client, after its first region. That took 2 ms, so the second one waits
/// 8 ms for its turn: a fifth of the time is for it.
fn between_regions() -> (Bench, Rot) {
    let (mut bench, mut rot) = (primary(NONE), Rot::default());
    bench.read(1, 0);
    rot.settle(&mut bench);
    bench.step(Event::Verify { token: 1, is_repairing: false });
    bench.now = bench.now.after_nanos(2_000_000);
    rot.settle(&mut bench);
    assert_eq!(bench.replica.verifying(), Some((1, 2)));
    (bench, rot)
}

#[test]
fn a_verification_yields_to_clients() {
    let (mut bench, mut rot) = between_regions();
    let ended = bench.now;
    bench.wait(1_000_000_000);
    assert_eq!(bench.now.0 - ended.0, 8_000_000);
    rot.settle(&mut bench);
    assert!(matches!(bench.verified[..], [Ok(_)]));
}

/// Whoever left in the middle was compared in a part only: nothing is known of the rest.
#[test]
fn a_verification_counts_the_copies_that_were_there_from_its_beginning_to_its_end() {
    let (mut bench, mut rot) = between_regions();
    bench.learn(conf(6, 0, &[0, 1], &[]));
    bench.wait(1_000_000_000);
    rot.settle(&mut bench);
    let report = bench.verified.pop().expect("nothing stands against it").expect("it serves");
    assert_eq!((report.regions, report.copies), (2, 2));
}

#[test]
fn a_verification_does_not_wait_while_no_client_is_there() {
    let mut bench = primary(NONE);
    let started = bench.now;
    assert_eq!(verify(&mut bench, &mut Rot::default(), false).regions, 2);
    assert_eq!(bench.now, started);
}

// ------------------------------------------------------------------------------------- learners --

/// A primary that makes C equal, which is in doubt about block 0.
fn resyncing() -> Bench {
    let mut bench = Bench::new(NONE);
    bench.learn(conf(5, 0, &[0, 1], &[2]));
    bench.obey(B);
    bench.pass(100);
    bench.learner_tails(C, 0, &[0]);
    bench
}

fn copies(bench: &Bench) -> usize {
    bench.notes.iter().filter(|note| matches!(note, Note::Copied { .. })).count()
}

#[test]
fn all_damaged_blocks_of_a_region_that_is_copied_are_mended_at_once() {
    let mut bench = resyncing();
    let mut rot = Rot::of([(ME, &[3, 9, 77, 78])]);
    rot.pass(&mut bench, 300);
    assert_eq!(mended(&bench), [3, 9, 77, 78]);
    assert_eq!(copies(&bench), 1);
    assert!(rot.reads < 80, "{} reads: the region is not read once for each block", rot.reads);
    assert!(bench.notes.iter().any(|note| matches!(note, Note::CaughtUp { .. })));
}

/// The copy is made, and not compared yet.
fn until_compared(bench: &mut Bench, rot: &mut Rot) {
    let is_digest = |(_, request): &(StoreId, Request)| request.op.opcode() == Opcode::Digest;
    let pool = Pool::new(0);
    while !bench.sent.iter().any(is_digest) {
        if let Some((&op, _)) = bench.lane.first_key_value() {
            let request = bench.lane.remove(&op).expect("just found");
            let result = rot.perform(bench, request);
            bench.step(Event::Lane { op, result });
        } else {
            let (store, request) = bench.sent.remove(0);
            let reply = rot.answer(store, &request, &pool);
            bench.step(Event::PeerReply { from: store, reply });
        }
    }
}

#[test]
fn a_learner_that_can_never_read_its_copy_is_given_up() {
    let mut bench = resyncing();
    let mut rot = Rot::default();
    rot.damaged.insert(C, BTreeSet::from([5]));
    rot.hopeless.insert(C);
    rot.pass(&mut bench, 500);
    assert_eq!(copies(&bench), 3, "it is not copied for ever, whoever answers the proposal");
    assert!(
        matches!(bench.proposals[..], [Transition::Cancel { copy: 2 }]),
        "and that is said once"
    );
}

#[test]
fn a_block_that_is_damaged_after_it_was_copied_does_not_stand_against_the_comparison() {
    let mut bench = resyncing();
    let mut rot = Rot::default();
    until_compared(&mut bench, &mut rot);
    rot.damaged = Rot::of([(ME, &[3]), (B, &[3])]).damaged;
    rot.pass(&mut bench, 15_000);
    assert!(bench.tables.is_poisoned(0, 3), "nobody has it that is asked");
    assert!(bench.notes.iter().any(|note| matches!(note, Note::CaughtUp { .. })));
}

#[test]
fn a_block_that_is_poisoned_already_is_not_poisoned_again() {
    let mut bench = Bench::new(NONE);
    bench.learn(conf(5, 0, &[0], &[2]));
    bench.poisons(lsn(5, 1), 5);
    bench.pass(100);
    bench.learner_tails(C, 0, &[0]);
    let mut rot = Rot::of([(ME, &[3])]);
    rot.pass(&mut bench, 300);
    let block = |note: &Note| if let Note::Lost { block } = note { Some(*block) } else { None };
    let poisoned: Vec<u32> = bench.notes.iter().filter_map(block).collect();
    assert_eq!((poisoned, copies(&bench)), (vec![3], 1));
}

#[test]
fn a_learner_that_cannot_read_its_copy_is_given_it_again() {
    let mut bench = resyncing();
    let mut rot = Rot::default();
    until_compared(&mut bench, &mut rot);
    rot.damaged.insert(C, BTreeSet::from([5]));
    rot.pass(&mut bench, 300);
    assert_eq!((copies(&bench), rot.at(C)), (2, vec![]));
    assert!(bench.notes.iter().any(|note| matches!(note, Note::CaughtUp { .. })));
}

/// One copy is left and writes wait for a second: that one must not wait for what cannot be read.
#[test]
fn a_damaged_block_of_the_last_copy_does_not_stand_against_the_second_one() {
    let mut bench = Bench::new(NONE);
    bench.learn(conf(5, 0, &[0], &[2]));
    bench.pass(100);
    bench.learner_tails(C, 0, &[0]);
    let mut rot = Rot::of([(ME, &[3])]);
    rot.pass(&mut bench, 300);
    assert!(bench.tables.is_poisoned(0, 3), "nobody else has it");
    assert_eq!(copies(&bench), 1);
    assert!(bench.notes.iter().any(|note| matches!(note, Note::CaughtUp { .. })));
    assert_eq!(told(&bench.replica.lost()), (&[(3, 1)][..], 1));
}

#[test]
fn a_block_that_nobody_has_does_not_stand_against_a_copy() {
    let mut bench = resyncing();
    let mut rot = Rot::of([(ME, &[3, 4]), (B, &[3])]);
    rot.pass(&mut bench, 15_000);
    assert!(bench.tables.is_poisoned(0, 3), "the learner gets it as lost");
    assert_eq!((mended(&bench), copies(&bench)), (vec![4], 1));
    assert_eq!(told(&bench.replica.lost()), (&[(3, 1)][..], 1));
}

/// A write that needs a second copy waits for the learner; so what the learner waits for must not
/// wait behind that write.
#[test]
fn a_write_that_waits_for_a_second_copy_does_not_stand_against_mending_its_neighbour() {
    let mut bench = Bench::primary(NONE, conf(5, 0, &[0, 1], &[]));
    let mut rot = Rot::of([(ME, &[4])]);
    bench.write(1, 3);
    bench.run_lane(|_| true);
    bench.read_run(2, 3, 2);
    last_copy(&mut bench);
    rot.pass(&mut bench, 3_000);
    assert!(bench.tables.is_poisoned(0, 4), "nobody else has it");
    assert_eq!(copies(&bench), 1);
    assert!(bench.notes.iter().any(|note| matches!(note, Note::CaughtUp { .. })));
    assert!(!bench.is_done(1), "nobody else has the write yet");
}

#[test]
fn a_block_that_such_a_write_has_replaced_is_not_waited_for() {
    let mut bench = Bench::primary(NONE, conf(5, 0, &[0, 1], &[]));
    let mut rot = Rot::of([(ME, &[3])]);
    // The damage is met while the write is under way.
    bench.step(Event::CheckBlocks { runs: vec![(3, 1)] });
    bench.write(1, 3);
    bench.sent.clear();
    rot.settle(&mut bench);
    last_copy(&mut bench);
    rot.pass(&mut bench, 3_000);
    assert_eq!((rot.at(ME), told(&bench.replica.lost())), (vec![], (&[][..], 0)));
    assert_eq!(copies(&bench), 1);
    assert!(bench.notes.iter().any(|note| matches!(note, Note::CaughtUp { .. })));
    assert!(!bench.is_done(1), "nobody else has the write yet");
}

#[test]
fn such_a_write_that_is_damaged_meanwhile_is_written_again() {
    let mut bench = Bench::primary(NONE, conf(5, 0, &[0, 1], &[]));
    bench.fill(1, 3);
    bench.run_lane(|_| true);
    let mut rot = Rot::of([(ME, &[3])]);
    last_copy(&mut bench);
    rot.pass(&mut bench, 3_000);
    assert_eq!((rot.at(ME), told(&bench.replica.damaged())), (vec![], (&[][..], 0)));
    assert_eq!(copies(&bench), 1);
    assert!(bench.notes.iter().any(|note| matches!(note, Note::CaughtUp { .. })));
    assert!(!bench.is_done(1), "nobody else has the write yet");
}

/// B leaves the ISR without an answer, and C comes as a learner that is in doubt about block 0.
fn last_copy(bench: &mut Bench) {
    bench.sent.clear();
    bench.learn(conf(6, 0, &[0], &[2]));
    bench.pass(100);
    bench.learner_tails(C, 0, &[0]);
}

/// A device's error may pass, here or at a member: poison would be for good.
#[test]
fn a_block_that_nobody_could_read_once_is_not_poisoned_for_a_copy() {
    let mut bench = resyncing();
    let mut rot = Rot::of([(ME, &[3]), (B, &[3])]);
    rot.settle(&mut bench);
    assert!(!bench.tables.is_poisoned(0, 3), "it was asked for once");
    rot.damaged.remove(&B);
    rot.pass(&mut bench, 1_000);
    assert_eq!((mended(&bench), bench.tables.is_poisoned(0, 3)), (vec![3], false));
    assert_eq!((copies(&bench), bench.replica.lost().blocks), (1, 0));
}

/// What a learner holds is committed content only once it was admitted.
#[test]
fn a_learner_is_not_asked_for_what_is_damaged_and_gives_nothing() {
    let mut bench = resyncing();
    let mut rot = Rot::default();
    rot.pass(&mut bench, 300);
    assert!(bench.notes.iter().any(|note| matches!(note, Note::CaughtUp { .. })));
    rot.damaged = Rot::of([(ME, &[3]), (B, &[3])]).damaged;
    bench.read(1, 3);
    rot.settle(&mut bench);
    assert_eq!(bench.refusal(1), Some(Status::BadChecksum));
    let mut bench = Bench::follower(NONE, conf(5, 1, &[1, 2], &[0]));
    bench.asks(B, 1, 5, RequestOp::Read { range: range(3), snap_seq: None });
    bench.run_lane(|_| true);
    assert_eq!(bench.refused(1), Some(Status::NotPrimary));
}
