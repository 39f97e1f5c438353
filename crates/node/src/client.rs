//! A volume for programs: blocking reads and writes over a session on a reactor of its own.
//!
//! **What it owns.** One thread, one session. [`Volume`] may be used from any number of threads;
//! their requests are in flight together. A request waits as long as the volume does: for ever, if
//! no time limit was given, as with a disk. Who must not wait so long uses [`Volume::begin`] and
//! looks for the answer now and then.
//!
//! **What it costs.** One hand-over to the reactor's thread and back per request, and a copy of the
//! data into or out of aligned buffers.

use crate::link::{self, Answer, ClientEvent, Events, Link, Outcome};
use crate::{ClientProblem, VolumeSpec};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use proto::Pool;
use proto::block::{BlockData, BlockOp, BlockRequest};
use proto::buffer::BUFFER_BYTES_MAX;
use proto::disk::{BufList, DiskDone};
use proto::frame::Frame;
use proto::id_map::IdMap;
use runtime::RuntimeError;
use runtime::reactor::{
    Application, CloseReason, ConnId, Context, DiskIndex, Handle, ListenerId, Opened, Options,
    SPIN_MAX, spawn,
};
use shard::session::{Counters, PathId, REQUEST_BYTES_MAX};
use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Requests and commands that may wait.
const COMMANDS_MAX: usize = 1024;
/// Free buffers kept, per size class.
const POOL_BYTES: usize = 16 << 20;
/// Data of one buffer.
const CHUNK_BYTES: usize = 1 << 20;
const _: () = assert!(CHUNK_BYTES <= BUFFER_BYTES_MAX);

/// Longest READ or WRITE in one request; longer ones take several.
pub const TRANSFER_BYTES_MAX: usize = REQUEST_BYTES_MAX as usize;

enum Command {
    Io { op: BlockOp, answer: Answer<BlockData> },
    Update { spec: Box<VolumeSpec>, answer: Answer<()> },
    Counters { answer: Answer<Counters> },
    Close { answer: Answer<()> },
}

/// A request under way.
#[derive(Debug)]
pub struct Pending(Receiver<Result<BlockData, ClientProblem>>);

impl Pending {
    /// Wait for the answer, for ever.
    pub fn wait(self) -> Result<BlockData, ClientProblem> {
        // The sender is dropped without an answer when the reactor ends.
        self.0.recv().unwrap_or(Err(ClientProblem::Stopped))
    }

    /// Wait for a while. `None`: not yet.
    #[must_use]
    pub fn wait_for(&self, time: Duration) -> Option<Result<BlockData, ClientProblem>> {
        match self.0.recv_timeout(time) {
            Ok(result) => Some(result),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(ClientProblem::Stopped)),
        }
    }
}

/// An open volume.
pub struct Volume {
    handle: Handle<Command>,
    events: Arc<Events>,
    pool: Pool,
    size_bytes: Arc<AtomicU64>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Volume {
    /// Open a volume. Connections come about in the background; requests wait for them.
    pub fn open(
        cluster_id: [u8; 16],
        spec: VolumeSpec,
        io_timeout: Option<Duration>,
    ) -> Result<Volume, ClientProblem> {
        let events = Events::new()
            .map_err(|source| RuntimeError::SystemFailed { action: "make an eventfd", source })?;
        let events = Arc::new(events);
        let size_bytes = Arc::new(AtomicU64::new(spec.size_bytes()));
        let pool = Pool::new(POOL_BYTES);
        let options = Options {
            name: "volume".to_owned(),
            command_capacity: COMMANDS_MAX,
            spin: SPIN_MAX,
            pool: pool.clone(),
        };
        // Longer than 500 years is for ever, too.
        let nanos = io_timeout.and_then(|time| u64::try_from(time.as_nanos()).ok());
        let session = link::options(cluster_id, nanos);
        let (shown, size) = (Arc::clone(&events), Arc::clone(&size_bytes));
        let running = spawn(options, Vec::new(), move || App {
            opening: Some((session, spec)),
            link: None,
            events: shown,
            size_bytes: size,
            roles: IdMap::default(),
            waiting: IdMap::default(),
            count: 0,
        })?;
        let thread = Mutex::new(Some(running.thread));
        Ok(Volume { handle: running.handle, events, pool, size_bytes, thread })
    }

    /// Size in bytes, as last told.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Begin a request.
    pub fn begin(&self, op: BlockOp) -> Result<Pending, ClientProblem> {
        link::begin(&self.handle, |answer| Command::Io { op, answer }).map(Pending)
    }

    /// Copy bytes into buffers that a request can carry; at most [`TRANSFER_BYTES_MAX`].
    #[must_use]
    pub fn buffers(&self, bytes: &[u8]) -> BufList {
        assert!(bytes.len() <= TRANSFER_BYTES_MAX, "cut by the caller");
        bytes.chunks(CHUNK_BYTES).map(|chunk| self.pool.copy_of(chunk).freeze()).collect()
    }

    /// Fill `into` with what is at `offset`.
    pub fn pread(&self, offset: u64, into: &mut [u8]) -> Result<(), ClientProblem> {
        let mut at = offset;
        for part in into.chunks_mut(TRANSFER_BYTES_MAX) {
            let len = u32::try_from(part.len()).expect("at most 32 MiB");
            let data = self.begin(BlockOp::Read { offset: at, len })?.wait()?;
            copy_out(&data, part);
            at = at.saturating_add(u64::from(len));
        }
        Ok(())
    }

    /// Write `bytes` at `offset`. On stable media when it returns.
    pub fn pwrite(&self, offset: u64, bytes: &[u8]) -> Result<(), ClientProblem> {
        let mut at = offset;
        for part in bytes.chunks(TRANSFER_BYTES_MAX) {
            let data = self.buffers(part);
            self.begin(BlockOp::Write { offset: at, data })?.wait()?;
            at = at.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    /// A barrier over completed writes.
    pub fn flush(&self) -> Result<(), ClientProblem> {
        self.begin(BlockOp::Flush)?.wait().map(drop)
    }

    /// Forget `len` bytes; they read as zeros.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), ClientProblem> {
        self.begin(BlockOp::Discard { offset, len })?.wait().map(drop)
    }

    /// Make `len` bytes zero.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), ClientProblem> {
        let op = BlockOp::WriteZeroes { offset, len, keep_allocated: false };
        self.begin(op)?.wait().map(drop)
    }

    /// Tell a newer description.
    pub fn update(&self, spec: VolumeSpec) -> Result<(), ClientProblem> {
        let spec = Box::new(spec);
        link::ask(&self.handle, |answer| Command::Update { spec, answer })
    }

    /// What its session has done so far.
    pub fn counters(&self) -> Result<Counters, ClientProblem> {
        link::ask(&self.handle, |answer| Command::Counters { answer })
    }

    /// Becomes readable when [`Volume::drain`] has something.
    #[must_use]
    pub fn event_fd(&self) -> RawFd {
        self.events.fd()
    }

    /// What has happened since the last call. The handle in it is 0.
    #[must_use]
    pub fn drain(&self) -> Vec<ClientEvent> {
        self.events.drain()
    }

    /// End it: requests under way are answered with CANCELLED. Later calls do nothing.
    pub fn close(&self) {
        let thread = self.thread.lock().expect("no panic happens under this lock").take();
        if let Some(thread) = thread {
            // Refused only if it is behind: then those who wait find their answer's sender gone.
            let _ = link::ask(&self.handle, |answer| Command::Close { answer });
            self.handle.stop();
            thread.join().expect("a panic there aborts the process");
        }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.close();
    }
}

/// Copy the data of a READ to where it is wanted.
pub fn copy_out(data: &BlockData, into: &mut [u8]) {
    let mut at = 0;
    for buf in data {
        into[at..at + buf.len()].copy_from_slice(buf);
        at += buf.len();
    }
    assert_eq!(at, into.len(), "the session brings as many bytes as were asked for");
}

struct App {
    /// Taken in `start`.
    opening: Option<(shard::session::Options, VolumeSpec)>,
    link: Option<Link>,
    events: Arc<Events>,
    size_bytes: Arc<AtomicU64>,
    roles: IdMap<ConnId, PathId>,
    waiting: IdMap<u64, Answer<BlockData>>,
    count: u64,
}

impl App {
    /// Let the session make a step, and pass on what it brings.
    fn step<T>(
        &mut self,
        ctx: &mut Context,
        act: impl FnOnce(&mut Link, &mut Context, &mut Outcome) -> T,
    ) -> T {
        let mut outcome = Outcome::default();
        let link = self.link.as_mut().expect("start() is the first call");
        let result = act(link, ctx, &mut outcome);
        self.follow(outcome);
        result
    }

    fn follow(&mut self, outcome: Outcome) {
        self.roles.extend(outcome.begun);
        for shard in outcome.conf_needed {
            self.events.conf_needed(0, shard);
        }
        for (id, result) in outcome.replies {
            let to = self.waiting.remove(&id).expect("one reply for each request");
            link::answer(&to, result.map_err(ClientProblem::of_reply));
        }
    }
}

impl Application for App {
    type Command = Command;

    fn start(&mut self, ctx: &mut Context) {
        let (options, spec) = self.opening.take().expect("start() is called once");
        let mut outcome = Outcome::default();
        self.link = Some(Link::open(ctx, options, spec, &mut outcome));
        self.follow(outcome);
    }

    fn command(&mut self, ctx: &mut Context, command: Command) {
        match command {
            Command::Io { op, answer } => {
                self.count += 1;
                let id = self.count;
                self.waiting.insert(id, answer);
                self.step(ctx, |link, ctx, out| link.submit(ctx, BlockRequest { id, op }, out));
            }
            Command::Update { spec, answer } => {
                let result = self.step(ctx, |link, ctx, out| link.configure(ctx, *spec, out));
                let size = self.link.as_ref().map_or(0, |link| link.session().size_bytes());
                self.size_bytes.store(size, Ordering::Release);
                link::answer(&answer, result);
            }
            Command::Counters { answer } => {
                let counters = self.link.as_ref().map(|link| link.session().counters());
                link::answer(&answer, counters.ok_or(ClientProblem::Stopped));
            }
            Command::Close { answer } => {
                self.step(ctx, |link, ctx, out| link.end(ctx, out));
                assert!(self.waiting.is_empty(), "the end answers everyone");
                link::answer(&answer, Ok(()));
                ctx.stop();
            }
        }
    }

    fn opened(&mut self, ctx: &mut Context, conn: ConnId, _how: Opened) {
        // It may have been given up in the very iteration in which it came about.
        let Some(path) = self.roles.get(&conn).copied() else { return };
        self.step(ctx, |link, ctx, out| link.opened(ctx, path, out));
    }

    fn frame(&mut self, ctx: &mut Context, conn: ConnId, frame: Frame) {
        let path = *self.roles.get(&conn).expect("a connection has a role until it has ended");
        self.step(ctx, |link, ctx, out| link.frame(ctx, path, frame, out));
    }

    fn closed(&mut self, ctx: &mut Context, conn: ConnId, _reason: CloseReason) {
        let path = self.roles.remove(&conn).expect("a connection ends once");
        self.step(ctx, |link, ctx, out| link.closed(ctx, path, out));
    }

    fn timer(&mut self, ctx: &mut Context) {
        self.step(ctx, |link, ctx, out| link.tick(ctx, out));
    }

    fn idle(&mut self, ctx: &mut Context) {
        ctx.set_timer(self.link.as_ref().and_then(|link| link.session().wake_at()));
    }

    fn disk(&mut self, _ctx: &mut Context, _disk: DiskIndex, _done: &mut Vec<DiskDone>) {}

    fn accepted(&mut self, _ctx: &mut Context, _listener: ListenerId, _socket: OwnedFd) {}
}

const _: fn() = || {
    fn is_shared<T: Send + Sync>() {}
    is_shared::<Volume>();
    is_shared::<crate::Gateway>();
};
