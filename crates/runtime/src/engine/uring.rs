//! The `uring` engine: one io_uring per lane and disk.
//!
//! **Ring.** `SINGLE_ISSUER | DEFER_TASKRUN` where the kernel has them (6.1): completions are
//! processed when the lane's thread asks, not by interrupting it. Else `COOP_TASKRUN` (5.19), else
//! a plain ring. The ring is created disabled and enabled at the first `submit`, so that it may be
//! made by the thread that opens disks and belongs to the thread that runs the lane.
//!
//! **Slots.** The kernel holds raw addresses of buffers and gather lists; both live in the table of
//! `slots` until the completion came back. As there are never more requests at the kernel than
//! slots, and the completion queue is twice as long, it cannot overflow.
//!
//! **Waking.** In deferred mode the eventfd is switched off while the lane is awake: the ring's
//! flags say for free whether there is work. In the other modes it stays on, because there the
//! kernel does not order its look at the switch after the posting of the completion.
//!
//! **End.** `drop` waits for everything in flight. If the ring refuses to wait (it was started on
//! another thread), the slots are leaked: memory is cheaper than a device writing into a
//! stranger's.

use super::slots::{Left, Slots};
use super::{DiskEngine, EngineCounters, PROBE_WAIT, assert_request};
use crate::disk_file::DiskFd;
use crate::wake::Wake;
use io_uring::{IoUring, opcode, squeue, types};
use proto::BLOCK_BYTES;
use proto::buffer::Pool;
use proto::disk::{DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// The only registered file.
const FILE: types::Fixed = types::Fixed(0);

/// One lane's queue on a file or device. See the head of this module.
pub struct Uring {
    ring: IoUring,
    // Held so that the registered descriptors stay open and the disk stays locked.
    _fd: Arc<DiskFd>,
    wake: Wake,
    pool: Pool,
    slots: Slots,
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
        Ok(Uring {
            ring,
            _fd: fd,
            wake,
            pool,
            slots: Slots::new(depth),
            at_kernel: 0,
            is_deferred,
            is_started: false,
            counters: EngineCounters::default(),
        })
    }

    /// Move requests into the submission queue and enter the kernel once.
    fn push_and_enter(&mut self) {
        self.slots.place_due(&self.pool);
        if self.slots.ready().is_empty() && self.ring.submission().is_empty() {
            return;
        }
        if !self.is_started {
            self.start();
        }
        let mut queue = self.ring.submission();
        while let Some(index) = self.slots.take_ready() {
            let entry = entry(self.slots.left(index)).user_data(u64::from(index));
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

/// The submission entry for what is left to do.
fn entry(left: Left) -> squeue::Entry {
    match left {
        Left::Read { to, len, at } => opcode::Read::new(FILE, to, len).offset(at).build(),
        Left::Write { from, len, at } => opcode::Write::new(FILE, from, len).offset(at).build(),
        Left::Gather { iovecs, count, at } => {
            opcode::Writev::new(FILE, iovecs, count).offset(at).build()
        }
        Left::Flush => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
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
        self.slots.queue(request);
    }

    fn submit(&mut self) {
        self.slots.release();
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
            self.at_kernel -= 1;
            out.extend(self.slots.finish(index, entry.result(), &mut self.counters));
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
        self.slots.in_flight()
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
                return self.slots.leak();
            }
            while let Some(entry) = self.ring.completion().next() {
                assert!(entry.user_data() < self.slots.depth() as u64, "we numbered the slots");
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
            ring.slots.leak();
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
