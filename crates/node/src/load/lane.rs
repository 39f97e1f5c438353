//! Load on one lane of a disk in this process: the engine and the lane, without network.

use super::{LoadOptions, LoadProblem, Loop, PendingLoad};
use crate::direct::DirectProblem;
use crate::disk::{self, DiskProblem};
use crate::lanes::Lanes;
use crossbeam_channel::bounded;
use lane::{Op, Outcome};
use proto::disk::DiskDone;
use proto::frame::Frame;
use proto::{BLOCK_BYTES, Epoch, Lsn, Pool, ReplicaId, Seq, ShardId, VolumeId, checksum};
use runtime::engine::{self, DiskEngine, EngineChoice};
use runtime::reactor::{
    self, Application, CloseReason, ConnId, Context, DiskIndex, ListenerId, Opened, Options,
};
use smallvec::SmallVec;
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

/// Free buffers kept, per size class.
const POOL_BYTES: usize = 32 << 20;
/// Operations that the engine has outstanding.
const ENGINE_DEPTH: u32 = 256;
/// The volume that the load makes on the disk, and uses again.
const VOLUME: ShardId = ShardId { volume: VolumeId(1), index: 0 };

/// Begin a load on the first lane of a formatted disk. It makes a replica for itself there, or goes
/// on with the one that an earlier load has made.
pub fn run_lane(
    path: &Path,
    cluster_id: &[u8; 16],
    choice: EngineChoice,
    load: LoadOptions,
) -> Result<PendingLoad, LoadProblem> {
    // A shard has at most 64 GiB; whether the lane has room for it, its replies will say.
    if let Some(problem) = load.problem(64 << 30) {
        return Err(LoadProblem::Options(problem));
    }
    let pool = Pool::new(POOL_BYTES);
    let failed = |problem: DiskProblem| LoadProblem::Direct(DirectProblem::Disk(problem));
    let mut open = disk::open(path, cluster_id, disk::random_u64(), &pool).map_err(failed)?;
    open.lanes.truncate(1);
    let (engine, _) = engine::open(choice, &open.file, &pool, ENGINE_DEPTH)
        .map_err(|problem| failed(problem.into()))?;
    let engines: Vec<Box<dyn DiskEngine>> = vec![engine];
    let options = Options {
        name: "load".to_owned(),
        command_capacity: 1,
        spin: Duration::ZERO,
        pool: pool.clone(),
    };
    let (answer, result) = bounded(1);
    let make = move || App {
        lanes: Lanes::new(vec![open], &pool),
        crcs: SmallVec::new(),
        work: Loop::new(load, &pool, answer),
        shard_ix: 0,
        next_seq: 1,
        open: BTreeSet::new(),
        flushes_before: 0,
        is_closing: false,
    };
    reactor::spawn(options, engines, make).map_err(|problem| failed(problem.into()))?;
    Ok(PendingLoad { result, news: None })
}

/// Who waits for the lane.
enum Waiter {
    Created,
    Place { place: u32, seq: u64 },
    Closed,
}

struct App {
    lanes: Lanes<Waiter>,
    /// Of the payload's blocks.
    crcs: SmallVec<[u32; 4]>,
    work: Loop,
    shard_ix: u32,
    next_seq: u64,
    /// Writes under way: everything below the first of them is committed.
    open: BTreeSet<u64>,
    flushes_before: u64,
    is_closing: bool,
}

impl App {
    fn begin(&mut self, ctx: &mut Context) {
        let lane = self.lanes.lane(0);
        let shard = lane.tables().shard(self.shard_ix).expect("just made or found");
        self.next_seq = shard.applied.seq.0 + 1;
        self.flushes_before = lane.counters().flushes;
        let blocks = self.work.payload.iter().flat_map(|buf| buf.chunks_exact(BLOCK_BYTES));
        self.crcs = blocks.map(checksum::crc32c).collect();
        self.work.begin();
        for place in 0..self.work.options.depth {
            self.ask(ctx, place);
        }
    }

    fn ask(&mut self, ctx: &mut Context, place: u32) {
        let Some(ask) = self.work.next(place) else { return };
        let first = u32::try_from(ask.offset / BLOCK_BYTES as u64).expect("inside a shard");
        let shard_ix = self.shard_ix;
        let (op, seq) = if ask.is_read {
            let count = self.work.options.block_bytes / BLOCK_BYTES as u32;
            (Op::Read { shard_ix, first, count, with_poison: false }, 0)
        } else {
            let seq = self.next_seq;
            self.next_seq += 1;
            self.open.insert(seq);
            let commit = self.open.first().map_or(0, |first| first - 1);
            let op = Op::Write {
                shard_ix,
                lsn: Lsn { epoch: Epoch(1), seq: Seq(seq) },
                commit: Seq(commit),
                first,
                crcs: self.crcs.clone(),
                data: self.work.payload.clone(),
                flags: 0,
                solo: true,
                is_granted: false,
            };
            (op, seq)
        };
        self.lanes.request(ctx, 0, op, Waiter::Place { place, seq });
    }

    fn finished(&mut self, ctx: &mut Context, waiter: Waiter, outcome: &Outcome) {
        match waiter {
            Waiter::Created => {
                let Outcome::Created { shard_ix } = outcome else {
                    unreachable!("a creation answers so")
                };
                self.shard_ix = *shard_ix;
                self.begin(ctx);
            }
            Waiter::Place { place, seq } => {
                self.open.remove(&seq);
                self.work.done(place);
                self.ask(ctx, place);
                if self.work.is_over() && !self.is_closing {
                    self.is_closing = true;
                    let flushes = self.lanes.lane(0).counters().flushes - self.flushes_before;
                    self.work.finish(Some(flushes));
                    self.lanes.request(ctx, 0, Op::Close, Waiter::Closed);
                }
            }
            Waiter::Closed => ctx.stop(),
        }
    }
}

impl Application for App {
    type Command = Infallible;

    fn start(&mut self, ctx: &mut Context) {
        let found = self.lanes.lane(0).tables().find(VOLUME);
        match found {
            Some(shard_ix) => {
                self.shard_ix = shard_ix;
                self.begin(ctx);
            }
            None => {
                let blocks = self.work.options.span_bytes.div_ceil(BLOCK_BYTES as u64);
                let blocks = u32::try_from(blocks).expect("checked before the start");
                let replica = ReplicaId { shard: VOLUME, copy: 0 };
                let op = Op::Create { replica, blocks, family: VOLUME.volume };
                self.lanes.request(ctx, 0, op, Waiter::Created);
            }
        }
    }

    fn command(&mut self, _ctx: &mut Context, command: Infallible) {
        match command {}
    }

    fn disk(&mut self, ctx: &mut Context, disk: DiskIndex, done: &mut Vec<DiskDone>) {
        self.lanes.disk(ctx, disk, done);
    }

    fn idle(&mut self, ctx: &mut Context) {
        loop {
            let all = self.lanes.turn(ctx);
            if all.is_empty() {
                break;
            }
            for finished in all {
                match finished.result {
                    Ok(outcome) => self.finished(ctx, finished.waiter, &outcome),
                    Err(problem) => {
                        self.work.fail(LoadProblem::Failed(problem.to_string()));
                        return ctx.stop();
                    }
                }
            }
        }
        ctx.set_timer(self.lanes.take_wake());
    }

    fn accepted(&mut self, _ctx: &mut Context, _listener: ListenerId, _socket: OwnedFd) {}

    fn opened(&mut self, _ctx: &mut Context, _conn: ConnId, _how: Opened) {}

    fn frame(&mut self, _ctx: &mut Context, _conn: ConnId, _frame: Frame) {}

    fn closed(&mut self, _ctx: &mut Context, _conn: ConnId, _reason: CloseReason) {}

    fn timer(&mut self, _ctx: &mut Context) {}
}
