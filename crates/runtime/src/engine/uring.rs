//! The `uring` engine: one io_uring per lane and disk.
//!
//! **Ring.** `SINGLE_ISSUER | DEFER_TASKRUN` where the kernel has them (6.1): completions are
//! processed when the lane's thread asks, not by interrupting it. Else `COOP_TASKRUN` (5.19), else
//! a plain ring. The ring is created disabled and enabled at the first `submit`, so that it may be
//! made by the thread that opens disks and belongs to the thread that runs the lane.
//!
//! **Slots.** The kernel holds raw addresses of buffers and gather lists. Both live in a slot of a
//! table that never moves or shrinks, from `queue` until the completion came back. A request beyond
//! the depth waits in a backlog without a slot. As there are never more requests at the kernel than
//! slots, and the completion queue is twice as long, it cannot overflow.
//!
//! **Waking.** In deferred mode the eventfd is switched off while the lane is awake: the ring's
//! flags say for free whether there is work. In the other modes it stays on, because there the
//! kernel does not order its look at the switch after the posting of the completion.
//!
//! **End.** `drop` waits for everything in flight. If the ring refuses to wait (it was started on
//! another thread), the slots are leaked: memory is cheaper than a device writing into a
//! stranger's.

use super::{DiskEngine, EngineCounters, Kind, PROBE_WAIT, Progress, RETRIES_MAX};
use super::{assert_request, progress};
use crate::disk_file::DiskFd;
use crate::wake::Wake;
use io_uring::{IoUring, opcode, squeue, types};
use proto::BLOCK_BYTES;
use proto::buffer::{BufMut, Pool};
use proto::disk::{BufList, DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// The only registered file.
const FILE: types::Fixed = types::Fixed(0);

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

/// One lane's queue on a file or device. See the head of this module.
pub struct Uring {
    ring: IoUring,
    // Held so that the registered descriptors stay open and the disk stays locked.
    _fd: Arc<DiskFd>,
    wake: Wake,
    pool: Pool,
    slots: Vec<Slot>,
    free: Vec<u32>,
    backlog: VecDeque<DiskRequest>,
    /// Requests at the front of the backlog that `submit` has released.
    due: usize,
    /// Slots whose request has to be given to the kernel (again).
    ready: Vec<u32>,
    at_kernel: usize,
    is_deferred: bool,
    is_started: bool,
    counters: EngineCounters,
}

impl Uring {
    /// Make a ring with room for `depth` requests at the device.
    pub fn new(fd: Arc<DiskFd>, pool: Pool, depth: u32) -> io::Result<Uring> {
        assert!(depth > 0 && depth <= 4096, "depth of {depth}");
        let (ring, is_deferred) = build(depth)?;
        let wake = Wake::new()?;
        ring.submitter().register_files(&[fd.as_fd().as_raw_fd()])?;
        ring.submitter().register_eventfd(wake.as_raw_fd())?;
        let slot = |_| Slot {
            id: IoId(0),
            offset: 0,
            done: 0,
            retries: 0,
            work: None,
            iovecs: Vec::new(),
        };
        Ok(Uring {
            ring,
            _fd: fd,
            wake,
            pool,
            slots: (0..depth).map(slot).collect(),
            free: (0..depth).rev().collect(),
            backlog: VecDeque::new(),
            due: 0,
            ready: Vec::new(),
            at_kernel: 0,
            is_deferred,
            is_started: false,
            counters: EngineCounters::default(),
        })
    }

    /// Give the request a slot and let it wait for `submit`.
    fn place(&mut self, request: DiskRequest) {
        let index = self.free.pop().expect("checked by the callers");
        let slot = &mut self.slots[index as usize];
        assert!(slot.work.is_none(), "a free slot holds nothing");
        (slot.id, slot.done, slot.retries) = (request.id, 0, 0);
        (slot.offset, slot.work) = match request.op {
            DiskOp::Read { offset, len } => {
                (offset, Some(Work::Read { buf: self.pool.alloc(len as usize) }))
            }
            DiskOp::Write { offset, data } => {
                let bytes = data.iter().map(|buf| buf.len()).sum();
                (offset, Some(Work::Write { data, bytes }))
            }
            DiskOp::Flush => (0, Some(Work::Flush)),
        };
        self.ready.push(index);
    }

    /// Move requests into the submission queue and enter the kernel once.
    fn push_and_enter(&mut self) {
        while self.due > 0 && !self.free.is_empty() {
            let request = self.backlog.pop_front().expect("what is due is there");
            self.due -= 1;
            self.place(request);
        }
        if self.ready.is_empty() && self.ring.submission().is_empty() {
            return;
        }
        if !self.is_started {
            self.start();
        }
        let mut queue = self.ring.submission();
        for index in self.ready.drain(..) {
            let entry = self.slots[index as usize].entry().user_data(u64::from(index));
            // SAFETY: the entry's addresses point into the slot's buffers and gather list, which
            // stay in place until its completion is seen (`finish`) or drop has drained the ring.
            unsafe { queue.push(&entry) }.expect("the ring has an entry for every slot");
            self.at_kernel += 1;
        }
        drop(queue);
        self.enter(0);
    }

    fn start(&mut self) {
        // Makes the calling thread the ring's only issuer.
        self.ring.submitter().register_enable_rings().expect("a ring is enabled once");
        if self.is_deferred {
            self.ring.completion().disable_eventfd();
        }
        self.is_started = true;
    }

    /// Submit what is queued, run deferred completion work, wait for `want` completions.
    fn enter(&mut self, want: usize) {
        match self.ring.submit_and_wait(want) {
            Ok(_) => {}
            // EINTR: a signal came first. EAGAIN, EBUSY: the kernel is short of memory or
            // wants completions taken first. The entries stay queued; the signal brings us back.
            Err(error) if is_passing(&error) => self.wake.signal(),
            // Anything else means that the ring itself is broken: there is no request to blame.
            Err(error) => panic!("io_uring_enter failed: {error}"),
        }
    }

    /// Handle one completion. `Some` when the request is finished, `None` when it goes on.
    fn finish(&mut self, index: u32, result: i32) -> Option<DiskDone> {
        self.at_kernel -= 1;
        let slot = &mut self.slots[index as usize];
        match slot.advance(result) {
            Advance::Finished { kind, result } => {
                let done = DiskDone { id: slot.id, result };
                self.counters.count(kind, &done);
                self.free.push(index);
                Some(done)
            }
            Advance::Again => {
                self.ready.push(index);
                None
            }
        }
    }

    /// Wait up to [`PROBE_WAIT`] for a completion; false if none came.
    fn wait_one(&mut self) -> bool {
        if !self.arm() {
            return true;
        }
        let limit = Timespec::try_from(PROBE_WAIT).expect("ten seconds fit");
        let mut fds = [PollFd::new(&self.wake, PollFlags::IN)];
        let is_ready = matches!(poll(&mut fds, Some(&limit)), Ok(1..));
        self.wake.clear();
        is_ready
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::INTR | Errno::AGAIN | Errno::BUSY))
}

impl Slot {
    /// The submission entry for what is left to do.
    fn entry(&mut self) -> squeue::Entry {
        let at = self.offset + self.done as u64;
        let done = self.done;
        match self.work.as_mut().expect("a submitted slot holds its work") {
            Work::Read { buf } => {
                let rest = &mut buf[done..];
                opcode::Read::new(FILE, rest.as_mut_ptr(), rest.len() as u32).offset(at).build()
            }
            Work::Write { data, bytes } if data.len() == 1 => {
                let rest = &data[0][done..];
                assert_eq!(rest.len(), *bytes - done, "one buffer is the whole request");
                opcode::Write::new(FILE, rest.as_ptr(), rest.len() as u32).offset(at).build()
            }
            Work::Write { data, .. } => {
                fill(&mut self.iovecs, data, done);
                let count = self.iovecs.len() as u32;
                opcode::Writev::new(FILE, self.iovecs.as_ptr(), count).offset(at).build()
            }
            Work::Flush => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
        }
    }

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

fn build(depth: u32) -> io::Result<(IoUring, bool)> {
    let mut modern = IoUring::builder();
    modern.setup_r_disabled().setup_clamp().setup_single_issuer();
    modern.setup_defer_taskrun().setup_taskrun_flag();
    let refused = match modern.build(depth) {
        Ok(ring) => return Ok((ring, true)),
        Err(error) => error,
    };
    // EINVAL: a kernel that does not know the flags. Anything else (EPERM, ENOSYS, ENOMEM) would
    // meet the older forms as well.
    if refused.raw_os_error() != Some(libc::EINVAL) {
        return Err(refused);
    }
    let mut middle = IoUring::builder();
    middle.setup_r_disabled().setup_clamp().setup_coop_taskrun();
    if let Ok(ring) = middle.build(depth) {
        return Ok((ring, false));
    }
    let mut plain = IoUring::builder();
    plain.setup_r_disabled().setup_clamp();
    plain.build(depth).map(|ring| (ring, false))
}

impl DiskEngine for Uring {
    fn queue(&mut self, request: DiskRequest) {
        assert_request(&request);
        self.backlog.push_back(request);
    }

    fn submit(&mut self) {
        self.due = self.backlog.len();
        self.push_and_enter();
    }

    fn reap(&mut self, out: &mut Vec<DiskDone>) {
        if !self.is_started {
            return;
        }
        if self.is_deferred {
            self.ring.completion().disable_eventfd();
        }
        let submission = self.ring.submission();
        let has_deferred_work = submission.taskrun() || submission.cq_overflow();
        drop(submission);
        if has_deferred_work {
            self.enter(0);
        }
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            let index = u32::try_from(entry.user_data()).expect("we numbered the slots");
            out.extend(self.finish(index, entry.result()));
        }
        // Continued requests, and a backlog that may move up into the slots set free.
        self.push_and_enter();
    }

    fn arm(&mut self) -> bool {
        if !self.is_started {
            return true;
        }
        if self.is_deferred {
            self.ring.completion().enable_eventfd();
            // The switch must be visible before the look below: the kernel looks at the switch
            // after it has queued the work and set the flag.
            fence(Ordering::SeqCst);
        }
        let has_deferred_work = self.ring.submission().taskrun();
        let idle = !has_deferred_work && self.ring.completion().is_empty();
        if !idle && self.is_deferred {
            self.ring.completion().disable_eventfd();
        }
        idle
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn in_flight(&self) -> usize {
        self.backlog.len() + self.slots.len() - self.free.len()
    }

    fn counters(&self) -> EngineCounters {
        self.counters
    }

    fn name(&self) -> &'static str {
        "uring"
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        while self.at_kernel > 0 {
            let entered = self.ring.submit_and_wait(1);
            if entered.is_err_and(|error| !is_passing(&error)) {
                return self.slots.drain(..).for_each(std::mem::forget);
            }
            while let Some(entry) = self.ring.completion().next() {
                assert!(entry.user_data() < self.slots.len() as u64, "we numbered the slots");
                self.at_kernel -= 1;
            }
        }
    }
}

/// Read the first block through a small ring of its own; say how it was done, or why not.
///
/// A ring of its own because the first submission binds a ring to its thread, and the prober is
/// rarely the lane.
pub(super) fn probe_read(fd: &Arc<DiskFd>) -> Result<&'static str, String> {
    let pool = Pool::new(BLOCK_BYTES);
    let mut ring = Uring::new(Arc::clone(fd), pool, 4).map_err(|error| error.to_string())?;
    let op = DiskOp::Read { offset: 0, len: BLOCK_BYTES as u32 };
    ring.queue(DiskRequest { id: IoId(0), op });
    ring.submit();
    let mut done = Vec::new();
    while done.is_empty() {
        if !ring.wait_one() {
            ring.at_kernel = 0;
            ring.slots.drain(..).for_each(std::mem::forget);
            return Err(format!("a read was not answered within {} s", PROBE_WAIT.as_secs()));
        }
        ring.reap(&mut done);
    }
    match done[0].result {
        // A disk that is still shorter than a block has answered, too.
        Ok(_) | Err(DiskError::Short) if ring.is_deferred => Ok("one read done, deferred task run"),
        Ok(_) | Err(DiskError::Short) => Ok("one read done"),
        Err(DiskError::Errno(errno)) => Err(io::Error::from_raw_os_error(errno).to_string()),
    }
}
