//! The client end of a volume: block requests in, PFW requests to the shards' primaries out.
//!
//! **What it owns.** All that a client keeps of one volume: its configuration as last told, the
//! connections to the stores that serve its shards, every request that has no reply yet. Gateways
//! and volume clients drive it; the simulator drives the same type. It has no clock, socket or
//! thread: [`Event`]s in, [`Effect`]s out, and a time to be woken at.
//!
//! **What it guarantees.** Every [`Event::Submit`] gets exactly one [`Effect::Reply`]. Requests are
//! cut at shard edges and message limits; one CRC32C per started block is computed on the way out
//! and verified on the way in. A failure that is not the request's own fault (stale configuration,
//! wrong store, a queue that is full, a lost connection) is not passed on: the piece is parked and
//! sent again after a new configuration, a reconnect or a pause of 10 ms to 1 s, until `io_timeout`,
//! which is normally for ever, as with a disk. What the caller did wrong, and what no replica can
//! read, is passed on at once. A writer whose volume was taken over is told so after [`FENCED_MS`]
//! (`standing`).
//!
//! **Ghost writes** (replication.md, section 6). A write whose connection broke may still be on its
//! way to the primary. Sent again over another connection it could be done, acknowledged and
//! overwritten, and *then* the ghost could come. So "before moving a request from slot A to B the
//! client sends FENCE_PATH(session, slot A, generation) on B"; only after its answer the rest is
//! sent again, and a request whose outcome the answer tells is not sent at all. "Slots end with the
//! reign": if the serving process is another one, with another incarnation, its predecessor's
//! connections died with it (or its requests carry an epoch that is refused), and nothing is
//! fenced. The same holds after a new attach, which drained the requests of the attaches before it.
//! Reads have no effect and just move.
//!
//! **FLUSH** is answered here. "FLUSH is a barrier over completed writes. One durability mode: an
//! acknowledged write is on stable media" (replication.md, section 3), so when a FLUSH comes in, all
//! that it must cover has been made durable by the stores that acknowledged it.
//!
//! **What it costs.** No copy of data, one CRC pass each way, a few table accesses per request.
//! Memory is bounded if the caller heeds [`Session::wants_requests`].

mod conf;
mod path;
mod request;
#[cfg(test)]
mod single_tests;
mod slab;
mod split;
mod standing;
#[cfg(test)]
mod tests;
mod traffic;

pub use conf::{ConfProblem, ShardRoute, Target, VolumeConf};
pub use path::PathId;
pub use standing::FENCED_MS;

use path::{Backoff, PATHS_PER_STORE, PathState, Store};
use proto::block::{BlockData, BlockRequest};
use proto::frame::Frame;
use proto::seam::Machine;
use proto::wire::{Request, SignedTicket};
use proto::{Epoch, Status, Tick};
use request::{Piece, Whole};
use slab::{Key, Slab};
use standing::Standing;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use traffic::Orphans;

/// Time for a connection to come about and to be greeted.
pub const HANDSHAKE_MS: u64 = 5_000;
/// Longest READ or WRITE that a caller may ask for.
pub const REQUEST_BYTES_MAX: u64 = 32 << 20;
/// Requests without reply at which the session asks its callers to pause. Four times what the paths
/// to one store carry, so that a store with little to do is not starved by a slow one.
pub const REQUESTS_OPEN_MAX: usize = 1024;
/// Data bytes of requests without reply at which the session asks its callers to pause.
pub const BYTES_OPEN_MAX: u64 = 128 << 20;

/// What a session is made with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Stores of another cluster refuse the connection.
    pub cluster_id: [u8; 16],
    /// Answer with TIMED_OUT after this many nanoseconds; `None`: wait for ever, like a disk.
    pub io_timeout_nanos: Option<u64>,
    /// Connections are numbered from here. Above all that an earlier session with the same ticket
    /// has used: nanoseconds since boot will do.
    pub generation_start: u64,
}

/// What the world tells a session.
#[derive(Debug)]
pub enum Event {
    /// A caller's request. Ids of requests without reply are unique.
    Submit(BlockRequest),
    /// A newer description of the volume, accepted by [`Session::accepts`].
    Configure(VolumeConf),
    /// The connection of [`Effect::Connect`] is there.
    Connected(PathId),
    /// A connection ended, or did not come about.
    Closed(PathId),
    /// A frame has come.
    Frame(PathId, Frame),
    /// The time of [`Session::wake_at`] has come.
    Tick,
    /// The end: all requests are answered with CANCELLED, all connections closed.
    Close,
}

/// What a session asks of the world.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a box per request would be an allocation per I/O")]
pub enum Effect {
    /// Connect; [`Event::Connected`] or [`Event::Closed`] follows.
    Connect {
        /// The session's name for it.
        path: PathId,
        /// Where to.
        address: SocketAddr,
    },
    /// Send a request on a connection that is there.
    Send {
        /// Which.
        path: PathId,
        /// What.
        request: Request,
    },
    /// Close a connection; nothing that comes from it matters any more.
    Disconnect(PathId),
    /// The one reply to a request.
    Reply {
        /// The caller's id.
        id: u64,
        /// Data of a read, or why it failed.
        result: Result<BlockData, Status>,
    },
    /// Requests wait for a newer configuration of this shard, or for its store to come back.
    NeedConf {
        /// Its index.
        shard: u32,
    },
}

/// What a session has done so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Requests taken.
    pub requests: u64,
    /// Replies given.
    pub replies: u64,
    /// Replies that were errors.
    pub errors: u64,
    /// Bytes of successful READs.
    pub read_bytes: u64,
    /// Bytes of successful WRITEs.
    pub written_bytes: u64,
    /// Messages sent for requests.
    pub sent: u64,
    /// Of these, not for the first time.
    pub resent: u64,
    /// Pieces that had to wait for a configuration or a pause.
    pub parked: u64,
    /// Data that did not match their CRC, in either direction.
    pub bad_checksums: u64,
    /// Connections begun.
    pub connects: u64,
    /// Connections that were greeted.
    pub greeted: u64,
    /// Greeted connections lost.
    pub lost: u64,
    /// FENCE_PATH sent.
    pub fences: u64,
    /// Connections ended because the other side broke the protocol.
    pub violations: u64,
    /// Requests answered with TIMED_OUT.
    pub timed_out: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Timer {
    Path(u32, u8),
    Shard(u32),
    Fence(u64),
    Standing,
}

/// What is known of one shard, and which of its pieces wait.
#[derive(Debug, Default)]
struct Shard {
    epoch: Epoch,
    store: Option<u32>,
    backoff: Backoff,
    /// Parked until then, or until a new configuration.
    retry_at: Option<Tick>,
    parked: Vec<Key>,
}

/// The client end of one volume.
pub struct Session {
    options: Options,
    conf: VolumeConf,
    standing: Standing,
    stores: Vec<Option<Store>>,
    shards: BTreeMap<u32, Shard>,
    wholes: Slab<Whole>,
    pieces: Slab<Piece>,
    /// (when it times out, request), ascending, because all have the same time.
    deadlines: VecDeque<(Tick, Key)>,
    orphans: BTreeMap<u64, Orphans>,
    orphans_count: u64,
    /// Orphans may be able to go on: a path was opened, or a route has changed.
    is_orphans_due: bool,
    timers: BTreeSet<(Tick, Timer)>,
    /// Stores whose queue or whose room may have grown in this step.
    due_stores: Vec<u32>,
    commands: u64,
    generation: u64,
    open_bytes: u64,
    is_closed: bool,
    counters: Counters,
    /// Mutant: orphans move without FENCE_PATH.
    #[cfg(test)]
    is_fencing_off: bool,
}

impl Session {
    /// Open a volume. Connections to all stores that serve it are begun.
    #[must_use]
    pub fn new(now: Tick, options: Options, conf: VolumeConf, out: &mut Vec<Effect>) -> Session {
        let routes = conf.shards.clone();
        let mut session = Session {
            generation: options.generation_start,
            options,
            conf,
            standing: Standing::Attached,
            stores: Vec::new(),
            shards: BTreeMap::new(),
            wholes: Slab::new(),
            pieces: Slab::new(),
            deadlines: VecDeque::new(),
            orphans: BTreeMap::new(),
            orphans_count: 0,
            is_orphans_due: false,
            timers: BTreeSet::new(),
            due_stores: Vec::new(),
            commands: 0,
            open_bytes: 0,
            is_closed: false,
            counters: Counters::default(),
            #[cfg(test)]
            is_fencing_off: false,
        };
        session.route(now, &routes, out);
        session
    }

    /// Whether [`Event::Configure`] may follow with this description.
    pub fn accepts(&self, conf: &VolumeConf) -> Result<(), ConfProblem> {
        conf.follows(&self.conf)
    }

    /// When to send [`Event::Tick`]. Changes with every step.
    #[must_use]
    pub fn wake_at(&self) -> Option<Tick> {
        let timer = self.timers.first().map(|(tick, _)| *tick);
        let deadline = self.deadlines.front().map(|(tick, _)| *tick);
        [timer, deadline].into_iter().flatten().min()
    }

    /// Whether there is room for more requests. False: take no more from the front ends for now.
    #[must_use]
    pub fn wants_requests(&self) -> bool {
        self.wholes.len() < REQUESTS_OPEN_MAX && self.open_bytes < BYTES_OPEN_MAX
    }

    /// Requests without reply.
    #[must_use]
    pub fn open_requests(&self) -> usize {
        self.wholes.len()
    }

    /// Size of the volume, as last told.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.conf.size_bytes
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    fn configure(&mut self, now: Tick, conf: VolumeConf, out: &mut Vec<Effect>) {
        if let Err(problem) = self.accepts(&conf) {
            panic!("a description that accepts() refuses: {problem}");
        }
        let has_new_identity = identity(&conf.ticket) != identity(&self.conf.ticket);
        let routes = conf.shards.clone();
        if has_new_identity {
            // A connection belongs to the ticket that it was opened with, and so does what is
            // orphaned here: before the new one is taken over.
            for (index, place) in self.path_places() {
                self.restart_path(now, index, place, out);
            }
        }
        if conf.attach_epoch > self.conf.attach_epoch {
            self.attach_again();
        }
        self.conf = conf;
        self.route(now, &routes, out);
        self.is_orphans_due = true;
    }

    /// Take over what is newer in `routes`; make stores for new targets, end those without shard.
    fn route(&mut self, now: Tick, routes: &[ShardRoute], out: &mut Vec<Effect>) {
        for route in routes {
            let shard = self.shards.entry(route.index).or_default();
            if shard.store.is_some() && route.epoch < shard.epoch {
                continue;
            }
            let is_newer = route.epoch > shard.epoch;
            shard.epoch = route.epoch;
            let before = shard.store;
            let store = self.store_for(now, route.target, out);
            if is_newer {
                self.hasten(now, store);
            }
            if before != Some(store) {
                self.shard_mut(route.index).store = Some(store);
                if let Some(before) = before {
                    self.leave(now, route.index, before, out);
                }
            }
            self.unpark(now, route.index, out);
        }
        let used: BTreeSet<u32> = self.shards.values().filter_map(|shard| shard.store).collect();
        for index in 0..self.stores.len() as u32 {
            if self.stores[index as usize].is_some() && !used.contains(&index) {
                self.retire(now, index, out);
            }
        }
    }

    fn store_for(&mut self, now: Tick, target: Target, out: &mut Vec<Effect>) -> u32 {
        let is_it = |store: &Option<Store>| store.as_ref().is_some_and(|s| s.target == target);
        if let Some(index) = self.stores.iter().position(is_it) {
            return index as u32;
        }
        let free = self.stores.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.stores.push(None);
            self.stores.len() - 1
        });
        self.stores[index] = Some(Store::new(index as u32, target));
        for place in 0..PATHS_PER_STORE {
            self.connect(now, index as u32, place, out);
        }
        index as u32
    }

    /// News of a store's shard: it may be reachable again, so try now.
    fn hasten(&mut self, now: Tick, index: u32) {
        for place in 0..PATHS_PER_STORE {
            let path = &mut self.store_mut(index).paths[place];
            if path.state == PathState::Waiting {
                path.backoff.reset();
                self.set_path_timer(index, place, Some(now));
            }
        }
    }

    /// Take the pieces of a shard away from the store that no longer serves it.
    fn leave(&mut self, now: Tick, index: u32, before: u32, out: &mut Vec<Effect>) {
        let pieces = &self.pieces;
        let is_ours = |key: &Key| pieces.get(*key).is_some_and(|piece| piece.shard == index);
        let store = self.stores[before as usize].as_mut().expect("it had a shard");
        let moved: Vec<Key> = store.queue.iter().copied().filter(|key| is_ours(key)).collect();
        store.queue.retain(|key| !is_ours(key));
        for place in 0..PATHS_PER_STORE {
            self.orphan(now, before, place, Some(index), out);
        }
        for key in moved {
            self.enqueue(now, key, out);
        }
    }

    /// End a store that serves no shard any more.
    fn retire(&mut self, now: Tick, index: u32, out: &mut Vec<Effect>) {
        for place in 0..PATHS_PER_STORE {
            self.stop_path(now, index, place, out);
            self.set_path_timer(index, place, None);
        }
        let store = self.stores[index as usize].take().expect("it is retired once");
        let is_queued = store.queue.iter().any(|key| self.pieces.get(*key).is_some());
        assert!(!is_queued, "what was queued has left with its shard");
        self.due_stores.retain(|due| *due != index);
    }

    fn tick(&mut self, now: Tick, out: &mut Vec<Effect>) {
        while let Some(&(tick, timer)) = self.timers.first()
            && tick <= now
        {
            let _ = self.timers.pop_first();
            match timer {
                Timer::Path(index, place) => self.path_timer(now, index, place.into(), out),
                Timer::Shard(index) => {
                    self.shard_mut(index).retry_at = None;
                    self.unpark(now, index, out);
                }
                Timer::Fence(id) => {
                    let orphans = self.orphans.get_mut(&id).expect("ends with its timer");
                    orphans.retry_at = None;
                    self.is_orphans_due = true;
                }
                Timer::Standing => self.yield_attach(out),
            }
        }
        while let Some(&(tick, key)) = self.deadlines.front()
            && tick <= now
        {
            let _ = self.deadlines.pop_front();
            self.time_out(key, out);
        }
    }

    fn close(&mut self, now: Tick, out: &mut Vec<Effect>) {
        self.is_closed = true;
        for key in self.wholes.keys() {
            self.abandon(key, Status::Cancelled, out);
        }
        for (index, place) in self.path_places() {
            self.stop_path(now, index, place, out);
        }
        self.stores.clear();
        self.shards.clear();
        self.orphans.clear();
        self.timers.clear();
        self.deadlines.clear();
        self.due_stores.clear();
    }

    fn path_places(&self) -> Vec<(u32, usize)> {
        let stores = (0..self.stores.len()).filter(|&index| self.stores[index].is_some());
        stores.flat_map(|s| (0..PATHS_PER_STORE).map(move |place| (s as u32, place))).collect()
    }

    fn shard_mut(&mut self, index: u32) -> &mut Shard {
        self.shards.entry(index).or_default()
    }

    fn store_mut(&mut self, index: u32) -> &mut Store {
        self.stores[index as usize].as_mut().expect("indexes of stores die with their routes")
    }

    fn set_path_timer(&mut self, index: u32, place: usize, at: Option<Tick>) {
        let before = std::mem::replace(&mut self.store_mut(index).paths[place].timer, at);
        let timer = Timer::Path(index, place as u8);
        if let Some(before) = before {
            self.timers.remove(&(before, timer));
        }
        self.timers.extend(at.map(|tick| (tick, timer)));
    }
}

/// What a connection is bound to: attach epoch and session.
fn identity(ticket: &SignedTicket) -> (u64, u64) {
    (ticket.ticket.attach_epoch, ticket.ticket.session)
}

impl Machine for Session {
    type Event = Event;
    type Effects = Vec<Effect>;

    fn step(&mut self, now: Tick, event: Event, out: &mut Vec<Effect>) {
        match event {
            Event::Submit(request) => self.submit(now, request, out),
            Event::Configure(conf) if !self.is_closed => self.configure(now, conf, out),
            Event::Connected(path) => self.connected(path, out),
            Event::Closed(path) => self.closed(now, path, out),
            Event::Frame(path, frame) => self.frame(now, path, frame, out),
            Event::Tick => self.tick(now, out),
            Event::Close => self.close(now, out),
            // It was closed meanwhile.
            Event::Configure(_) => {}
        }
        // Again only if it has ended a connection, of which there are few.
        while std::mem::take(&mut self.is_orphans_due) {
            self.settle_orphans(now, out);
        }
        while let Some(index) = self.due_stores.pop() {
            self.pump(index, out);
        }
    }
}
