//! What goes into a lane and what comes out: requests, replies, problems, events, effects, counters.

use crate::record::RangeKind;
use proto::disk::{BufList, DiskDone, DiskError, DiskRequest};
use proto::{Lsn, ReplicaId, Seq, Tick, VolumeId};
use smallvec::SmallVec;

/// The CRC with which poisoned blocks are read: not that of zeros, which they come as.
pub const POISON_CRC: u32 = 0;

/// What a caller may ask of a lane. Blocks are 4 KiB and counted from the start of the shard.
#[derive(Clone, Debug)]
pub enum Op {
    /// Write whole blocks.
    Write {
        /// Shard index.
        shard_ix: u32,
        /// Position of the operation.
        lsn: Lsn,
        /// Commit watermark known to the caller.
        commit: Seq,
        /// First block.
        first: u32,
        /// Plain CRC32C of each block; verified by the caller on receipt, stored as tags.
        crcs: SmallVec<[u32; 4]>,
        /// The blocks.
        data: BufList,
        /// `record::FLAG_LEARNER`, `record::FLAG_COPY`.
        flags: u8,
        /// This is the only replica: a torn overwrite could not be repaired from elsewhere, and data
        /// that its slot does not take goes to another.
        solo: bool,
        /// Space was granted for it before it had its position: it may use the reserve.
        is_granted: bool,
    },
    /// Take the data from blocks and give their space back.
    Range {
        /// Shard index.
        shard_ix: u32,
        /// Position of the operation.
        lsn: Lsn,
        /// Commit watermark known to the caller.
        commit: Seq,
        /// First block.
        first: u32,
        /// Number of blocks.
        count: u32,
        /// What they show from now on.
        kind: RangeKind,
        /// `record::FLAG_LEARNER`, `record::FLAG_COPY`.
        flags: u8,
    },
    /// Read whole blocks.
    Read {
        /// Shard index.
        shard_ix: u32,
        /// First block.
        first: u32,
        /// Number of blocks.
        count: u32,
        /// Poisoned blocks come as zeros with `POISON_CRC` instead of failing the read: for the
        /// making of copies, which must be poisoned where their source is.
        with_poison: bool,
    },
    /// Create a replica; the outcome carries its shard index.
    Create {
        /// Which replica.
        replica: ReplicaId,
        /// Its size.
        blocks: u32,
        /// Volume family for tags.
        family: VolumeId,
    },
    /// Delete a replica and free its space.
    Delete {
        /// Shard index.
        shard_ix: u32,
    },
    /// Grow a replica.
    Resize {
        /// Shard index.
        shard_ix: u32,
        /// New size.
        blocks: u32,
    },
    /// Store the shard's configuration.
    Conf {
        /// Shard index.
        shard_ix: u32,
        /// At most 1 KiB, opaque.
        blob: Vec<u8>,
    },
    /// Store the commit watermark.
    Commit {
        /// Shard index.
        shard_ix: u32,
        /// The watermark.
        commit: Seq,
    },
    /// Set a region map entry.
    Region {
        /// Shard index.
        shard_ix: u32,
        /// Region index.
        region: u32,
        /// `seq << 1 | SUSPECT`.
        value: u64,
    },
    /// Write a checkpoint now.
    Checkpoint,
    /// Finish everything, write a clean checkpoint, accept nothing more.
    Close,
}

/// A named request; exactly one reply carries the name back.
#[derive(Clone, Debug)]
pub struct Request {
    /// The caller's name for it.
    pub token: u64,
    /// What to do.
    pub op: Op,
}

/// What a successful request brought.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Durable.
    Done,
    /// A replica was created.
    Created {
        /// Its shard index.
        shard_ix: u32,
    },
    /// Data of a read.
    Read {
        /// The blocks in order.
        data: BufList,
        /// Plain CRC32C of each block, as stored with the data.
        crcs: SmallVec<[u32; 4]>,
    },
}

/// Why a request failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Problem {
    /// The lane's disk has no room for what this write could need. It had no effect.
    #[error("the disk is full: {free} of {needed} slots are left; delete or trim, or add a disk")]
    NoSpace {
        /// Slots the write could need.
        needed: u32,
        /// Slots that clients may still take.
        free: u32,
    },
    /// Blocks outside the shard, or more than a request may have.
    #[error("blocks {first}+{count} are outside the shard or the request limit")]
    OutOfRange {
        /// First block.
        first: u32,
        /// Number of blocks.
        count: u32,
    },
    /// No such shard index in this lane.
    #[error("no replica with index {shard_ix} on this lane")]
    NotFound {
        /// The index.
        shard_ix: u32,
    },
    /// The replica exists already.
    #[error("the lane already holds a replica of shard {replica}")]
    AlreadyExists {
        /// The replica.
        replica: ReplicaId,
    },
    /// More replicas or larger ones than the format allows.
    #[error("limit: {what}")]
    Limit {
        /// Which limit.
        what: &'static str,
    },
    /// The device failed a data read or write. The effect of a write is unknown until it is retried.
    #[error("the disk failed at block {block}: {error}")]
    Media {
        /// First block of the failed piece.
        block: u32,
        /// What the device said.
        error: DiskError,
    },
    /// The block's content does not match its checksum.
    #[error("block {block} is damaged: its content does not match its checksum")]
    BadChecksum {
        /// The block.
        block: u32,
    },
    /// The block's content was lost in a crash and nobody has it; overwriting it heals it.
    #[error("block {block} is known to be lost; overwrite it or restore it from elsewhere")]
    Poisoned {
        /// The block.
        block: u32,
    },
    /// The lane stopped itself.
    #[error("the lane has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
}

/// Answer to one request.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The request's name.
    pub token: u64,
    /// What became of it.
    pub result: Result<Outcome, Problem>,
}

/// What the world tells a lane.
#[derive(Debug)]
pub enum Event {
    /// A caller wants something.
    Request(Request),
    /// A disk operation finished.
    Disk(DiskDone),
    /// Somebody else has seen that the device is not what it was: stop for good.
    Fail {
        /// What was seen.
        reason: String,
    },
    /// The batch of events is complete.
    Turn,
}

/// What a lane wants of the world.
#[derive(Debug, Default)]
pub struct Effects {
    /// Disk operations, in order.
    pub disk: Vec<DiskRequest>,
    /// Replies; everything they promise is durable.
    pub replies: Vec<Reply>,
    /// Send a `Turn` at this time at the latest.
    pub wake: Option<Tick>,
}

/// Plain counters, read as a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs, reason = "each is the count of what its name says since the lane was opened")]
pub struct Counters {
    pub writes: u64,
    pub reads: u64,
    pub blocks_written: u64,
    pub blocks_read: u64,
    pub touches: u64,
    pub redos: u64,
    pub intents: u64,
    pub frames: u64,
    pub flushes: u64,
    pub checkpoints: u64,
    pub journal_wraps: u64,
    pub tag_page_loads: u64,
    pub checksum_errors: u64,
    pub media_errors: u64,
    pub slots_relocated: u64,
    pub relocations_failed: u64,
    /// Slots that are never used again, from whatever time: the one level among these counts.
    pub bad_slots: u64,
}
