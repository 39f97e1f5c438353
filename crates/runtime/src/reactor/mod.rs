//! The reactor: the loop of one lane's thread. Disks, connections, commands and one timer come
//! together in one wait; everything else is the application's.
//!
//! **What it owns.** The lane's disk engines, its sockets with what was received and what is to be
//! sent, its listeners, and the queue of commands. One thread runs it and shares nothing with other
//! reactors; [`Handle`] is the only way in.
//!
//! **One iteration.** wait (epoll; the engines' and the command eventfd; timeout = next deadline,
//! at most [`IDLE_TICK_MS`]) -> commands -> sockets: accept, receive, frames -> disk completions ->
//! deadlines, timer -> `idle` -> one send call per connection with frames -> submit to the disks,
//! and if that completed something at once (memory, page cache) again completions, `idle` and what
//! these brought is sent -> report ended connections. So submissions and replies leave in
//! batches that grow with the load.
//!
//! **What it guarantees.** A connection that was opened is closed exactly once, with a reason, and
//! no frame of it is handed out after that. Frames of one connection arrive in order and leave in
//! order. Each source gets a bounded share of an iteration, so none can starve the others. The
//! iteration's start is published ([`Handle::age_nanos`]): the heartbeat vouches only for lanes
//! that turn. A panic anywhere in it aborts the process.
//!
//! **What it costs.** With 32 requests of 4 KiB outstanding on one connection about 0.1 system
//! calls per request; no allocation of its own per frame beyond the payload's buffer handle. After
//! an iteration with I/O it may spin (see [`Options::spin`]) before it sleeps, and stops doing so
//! by itself where that does not pay.

mod conn;
mod context;
mod handle;
mod receive;
mod send;
mod socket;
mod spin;
mod table;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod watch;

use crate::engine::DiskEngine;
use crate::error::RuntimeError;
use crate::{clock, thread, wake::Wake};
use conn::{Phase, Received};
use context::Source;
use crossbeam_channel::{Receiver, bounded};
use handle::{Inbox, Shared};
use proto::Tick;
use proto::buffer::Pool;
use proto::disk::DiskDone;
use proto::frame::{Frame, FrameError};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with, sockopt};
use spin::Spin;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

pub use context::{Address, Context};
pub use handle::{Adoption, Handle, ReactorMetrics, Refused};
pub use send::{SEND_QUEUE_BYTES_MAX, SEND_QUEUE_FRAMES_MAX};
pub use watch::DiskLatency;

/// Longest sleep: an idle lane still shows that it lives, five times within the 500 ms after which
/// the heartbeat stops vouching for it.
pub const IDLE_TICK_MS: u64 = 100;
/// Time for a client to complete its handshake.
pub const HANDSHAKE_MS: u64 = 5_000;
/// Time for a finished connection to take its last frames and close.
pub const FINISH_MS: u64 = 1_000;
/// Connections of one reactor.
pub const CONNECTIONS_MAX: usize = 8192;
/// Bytes that may come along with an adopted socket: the limit before authentication.
pub const LEFTOVER_BYTES_MAX: usize = 64 << 10;
/// Longest spin before a sleep.
pub const SPIN_MAX: Duration = Duration::from_micros(20);

/// Events taken from the kernel at a time.
const EVENTS_MAX: usize = 256;
/// Commands handled per iteration.
const COMMANDS_PER_TURN: usize = 256;
/// Frames, and receive calls, of one connection per iteration.
const FRAMES_PER_TURN: usize = 256;
const RECEIVES_PER_TURN: usize = 16;
/// Connections accepted per listener and iteration.
const ACCEPTS_PER_TURN: usize = 64;
/// Rounds of submission and completion in one iteration while completions come at once.
const DISK_ROUNDS_PER_TURN: usize = 4;

/// A connection of one reactor; never used again for another one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ConnId(u64);

/// A listener of one reactor, by the order in which they were made.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ListenerId(pub usize);

/// A disk of one reactor, by its place in the list given to [`spawn`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DiskIndex(pub usize);

/// How a connection came about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Opened {
    /// `Context::connect` has succeeded.
    Connected,
    /// It was handed over by `Handle::adopt` with this token.
    Adopted {
        /// See [`Adoption::token`].
        token: u64,
    },
}

/// Why a connection ended.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CloseReason {
    /// The application ended it.
    #[error("closed by this side")]
    Requested,
    /// The peer closed it between two frames.
    #[error("closed by the peer")]
    PeerClosed,
    /// The peer closed it in the middle of a frame.
    #[error("closed by the peer inside a frame")]
    PeerClosedInsideFrame,
    /// The socket failed: reset, unreachable, timed out.
    #[error("connection failed: {}", std::io::Error::from_raw_os_error(*.0))]
    Failed(i32),
    /// It never came about.
    #[error("cannot connect: {}", std::io::Error::from_raw_os_error(*.0))]
    ConnectFailed(i32),
    /// The peer sent what the protocol does not allow.
    #[error("protocol error: {0}")]
    Framing(FrameError),
    /// The deadline set for it has passed.
    #[error("deadline passed")]
    Deadline,
    /// The peer does not read what it asked for.
    #[error("the peer does not read its replies")]
    SendQueueFull,
}

/// Why a frame was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SendError {
    /// The connection has ended.
    #[error("the connection has ended")]
    Gone,
    /// Its queue is full; the connection is being ended.
    #[error("the send queue is full")]
    Full,
}

/// What runs on a reactor: a lane with its machines, a gateway's front ends, a client session.
///
/// All calls come from the reactor's thread. None may block.
pub trait Application {
    /// What other threads can tell it.
    type Command: Send;

    /// First call, before the first wait.
    fn start(&mut self, ctx: &mut Context);

    /// A command from a [`Handle`].
    fn command(&mut self, ctx: &mut Context, command: Self::Command);

    /// Operations of one disk have finished. Leaves `done` empty or not, it is cleared.
    fn disk(&mut self, ctx: &mut Context, disk: DiskIndex, done: &mut Vec<DiskDone>);

    /// A listener has a connection. To serve it, give it to `ctx.adopt`; dropping it closes it.
    fn accepted(&mut self, ctx: &mut Context, listener: ListenerId, socket: OwnedFd);

    /// A connect has succeeded, or another thread has handed a socket over.
    fn opened(&mut self, ctx: &mut Context, conn: ConnId, how: Opened);

    /// A complete frame.
    fn frame(&mut self, ctx: &mut Context, conn: ConnId, frame: Frame);

    /// A connection has ended. The last call with this id.
    fn closed(&mut self, ctx: &mut Context, conn: ConnId, reason: CloseReason);

    /// The deadline of `ctx.set_timer` has come.
    fn timer(&mut self, ctx: &mut Context);

    /// All events of an iteration were handed out, and what was queued is about to leave. Called
    /// again in the same iteration if the disks complete something at once.
    fn idle(&mut self, ctx: &mut Context);
}

/// What a reactor is made with.
#[derive(Clone)]
pub struct Options {
    /// Name of the thread.
    pub name: String,
    /// Commands that may wait.
    pub command_capacity: usize,
    /// Longest busy wait before a sleep, after an iteration with I/O; at most [`SPIN_MAX`].
    pub spin: Duration,
    /// Where payloads are received.
    pub pool: Pool,
}

/// A running reactor.
pub struct Running<C> {
    /// The way in.
    pub handle: Handle<C>,
    /// Ends when the reactor was stopped.
    pub thread: JoinHandle<()>,
}

/// Start a reactor's thread. `make` builds the application there, so it need not be `Send`.
pub fn spawn<A, F>(
    options: Options,
    engines: Vec<Box<dyn DiskEngine>>,
    make: F,
) -> Result<Running<A::Command>, RuntimeError>
where
    A: Application,
    A::Command: 'static,
    F: FnOnce() -> A + Send + 'static,
{
    assert!(options.spin <= SPIN_MAX, "a spin of {:?} starves other threads", options.spin);
    let shared = Arc::new(Shared {
        wake: Wake::new().map_err(RuntimeError::system("make an eventfd"))?,
        is_asleep: AtomicBool::new(false),
        is_stopping: AtomicBool::new(false),
        loop_tick: AtomicU64::new(clock::now().0),
        oldest_io: AtomicU64::new(u64::MAX),
        metrics: ReactorMetrics::default(),
    });
    let (sender, inbox) = bounded(options.command_capacity);
    let ctx = Context::new(options.pool, engines, Arc::clone(&shared))
        .map_err(RuntimeError::system("make an epoll set"))?;
    let spin = Spin::new(options.spin);
    let body = move || {
        let app = make();
        let (done, look_at) = (Vec::new(), Tick(0));
        Reactor { ctx, inbox, app, spin, done, is_idle_tick: false, look_at }.run();
    };
    let thread =
        thread::spawn(&options.name, body).map_err(RuntimeError::system("start a thread"))?;
    Ok(Running { handle: Handle { inbox: sender, shared }, thread })
}

struct Reactor<A: Application> {
    ctx: Context,
    inbox: Receiver<Inbox<A::Command>>,
    app: A,
    spin: Spin,
    /// Kept between iterations for its memory.
    done: Vec<DiskDone>,
    /// The last wait was a full idle tick without an event.
    is_idle_tick: bool,
    /// When the age of disk operations is looked at next.
    look_at: Tick,
}

impl<A: Application> Reactor<A> {
    fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let mut did_io = false;
        self.begin_turn();
        self.app.start(&mut self.ctx);
        self.finish_turn();
        while !self.ctx.is_stopping && !self.ctx.shared.is_stopping.load(Ordering::Acquire) {
            self.wait(&mut events, did_io);
            self.begin_turn();
            let before = self.work_done();
            self.commands();
            events.iter().for_each(|event| self.event(event));
            self.receive_listed();
            self.reap_disks();
            self.deadlines();
            let found = self.work_done() - before;
            self.ctx.shared.metrics.late_wakes.add(u64::from(self.is_idle_tick && found > 0));
            self.finish_turn();
            did_io = self.work_done() > before;
        }
    }

    /// Everything that came from outside so far.
    fn work_done(&self) -> u64 {
        let metrics = &self.ctx.shared.metrics;
        metrics.received_frames.get() + metrics.disk_done.get() + metrics.commands.get()
    }

    fn begin_turn(&mut self) {
        self.ctx.now = clock::now();
        self.ctx.shared.loop_tick.store(self.ctx.now.0, Ordering::Relaxed);
        self.ctx.shared.metrics.loops.add(1);
        if self.ctx.now >= self.look_at {
            self.look_at = self.ctx.now.after_millis(IDLE_TICK_MS / 2);
            let oldest = self.ctx.disks.iter().filter_map(|disk| disk.watch.oldest()).min();
            self.ctx.shared.oldest_io.store(oldest.map_or(u64::MAX, |at| at.0), Ordering::Relaxed);
        }
    }

    /// Let everything leave that this iteration has brought about.
    fn finish_turn(&mut self) {
        self.app.idle(&mut self.ctx);
        // Before the disks: what goes to other stores is on its way while this one's disk works,
        // which matters where an engine does its work inside `submit`.
        self.send_dirty();
        for _ in 0..DISK_ROUNDS_PER_TURN {
            self.submit_disks();
            if !self.reap_disks() {
                break;
            }
            self.app.idle(&mut self.ctx);
        }
        self.submit_disks();
        self.send_dirty();
        self.report_ended();
    }

    /// Wait for events and put them into `events`.
    fn wait(&mut self, events: &mut Vec<epoll::Event>, did_io: bool) {
        self.is_idle_tick = false;
        if self.has_work() {
            return self.poll(events, 0);
        }
        self.ctx.shared.fall_asleep();
        let engines_idle = self.ctx.disks.iter_mut().all(|disk| disk.engine.arm());
        let is_stopping = self.ctx.shared.is_stopping.load(Ordering::SeqCst);
        if !engines_idle || is_stopping || !self.inbox.is_empty() {
            self.poll(events, 0);
        } else if !(did_io && self.spin_for_events(events)) {
            self.sleep(events);
        }
        self.ctx.shared.awake();
    }

    /// Something is to be done without any further event. (Commands are looked for later, when
    /// their senders know that we are about to sleep.)
    fn has_work(&self) -> bool {
        let ctx = &self.ctx;
        !(ctx.listed.is_empty()
            && ctx.dirty.is_empty()
            && ctx.ended.is_empty()
            && ctx.opened.is_empty())
            || ctx.disks.iter().any(|disk| disk.is_dirty)
    }

    /// Look for events for a short while; true if some came.
    fn spin_for_events(&mut self, events: &mut Vec<epoll::Event>) -> bool {
        let Some(limit) = self.spin.limit_nanos() else { return false };
        let until = clock::now().after_nanos(limit);
        loop {
            self.poll(events, 0);
            if !events.is_empty() || clock::now() >= until {
                self.spin.learn(!events.is_empty());
                return !events.is_empty();
            }
        }
    }

    fn sleep(&mut self, events: &mut Vec<epoll::Event>) {
        self.ctx.shared.metrics.sleeps.add(1);
        let next = [self.ctx.timer, self.ctx.deadlines.first().map(|(tick, _)| *tick)];
        let left = next.into_iter().flatten().min().map_or(u64::MAX, |tick| {
            // Rounded up: waking a moment early would only turn the loop once more.
            tick.0.saturating_sub(clock::now().0).div_ceil(1_000_000)
        });
        self.poll(events, left.min(IDLE_TICK_MS));
        self.is_idle_tick = events.is_empty() && left >= IDLE_TICK_MS;
    }

    fn poll(&mut self, events: &mut Vec<epoll::Event>, timeout_ms: u64) {
        self.ctx.shared.metrics.waits.add(1);
        events.clear();
        let limit = Timespec::try_from(Duration::from_millis(timeout_ms)).expect("a tick is short");
        match epoll::wait(&self.ctx.epoll, spare_capacity(events), Some(&limit)) {
            // EINTR: a signal for this process; look again in the next iteration.
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => panic!("epoll_wait failed: {errno}"),
        }
    }

    fn commands(&mut self) {
        for _ in 0..COMMANDS_PER_TURN {
            let Ok(message) = self.inbox.try_recv() else { return };
            match message {
                Inbox::Command(command) => {
                    self.ctx.shared.metrics.commands.add(1);
                    self.app.command(&mut self.ctx, command);
                }
                Inbox::Adopt(Adoption { socket, framing, leftover, token }) => {
                    match self.ctx.adopt(socket, framing, &leftover) {
                        Ok(id) => self.ctx.opened.push((id, Opened::Adopted { token })),
                        // Too many, or no stream socket. Dropped, and thereby closed; the
                        // application has never heard of it.
                        Err(_) => self.ctx.shared.metrics.refused.add(1),
                    }
                }
            }
        }
    }

    fn event(&mut self, event: &epoll::Event) {
        match Source::from_data(event.data) {
            // The queue, and every engine with requests in flight, is looked at anyway.
            Source::Wake | Source::Disk(_) => {}
            Source::Listener(index) => self.accept(index),
            Source::Conn(id) => self.conn_event(id, event.flags),
        }
    }

    fn conn_event(&mut self, id: ConnId, flags: epoll::EventFlags) {
        // Closed in this very iteration: its events mean nothing any more.
        let Some(conn) = self.ctx.conns.get_mut(id) else { return };
        let end = epoll::EventFlags::RDHUP | epoll::EventFlags::HUP | epoll::EventFlags::ERR;
        if conn.phase == Phase::Connecting {
            match sockopt::socket_error(&conn.socket) {
                Ok(Ok(())) if flags.contains(epoll::EventFlags::OUT) => {
                    conn.phase = Phase::Open;
                    self.ctx.opened.push((id, Opened::Connected));
                }
                Ok(Ok(())) => return,
                Ok(Err(errno)) | Err(errno) => {
                    let reason = CloseReason::ConnectFailed(errno.raw_os_error());
                    return self.ctx.end(id, reason);
                }
            }
        }
        let Some(conn) = self.ctx.conns.get_mut(id) else { return };
        conn.has_hung_up |= flags.intersects(end);
        if flags.intersects(epoll::EventFlags::IN | end) {
            conn.is_readable = true;
        }
        if flags.contains(epoll::EventFlags::OUT) {
            conn.is_writable = true;
            if conn.sender.bytes() > 0 || conn.phase == Phase::Finishing {
                self.ctx.list_dirty(id);
            }
        }
        let Some(conn) = self.ctx.conns.get_mut(id) else { return };
        // Both directions are gone: no reply can reach the peer, paused or not.
        let is_dead = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
        if conn.is_paused && conn.phase == Phase::Open && is_dead {
            let reason = match sockopt::socket_error(&conn.socket) {
                Ok(Ok(())) => CloseReason::PeerClosed,
                Ok(Err(errno)) | Err(errno) => CloseReason::Failed(errno.raw_os_error()),
            };
            return self.ctx.end(id, reason);
        }
        if conn.is_readable {
            self.ctx.list(id);
        }
    }

    fn accept(&mut self, index: usize) {
        for _ in 0..ACCEPTS_PER_TURN {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(&self.ctx.listeners[index].socket, flags) {
                Ok(socket) => self.app.accepted(&mut self.ctx, ListenerId(index), socket),
                Err(Errno::AGAIN) => return,
                // The peer has given up already, or a signal came.
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(_) => {
                    self.ctx.shared.metrics.refused.add(1);
                    break;
                }
            }
        }
        // Out of descriptors, or more are waiting: no edge will tell, so look again at a tick.
        self.ctx.listeners[index].is_postponed = true;
    }

    fn receive_listed(&mut self) {
        self.report_opened();
        let mut listed = std::mem::take(&mut self.ctx.listed);
        for id in listed.drain(..) {
            if let Some(conn) = self.ctx.conns.get_mut(id) {
                conn.is_listed = false;
                self.receive(id);
            }
        }
        give_back(&mut self.ctx.listed, listed);
    }

    fn report_opened(&mut self) {
        for (id, how) in std::mem::take(&mut self.ctx.opened) {
            self.app.opened(&mut self.ctx, id, how);
        }
    }

    /// Hand out what one connection has, within its share of the iteration.
    fn receive(&mut self, id: ConnId) {
        let (mut frames, mut calls) = (0, 0);
        while frames < FRAMES_PER_TURN && calls < RECEIVES_PER_TURN {
            let Some(conn) = self.ctx.conns.get_mut(id) else { return };
            if !conn.wants_receive() {
                return;
            }
            let metrics = &self.ctx.shared.metrics;
            let received = if conn.phase == Phase::Finishing {
                conn.discard()
            } else {
                match conn.receiver.next(&self.ctx.pool) {
                    Ok(Some(frame)) => {
                        metrics.received_frames.add(1);
                        frames += 1;
                        self.app.frame(&mut self.ctx, id, frame);
                        continue;
                    }
                    Ok(None) => conn.receive(&self.ctx.pool, metrics),
                    Err(error) => Received::End(CloseReason::Framing(error)),
                }
            };
            match received {
                Received::Some => calls += 1,
                Received::Nothing => return,
                Received::End(reason) => return self.ctx.end(id, reason),
            }
        }
        self.ctx.list(id);
    }

    /// Hand out disk completions; true if there were any.
    fn reap_disks(&mut self) -> bool {
        let mut any = false;
        for index in 0..self.ctx.disks.len() {
            let engine = &mut self.ctx.disks[index].engine;
            if engine.in_flight() == 0 {
                continue;
            }
            engine.reap(&mut self.done);
            if !self.done.is_empty() {
                any = true;
                let watch = &mut self.ctx.disks[index].watch;
                let now = clock::now();
                self.done.iter_mut().for_each(|done| done.id = watch.end(done.id, now));
                self.ctx.shared.metrics.disk_done.add(self.done.len() as u64);
                self.app.disk(&mut self.ctx, DiskIndex(index), &mut self.done);
                self.done.clear();
            }
        }
        any
    }

    fn submit_disks(&mut self) {
        for disk in &mut self.ctx.disks {
            if std::mem::take(&mut disk.is_dirty) {
                disk.engine.submit();
            }
        }
    }

    fn deadlines(&mut self) {
        let now = self.ctx.now;
        while let Some(&(tick, id)) = self.ctx.deadlines.first()
            && tick <= now
        {
            let _ = self.ctx.deadlines.pop_first();
            let Some(conn) = self.ctx.conns.get_mut(id) else { continue };
            conn.deadline = None;
            let reason = match conn.phase {
                Phase::Finishing => CloseReason::Requested,
                Phase::Connecting | Phase::Open | Phase::Closing => CloseReason::Deadline,
            };
            self.ctx.end(id, reason);
        }
        if self.ctx.timer.is_some_and(|tick| tick <= now) {
            self.ctx.timer = None;
            self.app.timer(&mut self.ctx);
        }
        for index in 0..self.ctx.listeners.len() {
            if std::mem::take(&mut self.ctx.listeners[index].is_postponed) {
                self.accept(index);
            }
        }
    }

    fn send_dirty(&mut self) {
        let mut dirty = std::mem::take(&mut self.ctx.dirty);
        for id in dirty.drain(..) {
            let Some(conn) = self.ctx.conns.get_mut(id) else { continue };
            conn.is_dirty = false;
            match conn.phase {
                Phase::Open | Phase::Finishing => {}
                Phase::Connecting | Phase::Closing => continue,
            }
            if let Err(reason) = conn.send(&self.ctx.shared.metrics) {
                self.ctx.end(id, reason);
            }
        }
        give_back(&mut self.ctx.dirty, dirty);
    }

    fn report_ended(&mut self) {
        for (id, reason) in std::mem::take(&mut self.ctx.ended) {
            let Some(conn) = self.ctx.conns.remove(id) else { continue };
            assert!(conn.phase == Phase::Closing && conn.id == id, "ended once");
            if let Some(tick) = conn.deadline {
                self.ctx.deadlines.remove(&(tick, id));
            }
            drop(conn);
            let metrics = &self.ctx.shared.metrics;
            metrics.closed.add(1);
            metrics.connections.set(self.ctx.conns.len() as u64);
            self.app.closed(&mut self.ctx, id, reason);
        }
    }
}

/// Return an emptied list to its place for its memory, behind what has come there meanwhile.
fn give_back<T>(place: &mut Vec<T>, mut emptied: Vec<T>) {
    emptied.append(place);
    *place = emptied;
}
