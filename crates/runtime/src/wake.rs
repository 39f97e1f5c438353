//! The eventfd through which another thread or the kernel ends an epoll wait.
//!
//! Every waiter registers it edge-triggered, and each write is an edge of its own, so nobody has to
//! read it back: a wake-up costs one system call on the waking side and none on the other.

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// A non-blocking eventfd.
#[derive(Debug)]
pub struct Wake(OwnedFd);

impl Wake {
    /// Make one. Fails only when the process is out of file descriptors or memory.
    pub fn new() -> io::Result<Wake> {
        Ok(Wake(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Wake the waiter, now or at its next wait.
    pub fn signal(&self) {
        // The one possible failure is EAGAIN at 2^64 - 1 unread signals: a counter that no run
        // reaches, and the descriptor is readable then anyway.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Take back all signals so far; for waiters that poll level-triggered.
    pub fn clear(&self) {
        let mut count = [0u8; 8];
        // EAGAIN says that there was none.
        let _ = rustix::io::read(&self.0, &mut count);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Wake {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
