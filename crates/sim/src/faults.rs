//! What goes wrong, how often, and what may not: the fault budget.
//!
//! Every fault happens by itself, again and again, at times around its mean. All end with the safety
//! phase. The budget: a fault never damages the last good copy, so a write fails and a page is torn
//! only while another member of the same ISR runs in the life that the configuration names. Each
//! fault that happens is counted (`fault.*`).

use crate::disk::Crash;
use crate::events::{Nemesis, What};
use crate::phases::Phase;
use crate::store::{Input, Process};
use crate::world::{MILLI, World, quality};
use proto::Epoch;
use shard::conf::{CopyId, Incarnation, Member, StoreId};

/// Longer than every lease and promise (G is 2.25 s), also by a clock that is 10 % wrong.
const LONG_PAUSE: u64 = 2_700 * MILLI;

/// How long a lost machine is off: longer than a person takes to decide, mostly.
const LOST: u64 = 6_000 * MILLI;
/// How often a person looks: later than the last report of a machine that is off can arrive.
const DECIDES_AFTER: u64 = 1_000 * MILLI;

/// Time after the last fault in which a process may still end because of it.
const AFTERMATH: u64 = 1_000 * MILLI;

impl World {
    fn every(&self, nemesis: Nemesis) -> u64 {
        match nemesis {
            Nemesis::Partition => self.options.partition_every_ms,
            Nemesis::Crash => self.options.crash_every_ms,
            Nemesis::CrashAll => self.options.crash_all_every_ms,
            Nemesis::Pause => self.options.pause_every_ms,
            Nemesis::SlowDisk => self.options.slow_disk_every_ms,
            Nemesis::StuckDisk => self.options.stuck_disk_every_ms,
            Nemesis::Conductor => self.options.conductor_every_ms,
            Nemesis::Connection => self.options.connection_every_ms,
            Nemesis::Client => self.options.client_every_ms,
            Nemesis::Attach => self.options.attach_every_ms,
            Nemesis::Transfer => self.options.transfer_every_ms,
            Nemesis::Rot => self.options.rot_every_ms,
            Nemesis::Demote => self.options.demote_every_ms,
            Nemesis::Lose => self.options.lose_every_ms,
        }
    }

    pub(crate) fn begin_faults(&mut self) {
        for nemesis in [
            Nemesis::Partition,
            Nemesis::Crash,
            Nemesis::CrashAll,
            Nemesis::Pause,
            Nemesis::SlowDisk,
            Nemesis::StuckDisk,
            Nemesis::Conductor,
            Nemesis::Connection,
            Nemesis::Client,
            Nemesis::Attach,
            Nemesis::Transfer,
            Nemesis::Demote,
            Nemesis::Lose,
            Nemesis::Rot,
        ] {
            self.plan(nemesis);
        }
    }

    fn plan(&mut self, nemesis: Nemesis) {
        let every = self.every(nemesis);
        if every > 0 {
            let at = self.now + self.random.around(every * MILLI);
            self.events.push(at, What::Nemesis(nemesis));
        }
    }

    pub(crate) fn strike(&mut self, nemesis: Nemesis) {
        if self.phase != Phase::Safety {
            return;
        }
        self.plan(nemesis);
        let index = self.random.below(self.stores.len() as u64) as usize;
        match nemesis {
            Nemesis::Partition => self.partition(),
            Nemesis::Crash => {
                if self.random.below(100) < self.options.storm_percent {
                    self.count("fault.storm");
                    self.stores[index].storm = 3;
                }
                self.crash(index, true);
            }
            Nemesis::CrashAll => {
                self.count("fault.crash_all");
                for index in 0..self.stores.len() {
                    self.crash(index, false);
                }
            }
            Nemesis::Pause => self.pause(index),
            Nemesis::SlowDisk => {
                self.count("fault.slow_disk");
                self.stores[index].disk_factor = *self.random.pick(&[10, 100]);
                let at = self.now + self.random.around(2_000 * MILLI);
                self.events.push(at, What::DiskRecovers(self.stores[index].id));
            }
            Nemesis::StuckDisk => {
                self.count("fault.stuck_disk");
                self.stores[index].stuck = Some(self.random.around(2_000 * MILLI));
            }
            Nemesis::Conductor => {
                if self.is_conductor_up {
                    self.count("fault.conductor");
                    self.is_conductor_up = false;
                    let at = self.now + self.random.around(2_000 * MILLI);
                    self.events.push(at, What::ConductorBack);
                }
            }
            Nemesis::Connection => self.break_connection(),
            Nemesis::Client => {
                self.count("fault.client");
                let client = self.random.below(self.clients.len() as u64) as usize;
                self.replace_client(client);
            }
            Nemesis::Attach => self.attach(),
            Nemesis::Transfer => self.transfer(),
            Nemesis::Demote => self.demote(),
            Nemesis::Lose => self.lose(),
            Nemesis::Rot => self.rot(),
        }
    }

    // ------------------------------------------------------------------------------- network ------

    fn partition(&mut self) {
        let nodes = self.stores.len() as u64 + 1;
        if self.random.below(3) == 0 {
            return self.network.heal();
        }
        self.count("fault.partition_begins");
        if nodes == 4 && self.random.below(100) < self.options.bridge_percent {
            // Two stores that reach each other only over the third, which reaches everybody.
            let bridge = 1 + self.random.below(3);
            let (left, right) = (bridge % 3 + 1, (bridge + 1) % 3 + 1);
            self.network.set_cut(left, right, true);
            self.network.set_cut(right, left, true);
            return;
        }
        let node = self.random.below(nodes);
        let is_asymmetric = self.random.below(100) < self.options.asymmetric_percent;
        let is_in = self.random.below(2) == 0;
        for other in (0..nodes).filter(|&other| other != node) {
            if self.random.below(3) == 0 {
                continue;
            }
            for (from, to, is_meant) in
                [(node, other, !is_asymmetric || !is_in), (other, node, !is_asymmetric || is_in)]
            {
                if !is_meant {
                    continue;
                }
                self.network.set_cut(from, to, true);
                if self.options.flap > 0 && self.random.below(2) == 0 {
                    let at = self.now + self.random.around(200 * MILLI);
                    self.events.push(at, What::Flap(from, to, 8));
                }
            }
        }
    }

    /// While the outcome of a proposal is on its way, cut the primary off from the learner that it
    /// proposed. The conductor is on the learner's side, the third store on either.
    pub(crate) fn ambush(&mut self, primary: StoreId, learner: StoreId) {
        if self.phase != Phase::Safety {
            return;
        }
        self.count("fault.ambush");
        let mut own = vec![primary];
        for other in 1..=self.stores.len() as u64 {
            if other != primary && other != learner && self.random.below(2) == 0 {
                own.push(other);
            }
        }
        // The register still hears the primary's side in half of the cases, and is not heard.
        let is_one_way = self.random.below(2) == 0;
        for node in 0..=self.stores.len() as u64 {
            for &store in own.iter().filter(|_| !own.contains(&node)) {
                self.network.set_cut(node, store, true);
                self.network.set_cut(store, node, !(is_one_way && node == 0));
            }
        }
        let at = self.now + self.random.around(4_000 * MILLI);
        self.events.push(at, What::Heal);
    }

    pub(crate) fn flap(&mut self, from: u64, to: u64, left: u32) {
        if self.phase != Phase::Safety {
            return;
        }
        self.count("fault.flap");
        let is_cut = self.network.reaches(from, to);
        self.network.set_cut(from, to, is_cut && left > 0);
        if left > 0 {
            let at = self.now + self.random.around(200 * MILLI);
            self.events.push(at, What::Flap(from, to, left - 1));
        }
    }

    fn break_connection(&mut self) {
        let open = self.conns.iter().filter(|(_, conn)| conn.is_server_open && !conn.is_broken);
        let open: Vec<u64> = open.map(|(&id, _)| id).collect();
        if open.is_empty() {
            return;
        }
        self.count("fault.connection");
        let id = *self.random.pick(&open);
        self.conns.get_mut(&id).expect("it is open").is_broken = true;
        // Half-open: each end learns of it in its own time, the store perhaps much later. What was
        // on its way still arrives.
        let client = self.now + self.random.around(100 * MILLI);
        let server = self.now + self.random.around(1_500 * MILLI);
        self.events.push(client, What::ClientClosed(id));
        self.events.push(server, What::ServerClosed(id));
    }

    fn attach(&mut self) {
        if !self.is_conductor_up {
            return;
        }
        let before = (0..self.options.shards as u32).map(|shard| self.conductor.conf(shard));
        let next = before.map(|conf| conf.attach_epoch).max().unwrap_or(1) + 1;
        let mut out = Vec::new();
        self.conductor.attach(self.now, next, &mut out);
        out.into_iter().for_each(|stored| self.stored(stored));
    }

    fn transfer(&mut self) {
        if !self.is_conductor_up {
            return;
        }
        let shard = self.random.below(self.options.shards) as u32;
        let conf = self.conductor.conf(shard);
        let others: Vec<CopyId> =
            conf.isr.iter().copied().filter(|&copy| copy != conf.primary).collect();
        let from = conf.primary_member().store;
        if !others.is_empty() {
            let to = *self.random.pick(&others);
            self.tell(from, Input::Transfer { shard, to });
        }
    }

    fn demote(&mut self) {
        if !self.is_conductor_up {
            return;
        }
        let shard = self.random.below(self.options.shards) as u32;
        let copies = self.conductor.conf(shard).isr.clone();
        let copy = *self.random.pick(&copies);
        if let Some(stored) = self.conductor.demote(self.now, shard, copy) {
            self.count("fault.demote");
            self.stored(stored);
        }
    }

    /// A shard loses its whole ISR while a store outside it is up: those machines are off, and
    /// everybody knows. A person decides before they come back, with all that they had.
    fn lose(&mut self) {
        let shard = self.random.below(self.options.shards) as u32;
        let conf = self.conductor.conf(shard).clone();
        let is_out = |member: &&Member| !conf.isr.contains(&member.copy);
        let is_up = |member: &Member| self.stores[member.store as usize - 1].process.is_some();
        if !conf.members.iter().filter(is_out).any(is_up) {
            return;
        }
        self.count("fault.lose");
        for lost in conf.isr_members() {
            let index = lost.store as usize - 1;
            self.stores[index].lost_until = self.now + self.random.around(LOST);
            self.crash(index, false);
            let life = self.stores[index].incarnation;
            self.conductor.ended(lost.store, life);
            self.tell_dead(lost.store, life);
        }
        self.events.push(self.now + DECIDES_AFTER, What::Decide(shard, conf.epoch));
    }

    /// A person looks whether something has changed, decides if the guards allow it, or looks again.
    pub(crate) fn decide(&mut self, shard: u32, epoch: Epoch) {
        let conf = self.conductor.conf(shard);
        if self.phase != Phase::Safety || conf.epoch != epoch {
            return;
        }
        let stored = self.is_conductor_up.then(|| self.conductor.force_accept(self.now, shard));
        let Some(Some(stored)) = stored else {
            return self.events.push(self.now + DECIDES_AFTER, What::Decide(shard, epoch));
        };
        let attach_epoch = stored.conf.attach_epoch;
        let blocks = self.blocks_of(shard);
        self.check.forced(shard, &blocks);
        self.stored(stored);
        let mut out = Vec::new();
        self.conductor.attach(self.now, attach_epoch, &mut out);
        out.into_iter().for_each(|stored| self.stored(stored));
    }

    // ------------------------------------------------------------------------------- processes ----

    /// Whether, for every shard whose ISR holds this store, another member of it runs in the life
    /// that the configuration names.
    pub(crate) fn has_other_copy(&self, index: usize) -> bool {
        let store = self.stores[index].id;
        (0..self.options.shards as u32).all(|shard| {
            let conf = self.conductor.conf(shard);
            let is_in = conf.isr_members().any(|member| member.store == store);
            let mut others = conf.isr_members().filter(|member| member.store != store);
            !is_in
                || others.any(|member| {
                    let other = &self.stores[member.store as usize - 1];
                    let is_up = other.process.as_ref().is_some_and(Process::is_up);
                    is_up && other.incarnation == member.incarnation
                })
        })
    }

    /// Crash a store; `may_tear`: its machine fails alone.
    pub(crate) fn crash(&mut self, index: usize, may_tear: bool) {
        if self.stores[index].process.is_none() {
            return;
        }
        let is_safe = may_tear && self.has_other_copy(index);
        let crash = Crash {
            loses_unflushed: self.options.lose_unflushed > 0,
            tears: self.options.torn > 0 && self.options.atomic_blocks == 0 && is_safe,
        };
        let store = &mut self.stores[index];
        store.process = None;
        store.paused = None;
        store.stuck = None;
        let (id, incarnation) = (store.id, store.incarnation);
        let report = store.disk.crash(crash, &mut self.random);
        self.count("fault.crash");
        *self.counts.entry("fault.torn").or_default() += report.torn;
        *self.counts.entry("fault.lose_unflushed").or_default() += report.lost;
        self.trace.event(self.now, "crash", &[("store", id), ("inc", incarnation)]);
        self.audits.retain(|_, audit| audit.store != id);
        self.end_connections(id);
        let at = self.now + self.random.around(self.options.restart_ms * MILLI);
        self.events.push(at, What::Boot(id));
        // A supervisor that has seen the exit says so; another machine's exit nobody sees.
        if self.random.below(2) == 0 {
            self.tell_dead(id, incarnation);
        }
    }

    fn end_connections(&mut self, store: StoreId) {
        let ended: Vec<u64> = self
            .conns
            .iter()
            .filter(|(_, conn)| conn.store == store && conn.is_server_open)
            .map(|(&id, _)| id)
            .collect();
        for id in ended {
            let conn = self.conns.get_mut(&id).expect("just listed");
            (conn.is_server_open, conn.is_broken) = (false, true);
            let at = self.now + self.random.around(50 * MILLI);
            self.events.push(at, What::ClientClosed(id));
        }
    }

    pub(crate) fn plan_crash_in_recovery(&mut self, index: usize) {
        if self.phase != Phase::Safety || self.now == 0 {
            return;
        }
        let (store, life) = (self.stores[index].id, self.stores[index].incarnation);
        if self.random.chance(self.options.crash_in_recovery) {
            self.count("fault.crash_in_recovery");
            let steps = 1 + self.random.below(8);
            let at = self.now + self.random.around(steps * self.options.disk_us * 1_000);
            self.events.push(at, What::Crash(store, life));
        } else if self.stores[index].storm > 0 {
            self.stores[index].storm -= 1;
            let at = self.now + self.random.around(300 * MILLI);
            self.events.push(at, What::Crash(store, life));
        }
    }

    /// Recovery failed or a lane stopped: the supervisor ends the process and starts another.
    pub(crate) fn process_stopped(&mut self, index: usize, reason: &str) {
        self.count("stopped");
        // A disk operation that failed as the last fault is told of some time later.
        let is_aftermath = match self.phase {
            Phase::Safety => true,
            Phase::Liveness { until } => {
                reason.contains("disk operation failed")
                    && self.now + self.options.liveness_ms * MILLI < until + AFTERMATH
            }
            Phase::Drain { .. }
            | Phase::Conductorless { .. }
            | Phase::ConductorlessDrain { .. }
            | Phase::Rest { .. }
            | Phase::Looking
            | Phase::Over => false,
        };
        if !is_aftermath {
            let store = self.stores[index].id;
            return self.check.fail(format!("I23: store {store} stops without a fault: {reason}"));
        }
        let (store, life) = (self.stores[index].id, self.stores[index].incarnation);
        let at = self.now + self.random.around(200 * MILLI);
        self.events.push(at, What::Crash(store, life));
    }

    fn pause(&mut self, index: usize) {
        let is_long = self.random.below(100) < self.options.long_pause_percent;
        let store = &mut self.stores[index];
        if store.process.is_none() || store.paused.is_some() {
            return;
        }
        store.paused = Some(Vec::new());
        let (id, life) = (store.id, store.incarnation);
        let mut nanos = self.random.around(self.options.pause_ms * MILLI);
        self.count("fault.pause");
        if is_long {
            self.count("fault.long_pause");
            nanos += LONG_PAUSE;
        }
        self.events.push(self.now + nanos, What::Resume(id, life));
    }

    pub(crate) fn resume(&mut self, store: StoreId, life: Incarnation) {
        let store = &mut self.stores[store as usize - 1];
        if store.incarnation != life {
            return;
        }
        for what in store.paused.take().unwrap_or_default() {
            self.events.push(self.now, what);
        }
    }

    /// All faults end: the network is whole, every store runs.
    pub(crate) fn end_faults(&mut self) {
        self.network.heal();
        let calm = crate::options::Options { reorder: 0, ..crate::options::Options::calm() };
        self.network.set_quality(quality(&calm));
        self.is_conductor_up = true;
        for index in 0..self.stores.len() {
            let (id, life) = (self.stores[index].id, self.stores[index].incarnation);
            self.stores[index].disk_factor = 1;
            self.stores[index].stuck = None;
            self.stores[index].storm = 0;
            self.resume(id, life);
            // What was stuck or slow completes now; completing it again later does nothing.
            let soon = self.now + self.options.disk_us * 1_000;
            for ticket in self.stores[index].disk.tickets() {
                self.events.push(soon, What::Disk(id, life, ticket));
            }
            if self.stores[index].process.is_none() {
                self.events.push(self.now, What::Boot(id));
            }
        }
    }
}
