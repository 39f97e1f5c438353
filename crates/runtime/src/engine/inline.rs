//! The `inline` engine: pread, pwritev and fdatasync on the lane's own thread, inside `submit`.
//!
//! For files whose file system is in memory. There io_uring has no request that could wait, so it
//! hands each of them to a worker thread of the kernel, and the hand-over costs more than the copy
//! that it is for. A call that returns after one copy may be made by the lane itself; on anything
//! slower it would stop the lane, so only the probe chooses this engine, and only where it has found
//! such a file system. Completions are ready at once and nobody is ever woken.

use super::calls::{Job, perform};
use super::{DiskEngine, EngineCounters, assert_request};
use crate::disk_file::DiskFd;
use crate::wake::Wake;
use proto::buffer::Pool;
use proto::disk::{DiskDone, DiskRequest};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58F6;

/// Whether a file is in memory: why, for the list of findings.
pub(super) fn in_memory(fd: &DiskFd) -> Option<&'static str> {
    let about = rustix::fs::fstatfs(fd).ok()?;
    match u64::try_from(about.f_type).ok()? {
        TMPFS_MAGIC => Some("the file is in memory (tmpfs)"),
        RAMFS_MAGIC => Some("the file is in memory (ramfs)"),
        _ => None,
    }
}

/// One lane's queue on a file in memory.
pub struct Inline {
    fd: Arc<DiskFd>,
    pool: Pool,
    queued: Vec<Job>,
    done: Vec<DiskDone>,
    wake: Wake,
    counters: EngineCounters,
}

impl Inline {
    /// Make an engine whose reads take buffers from `pool`.
    pub fn new(fd: Arc<DiskFd>, pool: Pool) -> io::Result<Inline> {
        Ok(Inline {
            fd,
            pool,
            queued: Vec::new(),
            done: Vec::new(),
            wake: Wake::new()?,
            counters: EngineCounters::default(),
        })
    }
}

impl DiskEngine for Inline {
    fn queue(&mut self, request: DiskRequest) {
        assert_request(&request);
        self.queued.push(Job::new(request, &self.pool));
    }

    fn submit(&mut self) {
        for job in self.queued.drain(..) {
            let (done, kind) = perform((*self.fd).as_fd(), job);
            self.counters.count(kind, &done);
            self.done.push(done);
        }
    }

    fn reap(&mut self, out: &mut Vec<DiskDone>) {
        out.append(&mut self.done);
    }

    fn arm(&mut self) -> bool {
        self.done.is_empty()
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn in_flight(&self) -> usize {
        self.queued.len() + self.done.len()
    }

    fn counters(&self) -> EngineCounters {
        self.counters
    }

    fn name(&self) -> &'static str {
        "inline"
    }
}
