//! Ids and positions as newtypes: a shard index cannot be passed where an epoch is meant.

use std::fmt;

/// A volume, numbered by the conductor. Below 2^53, so that JSON carries it exactly.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct VolumeId(pub u64);

/// One fixed slice of a volume: the unit of placement, replication and failover.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ShardId {
    /// The volume it is a slice of.
    pub volume: VolumeId,
    /// Its position in the volume, from 0.
    pub index: u32,
}

/// One copy of a shard.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ReplicaId {
    /// The shard it is a copy of.
    pub shard: ShardId,
    /// Which copy.
    pub copy: u8,
}

/// Grows at every change of a shard's membership; every message carries it, older is refused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Epoch(pub u64);

/// Position of an operation in one shard. Dense, and never reused along one history.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Seq(pub u64);

/// (epoch, seq): the order of operations in one shard.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Lsn {
    /// The reign that issued it.
    pub epoch: Epoch,
    /// Its position.
    pub seq: Seq,
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.volume.0, self.index)
    }
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.shard, self.copy)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch.0, self.seq.0)
    }
}
