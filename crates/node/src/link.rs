//! One session on a reactor: its effects become connections and frames, and what comes back becomes
//! its events. Shared by the gateway and the volume client.

use crate::{ClientProblem, framing};
use crossbeam_channel::{Receiver, Sender, bounded};
use proto::Status;
use proto::block::{BlockData, BlockRequest};
use proto::frame::Frame;
use proto::id_map::IdMap;
use proto::seam::Machine;
use runtime::clock;
use runtime::reactor::{Address, ConnId, Context, Handle, Refused};
use runtime::wake::Wake;
use shard::session::{Effect, Event, Options, PathId, Session, VolumeConf};
use std::collections::{BTreeSet, VecDeque};
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard};

/// What a step of the session has brought for its owner.
#[derive(Default)]
pub(crate) struct Outcome {
    /// (id, result) of requests.
    pub replies: Vec<(u64, Result<BlockData, Status>)>,
    /// Connections that were begun; their frames and their end go to [`Link::frame`] and
    /// [`Link::closed`].
    pub begun: Vec<(ConnId, PathId)>,
    /// Shards that wait for a newer configuration.
    pub conf_needed: Vec<u32>,
}

pub(crate) struct Link {
    session: Session,
    conns: IdMap<PathId, ConnId>,
    /// Kept between steps for its memory.
    effects: Vec<Effect>,
}

impl Link {
    /// Open a volume.
    pub fn open(ctx: &mut Context, options: Options, conf: VolumeConf, out: &mut Outcome) -> Link {
        let mut effects = Vec::new();
        let session = Session::new(ctx.now(), options, conf, &mut effects);
        let mut link = Link { session, conns: IdMap::default(), effects };
        link.carry_out(ctx, out);
        link
    }

    pub fn session(&self) -> &Session {
        &self.session
    }

    pub fn submit(&mut self, ctx: &mut Context, request: BlockRequest, out: &mut Outcome) {
        self.step(ctx, Event::Submit(request), out);
    }

    pub fn configure(
        &mut self,
        ctx: &mut Context,
        conf: VolumeConf,
        out: &mut Outcome,
    ) -> Result<(), ClientProblem> {
        self.session.accepts(&conf)?;
        self.step(ctx, Event::Configure(conf), out);
        Ok(())
    }

    pub fn opened(&mut self, ctx: &mut Context, path: PathId, out: &mut Outcome) {
        self.step(ctx, Event::Connected(path), out);
    }

    pub fn frame(&mut self, ctx: &mut Context, path: PathId, frame: Frame, out: &mut Outcome) {
        self.step(ctx, Event::Frame(path, frame), out);
    }

    pub fn closed(&mut self, ctx: &mut Context, path: PathId, out: &mut Outcome) {
        let _ = self.conns.remove(&path);
        self.step(ctx, Event::Closed(path), out);
    }

    pub fn tick(&mut self, ctx: &mut Context, out: &mut Outcome) {
        self.step(ctx, Event::Tick, out);
    }

    /// End the session: everything without reply is answered with CANCELLED.
    pub fn end(&mut self, ctx: &mut Context, out: &mut Outcome) {
        self.step(ctx, Event::Close, out);
    }

    fn step(&mut self, ctx: &mut Context, event: Event, out: &mut Outcome) {
        self.session.step(ctx.now(), event, &mut self.effects);
        self.carry_out(ctx, out);
    }

    fn carry_out(&mut self, ctx: &mut Context, out: &mut Outcome) {
        let mut failed: Vec<PathId> = Vec::new();
        loop {
            for effect in self.effects.drain(..) {
                match effect {
                    Effect::Connect { path, address } => {
                        match ctx.connect(&Address::Tcp(address), framing::caller(1)) {
                            Ok(conn) => {
                                self.conns.insert(path, conn);
                                out.begun.push((conn, path));
                            }
                            // No route, no descriptor: the session tries again after a pause.
                            Err(_) => failed.push(path),
                        }
                    }
                    Effect::Send { path, request } => {
                        let conn = self.conns.get(&path).expect("it was connected");
                        // If it has ended or its queue is full, `closed` follows, and with that
                        // the session learns all that it has to know.
                        let _ = ctx.send(*conn, request.encode());
                    }
                    Effect::Disconnect(path) => {
                        if let Some(conn) = self.conns.remove(&path) {
                            ctx.close(conn);
                        }
                    }
                    Effect::Reply { id, result } => out.replies.push((id, result)),
                    Effect::NeedConf { shard } => out.conf_needed.push(shard),
                }
            }
            let Some(path) = failed.pop() else { return };
            self.session.step(ctx.now(), Event::Closed(path), &mut self.effects);
        }
    }
}

/// Options of a session in this process.
pub(crate) fn options(cluster_id: [u8; 16], io_timeout_nanos: Option<u64>) -> Options {
    // Nanoseconds since boot: above the generations of every earlier session on this machine.
    Options { cluster_id, io_timeout_nanos, generation_start: clock::now().0 }
}

/// What a client of this process is told without having asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ClientEvent {
    /// An adopted connection has ended.
    Closed {
        /// Its id.
        conn: u64,
        /// For the log.
        reason: String,
    },
    /// Requests wait for a newer configuration of this shard, or for its store to come back.
    /// Repeated with pauses of up to 1 s as long as that is so.
    ConfNeeded {
        /// The volume.
        handle: u64,
        /// The shard.
        shard: u32,
    },
}

/// Shards that are remembered as waiting; others are told when they ask again.
const CONF_NEEDED_MAX: usize = 4096;

#[derive(Debug, Default)]
struct Waiting {
    ends: VecDeque<ClientEvent>,
    /// (handle, shard), each once.
    conf_needed: BTreeSet<(u64, u32)>,
}

/// Events on their way to whoever watches the descriptor.
#[derive(Debug)]
pub(crate) struct Events {
    wake: Wake,
    waiting: Mutex<Waiting>,
}

impl Events {
    pub fn new() -> std::io::Result<Events> {
        Ok(Events { wake: Wake::new()?, waiting: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("no panic happens under this lock")
    }

    /// The queue of ends is bounded by whoever opens connections: see [`Events::ends`].
    pub fn closed(&self, conn: u64, reason: String) {
        self.lock().ends.push_back(ClientEvent::Closed { conn, reason });
        self.wake.signal();
    }

    pub fn conf_needed(&self, handle: u64, shard: u32) {
        let mut waiting = self.lock();
        let has_room = waiting.conf_needed.len() < CONF_NEEDED_MAX;
        if has_room && waiting.conf_needed.insert((handle, shard)) {
            self.wake.signal();
        }
    }

    /// Ends that nobody has fetched.
    pub fn ends(&self) -> usize {
        self.lock().ends.len()
    }

    pub fn drain(&self) -> Vec<ClientEvent> {
        let mut waiting = self.lock();
        // Under the lock: an event that comes later signals again.
        self.wake.clear();
        let Waiting { ends, conf_needed } = std::mem::take(&mut *waiting);
        let needed = conf_needed
            .into_iter()
            .map(|(handle, shard)| ClientEvent::ConfNeeded { handle, shard });
        ends.into_iter().chain(needed).collect()
    }

    pub fn fd(&self) -> RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.wake)
    }
}

/// The sender of an answer to a command.
pub(crate) type Answer<T> = Sender<Result<T, ClientProblem>>;

/// Begin a command; its answer comes through the receiver.
pub(crate) fn begin<C: Send, T>(
    handle: &Handle<C>,
    make: impl FnOnce(Answer<T>) -> C,
) -> Result<Receiver<Result<T, ClientProblem>>, ClientProblem> {
    let (answer, answered) = bounded(1);
    match handle.try_send(make(answer)) {
        Ok(()) => Ok(answered),
        Err(Refused::Full(_)) => Err(ClientProblem::Busy),
        Err(Refused::Stopped(_)) => Err(ClientProblem::Stopped),
    }
}

/// Give a command and wait for its answer.
pub(crate) fn ask<C: Send, T>(
    handle: &Handle<C>,
    make: impl FnOnce(Answer<T>) -> C,
) -> Result<T, ClientProblem> {
    // The sender is dropped without an answer when the reactor ends.
    begin(handle, make)?.recv().unwrap_or(Err(ClientProblem::Stopped))
}

/// Answer a command. Nobody may wait for it any more; that is no concern of the reactor.
pub(crate) fn answer<T>(to: &Answer<T>, result: Result<T, ClientProblem>) {
    let _ = to.send(result);
}
