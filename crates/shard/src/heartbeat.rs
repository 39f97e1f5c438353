//! Heartbeats between the stores of a cluster: leases given and taken.

use crate::conf::{Incarnation, StoreId};
use proto::{ShardId, Tick};

/// Times of the lease protocol, in nanoseconds of `CLOCK_BOOTTIME`; changed only by T9.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// Between two heartbeats of a pair.
    pub heartbeat_nanos: u64,
    /// L: a primary serves reads this long after it *sent* a heartbeat that was acknowledged.
    pub lease_nanos: u64,
    /// G: a replica keeps its promise this long after it *received* a heartbeat. Larger than
    /// L x (1 + drift) + margin.
    pub grace_nanos: u64,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            heartbeat_nanos: 200_000_000,
            lease_nanos: 1_500_000_000,
            grace_nanos: 2_250_000_000,
        }
    }
}

/// What a replica asks about leases; answered from memory, on the read path.
pub trait Leases {
    /// Until when `store`, in this life, has promised not to serve `shard` in place of this store:
    /// send time of the newest heartbeat that it acknowledged *and* that listed the shard in the
    /// present reign, plus L. `Tick(0)`: no promise.
    fn lease_until(&self, shard: ShardId, store: StoreId, incarnation: Incarnation) -> Tick;

    /// Until when this store has promised *others* not to serve `shard` as primary (G after the
    /// receipt of each heartbeat that listed it). `Tick(0)`: no promise.
    fn promised_until(&self, shard: ShardId) -> Tick;

    /// When the last heartbeat of `store` that listed `shard` came in.
    fn heard_at(&self, shard: ShardId, store: StoreId) -> Option<Tick>;
}
