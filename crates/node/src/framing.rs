//! The framing of a PFW connection that begins with HELLO: the application says when it is done.

use proto::frame::{BodyLayout, FrameError, Framing};
use proto::wire::{HEADER_BYTES, PfwFraming, Side};
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
    pub fn framing(&self, side: Side) -> Box<dyn Framing> {
        Box::new(HelloFirst { side, opener: self.clone() })
    }
}

struct HelloFirst {
    side: Side,
    opener: Opener,
}

impl Framing for HelloFirst {
    fn header_bytes(&self) -> usize {
        HEADER_BYTES
    }

    fn body(&mut self, header: &[u8]) -> Result<BodyLayout, FrameError> {
        let mut rule = if self.opener.is_open() {
            PfwFraming::open(self.side)
        } else {
            PfwFraming::handshake(self.side)
        };
        rule.body(header)
    }
}
