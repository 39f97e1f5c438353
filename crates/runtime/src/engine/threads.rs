//! The `threads` engine: pread, pwritev and fdatasync on worker threads.
//!
//! For hosts where io_uring is forbidden (containers, hardened kernels) and as the plain reading of
//! the engine contract that `uring` is compared with. A job carries its buffers to the worker and
//! back, so nothing is shared but the list of completions. Dropping the engine closes the job
//! channel and joins the workers, which finish what they were given.

use super::calls::{Job, perform};
use super::{DiskEngine, EngineCounters, Kind, assert_request};
use crate::disk_file::DiskFd;
use crate::thread;
use crate::wake::Wake;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use proto::buffer::Pool;
use proto::disk::{DiskDone, DiskRequest};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Worker threads of one engine: the number of I/Os that a device sees at once. More threads than
/// this cost more in context switches than the additional depth brings.
const WORKERS: usize = 8;

/// What the workers and the lane's thread share.
struct Shared {
    fd: Arc<DiskFd>,
    done: Mutex<Vec<(DiskDone, Kind)>>,
    armed: AtomicBool,
    wake: Wake,
}

/// One lane's queue on a file or device. See the head of this module.
pub struct Threads {
    shared: Arc<Shared>,
    pool: Pool,
    jobs: Option<Sender<Job>>,
    workers: Vec<JoinHandle<()>>,
    queued: VecDeque<Job>,
    /// Jobs at the front of the queue that `submit` has released.
    due: usize,
    reaped: Vec<(DiskDone, Kind)>,
    in_flight: usize,
    counters: EngineCounters,
}

impl Threads {
    /// Start the workers. At most `depth` requests are handed to them at a time.
    pub fn new(fd: Arc<DiskFd>, pool: Pool, depth: u32) -> io::Result<Threads> {
        assert!(depth > 0, "an engine without depth never does anything");
        let (jobs, inbox) = bounded(depth as usize);
        let shared = Arc::new(Shared {
            fd,
            done: Mutex::new(Vec::new()),
            armed: AtomicBool::new(false),
            wake: Wake::new()?,
        });
        let mut engine = Threads {
            shared,
            pool,
            jobs: Some(jobs),
            workers: Vec::with_capacity(WORKERS),
            queued: VecDeque::new(),
            due: 0,
            reaped: Vec::new(),
            in_flight: 0,
            counters: EngineCounters::default(),
        };
        for index in 0..WORKERS {
            let (shared, inbox) = (Arc::clone(&engine.shared), inbox.clone());
            let worker = thread::spawn(&format!("disk-io-{index}"), move || work(&shared, &inbox))?;
            engine.workers.push(worker);
        }
        Ok(engine)
    }
}

impl Threads {
    /// Give the workers what is due, as far as the depth allows.
    fn hand_over(&mut self) {
        let jobs = self.jobs.as_ref().expect("taken only by drop");
        while self.due > 0 {
            let job = self.queued.pop_front().expect("what is due is there");
            match jobs.try_send(job) {
                Ok(()) => self.due -= 1,
                Err(TrySendError::Full(job)) => return self.queued.push_front(job),
                Err(TrySendError::Disconnected(_)) => unreachable!("workers live until drop"),
            }
        }
    }
}

impl DiskEngine for Threads {
    fn queue(&mut self, request: DiskRequest) {
        assert_request(&request);
        self.queued.push_back(Job::new(request, &self.pool));
        self.in_flight += 1;
    }

    fn submit(&mut self) {
        self.due = self.queued.len();
        self.hand_over();
    }

    fn reap(&mut self, out: &mut Vec<DiskDone>) {
        let shared = &self.shared;
        std::mem::swap(&mut self.reaped, &mut shared.done.lock().expect(NO_PANIC));
        self.in_flight -= self.reaped.len();
        for (done, kind) in self.reaped.drain(..) {
            self.counters.count(kind, &done);
            out.push(done);
        }
        // Room has appeared: the backlog moves up.
        self.hand_over();
    }

    fn arm(&mut self) -> bool {
        // Before the look at the list: a worker that pushes after the look sees the flag, because
        // both happen under the list's lock or later.
        self.shared.armed.store(true, Ordering::SeqCst);
        let idle = self.shared.done.lock().expect(NO_PANIC).is_empty();
        if !idle {
            self.shared.armed.store(false, Ordering::SeqCst);
        }
        idle
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn counters(&self) -> EngineCounters {
        self.counters
    }

    fn name(&self) -> &'static str {
        "threads"
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        drop(self.jobs.take());
        for worker in self.workers.drain(..) {
            // A worker that panicked has aborted the process, so there is no error to see.
            let _ = worker.join();
        }
    }
}

const NO_PANIC: &str = "no panic happens under this lock";

/// A worker's life: until the engine drops the sending end.
fn work(shared: &Shared, inbox: &Receiver<Job>) {
    while let Ok(job) = inbox.recv() {
        let finished = perform(shared.fd.as_fd(), job);
        shared.done.lock().expect(NO_PANIC).push(finished);
        if shared.armed.swap(false, Ordering::SeqCst) {
            shared.wake.signal();
        }
    }
}
