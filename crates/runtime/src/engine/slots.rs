//! The table of requests at the kernel, for the engines that give it raw addresses (`uring`, `aio`).
//!
//! **Slots.** The kernel holds addresses of buffers and gather lists. Both live in a slot of a
//! table that never moves or shrinks, from [`Slots::place_due`] until [`Slots::finish`] has seen the
//! completion. A request beyond the depth waits in a backlog without a slot, so there are never more
//! requests at the kernel than slots.
//!
//! **Answers.** A short transfer goes on from the last whole block, EINTR and EAGAIN are asked
//! again a bounded number of times, and every other errno is the request's result. That holds for a
//! flush as well: one that failed is reported and never repeated, because the second fsync of a
//! kernel may succeed although the pages that it was for are gone.

use super::{EngineCounters, Kind, Progress, RETRIES_MAX, progress};
use proto::buffer::{BufMut, Pool};
use proto::disk::{BufList, DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use std::collections::VecDeque;

enum Work {
    Read { buf: BufMut },
    Write { data: BufList, bytes: usize },
    Flush,
}

/// A request at the kernel, and the memory it refers to.
struct Slot {
    id: IoId,
    offset: u64,
    /// Bytes transferred by earlier attempts.
    done: usize,
    retries: u32,
    work: Option<Work>,
    /// The gather list of a write; kept to be used again by the slot's next owner.
    iovecs: Vec<libc::iovec>,
}

// SAFETY: the raw pointers in `iovecs` point into the buffers of the same slot's `work`, which are
// `Send`, and are only ever given to the kernel, which does not care about threads.
unsafe impl Send for Slot {}

/// What is left to do of a request, as the kernel wants it. The addresses stay valid until the slot
/// is finished.
pub(super) enum Left {
    Read { to: *mut u8, len: u32, at: u64 },
    Write { from: *const u8, len: u32, at: u64 },
    Gather { iovecs: *const libc::iovec, count: u32, at: u64 },
    Flush,
}

/// See the head of this module.
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
    backlog: VecDeque<DiskRequest>,
    /// Requests at the front of the backlog that `release` has let go.
    due: usize,
    /// Slots whose request has to be given to the kernel (again), in order.
    ready: VecDeque<u32>,
}

impl Slots {
    pub(super) fn new(depth: u32) -> Slots {
        let slot = |_| Slot {
            id: IoId(0),
            offset: 0,
            done: 0,
            retries: 0,
            work: None,
            iovecs: Vec::new(),
        };
        Slots {
            slots: (0..depth).map(slot).collect(),
            free: (0..depth).rev().collect(),
            backlog: VecDeque::new(),
            due: 0,
            ready: VecDeque::new(),
        }
    }

    /// Take a request; it waits for `release`.
    pub(super) fn queue(&mut self, request: DiskRequest) {
        self.backlog.push_back(request);
    }

    /// Everything queued so far may begin.
    pub(super) fn release(&mut self) {
        self.due = self.backlog.len();
    }

    /// Give slots to what was released, as far as there are any.
    pub(super) fn place_due(&mut self, pool: &Pool) {
        while self.due > 0 && !self.free.is_empty() {
            let request = self.backlog.pop_front().expect("what is due is there");
            self.due -= 1;
            self.place(request, pool);
        }
    }

    fn place(&mut self, request: DiskRequest, pool: &Pool) {
        let index = self.free.pop().expect("checked by the caller");
        let slot = &mut self.slots[index as usize];
        assert!(slot.work.is_none(), "a free slot holds nothing");
        (slot.id, slot.done, slot.retries) = (request.id, 0, 0);
        (slot.offset, slot.work) = match request.op {
            DiskOp::Read { offset, len } => {
                (offset, Some(Work::Read { buf: pool.alloc(len as usize) }))
            }
            DiskOp::Write { offset, data } => {
                let bytes = data.iter().map(|buf| buf.len()).sum();
                (offset, Some(Work::Write { data, bytes }))
            }
            DiskOp::Flush => (0, Some(Work::Flush)),
        };
        self.ready.push_back(index);
    }

    /// Slots to give to the kernel next.
    pub(super) fn ready(&self) -> &VecDeque<u32> {
        &self.ready
    }

    /// The kernel has taken the first of `ready`, or its answer is known already.
    pub(super) fn take_ready(&mut self) -> Option<u32> {
        self.ready.pop_front()
    }

    /// What is left to do of a slot's request.
    pub(super) fn left(&mut self, index: u32) -> Left {
        let slot = &mut self.slots[index as usize];
        let at = slot.offset + slot.done as u64;
        let done = slot.done;
        match slot.work.as_mut().expect("a submitted slot holds its work") {
            Work::Read { buf } => {
                let rest = &mut buf[done..];
                Left::Read { to: rest.as_mut_ptr(), len: rest.len() as u32, at }
            }
            Work::Write { data, bytes } if data.len() == 1 => {
                let rest = &data[0][done..];
                assert_eq!(rest.len(), *bytes - done, "one buffer is the whole request");
                Left::Write { from: rest.as_ptr(), len: rest.len() as u32, at }
            }
            Work::Write { data, .. } => {
                fill(&mut slot.iovecs, data, done);
                let count = slot.iovecs.len() as u32;
                Left::Gather { iovecs: slot.iovecs.as_ptr(), count, at }
            }
            Work::Flush => Left::Flush,
        }
    }

    /// The kernel has answered: bytes moved, or an errno below zero. `Some` when the request is
    /// over, `None` when it goes on.
    pub(super) fn finish(
        &mut self,
        index: u32,
        result: i32,
        counters: &mut EngineCounters,
    ) -> Option<DiskDone> {
        let slot = &mut self.slots[index as usize];
        match slot.advance(result) {
            Advance::Finished { kind, result } => {
                let done = DiskDone { id: slot.id, result };
                counters.count(kind, &done);
                self.free.push(index);
                Some(done)
            }
            Advance::Again => {
                self.ready.push_back(index);
                None
            }
        }
    }

    /// Requests whose completion was not handed out yet.
    pub(super) fn in_flight(&self) -> usize {
        self.backlog.len() + self.slots.len() - self.free.len()
    }

    /// Number of slots.
    pub(super) fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Never free what the slots hold: the kernel may still write there, and nobody can wait for it.
    pub(super) fn leak(&mut self) {
        self.slots.drain(..).for_each(std::mem::forget);
    }
}

impl Slot {
    fn advance(&mut self, result: i32) -> Advance {
        if result == -libc::EINTR || result == -libc::EAGAIN {
            self.retries += 1;
            if self.retries <= RETRIES_MAX {
                return Advance::Again;
            }
        }
        let work = self.work.take().expect("a submitted slot holds its work");
        let (kind, total) = match &work {
            Work::Read { buf } => (Kind::Read, buf.len()),
            Work::Write { bytes, .. } => (Kind::Write { bytes: *bytes as u64 }, *bytes),
            Work::Flush => (Kind::Flush, 0),
        };
        let Ok(moved) = usize::try_from(result) else {
            return Advance::Finished { kind, result: Err(DiskError::Errno(-result)) };
        };
        match progress(self.done, moved, total) {
            Progress::Complete => {
                let data = match work {
                    Work::Read { buf } => Some(buf.freeze()),
                    Work::Write { .. } | Work::Flush => None,
                };
                Advance::Finished { kind, result: Ok(data) }
            }
            Progress::Again { done } => {
                (self.done, self.retries, self.work) = (done, 0, Some(work));
                Advance::Again
            }
            Progress::AtEnd => Advance::Finished { kind, result: Err(DiskError::Short) },
        }
    }
}

enum Advance {
    Finished { kind: Kind, result: Result<Option<proto::Buf>, DiskError> },
    Again,
}

/// Make `iovecs` the gather list of `data` from byte `done` on.
fn fill(iovecs: &mut Vec<libc::iovec>, data: &BufList, done: usize) {
    iovecs.clear();
    let mut skip = done;
    for buf in data {
        if skip >= buf.len() {
            skip -= buf.len();
            continue;
        }
        let rest = &buf[skip..];
        skip = 0;
        // The kernel only reads through the address of a write's buffer.
        let base = rest.as_ptr().cast_mut().cast();
        iovecs.push(libc::iovec { iov_base: base, iov_len: rest.len() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::BLOCK_BYTES;

    /// A table with one request at the kernel.
    fn with(op: DiskOp) -> (Slots, u32) {
        let mut slots = Slots::new(1);
        slots.queue(DiskRequest { id: IoId(7), op });
        slots.release();
        slots.place_due(&Pool::new(1 << 20));
        let index = slots.take_ready().expect("placed");
        (slots, index)
    }

    fn two_blocks() -> DiskOp {
        let pool = Pool::new(1 << 20);
        let data = [1u8, 2].map(|fill| pool.copy_of(&[fill; BLOCK_BYTES]).freeze());
        DiskOp::Write { offset: 0, data: data.into_iter().collect() }
    }

    #[test]
    fn a_short_write_goes_on_from_its_last_whole_block() {
        let (mut slots, index) = with(two_blocks());
        let mut counters = EngineCounters::default();
        assert!(slots.finish(index, 5000, &mut counters).is_none(), "more is to be written");
        assert_eq!(slots.take_ready(), Some(index), "asked again");
        let Left::Gather { count: 1, at: 4096, .. } = slots.left(index) else {
            panic!("the second block is left")
        };
        let done = slots.finish(index, 4096, &mut counters).expect("all is written");
        assert!(matches!(done.result, Ok(None)));
        assert_eq!((counters.writes, counters.written_bytes, counters.errors), (1, 8192, 0));
    }

    #[test]
    fn a_write_that_moves_nothing_is_short_and_not_repeated_for_ever() {
        let (mut slots, index) = with(two_blocks());
        let mut counters = EngineCounters::default();
        let done = slots.finish(index, 0, &mut counters).expect("over");
        assert_eq!(done.result.err(), Some(DiskError::Short));
        assert_eq!((counters.errors, counters.written_bytes), (1, 0));
    }

    #[test]
    fn interruptions_are_repeated_a_bounded_number_of_times() {
        for errno in [libc::EINTR, libc::EAGAIN] {
            let (mut slots, index) = with(DiskOp::Flush);
            let mut counters = EngineCounters::default();
            for _ in 0..RETRIES_MAX {
                assert!(slots.finish(index, -errno, &mut counters).is_none());
                assert_eq!(slots.take_ready(), Some(index));
            }
            let done = slots.finish(index, -errno, &mut counters).expect("enough of it");
            assert_eq!(done.result.err(), Some(DiskError::Errno(errno)));
        }
    }

    #[test]
    fn a_failed_flush_is_reported_at_once() {
        let (mut slots, index) = with(DiskOp::Flush);
        let mut counters = EngineCounters::default();
        let done = slots.finish(index, -libc::EIO, &mut counters).expect("never asked again");
        assert_eq!(done.result.err(), Some(DiskError::Errno(libc::EIO)));
        assert!(slots.ready().is_empty());
        assert_eq!((counters.flushes, counters.errors), (1, 1));
    }
}
