//! Disk engines: how blocks get to a disk and back.
//!
//! **What it owns.** An engine owns the requests given to it, with their buffers, until it hands
//! out their completions; it shares the file descriptor (and thereby the lock) of a
//! [`DiskFile`]. One engine belongs to one lane's thread: it may be
//! *made* elsewhere, but the thread of the first [`submit`](DiskEngine::submit) keeps it.
//!
//! **Who calls it.** The reactor, in this order per loop: `queue` as often as needed, `submit`
//! once, `reap` once, and before it sleeps `arm`.
//!
//! **What it guarantees.** Every queued request is answered exactly once, in no particular order. A
//! short transfer is continued, and reported as `Short` only at the end of the file. A flush covers
//! the writes that had completed before it was queued. Memory that the kernel may still touch is
//! never freed: dropping an engine first waits for what is in flight (requests that were queued but
//! never submitted are discarded), and where waiting is impossible the memory is leaked.
//!
//! **What it costs.** `uring`: one system call per batch of submissions and one per batch of
//! completions; no allocation per I/O. `threads`: one hand-over to a worker and one system call per
//! I/O. `inline`: one system call per I/O, on the lane's thread. `mem`: a copy.

mod calls;
mod inline;
mod mem;
#[cfg(test)]
mod suite;
mod threads;
mod uring;

use crate::disk_file::{DiskFd, DiskFile};
use crate::error::RuntimeError;
use proto::BLOCK_BYTES;
use proto::buffer::{BUFFER_BYTES_MAX, Pool};
use proto::disk::{DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

pub use inline::Inline;
pub use mem::{Mem, MemDisk};
pub use threads::Threads;
pub use uring::Uring;

/// Requests that one engine keeps at the device; more wait in its backlog. NVMe drives are
/// saturated well below this.
pub const DEPTH_DEFAULT: u32 = 256;
/// Buffers in one write: the kernel's `IOV_MAX`.
pub const WRITE_BUFFERS_MAX: usize = 1024;
/// Bytes in one read: the largest pooled buffer.
pub const READ_BYTES_MAX: usize = BUFFER_BYTES_MAX;
/// EINTR and EAGAIN answers to one request in a row before they are reported as its result.
const RETRIES_MAX: u32 = 64;
/// How long the probe waits for its one read before it calls an engine unusable.
const PROBE_WAIT: Duration = Duration::from_secs(10);

/// Plain counters of one engine since it was made. Operations are counted when they complete.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EngineCounters {
    /// Completed reads, failed ones included.
    pub reads: u64,
    /// Completed writes, failed ones included.
    pub writes: u64,
    /// Completed flushes, failed ones included.
    pub flushes: u64,
    /// Bytes of successful reads.
    pub read_bytes: u64,
    /// Bytes of successful writes.
    pub written_bytes: u64,
    /// Operations that failed.
    pub errors: u64,
}

/// The queue of one disk as one lane sees it. See the head of this module for the contract.
pub trait DiskEngine: Send {
    /// Take a request. Nothing happens before `submit`.
    fn queue(&mut self, request: DiskRequest);

    /// Start what was queued, as far as the depth allows; the rest follows as completions come in.
    fn submit(&mut self);

    /// Append all completions that are ready to `out`.
    fn reap(&mut self, out: &mut Vec<DiskDone>);

    /// Ask for a signal on `wake_fd` at the next completion.
    ///
    /// Returns false if completions are ready already: reap instead of waiting. Without `arm` there
    /// may be no signal, so that a busy loop does not pay for wake-ups that it does not need.
    fn arm(&mut self) -> bool;

    /// An eventfd. Register it edge-triggered, or read it after each wake-up.
    fn wake_fd(&self) -> BorrowedFd<'_>;

    /// Requests queued or submitted whose completion was not handed out yet.
    fn in_flight(&self) -> usize;

    /// What was done so far.
    fn counters(&self) -> EngineCounters;

    /// `uring`, `threads`, `inline` or `mem`, as `pf disk list` shows it.
    fn name(&self) -> &'static str;
}

/// What the operator asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EngineChoice {
    /// Inline for a file in memory, io_uring where it works, else threads.
    #[default]
    Auto,
    /// io_uring; falls back like `Auto`, because a store must start where io_uring is forbidden.
    Uring,
    /// pread/pwrite on worker threads.
    Threads,
}

/// The kinds of engine that serve a file or device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EngineKind {
    /// io_uring.
    Uring,
    /// Worker threads.
    Threads,
    /// The lane's own thread.
    Inline,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineKind::Uring => "uring",
            EngineKind::Threads => "threads",
            EngineKind::Inline => "inline",
        })
    }
}

/// Which engine a disk gets, and why, for `pf disk list` and the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Probe {
    /// The engine to use.
    pub kind: EngineKind,
    /// Findings in the order they were made; the last one decided.
    pub reasons: Vec<String>,
}

/// Decide which engine serves `disk`, by one real read through each candidate.
#[must_use]
pub fn probe(choice: EngineChoice, disk: &DiskFile) -> Probe {
    probe_fd(choice, disk.fd())
}

fn probe_fd(choice: EngineChoice, fd: &Arc<DiskFd>) -> Probe {
    let mut reasons = Vec::new();
    match choice {
        EngineChoice::Threads => {
            reasons.push("threads: asked for by the configuration".to_owned());
            return Probe { kind: EngineKind::Threads, reasons };
        }
        EngineChoice::Auto => {
            if let Some(why) = inline::in_memory(fd) {
                reasons.push(format!("inline: {why}"));
                return Probe { kind: EngineKind::Inline, reasons };
            }
        }
        EngineChoice::Uring => reasons.push("uring: asked for by the configuration".to_owned()),
    }
    match uring::probe_read(fd) {
        Ok(how) => {
            reasons.push(format!("uring: {how}"));
            Probe { kind: EngineKind::Uring, reasons }
        }
        Err(why) => {
            reasons.push(format!("threads: io_uring is not usable here: {why}"));
            Probe { kind: EngineKind::Threads, reasons }
        }
    }
}

/// Probe, then make the engine that serves one lane of `disk`.
pub fn open(
    choice: EngineChoice,
    disk: &DiskFile,
    pool: &Pool,
    depth: u32,
) -> Result<(Box<dyn DiskEngine>, Probe), RuntimeError> {
    open_fd(choice, disk.fd(), pool, depth)
}

fn open_fd(
    choice: EngineChoice,
    fd: &Arc<DiskFd>,
    pool: &Pool,
    depth: u32,
) -> Result<(Box<dyn DiskEngine>, Probe), RuntimeError> {
    let mut probed = probe_fd(choice, fd);
    if probed.kind == EngineKind::Inline {
        let engine = Inline::new(Arc::clone(fd), pool.clone())
            .map_err(RuntimeError::system("make an eventfd"))?;
        return Ok((Box::new(engine), probed));
    }
    if probed.kind == EngineKind::Uring {
        match Uring::new(Arc::clone(fd), pool.clone(), depth) {
            Ok(ring) => return Ok((Box::new(ring), probed)),
            // The probe's ring was small; the real one can still meet the memlock limit.
            Err(why) => {
                probed.kind = EngineKind::Threads;
                probed.reasons.push(format!("threads: no ring of depth {depth}: {why}"));
            }
        }
    }
    let workers = Threads::new(Arc::clone(fd), pool.clone(), depth)
        .map_err(RuntimeError::system("start the disk worker threads"))?;
    Ok((Box::new(workers), probed))
}

/// What kind an operation was and how long, for the counters.
#[derive(Clone, Copy)]
enum Kind {
    Read,
    Write { bytes: u64 },
    Flush,
}

impl EngineCounters {
    fn count(&mut self, kind: Kind, done: &DiskDone) {
        let failed = done.result.is_err();
        self.errors += u64::from(failed);
        match kind {
            Kind::Read => {
                self.reads += 1;
                if let Ok(Some(data)) = &done.result {
                    self.read_bytes += data.len() as u64;
                }
            }
            Kind::Write { bytes } => {
                self.writes += 1;
                self.written_bytes += if failed { 0 } else { bytes };
            }
            Kind::Flush => self.flushes += 1,
        }
    }
}

/// Refuse what no machine of ours may ask for: lengths are decided by us, never by the network.
fn assert_request(request: &DiskRequest) {
    const BLOCK: u64 = BLOCK_BYTES as u64;
    match &request.op {
        DiskOp::Read { offset, len } => {
            assert!(offset.is_multiple_of(BLOCK), "read at {offset}: not on a block");
            assert!(*len > 0 && u64::from(*len).is_multiple_of(BLOCK), "read of {len} bytes");
            assert!(*len as usize <= READ_BYTES_MAX, "read of {len} bytes");
        }
        DiskOp::Write { offset, data } => {
            assert!(offset.is_multiple_of(BLOCK), "write at {offset}: not on a block");
            assert!(!data.is_empty() && data.len() <= WRITE_BUFFERS_MAX, "{} buffers", data.len());
            for buf in data {
                let len = buf.len();
                assert!(len > 0 && len.is_multiple_of(BLOCK_BYTES), "buffer of {len} bytes");
            }
        }
        DiskOp::Flush => {}
    }
}

fn failed(id: IoId, error: DiskError) -> DiskDone {
    DiskDone { id, result: Err(error) }
}

/// How a transfer goes on after the kernel moved `moved` more bytes of it.
enum Progress {
    Complete,
    /// Ask again from byte `done` of the request.
    Again {
        done: usize,
    },
    /// The file ends before the request does.
    AtEnd,
}

/// Direct I/O cannot resume inside a block, so a partial block is transferred again.
fn progress(done: usize, moved: usize, total: usize) -> Progress {
    let reached = done + moved;
    assert!(reached <= total, "the kernel moved {moved} bytes of {}", total - done);
    if reached == total {
        return Progress::Complete;
    }
    let whole_blocks = reached - reached % BLOCK_BYTES;
    if whole_blocks > done { Progress::Again { done: whole_blocks } } else { Progress::AtEnd }
}
