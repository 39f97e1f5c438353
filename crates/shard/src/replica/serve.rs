//! Clients at the primary: range locks, the lease for reads, and everything that has to wait.
//!
//! A request is checked, planned as steps over whole blocks (`crate::client`) and takes its range
//! lock, first come first served. A read goes on only while every required member's lease holds, and
//! is answered only if they still hold when its data have come: a process that was paused in between
//! does not answer. A change goes on when its operation is committed.

use super::follower::Body;
use super::reign::{Owner, Room};
use super::repair::Repairs;
use super::{Ctx, Effect, Mutant, PARKED_MAX, Replica, Work};
use crate::client::{Answer, ClientRequest, Found, Step, Task};
use crate::table::Table;
use lane::locks::RangeLocks;
use lane::{Op, Outcome, Problem};
use proto::disk::BufList;
use proto::{Seq, Status};
use smallvec::SmallVec;
use std::collections::VecDeque;

/// A read that has no lease.
enum Pending {
    /// It has not been done.
    Step { first: u32, count: u32 },
    /// It was done while the lease ended.
    Answer(Answer),
}

/// Requests under way.
pub(super) struct Clients {
    tasks: Table<Task>,
    locks: RangeLocks,
    /// Operations that wait for a region, for a block that is being mended, for room or for more
    /// replicas.
    waiting: VecDeque<(u32, Body)>,
    /// Reads that wait for the lease.
    reads: VecDeque<(u32, Pending)>,
    /// Reads that met damage, and blocks that are written again.
    pub(super) repairs: Repairs,
}

impl Default for Clients {
    fn default() -> Clients {
        Clients {
            tasks: Table::new(),
            locks: RangeLocks::default(),
            waiting: VecDeque::new(),
            reads: VecDeque::new(),
            repairs: Repairs::default(),
        }
    }
}

impl Clients {
    /// Whether nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Tokens of all that is under way.
    pub(super) fn end(&mut self) -> Vec<u64> {
        self.tasks.drain().into_iter().filter_map(|task| task.token).collect()
    }
}

impl Replica {
    /// A client's request, new or parked before.
    pub(super) fn client(&mut self, ctx: &mut Ctx<'_, '_>, request: ClientRequest) {
        let token = request.token;
        let is_serving = match &self.reign {
            None => Err(Status::NotPrimary),
            Some(reign) => Ok(reign.takes_requests()),
        };
        let verdict = is_serving
            .and_then(|is_serving| if is_serving { self.check(ctx, &request) } else { Ok(false) });
        match verdict {
            Err(status) => ctx.out.push(Effect::Reply { token, result: Err(status) }),
            Ok(true) => self.begin(ctx, request),
            Ok(false) if self.parked.len() < PARKED_MAX => self.parked.push_back(request),
            Ok(false) => ctx.out.push(Effect::Reply { token, result: Err(Status::Busy) }),
        }
    }

    /// False: it has to wait. An error is a definite "no effect".
    fn check(&mut self, ctx: &mut Ctx<'_, '_>, request: &ClientRequest) -> Result<bool, Status> {
        let conf = self.stored.conf.as_ref().expect("a primary has a configuration");
        // A writer whose volume was taken over gets FENCED here, before its epoch is looked at:
        // STALE_EPOCH would let it wait for a newer epoch, which nobody tells it. A reader may only
        // be waiting to hear of the newer epoch.
        if request.attach_epoch < conf.attach_epoch && request.op.is_change() {
            return Err(Status::Fenced);
        }
        if request.epoch != conf.epoch {
            if request.epoch > conf.epoch {
                self.fetch(ctx, None);
            }
            return Err(Status::StaleEpoch);
        }
        if request.attach_epoch < conf.attach_epoch {
            return Err(Status::Fenced);
        }
        if !request.op.fits(self.blocks) {
            return Err(Status::OutOfRange);
        }
        Ok(!request.op.is_change() || self.has_min_write())
    }

    /// Take up again what was parked.
    pub(super) fn unpark(&mut self, ctx: &mut Ctx<'_, '_>) {
        if self.reign.as_ref().is_some_and(|reign| reign.takes_requests()) {
            for request in std::mem::take(&mut self.parked) {
                self.client(ctx, request);
            }
        }
    }

    fn begin(&mut self, ctx: &mut Ctx<'_, '_>, request: ClientRequest) {
        let token = request.token;
        let Some((task, blocks, is_exclusive)) = Task::plan(request, &self.options.pool) else {
            let result = Ok(Answer::Done(Seq(0)));
            return ctx.out.push(Effect::Reply { token, result });
        };
        let is_free = !is_exclusive && self.mutant(Mutant::DirtyRead);
        // Seeded bug: a lock on nothing.
        let blocks = if is_free { 0..0 } else { blocks };
        self.begin_task(ctx, task, blocks, is_exclusive);
    }

    /// Let a task begin when it has its lock.
    pub(super) fn begin_task(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        task: Task,
        blocks: std::ops::Range<u32>,
        is_exclusive: bool,
    ) {
        let clients = &mut self.reign().clients;
        let task = clients.tasks.insert(task);
        if clients.locks.acquire(task, blocks, is_exclusive) {
            self.advance(ctx, task);
        }
    }

    /// Whether a task is one of `Task::heal`.
    pub(super) fn is_heal(&mut self, task: u32) -> bool {
        self.task(task).token.is_none()
    }

    fn task(&mut self, task: u32) -> &mut Task {
        self.reign().clients.tasks.get_mut(task).expect("the task runs")
    }

    /// Start the next step of a task that holds its lock.
    fn advance(&mut self, ctx: &mut Ctx<'_, '_>, task: u32) {
        match self.task(task).next() {
            None => {
                let seq = self.task(task).last_seq;
                self.finish(ctx, task, Ok(Answer::Done(seq)));
            }
            Some(Step::Read { first, count }) => {
                // The read of a merge needs no lease: what becomes of it needs every member.
                if self.task(task).is_merging() || self.has_lease(ctx) {
                    self.read(ctx, task, first, count);
                } else {
                    let pending = Pending::Step { first, count };
                    self.reign().clients.reads.push_back((task, pending));
                }
            }
            Some(Step::Write { first, crcs, data }) => {
                self.change(ctx, task, Body::Write { first, crcs, data });
            }
            Some(Step::Discard { first, count }) => {
                self.change(ctx, task, Body::Discard { first, count });
            }
            Some(Step::Merge { .. }) => unreachable!("comes as the read that it begins with"),
        }
    }

    fn read(&mut self, ctx: &mut Ctx<'_, '_>, task: u32, first: u32, count: u32) {
        let (reign, shard_ix) = (self.reign().epoch, self.options.shard_ix);
        let work = Work::Client { reign, task, first, count };
        self.lane(ctx, work, Op::Read { shard_ix, first, count, with_poison: false });
    }

    pub(super) fn change(&mut self, ctx: &mut Ctx<'_, '_>, task: u32, body: Body) {
        let is_heal = self.is_heal(task);
        let clients = &mut self.reign().clients;
        if !is_heal && clients.repairs.is_healing(body.range()) {
            return clients.waiting.push_back((task, body));
        }
        match self.room_for(ctx, &body) {
            Room::Enough => {}
            Room::Asked => return self.reign().clients.waiting.push_back((task, body)),
            Room::Lacking => return self.finish(ctx, task, Err(Status::NoSpace)),
        }
        let owner = if is_heal { Owner::Heal(task) } else { Owner::Task(task) };
        match self.assign(ctx, owner, body) {
            Ok(seq) => self.task(task).last_seq = seq,
            Err(body) => self.reign().clients.waiting.push_back((task, body)),
        }
    }

    /// An operation of a task is committed, or has failed for good.
    pub(super) fn change_over(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        task: u32,
        result: Result<Seq, Status>,
    ) {
        match result {
            Ok(_) => self.advance(ctx, task),
            Err(status) => self.finish(ctx, task, Err(status)),
        }
    }

    /// The lane has read for a task. What it cannot read another member can (section 8).
    pub(super) fn client_read(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        (task, first, count): (u32, u32, u32),
        result: Result<Outcome, Problem>,
    ) {
        match result {
            Ok(Outcome::Read { data, crcs }) => self.read_over(ctx, task, crcs, data),
            Ok(Outcome::Done | Outcome::Created { .. }) => unreachable!("a read brings data"),
            Err(problem) => self.begin_repair(ctx, task, (first, count), problem),
        }
    }

    pub(super) fn read_over(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        task: u32,
        crcs: SmallVec<[u32; 4]>,
        data: BufList,
    ) {
        let pool = self.options.pool.clone();
        match self.task(task).read_done(data, crcs, &pool) {
            Found::More => self.advance(ctx, task),
            Found::Write { first, crcs, data } => {
                self.change(ctx, task, Body::Write { first, crcs, data });
            }
            Found::Complete(answer) if self.has_lease(ctx) => self.finish(ctx, task, Ok(answer)),
            Found::Complete(answer) => {
                self.reign().clients.reads.push_back((task, Pending::Answer(answer)));
            }
        }
    }

    /// Whether no other replica can be serving now (section 4).
    fn has_lease(&self, ctx: &Ctx<'_, '_>) -> bool {
        let is_serving = self.reign.as_ref().is_some_and(|reign| reign.is_serving());
        let required = self.required(!self.mutant(Mutant::LeaseByIsr));
        let leases = ctx.view.leases;
        let holds = required.iter().all(|&(store, incarnation)| {
            leases.lease_until(self.shard, store, incarnation) > ctx.now
        });
        is_serving && (holds || self.mutant(Mutant::LeaseIgnored))
    }

    /// Let reads go on whose lease has come back. Within one reign nothing can have changed
    /// elsewhere meanwhile: another primary would have needed a promise that this one holds again.
    pub(super) fn start_reads(&mut self, ctx: &mut Ctx<'_, '_>) {
        if !self.has_lease(ctx) {
            return;
        }
        for (task, pending) in std::mem::take(&mut self.reign().clients.reads) {
            match pending {
                Pending::Step { first, count } => self.read(ctx, task, first, count),
                Pending::Answer(answer) => self.finish(ctx, task, Ok(answer)),
            }
        }
    }

    /// Let operations go on that waited; `Clients::waiting` says for what.
    pub(super) fn start_waiting(&mut self, ctx: &mut Ctx<'_, '_>) {
        for (task, body) in std::mem::take(&mut self.reign().clients.waiting) {
            self.change(ctx, task, body);
        }
    }

    pub(super) fn finish(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        task: u32,
        result: Result<Answer, Status>,
    ) {
        let clients = &mut self.reign().clients;
        clients.repairs.end(task);
        let over = clients.tasks.take(task).expect("the task runs");
        let mut ready = Vec::new();
        clients.locks.release(task, &mut ready);
        match over.token {
            Some(token) => ctx.out.push(Effect::Reply { token, result }),
            None => self.heal_over(ctx, over.healed(), result.is_ok()),
        }
        ready.into_iter().for_each(|task| self.advance(ctx, task));
    }
}
