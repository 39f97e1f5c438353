//! A store node's data side: lanes, the replicas in them, and connections with clients and stores.
//!
//! One reactor thread (`app`) runs all lanes of the store and its listener; each replica has its
//! machine (`shard::replica`). A client's connection begins with HELLO and a ticket that the
//! cluster key has signed; a store's with a proof of that key (`identity`), and `links` are those
//! that this store begins. Heartbeats have a thread of their own (`heart`). A client's request goes
//! to the shard's machine, from there to the lane and the other replicas, and the reply leaves when
//! it is committed. The control plane speaks through `StoreNode`: commands go in through the
//! reactor's queue, results come out of a queue with an eventfd. Nothing here calls Python.
//!
//! **Path slots.** A session's requests of one slot are known by (session, slot, generation) also
//! after their connection has ended; FENCE_PATH is answered when the last of them is over, with the
//! outcome of those that changed something, so nothing of a fenced slot takes effect afterwards.

mod app;
mod conductor;
mod heart;
mod hops;
mod identity;
mod links;
#[cfg(test)]
mod tests;

use crate::disk::{self, DiskProblem, OpenDisk};
use app::{Command, HostedDisk, Outlets, StoreApp};
use conductor::Conductor;
use crossbeam_channel::{Receiver, bounded, unbounded};
use heart::{HeartApp, HeartCommand, Shared};
use identity::Identity;
use lane::lane::Counters;
use lane::recover::RecoveryReport;
use proto::{Pool, ReplicaId, ShardId, Status};
use runtime::clock;
use runtime::engine::{self, DiskEngine, EngineChoice};
use runtime::reactor::{self, DiskLatency, Handle, Options};
use runtime::wake::Wake;
use shard::conf::transition::Transition;
use shard::conf::{CopyId, ShardConf};
use shard::heartbeat::{Heartbeats, Timing};
use shard::mutant::Mutant;
use shard::replica::{DamageFacts, ResyncFacts, Role, Stored, VerifyReport};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

pub use app::verify_ticket;
pub use conductor::Followed;
pub use hops::{Hop, Hops};
pub use links::PeerAddress;

/// Free buffers that a store keeps per size class.
const POOL_BYTES: usize = 32 << 20;
/// Commands of the control plane that may wait.
const COMMANDS_MAX: usize = 4096;
/// Operations that one engine has outstanding.
const ENGINE_DEPTH: u32 = 256;

/// One disk of the store's configuration.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// File or device.
    pub path: PathBuf,
    /// Engine to use.
    pub engine: EngineChoice,
    /// Why it must not be opened, when somebody who looked at it knows that already.
    pub failure: Option<String>,
}

/// What a store is started with.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Its id.
    pub store_id: u64,
    /// Of this process.
    pub incarnation: u64,
    /// The cluster.
    pub cluster_id: [u8; 16],
    /// Key of tickets.
    pub cluster_key: Vec<u8>,
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Its disks.
    pub disks: Vec<DiskConfig>,
}

/// One replica, as the control plane sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaFacts {
    /// Which replica.
    pub replica: ReplicaId,
    /// Its size in blocks.
    pub blocks: u32,
    /// Index of its disk.
    pub disk: usize,
    /// Index of its lane in the store.
    pub lane: usize,
    /// The configuration that it follows, once it has one.
    pub conf: Option<ShardConf>,
    /// Epoch below which it refuses everything.
    pub promised: u64,
    /// Everything committed up to here is in it.
    pub complete: u64,
    /// Highest seq of anything in it. One that was being made equal has parts above `complete`.
    pub applied: u64,
    /// What it is; `None` while its machine does not run.
    pub role: Option<Role>,
    /// As primary: the learners that it makes equal.
    pub resyncs: Vec<ResyncFacts>,
    /// As primary: regions compared of a verification under way, and of how many.
    pub verifying: Option<(u32, u32)>,
    /// Blocks that are known to be unreadable here.
    pub damaged: DamageFacts,
    /// Blocks that were found so in this life, mended or not.
    pub damage_found: u64,
    /// As primary: blocks of which no copy is left that can be read.
    pub lost: DamageFacts,
    /// Commit watermark.
    pub commit: u64,
    /// Bytes of the slots that it uses.
    pub used_bytes: u64,
}

/// One disk, as the control plane sees it.
#[derive(Clone, Debug)]
pub struct DiskFacts {
    /// Its identity, as text.
    pub uuid: String,
    /// Where it is.
    pub path: PathBuf,
    /// Which engine serves it.
    pub engine: &'static str,
    /// Why that engine.
    pub engine_reason: String,
    /// `plp` or `volatile`.
    pub durability: lane::format::Durability,
    /// Why.
    pub durability_reason: String,
    /// Why it stopped, if it did.
    pub failure: Option<String>,
    /// Age of its oldest operation; 0: none is under way.
    pub oldest_io_nanos: u64,
    /// What its operations took that are over.
    pub latency: DiskLatency,
    /// Bytes of all slots, and of those that clients may still take.
    pub bytes: (u64, u64),
    /// Counters of its lanes.
    pub counters: Vec<Counters>,
    /// What recovery found on its lanes.
    pub reports: Vec<RecoveryReport>,
}

impl DiskFacts {
    /// Of a disk that is served.
    fn of(path: PathBuf, disk: &OpenDisk) -> DiskFacts {
        DiskFacts {
            uuid: disk::hex(&disk.header.disk_uuid),
            durability: disk.durability,
            durability_reason: disk.file.promise().reason.clone(),
            failure: None,
            ..DiskFacts::of_failed(path, String::new())
        }
    }

    /// Of a disk that could not be opened: nothing is known of it but where it should be.
    fn of_failed(path: PathBuf, failure: String) -> DiskFacts {
        DiskFacts {
            uuid: String::new(),
            path,
            engine: "none",
            engine_reason: String::new(),
            durability: lane::format::Durability::Volatile,
            durability_reason: String::new(),
            failure: Some(failure),
            oldest_io_nanos: 0,
            latency: DiskLatency::default(),
            bytes: (0, 0),
            counters: Vec::new(),
            reports: Vec::new(),
        }
    }
}

/// A disk whose replicas can be run: what each keeps beside its data has the present format.
fn with_readable_replicas(disk: OpenDisk) -> Result<OpenDisk, String> {
    for lane in &disk.lanes {
        for held in lane.tables().shards.iter().flatten() {
            Stored::decode(&held.conf).map_err(|problem| {
                let (path, shard) = (disk.file.path().display(), held.replica.shard);
                format!("{path}: the replica of shard {shard} cannot be read: {problem}")
            })?;
        }
    }
    Ok(disk)
}

/// A snapshot of the store.
#[derive(Clone, Debug)]
pub struct StoreFacts {
    /// Its replicas.
    pub replicas: Vec<ReplicaFacts>,
    /// Its disks.
    pub disks: Vec<DiskFacts>,
    /// Connections that have said HELLO.
    pub sessions: usize,
    /// Where the time of requests goes.
    pub hops: Hops,
    /// Damaged blocks that primaries here have written again since the start.
    pub blocks_mended: u64,
}

/// What the control plane asks; the answer is an event with the same id.
#[derive(Debug)]
pub enum ControlOp {
    /// Make a replica on the disk named, on its lane with the most room.
    Create {
        /// Identity of the disk.
        disk_uuid: String,
        /// Which replica.
        replica: ReplicaId,
        /// Its size in blocks.
        blocks: u32,
        /// Its first configuration.
        conf: ShardConf,
    },
    /// Forget a replica.
    Delete(ShardId),
    /// Let a replica grow.
    Resize(ShardId, u32),
    /// Follow a newer configuration.
    SetConf(ShardConf),
    /// As primary, compare all in-sync replicas; answered by `StoreEvent::Verified`. True: write
    /// damaged blocks again wherever a good copy exists.
    Verify(ShardId, bool),
    /// As primary, give the reign to this member of the ISR (T5) as soon as what is under way has
    /// ended. Done when it was passed on: what became of it is seen in the configurations.
    Transfer(ShardId, CopyId),
}

/// What the store tells the control plane.
#[derive(Debug)]
pub enum StoreEvent {
    /// A command is done.
    Done {
        /// Its id.
        request_id: u64,
    },
    /// A command failed.
    Failed {
        /// Its id.
        request_id: u64,
        /// Code for programs.
        status: Status,
        /// Text for people.
        message: String,
    },
    /// A verification is over.
    Verified {
        /// The command's id.
        request_id: u64,
        /// What was found.
        report: VerifyReport,
    },
    /// A replica asks for a transition of its shard's configuration.
    Proposal {
        /// Its shard.
        shard: ShardId,
        /// Epoch of the configuration that is to change.
        epoch: u64,
        /// How.
        transition: Transition,
    },
    /// A replica asks for a newer configuration.
    FetchConf {
        /// Its shard.
        shard: ShardId,
        /// Epoch that it knows.
        newer_than: u64,
    },
    /// A disk has stopped.
    DiskFailed {
        /// Which one.
        disk: usize,
        /// Why.
        message: String,
    },
}

/// Why a store cannot start. A disk is no reason (`OpenStore`).
#[derive(Debug, thiserror::Error)]
pub enum StoreProblem {
    /// The operating system did not give what a store needs.
    #[error(transparent)]
    System(#[from] DiskProblem),
    /// The listener.
    #[error("cannot listen on {address}: {error}; another process holds the port, or choose 0")]
    Listen {
        /// Asked for.
        address: SocketAddr,
        /// The reason given.
        error: std::io::Error,
    },
}

/// Disks that are open and recovered, before anything is served.
///
/// A disk that cannot be opened is no reason not to serve the others: it is listed as failed, with
/// the text of what was wrong, has no lanes, and its replicas are not there.
pub struct OpenStore {
    config: StoreConfig,
    disks: Vec<Result<OpenDisk, String>>,
    pool: Pool,
}

impl OpenStore {
    /// Open and recover all disks.
    #[must_use]
    pub fn open(config: StoreConfig) -> OpenStore {
        let pool = Pool::new(POOL_BYTES);
        let open = |disk: &DiskConfig| match &disk.failure {
            Some(failure) => Err(failure.clone()),
            None => disk::open(&disk.path, &config.cluster_id, config.incarnation, &pool)
                .map_err(|problem| problem.to_string())
                .and_then(with_readable_replicas),
        };
        let disks = config.disks.iter().map(open).collect();
        OpenStore { config, disks, pool }
    }

    /// Start serving.
    pub fn start(self) -> Result<StoreNode, StoreProblem> {
        self.start_with(heart::Limits::default(), |engine| engine)
    }

    /// The same; `wrap` may put something between a lane and its engine.
    fn start_with(
        self,
        limits: heart::Limits,
        mut wrap: impl FnMut(Box<dyn DiskEngine>) -> Box<dyn DiskEngine>,
    ) -> Result<StoreNode, StoreProblem> {
        let OpenStore { config, disks, pool } = self;
        let (mut engines, mut hosted): (Vec<Box<dyn DiskEngine>>, Vec<HostedDisk>) =
            (Vec::new(), Vec::new());
        let mut served = Vec::new();
        for (disk, chosen) in disks.into_iter().zip(&config.disks) {
            let with_engines = disk.and_then(|disk| {
                let engines = disk.lanes.iter().map(|_| {
                    engine::open(chosen.engine, &disk.file, &pool, ENGINE_DEPTH)
                        .map_err(|problem| DiskProblem::from(problem).to_string())
                });
                engines.collect::<Result<Vec<_>, _>>().map(|engines| (disk, engines))
            });
            let first = engines.len();
            let facts = match with_engines {
                Err(failure) => DiskFacts::of_failed(chosen.path.clone(), failure),
                Ok((disk, opened)) => {
                    let mut facts = DiskFacts::of(chosen.path.clone(), &disk);
                    for (engine, probe) in opened {
                        facts.engine = engine.name();
                        facts.engine_reason = probe.reasons.join("; ");
                        engines.push(wrap(engine));
                    }
                    served.push(disk);
                    facts
                }
            };
            // What failed before the start is told with the first look at the disks.
            let is_reported = facts.failure.is_some();
            hosted.push(HostedDisk { facts, lanes: first..engines.len(), is_reported });
        }
        let wake = Arc::new(Wake::new().map_err(|source| {
            DiskProblem::from(runtime::RuntimeError::SystemFailed {
                action: "make an eventfd",
                source,
            })
        })?);
        // Bounded by the commands: each brings at most one event, each disk at most one more.
        let (events, event_queue) = unbounded();
        let (listening, bound) = bounded(1);
        let options = Options {
            name: format!("store-{}", config.store_id),
            command_capacity: COMMANDS_MAX,
            spin: Duration::ZERO,
            pool: pool.clone(),
        };
        let address = config.listen;
        let identity = Identity {
            store: config.store_id,
            incarnation: config.incarnation,
            cluster_id: config.cluster_id,
            cluster_key: config.cluster_key.clone(),
        };
        let booted = clock::now();
        let timing = Timing::default();
        let machine =
            Heartbeats::new(config.store_id, config.incarnation, booted, timing, Mutant::None);
        let leases = Shared::new(machine);
        // Each thread needs the other's handle: the heartbeat thread starts when the data thread's
        // is there, and its own waits in a channel until then.
        let (to_heart, heart_handle) = bounded::<Handle<HeartCommand>>(1);
        let (app_identity, app_leases) = (identity.clone(), leases.clone());
        let outlet_wake = Arc::clone(&wake);
        let heart_pool = pool.clone();
        let heart_name = format!("heart-{}", config.store_id);
        let make = move || {
            let heart = heart_handle.recv().expect("the starter sends it or ends the process");
            let outlets = Outlets {
                events,
                wake: outlet_wake,
                listening,
                identity: app_identity,
                booted,
                leases: app_leases,
                heart,
            };
            StoreApp::new(config, served, hosted, outlets, pool)
        };
        let running = reactor::spawn(options, engines, make).map_err(DiskProblem::from)?;
        let data = running.handle.clone();
        let heart_options = Options {
            name: heart_name,
            command_capacity: COMMANDS_MAX,
            spin: Duration::ZERO,
            pool: heart_pool,
        };
        let conductor = Conductor::default();
        let heart_conductor = conductor.clone();
        let make_heart = move || HeartApp::new(leases, heart_conductor, identity, data, limits);
        let heart =
            reactor::spawn(heart_options, Vec::new(), make_heart).map_err(DiskProblem::from)?;
        let _ = to_heart.send(heart.handle.clone());
        let mut node = StoreNode {
            handle: running.handle,
            thread: Some(running.thread),
            heart: heart.handle,
            heart_thread: Some(heart.thread),
            conductor,
            address,
            events: event_queue,
            wake,
        };
        let bound = bound.recv().map_err(|_| std::io::Error::other("the thread has ended"));
        match bound.and_then(|result| result) {
            Ok(address) => {
                node.address = address;
                Ok(node)
            }
            Err(error) => Err(StoreProblem::Listen { address, error }),
        }
    }
}

/// A store node that serves. Commands return at once; results are events.
pub struct StoreNode {
    handle: Handle<Command>,
    thread: Option<JoinHandle<()>>,
    heart: Handle<HeartCommand>,
    heart_thread: Option<JoinHandle<()>>,
    conductor: Conductor,
    address: SocketAddr,
    events: Receiver<StoreEvent>,
    wake: Arc<Wake>,
}

impl StoreNode {
    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Readable while events may wait.
    #[must_use]
    pub fn event_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// Take all events.
    #[must_use]
    pub fn drain(&self) -> Vec<StoreEvent> {
        self.wake.clear();
        self.events.try_iter().collect()
    }

    /// Give a command; its event carries `request_id`. False: the queue is full, or it has stopped.
    #[must_use]
    pub fn control(&self, request_id: u64, op: ControlOp) -> bool {
        self.handle.try_send(Command::Control(request_id, op)).is_ok()
    }

    /// Take over where the stores of the cluster are. False: the queue is full, or it has stopped.
    #[must_use]
    pub fn set_peers(&self, peers: Vec<PeerAddress>) -> bool {
        self.handle.try_send(Command::Peers(peers)).is_ok()
    }

    /// A life of a store is over for certain. False: the queue is full, or it has stopped.
    #[must_use]
    pub fn dead(&self, store: u64, incarnation: u64) -> bool {
        self.handle.try_send(Command::Dead(store, incarnation)).is_ok()
    }

    /// The conductor that this store follows; every heartbeat says so from now on. What is older
    /// than what is known changes nothing.
    pub fn set_conductor(&self, followed: Followed) {
        self.conductor.tell(followed);
    }

    /// The newest conductor that a heartbeat of another store has named; zeros: none has.
    #[must_use]
    pub fn heard_conductor(&self) -> Followed {
        self.conductor.heard()
    }

    /// The host's file system has no more room for a disk (by its place in the store), or has
    /// again. False: the queue is full, or it has stopped.
    #[must_use]
    pub fn hold_growth(&self, disk: usize, is_held: bool) -> bool {
        self.handle.try_send(Command::HoldGrowth(disk, is_held)).is_ok()
    }

    /// Stop a disk (by its place in the store) for good: what is behind it is not what it was.
    /// False: the queue is full, or the store has stopped.
    #[must_use]
    pub fn fail_disk(&self, disk: usize, reason: String) -> bool {
        self.handle.try_send(Command::FailDisk(disk, reason)).is_ok()
    }

    /// Read runs (first block, blocks) of a replica again, to learn whether they are damaged.
    /// False: the queue is full, or it has stopped.
    #[must_use]
    pub fn check_blocks(&self, shard: ShardId, runs: Vec<(u32, u32)>) -> bool {
        self.handle.try_send(Command::CheckBlocks(shard, runs)).is_ok()
    }

    /// A snapshot; `None` when it has stopped.
    #[must_use]
    pub fn facts(&self) -> Option<StoreFacts> {
        let (sender, receiver) = bounded(1);
        self.handle.try_send(Command::Look(sender)).ok()?;
        receiver.recv().ok()
    }

    /// Close the lanes cleanly and end the thread.
    pub fn close(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let (sender, receiver) = bounded(1);
        if self.handle.try_send(Command::Close(sender)).is_ok() {
            let _ = receiver.recv();
        }
        self.handle.stop();
        let _ = thread.join();
        self.stop_heart();
    }

    fn stop_heart(&mut self) {
        self.heart.stop();
        if let Some(thread) = self.heart_thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for StoreNode {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.stop_heart();
    }
}
