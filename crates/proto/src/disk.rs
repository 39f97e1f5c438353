//! What a machine asks of a disk, and what the disk answers.
//!
//! Implemented by the engines of `runtime` and by the disks of the simulator. Offsets and lengths
//! are whole 4 KiB blocks; payloads are aligned, so `O_DIRECT` always applies.

use crate::buffer::Buf;
use smallvec::SmallVec;

/// Name of one request; the machine that made it decides what the bits mean.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct IoId(pub u64);

/// Payload of a write in order; one buffer in the common case.
pub type BufList = SmallVec<[Buf; 2]>;

/// One operation on one disk. Offsets are bytes from the start of the disk.
#[derive(Clone, Debug)]
pub enum DiskOp {
    /// Read `len` bytes; the completion carries them.
    Read {
        /// Bytes, multiple of 4,096.
        offset: u64,
        /// Bytes, multiple of 4,096.
        len: u32,
    },
    /// Write the buffers one after the other.
    Write {
        /// Bytes, multiple of 4,096.
        offset: u64,
        /// Each a multiple of 4,096 long.
        data: BufList,
    },
    /// Make every write that has *completed* before this was issued durable.
    Flush,
}

/// A named operation.
#[derive(Clone, Debug)]
pub struct DiskRequest {
    /// Returned with the completion.
    pub id: IoId,
    /// What to do.
    pub op: DiskOp,
}

/// Why a disk operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DiskError {
    /// The device or file system answered with this errno.
    #[error("disk operation failed: errno {0}")]
    Errno(i32),
    /// Fewer bytes than asked for: the file or device ends before them.
    #[error("the disk ends before what was asked for")]
    Short,
}

/// A finished operation. `Ok(Some(_))` for a read, `Ok(None)` for a write or flush.
#[derive(Clone, Debug)]
pub struct DiskDone {
    /// The request's name.
    pub id: IoId,
    /// What became of it.
    pub result: Result<Option<Buf>, DiskError>,
}
