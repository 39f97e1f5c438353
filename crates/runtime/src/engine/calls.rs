//! One disk operation by the plain system calls, for the engines that make no use of a ring.

use super::{Kind, failed, retried, transfer};
use proto::buffer::{BufMut, Pool};
use proto::disk::{BufList, DiskDone, DiskError, DiskOp, DiskRequest, IoId};
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
    transfer(total, |done| rustix::io::pread(fd, &mut buf[done..], offset + done as u64))?;
    Ok(Some(buf))
}

fn write(
    fd: BorrowedFd<'_>,
    offset: u64,
    data: &BufList,
    total: usize,
) -> Result<Option<BufMut>, DiskError> {
    transfer(total, |done| rustix::io::pwritev(fd, &gather(data, done), offset + done as u64))?;
    Ok(None)
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
