//! The `aio` engine: Linux native AIO, one context per lane and disk.
//!
//! For hosts where io_uring is forbidden but the older calls are not, which is the common case in
//! containers. With `O_DIRECT` a request is handed to the device and the lane goes on; without it
//! (a file system that has none) `io_submit` does the transfer itself before it returns, which is
//! correct and slow, and for which the `threads` engine may be chosen in the configuration.
//!
//! **Calls.** `io_submit` per batch, `io_getevents` per batch of completions, made directly: the
//! library around them adds nothing but a dependency. The kernel copies control blocks and gather
//! lists inside `io_submit`; the buffers stay in the table of `slots` until the completion came
//! back. A request that the kernel refuses at once (a descriptor that cannot write, a kernel before
//! 4.18 asked for a flush) is answered with its errno at the next `reap`.
//!
//! **Waking.** Every control block names the engine's eventfd, so the kernel signals each
//! completion, asked or not. A signal that came before `arm` is no loss: the waiter's edge was
//! consumed before `reap` looked, or is still to come.
//!
//! **End.** `drop` waits for everything in flight, from any thread (a context belongs to the
//! process), then destroys the context.

use super::slots::{Left, Slots};
use super::{DiskEngine, EngineCounters, PROBE_WAIT, RETRIES_MAX, assert_request};
use crate::disk_file::DiskFd;
use crate::wake::Wake;
use proto::BLOCK_BYTES;
use proto::buffer::Pool;
use proto::disk::{DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

// include/uapi/linux/aio_abi.h
const PREAD: u16 = 0;
const PWRITE: u16 = 1;
const FDSYNC: u16 = 3;
const PWRITEV: u16 = 8;
/// Signal the eventfd named in the control block.
const FLAG_RESFD: u32 = 1;

/// A completion, as the kernel writes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct IoEvent {
    data: u64,
    _control_block: u64,
    result: i64,
    _result_2: i64,
}

/// A context of the kernel. Destroyed when dropped.
struct AioContext(libc::c_ulong);

impl AioContext {
    fn new(depth: u32) -> io::Result<AioContext> {
        let mut id: libc::c_ulong = 0;
        // SAFETY: the call writes one word through the pointer, which points to one.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, depth as libc::c_uint, &mut id) };
        if made == 0 { Ok(AioContext(id)) } else { Err(io::Error::last_os_error()) }
    }

    /// Hand over control blocks; how many the kernel took. An errno concerns the first one.
    ///
    /// # Safety
    /// Every pointer is to a control block, whose buffers and gather list stay where they are until
    /// its completion was seen.
    unsafe fn submit(&self, list: &mut [*mut libc::iocb]) -> Result<usize, Errno> {
        let count = list.len() as libc::c_long;
        // SAFETY: as the caller promises; the list itself is only read during the call.
        let taken = unsafe { libc::syscall(libc::SYS_io_submit, self.0, count, list.as_mut_ptr()) };
        usize::try_from(taken).map_err(|_| last_errno())
    }

    /// Append at least `want` and at most `most` completions to `events`.
    fn wait(&self, want: usize, most: usize, events: &mut Vec<IoEvent>) -> Result<(), Errno> {
        events.reserve(most);
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let limit = if want == 0 { &raw const now } else { std::ptr::null() };
        let (want, most) = (want as libc::c_long, most as libc::c_long);
        let to = events.spare_capacity_mut().as_mut_ptr();
        // SAFETY: there is room for `most` events at `to`; `limit` is null or points to `now`.
        let got = unsafe { libc::syscall(libc::SYS_io_getevents, self.0, want, most, to, limit) };
        let got = usize::try_from(got).map_err(|_| last_errno())?;
        // SAFETY: the kernel has written so many events behind the old end.
        unsafe { events.set_len(events.len() + got) };
        Ok(())
    }
}

impl Drop for AioContext {
    fn drop(&mut self) {
        // SAFETY: no pointer is passed. The one error, an unknown context, would be our bug and
        // harmless here.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).expect("a system call has set it")
}

/// Control blocks of one batch and the list of their addresses, kept for their memory.
struct Batch {
    blocks: Vec<libc::iocb>,
    list: Vec<*mut libc::iocb>,
}

// SAFETY: the addresses are made and used inside one call of `Aio::push` and mean nothing after it.
unsafe impl Send for Batch {}

/// One lane's queue on a file or device. See the head of this module.
pub struct Aio {
    /// `None` when it was given up with a request that is never answered.
    context: Option<AioContext>,
    fd: Arc<DiskFd>,
    wake: Wake,
    pool: Pool,
    slots: Slots,
    batch: Batch,
    /// Completions that were fetched but not looked at.
    events: Vec<IoEvent>,
    /// Answers to requests that the kernel has refused.
    refused: Vec<DiskDone>,
    at_kernel: usize,
    counters: EngineCounters,
}

impl Aio {
    /// Make a context with room for `depth` requests at the device.
    pub fn new(fd: Arc<DiskFd>, pool: Pool, depth: u32) -> io::Result<Aio> {
        assert!(depth > 0 && depth <= 4096, "depth of {depth}");
        let context = AioContext::new(depth)?;
        Ok(Aio {
            context: Some(context),
            fd,
            wake: Wake::new()?,
            pool,
            slots: Slots::new(depth),
            batch: Batch { blocks: Vec::new(), list: Vec::new() },
            events: Vec::with_capacity(depth as usize),
            refused: Vec::new(),
            at_kernel: 0,
            counters: EngineCounters::default(),
        })
    }

    /// Give the kernel everything that has a slot.
    fn push(&mut self) {
        self.slots.place_due(&self.pool);
        while !self.slots.ready().is_empty() {
            self.fill_batch();
            let context = self.context.as_ref().expect("given up only by the probe");
            // SAFETY: `fill_batch` has just listed control blocks that lie in `batch`; their
            // addresses point into slots, which keep them until `Slots::finish` or until drop has
            // seen all completions.
            match unsafe { context.submit(&mut self.batch.list) } {
                Ok(taken) => {
                    assert!(taken > 0, "a list that is not empty is taken or refused");
                    for _ in 0..taken {
                        self.slots.take_ready().expect("it was in the list");
                    }
                    self.at_kernel += taken;
                }
                // Out of requests or memory: completions under way will bring us back.
                Err(Errno::AGAIN | Errno::INTR) if self.at_kernel > 0 => return,
                Err(errno) => {
                    let index = self.slots.take_ready().expect("it was in the list");
                    let answer = -errno.raw_os_error();
                    self.refused.extend(self.slots.finish(index, answer, &mut self.counters));
                    self.wake.signal();
                    // With nothing under way nobody else would bring us back to the rest.
                    if matches!(errno, Errno::AGAIN | Errno::INTR) {
                        return;
                    }
                }
            }
        }
    }

    fn fill_batch(&mut self) {
        let Batch { blocks, list } = &mut self.batch;
        blocks.clear();
        list.clear();
        let file = self.fd.as_fd().as_raw_fd() as u32;
        for nth in 0..self.slots.ready().len() {
            let index = self.slots.ready()[nth];
            // SAFETY: all fields are integers, for which zero is a value.
            let mut block: libc::iocb = unsafe { std::mem::zeroed() };
            block.aio_data = u64::from(index);
            block.aio_fildes = file;
            block.aio_flags = FLAG_RESFD;
            block.aio_resfd = self.wake.as_raw_fd() as u32;
            let (opcode, address, count, at) = match self.slots.left(index) {
                Left::Read { to, len, at } => (PREAD, to as u64, len, at),
                Left::Write { from, len, at } => (PWRITE, from as u64, len, at),
                Left::Gather { iovecs, count, at } => (PWRITEV, iovecs as u64, count, at),
                Left::Flush => (FDSYNC, 0, 0, 0),
            };
            block.aio_lio_opcode = opcode;
            block.aio_buf = address;
            block.aio_nbytes = u64::from(count);
            block.aio_offset = i64::try_from(at).expect("no disk is so large");
            blocks.push(block);
        }
        list.extend(blocks.iter_mut().map(|block| &raw mut *block));
    }

    /// Take completions out of the kernel, without waiting.
    fn fetch(&mut self) {
        if self.at_kernel == 0 || !self.events.is_empty() {
            return;
        }
        let context = self.context.as_ref().expect("given up only by the probe");
        for _ in 0..RETRIES_MAX {
            match context.wait(0, self.at_kernel, &mut self.events) {
                Ok(()) => return,
                Err(Errno::INTR) => {}
                // The context is broken: there is no request to blame.
                Err(errno) => panic!("io_getevents failed: {errno}"),
            }
        }
        // Signals without end: come back later.
        self.wake.signal();
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

    /// Give up with requests at the kernel: nobody waits for them, nothing of theirs is freed.
    fn abandon(&mut self) {
        self.slots.leak();
        self.context.take().into_iter().for_each(std::mem::forget);
        self.at_kernel = 0;
    }
}

impl DiskEngine for Aio {
    fn queue(&mut self, request: DiskRequest) {
        assert_request(&request);
        self.slots.queue(request);
    }

    fn submit(&mut self) {
        self.slots.release();
        self.push();
    }

    fn reap(&mut self, out: &mut Vec<DiskDone>) {
        self.fetch();
        for event in self.events.drain(..) {
            self.at_kernel -= 1;
            let index = u32::try_from(event.data).expect("we numbered the slots");
            let moved = i32::try_from(event.result).expect("transfers are below 2 GiB");
            out.extend(self.slots.finish(index, moved, &mut self.counters));
        }
        out.append(&mut self.refused);
        // Continued requests, and a backlog that may move up into the slots set free.
        self.push();
    }

    fn arm(&mut self) -> bool {
        self.fetch();
        self.events.is_empty() && self.refused.is_empty()
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn in_flight(&self) -> usize {
        self.slots.in_flight() + self.refused.len()
    }

    fn counters(&self) -> EngineCounters {
        self.counters
    }

    fn name(&self) -> &'static str {
        "aio"
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        let Some(context) = &self.context else { return };
        while self.at_kernel > self.events.len() {
            match context.wait(1, self.at_kernel - self.events.len(), &mut self.events) {
                Ok(()) | Err(Errno::INTR) => {}
                // Nobody can wait: memory is cheaper than a device writing into a stranger's.
                Err(_) => return self.slots.leak(),
            }
        }
    }
}

/// Read the first block and flush, through a small context of its own; say how it was done, or why
/// not. The flush, because kernels before 4.18 have none here, and a lane stops when one fails.
pub(super) fn probe(fd: &Arc<DiskFd>) -> Result<&'static str, String> {
    let mut engine = Aio::new(Arc::clone(fd), Pool::new(BLOCK_BYTES), 4).map_err(|error| {
        if error.raw_os_error() == Some(libc::EAGAIN) {
            "no room for its requests; raise the sysctl fs.aio-max-nr".to_owned()
        } else {
            error.to_string()
        }
    })?;
    for op in [DiskOp::Read { offset: 0, len: BLOCK_BYTES as u32 }, DiskOp::Flush] {
        engine.queue(DiskRequest { id: IoId(0), op });
        engine.submit();
        let mut done = Vec::new();
        while done.is_empty() {
            if !engine.wait_one() {
                engine.abandon();
                return Err(format!(
                    "a request was not answered within {} s",
                    PROBE_WAIT.as_secs()
                ));
            }
            engine.reap(&mut done);
        }
        match done[0].result {
            // A disk that is still shorter than a block has answered, too.
            Ok(_) | Err(DiskError::Short) => {}
            Err(DiskError::Errno(errno)) => {
                return Err(io::Error::from_raw_os_error(errno).to_string());
            }
        }
    }
    Ok("one read and one flush done")
}
