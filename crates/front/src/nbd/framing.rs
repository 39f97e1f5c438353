//! A request is a header of 28 bytes, and for WRITE as many bytes of data as it says.

use super::{HEADER_BYTES, REQUEST_BYTES_MAX};
use proto::frame::{BodyLayout, FrameError, Framing};

/// NBD_REQUEST_MAGIC.
const MAGIC: u32 = 0x2560_9513;

/// Request types.
pub(super) mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
}

/// A request's header, with values as they came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RawRequest {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

impl RawRequest {
    /// "Request message": magic, flags, type, cookie, offset, length.
    pub fn parse(header: &[u8]) -> Result<RawRequest, FrameError> {
        let Ok(header) = <&[u8; HEADER_BYTES]>::try_from(header) else {
            return Err(FrameError { reason: format!("NBD header of {} bytes", header.len()) });
        };
        let magic = u32::from_be_bytes(field(header, 0));
        if magic != MAGIC {
            let reason = format!("NBD request magic {magic:#010x} instead of {MAGIC:#010x}");
            return Err(FrameError { reason });
        }
        Ok(RawRequest {
            flags: u16::from_be_bytes(field(header, 4)),
            command: u16::from_be_bytes(field(header, 6)),
            cookie: u64::from_be_bytes(field(header, 8)),
            offset: u64::from_be_bytes(field(header, 16)),
            length: u32::from_be_bytes(field(header, 24)),
        })
    }
}

/// `N` bytes at a fixed place.
fn field<const N: usize>(header: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    header[at..at + N].try_into().expect("every field lies inside the header")
}

/// The framing of the transmission phase.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NbdFraming;

impl Framing for NbdFraming {
    fn header_bytes(&self) -> usize {
        HEADER_BYTES
    }

    fn body(&mut self, header: &[u8]) -> Result<BodyLayout, FrameError> {
        let request = RawRequest::parse(header)?;
        // Only WRITE has data. An unknown command has none as far as we can know; if that is
        // wrong, the next magic tells.
        if request.command != command::WRITE {
            return Ok(BodyLayout::default());
        }
        // "Terminating the transmission phase": "Either side MAY initiate a hard disconnect if it
        // detects a violation [...] of a mandatory condition"; to skip the data would be to
        // receive them.
        if request.length > REQUEST_BYTES_MAX {
            let length = request.length;
            let reason = format!("NBD write of {length} bytes, the limit is {REQUEST_BYTES_MAX}");
            return Err(FrameError { reason });
        }
        Ok(BodyLayout { meta_bytes: 0, payload_bytes: request.length })
    }
}
