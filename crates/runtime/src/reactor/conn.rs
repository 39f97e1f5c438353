//! One connection: its socket, what came, what waits to go, and how ready the socket is.
//!
//! The socket is registered once, edge-triggered, for both directions. `is_readable` and
//! `is_writable` remember the last edge until the kernel says that there is no more; a receive call
//! that brings less than it had room for has emptied the socket, unless the peer has hung up, whose
//! end of stream is still to be read.

use super::handle::ReactorMetrics;
use super::receive::Receiver;
use super::send::Sender;
use super::{CloseReason, ConnId};
use proto::Tick;
use proto::buffer::Pool;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, Shutdown, sendmsg};
use std::os::fd::OwnedFd;

/// Reads of 16 KiB that a finishing connection gets per iteration.
const DISCARDS_PER_TURN: usize = 16;

/// Where a connection stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// A connect is under way.
    Connecting,
    /// Frames flow.
    Open,
    /// What is queued still leaves; what comes is thrown away, up to the peer's own end.
    Finishing,
    /// `closed` is due; nothing flows.
    Closing,
}

pub(super) struct Conn {
    pub id: ConnId,
    pub socket: OwnedFd,
    pub receiver: Receiver,
    pub sender: Sender,
    pub phase: Phase,
    pub is_readable: bool,
    pub is_writable: bool,
    /// The kernel reported an end or an error: read on until it shows.
    pub has_hung_up: bool,
    pub is_paused: bool,
    /// Is on the list of connections to receive from.
    pub is_listed: bool,
    /// Is on the list of connections to send to.
    pub is_dirty: bool,
    /// Our direction of the stream was shut down.
    pub has_sent_end: bool,
    pub deadline: Option<Tick>,
}

/// What a receive call brought.
pub(super) enum Received {
    Some,
    Nothing,
    End(CloseReason),
}

impl Conn {
    pub fn new(id: ConnId, socket: OwnedFd, receiver: Receiver, phase: Phase) -> Conn {
        Conn {
            id,
            socket,
            receiver,
            sender: Sender::default(),
            phase,
            // Tried once without waiting for an edge: it may have been before the registration.
            is_readable: phase == Phase::Open,
            is_writable: phase == Phase::Open,
            has_hung_up: false,
            is_paused: false,
            is_listed: false,
            is_dirty: false,
            has_sent_end: false,
            deadline: None,
        }
    }

    /// True if bytes of the peer are looked at.
    pub fn wants_receive(&self) -> bool {
        match self.phase {
            Phase::Open => !self.is_paused,
            Phase::Finishing => true,
            Phase::Connecting | Phase::Closing => false,
        }
    }

    /// One receive call.
    pub fn receive(&mut self, pool: &Pool, metrics: &ReactorMetrics) -> Received {
        if !self.is_readable {
            return Received::Nothing;
        }
        let room = self.receiver.room(pool);
        let asked = room.bytes();
        let answer = room.fill(|pieces| rustix::io::readv(&self.socket, pieces));
        metrics.receive_calls.add(1);
        match answer {
            Ok(0) if self.receiver.is_inside_frame() => {
                Received::End(CloseReason::PeerClosedInsideFrame)
            }
            Ok(0) => Received::End(CloseReason::PeerClosed),
            Ok(count) => {
                metrics.received_bytes.add(count as u64);
                self.is_readable = count == asked || self.has_hung_up;
                self.receiver.received(count, count == asked);
                Received::Some
            }
            Err(Errno::AGAIN) => {
                self.is_readable = false;
                Received::Nothing
            }
            Err(Errno::INTR) => Received::Some,
            Err(errno) => Received::End(CloseReason::Failed(errno.raw_os_error())),
        }
    }

    /// Throw away what came, a bounded number of times. Closing with unread bytes would reset the
    /// connection, and a reset makes the peer's kernel drop our last reply.
    pub fn discard(&mut self) -> Received {
        let mut scratch = [0u8; 16 << 10];
        for _ in 0..DISCARDS_PER_TURN {
            match rustix::io::read(&self.socket, &mut scratch) {
                Ok(1..) | Err(Errno::INTR) => {}
                Ok(0) => return Received::End(CloseReason::Requested),
                Err(Errno::AGAIN) => return Received::Nothing,
                // The peer is gone; so are we.
                Err(_) => return Received::End(CloseReason::Requested),
            }
        }
        Received::Some
    }

    /// Send until the queue is empty or the socket takes no more.
    pub fn send(&mut self, metrics: &ReactorMetrics) -> Result<(), CloseReason> {
        while self.is_writable && self.sender.bytes() > 0 {
            let answer = {
                let pieces = self.sender.pieces();
                // sendmsg and not writev: a peer that is gone must not raise SIGPIPE.
                let flags = SendFlags::NOSIGNAL;
                sendmsg(&self.socket, &pieces, &mut SendAncillaryBuffer::default(), flags)
            };
            metrics.send_calls.add(1);
            match answer {
                Ok(count) => {
                    metrics.sent_bytes.add(count as u64);
                    metrics.sent_frames.add(self.sender.advance(count));
                }
                Err(Errno::AGAIN) => self.is_writable = false,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(CloseReason::Failed(errno.raw_os_error())),
            }
        }
        if self.phase == Phase::Finishing && self.sender.bytes() == 0 && !self.has_sent_end {
            self.has_sent_end = true;
            // Fails only if the connection is gone already, which the next read shows.
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        }
        Ok(())
    }
}
