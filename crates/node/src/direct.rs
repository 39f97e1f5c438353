//! One lane in this process, without a network: for tools, tests and the demonstration that an
//! acknowledged write survives the death of the process.

use crate::disk::{self, DiskProblem};
use crate::lanes::Lanes;
use crossbeam_channel::{Sender, bounded};
use lane::lane::Counters;
use lane::record::RangeKind;
use lane::recover::RecoveryReport;
use lane::{Op, Outcome, Problem};
use proto::disk::DiskDone;
use proto::frame::Frame;
use proto::{Epoch, Lsn, Pool, Seq, checksum};
use runtime::engine::{self, DiskEngine, EngineChoice};
use runtime::reactor::{
    self, Application, CloseReason, ConnId, Context, DiskIndex, Handle, ListenerId, Opened, Options,
};
use smallvec::SmallVec;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

/// Free buffers that a lane keeps per size class.
const POOL_BYTES: usize = 16 << 20;
/// Requests that may wait in the lane's queue.
const COMMANDS_MAX: usize = 1024;
/// Operations that one engine has outstanding.
const ENGINE_DEPTH: u32 = 128;

/// Why a direct operation failed.
#[derive(Debug, thiserror::Error)]
pub enum DirectProblem {
    /// The lane's answer.
    #[error(transparent)]
    Lane(#[from] Problem),
    /// The disk could not be opened.
    #[error(transparent)]
    Disk(#[from] DiskProblem),
    /// The lane's thread is gone.
    #[error("the lane is closed")]
    Closed,
    /// More requests than the queue takes.
    #[error("more than {COMMANDS_MAX} requests wait for the lane")]
    Busy,
}

enum Command {
    Ask(Op, Sender<Result<Outcome, Problem>>),
    Look(Sender<Facts>),
}

/// What a lane says about itself.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The engine that serves it.
    pub engine: &'static str,
    /// Counters since it was opened.
    pub counters: Counters,
    /// What recovery found when it was opened.
    pub report: RecoveryReport,
    /// Replicas it holds: shard index, volume id, shard index in the volume, blocks, highest seq.
    pub replicas: Vec<(u32, u64, u32, u32, u64)>,
}

struct DirectApp {
    engine: &'static str,
    lanes: Lanes<Sender<Result<Outcome, Problem>>>,
}

impl DirectApp {
    fn facts(&self) -> Facts {
        let lane = self.lanes.lane(0);
        let shards = lane.tables().shards.iter().enumerate();
        Facts {
            engine: self.engine,
            counters: lane.counters(),
            report: self.lanes.report(0),
            replicas: shards
                .filter_map(|(ix, shard)| {
                    let shard = shard.as_ref()?;
                    let id = shard.replica.shard;
                    Some((ix as u32, id.volume.0, id.index, shard.blocks, shard.applied.seq.0))
                })
                .collect(),
        }
    }
}

impl Application for DirectApp {
    type Command = Command;

    fn start(&mut self, _ctx: &mut Context) {}

    fn command(&mut self, ctx: &mut Context, command: Command) {
        match command {
            Command::Ask(op, waiter) => self.lanes.request(ctx, 0, op, waiter),
            Command::Look(waiter) => {
                // The asker may have gone; nobody else cares.
                let _ = waiter.send(self.facts());
            }
        }
    }

    fn disk(&mut self, ctx: &mut Context, disk: DiskIndex, done: &mut Vec<DiskDone>) {
        self.lanes.disk(ctx, disk, done);
    }

    fn accepted(&mut self, _ctx: &mut Context, _listener: ListenerId, _socket: OwnedFd) {}

    fn opened(&mut self, _ctx: &mut Context, _conn: ConnId, _how: Opened) {}

    fn frame(&mut self, _ctx: &mut Context, _conn: ConnId, _frame: Frame) {}

    fn closed(&mut self, _ctx: &mut Context, _conn: ConnId, _reason: CloseReason) {}

    fn timer(&mut self, _ctx: &mut Context) {}

    fn idle(&mut self, ctx: &mut Context) {
        for finished in self.lanes.turn(ctx) {
            let _ = finished.waiter.send(finished.result);
        }
        ctx.set_timer(self.lanes.take_wake());
    }
}

/// A lane with its thread. Methods block until the lane has answered.
pub struct DirectLane {
    handle: Handle<Command>,
    thread: Option<JoinHandle<()>>,
    pool: Pool,
}

impl DirectLane {
    /// Open the first lane of the disk at `path`.
    pub fn open(
        path: &Path,
        cluster_id: &[u8; 16],
        choice: EngineChoice,
    ) -> Result<DirectLane, DirectProblem> {
        DirectLane::open_with(path, cluster_id, choice, |engine| engine)
    }

    /// The same; `wrap` may put something between the lane and its engine.
    fn open_with(
        path: &Path,
        cluster_id: &[u8; 16],
        choice: EngineChoice,
        wrap: impl FnOnce(Box<dyn DiskEngine>) -> Box<dyn DiskEngine>,
    ) -> Result<DirectLane, DirectProblem> {
        let pool = Pool::new(POOL_BYTES);
        let mut open = disk::open(path, cluster_id, disk::random_u64(), &pool)?;
        open.lanes.truncate(1);
        let (engine, _) =
            engine::open(choice, &open.file, &pool, ENGINE_DEPTH).map_err(DiskProblem::from)?;
        let name = engine.name();
        let engines = vec![wrap(engine)];
        let options = Options {
            name: "lane".into(),
            command_capacity: COMMANDS_MAX,
            spin: Duration::ZERO,
            pool: pool.clone(),
        };
        let for_app = pool.clone();
        let make = move || DirectApp { engine: name, lanes: Lanes::new(vec![open], &for_app) };
        let running = reactor::spawn(options, engines, make).map_err(DiskProblem::from)?;
        Ok(DirectLane { handle: running.handle, thread: Some(running.thread), pool })
    }

    fn ask(&self, op: Op) -> Result<Outcome, DirectProblem> {
        let (sender, receiver) = bounded(1);
        match self.handle.try_send(Command::Ask(op, sender)) {
            Ok(()) => {}
            Err(reactor::Refused::Full(_)) => return Err(DirectProblem::Busy),
            Err(reactor::Refused::Stopped(_)) => return Err(DirectProblem::Closed),
        }
        Ok(receiver.recv().map_err(|_| DirectProblem::Closed)??)
    }

    /// Create a replica of shard 0 of `volume` and return its shard index.
    pub fn create(&self, volume: u64, blocks: u32) -> Result<u32, DirectProblem> {
        let shard = proto::ShardId { volume: proto::VolumeId(volume), index: 0 };
        let replica = proto::ReplicaId { shard, copy: 0 };
        let op = Op::Create { replica, blocks, family: shard.volume };
        match self.ask(op)? {
            Outcome::Created { shard_ix } => Ok(shard_ix),
            Outcome::Done | Outcome::Read { .. } => unreachable!("a creation answers so"),
        }
    }

    /// Write whole blocks; returns when they are durable.
    ///
    /// `seq` orders the writes of the shard; the commit watermark rides along.
    pub fn write(
        &self,
        shard_ix: u32,
        (seq, commit): (u64, u64),
        first: u32,
        bytes: &[u8],
    ) -> Result<(), DirectProblem> {
        let mut crcs = SmallVec::new();
        bytes.chunks_exact(proto::BLOCK_BYTES).for_each(|block| crcs.push(checksum::crc32c(block)));
        self.ask(Op::Write {
            shard_ix,
            lsn: Lsn { epoch: Epoch(1), seq: Seq(seq) },
            commit: Seq(commit),
            first,
            crcs,
            data: proto::block::single(self.pool.copy_of(bytes).freeze()),
            flags: 0,
            solo: true,
            is_granted: false,
        })?;
        Ok(())
    }

    /// Forget blocks: they read as zeros afterwards.
    pub fn discard(
        &self,
        shard_ix: u32,
        (seq, commit): (u64, u64),
        first: u32,
        count: u32,
    ) -> Result<(), DirectProblem> {
        let lsn = Lsn { epoch: Epoch(1), seq: Seq(seq) };
        let commit = Seq(commit);
        self.ask(Op::Range {
            shard_ix,
            lsn,
            commit,
            first,
            count,
            kind: RangeKind::Inherit,
            flags: 0,
        })?;
        Ok(())
    }

    /// Read whole blocks.
    pub fn read(&self, shard_ix: u32, first: u32, count: u32) -> Result<Vec<u8>, DirectProblem> {
        match self.ask(Op::Read { shard_ix, first, count, with_poison: false })? {
            Outcome::Read { data, .. } => Ok(data.iter().flat_map(|buf| buf.to_vec()).collect()),
            Outcome::Done | Outcome::Created { .. } => unreachable!("a read brings data"),
        }
    }

    /// Write a checkpoint.
    pub fn checkpoint(&self) -> Result<(), DirectProblem> {
        self.ask(Op::Checkpoint).map(|_| ())
    }

    /// What the lane says about itself.
    pub fn facts(&self) -> Result<Facts, DirectProblem> {
        let (sender, receiver) = bounded(1);
        self.handle.try_send(Command::Look(sender)).map_err(|_| DirectProblem::Busy)?;
        receiver.recv().map_err(|_| DirectProblem::Closed)
    }

    /// Close cleanly: a checkpoint, then the thread ends.
    pub fn close(&mut self) -> Result<(), DirectProblem> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let closed = self.ask(Op::Close).map(|_| ());
        self.handle.stop();
        thread.join().map_err(|_| DirectProblem::Closed)?;
        closed
    }
}

impl Drop for DirectLane {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            // A panic there aborts the process; nothing is left to report.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::FormatOptions;
    use crate::faulty::{Faults, Faulty, Folder};
    use lane::format::Durability;
    use proto::BLOCK_BYTES;
    use std::sync::Arc;

    const CLUSTER: [u8; 16] = [7; 16];

    /// The rule that follows from what kernels do after a failed fsync: the pages may be gone and the
    /// next fsync may succeed, so the lane believes no flush of this life any more.
    fn a_failed_flush_stops_the_lane(choice: EngineChoice, engine: &str) {
        let folder = Folder::new();
        let path = folder.path("disk0.img");
        let options = FormatOptions {
            size_bytes: Some(256 << 20),
            cluster_id: CLUSTER,
            journal_bytes: Some(16 << 20),
            durability: Some(Durability::Volatile),
        };
        disk::format(&path, &options).expect("formatted");
        let faults = Arc::new(Faults::default());
        let wrap = |engine| Faulty::around(engine, &faults);
        let mut lane = DirectLane::open_with(&path, &CLUSTER, choice, wrap).expect("opened");
        assert_eq!(lane.facts().expect("it runs").engine, engine);
        let shard = lane.create(1, 64).expect("created");
        lane.write(shard, (1, 0), 0, &[1; BLOCK_BYTES]).expect("written and flushed");

        faults.fail_flushes(true);
        let refused =
            lane.write(shard, (2, 1), 0, &[2; BLOCK_BYTES]).expect_err("no flush, no ack");
        let is_stopped = |problem: &DirectProblem| {
            matches!(problem, DirectProblem::Lane(Problem::Stopped { .. }))
        };
        assert!(is_stopped(&refused), "{refused}");
        assert!(refused.to_string().contains("flush"), "the reason is named: {refused}");
        assert_eq!(faults.failed_flushes(), 1, "no second flush was tried");

        // Flushes work again, and that changes nothing: only recovery knows what is on the disk.
        faults.fail_flushes(false);
        let later = lane.write(shard, (3, 1), 1, &[3; BLOCK_BYTES]).expect_err("it has stopped");
        assert!(is_stopped(&later), "{later}");
        let closed = lane.close();
        assert!(closed.is_err(), "a stopped lane has no clean close");
        drop(lane);

        let lane = DirectLane::open(&path, &CLUSTER, choice).expect("recovered");
        let found = lane.read(shard, 0, 2).expect("readable");
        assert!(found[0] == 1 || found[0] == 2, "the acknowledged write, or the open one");
        assert!(found[..BLOCK_BYTES].iter().all(|byte| *byte == found[0]), "whole");
        assert!(
            found[BLOCK_BYTES..].iter().all(|byte| *byte == 0),
            "what was refused is not there"
        );
    }

    #[test]
    fn a_failed_flush_stops_a_lane_on_io_uring() {
        a_failed_flush_stops_the_lane(EngineChoice::Uring, "uring");
    }

    #[test]
    fn a_failed_flush_stops_a_lane_on_aio() {
        a_failed_flush_stops_the_lane(EngineChoice::Aio, "aio");
    }

    #[test]
    fn a_failed_flush_stops_a_lane_on_threads() {
        a_failed_flush_stops_the_lane(EngineChoice::Threads, "threads");
    }
}
