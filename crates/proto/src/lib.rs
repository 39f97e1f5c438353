//! The vocabulary every other crate speaks: ids and units as newtypes, status codes, the PFW wire
//! messages, checksums, pooled buffers, and the seam between a machine and the world.
//!
//! **Why Rust:** its types are on every I/O. It performs no I/O itself and depends on no other
//! crate of the workspace; everything else depends on it.

#![forbid(unsafe_code)]

pub mod block;
pub mod buffer;
pub mod checksum;
pub mod disk;
pub mod frame;
pub mod id_map;
pub mod ids;
pub mod seam;
pub mod status;
pub mod wire;

pub use buffer::{Buf, BufMut, Pool};
pub use ids::{Epoch, Lsn, ReplicaId, Seq, ShardId, VolumeId};
pub use seam::Tick;
pub use status::Status;

/// The addressable and checksummed unit of a volume, in bytes.
pub const BLOCK_BYTES: usize = 4096;
