//! What a session is told about its volume, checked once where it enters.

use proto::wire::{ID_LIMIT, SECTOR_BYTES, SignedTicket};
use proto::{BLOCK_BYTES, Epoch, VolumeId};
use std::net::SocketAddr;

/// Shards of one volume: an index is a u32 on the wire.
const SHARDS_MAX: u64 = 1 << 32;

/// Where a shard's primary serves.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Target {
    /// Of the store node.
    pub address: SocketAddr,
    /// The lane that holds the replica.
    pub lane: u32,
}

/// Who serves one shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShardRoute {
    /// Position in the volume.
    pub index: u32,
    /// Of the configuration that says so.
    pub epoch: Epoch,
    /// Its primary.
    pub target: Target,
}

/// A volume as its conductor describes it to a session. May leave out shards whose primary is not
/// known yet: their requests wait.
#[derive(Clone, Debug)]
pub struct VolumeConf {
    pub(super) volume: VolumeId,
    pub(super) size_bytes: u64,
    pub(super) shard_size_bytes: u64,
    pub(super) attach_epoch: u64,
    pub(super) ticket: SignedTicket,
    pub(super) shards: Vec<ShardRoute>,
}

/// Why a description cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConfProblem {
    /// An id above what travels through JSON.
    #[error("volume id {0} is not below 2^53")]
    VolumeId(u64),
    /// Not whole sectors, or nothing.
    #[error("a volume of {0} bytes: not a positive multiple of 512")]
    Size(u64),
    /// Not whole blocks, or more shards than an index can name.
    #[error("a shard size of {0} bytes: not a positive multiple of 4096, or too small")]
    ShardSize(u64),
    /// A shard that the volume does not have.
    #[error("shard {0} lies behind the end of the volume")]
    ShardIndex(u32),
    /// The same shard twice.
    #[error("shard {0} is named twice")]
    ShardTwice(u32),
    /// The ticket is for something else.
    #[error("the ticket is for volume {volume} at attach epoch {attach_epoch}")]
    Ticket {
        /// Of the ticket.
        volume: u64,
        /// Of the ticket.
        attach_epoch: u64,
    },
    /// Not the volume that the session has open.
    #[error("volume {found} where {expected} is open")]
    OtherVolume {
        /// That was opened.
        expected: u64,
        /// That came.
        found: u64,
    },
    /// The shard size never changes.
    #[error("a shard size of {found} bytes where {expected} was opened")]
    OtherShardSize {
        /// At opening.
        expected: u64,
        /// That came.
        found: u64,
    },
    /// A volume in use only grows.
    #[error("{found} bytes where the volume has {expected}: it cannot shrink while it is open")]
    Shrinks {
        /// Now.
        expected: u64,
        /// That came.
        found: u64,
    },
    /// Another session without a new attach: it could not fence the requests that the old session
    /// has under way.
    #[error("session {found} where {expected} is attached")]
    OtherSession {
        /// Now.
        expected: u64,
        /// That came.
        found: u64,
    },
    /// An attach that was taken over already.
    #[error("attach epoch {found} where {expected} is known")]
    OlderAttach {
        /// Now.
        expected: u64,
        /// That came.
        found: u64,
    },
}

impl VolumeConf {
    /// Check a description.
    pub fn new(
        volume: VolumeId,
        (size_bytes, shard_size_bytes): (u64, u64),
        attach_epoch: u64,
        ticket: SignedTicket,
        mut shards: Vec<ShardRoute>,
    ) -> Result<VolumeConf, ConfProblem> {
        if volume.0 >= ID_LIMIT {
            return Err(ConfProblem::VolumeId(volume.0));
        }
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES.into()) {
            return Err(ConfProblem::Size(size_bytes));
        }
        let is_whole = shard_size_bytes.is_multiple_of(BLOCK_BYTES as u64);
        if shard_size_bytes == 0 || !is_whole || size_bytes.div_ceil(shard_size_bytes) > SHARDS_MAX
        {
            return Err(ConfProblem::ShardSize(shard_size_bytes));
        }
        if (ticket.ticket.volume, ticket.ticket.attach_epoch) != (volume, attach_epoch) {
            return Err(ConfProblem::Ticket {
                volume: ticket.ticket.volume.0,
                attach_epoch: ticket.ticket.attach_epoch,
            });
        }
        shards.sort_by_key(|route| route.index);
        for (place, route) in shards.iter().enumerate() {
            if u64::from(route.index) >= size_bytes.div_ceil(shard_size_bytes) {
                return Err(ConfProblem::ShardIndex(route.index));
            }
            if place > 0 && shards[place - 1].index == route.index {
                return Err(ConfProblem::ShardTwice(route.index));
            }
        }
        Ok(VolumeConf { volume, size_bytes, shard_size_bytes, attach_epoch, ticket, shards })
    }

    /// Size of the volume.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Whether this may follow `before` in one session.
    pub(super) fn follows(&self, before: &VolumeConf) -> Result<(), ConfProblem> {
        let (expected, found) = (before.volume.0, self.volume.0);
        if found != expected {
            return Err(ConfProblem::OtherVolume { expected, found });
        }
        let (expected, found) = (before.shard_size_bytes, self.shard_size_bytes);
        if found != expected {
            return Err(ConfProblem::OtherShardSize { expected, found });
        }
        let (expected, found) = (before.size_bytes, self.size_bytes);
        if found < expected {
            return Err(ConfProblem::Shrinks { expected, found });
        }
        let (expected, found) = (before.attach_epoch, self.attach_epoch);
        if found < expected {
            return Err(ConfProblem::OlderAttach { expected, found });
        }
        let is_same_attach = found == expected;
        let (expected, found) = (before.ticket.ticket.session, self.ticket.ticket.session);
        if is_same_attach && found != expected {
            return Err(ConfProblem::OtherSession { expected, found });
        }
        Ok(())
    }
}
