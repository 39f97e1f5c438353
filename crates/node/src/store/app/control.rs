//! What the control plane asks of a store, and what it is told: replicas made, deleted, grown and
//! configured, disks that have failed, and a picture of everything.
//!
//! Each command is answered by exactly one event with its number: at once, when the lane has made it
//! durable, or, for a configuration, when the replica follows it (or a newer one).

use super::{Served, StoreApp, Then, Waiter};
use crate::lanes::Finished;
use crate::status;
use crate::store::hops::LaneWork;
use crate::store::{ControlOp, ReplicaFacts, StoreEvent, StoreFacts};
use lane::{Op, Outcome, Problem};
use proto::{ReplicaId, ShardId, Status, Tick};
use runtime::reactor::{Context, DiskIndex};
use shard::conf::ShardConf;
use shard::heartbeat::{Event as HeartEvent, Timing};
use shard::mutant::Mutant;
use shard::replica::{DamageFacts, Event, Options, Replica, View};

impl StoreApp {
    pub(super) fn control(&mut self, ctx: &mut Context, request_id: u64, op: ControlOp) {
        let done = match op {
            ControlOp::Create { disk_uuid, replica, blocks, conf } => {
                self.create(ctx, request_id, (replica, blocks), conf, &disk_uuid)
            }
            ControlOp::Delete(shard) => match self.place(shard) {
                None => Ok(true),
                Some((lane, shard_ix)) => {
                    // No new requests from here on; the lane waits for those under way.
                    let then = Then::Forget(shard);
                    let waiter = Waiter::Control { request_id, then };
                    self.lanes.request(ctx, lane, Op::Delete { shard_ix }, waiter);
                    Ok(false)
                }
            },
            ControlOp::Resize(shard, blocks) => self.with(ctx, shard, request_id, |ix| {
                (Op::Resize { shard_ix: ix, blocks }, Then::Grow(shard))
            }),
            ControlOp::SetConf(conf) => self.set_conf(ctx, request_id, conf),
            ControlOp::Verify(shard, is_repairing) if self.shards.contains_key(&shard) => {
                self.step(ctx, shard, Event::Verify { token: request_id, is_repairing });
                Ok(false)
            }
            ControlOp::Transfer(shard, to) if self.shards.contains_key(&shard) => {
                self.step(ctx, shard, Event::Transfer { to });
                Ok(true)
            }
            ControlOp::Verify(shard, _) | ControlOp::Transfer(shard, _) => {
                Err((Status::NotFound, format!("no replica of shard {shard} on this store")))
            }
        };
        match done {
            Ok(false) => {}
            Ok(true) => self.event(StoreEvent::Done { request_id }),
            Err((status, message)) => {
                self.event(StoreEvent::Failed { request_id, status, message });
            }
        }
    }

    /// Pass a configuration on; done when it, or a newer one, is followed.
    fn set_conf(
        &mut self,
        ctx: &mut Context,
        request_id: u64,
        conf: ShardConf,
    ) -> Result<bool, (Status, String)> {
        let (shard, epoch) = (conf.shard, conf.epoch);
        if !self.shards.contains_key(&shard) {
            return Err((Status::NotFound, format!("no replica of shard {shard} on this store")));
        }
        self.conf_waiters.push((shard, epoch, request_id));
        self.step(ctx, shard, Event::Conf(conf));
        Ok(false)
    }

    fn with(
        &mut self,
        ctx: &mut Context,
        shard: ShardId,
        request_id: u64,
        make: impl FnOnce(u32) -> (Op, Then),
    ) -> Result<bool, (Status, String)> {
        let Some((lane, shard_ix)) = self.place(shard) else {
            return Err((Status::NotFound, format!("no replica of shard {shard} on this store")));
        };
        let (op, then) = make(shard_ix);
        self.lanes.request(ctx, lane, op, Waiter::Control { request_id, then });
        Ok(false)
    }

    /// Lane and shard index of a shard's replica.
    fn place(&self, shard: ShardId) -> Option<(usize, u32)> {
        (0..self.lanes.count())
            .find_map(|lane| Some((lane, self.lanes.lane(lane).tables().find(shard)?)))
    }

    fn create(
        &mut self,
        ctx: &mut Context,
        request_id: u64,
        (replica, blocks): (ReplicaId, u32),
        conf: ShardConf,
        disk_uuid: &str,
    ) -> Result<bool, (Status, String)> {
        let shard = replica.shard;
        if let Some((lane, shard_ix)) = self.place(shard) {
            let held = self.lanes.lane(lane).tables().shard(shard_ix).expect("just found").blocks;
            if held != blocks {
                let text = format!("shard {shard} exists with {held} blocks, not {blocks}");
                return Err((Status::AlreadyExists, text));
            }
            return self.set_conf(ctx, request_id, conf);
        }
        let Some(disk) = self.disks.iter().find(|disk| disk.facts.uuid == disk_uuid) else {
            return Err((Status::NotFound, format!("this store has no disk {disk_uuid}")));
        };
        let working = disk.lanes.clone().filter(|&lane| self.lanes.lane(lane).failure().is_none());
        let Some(lane) = working.max_by_key(|&lane| self.lanes.lane(lane).free_slots()) else {
            return Err((Status::DiskFailed, format!("disk {disk_uuid} has stopped")));
        };
        let op = Op::Create { replica, blocks, family: shard.volume };
        let waiter = Waiter::Created { request_id, lane, conf };
        self.lanes.request(ctx, lane, op, waiter);
        Ok(false)
    }

    /// Tell whose configuration is followed now.
    pub(super) fn settle_conf_waiters(&mut self) {
        let mut waiters = std::mem::take(&mut self.conf_waiters);
        waiters.retain(|&(shard, epoch, request_id)| {
            let is_over = !self.shards.contains_key(&shard) || self.epoch_of(shard) >= epoch;
            if is_over {
                self.event(StoreEvent::Done { request_id });
            }
            !is_over
        });
        self.conf_waiters.append(&mut waiters);
    }

    pub(super) fn finished(&mut self, ctx: &mut Context, finished: Finished<Waiter>) {
        match finished.waiter {
            Waiter::Shard { shard, op, since, work } => {
                match work {
                    LaneWork::Read => self.hops.lane_reads.over(since),
                    LaneWork::Write => self.hops.lane_writes.over(since),
                    LaneWork::Other => {}
                }
                // A deleted shard's operations were all answered before it went.
                self.step(ctx, shard, Event::Lane { op, result: finished.result });
            }
            Waiter::Created { request_id, lane, conf } => match finished.result {
                Ok(Outcome::Created { shard_ix }) => {
                    self.host(lane, shard_ix);
                    self.catch_up(ctx, conf.shard);
                    // The replica is known to the control plane once its configuration is durable.
                    if let Err((status, message)) = self.set_conf(ctx, request_id, conf) {
                        self.event(StoreEvent::Failed { request_id, status, message });
                    }
                }
                Ok(_) => unreachable!("a creation answers so"),
                Err(problem) => self.failed(request_id, &problem),
            },
            // Deleted twice: the second finds nothing, which is what was asked for.
            Waiter::Control { request_id, then: Then::Forget(_) }
                if matches!(finished.result, Err(Problem::NotFound { .. })) =>
            {
                self.event(StoreEvent::Done { request_id });
            }
            Waiter::Control { request_id, then } => match finished.result {
                Ok(_) => {
                    match then {
                        Then::Forget(shard) => self.forget(ctx, shard),
                        Then::Grow(shard) => self.step(ctx, shard, Event::Grown),
                    }
                    self.event(StoreEvent::Done { request_id });
                }
                Err(problem) => self.failed(request_id, &problem),
            },
            Waiter::Closed => {
                if let Some((_, left)) = &mut self.closing {
                    *left -= 1;
                }
            }
        }
    }

    fn failed(&self, request_id: u64, problem: &Problem) {
        let (status, message) = (status::of_lane(problem), problem.to_string());
        self.event(StoreEvent::Failed { request_id, status, message });
    }

    /// Run the machine of a replica that a lane holds.
    pub(super) fn host(&mut self, lane: usize, shard_ix: u32) {
        let tables = self.lanes.lane(lane).tables();
        let id = tables.shard(shard_ix).expect("the lane holds it").replica.shard;
        let options = Options {
            shard_ix,
            store: self.identity.store,
            incarnation: self.identity.incarnation,
            booted: self.booted,
            timing: Timing::default(),
            pool: self.pool.clone(),
            mutant: Mutant::None,
        };
        let view = View::of(self.lanes.lane(lane), &self.leases, &self.paces[lane]);
        let replica = Replica::open(options, &view).expect("looked at before the start");
        self.timers.insert((Tick(0), id));
        self.shards.insert(id, Served { lane, replica, wake: Some(Tick(0)) });
    }

    /// The replica is gone: what its clients still wait for will not be done here.
    fn forget(&mut self, ctx: &mut Context, shard: ShardId) {
        if let Some(wake) = self.shards.remove(&shard).and_then(|served| served.wake) {
            self.timers.remove(&(wake, shard));
        }
        self.beat(HeartEvent::Unclaim { shard });
        self.answer_gone(ctx, shard);
    }

    /// A picture of everything.
    pub(super) fn facts(&self, ctx: &Context) -> StoreFacts {
        let mut replicas = Vec::new();
        let mut disks = Vec::new();
        for (disk_ix, disk) in self.disks.iter().enumerate() {
            let mut facts = disk.facts.clone();
            for lane_ix in disk.lanes.clone() {
                let lane = self.lanes.lane(lane_ix);
                let slot = lane::format::SLOT_BYTES;
                facts.bytes.0 += u64::from(lane.space().total()) * slot;
                facts.bytes.1 += u64::from(lane.free_slots()) * slot;
                facts.failure = facts.failure.or_else(|| lane.failure().map(str::to_owned));
                let age_nanos = ctx.oldest_io_nanos(DiskIndex(lane_ix));
                facts.oldest_io_nanos = facts.oldest_io_nanos.max(age_nanos);
                facts.latency.merge(&ctx.disk_latency(DiskIndex(lane_ix)));
                facts.counters.push(lane.counters());
                facts.reports.push(self.lanes.report(lane_ix));
                for shard in lane.tables().shards.iter().flatten() {
                    let served = self.shards.get(&shard.replica.shard);
                    let view = View::of(lane, &self.leases, &self.paces[lane_ix]);
                    replicas.push(ReplicaFacts {
                        conf: served.and_then(|served| served.replica.conf().cloned()),
                        promised: served.map_or(0, |served| served.replica.promised().0),
                        complete: served.map_or(0, |served| served.replica.complete(&view).0),
                        applied: shard.applied.seq.0,
                        role: served.map(|served| served.replica.role()),
                        resyncs: served.map_or(Vec::new(), |served| served.replica.resyncs()),
                        damaged: served.map_or(DamageFacts::default(), |s| s.replica.damaged()),
                        damage_found: served.map_or(0, |s| s.replica.damage_found()),
                        lost: served.map_or(DamageFacts::default(), |s| s.replica.lost()),
                        verifying: served.and_then(|served| served.replica.verifying()),
                        replica: shard.replica,
                        blocks: shard.blocks,
                        disk: disk_ix,
                        lane: lane_ix,
                        commit: shard.commit.0,
                        used_bytes: u64::from(shard.used_slots) * slot,
                    });
                }
            }
            disks.push(facts);
        }
        let sessions = self.clients();
        let (hops, blocks_mended) = (self.hops, self.blocks_mended);
        StoreFacts { replicas, disks, sessions, hops, blocks_mended }
    }

    /// Tell of each disk once that it has stopped.
    pub(super) fn report_failures(&mut self) {
        for (index, disk) in self.disks.iter_mut().enumerate() {
            let failure = disk.lanes.clone().find_map(|lane| self.lanes.lane(lane).failure());
            if let Some(message) = failure.filter(|_| !disk.is_reported) {
                disk.is_reported = true;
                let message = message.to_owned();
                let _ = self.events.send(StoreEvent::DiskFailed { disk: index, message });
                self.wake.signal();
            }
        }
    }
}
