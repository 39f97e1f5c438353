//! A store in memory that speaks PFW to clients, on a reactor of its own. It is honest: it checks
//! HELLO, epochs and bounds, verifies CRCs, and obeys FENCE_PATH. Its content survives it, as a disk
//! survives a process: [`Store::stop`], then [`Store::start`] on the same port, is a restart.

use node::{ShardRoute, Target, VolumeSpec};
use proto::disk::{BufList, DiskDone};
use proto::frame::{BodyLayout, Frame, FrameError, Framing};
use proto::wire::{
    ByteRange, CheckedData, FenceOutcome, HEADER_BYTES, Header, Hello, HelloReply, Limits, Opcode,
    Peer, PfwFraming, Reply, ReplyOp, Request, RequestOp, Rights, Side, SignedTicket, Ticket, Who,
};
use proto::{Epoch, Lsn, Pool, Seq, Status, VolumeId};
use runtime::reactor::{
    Application, CloseReason, ConnId, Context, DiskIndex, ListenerId, Opened, Options, Running,
    spawn,
};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub const CLUSTER: [u8; 16] = *b"cluster-in-tests";
pub const VOLUME: VolumeId = VolumeId(77);
pub const SHARD_BYTES: u64 = 4 << 20;
pub const SHARDS: u64 = 3;
pub const SIZE_BYTES: u64 = SHARDS * SHARD_BYTES - 4096;

/// What outlives the process.
pub struct Disk {
    pub bytes: Mutex<Vec<u8>>,
    pub counts: Mutex<Counts>,
}

#[derive(Clone, Copy, Default, Debug)]
pub struct Counts {
    pub writes: u64,
    pub fences: u64,
    pub outcomes: u64,
    pub stale: u64,
    pub hellos: u64,
    pub refused_hellos: u64,
}

impl Disk {
    pub fn new() -> Arc<Disk> {
        let bytes = vec![0; (SHARDS * SHARD_BYTES) as usize];
        Arc::new(Disk { bytes: Mutex::new(bytes), counts: Mutex::default() })
    }

    pub fn counts(&self) -> Counts {
        *self.counts.lock().expect("not poisoned")
    }

    pub fn count(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts.lock().expect("not poisoned"));
    }
}

#[derive(Debug)]
pub enum Command {
    /// Accept writes and let them lie, until it is lifted.
    Hold(bool, mpsc::Sender<usize>),
    /// How many writes lie.
    Held(mpsc::Sender<usize>),
    /// Lose all connections.
    Cut,
}

pub struct Store {
    running: Running<Command>,
    pub address: SocketAddr,
}

impl Store {
    /// Start a process of the store on `port` (0: any).
    pub fn start(disk: &Arc<Disk>, port: u16, incarnation: u64, epoch: u64) -> Store {
        let (bound, address) = mpsc::channel();
        let options = Options {
            name: "test-store".to_owned(),
            command_capacity: 16,
            spin: Duration::ZERO,
            pool: Pool::new(4 << 20),
        };
        let disk = Arc::clone(disk);
        let make = move || App {
            disk,
            port,
            bound,
            incarnation,
            epoch: Epoch(epoch),
            conns: BTreeMap::new(),
            is_holding: false,
            held: Vec::new(),
        };
        let running = spawn(options, Vec::new(), make).expect("a thread");
        let address = address.recv().expect("it listens");
        Store { running, address }
    }

    /// The process ends; what it had accepted and not done is gone.
    pub fn stop(self) -> u16 {
        self.running.handle.stop();
        self.running.thread.join().expect("ends");
        self.address.port()
    }

    pub fn cut(&self) {
        self.running.handle.try_send(Command::Cut).expect("room");
    }

    /// Returns how many were released.
    pub fn hold(&self, is_holding: bool) -> usize {
        let (to, answer) = mpsc::channel();
        self.running.handle.try_send(Command::Hold(is_holding, to)).expect("room");
        answer.recv().expect("answered")
    }

    pub fn held(&self) -> usize {
        let (to, answer) = mpsc::channel();
        self.running.handle.try_send(Command::Held(to)).expect("room");
        answer.recv().expect("answered")
    }
}

/// How the conductor would describe the volume.
pub fn spec(address: SocketAddr, epoch: u64) -> VolumeSpec {
    let target = Target { address, lane: 0 };
    let route = |index| ShardRoute { index, epoch: Epoch(epoch), target };
    let ticket = Ticket {
        volume: VOLUME,
        attach_epoch: 1,
        session: 5,
        expires: u64::MAX,
        rights: Rights::READ_WRITE,
    };
    let signed = SignedTicket { ticket, mac: [3; 32] };
    let shards = (0..SHARDS as u32).map(route).collect();
    VolumeSpec::new(VOLUME, (SIZE_BYTES, SHARD_BYTES), 1, signed, shards).expect("right")
}

/// HELLO first, then everything else.
struct CalledFraming(PfwFraming);

impl Framing for CalledFraming {
    fn header_bytes(&self) -> usize {
        HEADER_BYTES
    }

    fn body(&mut self, header: &[u8]) -> Result<BodyLayout, FrameError> {
        let header = self.0.check(header).map_err(|e| FrameError { reason: e.to_string() })?;
        if header.opcode == Opcode::Hello {
            self.0 = PfwFraming::open(Side::Called);
        }
        Ok(header.body)
    }
}

struct App {
    disk: Arc<Disk>,
    port: u16,
    bound: mpsc::Sender<SocketAddr>,
    incarnation: u64,
    epoch: Epoch,
    /// Slot and generation, once greeted.
    conns: BTreeMap<ConnId, Option<(u8, u64)>>,
    is_holding: bool,
    /// Writes that have their place in the order and are not done: slot, generation, request.
    held: Vec<(ConnId, (u8, u64), Request)>,
}

impl App {
    fn greet(&mut self, ctx: &mut Context, conn: ConnId, request: &Request, hello: &Hello) {
        let Who::Client(signed) = &hello.who else { panic!("a client says so") };
        assert_eq!((signed.ticket.volume, signed.ticket.attach_epoch), (VOLUME, 1));
        if hello.cluster_id != CLUSTER {
            self.disk.count(|counts| counts.refused_hellos += 1);
            self.refuse(ctx, conn, request, Status::WrongCluster);
            return ctx.finish(conn);
        }
        self.disk.count(|counts| counts.hellos += 1);
        self.conns.insert(conn, Some((hello.path.slot, hello.path.generation)));
        let reply = HelloReply {
            version: 1,
            features: 0,
            lanes: 1,
            limits: Limits::DEFAULT,
            peer: Peer { store: 1, incarnation: self.incarnation, nonce: [0; 32], proof: [0; 32] },
        };
        self.reply(ctx, conn, request, Ok(ReplyOp::Hello(Box::new(reply))));
    }

    fn refuse(&self, ctx: &mut Context, conn: ConnId, request: &Request, status: Status) {
        self.reply(ctx, conn, request, Err(status));
    }

    fn reply(
        &self,
        ctx: &mut Context,
        conn: ConnId,
        request: &Request,
        result: Result<ReplyOp, Status>,
    ) {
        let opcode = request.op.opcode();
        let failed = |status| proto::wire::Failure { opcode, status, detail: 0 };
        let reply = Reply {
            command_id: request.command_id,
            shard: request.shard,
            epoch: self.epoch,
            seq: Seq(0),
            result: result.map_err(failed),
        };
        // Lost with its connection, as replies are.
        let _ = ctx.send(conn, reply.encode());
    }

    fn fence(&mut self, ctx: &mut Context, conn: ConnId, request: &Request, slot: u8, upto: u64) {
        let is_meant = |path: (u8, u64)| path.0 == slot && path.1 <= upto;
        for (other, path) in &self.conns {
            if path.is_some_and(is_meant) {
                assert_ne!(*other, conn, "a path does not fence itself");
                ctx.close(*other);
            }
        }
        let held = std::mem::take(&mut self.held);
        let (closed, kept): (Vec<_>, Vec<_>) =
            held.into_iter().partition(|(_, path, _)| is_meant(*path));
        self.held = kept;
        let mut outcomes = Vec::new();
        for (_, _, ghost) in closed {
            self.execute(ctx, &ghost).expect("it was checked");
            let lsn = Lsn { epoch: self.epoch, seq: Seq(1) };
            let command_id = ghost.command_id;
            outcomes.push(FenceOutcome { command_id, lsn, status: Status::Ok, detail: 0 });
        }
        self.disk.count(|counts| {
            counts.fences += 1;
            counts.outcomes += outcomes.len() as u64;
        });
        self.reply(ctx, conn, request, Ok(ReplyOp::FencePath(outcomes)));
    }

    fn place(request: &Request, range: ByteRange) -> Result<std::ops::Range<usize>, Status> {
        let base = u64::from(request.shard.index) * SHARD_BYTES;
        let end = base + range.end();
        if range.end() > SHARD_BYTES || end > SIZE_BYTES {
            return Err(Status::OutOfRange);
        }
        Ok((base + range.offset()) as usize..end as usize)
    }

    fn execute(&mut self, ctx: &Context, request: &Request) -> Result<ReplyOp, Status> {
        let mut bytes = self.disk.bytes.lock().expect("not poisoned");
        match &request.op {
            RequestOp::Read { range, .. } => {
                let place = App::place(request, *range)?;
                let buf = ctx.pool().copy_of(&bytes[place]).freeze();
                let data: BufList = proto::block::single(buf);
                Ok(ReplyOp::Read(CheckedData::compute((range.offset() % 4096) as u32, data)))
            }
            RequestOp::Write(data) => {
                let place = App::place(request, data.range())?;
                bytes[place].copy_from_slice(&data.checked().to_vec());
                drop(bytes);
                self.disk.count(|counts| counts.writes += 1);
                Ok(ReplyOp::Write)
            }
            RequestOp::Discard(range) => {
                bytes[App::place(request, *range)?].fill(0);
                Ok(ReplyOp::Discard)
            }
            RequestOp::WriteZeroes { range, .. } => {
                bytes[App::place(request, *range)?].fill(0);
                Ok(ReplyOp::WriteZeroes)
            }
            RequestOp::Hello(_)
            | RequestOp::FencePath { .. }
            | RequestOp::Ping(_)
            | RequestOp::Flush
            | RequestOp::CompareAndWrite { .. }
            | RequestOp::Prepare(_)
            | RequestOp::Settle(_)
            | RequestOp::Tails(_)
            | RequestOp::Copy(_)
            | RequestOp::Digest(_)
            | RequestOp::Snap(_)
            | RequestOp::Attach(..)
            | RequestOp::NeedConf(_) => panic!("{:?} of a client", request.op.opcode()),
        }
    }
}

impl Application for App {
    type Command = Command;

    fn start(&mut self, ctx: &mut Context) {
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        let (_, address) = ctx.listen(address).expect("the port is free");
        self.bound.send(address).expect("the test waits");
    }

    fn command(&mut self, ctx: &mut Context, command: Command) {
        match command {
            Command::Hold(is_holding, to) => {
                self.is_holding = is_holding;
                let held = if is_holding { Vec::new() } else { std::mem::take(&mut self.held) };
                to.send(held.len()).expect("the test waits");
                for (conn, _, request) in held {
                    let result = self.execute(ctx, &request);
                    self.reply(ctx, conn, &request, result);
                }
            }
            Command::Held(to) => to.send(self.held.len()).expect("the test waits"),
            Command::Cut => self.conns.keys().for_each(|conn| ctx.close(*conn)),
        }
    }

    fn accepted(&mut self, ctx: &mut Context, _listener: ListenerId, socket: OwnedFd) {
        let framing = CalledFraming(PfwFraming::handshake(Side::Called));
        let conn = ctx.adopt(socket, Box::new(framing), &[]).expect("a socket");
        self.conns.insert(conn, None);
    }

    fn frame(&mut self, ctx: &mut Context, conn: ConnId, frame: Frame) {
        let header = Header::parse(&frame.header).expect("the framing has checked it");
        let request = Request::parse(&header, frame).expect("the client sends what is right");
        if let RequestOp::Hello(hello) = &request.op {
            return self.greet(ctx, conn, &request, hello);
        }
        if let RequestOp::FencePath { slot, generation } = request.op {
            return self.fence(ctx, conn, &request, slot, generation);
        }
        assert_eq!(request.shard.volume, VOLUME);
        if request.epoch < self.epoch {
            self.disk.count(|counts| counts.stale += 1);
            return self.refuse(ctx, conn, &request, Status::StaleEpoch);
        }
        if self.is_holding && request.op.opcode() == Opcode::Write {
            let path = self.conns[&conn].expect("greeted");
            return self.held.push((conn, path, request));
        }
        let result = self.execute(ctx, &request);
        self.reply(ctx, conn, &request, result);
    }

    fn closed(&mut self, _ctx: &mut Context, conn: ConnId, _reason: CloseReason) {
        self.conns.remove(&conn);
    }

    fn opened(&mut self, _ctx: &mut Context, _conn: ConnId, _how: Opened) {}
    fn disk(&mut self, _ctx: &mut Context, _disk: DiskIndex, _done: &mut Vec<DiskDone>) {}
    fn timer(&mut self, _ctx: &mut Context) {}
    fn idle(&mut self, _ctx: &mut Context) {}
}
