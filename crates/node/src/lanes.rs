//! Lanes on a reactor: requests with somebody who waits, disk operations with their engine.
//!
//! One reactor thread runs one or more lanes. Whoever asks leaves a *waiter* (a channel, a client's
//! request, a command of the control plane) that comes back with the reply. A turn of all lanes
//! ends each iteration of the reactor, so everything that arrived together shares journal frames
//! and flushes.

use lane::recover::RecoveryReport;
use lane::{Effects, Event, Lane, Op, Outcome, Problem, Request};
use proto::Pool;
use proto::disk::DiskDone;
use proto::id_map::IdMap;
use proto::seam::Machine;
use runtime::reactor::{Context, DiskIndex};

use crate::disk::OpenDisk;

/// What a request brought, with whoever waited for it.
pub struct Finished<W> {
    /// Who asked.
    pub waiter: W,
    /// What became of it.
    pub result: Result<Outcome, Problem>,
}

struct Hosted {
    machine: Lane,
    report: RecoveryReport,
}

/// The lanes of one reactor; lane i does its I/O on the reactor's disk i.
pub struct Lanes<W> {
    lanes: Vec<Hosted>,
    waiting: IdMap<u64, W>,
    next_token: u64,
    effects: Effects,
}

impl<W> Lanes<W> {
    /// Open the recovered lanes of `disks`, in order.
    #[must_use]
    pub fn new(disks: Vec<OpenDisk>, pool: &Pool) -> Lanes<W> {
        let lanes = disks
            .into_iter()
            .flat_map(|disk| disk.lanes)
            .map(|mounted| {
                let report = mounted.report;
                Hosted { machine: Lane::open(mounted, pool.clone()), report }
            })
            .collect();
        Lanes { lanes, waiting: IdMap::default(), next_token: 1, effects: Effects::default() }
    }

    /// Number of lanes.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lanes.len()
    }

    /// One lane's machine, to look at.
    #[must_use]
    pub fn lane(&self, index: usize) -> &Lane {
        &self.lanes[index].machine
    }

    /// Let one lane take nothing more of its host's file system, or do again.
    pub fn hold_growth(&mut self, index: usize, is_held: bool) {
        self.lanes[index].machine.hold_growth(is_held);
    }

    /// Stop one lane for good; what is under way in it is answered with the reason.
    pub fn fail(&mut self, ctx: &mut Context, index: usize, reason: String) {
        self.step(ctx, index, Event::Fail { reason });
    }

    /// What recovery found on one lane.
    #[must_use]
    pub fn report(&self, index: usize) -> RecoveryReport {
        self.lanes[index].report
    }

    /// Requests whose reply is still to come.
    #[must_use]
    pub fn open_requests(&self) -> usize {
        self.waiting.len()
    }

    /// Ask a lane; `waiter` comes back from `turn`.
    pub fn request(&mut self, ctx: &mut Context, index: usize, op: Op, waiter: W) {
        let token = self.next_token;
        self.next_token += 1;
        self.waiting.insert(token, waiter);
        self.step(ctx, index, Event::Request(Request { token, op }));
    }

    /// Disk operations of one lane have finished.
    pub fn disk(&mut self, ctx: &mut Context, disk: DiskIndex, done: &mut Vec<DiskDone>) {
        for done in done.drain(..) {
            self.step(ctx, disk.0, Event::Disk(done));
        }
    }

    /// The iteration ends: let all lanes batch their work, and hand out what is finished.
    ///
    /// `finished` may make new requests; call again until it has nothing to hand out.
    pub fn turn(&mut self, ctx: &mut Context) -> Vec<Finished<W>> {
        for index in 0..self.lanes.len() {
            self.step(ctx, index, Event::Turn);
        }
        self.effects
            .replies
            .drain(..)
            .map(|reply| Finished {
                waiter: self.waiting.remove(&reply.token).expect("one reply per request"),
                result: reply.result,
            })
            .collect()
    }

    fn step(&mut self, ctx: &mut Context, index: usize, event: Event) {
        self.lanes[index].machine.step(ctx.now(), event, &mut self.effects);
        for request in self.effects.disk.drain(..) {
            ctx.queue_disk(DiskIndex(index), request);
        }
    }

    /// When a lane wants its next turn at the latest, if any does.
    pub fn take_wake(&mut self) -> Option<proto::Tick> {
        self.effects.wake.take()
    }
}
