//! One store process: the lane, the replicas, the heartbeats and the clients' connections, joined as
//! `node` joins them, on virtual time.
//!
//! It is a machine of machines: [`Input`] in, [`Output`] out, synchronous. It decides nothing of its
//! own; effects of one machine become events of another until nothing is left. A life begins with
//! recovery (`Mount`, one batch of disk operations after the other) and ends when the world drops it.

use crate::codec;
use crate::content::{LOST, name_of, value_of};
use lane::lane::Counters;
use lane::record::{FLAG_COPY, RangeKind};
use lane::recover::{MountResult, Mounted};
use lane::{Effects, Lane, Mount, MountParameters, MountStep, Op, Outcome, POISON_CRC, Problem};
use proto::disk::{DiskDone, DiskOp, DiskRequest, IoId};
use proto::frame::Frame;
use proto::seam::Machine;
use proto::wire::{
    Header, Hello, HelloReply, Limits, Peer, Ping, Reply, ReplyOp, Request, RequestOp, Ticket,
    VERSION, Who,
};
use proto::{BLOCK_BYTES, Epoch, Lsn, Pool, Seq, ShardId, Status, Tick, VolumeId};
use shard::client::Answer;
use shard::conf::transition::Transition;
use shard::conf::{CopyId, Incarnation, ShardConf, StoreId};
use shard::exchange::{Exchange, Finished, Turn, reply_to, turn};
use shard::heartbeat::{self, Heartbeats, Timing};
use shard::mutant::Mutant;
use shard::paths::Paths;
use shard::replica::{self, Note, Pace, Replica, View};
use std::collections::{BTreeMap, VecDeque};

/// The one volume of a world.
pub const VOLUME: VolumeId = VolumeId(7);

/// What a process is started with.
#[derive(Clone)]
pub struct Settings {
    /// Its store.
    pub store: StoreId,
    /// This life.
    pub incarnation: Incarnation,
    /// How its lane is opened.
    pub mount: MountParameters,
    /// Lease times.
    pub timing: Timing,
    /// Seeded bug.
    pub mutant: Mutant,
    /// Where its buffers come from.
    pub pool: Pool,
}

/// What the world tells a process.
#[derive(Clone, Debug)]
pub enum Input {
    /// A disk operation finished.
    Disk(DiskDone),
    /// Another store's replica asks.
    Peer {
        /// The store.
        from: StoreId,
        /// Its life, to which the answer goes.
        life: Incarnation,
        /// What it asks.
        request: Request,
    },
    /// The answer of another store's replica.
    PeerReply {
        /// The store.
        from: StoreId,
        /// What it answers.
        reply: Reply,
    },
    /// Another store's heartbeat.
    Ping {
        /// The store.
        from: StoreId,
        /// Its life, to which the answer goes.
        life: Incarnation,
        /// What it says.
        ping: Ping,
    },
    /// The answer to a heartbeat.
    Pong {
        /// The store.
        from: StoreId,
        /// What it says.
        ping: Ping,
    },
    /// The conductor tells a configuration.
    Conf(ShardConf),
    /// The conductor asks for a transfer of a shard's reign.
    Transfer {
        /// The shard.
        shard: u32,
        /// The member that it goes to.
        to: CopyId,
    },
    /// Somebody asks for a verification that repairs.
    Verify {
        /// The shard.
        shard: u32,
    },
    /// A life of another store is over.
    Dead {
        /// The store.
        store: StoreId,
        /// The life.
        incarnation: Incarnation,
    },
    /// A client's frame.
    Frame {
        /// Its connection.
        conn: u64,
        /// What came.
        frame: Frame,
        /// Position in the history of the world.
        moment: u64,
    },
    /// A client's connection has ended.
    Closed(u64),
    /// The checker looks at what the lane holds.
    Audit {
        /// Comes back.
        token: u64,
        /// Which shard.
        shard: u32,
        /// Which block of it.
        block: u32,
    },
    /// The time of `Process::wake` has come.
    Timer,
}

/// What a process wants of the world, or tells it.
#[derive(Debug)]
pub enum Output {
    /// A disk operation.
    Disk(DiskRequest),
    /// Ask another store's replica.
    Request {
        /// The store.
        to: StoreId,
        /// What.
        request: Request,
    },
    /// Answer another store's replica.
    Answer {
        /// The store.
        to: StoreId,
        /// The life that asked.
        life: Incarnation,
        /// What.
        reply: Reply,
    },
    /// A heartbeat.
    Ping {
        /// The store.
        to: StoreId,
        /// What.
        ping: Ping,
    },
    /// The answer to a heartbeat.
    Pong {
        /// The store.
        to: StoreId,
        /// The life that sent it.
        life: Incarnation,
        /// What.
        ping: Ping,
    },
    /// Send to a client.
    Frame {
        /// On which connection.
        conn: u64,
        /// What.
        reply: Reply,
    },
    /// End a client's connection.
    Close(u64),
    /// Ask the conductor for a transition.
    Propose {
        /// Of which shard.
        shard: u32,
        /// Of which configuration.
        epoch: Epoch,
        /// Which.
        transition: Transition,
    },
    /// Ask the conductor for a newer configuration.
    Fetch {
        /// Of which shard.
        shard: u32,
        /// The newest one known.
        newer_than: Epoch,
    },
    /// A replica tells what it does.
    Note {
        /// Which shard.
        shard: u32,
        /// What.
        note: Note,
    },
    /// A replica logs an operation.
    Logged {
        /// Which shard.
        shard: u32,
        /// Its place in the order.
        lsn: Lsn,
        /// First block.
        first: u32,
        /// Content.
        values: Vec<u64>,
    },
    /// A client's read was answered.
    Served {
        /// Which shard.
        shard: u32,
        /// Of the configuration that the replica follows.
        epoch: Epoch,
        /// When the read had come.
        arrived: u64,
    },
    /// What the checker asked for: the value, `None` for a mixture.
    Audited {
        /// As asked.
        token: u64,
        /// The value of the block, or why there is none.
        result: Result<Option<u64>, String>,
    },
    /// Recovery is over: it may register.
    Mounted,
    /// Recovery failed, or the lane stopped itself.
    Stopped(String),
    /// An invariant is broken.
    Violation(String),
}

/// Recovery, one batch of operations at a time.
struct Mounting {
    mount: Mount,
    results: Vec<Option<MountResult>>,
    waiting: usize,
    /// Begins when the rest of its batch is done.
    flush: Option<u64>,
}

enum Waiter {
    Replica { shard: u32, op: u32 },
    Audit(u64),
}

/// A connection that has said HELLO.
struct Conn {
    ticket: Ticket,
    /// Session, slot, generation.
    slot: (u64, u8, u64),
}

/// A client's request that a replica works on.
struct Pending {
    conn: u64,
    exchange: Exchange,
    arrived: u64,
}

enum Work {
    Replica(u32, replica::Event),
    Beats(heartbeat::Event),
}

struct Up {
    lane: Lane,
    replicas: BTreeMap<u32, Replica>,
    beats: Heartbeats,
    pace: Pace,
    paths: Paths<u64>,
    conns: BTreeMap<u64, Conn>,
    waiters: BTreeMap<u64, Waiter>,
    clients: BTreeMap<u64, Pending>,
    /// Who waits for an answer: of replicas, of heartbeats.
    peers: BTreeMap<u64, (StoreId, Incarnation)>,
    pings: BTreeMap<u64, (StoreId, Incarnation)>,
    next_token: u64,
    work: VecDeque<Work>,
    lane_wake: Option<Tick>,
    beats_wake: Option<Tick>,
    replica_wakes: BTreeMap<u32, Tick>,
    /// Openings that were fenced and answered: I12.
    fenced: BTreeMap<(u64, u8), u64>,
    has_told_failure: bool,
    scratch: Effects,
}

enum Stage {
    Mounting(Box<Mounting>),
    Up(Box<Up>),
    Stopped,
}

/// One life of a store.
pub struct Process {
    settings: Settings,
    started: Tick,
    stage: Stage,
}

impl Process {
    /// Start: recovery begins.
    #[must_use]
    pub fn start(settings: Settings, now: Tick, out: &mut Vec<Output>) -> Process {
        let mount = Mount::new(settings.mount.clone(), settings.pool.clone());
        let mut process = Process { settings, started: now, stage: Stage::Stopped };
        match mount {
            Ok(mount) => {
                let mounting = Mounting { mount, results: Vec::new(), waiting: 0, flush: None };
                process.mount(now, mounting, out);
            }
            Err(fault) => out.push(Output::Stopped(fault.to_string())),
        }
        process
    }

    /// This life.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.settings.incarnation
    }

    /// Whether recovery is over and nothing has stopped it.
    #[must_use]
    pub fn is_up(&self) -> bool {
        matches!(self.stage, Stage::Up(_))
    }

    /// Whether recovery failed or its lane has stopped: only another life helps.
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        match &self.stage {
            Stage::Up(up) => up.lane.failure().is_some(),
            Stage::Mounting(_) => false,
            Stage::Stopped => true,
        }
    }

    /// Its lane, once it is up.
    #[must_use]
    pub fn lane(&self) -> Option<&Lane> {
        match &self.stage {
            Stage::Up(up) => Some(&up.lane),
            Stage::Mounting(_) | Stage::Stopped => None,
        }
    }

    /// Whether this write of its disk may fail although nobody else has its content: the lane finds
    /// another slot for it.
    #[must_use]
    pub fn takes_write_error(&self, id: IoId) -> bool {
        self.lane().is_some_and(|lane| lane.takes_write_error(id))
    }

    /// What its lane has done, once it is up.
    #[must_use]
    pub fn counters(&self) -> Option<Counters> {
        self.lane().map(Lane::counters)
    }

    /// Its replica of a shard, once it is up.
    #[must_use]
    pub fn replica(&self, shard: u32) -> Option<&Replica> {
        match &self.stage {
            Stage::Up(up) => up.replicas.get(&shard),
            Stage::Mounting(_) | Stage::Stopped => None,
        }
    }

    /// What its agent reports of a shard: complete_lsn and epoch.
    #[must_use]
    pub fn report(&self, shard: u32) -> Option<(Seq, Epoch)> {
        let Stage::Up(up) = &self.stage else { return None };
        let replica = up.replicas.get(&shard)?;
        let view = View::of(&up.lane, &up.beats, &up.pace);
        let epoch = replica.conf().map_or(Epoch(0), |conf| conf.epoch);
        Some((replica.complete(&view), epoch))
    }

    /// When to send `Input::Timer`.
    #[must_use]
    pub fn wake(&self) -> Option<Tick> {
        let Stage::Up(up) = &self.stage else { return None };
        let replicas = up.replica_wakes.values().min().copied();
        [up.lane_wake, up.beats_wake, replicas].into_iter().flatten().min()
    }

    /// Handle one input. `turn` follows when the inputs of this instant are over.
    pub fn step(&mut self, now: Tick, input: Input, out: &mut Vec<Output>) {
        match &mut self.stage {
            Stage::Up(up) => up.step(&self.settings, now, input, out),
            Stage::Mounting(_) => self.step_mounting(now, input, out),
            Stage::Stopped => {}
        }
    }

    /// The inputs of this instant are over.
    pub fn turn(&mut self, now: Tick, out: &mut Vec<Output>) {
        if let Stage::Up(up) = &mut self.stage {
            up.turn(now, out);
        }
    }

    fn step_mounting(&mut self, now: Tick, input: Input, out: &mut Vec<Output>) {
        // It does not listen yet: whatever else comes meets a closed port.
        let Input::Disk(done) = input else { return };
        let Stage::Mounting(mut mounting) = std::mem::replace(&mut self.stage, Stage::Stopped)
        else {
            unreachable!("only called while it is mounting")
        };
        let index = usize::try_from(done.id.0).expect("an index of the batch");
        assert!(mounting.results[index].replace(done.result).is_none(), "completes once");
        mounting.waiting -= 1;
        if mounting.waiting > 0 {
            self.stage = Stage::Mounting(mounting);
        } else if let Some(id) = mounting.flush.take() {
            mounting.waiting = 1;
            out.push(Output::Disk(DiskRequest { id: IoId(id), op: DiskOp::Flush }));
            self.stage = Stage::Mounting(mounting);
        } else {
            self.mount(now, *mounting, out);
        }
    }

    fn mount(&mut self, now: Tick, mut mounting: Mounting, out: &mut Vec<Output>) {
        let results = mounting.results.drain(..).map(|result| result.expect("all are done"));
        let results: Vec<MountResult> = results.collect();
        match mounting.mount.next(results) {
            MountStep::Io(batch) => {
                for (id, op) in (0..).zip(batch) {
                    mounting.results.push(None);
                    if matches!(op, DiskOp::Flush) && mounting.waiting > 0 {
                        mounting.flush = Some(id);
                        continue;
                    }
                    mounting.waiting += 1;
                    out.push(Output::Disk(DiskRequest { id: IoId(id), op }));
                }
                self.stage = Stage::Mounting(Box::new(mounting));
            }
            MountStep::Mounted(mounted) => match Up::new(&self.settings, self.started, *mounted) {
                Ok(mut up) => {
                    out.push(Output::Mounted);
                    up.begin(now, out);
                    self.stage = Stage::Up(Box::new(up));
                }
                Err(problem) => out.push(Output::Stopped(problem)),
            },
            MountStep::Faulted(fault) => out.push(Output::Stopped(fault.to_string())),
        }
    }
}

impl Up {
    fn new(settings: &Settings, started: Tick, mounted: Mounted) -> Result<Up, String> {
        let Settings { store, incarnation, timing, mutant, pool, .. } = settings.clone();
        let lane = Lane::open(mounted, pool.clone());
        let beats = Heartbeats::new(store, incarnation, started, timing, mutant);
        let pace = Pace::default();
        let mut replicas = BTreeMap::new();
        for (shard_ix, shard) in (0..).zip(&lane.tables().shards) {
            let Some(shard) = shard else { continue };
            let options = replica::Options {
                shard_ix,
                store,
                incarnation,
                booted: started,
                timing,
                pool: pool.clone(),
                mutant,
            };
            let view = View::of(&lane, &beats, &pace);
            replicas.insert(shard.replica.shard.index, Replica::open(options, &view)?);
        }
        Ok(Up {
            lane,
            replicas,
            beats,
            pace,
            paths: Paths::with_mutant(mutant),
            conns: BTreeMap::new(),
            waiters: BTreeMap::new(),
            clients: BTreeMap::new(),
            peers: BTreeMap::new(),
            pings: BTreeMap::new(),
            next_token: 1,
            work: VecDeque::new(),
            lane_wake: None,
            beats_wake: None,
            replica_wakes: BTreeMap::new(),
            fenced: BTreeMap::new(),
            has_told_failure: false,
            scratch: Effects::default(),
        })
    }

    fn begin(&mut self, now: Tick, out: &mut Vec<Output>) {
        self.work.push_back(Work::Beats(heartbeat::Event::Tick));
        let shards: Vec<u32> = self.replicas.keys().copied().collect();
        for shard in shards {
            self.work.push_back(Work::Replica(shard, replica::Event::Tick));
        }
        self.run(now, out);
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    fn step(&mut self, settings: &Settings, now: Tick, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Disk(done) => self.lane_step(now, lane::Event::Disk(done), out),
            Input::Peer { from, life, request } => {
                let token = self.token();
                self.peers.insert(token, (from, life));
                let shard = request.shard.index;
                self.work
                    .push_back(Work::Replica(shard, replica::Event::Peer { from, token, request }));
            }
            Input::PeerReply { from, reply } => {
                let shard = reply.shard.index;
                let event = replica::Event::PeerReply { from, reply };
                self.work.push_back(Work::Replica(shard, event));
            }
            Input::Ping { from, life, ping } => {
                let token = self.token();
                self.pings.insert(token, (from, life));
                self.work.push_back(Work::Beats(heartbeat::Event::Ping { from, token, ping }));
            }
            Input::Pong { from, ping } => {
                self.work.push_back(Work::Beats(heartbeat::Event::Pong { from, ping }));
            }
            Input::Conf(conf) => {
                let shard = conf.shard.index;
                self.work.push_back(Work::Replica(shard, replica::Event::Conf(conf)));
            }
            Input::Dead { store, incarnation } => {
                self.work.push_back(Work::Beats(heartbeat::Event::Dead { store, incarnation }));
                for &shard in self.replicas.keys() {
                    let event = replica::Event::Dead { store, incarnation };
                    self.work.push_back(Work::Replica(shard, event));
                }
            }
            Input::Frame { conn, frame, moment } => {
                self.frame(settings, (conn, moment), frame, out);
            }
            Input::Closed(conn) => {
                self.conns.remove(&conn);
                self.paths.closed(conn);
            }
            Input::Transfer { shard, to } => {
                self.work.push_back(Work::Replica(shard, replica::Event::Transfer { to }));
                self.run(now, out);
            }
            Input::Verify { shard } => {
                let event = replica::Event::Verify { token: 0, is_repairing: true };
                self.work.push_back(Work::Replica(shard, event));
            }
            Input::Audit { token, shard, block } => self.audit(now, token, shard, block, out),
            Input::Timer => self.timer(now),
        }
        self.run(now, out);
    }

    fn timer(&mut self, now: Tick) {
        if self.lane_wake.is_some_and(|wake| wake <= now) {
            // The turn at the end of this instant is what it asked for.
            self.lane_wake = None;
        }
        if self.beats_wake.is_some_and(|wake| wake <= now) {
            self.beats_wake = None;
            self.work.push_back(Work::Beats(heartbeat::Event::Tick));
        }
        let due: Vec<u32> =
            self.replica_wakes.iter().filter(|(_, at)| **at <= now).map(|(s, _)| *s).collect();
        for shard in due {
            self.replica_wakes.remove(&shard);
            self.work.push_back(Work::Replica(shard, replica::Event::Tick));
        }
    }

    /// Let the lane finish the instant; what it answers may ask it for more.
    fn turn(&mut self, now: Tick, out: &mut Vec<Output>) {
        self.lane_step(now, lane::Event::Turn, out);
        while !self.work.is_empty() {
            self.run(now, out);
            self.lane_step(now, lane::Event::Turn, out);
        }
        if let Some(reason) = self.lane.failure().filter(|_| !self.has_told_failure) {
            out.push(Output::Stopped(reason.to_owned()));
            self.has_told_failure = true;
        }
    }

    fn run(&mut self, now: Tick, out: &mut Vec<Output>) {
        while let Some(work) = self.work.pop_front() {
            match work {
                Work::Beats(event) => {
                    let mut effects = Vec::new();
                    self.beats.step(now, event, &mut effects);
                    effects.into_iter().for_each(|effect| self.beats_effect(effect, out));
                }
                Work::Replica(shard, event) => {
                    let Some(replica) = self.replicas.get_mut(&shard) else { continue };
                    let view = View::of(&self.lane, &self.beats, &self.pace);
                    let mut effects = Vec::new();
                    replica.step(now, event, &view, &mut effects);
                    for effect in effects {
                        self.replica_effect(now, shard, effect, out);
                    }
                }
            }
        }
    }

    fn beats_effect(&mut self, effect: heartbeat::Effect, out: &mut Vec<Output>) {
        match effect {
            heartbeat::Effect::Send { to, ping } => out.push(Output::Ping { to, ping }),
            heartbeat::Effect::Answer { token, ping } => {
                let (to, life) = self.pings.remove(&token).expect("one answer per heartbeat");
                out.push(Output::Pong { to, life, ping });
            }
            heartbeat::Effect::Newer { shard, epoch } => {
                let event = replica::Event::Newer { epoch };
                self.work.push_back(Work::Replica(shard.index, event));
            }
            heartbeat::Effect::Wake(at) => {
                self.beats_wake = Some(self.beats_wake.map_or(at, |before| before.min(at)));
            }
        }
    }

    fn replica_effect(
        &mut self,
        now: Tick,
        shard: u32,
        effect: replica::Effect,
        out: &mut Vec<Output>,
    ) {
        match effect {
            replica::Effect::Lane { op, request } => {
                tell_logged(shard, &request, out);
                let token = self.token();
                self.waiters.insert(token, Waiter::Replica { shard, op });
                let request = lane::Request { token, op: request };
                self.lane_step(now, lane::Event::Request(request), out);
            }
            replica::Effect::Reply { token, result } => self.answer(shard, token, result, out),
            replica::Effect::Send { to, request } => out.push(Output::Request { to, request }),
            replica::Effect::Answer { token, reply } => match self.peers.remove(&token) {
                Some((to, life)) => out.push(Output::Answer { to, life, reply }),
                None => out.push(Output::Violation(format!(
                    "I27: shard {shard} answers a request of a replica twice: {reply:?}"
                ))),
            },
            replica::Effect::Propose { epoch, transition } => {
                out.push(Output::Propose { shard, epoch, transition });
            }
            replica::Effect::FetchConf { newer_than } => {
                out.push(Output::Fetch { shard, newer_than });
            }
            replica::Effect::Claim { reign, epoch, stores } => {
                let shard = shard_id(shard);
                let event = heartbeat::Event::Claim { shard, reign, epoch, stores };
                self.work.push_back(Work::Beats(event));
            }
            replica::Effect::Unclaim => {
                let event = heartbeat::Event::Unclaim { shard: shard_id(shard) };
                self.work.push_back(Work::Beats(event));
            }
            replica::Effect::Release => {
                let event = heartbeat::Event::Release { shard: shard_id(shard) };
                self.work.push_back(Work::Beats(event));
            }
            replica::Effect::Promise { epoch } => {
                let event = heartbeat::Event::Promise { shard: shard_id(shard), epoch };
                self.work.push_back(Work::Beats(event));
            }
            replica::Effect::Wake(at) => {
                let wake = self.replica_wakes.entry(shard).or_insert(at);
                *wake = at.min(*wake);
            }
            replica::Effect::Verified { result: Ok(report), .. }
                if !report.different.is_empty() =>
            {
                let different = report.different;
                out.push(Output::Violation(format!(
                    "I5: shard {shard} was verified and differs: (region, store) {different:?}"
                )));
            }
            // Unreadable blocks are the disk's faults; a reign that ends ends its verification.
            replica::Effect::Verified { .. } => {}
            replica::Effect::Note(note) => {
                if let replica::Note::Role { role: replica::Role::Active, .. } = note {
                    let event = replica::Event::Verify { token: 0, is_repairing: true };
                    self.work.push_back(Work::Replica(shard, event));
                }
                out.push(Output::Note { shard, note });
            }
        }
    }

    // ---------------------------------------------------------------------------------- the lane --

    fn lane_step(&mut self, now: Tick, event: lane::Event, out: &mut Vec<Output>) {
        let mut effects = std::mem::take(&mut self.scratch);
        self.lane.step(now, event, &mut effects);
        out.extend(effects.disk.drain(..).map(Output::Disk));
        if let Some(at) = effects.wake.take() {
            // A lane whose disk is slow asks for the present again and again until it answers.
            let at = at.max(now.after_millis(1));
            self.lane_wake = Some(self.lane_wake.map_or(at, |before| before.min(at)));
        }
        for reply in effects.replies.drain(..) {
            match self.waiters.remove(&reply.token).expect("exactly one reply per request") {
                Waiter::Replica { shard, op } => {
                    let event = replica::Event::Lane { op, result: reply.result };
                    self.work.push_back(Work::Replica(shard, event));
                }
                Waiter::Audit(token) => {
                    out.push(Output::Audited { token, result: audited(reply.result) });
                }
            }
        }
        self.scratch = effects;
    }

    fn audit(&mut self, now: Tick, token: u64, shard: u32, block: u32, out: &mut Vec<Output>) {
        let Some(shard_ix) = self.lane.tables().find(shard_id(shard)) else {
            let result = Err(format!("no replica of shard {shard}"));
            out.push(Output::Audited { token, result });
            return;
        };
        let op = Op::Read { shard_ix, first: block, count: 1, with_poison: true };
        let own = self.token();
        self.waiters.insert(own, Waiter::Audit(token));
        self.lane_step(now, lane::Event::Request(lane::Request { token: own, op }), out);
    }

    // ------------------------------------------------------------------------------- the clients --

    fn frame(
        &mut self,
        settings: &Settings,
        (conn, moment): (u64, u64),
        frame: Frame,
        out: &mut Vec<Output>,
    ) {
        let header = Header::parse(&frame.header).expect("a session sends right headers");
        match Request::parse(&header, frame) {
            Ok(Request { op: RequestOp::Hello(hello), .. }) => {
                self.hello(settings, conn, &header, &hello, out);
            }
            Ok(request) => self.request((conn, moment), header, request, out),
            Err(problem) => {
                let text = format!("I27: a session's own request does not parse: {problem}");
                out.push(Output::Violation(text));
            }
        }
    }

    fn hello(
        &mut self,
        settings: &Settings,
        conn: u64,
        header: &Header,
        hello: &Hello,
        out: &mut Vec<Output>,
    ) {
        let Who::Client(signed) = &hello.who else { unreachable!("sessions are clients") };
        let slot = (signed.ticket.session, hello.path.slot, hello.path.generation);
        if let Err(status) = self.paths.hello(conn, slot.0, slot.1, slot.2) {
            let reply = Reply::refuse(header, Epoch(0), status, 0);
            out.push(Output::Frame { conn, reply });
            out.push(Output::Close(conn));
            return;
        }
        self.conns.insert(conn, Conn { ticket: signed.ticket, slot });
        let peer = Peer {
            store: settings.store,
            incarnation: settings.incarnation,
            nonce: [0; 32],
            proof: [0; 32],
        };
        let reply = HelloReply {
            version: VERSION,
            features: 0,
            lanes: 1,
            limits: hello.limits.agree(Limits::DEFAULT),
            peer,
        };
        let op = ReplyOp::Hello(Box::new(reply));
        self.reply_ok(conn, header, op, out);
    }

    fn epoch(&self, shard: u32) -> Epoch {
        let conf = self.replicas.get(&shard).and_then(Replica::conf);
        conf.map_or(Epoch(0), |conf| conf.epoch)
    }

    fn send(&self, conn: u64, reply: Reply, out: &mut Vec<Output>) {
        if self.conns.contains_key(&conn) {
            out.push(Output::Frame { conn, reply });
        }
    }

    fn reply_ok(&self, conn: u64, header: &Header, op: ReplyOp, out: &mut Vec<Output>) {
        let reply = reply_to(header, self.epoch(header.shard.index), Seq(0), op);
        self.send(conn, reply, out);
    }

    fn refuse(&self, conn: u64, header: &Header, status: Status, out: &mut Vec<Output>) {
        let reply = Reply::refuse(header, self.epoch(header.shard.index), status, 0);
        self.send(conn, reply, out);
    }

    fn request(
        &mut self,
        (conn, moment): (u64, u64),
        header: Header,
        request: Request,
        out: &mut Vec<Output>,
    ) {
        let Some(&Conn { ticket, slot }) = self.conns.get(&conn) else { return };
        let token = self.token();
        let (exchange, question) = match turn(token, header, request, &ticket) {
            Turn::Reply(op) => return self.reply_ok(conn, &header, op, out),
            Turn::Refuse(status) => return self.refuse(conn, &header, status, out),
            Turn::Fence { slot, generation } => {
                let closed = self.paths.fence(conn, header, slot, generation);
                self.close(closed, out);
                return self.answer_fences(out);
            }
            Turn::Ask(exchange, question) => (exchange, question),
        };
        let is_fenced = self.fenced.get(&(slot.0, slot.1)).is_some_and(|&upto| slot.2 <= upto);
        if is_fenced {
            out.push(Output::Violation(format!(
                "I12: a request of session {}, slot {}, generation {} is taken after FENCE_PATH was \
                 answered",
                slot.0, slot.1, slot.2
            )));
        }
        let shard = header.shard.index;
        if !self.replicas.contains_key(&shard) {
            return self.refuse(conn, &header, Status::NotPrimary, out);
        }
        if !self.paths.begin(conn, &header, token) {
            return;
        }
        self.clients.insert(token, Pending { conn, exchange, arrived: moment });
        self.work.push_back(Work::Replica(shard, replica::Event::Client(question)));
    }

    fn close(&mut self, conns: Vec<u64>, out: &mut Vec<Output>) {
        for conn in conns {
            self.conns.remove(&conn);
            out.push(Output::Close(conn));
        }
    }

    fn answer(
        &mut self,
        shard: u32,
        token: u64,
        result: Result<Answer, Status>,
        out: &mut Vec<Output>,
    ) {
        let Some(pending) = self.clients.remove(&token) else {
            let text = format!("I27: shard {shard} answers request {token} of a client twice");
            out.push(Output::Violation(text));
            return;
        };
        if let Ok(Answer::Read { .. }) = result {
            let (epoch, arrived) = (self.epoch(shard), pending.arrived);
            out.push(Output::Served { shard, epoch, arrived });
        }
        let reign = self.replicas.get(&shard).map_or(Epoch(0), Replica::reign_epoch);
        let Finished { lsn, status, reply } =
            pending.exchange.finish(result, self.epoch(shard), reign);
        self.paths.finish(token, lsn, status);
        let orphaned = self.paths.orphaned();
        self.close(orphaned, out);
        self.send(pending.conn, reply, out);
        self.answer_fences(out);
    }

    fn answer_fences(&mut self, out: &mut Vec<Output>) {
        for (conn, header, outcomes) in self.paths.ready_fences() {
            self.reply_ok(conn, &header, ReplyOp::FencePath(outcomes), out);
        }
    }
}

/// The id of a shard of the one volume.
#[must_use]
pub fn shard_id(index: u32) -> ShardId {
    ShardId { volume: VOLUME, index }
}

fn audited(result: Result<Outcome, Problem>) -> Result<Option<u64>, String> {
    match result {
        Ok(Outcome::Read { crcs, .. }) if crcs[0] == POISON_CRC => Ok(Some(LOST)),
        Ok(Outcome::Read { data, .. }) => Ok(value_of(&data[0])),
        Ok(Outcome::Done | Outcome::Created { .. }) => unreachable!("a read brings data"),
        Err(problem) => Err(problem.to_string()),
    }
}

/// Tell the checker what an operation puts into its blocks. A region's copy has the region's lsn,
/// not one of its own.
fn tell_logged(shard: u32, request: &Op, out: &mut Vec<Output>) {
    match request {
        Op::Write { lsn, first, data, flags, .. } if flags & FLAG_COPY == 0 => {
            let blocks = data.iter().flat_map(|buf| buf.chunks_exact(BLOCK_BYTES));
            let values = blocks.map(name_of).collect();
            out.push(Output::Logged { shard, lsn: *lsn, first: *first, values });
        }
        Op::Range { lsn, first, count, kind, flags, .. } if flags & FLAG_COPY == 0 => {
            let value = if *kind == RangeKind::Poison { LOST } else { 0 };
            let values = vec![value; *count as usize];
            out.push(Output::Logged { shard, lsn: *lsn, first: *first, values });
        }
        Op::Write { .. }
        | Op::Range { .. }
        | Op::Read { .. }
        | Op::Create { .. }
        | Op::Delete { .. }
        | Op::Resize { .. }
        | Op::Conf { .. }
        | Op::Commit { .. }
        | Op::Region { .. }
        | Op::Checkpoint
        | Op::Close => {}
    }
}

/// A request or reply of a replica, through bytes and back: what came out is what went in.
pub fn through_bytes(request: &Request, pool: &Pool) -> Request {
    let (header, frame) = codec::frame_of(request.encode(), pool);
    Request::parse(&header, frame).expect("our own encoding")
}
