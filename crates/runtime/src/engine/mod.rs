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
//! completions; no allocation per I/O. `aio`: the same, and one more to find out that there is
//! nothing before a sleep. `threads`: one hand-over to a worker and one system call per I/O.
//! `inline`: one system call per I/O, on the lane's thread. `mem`: a copy.

mod aio;
mod calls;
mod inline;
mod mem;
mod slots;
#[cfg(test)]
mod suite;
mod threads;
mod uring;

use crate::disk_file::{DiskFd, DiskFile};
use crate::error::RuntimeError;
use proto::BLOCK_BYTES;
use proto::buffer::{BUFFER_BYTES_MAX, Pool};
use proto::disk::{DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use rustix::io::Errno;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

pub use aio::Aio;
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

    /// `uring`, `aio`, `threads`, `inline` or `mem`, as `pf disk list` shows it.
    fn name(&self) -> &'static str;
}

/// What the operator asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EngineChoice {
    /// Inline for a file in memory, else the first of io_uring, Linux AIO and threads that works.
    #[default]
    Auto,
    /// io_uring; falls back like `Auto`, because a store must start where io_uring is forbidden.
    Uring,
    /// Linux AIO; falls back to threads.
    Aio,
    /// pread/pwrite on worker threads.
    Threads,
}

impl EngineChoice {
    /// The engines to try, in order, before threads, which always work.
    fn candidates(self) -> &'static [EngineKind] {
        match self {
            EngineChoice::Auto => &[EngineKind::Inline, EngineKind::Uring, EngineKind::Aio],
            EngineChoice::Uring => &[EngineKind::Uring, EngineKind::Aio],
            EngineChoice::Aio => &[EngineKind::Aio],
            EngineChoice::Threads => &[],
        }
    }
}

/// The kinds of engine that serve a file or device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EngineKind {
    /// io_uring.
    Uring,
    /// Linux AIO.
    Aio,
    /// Worker threads.
    Threads,
    /// The lane's own thread.
    Inline,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineKind::Uring => "uring",
            EngineKind::Aio => "aio",
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
    /// Findings in the order they were made: what was asked for, why an engine before was not
    /// taken, and last what decided.
    pub reasons: Vec<String>,
}

/// Decide which engine serves `disk`, by one real read through each candidate.
#[must_use]
pub fn probe(choice: EngineChoice, disk: &DiskFile) -> Probe {
    probe_fd(choice, disk.fd())
}

fn probe_fd(choice: EngineChoice, fd: &Arc<DiskFd>) -> Probe {
    decide(choice, |kind| try_out(kind, fd))
}

/// Read once through an engine of this kind: how that went, or why it cannot be used.
fn try_out(kind: EngineKind, fd: &Arc<DiskFd>) -> Result<&'static str, String> {
    match kind {
        EngineKind::Uring => uring::probe_read(fd),
        EngineKind::Aio => aio::probe(fd),
        EngineKind::Threads => Ok("always works"),
        EngineKind::Inline => {
            inline::in_memory(fd).ok_or_else(|| "the file is on a disk".to_owned())
        }
    }
}

/// Take the first candidate of `choice` that works.
fn decide(
    choice: EngineChoice,
    mut works: impl FnMut(EngineKind) -> Result<&'static str, String>,
) -> Probe {
    let mut reasons = Vec::new();
    match choice {
        EngineChoice::Auto => {}
        EngineChoice::Uring => reasons.push("uring: asked for by the configuration".to_owned()),
        EngineChoice::Aio => reasons.push("aio: asked for by the configuration".to_owned()),
        EngineChoice::Threads => {
            reasons.push("threads: asked for by the configuration".to_owned());
            return Probe { kind: EngineKind::Threads, reasons };
        }
    }
    for &kind in choice.candidates() {
        match works(kind) {
            Ok(how) => {
                reasons.push(format!("{kind}: {how}"));
                return Probe { kind, reasons };
            }
            // That a file is not in memory is no news.
            Err(_) if kind == EngineKind::Inline => {}
            Err(why) => reasons.push(format!("{kind}: not usable here: {why}")),
        }
    }
    reasons.push("threads: nothing faster is usable here".to_owned());
    Probe { kind: EngineKind::Threads, reasons }
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
    let mut made: Option<Box<dyn DiskEngine>> = None;
    let probed = decide(choice, |kind| {
        let how = try_out(kind, fd)?;
        // The probe's queue was small; the real one can still meet a limit of the kernel.
        let engine = make(kind, fd, pool, depth);
        made = Some(engine.map_err(|why| format!("no queue of depth {depth}: {why}"))?);
        Ok(how)
    });
    let engine = match made {
        Some(engine) => engine,
        None => make(EngineKind::Threads, fd, pool, depth)
            .map_err(RuntimeError::system("start the disk worker threads"))?,
    };
    Ok((engine, probed))
}

fn make(
    kind: EngineKind,
    fd: &Arc<DiskFd>,
    pool: &Pool,
    depth: u32,
) -> io::Result<Box<dyn DiskEngine>> {
    let (fd, pool) = (Arc::clone(fd), pool.clone());
    Ok(match kind {
        EngineKind::Uring => Box::new(Uring::new(fd, pool, depth)?),
        EngineKind::Aio => Box::new(Aio::new(fd, pool, depth)?),
        EngineKind::Threads => Box::new(Threads::new(fd, pool, depth)?),
        EngineKind::Inline => Box::new(Inline::new(fd, pool)?),
    })
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

/// Repeat a call that was interrupted, a bounded number of times.
pub(crate) fn retried<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> Result<T, DiskError> {
    for _ in 0..RETRIES_MAX {
        match call() {
            Ok(value) => return Ok(value),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(errno) => return Err(DiskError::Errno(errno.raw_os_error())),
        }
    }
    Err(DiskError::Errno(Errno::AGAIN.raw_os_error()))
}

/// Transfer `total` bytes call by call, for engines whose calls wait; `from(done)` moves bytes from
/// byte `done` of the request on.
pub(crate) fn transfer(
    total: usize,
    mut from: impl FnMut(usize) -> rustix::io::Result<usize>,
) -> Result<(), DiskError> {
    let mut done = 0;
    loop {
        let moved = retried(|| from(done))?;
        match progress(done, moved, total) {
            Progress::Complete => return Ok(()),
            Progress::Again { done: reached } => done = reached,
            Progress::AtEnd => return Err(DiskError::Short),
        }
    }
}
