//! One replica of one shard, in whatever role its configuration gives it.

use crate::client::{Answer, ClientRequest};
use crate::conf::transition::Transition;
use crate::conf::{Incarnation, ShardConf, StoreId};
use crate::heartbeat::{Leases, Timing};
use crate::mutant::Mutant;
use lane::tables::Tables;
use lane::{Op, Outcome, Problem};
use proto::wire::{Reply, Request};
use proto::{Epoch, Lsn, Pool, Status, Tick};

/// What a replica is made with.
#[derive(Clone)]
pub struct Options {
    /// Its index in the lane.
    pub shard_ix: u32,
    /// The store that holds it.
    pub store: StoreId,
    /// That store's life.
    pub incarnation: Incarnation,
    /// When that life began.
    pub booted: Tick,
    /// Lease times.
    pub timing: Timing,
    /// Where merged blocks come from.
    pub pool: Pool,
    /// Seeded bug, `Mutant::None` outside tests.
    pub mutant: Mutant,
}

/// What a replica may look at while it handles an event.
pub struct View<'a> {
    /// What its lane knows: the map's block states, region map, tail, watermark.
    pub tables: &'a Tables,
    /// Leases of the store.
    pub leases: &'a dyn Leases,
}

/// What the world tells a replica.
#[derive(Debug)]
pub enum Event {
    /// A client's request; answered by exactly one `Effect::Reply`.
    Client(ClientRequest),
    /// The lane has answered.
    Lane {
        /// As in `Effect::Lane`.
        op: u32,
        /// What became of it.
        result: Result<Outcome, Problem>,
    },
    /// Another store's replica asks (PREPARE, SETTLE, TAILS, COPY, DIGEST, NEED_CONF, READ);
    /// answered by exactly one `Effect::Answer`, perhaps much later.
    Peer {
        /// The store.
        from: StoreId,
        /// Comes back with the answer.
        token: u64,
        /// What it asks.
        request: Request,
    },
    /// Another store's answer to an `Effect::Send`. Lost answers simply do not come.
    PeerReply {
        /// The store.
        from: StoreId,
        /// What it answers.
        reply: Reply,
    },
    /// A configuration, from the conductor.
    Conf(ShardConf),
    /// This life of a store has ended for certain: a newer one is registered (which needs the lock
    /// on its disk), or its supervisor has seen the exit.
    Dead {
        /// The store.
        store: StoreId,
        /// Its life that is over.
        incarnation: Incarnation,
    },
    /// A heartbeat of this store was refused by one that has promised this newer epoch.
    Newer {
        /// The epoch.
        epoch: Epoch,
    },
    /// The replica has grown (the lane has done it).
    Grown,
    /// The time of `Effect::Wake` has come.
    Tick,
}

/// What a replica asks of the world.
#[derive(Debug)]
pub enum Effect {
    /// Ask the lane; the answer comes as `Event::Lane` with this number.
    Lane {
        /// The operation's number.
        op: u32,
        /// What to do.
        request: Op,
    },
    /// Answer a client.
    Reply {
        /// The request's.
        token: u64,
        /// What became of it.
        result: Result<Answer, Status>,
    },
    /// Ask the replica on another store.
    Send {
        /// Which store.
        to: StoreId,
        /// What.
        request: Request,
    },
    /// Answer `Event::Peer`.
    Answer {
        /// The request's.
        token: u64,
        /// The answer.
        reply: Reply,
    },
    /// Ask the conductor for a transition of the configuration with this epoch. Its outcome is known
    /// only when a newer configuration comes; until then this is said again from time to time.
    Propose {
        /// Of the configuration that it changes.
        epoch: Epoch,
        /// What to do.
        transition: Transition,
    },
    /// Ask the conductor for a configuration newer than this.
    FetchConf {
        /// The newest one known.
        newer_than: Epoch,
    },
    /// From now on, list the shard as primary in the heartbeats to these stores, in this epoch. A
    /// lease counts only from the first acknowledged heartbeat that listed it in this `reign`.
    Claim {
        /// Epoch in which the reign began.
        reign: Epoch,
        /// Present epoch, which the heartbeats carry.
        epoch: Epoch,
        /// Whose leases are needed.
        stores: Vec<(StoreId, Incarnation)>,
    },
    /// List the shard no longer.
    Unclaim,
    /// From now on, refuse heartbeats that list the shard in an epoch below this, and answer them
    /// with it.
    Promise {
        /// The epoch.
        epoch: Epoch,
    },
    /// Send `Event::Tick` at this time at the latest (the earliest of a step counts).
    Wake(Tick),
    /// For logs, metrics and the checkers of the simulator.
    Note(Note),
}

/// What a replica does, told as it does it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Note {
    /// Its role has changed.
    Role {
        /// The epoch of the configuration that it follows.
        epoch: Epoch,
        /// The new role.
        role: Role,
    },
    /// The promise not to follow anything below this epoch is durable.
    Promised {
        /// The epoch.
        epoch: Epoch,
    },
    /// As primary: an operation got its lsn.
    Assigned {
        /// Its place in the order.
        lsn: Lsn,
        /// First block.
        first: u32,
        /// Blocks.
        count: u32,
        /// SETTLE, not a client's.
        is_settle: bool,
    },
    /// An operation is durable here.
    Durable {
        /// Its place in the order.
        lsn: Lsn,
    },
    /// As primary: an operation is committed.
    Committed {
        /// Its place in the order.
        lsn: Lsn,
        /// Stores whose copy of it is durable, as known here.
        acked: Vec<StoreId>,
    },
    /// As primary: a region was sent to a learner and acknowledged.
    Copied {
        /// The learner's store.
        to: StoreId,
        /// Which region.
        region: u32,
    },
    /// As primary: a learner has everything and is proposed for admission.
    CaughtUp {
        /// The learner's store.
        store: StoreId,
        /// Regions copied to it.
        regions: u32,
    },
}

/// What a replica is at present.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// Not named by its configuration, or by an earlier life's name.
    Out,
    /// Being made equal.
    Learner,
    /// In the ISR, not primary.
    Secondary,
    /// Named primary; not yet serving.
    Settling,
    /// Serving.
    Active,
    /// Was refused by a replica that has promised a newer epoch: waits for that configuration.
    Suspended,
    /// The configuration that it served in is over.
    Fenced,
}

/// The machine.
pub struct Replica {
    options: Options,
}

impl Replica {
    /// Continue from what the lane holds: the configuration, promise and watermark stored there.
    ///
    /// A replica that is new to its lane begins with nothing and is OUT until its first
    /// `Event::Conf`.
    #[must_use]
    pub fn open(options: Options, view: &View<'_>) -> Replica {
        let _ = view;
        Replica { options }
    }

    /// Handle one event.
    pub fn step(&mut self, now: Tick, event: Event, view: &View<'_>, out: &mut Vec<Effect>) {
        let _ = (now, event, view, out, &self.options);
    }

    /// What it is now.
    #[must_use]
    pub fn role(&self) -> Role {
        Role::Out
    }

    /// The configuration it follows, once it has one.
    #[must_use]
    pub fn conf(&self) -> Option<&ShardConf> {
        None
    }

    /// The epoch below which it refuses everything.
    #[must_use]
    pub fn promised(&self) -> Epoch {
        Epoch(0)
    }
}
