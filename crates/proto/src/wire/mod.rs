//! PFW, the native protocol: every message between sessions, stores and peers, and its bytes.
//!
//! **What it owns.** The byte layout of `docs/reference/pfw.md` and nothing else: who may send what
//! and when is decided by `shard` and `node`. A message is
//! `[64-byte header][extension + CRC32C][u32 CRC per started block][data]`; the extension and the
//! CRCs are the frame's meta, the data is its payload and stays in the buffers it arrived in.
//!
//! **What it guarantees.** Bytes are judged once, here. [`Header::parse`] checks magic, version,
//! header CRC, opcode, flags and lengths, in this order, before anything is allocated for a body.
//! [`Request::parse`] and [`Reply::parse`] check the extension's CRC, every field and every data
//! CRC; what they return cannot be wrong. Arbitrary bytes give an error, never a panic.
//!
//! **Two kinds of error.** After a wrong header the stream cannot be followed and the connection
//! ends. A wrong body in a right frame ([`WireError::is_answerable`]) harms only its own request:
//! the receiver answers with [`WireError::status`] and goes on.
//!
//! **What it costs.** One CRC pass over data that was received; none over data that is sent, when
//! the sender already has the CRCs. No copy of data.

mod data;
mod framing;
mod header;
mod hello;
mod messages;
mod peer;
mod raw;
mod ticket;

#[cfg(test)]
mod golden;
#[cfg(test)]
mod samples;
#[cfg(test)]
mod tests;

pub use data::{ByteRange, CheckedData, RangeData, started_blocks};
pub use framing::{PfwFraming, Side};
pub use header::{Header, Opcode};
pub use hello::{Hello, HelloReply, Kind, Limits, PathSlot, Peer, VERSION, VersionRange, Who};
pub use messages::{
    CompareOutcome, Failure, FenceOutcome, HeartbeatEntry, HeartbeatKind, Ping, Reply, ReplyOp,
    Request, RequestOp,
};
pub use peer::{
    Ack, AttachOp, BlockState, Content, Copy, Digest, PeerContext, Prepare, PrepareOp,
    ResultRecord, Settle, Snap, SnapAction, TailOp, TailRecord, Tails,
};
pub use ticket::{Rights, SIGNED_TICKET_BYTES, SignedTicket, TICKET_MAC_BYTES, Ticket};

use crate::Status;

/// Bytes of every PFW header.
pub const HEADER_BYTES: usize = 64;
/// Most data bytes in one message: the wire payload limit.
pub const PAYLOAD_BYTES_MAX: u32 = 1 << 20;
/// Longest range of a message without data (DISCARD, WRITE_ZEROES): one RANGE record of a lane.
pub const RANGE_BYTES_MAX: u32 = 64 << 20;
/// COMPARE_AND_WRITE stays inside one block, because nothing is atomic across blocks.
pub const COMPARE_BYTES_MAX: u32 = crate::BLOCK_BYTES as u32;
/// Offsets and lengths of ranges are multiples of this logical sector size.
pub const SECTOR_BYTES: u32 = 512;
/// Longest configuration of a shard that NEED_CONF brings back.
pub const CONF_BYTES_MAX: u32 = 4096;
/// Ids travel through JSON elsewhere, where only integers below this are exact.
pub const ID_LIMIT: u64 = 1 << 53;

/// Why bytes are not a message.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    /// Fewer or more bytes than the layout says.
    #[error("{what}: {found} bytes instead of {expected}")]
    Truncated {
        /// Which part.
        what: &'static str,
        /// Bytes that its layout has.
        expected: u64,
        /// Bytes that came.
        found: u64,
    },
    /// The stream does not speak PFW.
    #[error("magic {found:#010x} is not PFW1")]
    Magic {
        /// What came.
        found: u32,
    },
    /// A version that HELLO did not agree on.
    #[error("protocol version {found}, this side speaks {VERSION}")]
    Version {
        /// What came.
        found: u8,
    },
    /// The header was damaged on its way.
    #[error("header CRC {found:#010x} instead of {expected:#010x}")]
    HeaderChecksum {
        /// Computed here.
        expected: u32,
        /// What the header says.
        found: u32,
    },
    /// An opcode that this version does not have.
    #[error("unknown opcode {0:#04x}")]
    UnknownOpcode(u8),
    /// A flag that does not exist, or not for this opcode.
    #[error("{opcode:?} with flags {flags:#06x}")]
    UnknownFlags {
        /// The operation.
        opcode: Opcode,
        /// All flags as received.
        flags: u16,
    },
    /// A request where only replies come, or the other way round, or anything before HELLO.
    #[error("{opcode:?} {} is not expected here", if *is_reply { "reply" } else { "request" })]
    Unexpected {
        /// The operation.
        opcode: Opcode,
        /// Whether it came as a reply.
        is_reply: bool,
    },
    /// More than the opcode may carry.
    #[error("{opcode:?} of {found} bytes, the limit is {limit}")]
    TooLong {
        /// The operation.
        opcode: Opcode,
        /// The length field.
        found: u32,
        /// The opcode's limit.
        limit: u32,
    },
    /// `body_length` contradicts opcode, length and offset.
    #[error("{opcode:?} with a body of {found} bytes instead of {expected}")]
    BodyLength {
        /// The operation.
        opcode: Opcode,
        /// What the other fields imply.
        expected: u64,
        /// What the header says.
        found: u32,
    },
    /// The extension was damaged on its way.
    #[error("extension CRC {found:#010x} instead of {expected:#010x}")]
    ExtensionChecksum {
        /// Computed here.
        expected: u32,
        /// What came.
        found: u32,
    },
    /// Data were damaged on their way.
    #[error("CRC of data block {index} is {found:#010x} instead of {expected:#010x}")]
    DataChecksum {
        /// Counted from the first started block of the message.
        index: u32,
        /// What the sender said.
        expected: u32,
        /// Computed here.
        found: u32,
    },
    /// Not a multiple of 512 bytes.
    #[error("range {offset}+{length} is not a multiple of 512 bytes")]
    Misaligned {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// An empty range, or one that ends beyond what 64 bits can say.
    #[error("range {offset}+{length} is empty or ends nowhere")]
    Range {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// A field with a value that is never allowed.
    #[error("field {name} has the value {value}")]
    Field {
        /// As in docs/reference/pfw.md.
        name: &'static str,
        /// What came.
        value: u64,
    },
}

impl WireError {
    /// Whether only this message is lost: its frame was right, so the next header is in place.
    #[must_use]
    pub fn is_answerable(&self) -> bool {
        match self {
            WireError::Truncated { .. }
            | WireError::Magic { .. }
            | WireError::Version { .. }
            | WireError::HeaderChecksum { .. }
            | WireError::UnknownOpcode(_)
            | WireError::UnknownFlags { .. }
            | WireError::Unexpected { .. }
            | WireError::TooLong { .. }
            | WireError::BodyLength { .. } => false,
            WireError::ExtensionChecksum { .. }
            | WireError::DataChecksum { .. }
            | WireError::Misaligned { .. }
            | WireError::Range { .. }
            | WireError::Field { .. } => true,
        }
    }

    /// The status that tells the sender.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            WireError::Version { .. } | WireError::UnknownOpcode(_) => Status::Unsupported,
            WireError::HeaderChecksum { .. }
            | WireError::ExtensionChecksum { .. }
            | WireError::DataChecksum { .. } => Status::BadChecksum,
            WireError::Misaligned { .. } => Status::Misaligned,
            WireError::Range { .. } => Status::OutOfRange,
            WireError::TooLong { .. } => Status::Limit,
            WireError::Truncated { .. }
            | WireError::Magic { .. }
            | WireError::UnknownFlags { .. }
            | WireError::Unexpected { .. }
            | WireError::BodyLength { .. }
            | WireError::Field { .. } => Status::Invalid,
        }
    }
}
