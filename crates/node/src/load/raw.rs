//! Reads from a disk through its engine alone: what the layers above are compared with.

use super::{LoadOptions, LoadProblem, Loop, PendingLoad};
use crate::direct::DirectProblem;
use crate::disk::{self, DiskProblem};
use crossbeam_channel::bounded;
use proto::Pool;
use proto::disk::{DiskDone, DiskOp, DiskRequest, IoId};
use proto::frame::Frame;
use runtime::DiskFile;
use runtime::engine::{self, DiskEngine, EngineChoice};
use runtime::reactor::{
    self, Application, CloseReason, ConnId, Context, DiskIndex, ListenerId, Opened, Options,
};
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

/// Free buffers kept, per size class.
const POOL_BYTES: usize = 4 << 20;

/// Begin to read from a file or device. Only reads: whose content it is, nobody here knows.
pub fn run_disk(
    path: &Path,
    choice: EngineChoice,
    load: LoadOptions,
) -> Result<PendingLoad, LoadProblem> {
    let failed = |problem: DiskProblem| LoadProblem::Direct(DirectProblem::Disk(problem));
    if load.read_percent != 100 {
        return Err(LoadProblem::Options("a bare disk is only read".to_owned()));
    }
    let disk = disk::open_after_owner(path).map_err(failed)?;
    if let Some(problem) = load.problem(disk.size_bytes()) {
        return Err(LoadProblem::Options(problem));
    }
    let pool = Pool::new(POOL_BYTES);
    let (engine, _) =
        engine::open(choice, &disk, &pool, load.depth).map_err(|problem| failed(problem.into()))?;
    let engines: Vec<Box<dyn DiskEngine>> = vec![engine];
    let options = Options {
        name: "load".to_owned(),
        command_capacity: 1,
        spin: Duration::ZERO,
        pool: pool.clone(),
    };
    let (answer, result) = bounded(1);
    let make = move || App { work: Loop::new(load, &pool, answer), _disk: disk };
    reactor::spawn(options, engines, make).map_err(|problem| failed(problem.into()))?;
    Ok(PendingLoad { result, news: None })
}

struct App {
    work: Loop,
    /// Holds the lock.
    _disk: DiskFile,
}

impl App {
    fn ask(&mut self, ctx: &mut Context, place: u32) {
        let Some(ask) = self.work.next(place) else { return };
        let op = DiskOp::Read { offset: ask.offset, len: self.work.options.block_bytes };
        ctx.queue_disk(DiskIndex(0), DiskRequest { id: IoId(u64::from(place)), op });
    }
}

impl Application for App {
    type Command = Infallible;

    fn start(&mut self, ctx: &mut Context) {
        self.work.begin();
        for place in 0..self.work.options.depth {
            self.ask(ctx, place);
        }
    }

    fn command(&mut self, _ctx: &mut Context, command: Infallible) {
        match command {}
    }

    fn disk(&mut self, ctx: &mut Context, _disk: DiskIndex, done: &mut Vec<DiskDone>) {
        for one in done.drain(..) {
            let place = u32::try_from(one.id.0).expect("ids are places");
            self.work.done(place);
            if let Err(error) = one.result {
                self.work.fail(LoadProblem::Failed(error.to_string()));
                return ctx.stop();
            }
            self.ask(ctx, place);
        }
        if self.work.is_over() {
            self.work.finish(Some(0));
            ctx.stop();
        }
    }

    fn idle(&mut self, _ctx: &mut Context) {}

    fn accepted(&mut self, _ctx: &mut Context, _listener: ListenerId, _socket: OwnedFd) {}

    fn opened(&mut self, _ctx: &mut Context, _conn: ConnId, _how: Opened) {}

    fn frame(&mut self, _ctx: &mut Context, _conn: ConnId, _frame: Frame) {}

    fn closed(&mut self, _ctx: &mut Context, _conn: ConnId, _reason: CloseReason) {}

    fn timer(&mut self, _ctx: &mut Context) {}
}
