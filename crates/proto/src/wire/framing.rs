//! How the reactor cuts a PFW stream into frames.

use super::header::{Header, Opcode};
use super::{HEADER_BYTES, WireError};
use crate::frame::{BodyLayout, FrameError, Framing};

/// Which end of a connection receives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The one that connected: it receives replies only.
    Caller,
    /// The one that was called: it receives requests only.
    Called,
}

/// The framing of one connection. Until HELLO is done nothing but HELLO passes, whose body is a few
/// hundred bytes: an unknown caller cannot make this side hold more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PfwFraming {
    side: Side,
    is_open: bool,
}

impl PfwFraming {
    /// Framing of a new connection: HELLO only.
    #[must_use]
    pub fn handshake(side: Side) -> PfwFraming {
        PfwFraming { side, is_open: false }
    }

    /// Framing after HELLO was accepted: everything else, and HELLO no more.
    #[must_use]
    pub fn open(side: Side) -> PfwFraming {
        PfwFraming { side, is_open: true }
    }

    /// Check a header as [`Header::parse`] does, and that it may come here and now.
    pub fn check(&self, bytes: &[u8]) -> Result<Header, WireError> {
        let header = Header::parse(bytes)?;
        let is_hello = header.opcode == Opcode::Hello;
        let is_for_us = header.is_reply == (self.side == Side::Caller);
        if !is_for_us || is_hello == self.is_open {
            let (opcode, is_reply) = (header.opcode, header.is_reply);
            return Err(WireError::Unexpected { opcode, is_reply });
        }
        Ok(header)
    }
}

impl Framing for PfwFraming {
    fn header_bytes(&self) -> usize {
        HEADER_BYTES
    }

    fn body(&mut self, header: &[u8]) -> Result<BodyLayout, FrameError> {
        let header = self.check(header);
        header.map(|header| header.body).map_err(|error| FrameError { reason: error.to_string() })
    }
}
