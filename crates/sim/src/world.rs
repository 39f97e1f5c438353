//! The world of one seed: stores, conductor, clients, network and disks on virtual time.
//!
//! `step` takes the next event off the heap, gives it to the machine that it concerns and carries
//! out what that machine wants. Everything that machines see of the world passes through here, and
//! the checker is told all of it. `faults.rs` says what goes wrong, `phases.rs` when a world is
//! over.
//!
//! A violation stops the world where it stands: nothing happens any more, the trace ends there.

use crate::check::{Check, Place};
use crate::client::{self, Client};
use crate::codec::frame_of;
use crate::conductor::{Conductor, Status, Stored, Tell};
use crate::connections::{Audit, Conn};
use crate::disk::{Disk, Fate};
use crate::events::{Events, What};
use crate::genesis::{create_replicas, mount_now};
use crate::network::{self, Network, Quality};
use crate::options::{Options, OptionsProblem};
use crate::phases::Phase;
use crate::random::Random;
use crate::rot::Rotten;
use crate::store::{Input, Output, Process, Settings, shard_id};
use crate::trace::Trace;
use lane::format::{DiskHeader, Durability};
use lane::{FormatRequest, MountParameters, format_disk};
use proto::disk::DiskOp;
use proto::wire::{Reply, Request};
use proto::{BLOCK_BYTES, Pool, ReplicaId, Tick};
use shard::conf::{CopyId, Incarnation, Member, ShardConf, StoreId};
use shard::heartbeat::Timing;
use shard::mutant::Mutant;
use shard::replica::{Note, Role};
use shard::session::{self, PathId};
use std::collections::{BTreeMap, BTreeSet};

pub(crate) const MICRO: u64 = 1_000;
pub(crate) const MILLI: u64 = 1_000_000;
/// Buffers that a world keeps for reuse, per size class.
const POOL_BYTES: usize = 4 << 20;
/// Slots of a lane beside those of its shards: checkpoints, the reserve, garbage.
const SLOTS_EXTRA: u64 = 120;
/// How often an agent reports.
const AGENT_NANOS: u64 = 250 * MILLI;
/// How often the conductor looks around.
const CONDUCTOR_NANOS: u64 = 200 * MILLI;
/// One in so many messages between replicas goes through its bytes.
const CODEC_ONE_IN: u64 = 8;
/// Clocks of stores begin somewhere above this: 0 means "never" to some machines.
const CLOCK_START: u64 = 1_000_000 * MILLI;

/// One store: what survives its process, and its process.
pub(crate) struct Store {
    pub id: StoreId,
    pub disk: Disk,
    pub mount: MountParameters,
    pub process: Option<Process>,
    /// The life that runs, or the last one.
    pub incarnation: Incarnation,
    /// What came while it was paused.
    pub paused: Option<Vec<What>>,
    pub disk_factor: u64,
    /// The next disk operation takes so long.
    pub stuck: Option<u64>,
    /// Lives that crash again soon after their start.
    pub storm: u64,
    /// Until then its machine is off.
    pub lost_until: u64,
    /// A read has failed in this life, so it may call a block lost that it reads later.
    pub has_failed_reads: bool,
    clock_offset: u64,
    /// Rate error in thousandths.
    clock_permille: i64,
    timer_at: Option<u64>,
    is_dirty: bool,
}

impl Store {
    fn local(&self, now: u64) -> Tick {
        let rate = u128::from((1_000 + self.clock_permille).unsigned_abs());
        Tick(self.clock_offset + (u128::from(now) * rate / 1_000) as u64)
    }

    fn global(&self, local: Tick) -> u64 {
        let rate = u128::from((1_000 + self.clock_permille).unsigned_abs());
        let since = u128::from(local.0.saturating_sub(self.clock_offset));
        // Rounded up: never before its time.
        ((since * 1_000).div_ceil(rate)) as u64
    }
}

/// One world.
pub struct World {
    pub(crate) options: Options,
    pub(crate) random: Random,
    pub(crate) now: u64,
    pub(crate) events: Events,
    pub(crate) stores: Vec<Store>,
    pub(crate) network: Network,
    pub(crate) conductor: Conductor,
    pub(crate) is_conductor_up: bool,
    pub(crate) clients: Vec<Client>,
    /// Clients so far, also those that have ended.
    pub(crate) next_client: u64,
    /// When each session is woken next.
    pub(crate) client_timers: Vec<Option<u64>>,
    pub(crate) conns: BTreeMap<u64, Conn>,
    pub(crate) paths: BTreeMap<(usize, PathId), u64>,
    pub(crate) next_conn: u64,
    next_incarnation: Incarnation,
    pub(crate) check: Check,
    pub(crate) trace: Trace,
    pub(crate) counts: BTreeMap<&'static str, u64>,
    pub(crate) hot: Vec<u64>,
    pub(crate) phase: Phase,
    pub(crate) audits: BTreeMap<u64, Audit>,
    pub(crate) rotten: Vec<Rotten>,
    /// Blocks of the volume that were lost once, in a world that may lose.
    pub(crate) losses: BTreeSet<u64>,
    pub(crate) next_audit: u64,
    /// What the lanes hold at rest: block, then store and value.
    pub(crate) found: BTreeMap<u64, Vec<(StoreId, Option<u64>)>>,
    /// What the lanes of an ISR hold when a new reign begins to serve: reign and block, then
    /// values.
    pub(crate) opening: BTreeMap<(u64, u64), Vec<(StoreId, u64)>>,
    pub(crate) happened: u64,
    pub(crate) pool: Pool,
    mutant: Mutant,
    dirty: Vec<usize>,
    outputs: Vec<Output>,
}

/// Why a world cannot be made.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WorldProblem {
    /// The options are wrong.
    #[error(transparent)]
    Options(#[from] OptionsProblem),
    /// A disk cannot be laid out.
    #[error("a disk cannot be made: {0}")]
    Disk(String),
}

impl World {
    /// The world of this seed. `options` overrides what the seed chose; `traced`: keep lines.
    pub fn new(seed: u64, options: &str, traced: bool) -> Result<World, WorldProblem> {
        let mut chosen = Options::of_seed(seed);
        chosen.set(options)?;
        let options = chosen;
        let mut random = Random::new(seed);
        let pool = Pool::new(POOL_BYTES);
        let mut stores = Vec::new();
        for id in 1..=options.stores {
            stores.push(make_store(id, &options, &pool, &mut random).map_err(WorldProblem::Disk)?);
        }
        let members: Vec<Member> = stores.iter().map(|store| member_of(store, store.id)).collect();
        let confs: Vec<ShardConf> =
            (0..options.shards).map(|shard| first_conf(&options, &members, shard)).collect();
        let hot = client::hot_blocks(&options, &mut random);
        let mutant = match options.mutant {
            0 => Mutant::None,
            number => Mutant::ALL[number as usize - 1],
        };
        let mut world = World {
            network: Network::new(stores.len(), quality(&options)),
            conductor: Conductor::new(confs.clone(), members),
            is_conductor_up: true,
            client_timers: vec![None; options.clients as usize],
            clients: Vec::new(),
            next_client: 0,
            conns: BTreeMap::new(),
            paths: BTreeMap::new(),
            next_conn: 0,
            next_incarnation: options.stores,
            check: Check::new(options.shards as usize),
            trace: Trace::new(traced),
            counts: BTreeMap::new(),
            hot,
            phase: Phase::Safety,
            audits: BTreeMap::new(),
            rotten: Vec::new(),
            losses: BTreeSet::new(),
            next_audit: 0,
            found: BTreeMap::new(),
            opening: BTreeMap::new(),
            happened: 0,
            pool,
            mutant,
            dirty: Vec::new(),
            outputs: Vec::new(),
            events: Events::default(),
            now: 0,
            random,
            stores,
            options,
        };
        world.begin(confs);
        Ok(world)
    }

    fn begin(&mut self, confs: Vec<ShardConf>) {
        for store in 0..self.stores.len() {
            let id = self.stores[store].id;
            self.check.registered(id, id);
            self.boot(store, id);
        }
        for conf in &confs {
            self.check.stored(0, conf);
            self.trace.conf(0, conf, "first", 0);
        }
        for index in 0..self.options.clients as usize {
            self.begin_client(index);
            let at = self.random.below(50 * MILLI);
            self.events.push(at, What::Ask(index));
        }
        self.events.push(CONDUCTOR_NANOS, What::ConductorTick);
        self.events.push(self.options.safety_ms * MILLI, What::Phase);
        self.begin_faults();
    }

    /// Run at most `events` events. False when the world is over or an invariant is broken.
    pub fn step(&mut self, events: u64) -> bool {
        for _ in 0..events {
            if self.is_over() {
                return false;
            }
            let Some((at, what)) = self.events.pop() else {
                self.check.fail("I23: nothing is left to happen and the world is not over");
                return false;
            };
            assert!(at >= self.now, "time does not go back");
            self.now = at;
            self.happened += 1;
            self.happens(what);
            if self.events.next_at() != Some(self.now) {
                self.turn();
            }
        }
        !self.is_over()
    }

    /// Run to the end.
    pub fn run(&mut self) {
        while self.step(1 << 20) {}
    }

    /// The first broken invariant.
    #[must_use]
    pub fn violation(&self) -> Option<&str> {
        self.check.violation()
    }

    /// The options in force, as JSON.
    #[must_use]
    pub fn options(&self) -> String {
        self.options.to_json()
    }

    /// How often what has happened.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        let mut counts = self.counts.clone();
        counts.insert("events", self.happened);
        counts.insert("sim.nanos", self.now);
        counts
    }

    /// The hash of everything that happened, in hex.
    #[must_use]
    pub fn trace_hash(&self) -> String {
        format!("{:032x}", self.trace.hash())
    }

    /// The lines since the last call, if they are kept.
    pub fn take_trace(&mut self) -> String {
        self.trace.take()
    }

    fn is_over(&self) -> bool {
        self.phase == Phase::Over || self.check.violation().is_some()
    }

    pub(crate) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    // -------------------------------------------------------------------------------- happening --

    fn happens(&mut self, what: What) {
        if let Some(store) = process_of(&what, &self.conns)
            && let Some(inbox) = &mut self.stores[store as usize - 1].paused
        {
            // The process is stopped: the kernel keeps what comes.
            inbox.push(what);
            return;
        }
        match what {
            What::Disk(store, life, ticket) => self.disk_done(store, life, ticket),
            What::Timer(store, life) => {
                let index = store as usize - 1;
                if self.stores[index].timer_at.is_some_and(|at| at <= self.now) {
                    self.stores[index].timer_at = None;
                }
                if self.runs(store, Some(life)) {
                    self.input(index, Input::Timer);
                }
            }
            What::Arrive(store, life, input) => {
                if self.runs(store, life) {
                    self.input(store as usize - 1, *input);
                }
            }
            What::Agent(store, life) => self.agent(store, life),
            What::Status(status) => self.status(status),
            What::Proposal(store, life, shard, epoch, transition) => {
                if self.is_conductor_up {
                    let proposed = (shard, epoch);
                    let result =
                        self.conductor.proposed(self.now, (store, life), proposed, &transition);
                    match result {
                        Ok(stored) => self.stored(stored),
                        Err(_) => self.count("refused"),
                    }
                }
            }
            What::Fetch(store, shard, epoch) => {
                if self.is_conductor_up && self.conductor.conf(shard).epoch > epoch {
                    let conf = self.conductor.conf(shard).clone();
                    self.tell(store, Input::Conf(conf));
                }
            }
            What::ConductorTick => {
                self.events.push(self.now + CONDUCTOR_NANOS, What::ConductorTick);
                if self.is_conductor_up {
                    let mut out = Vec::new();
                    self.conductor.tick(self.now, &mut out);
                    out.into_iter().for_each(|stored| self.stored(stored));
                }
            }
            What::ConductorBack => self.is_conductor_up = true,
            What::Connect(conn) => self.connect(conn),
            What::ToClient(conn, frame) => {
                let Some(found) = self.conns.get(&conn).filter(|conn| conn.is_client_open) else {
                    return;
                };
                let (client, path) = (found.client, found.path);
                self.client_step(client, session::Event::Frame(path, *frame));
            }
            What::ToServer(conn, frame) => self.arrives_at_server(conn, *frame),
            What::ClientClosed(conn) => self.client_closed(conn),
            What::ServerClosed(conn) => self.server_closed(conn),
            What::ClientTimer(client) => {
                self.client_timers[client] = None;
                self.client_step(client, session::Event::Tick);
            }
            What::Ask(client) => self.ask(client),
            What::ClientConf(client, confs) => {
                let id = self.clients[client].id;
                let conf = client::volume_conf(id, &self.options, &confs);
                if self.clients[client].session.accepts(&conf).is_ok() {
                    self.client_step(client, session::Event::Configure(conf));
                }
            }
            What::Boot(store) => {
                let index = store as usize - 1;
                let lost_until = self.stores[index].lost_until;
                if self.now < lost_until && self.phase == Phase::Safety {
                    self.events.push(lost_until, What::Boot(store));
                } else if self.stores[index].process.is_none() {
                    self.next_incarnation += 1;
                    self.boot(index, self.next_incarnation);
                }
            }
            What::Crash(store, life) => {
                let found = &self.stores[store as usize - 1];
                let has_stopped = found.process.as_ref().is_some_and(Process::has_stopped);
                // Faults that were planned end with their phase; what has stopped is still ended.
                if found.incarnation == life && (self.phase == Phase::Safety || has_stopped) {
                    self.crash(store as usize - 1, true);
                }
            }
            What::Resume(store, life) => self.resume(store, life),
            What::DiskRecovers(store) => self.stores[store as usize - 1].disk_factor = 1,
            What::Flap(from, to, left) => self.flap(from, to, left),
            What::Ambush(primary, learner) => self.ambush(primary, learner),
            What::Decide(shard, epoch) => self.decide(shard, epoch),
            What::Heal => self.network.heal(),
            What::Nemesis(nemesis) => self.strike(nemesis),
            What::Phase => self.look_at_phase(),
        }
    }

    /// Whether the process of a store runs (in this life, if one is named).
    pub(crate) fn runs(&self, store: StoreId, life: Option<Incarnation>) -> bool {
        let store = &self.stores[store as usize - 1];
        store.process.is_some() && life.is_none_or(|life| life == store.incarnation)
    }

    pub(crate) fn input(&mut self, index: usize, input: Input) {
        let store = &mut self.stores[index];
        let local = store.local(self.now);
        let Some(process) = &mut store.process else { return };
        let mut out = std::mem::take(&mut self.outputs);
        process.step(local, input, &mut out);
        if !std::mem::replace(&mut store.is_dirty, true) {
            self.dirty.push(index);
        }
        self.carry_out(index, &mut out);
        self.outputs = out;
    }

    /// The instant is over: let the processes that had a part in it finish.
    fn turn(&mut self) {
        while let Some(index) = self.dirty.pop() {
            let store = &mut self.stores[index];
            store.is_dirty = false;
            let local = store.local(self.now);
            let Some(process) = &mut store.process else { continue };
            let mut out = std::mem::take(&mut self.outputs);
            process.turn(local, &mut out);
            self.carry_out(index, &mut out);
            self.outputs = out;
            self.set_timer(index);
        }
    }

    fn set_timer(&mut self, index: usize) {
        let store = &mut self.stores[index];
        let Some(wake) = store.process.as_ref().and_then(Process::wake) else { return };
        // A machine that asks for the present is woken a little later: time always goes on.
        let at = store.global(wake).max(self.now + MICRO);
        if store.timer_at.is_none_or(|before| before <= self.now || at < before) {
            store.timer_at = Some(at);
            self.events.push(at, What::Timer(store.id, store.incarnation));
        }
    }

    fn carry_out(&mut self, index: usize, out: &mut Vec<Output>) {
        let (store, life) = (self.stores[index].id, self.stores[index].incarnation);
        for output in out.drain(..) {
            match output {
                Output::Disk(request) => {
                    let nanos = self.disk_nanos(index, &request.op);
                    let ticket = self.stores[index].disk.submit(request);
                    self.events.push(self.now + nanos, What::Disk(store, life, ticket));
                }
                Output::Request { to, request } => self.peer_request((store, life), to, request),
                Output::Answer { to, life: asker, reply } => {
                    self.peer_answer(store, (to, asker), reply);
                }
                Output::Ping { to, ping } => {
                    let input = |ping| Input::Ping { from: store, life, ping };
                    let sent = self.sends(store, to, network::Lane::Heartbeat);
                    for at in sent {
                        let input = Box::new(input(ping.clone()));
                        self.events.push(at, What::Arrive(to, None, input));
                    }
                }
                Output::Pong { to, life: asker, ping } => {
                    for at in self.sends(store, to, network::Lane::Heartbeat) {
                        let input = Box::new(Input::Pong { from: store, ping: ping.clone() });
                        self.events.push(at, What::Arrive(to, Some(asker), input));
                    }
                }
                Output::Frame { conn, reply } => self.send_to_client(conn, &reply),
                Output::Close(conn) => self.server_closes(conn),
                Output::Propose { shard, epoch, transition } => {
                    self.count("proposal");
                    for at in self.sends(store, 0, network::Lane::Control) {
                        let what = What::Proposal(store, life, shard, epoch, transition.clone());
                        self.events.push(at, what);
                    }
                }
                Output::Fetch { shard, newer_than } => {
                    for at in self.sends(store, 0, network::Lane::Control) {
                        self.events.push(at, What::Fetch(store, shard, newer_than));
                    }
                }
                Output::Note { shard, note } => self.note(index, shard, &note),
                Output::Logged { shard, lsn, first, values } => {
                    let place = Place { shard, store, incarnation: life };
                    self.check.logged(self.now, place, lsn, first, &values);
                }
                Output::Served { shard, epoch, arrived } => {
                    let place = Place { shard, store, incarnation: life };
                    self.check.served(self.now, place, epoch, arrived);
                }
                Output::Audited { token, result } => self.audited(token, result),
                Output::Mounted => self.mounted(index),
                Output::Stopped(reason) => self.process_stopped(index, &reason),
                Output::Violation(text) => self.check.fail(text),
            }
        }
    }

    /// When a message arrives, if it does.
    fn sends(&mut self, from: u64, to: u64, lane: network::Lane) -> smallvec::SmallVec<[u64; 2]> {
        let sent = self.network.send(self.now, from, to, lane, &mut self.random);
        for (has, what) in [
            (sent.is_cut, "fault.partition"),
            (sent.is_dropped, "fault.drop"),
            (sent.is_duplicate, "fault.duplicate"),
            (sent.is_slow, "fault.slow_message"),
        ] {
            if has {
                self.count(what);
            }
        }
        sent.arrivals
    }

    fn peer_request(&mut self, (from, life): (StoreId, Incarnation), to: StoreId, req: Request) {
        let mut request = req;
        if self.random.below(CODEC_ONE_IN) == 0 {
            let (header, frame) = frame_of(request.encode(), &self.pool);
            request = Request::parse(&header, frame).expect("a replica's own request");
        }
        if !(1..=self.stores.len() as u64).contains(&to) || to == from {
            self.check.fail(format!("I27: store {from} sends to store {to}: {request:?}"));
            return;
        }
        for at in self.sends(from, to, network::Lane::Peer) {
            let input = Box::new(Input::Peer { from, life, request: request.clone() });
            self.events.push(at, What::Arrive(to, None, input));
        }
    }

    fn peer_answer(&mut self, from: StoreId, (to, life): (StoreId, Incarnation), answer: Reply) {
        let mut reply = answer;
        if self.random.below(CODEC_ONE_IN) == 0 {
            let (header, frame) = frame_of(reply.encode(), &self.pool);
            reply = Reply::parse(&header, frame).expect("a replica's own reply");
        }
        for at in self.sends(from, to, network::Lane::Peer) {
            let input = Box::new(Input::PeerReply { from, reply: reply.clone() });
            self.events.push(at, What::Arrive(to, Some(life), input));
        }
    }

    fn note(&mut self, index: usize, shard: u32, note: &Note) {
        let (store, incarnation) = (self.stores[index].id, self.stores[index].incarnation);
        let place = Place { shard, store, incarnation };
        let moment = self.check.history.moment();
        let role_before = self.check.role(place);
        match note {
            Note::Lost { block } if self.check_loss(store, shard, *block) => {}
            Note::Role { .. }
            | Note::Promised { .. }
            | Note::Assigned { .. }
            | Note::Durable { .. }
            | Note::Committed { .. }
            | Note::Mended { .. }
            | Note::Copied { .. }
            | Note::CaughtUp { .. }
            | Note::Different { .. }
            | Note::Lost { .. }
            | Note::Healing { .. } => self.check.note(self.now, moment, place, note),
        }
        let at = (shard, store, incarnation);
        let ids = [("shard", u64::from(shard)), ("store", store), ("inc", incarnation)];
        match note {
            Note::Role { epoch, role } => {
                self.trace.role(self.now, at, epoch.0, role_name(*role));
                if *role == Role::Active {
                    self.count("active");
                    let is_new = role_before == Some(Role::Settling);
                    self.audit_isr(shard, (index, is_new));
                }
            }
            Note::Promised { epoch } => {
                let [a, b, c] = ids;
                self.trace.event(self.now, "promised", &[a, b, c, ("epoch", epoch.0)]);
            }
            Note::Assigned { lsn, first, count, is_settle, is_heal } => {
                self.count(if *is_settle { "settled" } else { "assigned" });
                let lsn = (lsn.epoch.0, lsn.seq.0);
                self.trace.assigned(self.now, at, lsn, (*first, *count), (*is_settle, *is_heal));
            }
            Note::Durable { lsn } => {
                let ([a, b, c], (epoch, seq)) = (ids, (lsn.epoch.0, lsn.seq.0));
                self.trace.event(self.now, "durable", &[a, b, c, ("epoch", epoch), ("seq", seq)]);
            }
            Note::Committed { lsn, acked } => {
                self.count("committed");
                self.trace.committed(self.now, at, (lsn.epoch.0, lsn.seq.0), acked);
            }
            Note::Copied { to, region } => {
                self.count("copied");
                let [a, b, c] = ids;
                let fields = [a, b, c, ("to", *to), ("region", u64::from(*region))];
                self.trace.event(self.now, "copied", &fields);
            }
            Note::CaughtUp { store: to, regions } => {
                let [a, b, c] = ids;
                let fields = [a, b, c, ("to", *to), ("regions", u64::from(*regions))];
                self.trace.event(self.now, "caught_up", &fields);
                if self.phase == Phase::Safety && self.random.chance(self.options.ambush) {
                    let at = self.now + self.random.around(self.options.delay_us * MICRO);
                    self.events.push(at, What::Ambush(store, *to));
                }
            }
            Note::Mended { .. } => self.count("mended"),
            // The checker has refused the first two, and the world ends here; clients' reads show
            // the last.
            Note::Different { .. } | Note::Lost { .. } | Note::Healing { .. } => {}
        }
    }

    // -------------------------------------------------------------------------------- lives
    // -------

    fn boot(&mut self, index: usize, incarnation: Incarnation) {
        let now = self.now;
        let id = self.stores[index].id;
        self.count("boot");
        self.trace.event(now, "boot", &[("store", id), ("inc", incarnation)]);
        if self.random.below(100) < self.options.twice_percent {
            self.recover_twice(index);
        }
        let store = &mut self.stores[index];
        store.incarnation = incarnation;
        store.timer_at = None;
        store.has_failed_reads = false;
        store.mount.nonce = self.random.number();
        store.mount.incarnation = incarnation;
        let settings = Settings {
            store: id,
            incarnation,
            mount: store.mount.clone(),
            timing: Timing::default(),
            mutant: self.mutant,
            pool: self.pool.clone(),
        };
        let mut out = Vec::new();
        store.process = Some(Process::start(settings, store.local(now), &mut out));
        self.carry_out(index, &mut out);
        self.plan_crash_in_recovery(index);
    }

    /// I16: recovery of the same crashed disk comes to the same answer, also after itself.
    fn recover_twice(&mut self, index: usize) {
        self.count("recovered_twice");
        let store = &self.stores[index];
        let mut disk = store.disk.clone();
        let mut random = Random::new(self.random.number());
        let mut mount = store.mount.clone();
        mount.nonce = self.random.number();
        let first = mount_now(&mut disk, &mount, &self.pool, &mut random);
        let second = mount_now(&mut disk, &mount, &self.pool, &mut random);
        match (first, second) {
            (Ok(first), Ok(second)) => {
                let (first, second) = (first.tables(), second.tables());
                if first.shards != second.shards || first.layers != second.layers {
                    let text = format!("I16: recovery of store {} differs from itself", store.id);
                    self.check.fail(text);
                }
            }
            (Err(fault), _) | (_, Err(fault)) => {
                self.check.fail(format!("I16: store {} does not recover: {fault}", store.id));
            }
        }
    }

    fn mounted(&mut self, index: usize) {
        let (store, incarnation) = (self.stores[index].id, self.stores[index].incarnation);
        self.stores[index].is_dirty = true;
        self.dirty.push(index);
        self.events.push(self.now, What::Agent(store, incarnation));
    }

    fn agent(&mut self, store: StoreId, life: Incarnation) {
        if !self.runs(store, Some(life)) {
            return;
        }
        self.events.push(self.now + AGENT_NANOS, What::Agent(store, life));
        let process = self.stores[store as usize - 1].process.as_ref().expect("it runs");
        if !process.is_up() || process.lane().is_some_and(|lane| lane.failure().is_some()) {
            return;
        }
        let shards = (0..self.options.shards as u32)
            .map(|shard| process.report(shard).unwrap_or_default())
            .collect();
        for shard in 0..self.options.shards as u32 {
            let place = Place { shard, store, incarnation: life };
            let Some(replica) = process.replica(shard) else { continue };
            if let Some(conf) = replica.conf() {
                self.check.follows(self.now, place, conf);
            }
            self.check.opened(self.now, place, replica.promised());
        }
        let status = Status { store, incarnation: life, has_good_journal: true, shards };
        for at in self.sends(store, 0, network::Lane::Control) {
            self.events.push(at, What::Status(status.clone()));
        }
    }

    fn status(&mut self, status: Status) {
        if !self.is_conductor_up {
            return;
        }
        let (store, incarnation) = (status.store, status.incarnation);
        let mut tells = Vec::new();
        if self.conductor.heard(self.now, status, &mut tells) {
            self.check.registered(store, incarnation);
        }
        for tell in tells {
            match tell {
                Tell::Conf(to, conf) => self.tell(to, Input::Conf(conf)),
                Tell::Dead(store, incarnation) => self.tell_dead(store, incarnation),
            }
        }
    }

    pub(crate) fn tell_dead(&mut self, store: StoreId, incarnation: Incarnation) {
        for other in 1..=self.stores.len() as u64 {
            if other != store {
                self.tell(other, Input::Dead { store, incarnation });
            }
        }
    }

    pub(crate) fn tell(&mut self, to: StoreId, input: Input) {
        // Conductors tell one life of one fact; a copy is made only for a duplicate.
        let mut arrivals = self.sends(0, to, network::Lane::Control);
        let Some(last) = arrivals.pop() else { return };
        for at in arrivals {
            self.events.push(at, What::Arrive(to, None, Box::new(input.clone())));
        }
        self.events.push(last, What::Arrive(to, None, Box::new(input)));
    }

    pub(crate) fn stored(&mut self, stored: Stored) {
        let Stored { conf, transition, by } = stored;
        self.check.stored(self.now, &conf);
        self.trace.conf(self.now, &conf, transition, by);
        self.count(match transition {
            "T1" => "transition.T1",
            "T2" => "transition.T2",
            "T3" => "transition.T3",
            "T4" => "transition.T4",
            "T5" => "transition.T5",
            "T6" => "transition.T6",
            "T7" => "transition.T7",
            "T8" => "transition.T8",
            _ => "transition.T9",
        });
        let stores: Vec<StoreId> = conf.members.iter().map(|member| member.store).collect();
        for store in stores {
            self.tell(store, Input::Conf(conf.clone()));
        }
        for client in 0..self.clients.len() {
            self.tell_client(client);
        }
    }

    // -------------------------------------------------------------------------------- disks
    // -------

    fn disk_nanos(&mut self, index: usize, op: &DiskOp) -> u64 {
        let mean = self.options.disk_us * MICRO * self.stores[index].disk_factor;
        let mean = match op {
            DiskOp::Read { .. } | DiskOp::Write { .. } => mean,
            DiskOp::Flush => mean * 2,
        };
        self.stores[index].stuck.take().unwrap_or(0) + self.random.around(mean)
    }

    fn disk_done(&mut self, id: StoreId, life: Incarnation, ticket: u64) {
        if !self.runs(id, Some(life)) {
            return;
        }
        let index = id as usize - 1;
        let fate = self.disk_fate(index, ticket);
        let store = &mut self.stores[index];
        if let Some(done) = store.disk.complete(ticket, fate, &mut self.random) {
            self.trace.mark(self.now, id, ticket);
            let before = self.relocated(index);
            self.input(index, Input::Disk(done));
            (before..self.relocated(index)).for_each(|_| self.count("relocated"));
        }
    }

    /// Slots that a store has moved in this life.
    fn relocated(&self, index: usize) -> u64 {
        let process = self.stores[index].process.as_ref();
        process.and_then(Process::counters).map_or(0, |counters| counters.slots_relocated)
    }

    fn write_fate(&mut self, index: usize, ticket: u64) -> Fate {
        let (drawn, chance) = (self.random.below(10_000), self.options.eio_write);
        if drawn < chance && self.has_other_copy(index) {
            self.count("fault.eio_write");
            return Fate::Failed;
        }
        let store = &self.stores[index];
        let process = store.process.as_ref().filter(|process| process.is_up());
        let is_taken = process
            .zip(store.disk.id(ticket))
            .is_some_and(|(process, id)| process.takes_write_error(id));
        if drawn < chance * ALONE_FACTOR && is_taken && !self.has_other_copy(index) {
            self.count("fault.eio_write_alone");
            return Fate::Failed;
        }
        Fate::Good
    }

    fn disk_fate(&mut self, index: usize, ticket: u64) -> Fate {
        if self.phase != Phase::Safety {
            return Fate::Good;
        }
        let disk = &self.stores[index].disk;
        let (is_read, is_write) = (disk.is_read(ticket), disk.is_write(ticket));
        // Recovery takes a block that it cannot read for lost, so this is damage like a failed
        // write.
        let is_recovering = !self.stores[index].process.as_ref().is_some_and(Process::is_up);
        let may_fail = !is_recovering || self.has_other_copy(index);
        if is_read == Some(true) && may_fail && self.random.chance(self.options.eio_read) {
            self.count("fault.eio_read");
            self.stores[index].has_failed_reads = true;
            return Fate::Failed;
        }
        if is_read == Some(true) && may_fail && self.random.chance(self.options.bit_flip) {
            self.count("fault.bit_flip");
            return Fate::Flipped;
        }
        if is_write == Some(true) && self.options.eio_write > 0 {
            return self.write_fate(index, ticket);
        }
        Fate::Good
    }
}

/// How much likelier a write fails where nobody else has its content, which is rare.
const ALONE_FACTOR: u64 = 10;

/// The process that an event concerns: it must run for the event to happen.
fn process_of(what: &What, conns: &BTreeMap<u64, Conn>) -> Option<StoreId> {
    match what {
        What::Disk(store, ..) | What::Timer(store, _) | What::Agent(store, _) => Some(*store),
        What::Arrive(store, ..) => Some(*store),
        What::ToServer(conn, _) | What::ServerClosed(conn) => {
            conns.get(conn).map(|conn| conn.store)
        }
        What::Status(_)
        | What::Proposal(..)
        | What::Fetch(..)
        | What::ConductorTick
        | What::ConductorBack
        | What::Connect(_)
        | What::ToClient(..)
        | What::ClientClosed(_)
        | What::ClientTimer(_)
        | What::Ask(_)
        | What::ClientConf(..)
        | What::Boot(_)
        | What::Crash(..)
        | What::Resume(..)
        | What::DiskRecovers(_)
        | What::Flap(..)
        | What::Ambush(..)
        | What::Decide(..)
        | What::Heal
        | What::Nemesis(_)
        | What::Phase => None,
    }
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Out => "out",
        Role::Learner => "learner",
        Role::Secondary => "secondary",
        Role::Settling => "settling",
        Role::Active => "active",
        Role::Suspended => "suspended",
        Role::Leaving => "leaving",
        Role::Fenced => "fenced",
    }
}

/// How the network is while faults happen.
pub(crate) fn quality(options: &Options) -> Quality {
    Quality {
        delay_us: options.delay_us,
        drop: options.drop,
        duplicate: options.duplicate,
        slow: options.slow_message,
        reorders: options.reorder > 0,
    }
}

fn first_conf(options: &Options, members: &[Member], shard: u64) -> ShardConf {
    let rf = options.rf as usize;
    let chosen: Vec<Member> =
        (0..rf).map(|n| members[(shard as usize + n) % members.len()]).collect();
    let primary = chosen[0].copy;
    let counts = (options.rf as u8, options.min_write as u8);
    ShardConf::first(shard_id(shard as u32), counts, primary, chosen, (1, 1)).expect("sound")
}

fn copy_of(store: StoreId) -> CopyId {
    CopyId::try_from(store - 1).expect("few stores")
}

fn member_of(store: &Store, incarnation: Incarnation) -> Member {
    let copy = copy_of(store.id);
    Member {
        copy,
        store: store.id,
        incarnation,
        disk: [copy + 1; 16],
        format_uuid: [0x40 + copy; 16],
    }
}

fn make_store(
    id: StoreId,
    options: &Options,
    pool: &Pool,
    random: &mut Random,
) -> Result<Store, String> {
    let is_volatile = options.plp == 0;
    let blocks = u32::try_from(options.regions * client::REGION_BLOCKS).expect("small shards");
    let slots = options.shards * u64::from(blocks / lane::SLOT_BLOCKS) + SLOTS_EXTRA;
    let journal_bytes = options.journal_pages * BLOCK_BYTES as u64;
    let size = (4 << 20) + journal_bytes + slots * (64 << 10);
    let durability = if is_volatile { Durability::Volatile } else { Durability::Plp };
    let atomic_bytes = if options.atomic_blocks > 0 { 4096 } else { 512 };
    let copy = copy_of(id);
    let plan = format_disk(&FormatRequest {
        size,
        cluster_id: client::CLUSTER,
        disk_uuid: [copy + 1; 16],
        format_uuid: [0x40 + copy; 16],
        lane_uuids: vec![[0x80 + copy; 16]],
        journal_bytes: Some(journal_bytes),
        durability,
        durability_override: false,
        atomic_bytes,
        sparse: false,
    })
    .map_err(|problem| problem.to_string())?;
    let mut disk = Disk::new(size, is_volatile, pool.clone());
    for (offset, bytes) in plan.structures.iter().chain(&plan.headers) {
        disk.poke(*offset, bytes);
    }
    let DiskHeader { lanes, .. } = plan.header;
    let mount = MountParameters {
        entry: lanes[0].clone(),
        nonce: random.number(),
        incarnation: id,
        durability,
        atomic_bytes,
        merge_always: true,
        mutant: lane::Mutant::None,
    };
    let replicas: Vec<(ReplicaId, u32)> = (0..options.shards as u32)
        .map(|shard| (ReplicaId { shard: shard_id(shard), copy }, blocks))
        .collect();
    create_replicas(&mut disk, &mount, pool, &replicas, random)?;
    let error = i64::try_from(options.clock_permille).expect("at most a hundred");
    let clock_permille = match random.below(3) {
        0 => error,
        1 => -error,
        _ => 0,
    };
    Ok(Store {
        id,
        disk,
        mount,
        process: None,
        incarnation: 0,
        paused: None,
        disk_factor: 1,
        stuck: None,
        storm: 0,
        lost_until: 0,
        has_failed_reads: false,
        clock_offset: CLOCK_START + random.below(CLOCK_START),
        clock_permille,
        timer_at: None,
        is_dirty: false,
    })
}
