//! Clients at the primary: range locks, the lease for reads, and everything that has to wait.
//!
//! A request is checked, planned as steps over whole blocks (`crate::client`) and takes its range
//! lock, first come first served. A read goes on only while every required member's lease holds, and
//! is answered only if they still hold when its data have come: a process that was paused in between
//! does not answer. A change goes on when its operation is committed.

use super::follower::Body;
use super::reign::Owner;
use super::{Command, Ctx, Effect, Kind, Mutant, Note, PARKED_MAX, RESEND_MS, Replica, Work};
use crate::client::{Answer, ClientRequest, Found, Step, Task, status_of};
use crate::conf::StoreId;
use crate::table::Table;
use lane::locks::RangeLocks;
use lane::{Op, Outcome, Problem};
use proto::disk::BufList;
use proto::wire::CheckedData;
use proto::{BLOCK_BYTES, Seq, Status, Tick};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

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
    /// Operations that wait for a region, for room or for more replicas.
    waiting: VecDeque<(u32, Body)>,
    /// Reads that wait for the lease.
    reads: VecDeque<(u32, Pending)>,
    /// Reads that are done elsewhere, because the blocks here are damaged.
    repairs: BTreeMap<u32, Repair>,
    /// Blocks that are being written again.
    healing: BTreeSet<u32>,
}

/// A read that another member does.
struct Repair {
    /// Told by its number, an answer cannot be taken for that to another read.
    number: u32,
    first: u32,
    count: u32,
    problem: Problem,
    /// Members asked so far.
    asked: Vec<StoreId>,
    since: Tick,
}

impl Default for Clients {
    fn default() -> Clients {
        Clients {
            tasks: Table::new(),
            locks: RangeLocks::default(),
            waiting: VecDeque::new(),
            reads: VecDeque::new(),
            repairs: BTreeMap::new(),
            healing: BTreeSet::new(),
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
        // A writer that was taken over must hear so, although it knows no newer epoch: nobody tells
        // it one. A reader may only be waiting for the news.
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
        let clients = &mut self.reign().clients;
        let task = clients.tasks.insert(task);
        // Seeded bug: a lock on nothing.
        let blocks = if is_free { 0..0 } else { blocks };
        if clients.locks.acquire(task, blocks, is_exclusive) {
            self.advance(ctx, task);
        }
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

    fn change(&mut self, ctx: &mut Ctx<'_, '_>, task: u32, body: Body) {
        if self.lacks_space(ctx, &body) {
            return self.finish(ctx, task, Err(Status::NoSpace));
        }
        match self.assign(ctx, Owner::Task(task), body) {
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

    /// The lane has read for a task. What it cannot read another member can: committed content is
    /// the same on all of them, and no write of these blocks is under way (section 8).
    pub(super) fn client_read(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        (task, first, count): (u32, u32, u32),
        result: Result<Outcome, Problem>,
    ) {
        match result {
            Ok(Outcome::Read { data, crcs }) => self.read_over(ctx, task, crcs, data),
            Ok(Outcome::Done | Outcome::Created { .. }) => unreachable!("a read brings data"),
            Err(problem) => {
                let (asked, since) = (Vec::new(), ctx.now);
                let number = self.next_job();
                let repair = Repair { number, first, count, problem, asked, since };
                self.reign().clients.repairs.insert(task, repair);
                self.ask_elsewhere(ctx, task);
            }
        }
    }

    fn read_over(
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

    // --------------------------------------------------------------------------------- repair --

    /// Ask the next member for blocks that are damaged here; with nobody left it is an error. A
    /// block that was to be healed, and cannot be, is poisoned in the end, so that it is the same
    /// everywhere and does not stand against new copies.
    fn ask_elsewhere(&mut self, ctx: &mut Ctx<'_, '_>, task: u32) {
        let required = self.required(false);
        let reign = self.reign.as_mut().expect("a primary reigns");
        let Some(repair) = reign.clients.repairs.get_mut(&task) else { return };
        let next = required.iter().find(|(store, _)| !repair.asked.contains(store));
        let Some(&(to, _)) = next else {
            let repair = reign.clients.repairs.remove(&task).expect("looked at above");
            let is_healing = self.task(task).token.is_none();
            let block = repair.first;
            if is_healing && self.reign().is_lost(block, &repair.problem, required.is_empty()) {
                ctx.out.push(Effect::Note(Note::Lost { block }));
                return self.change(ctx, task, Body::Poison { first: block, count: 1 });
            }
            return self.finish(ctx, task, Err(status_of(&repair.problem)));
        };
        repair.asked.push(to);
        repair.since = ctx.now;
        let (number, first, count) = (repair.number, repair.first, repair.count);
        let command = Command { kind: Kind::Repair, number: u64::from(number) };
        self.ask_blocks(ctx, to, command, first, count);
    }

    /// A member has read what is damaged here, or could not either.
    pub(super) fn read_elsewhere(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        (from, number): (StoreId, u64),
        content: Option<CheckedData>,
    ) {
        let Some(reign) = &mut self.reign else { return };
        let mut repairs = reign.clients.repairs.iter();
        let found = repairs.find(|(_, repair)| u64::from(repair.number) == number);
        let Some((&task, repair)) = found else { return };
        if repair.asked.last() != Some(&from) {
            return;
        }
        let bytes = u64::from(repair.count) * BLOCK_BYTES as u64;
        match content.filter(|content| u64::from(content.length()) == bytes) {
            Some(content) => {
                let repair = reign.clients.repairs.remove(&task).expect("looked at above");
                let (crcs, data) = content.into_parts();
                self.heal(ctx, &repair.problem);
                self.read_over(ctx, task, crcs, data);
            }
            None => self.ask_elsewhere(ctx, task),
        }
    }

    /// Write a damaged block again, under its exclusive lock and with an lsn of its own.
    pub(super) fn heal(&mut self, ctx: &mut Ctx<'_, '_>, problem: &Problem) {
        let (Problem::BadChecksum { block }
        | Problem::Poisoned { block }
        | Problem::Media { block, .. }) = *problem
        else {
            return;
        };
        let clients = &mut self.reign().clients;
        if clients.healing.insert(block) {
            ctx.out.push(Effect::Note(Note::Healing { block }));
            let task = clients.tasks.insert(Task::heal(block));
            if clients.locks.acquire(task, block..block + 1, true) {
                self.advance(ctx, task);
            }
        }
    }

    /// Ask again for what was not answered: the member may be gone.
    pub(super) fn tick_repairs(&mut self, ctx: &mut Ctx<'_, '_>) {
        let now = ctx.now;
        let late: Vec<u32> = self
            .reign()
            .clients
            .repairs
            .iter()
            .filter(|(_, repair)| now >= repair.since.after_millis(RESEND_MS))
            .map(|(&task, _)| task)
            .collect();
        for task in late {
            let repair = self.reign().clients.repairs.get_mut(&task).expect("just listed");
            repair.asked.clear();
            self.ask_elsewhere(ctx, task);
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

    /// Let operations go on that waited for a region, for room or for more replicas.
    pub(super) fn start_waiting(&mut self, ctx: &mut Ctx<'_, '_>) {
        for (task, body) in std::mem::take(&mut self.reign().clients.waiting) {
            self.change(ctx, task, body);
        }
    }

    fn finish(&mut self, ctx: &mut Ctx<'_, '_>, task: u32, result: Result<Answer, Status>) {
        let clients = &mut self.reign().clients;
        clients.repairs.remove(&task);
        let over = clients.tasks.take(task).expect("the task runs");
        match over.token {
            Some(token) => ctx.out.push(Effect::Reply { token, result }),
            None => drop(clients.healing.remove(&over.healed())),
        }
        let mut ready = Vec::new();
        clients.locks.release(task, &mut ready);
        ready.into_iter().for_each(|task| self.advance(ctx, task));
    }
}
