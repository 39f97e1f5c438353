//! What every front end asks of a volume and what it gets back, whatever protocol its client speaks.

use crate::buffer::Buf;
use crate::disk::BufList;

/// One request of a front end, in bytes of the volume. Offsets and lengths are multiples of 512;
/// bounds against the volume's size were checked by the front end, and are checked again by the
/// session.
#[derive(Clone, Debug)]
pub enum BlockOp {
    /// Read `len` bytes.
    Read {
        /// Byte of the volume.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Write the buffers one after the other.
    Write {
        /// Byte of the volume.
        offset: u64,
        /// Payload.
        data: BufList,
    },
    /// A barrier over completed writes; every acknowledged write is already on stable media.
    Flush,
    /// The client no longer needs these bytes; they read as zeros afterwards.
    Discard {
        /// Byte of the volume.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// These bytes are zero from now on.
    WriteZeroes {
        /// Byte of the volume.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The client wants the space kept allocated.
        keep_allocated: bool,
    },
}

/// A named request; the front end chooses the id, the reply brings it back. Exactly one reply each.
#[derive(Clone, Debug)]
pub struct BlockRequest {
    /// The front end's name for it.
    pub id: u64,
    /// What to do.
    pub op: BlockOp,
}

/// Data of a successful read: buffers in order; never-written space comes as slices of one shared
/// zero buffer. Empty for the other operations.
pub type BlockData = BufList;

/// One contiguous payload as a list.
#[must_use]
pub fn single(buf: Buf) -> BufList {
    let mut list = BufList::new();
    list.push(buf);
    list
}
