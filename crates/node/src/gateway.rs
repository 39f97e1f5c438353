//! The gateway's data path: NBD connections in front, sessions of volumes behind, one reactor.
//!
//! **What it owns.** One thread with its sockets, one session per open volume, and the adopted
//! connections of each. [`Gateway`] is the handle: its calls go through the reactor's command queue
//! and wait for the answer, which takes one turn of the loop (closing takes longer, see below).
//!
//! **What it guarantees.** An adopted connection is reported as closed exactly once. A client that
//! asks for more than may be in flight is not read from until there is room; nor is one that does not
//! take its replies, which NBD does not forbid, nor any client of a volume whose session is full. [`Gateway::close_volume`] lets requests under way finish for
//! [`CLOSE_MS`]; after that the connections end *without* an answer to what is left: an error would
//! be passed on to an application, a lost connection is made again by the client.
//!
//! **What it costs.** Two table lookups per frame, no copy of data.

use crate::link::{self, Answer, ClientEvent, Events, Link, Outcome};
use crate::{ClientProblem, VolumeSpec};
use front::nbd::{Incoming, NbdConnection, NbdFraming, Parameters, REQUEST_BYTES_MAX};
use proto::block::{BlockData, BlockRequest};
use proto::disk::DiskDone;
use proto::frame::Frame;
use proto::id_map::IdMap;
use proto::{Pool, Status, Tick};
use runtime::RuntimeError;
use runtime::reactor::{
    Application, CONNECTIONS_MAX, CloseReason, ConnId, Context, DiskIndex, Handle,
    LEFTOVER_BYTES_MAX, ListenerId, Opened, Options, SEND_QUEUE_BYTES_MAX, SPIN_MAX, spawn,
};
use shard::session::{Counters, PathId};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Time for the requests of a volume that is being closed.
pub const CLOSE_MS: u64 = 5_000;
/// Commands that may wait.
const COMMANDS_MAX: usize = 1024;
/// Bytes in flight and replies unsent at which a connection is not read from. One request more, of
/// the greatest size, and all headers still fit into the reactor's queue, whose overflow would end
/// the connection: NBD has no bound on what a client may ask for before it reads.
const PROMISED_BYTES_MAX: u64 = SEND_QUEUE_BYTES_MAX as u64 - REQUEST_BYTES_MAX as u64 - (1 << 20);
/// Pause before looking again whether a slow reader has taken its replies: nothing tells of it.
const SLOW_LOOK_MS: u64 = 5;
/// Free receive buffers kept, per size class.
const POOL_BYTES: usize = 64 << 20;
/// A request's id in the session: place of its connection above, the connection's own id below.
const FRONT_SHIFT: u32 = 48;
const FRONT_ID_MASK: u64 = (1 << FRONT_SHIFT) - 1;
/// Connections of one volume that the id has room for.
const FRONTS_MAX: usize = 1 << 16;

/// An NBD connection after its handshake.
#[derive(Debug)]
pub struct NbdAdoption {
    /// The stream.
    pub socket: OwnedFd,
    /// What was received behind the handshake; at most 64 KiB.
    pub leftover: Vec<u8>,
    /// The volume.
    pub handle: u64,
    /// Structured replies were negotiated.
    pub is_structured: bool,
    /// The export is read-only.
    pub is_read_only: bool,
}

/// One volume as its statistics show it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumeStats {
    /// Its handle.
    pub handle: u64,
    /// Size now.
    pub size_bytes: u64,
    /// Requests without reply.
    pub open_requests: u64,
    /// Adopted connections.
    pub connections: u64,
    /// Of its session.
    pub session: Counters,
}

enum Command {
    Open { handle: u64, spec: Box<VolumeSpec>, answer: Answer<()> },
    Update { handle: u64, spec: Box<VolumeSpec>, answer: Answer<()> },
    Close { handle: u64, answer: Answer<()> },
    Adopt { adoption: NbdAdoption, answer: Answer<u64> },
    Stats { answer: Answer<Vec<VolumeStats>> },
    Shutdown { answer: Answer<()> },
}

/// A running gateway. Calls may come from any thread.
pub struct Gateway {
    handle: Handle<Command>,
    events: Arc<Events>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Gateway {
    /// Start the reactor.
    pub fn start(cluster_id: [u8; 16]) -> Result<Gateway, ClientProblem> {
        let events = Events::new()
            .map_err(|source| RuntimeError::SystemFailed { action: "make an eventfd", source })?;
        let events = Arc::new(events);
        let options = Options {
            name: "gateway".to_owned(),
            command_capacity: COMMANDS_MAX,
            spin: SPIN_MAX,
            pool: Pool::new(POOL_BYTES),
        };
        let shown = Arc::clone(&events);
        let running = spawn(options, Vec::new(), move || App {
            cluster_id,
            events: shown,
            volumes: BTreeMap::new(),
            roles: IdMap::default(),
            wakes: BTreeSet::new(),
            slow: BTreeSet::new(),
            conn_count: 0,
            shutdown: Vec::new(),
            is_shutting_down: false,
            scratch: Outcome::default(),
        })?;
        Ok(Gateway { handle: running.handle, events, thread: Mutex::new(Some(running.thread)) })
    }

    /// Open a volume under a handle of the caller's choice.
    pub fn open_volume(&self, handle: u64, spec: VolumeSpec) -> Result<(), ClientProblem> {
        let spec = Box::new(spec);
        link::ask(&self.handle, |answer| Command::Open { handle, spec, answer })
    }

    /// Tell a newer description.
    pub fn update_volume(&self, handle: u64, spec: VolumeSpec) -> Result<(), ClientProblem> {
        let spec = Box::new(spec);
        link::ask(&self.handle, |answer| Command::Update { handle, spec, answer })
    }

    /// End a volume and its connections; waits for requests under way, at most [`CLOSE_MS`].
    pub fn close_volume(&self, handle: u64) -> Result<(), ClientProblem> {
        link::ask(&self.handle, |answer| Command::Close { handle, answer })
    }

    /// Serve a connection from here on. Its id comes back.
    pub fn adopt_nbd(&self, adoption: NbdAdoption) -> Result<u64, ClientProblem> {
        if adoption.leftover.len() > LEFTOVER_BYTES_MAX {
            return Err(ClientProblem::LeftoverTooLong(adoption.leftover.len()));
        }
        if self.events.ends() >= CONNECTIONS_MAX {
            return Err(ClientProblem::EventsNotDrained);
        }
        link::ask(&self.handle, |answer| Command::Adopt { adoption, answer })
    }

    /// Becomes readable when [`Gateway::drain`] has something.
    #[must_use]
    pub fn event_fd(&self) -> RawFd {
        self.events.fd()
    }

    /// What has happened since the last call.
    #[must_use]
    pub fn drain(&self) -> Vec<ClientEvent> {
        self.events.drain()
    }

    /// Counters of all open volumes.
    pub fn stats(&self) -> Result<Vec<VolumeStats>, ClientProblem> {
        link::ask(&self.handle, |answer| Command::Stats { answer })
    }

    /// End all volumes as [`Gateway::close_volume`] does, then the reactor. Later calls do nothing.
    pub fn close(&self) {
        let thread = self.thread.lock().expect("no panic happens under this lock").take();
        if let Some(thread) = thread {
            // Refused only if it has stopped already, or is behind: then it ends without grace.
            let _ = link::ask(&self.handle, |answer| Command::Shutdown { answer });
            self.handle.stop();
            thread.join().expect("a panic there aborts the process");
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let thread = self.thread.lock().expect("no panic happens under this lock").take();
        if let Some(thread) = thread {
            self.handle.stop();
            thread.join().expect("a panic there aborts the process");
        }
    }
}

#[derive(Clone, Copy)]
enum Role {
    Path { handle: u64, path: PathId },
    Front { handle: u64, index: usize },
}

/// One adopted connection.
struct Front {
    id: u64,
    conn: ConnId,
    nbd: NbdConnection,
    /// Requests that the session has; after the connection's end the place waits for them.
    outstanding: usize,
    is_gone: bool,
    /// Why we ended it, if we did.
    reason: Option<String>,
}

struct Volume {
    link: Link,
    fronts: Vec<Option<Front>>,
    free: Vec<usize>,
    /// Places of connections that were not to be read from when they were last looked at.
    slow: BTreeSet<usize>,
    /// The session is full: no front end is read from.
    is_full: bool,
    wake: Option<Tick>,
    /// Being closed: the deadline, and who waits for it.
    closing: Option<(Tick, Vec<Answer<()>>)>,
}

struct App {
    cluster_id: [u8; 16],
    events: Arc<Events>,
    volumes: BTreeMap<u64, Volume>,
    roles: IdMap<ConnId, Role>,
    wakes: BTreeSet<(Tick, u64)>,
    /// Volumes with slow connections.
    slow: BTreeSet<u64>,
    conn_count: u64,
    shutdown: Vec<Answer<()>>,
    is_shutting_down: bool,
    scratch: Outcome,
}

impl App {
    fn open(
        &mut self,
        ctx: &mut Context,
        handle: u64,
        spec: VolumeSpec,
    ) -> Result<(), ClientProblem> {
        if self.is_shutting_down {
            return Err(ClientProblem::Stopped);
        }
        if self.volumes.contains_key(&handle) {
            return Err(ClientProblem::HandleInUse(handle));
        }
        let mut outcome = self.outcome();
        let options = link::options(self.cluster_id, None);
        let link = Link::open(ctx, options, spec, &mut outcome);
        let volume = Volume {
            link,
            fronts: Vec::new(),
            free: Vec::new(),
            slow: BTreeSet::new(),
            is_full: false,
            wake: None,
            closing: None,
        };
        self.volumes.insert(handle, volume);
        self.follow(ctx, handle, outcome);
        Ok(())
    }

    fn volume(&mut self, handle: u64) -> Result<&mut Volume, ClientProblem> {
        match self.volumes.get_mut(&handle) {
            Some(volume) if volume.closing.is_none() => Ok(volume),
            Some(_) | None => Err(ClientProblem::UnknownHandle(handle)),
        }
    }

    fn update(
        &mut self,
        ctx: &mut Context,
        handle: u64,
        spec: VolumeSpec,
    ) -> Result<(), ClientProblem> {
        let mut outcome = Outcome::default();
        let volume = self.volume(handle)?;
        volume.link.configure(ctx, spec, &mut outcome)?;
        let size_bytes = volume.link.session().size_bytes();
        volume.fronts.iter_mut().flatten().for_each(|front| front.nbd.grow(size_bytes));
        self.follow(ctx, handle, outcome);
        Ok(())
    }

    fn adopt(&mut self, ctx: &mut Context, adoption: NbdAdoption) -> Result<u64, ClientProblem> {
        let NbdAdoption { socket, leftover, handle, is_structured, is_read_only } = adoption;
        let id = self.conn_count + 1;
        let volume = self.volume(handle)?;
        if volume.free.is_empty() && volume.fronts.len() >= FRONTS_MAX {
            return Err(ClientProblem::TooManyConnections);
        }
        let nbd = NbdConnection::new(Parameters {
            size_bytes: volume.link.session().size_bytes(),
            is_read_only,
            is_structured,
            request_bytes_max: REQUEST_BYTES_MAX,
        });
        let conn = ctx
            .adopt(socket, Box::new(NbdFraming), &leftover)
            .map_err(ClientProblem::SocketRefused)?;
        let front = Front { id, conn, nbd, outstanding: 0, is_gone: false, reason: None };
        let index = volume.free.pop().unwrap_or_else(|| {
            volume.fronts.push(None);
            volume.fronts.len() - 1
        });
        let before = volume.fronts[index].replace(front);
        assert!(before.is_none(), "a free place is empty");
        if volume.is_full {
            ctx.pause(conn);
        }
        self.conn_count = id;
        self.roles.insert(conn, Role::Front { handle, index });
        Ok(id)
    }

    fn close_volume(&mut self, ctx: &mut Context, handle: u64, answer: Option<Answer<()>>) {
        let Some(volume) = self.volumes.get_mut(&handle) else {
            if let Some(to) = answer {
                link::answer(&to, Err(ClientProblem::UnknownHandle(handle)));
            }
            return;
        };
        let deadline = ctx.now().after_millis(CLOSE_MS);
        let is_new = volume.closing.is_none();
        let (_, waiting) = volume.closing.get_or_insert_with(|| (deadline, Vec::new()));
        waiting.extend(answer);
        if !is_new {
            return;
        }
        for front in volume.fronts.iter_mut().flatten().filter(|front| !front.is_gone) {
            front.nbd.shut_down();
            front.reason.get_or_insert_with(|| "the volume was closed".to_owned());
            if front.nbd.is_idle() {
                ctx.finish(front.conn);
            }
        }
        self.follow(ctx, handle, Outcome::default());
    }

    /// A frame of an NBD client.
    fn front_frame(&mut self, ctx: &mut Context, handle: u64, index: usize, frame: Frame) {
        let mut outcome = self.outcome();
        let volume = self.volumes.get_mut(&handle).expect("a connection ends before its volume");
        let front = volume.fronts[index].as_mut().expect("its role is gone when it is");
        match front.nbd.receive(frame) {
            Ok(Incoming::Request(BlockRequest { id, op })) => {
                assert!(id <= FRONT_ID_MASK, "2^48 requests of one connection");
                front.outstanding += 1;
                let id = (index as u64) << FRONT_SHIFT | id;
                volume.link.submit(ctx, BlockRequest { id, op }, &mut outcome);
            }
            Ok(Incoming::Reply(reply)) => {
                // If it has ended, `closed` follows.
                let _ = ctx.send(front.conn, reply);
            }
            Ok(Incoming::Disconnect) => {
                front.reason.get_or_insert_with(|| "disconnected by the client".to_owned());
                if front.nbd.is_idle() {
                    ctx.finish(front.conn);
                }
            }
            Err(error) => {
                front.reason.get_or_insert_with(|| error.to_string());
                ctx.close(front.conn);
            }
        }
        let front = volume.fronts[index].as_mut().expect("still there");
        if !front.wants_frames(ctx) {
            ctx.pause(front.conn);
            volume.slow.insert(index);
        }
        self.follow(ctx, handle, outcome);
    }

    /// Read again from connections whose clients have taken their replies.
    fn resume_slow(&mut self, ctx: &mut Context) {
        let volumes = &mut self.volumes;
        self.slow.retain(|handle| {
            let Some(volume) = volumes.get_mut(handle) else { return false };
            volume.resume_slow(ctx);
            !volume.slow.is_empty()
        });
    }

    /// An empty outcome, with the memory of the last one.
    fn outcome(&mut self) -> Outcome {
        std::mem::take(&mut self.scratch)
    }

    /// Carry out what a step of a volume's session has brought.
    fn follow(&mut self, ctx: &mut Context, handle: u64, mut outcome: Outcome) {
        let Some(volume) = self.volumes.get_mut(&handle) else { return };
        for (conn, path) in outcome.begun.drain(..) {
            self.roles.insert(conn, Role::Path { handle, path });
        }
        for shard in outcome.conf_needed.drain(..) {
            self.events.conf_needed(handle, shard);
        }
        for (id, result) in outcome.replies.drain(..) {
            volume.answer(ctx, id, result);
        }
        self.scratch = outcome;
        volume.balance(ctx);
        if !volume.slow.is_empty() {
            self.slow.insert(handle);
        }
        let wake = volume.wake_at();
        if wake != volume.wake {
            let before = std::mem::replace(&mut volume.wake, wake);
            if let Some(before) = before {
                self.wakes.remove(&(before, handle));
            }
            self.wakes.extend(wake.map(|tick| (tick, handle)));
        }
        self.end_if_done(ctx, handle);
    }

    /// Forget a volume that is being closed when nothing of it is left.
    fn end_if_done(&mut self, ctx: &mut Context, handle: u64) {
        let volume = self.volumes.get_mut(&handle).expect("asked for by its handle");
        let Some((deadline, _)) = &volume.closing else { return };
        let is_over = *deadline <= ctx.now();
        let mut has_connections = false;
        for front in volume.fronts.iter().flatten().filter(|front| !front.is_gone) {
            has_connections = true;
            if is_over {
                // No answer: see the module's head.
                ctx.close(front.conn);
            }
        }
        if has_connections {
            // Each comes back here when it has ended.
            return;
        }
        let mut volume = self.volumes.remove(&handle).expect("just found");
        if let Some(wake) = volume.wake {
            self.wakes.remove(&(wake, handle));
        }
        // Replies go nowhere: their connections have ended.
        volume.link.end(ctx, &mut Outcome::default());
        let (_, waiting) = volume.closing.expect("it is being closed");
        waiting.iter().for_each(|to| link::answer(to, Ok(())));
        self.stop_if_done(ctx);
    }

    fn stop_if_done(&mut self, ctx: &mut Context) {
        if self.is_shutting_down && self.volumes.is_empty() {
            self.shutdown.drain(..).for_each(|to| link::answer(&to, Ok(())));
            ctx.stop();
        }
    }
}

impl Front {
    /// Whether another request may be read: none of its replies could be one too many.
    fn wants_frames(&self, ctx: &Context) -> bool {
        let unsent = ctx.send_queue_bytes(self.conn) as u64;
        self.nbd.wants_frames() && self.nbd.inflight_bytes() + unsent < PROMISED_BYTES_MAX
    }
}

impl Volume {
    /// Pass a reply on to the connection that asked.
    fn answer(&mut self, ctx: &mut Context, id: u64, result: Result<BlockData, Status>) {
        let index = (id >> FRONT_SHIFT) as usize;
        let place = &mut self.fronts[index];
        let front = place.as_mut().expect("it waits for its replies");
        front.outstanding -= 1;
        if front.is_gone {
            if front.outstanding == 0 {
                *place = None;
                self.free.push(index);
            }
            return;
        }
        let reply = front.nbd.complete(id & FRONT_ID_MASK, result);
        // If it has ended, `closed` follows.
        let _ = ctx.send(front.conn, reply);
        if front.nbd.is_idle() && front.reason.is_some() {
            ctx.finish(front.conn);
        } else if !self.is_full && front.wants_frames(ctx) {
            ctx.resume(front.conn);
        } else {
            self.slow.insert(index);
        }
    }

    /// Stop or start to read from the front ends when the session has become full or not.
    fn balance(&mut self, ctx: &mut Context) {
        let is_full = !self.link.session().wants_requests();
        if std::mem::replace(&mut self.is_full, is_full) == is_full {
            return;
        }
        for (index, place) in self.fronts.iter().enumerate() {
            let Some(front) = place.as_ref().filter(|front| !front.is_gone) else { continue };
            if is_full {
                ctx.pause(front.conn);
            } else if front.wants_frames(ctx) {
                ctx.resume(front.conn);
            } else {
                self.slow.insert(index);
            }
        }
    }

    /// Read again from those of the slow that may be read; a full session resumes them itself.
    fn resume_slow(&mut self, ctx: &mut Context) {
        let (fronts, is_full) = (&self.fronts, self.is_full);
        self.slow.retain(|&index| {
            let Some(front) = fronts[index].as_ref().filter(|front| !front.is_gone) else {
                return false;
            };
            let may_read = front.wants_frames(ctx);
            if may_read && !is_full {
                ctx.resume(front.conn);
            }
            !may_read
        });
    }

    fn wake_at(&self) -> Option<Tick> {
        let deadline = self.closing.as_ref().map(|(deadline, _)| *deadline);
        [deadline, self.link.session().wake_at()].into_iter().flatten().min()
    }

    fn stats(&self, handle: u64) -> VolumeStats {
        let session = self.link.session();
        VolumeStats {
            handle,
            size_bytes: session.size_bytes(),
            open_requests: session.open_requests() as u64,
            connections: self.fronts.iter().flatten().filter(|front| !front.is_gone).count() as u64,
            session: session.counters(),
        }
    }
}

impl Application for App {
    type Command = Command;

    fn start(&mut self, _ctx: &mut Context) {}

    fn command(&mut self, ctx: &mut Context, command: Command) {
        match command {
            Command::Open { handle, spec, answer } => {
                let result = self.open(ctx, handle, *spec);
                link::answer(&answer, result);
            }
            Command::Update { handle, spec, answer } => {
                let result = self.update(ctx, handle, *spec);
                link::answer(&answer, result);
            }
            Command::Close { handle, answer } => self.close_volume(ctx, handle, Some(answer)),
            Command::Adopt { adoption, answer } => {
                let result = self.adopt(ctx, adoption);
                link::answer(&answer, result);
            }
            Command::Stats { answer } => {
                let stats = self.volumes.iter().map(|(handle, volume)| volume.stats(*handle));
                link::answer(&answer, Ok(stats.collect()));
            }
            Command::Shutdown { answer } => {
                self.is_shutting_down = true;
                self.shutdown.push(answer);
                for handle in self.volumes.keys().copied().collect::<Vec<_>>() {
                    self.close_volume(ctx, handle, None);
                }
                self.stop_if_done(ctx);
            }
        }
    }

    fn opened(&mut self, ctx: &mut Context, conn: ConnId, _how: Opened) {
        // It may have been given up in the very iteration in which it came about.
        let Some(Role::Path { handle, path }) = self.roles.get(&conn).copied() else { return };
        let mut outcome = self.outcome();
        if let Some(volume) = self.volumes.get_mut(&handle) {
            volume.link.opened(ctx, path, &mut outcome);
        }
        self.follow(ctx, handle, outcome);
    }

    fn frame(&mut self, ctx: &mut Context, conn: ConnId, frame: Frame) {
        match self.roles.get(&conn).copied() {
            Some(Role::Path { handle, path }) => {
                let mut outcome = self.outcome();
                if let Some(volume) = self.volumes.get_mut(&handle) {
                    volume.link.frame(ctx, path, frame, &mut outcome);
                }
                self.follow(ctx, handle, outcome);
            }
            Some(Role::Front { handle, index }) => self.front_frame(ctx, handle, index, frame),
            None => unreachable!("a connection has a role until it has ended"),
        }
    }

    fn closed(&mut self, ctx: &mut Context, conn: ConnId, reason: CloseReason) {
        match self.roles.remove(&conn) {
            Some(Role::Path { handle, path }) => {
                let mut outcome = self.outcome();
                if let Some(volume) = self.volumes.get_mut(&handle) {
                    volume.link.closed(ctx, path, &mut outcome);
                }
                self.follow(ctx, handle, outcome);
            }
            Some(Role::Front { handle, index }) => {
                let volume = self.volumes.get_mut(&handle).expect("it waits for its connections");
                let place = &mut volume.fronts[index];
                let front = place.as_mut().expect("its role is gone when it is");
                front.is_gone = true;
                let text = front.reason.take().unwrap_or_else(|| reason.to_string());
                self.events.closed(front.id, text);
                if front.outstanding == 0 {
                    *place = None;
                    volume.free.push(index);
                }
                self.follow(ctx, handle, Outcome::default());
            }
            None => unreachable!("a connection ends once"),
        }
    }

    fn timer(&mut self, ctx: &mut Context) {
        // First all that are due: a close whose time is over stays due until its connections, which
        // `follow` ends, are reported as closed at the end of this iteration.
        let due = self.wakes.iter().take_while(|(tick, _)| *tick <= ctx.now());
        let due: Vec<u64> = due.map(|(_, handle)| *handle).collect();
        for handle in due {
            let mut outcome = self.outcome();
            if let Some(volume) = self.volumes.get_mut(&handle) {
                volume.link.tick(ctx, &mut outcome);
            }
            self.follow(ctx, handle, outcome);
        }
    }

    fn idle(&mut self, ctx: &mut Context) {
        self.resume_slow(ctx);
        let look = (!self.slow.is_empty()).then(|| ctx.now().after_millis(SLOW_LOOK_MS));
        let wake = self.wakes.first().map(|(tick, _)| *tick);
        ctx.set_timer([look, wake].into_iter().flatten().min());
    }

    fn disk(&mut self, _ctx: &mut Context, _disk: DiskIndex, _done: &mut Vec<DiskDone>) {}

    fn accepted(&mut self, _ctx: &mut Context, _listener: ListenerId, _socket: OwnedFd) {}
}
