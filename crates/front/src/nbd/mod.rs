//! NBD, transmission phase: what follows the handshake that `pureflash.gateway.nbd` negotiated.
//!
//! **What it owns.** [`NbdFraming`] cuts the stream into requests. [`NbdConnection`] judges each
//! one, names it, and turns results into replies: simple ones, or structured ones when these were
//! negotiated. The lane that drives it owns the socket and the session.
//!
//! **What it guarantees.** Every request but DISC gets exactly one reply, with its cookie. A request
//! that is refused costs the client an errno and not the connection, except where the stream can
//! no longer be followed: a wrong magic, or a WRITE longer than anything we would receive. At most
//! [`REQUESTS_MAX`] requests and [`INFLIGHT_BYTES_MAX`] bytes are accepted; beyond that the lane
//! stops reading ([`NbdConnection::wants_frames`]), because NBD has no error for "busy".
//!
//! **What it costs.** No copy of data; 16 to 28 bytes of header are built per reply.
//!
//! Clauses quoted are from the NBD protocol document (NetworkBlockDevice/nbd, doc/proto.md), by
//! section title. All integers are big-endian.

mod connection;
mod errno;
mod framing;
#[cfg(test)]
mod tests;

pub use connection::{Incoming, NbdConnection, Parameters};
pub use errno::Errno;
pub use framing::NbdFraming;

/// Requests of one connection without reply. The Linux client keeps at most this many tags.
pub const REQUESTS_MAX: usize = 128;
/// Bytes of READs and WRITEs without reply at which reading stops. One more request may then be
/// complete already, so memory is bounded by this plus [`REQUEST_BYTES_MAX`].
pub const INFLIGHT_BYTES_MAX: u64 = 32 << 20;
/// Longest READ or WRITE of all. "Block size constraints": "any length less than 2^25 bytes SHOULD
/// NOT be considered a denial of service attack"; a longer WRITE is one.
pub const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// Logical sector size; the handshake advertises it as minimum block size.
pub const SECTOR_BYTES: u32 = 512;
/// Bytes of a request header.
pub const HEADER_BYTES: usize = 28;
