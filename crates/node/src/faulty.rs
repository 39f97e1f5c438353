//! The fault double of a disk engine, and a place for disks: for the tests of this crate only.
//!
//! [`Faulty`] stands between a lane and any engine. Tests hold its [`Faults`] and change them while
//! the lane runs: flushes fail (after the real one was done: the double lies to the pessimistic
//! side, so the content is what an honest disk would hold), or finished operations are held back, as
//! by a device that has stopped answering.

use proto::disk::{DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use runtime::engine::{DiskEngine, EngineCounters};
use std::collections::HashSet;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What goes wrong now.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    fail_flushes: AtomicBool,
    failed_flushes: AtomicU64,
    hold: AtomicBool,
}

impl Faults {
    pub(crate) fn fail_flushes(&self, on: bool) {
        self.fail_flushes.store(on, Ordering::SeqCst);
    }

    /// Flushes that were answered with EIO.
    pub(crate) fn failed_flushes(&self) -> u64 {
        self.failed_flushes.load(Ordering::SeqCst)
    }

    /// Answer nothing from now on, or everything again. The reactor's idle tick finds what was held.
    pub(crate) fn hold(&self, on: bool) {
        self.hold.store(on, Ordering::SeqCst);
    }
}

/// An engine that misbehaves as its [`Faults`] say.
pub(crate) struct Faulty {
    inner: Box<dyn DiskEngine>,
    faults: Arc<Faults>,
    flushes: HashSet<IoId>,
    done: Vec<DiskDone>,
}

impl Faulty {
    pub(crate) fn around(inner: Box<dyn DiskEngine>, faults: &Arc<Faults>) -> Box<dyn DiskEngine> {
        let (flushes, done) = (HashSet::new(), Vec::new());
        Box::new(Faulty { inner, faults: Arc::clone(faults), flushes, done })
    }

    fn holds(&self) -> bool {
        self.faults.hold.load(Ordering::SeqCst)
    }
}

impl DiskEngine for Faulty {
    fn queue(&mut self, request: DiskRequest) {
        if matches!(request.op, DiskOp::Flush) {
            self.flushes.insert(request.id);
        }
        self.inner.queue(request);
    }

    fn submit(&mut self) {
        self.inner.submit();
    }

    fn reap(&mut self, out: &mut Vec<DiskDone>) {
        let known = self.done.len();
        self.inner.reap(&mut self.done);
        for done in &mut self.done[known..] {
            let is_flush = self.flushes.remove(&done.id);
            if is_flush && self.faults.fail_flushes.load(Ordering::SeqCst) {
                done.result = Err(DiskError::Errno(5));
                self.faults.failed_flushes.fetch_add(1, Ordering::SeqCst);
            }
        }
        if !self.holds() {
            out.append(&mut self.done);
        }
    }

    fn arm(&mut self) -> bool {
        self.inner.arm() && (self.done.is_empty() || self.holds())
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.inner.wake_fd()
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.done.len()
    }

    fn counters(&self) -> EngineCounters {
        self.inner.counters()
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }
}

/// A folder that is gone when the test is over.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Folder {
        let name = format!("pureflash-node-{:016x}", crate::disk::random_u64());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("a new folder");
        Folder(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left of a failed test is found by its name.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
