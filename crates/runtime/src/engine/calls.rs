//! One disk operation by the plain system calls, for the engines that make no use of a ring.

use super::{Kind, Progress, RETRIES_MAX, failed, progress};
use proto::buffer::{BufMut, Pool};
use proto::disk::{BufList, DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use rustix::io::Errno;
use smallvec::SmallVec;
use std::io::IoSlice;
use std::os::fd::BorrowedFd;

/// An operation with its buffers.
pub(super) struct Job {
    id: IoId,
    work: Work,
}

enum Work {
    Read { offset: u64, buf: BufMut },
    Write { offset: u64, data: BufList },
    Flush,
}

impl Job {
    /// Of a request that was checked; a read takes its buffer from `pool`.
    pub(super) fn new(request: DiskRequest, pool: &Pool) -> Job {
        let work = match request.op {
            DiskOp::Read { offset, len } => Work::Read { offset, buf: pool.alloc(len as usize) },
            DiskOp::Write { offset, data } => Work::Write { offset, data },
            DiskOp::Flush => Work::Flush,
        };
        Job { id: request.id, work }
    }
}

/// Carry it out on the calling thread.
pub(super) fn perform(fd: BorrowedFd<'_>, job: Job) -> (DiskDone, Kind) {
    let (kind, result) = match job.work {
        Work::Read { offset, buf } => (Kind::Read, read(fd, offset, buf)),
        Work::Write { offset, data } => {
            let bytes = data.iter().map(|buf| buf.len() as u64).sum();
            (Kind::Write { bytes }, write(fd, offset, &data, bytes as usize))
        }
        Work::Flush => (Kind::Flush, flush(fd)),
    };
    let done = match result {
        Ok(buf) => DiskDone { id: job.id, result: Ok(buf.map(BufMut::freeze)) },
        Err(error) => failed(job.id, error),
    };
    (done, kind)
}

fn read(fd: BorrowedFd<'_>, offset: u64, mut buf: BufMut) -> Result<Option<BufMut>, DiskError> {
    let total = buf.len();
    let mut done = 0;
    loop {
        let moved = retried(|| rustix::io::pread(fd, &mut buf[done..], offset + done as u64))?;
        match progress(done, moved, total) {
            Progress::Complete => return Ok(Some(buf)),
            Progress::Again { done: reached } => done = reached,
            Progress::AtEnd => return Err(DiskError::Short),
        }
    }
}

fn write(
    fd: BorrowedFd<'_>,
    offset: u64,
    data: &BufList,
    total: usize,
) -> Result<Option<BufMut>, DiskError> {
    let mut done = 0;
    loop {
        let slices = gather(data, done);
        let moved = retried(|| rustix::io::pwritev(fd, &slices, offset + done as u64))?;
        match progress(done, moved, total) {
            Progress::Complete => return Ok(None),
            Progress::Again { done: reached } => done = reached,
            Progress::AtEnd => return Err(DiskError::Short),
        }
    }
}

fn flush(fd: BorrowedFd<'_>) -> Result<Option<BufMut>, DiskError> {
    retried(|| rustix::fs::fdatasync(fd)).map(|()| None)
}

/// The buffers from byte `done` on.
fn gather(data: &BufList, done: usize) -> SmallVec<[IoSlice<'_>; 4]> {
    let mut skip = done;
    let mut slices = SmallVec::new();
    for buf in data {
        if skip >= buf.len() {
            skip -= buf.len();
        } else {
            slices.push(IoSlice::new(&buf[skip..]));
            skip = 0;
        }
    }
    slices
}

/// Repeat a call that was interrupted, a bounded number of times.
fn retried<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> Result<T, DiskError> {
    for _ in 0..RETRIES_MAX {
        match call() {
            Ok(value) => return Ok(value),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(errno) => return Err(DiskError::Errno(errno.raw_os_error())),
        }
    }
    Err(DiskError::Errno(Errno::AGAIN.raw_os_error()))
}
