//! The way into a reactor from other threads.
//!
//! Commands go through a bounded queue. The eventfd is written only when the reactor sleeps or is
//! about to: it says so *before* its last look at the queue, and a sender looks for that *after*
//! its push, so at least one of the two sees the other.

use crate::metrics::Counter;
use crate::wake::Wake;
use crossbeam_channel as channel;
use proto::Tick;
use proto::frame::Framing;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// A connected socket that is handed to a reactor.
pub struct Adoption {
    /// TCP or AF_UNIX stream.
    pub socket: OwnedFd,
    /// How its stream is cut into frames from here on.
    pub framing: Box<dyn Framing>,
    /// Bytes of that stream that were received already; at most [`super::LEFTOVER_BYTES_MAX`].
    pub leftover: Vec<u8>,
    /// Given to `Application::opened`, so that it knows which socket this is.
    pub token: u64,
}

impl fmt::Debug for Adoption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adoption").field("token", &self.token).finish_non_exhaustive()
    }
}

pub(super) enum Inbox<C> {
    Command(C),
    Adopt(Adoption),
}

/// Why something was not taken; it comes back to its sender.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused<T> {
    /// The queue is full: the lane is behind.
    #[error("the command queue of the lane is full")]
    Full(T),
    /// The reactor has ended.
    #[error("the lane has stopped")]
    Stopped(T),
}

/// What a reactor counts. Written by its thread only.
#[derive(Debug, Default)]
pub struct ReactorMetrics {
    /// Iterations of the loop.
    pub loops: Counter,
    /// Waits that could block.
    pub sleeps: Counter,
    /// Idle ticks that found commands, frames or completions that no event had announced. More than
    /// a coincidence now and then is a lost wake-up, which the tick hides at the price of latency.
    pub late_wakes: Counter,
    /// System calls to wait or look for events.
    pub waits: Counter,
    /// Commands handled.
    pub commands: Counter,
    /// Receive calls.
    pub receive_calls: Counter,
    /// Bytes received.
    pub received_bytes: Counter,
    /// Frames received.
    pub received_frames: Counter,
    /// Send calls.
    pub send_calls: Counter,
    /// Bytes sent.
    pub sent_bytes: Counter,
    /// Frames sent.
    pub sent_frames: Counter,
    /// Connections taken over, accepted or made.
    pub opened: Counter,
    /// Connections that ended.
    pub closed: Counter,
    /// Connections open now.
    pub connections: Counter,
    /// Sockets that could not be accepted or adopted: a limit was reached, or it was no socket.
    pub refused: Counter,
    /// Disk operations finished.
    pub disk_done: Counter,
}

/// What the reactor's thread and all handles share.
pub(super) struct Shared {
    pub wake: Wake,
    pub is_asleep: AtomicBool,
    pub is_stopping: AtomicBool,
    pub loop_tick: AtomicU64,
    /// When the oldest disk operation under way was given; `u64::MAX`: none.
    pub oldest_io: AtomicU64,
    pub metrics: ReactorMetrics,
}

/// A sender of commands. Clones go to the same reactor.
pub struct Handle<C> {
    pub(super) inbox: channel::Sender<Inbox<C>>,
    pub(super) shared: Arc<Shared>,
}

impl<C> Clone for Handle<C> {
    fn clone(&self) -> Handle<C> {
        Handle { inbox: self.inbox.clone(), shared: Arc::clone(&self.shared) }
    }
}

impl<C: Send> Handle<C> {
    /// Send a command, without waiting.
    pub fn try_send(&self, command: C) -> Result<(), Refused<C>> {
        self.push(Inbox::Command(command)).map_err(|refused| match refused {
            Refused::Full(Inbox::Command(command)) => Refused::Full(command),
            Refused::Stopped(Inbox::Command(command)) => Refused::Stopped(command),
            Refused::Full(Inbox::Adopt(_)) | Refused::Stopped(Inbox::Adopt(_)) => {
                unreachable!("what was sent comes back")
            }
        })
    }

    /// Hand a socket over, without waiting. `Application::opened` follows, unless the reactor has
    /// too many connections: then the socket is closed and counted as refused.
    pub fn adopt(&self, adoption: Adoption) -> Result<(), Refused<Adoption>> {
        assert!(adoption.leftover.len() <= super::LEFTOVER_BYTES_MAX, "too much was read ahead");
        self.push(Inbox::Adopt(adoption)).map_err(|refused| match refused {
            Refused::Full(Inbox::Adopt(adoption)) => Refused::Full(adoption),
            Refused::Stopped(Inbox::Adopt(adoption)) => Refused::Stopped(adoption),
            Refused::Full(Inbox::Command(_)) | Refused::Stopped(Inbox::Command(_)) => {
                unreachable!("what was sent comes back")
            }
        })
    }

    fn push(&self, message: Inbox<C>) -> Result<(), Refused<Inbox<C>>> {
        match self.inbox.try_send(message) {
            Ok(()) => {
                self.shared.wake_if_asleep();
                Ok(())
            }
            Err(channel::TrySendError::Full(message)) => Err(Refused::Full(message)),
            Err(channel::TrySendError::Disconnected(message)) => Err(Refused::Stopped(message)),
        }
    }
}

impl<C> Handle<C> {
    /// End the loop after its current iteration. Never refused; connections are closed, requests
    /// at the disks are waited for, queued commands are dropped.
    pub fn stop(&self) {
        self.shared.is_stopping.store(true, Ordering::SeqCst);
        self.shared.wake_if_asleep();
    }

    /// Nanoseconds from the start of the reactor's latest iteration to `now`. An idle reactor makes
    /// one at least every [`super::IDLE_TICK_MS`]; a stuck one grows old.
    #[must_use]
    pub fn age_nanos(&self, now: Tick) -> u64 {
        now.0.saturating_sub(self.shared.loop_tick.load(Ordering::Relaxed))
    }

    /// Nanoseconds that the oldest disk operation has been under way at `now`, 0 if there is none.
    /// Looked at by the reactor at least every [`super::IDLE_TICK_MS`], also while it is idle; a
    /// reactor that does not get to it grows old by [`age_nanos`](Handle::age_nanos).
    #[must_use]
    pub fn oldest_io_nanos(&self, now: Tick) -> u64 {
        now.0.saturating_sub(self.shared.oldest_io.load(Ordering::Relaxed))
    }

    /// The reactor's counters.
    #[must_use]
    pub fn metrics(&self) -> &ReactorMetrics {
        &self.shared.metrics
    }
}

impl Shared {
    fn wake_if_asleep(&self) {
        // Orders the push before the look; the counterpart is in `fall_asleep`.
        fence(Ordering::SeqCst);
        if self.is_asleep.load(Ordering::Relaxed) && self.is_asleep.swap(false, Ordering::SeqCst) {
            self.wake.signal();
        }
    }

    /// Announce sleep; the queue must be looked at once more after this.
    pub fn fall_asleep(&self) {
        self.is_asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    pub fn awake(&self) {
        self.is_asleep.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signals(shared: &Shared) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&shared.wake, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(_) => 0,
        }
    }

    #[test]
    fn only_a_sleeper_is_woken_and_only_once() {
        let (inbox, queue) = channel::bounded(8);
        let shared = Arc::new(Shared {
            wake: Wake::new().expect("an eventfd"),
            is_asleep: AtomicBool::new(false),
            is_stopping: AtomicBool::new(false),
            loop_tick: AtomicU64::new(0),
            oldest_io: AtomicU64::new(u64::MAX),
            metrics: ReactorMetrics::default(),
        });
        let handle = Handle { inbox, shared };
        let shared = &handle.shared;
        handle.try_send(1).expect("room");
        assert_eq!(signals(shared), 0, "an awake reactor costs its senders no system call");
        shared.fall_asleep();
        assert!(!queue.is_empty(), "pushed before it fell asleep: seen by its last look");
        handle.try_send(2).expect("room");
        handle.try_send(3).expect("room");
        assert_eq!(signals(shared), 1, "pushed after its last look: woken, once");
        shared.fall_asleep();
        shared.awake();
        handle.try_send(4).expect("room");
        assert_eq!(signals(shared), 0, "something else has woken it");
        shared.fall_asleep();
        handle.stop();
        assert_eq!(signals(shared), 1);
        drop(queue);
        assert_eq!(handle.try_send(5), Err(Refused::Stopped(5)));
    }
}
