//! How a byte stream is cut into frames, said as data so that the reactor stays ignorant of
//! protocols: a fixed-size header, then a body of `meta` bytes (small, unaligned: extensions and
//! checksums) followed by `payload` bytes (received straight into pooled, aligned buffers).

use crate::disk::BufList;
use smallvec::SmallVec;

/// Longest fixed-size header of any protocol we speak (PFW: 64).
pub const HEADER_BYTES_MAX: usize = 64;
/// Payload is handed over in buffers of at most this many bytes; all but the last are full.
pub const PAYLOAD_CHUNK_BYTES: usize = 1 << 20;

/// What follows a header. Both lengths were checked against the protocol's limit for this message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BodyLayout {
    /// Bytes before the payload.
    pub meta_bytes: u32,
    /// Bytes that go to aligned buffers.
    pub payload_bytes: u32,
}

/// Why a stream cannot be followed any further; the connection is closed with this reason.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{reason}")]
pub struct FrameError {
    /// For the log: what was wrong, with the values found and expected.
    pub reason: String,
}

/// The framing rule of one protocol on one connection.
pub trait Framing: Send {
    /// Size of the fixed header in bytes, at most [`HEADER_BYTES_MAX`].
    fn header_bytes(&self) -> usize;

    /// Check a complete header (magic, version, CRC, lengths against limits) and say what follows.
    ///
    /// Nothing is allocated for the body before this has returned `Ok`.
    fn body(&mut self, header: &[u8]) -> Result<BodyLayout, FrameError>;
}

/// One received frame.
#[derive(Clone, Debug, Default)]
pub struct Frame {
    /// The fixed header, as received.
    pub header: SmallVec<[u8; HEADER_BYTES_MAX]>,
    /// Extension and checksums.
    pub meta: SmallVec<[u8; 128]>,
    /// Payload in order, in chunks of [`PAYLOAD_CHUNK_BYTES`].
    pub payload: BufList,
}

/// One frame to send: bytes, then buffers, written with one gather call.
#[derive(Clone, Debug, Default)]
pub struct OutFrame {
    /// Header, extension and checksums.
    pub head: SmallVec<[u8; 128]>,
    /// Payload, sent without copying.
    pub payload: BufList,
}
