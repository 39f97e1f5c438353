//! What an application can do to the world, and the state behind it.

use super::conn::{Conn, Phase};
use super::handle::Shared;
use super::receive::Receiver;
use super::table::Table;
use super::watch::{DiskLatency, Watch};
use super::{CONNECTIONS_MAX, CloseReason, ConnId, DiskIndex, FINISH_MS, LEFTOVER_BYTES_MAX};
use super::{ListenerId, Opened, SendError, socket};
use crate::engine::{DiskEngine, EngineCounters};
use proto::Tick;
use proto::buffer::Pool;
use proto::disk::DiskRequest;
use proto::frame::{Framing, OutFrame};
use rustix::event::epoll;
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

/// Where to connect to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// TCP.
    Tcp(SocketAddr),
    /// A stream socket in the file system.
    Unix(PathBuf),
}

/// What an epoll event is about: a tag in the top byte of its data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Source {
    Wake,
    Disk(usize),
    Listener(usize),
    Conn(ConnId),
}

const TAG_SHIFT: u32 = 56;

impl Source {
    fn to_data(self) -> epoll::EventData {
        let (tag, value) = match self {
            Source::Wake => (0, 0),
            Source::Disk(index) => (1, index as u64),
            Source::Listener(index) => (2, index as u64),
            Source::Conn(id) => (3, id.0),
        };
        assert!(value < 1 << TAG_SHIFT, "{value} leaves no room for the tag");
        epoll::EventData::new_u64(tag << TAG_SHIFT | value)
    }

    pub fn from_data(data: epoll::EventData) -> Source {
        let value = data.u64() & ((1 << TAG_SHIFT) - 1);
        match data.u64() >> TAG_SHIFT {
            0 => Source::Wake,
            1 => Source::Disk(value as usize),
            2 => Source::Listener(value as usize),
            3 => Source::Conn(ConnId(value)),
            tag => unreachable!("no source has tag {tag}"),
        }
    }
}

pub(super) struct Disk {
    pub engine: Box<dyn DiskEngine>,
    /// Something was queued since the last submit.
    pub is_dirty: bool,
    /// Since when each of its operations is under way.
    pub watch: Watch,
}

impl Disk {
    fn new(engine: Box<dyn DiskEngine>) -> Disk {
        Disk { engine, is_dirty: false, watch: Watch::default() }
    }
}

pub(super) struct Listener {
    pub socket: OwnedFd,
    /// Out of descriptors: try again at the next tick, no edge will come.
    pub is_postponed: bool,
}

/// The reactor as its application sees it. Every call returns at once; what it starts takes effect
/// at the latest when the current iteration ends.
pub struct Context {
    pub(super) now: Tick,
    pub(super) pool: Pool,
    pub(super) epoll: OwnedFd,
    pub(super) conns: Table<Conn>,
    pub(super) listeners: Vec<Listener>,
    pub(super) disks: Vec<Disk>,
    /// Connections from which a frame may come without another event.
    pub(super) listed: Vec<ConnId>,
    /// Connections with frames to send.
    pub(super) dirty: Vec<ConnId>,
    /// Connections that ended; `closed` is due.
    pub(super) ended: Vec<(ConnId, CloseReason)>,
    /// Connections that are up; `opened` is due.
    pub(super) opened: Vec<(ConnId, Opened)>,
    pub(super) deadlines: BTreeSet<(Tick, ConnId)>,
    pub(super) timer: Option<Tick>,
    pub(super) is_stopping: bool,
    pub(super) shared: Arc<Shared>,
}

impl Context {
    pub(super) fn new(
        pool: Pool,
        engines: Vec<Box<dyn DiskEngine>>,
        shared: Arc<Shared>,
    ) -> io::Result<Context> {
        let context = Context {
            now: crate::clock::now(),
            pool,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            conns: Table::new(),
            listeners: Vec::new(),
            disks: engines.into_iter().map(Disk::new).collect(),
            listed: Vec::new(),
            dirty: Vec::new(),
            ended: Vec::new(),
            opened: Vec::new(),
            deadlines: BTreeSet::new(),
            timer: None,
            is_stopping: false,
            shared,
        };
        // Edges throughout: nobody has to read an eventfd back.
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&context.epoll, &context.shared.wake, Source::Wake.to_data(), edge)?;
        for (index, disk) in context.disks.iter().enumerate() {
            let data = Source::Disk(index).to_data();
            epoll::add(&context.epoll, disk.engine.wake_fd(), data, edge)?;
        }
        Ok(context)
    }

    /// The time at which this iteration began to handle events.
    #[must_use]
    pub fn now(&self) -> Tick {
        self.now
    }

    /// The lane's buffers.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Disks of this reactor; their indexes are `0..disks()`.
    #[must_use]
    pub fn disks(&self) -> usize {
        self.disks.len()
    }

    /// Counters of one disk's engine.
    #[must_use]
    pub fn disk_counters(&self, disk: DiskIndex) -> EngineCounters {
        self.disks[disk.0].engine.counters()
    }

    /// Give a disk a request. All requests of one iteration are submitted together at its end.
    pub fn queue_disk(&mut self, disk: DiskIndex, mut request: DiskRequest) {
        let disk = &mut self.disks[disk.0];
        request.id = disk.watch.begin(request.id, &request.op, self.now);
        disk.engine.queue(request);
        disk.is_dirty = true;
    }

    /// Nanoseconds that the oldest operation of a disk has been under way; 0 if there is none.
    #[must_use]
    pub fn oldest_io_nanos(&self, disk: DiskIndex) -> u64 {
        let oldest = self.disks[disk.0].watch.oldest();
        oldest.map_or(0, |since| self.now.0.saturating_sub(since.0))
    }

    /// What the finished operations of a disk took.
    #[must_use]
    pub fn disk_latency(&self, disk: DiskIndex) -> DiskLatency {
        self.disks[disk.0].watch.latency()
    }

    /// Put a frame behind the others of a connection. All frames of one iteration leave together.
    ///
    /// If the queue is full, the connection ends with [`CloseReason::SendQueueFull`]: its peer does
    /// not read, and a reply must never be lost silently. Before the connect has succeeded frames
    /// are kept.
    pub fn send(&mut self, id: ConnId, frame: OutFrame) -> Result<(), SendError> {
        let Some(conn) = self.conns.get_mut(id) else { return Err(SendError::Gone) };
        match conn.phase {
            Phase::Open | Phase::Connecting => {}
            Phase::Finishing | Phase::Closing => return Err(SendError::Gone),
        }
        if !conn.sender.push(frame) {
            self.end(id, CloseReason::SendQueueFull);
            return Err(SendError::Full);
        }
        self.list_dirty(id);
        Ok(())
    }

    /// Bytes that wait to be sent on a connection; 0 if it is gone.
    #[must_use]
    pub fn send_queue_bytes(&self, id: ConnId) -> usize {
        self.conns.get(id).map_or(0, |conn| conn.sender.bytes())
    }

    /// Begin to connect. `opened` or `closed` follows.
    pub fn connect(&mut self, address: &Address, framing: Box<dyn Framing>) -> io::Result<ConnId> {
        let (socket, is_connected) = socket::connect(address)?;
        let phase = if is_connected { Phase::Open } else { Phase::Connecting };
        let id = self.insert(socket, Receiver::new(framing, &[]), phase)?;
        if is_connected {
            self.opened.push((id, Opened::Connected));
        }
        Ok(id)
    }

    /// Take over a connected stream socket; `leftover` are bytes of its stream that were received
    /// already. The caller has the id, so no `opened` follows.
    pub fn adopt(
        &mut self,
        socket: OwnedFd,
        framing: Box<dyn Framing>,
        leftover: &[u8],
    ) -> io::Result<ConnId> {
        assert!(leftover.len() <= LEFTOVER_BYTES_MAX, "too much was read ahead");
        socket::prepare(&socket)?;
        let id = self.insert(socket, Receiver::new(framing, leftover), Phase::Open)?;
        self.list(id);
        Ok(id)
    }

    fn insert(&mut self, socket: OwnedFd, receiver: Receiver, phase: Phase) -> io::Result<ConnId> {
        if self.conns.len() >= CONNECTIONS_MAX {
            return Err(io::Error::other(format!("{CONNECTIONS_MAX} connections are open")));
        }
        let id = self.conns.insert(|id| Conn::new(id, socket, receiver, phase));
        let conn = self.conns.get(id).expect("just inserted");
        let flags = epoll::EventFlags::IN
            | epoll::EventFlags::OUT
            | epoll::EventFlags::RDHUP
            | epoll::EventFlags::ET;
        let added = epoll::add(&self.epoll, &conn.socket, Source::Conn(id).to_data(), flags);
        if let Err(errno) = added {
            self.conns.remove(id);
            return Err(errno.into());
        }
        self.shared.metrics.opened.add(1);
        self.shared.metrics.connections.set(self.conns.len() as u64);
        Ok(id)
    }

    /// Give a connection away: its socket, and what was received of its stream and not handed out.
    /// No `closed` follows. `None` leaves it as it is: it is gone, a frame is half received, or the
    /// socket does not take what is queued.
    pub fn release(&mut self, id: ConnId) -> Option<(OwnedFd, Vec<u8>)> {
        let conn = self.conns.get_mut(id)?;
        let is_sent = conn.send(&self.shared.metrics).is_ok() && conn.sender.bytes() == 0;
        if conn.phase != Phase::Open || !is_sent || conn.receiver.is_inside_body() {
            return None;
        }
        self.set_conn_deadline(id, None);
        let conn = self.conns.remove(id)?;
        // The set forgets a descriptor by itself only when its last copy is closed.
        let _ = epoll::delete(&self.epoll, &conn.socket);
        self.shared.metrics.closed.add(1);
        self.shared.metrics.connections.set(self.conns.len() as u64);
        Some((conn.socket, conn.receiver.into_leftover()))
    }

    /// End a connection in this iteration. What is queued is offered to the socket once; what it
    /// does not take is lost. `closed` follows, once, as for every other end.
    pub fn close(&mut self, id: ConnId) {
        self.end(id, CloseReason::Requested);
    }

    /// Hand out no more frames, and end the connection when everything queued has left and the peer
    /// has closed its side, at the latest after [`FINISH_MS`].
    pub fn finish(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        if conn.phase == Phase::Open {
            conn.phase = Phase::Finishing;
            self.set_conn_deadline(id, Some(self.now.after_millis(FINISH_MS)));
            self.list_dirty(id);
            self.list(id);
        } else if conn.phase == Phase::Connecting {
            self.end(id, CloseReason::Requested);
        }
    }

    /// Stop receiving from a connection, for back-pressure. At most one read-ahead more is
    /// buffered; then the peer's own sends block.
    pub fn pause(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(id) {
            conn.is_paused = true;
        }
    }

    /// Receive again.
    pub fn resume(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        if std::mem::replace(&mut conn.is_paused, false) {
            self.list(id);
        }
    }

    /// End the connection with [`CloseReason::Deadline`] at `deadline`; `None` lifts it. For a
    /// handshake: `Some(now.after_millis(HANDSHAKE_MS))`, and `None` when it is done.
    pub fn set_conn_deadline(&mut self, id: ConnId, deadline: Option<Tick>) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        if let Some(before) = conn.deadline.take() {
            self.deadlines.remove(&(before, id));
        }
        conn.deadline = deadline;
        self.deadlines.extend(deadline.map(|tick| (tick, id)));
    }

    /// Call `Application::timer` once at `deadline`, or not at all. Replaces the one set before.
    pub fn set_timer(&mut self, deadline: Option<Tick>) {
        self.timer = deadline;
    }

    /// Listen on a TCP address (port 0: any). Returns the address in use. `accepted` follows for
    /// each connection.
    pub fn listen(&mut self, address: SocketAddr) -> io::Result<(ListenerId, SocketAddr)> {
        let (socket, address) = socket::listen(address)?;
        Ok((self.listen_on(socket)?, address))
    }

    /// The same on a socket that listens already.
    pub fn listen_on(&mut self, socket: OwnedFd) -> io::Result<ListenerId> {
        let index = self.listeners.len();
        rustix::io::ioctl_fionbio(&socket, true)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&self.epoll, socket.as_fd(), Source::Listener(index).to_data(), flags)?;
        self.listeners.push(Listener { socket, is_postponed: false });
        Ok(ListenerId(index))
    }

    /// End the loop after this iteration. Connections are closed without further `closed` calls.
    pub fn stop(&mut self) {
        self.is_stopping = true;
    }

    /// Let `closed` follow, unless it is due already.
    pub(super) fn end(&mut self, id: ConnId, reason: CloseReason) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        if conn.phase == Phase::Closing {
            return;
        }
        if conn.phase == Phase::Open && !matches!(reason, CloseReason::Failed(_)) {
            // What was answered before the end should reach a peer that still listens (it may have
            // closed only its own direction). An error changes nothing: this is the end anyway.
            let _ = conn.send(&self.shared.metrics);
        }
        conn.phase = Phase::Closing;
        self.ended.push((id, reason));
    }

    /// Look at a connection in this or the next iteration.
    pub(super) fn list(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(id)
            && conn.wants_receive()
            && !std::mem::replace(&mut conn.is_listed, true)
        {
            self.listed.push(id);
        }
    }

    pub(super) fn list_dirty(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(id)
            && !std::mem::replace(&mut conn.is_dirty, true)
        {
            self.dirty.push(id);
        }
    }
}
