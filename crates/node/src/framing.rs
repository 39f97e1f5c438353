//! The framing of a PFW connection that begins with HELLO, for its two sides.
//!
//! The side that was called lets nothing else pass until its application has accepted HELLO: an
//! [`Opener`] says when. The side that calls knows how many answers to HELLO it gets (one as a
//! client, two as a store, which proves itself with the second), and counts them here, because the
//! frame behind the last one may be in the same read.

use proto::frame::{BodyLayout, FrameError, Framing};
use proto::wire::{HEADER_BYTES, Opcode, PfwFraming, Side};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Opens the framing of one connection; kept by whoever handles its HELLO.
#[derive(Clone, Debug, Default)]
pub struct Opener(Arc<AtomicBool>);

impl Opener {
    /// HELLO was accepted: let everything else pass from now on.
    pub fn open(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// True once HELLO was accepted.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// The framing that this opens. Both live on one reactor's thread.
    #[must_use]
    pub fn framing(&self) -> Box<dyn Framing> {
        Box::new(Called(self.clone()))
    }
}

struct Called(Opener);

impl Framing for Called {
    fn header_bytes(&self) -> usize {
        HEADER_BYTES
    }

    fn body(&mut self, header: &[u8]) -> Result<BodyLayout, FrameError> {
        let mut rule = if self.0.is_open() {
            PfwFraming::open(Side::Called)
        } else {
            PfwFraming::handshake(Side::Called)
        };
        rule.body(header)
    }
}

/// The framing of the side that calls, which gets `hellos` answers to HELLO before anything else.
#[must_use]
pub(crate) fn caller(hellos: u8) -> Box<dyn Framing> {
    assert!(hellos > 0, "every connection begins with HELLO");
    Box::new(Caller { hellos, rule: PfwFraming::handshake(Side::Caller) })
}

struct Caller {
    hellos: u8,
    rule: PfwFraming,
}

impl Framing for Caller {
    fn header_bytes(&self) -> usize {
        HEADER_BYTES
    }

    fn body(&mut self, header: &[u8]) -> Result<BodyLayout, FrameError> {
        let header =
            self.rule.check(header).map_err(|error| FrameError { reason: error.to_string() })?;
        if header.opcode == Opcode::Hello && self.hellos > 0 {
            self.hellos -= 1;
            if self.hellos == 0 {
                self.rule = PfwFraming::open(Side::Caller);
            }
        }
        Ok(header.body)
    }
}
