//! A small protocol and an application that answers in it, for the tests of the reactor.

use super::*;
use crate::reactor::Address;
use proto::frame::{BodyLayout, Framing, OutFrame};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;

/// Header: magic, tag, bytes of meta, bytes of payload; little-endian u32 each.
pub(crate) struct TestFraming;

const MAGIC: u32 = 0x5AFE_C0DE;
pub(crate) const HEADER_BYTES: usize = 16;
const PAYLOAD_MAX: u32 = 32 << 20;

impl Framing for TestFraming {
    fn header_bytes(&self) -> usize {
        HEADER_BYTES
    }

    fn body(&mut self, header: &[u8]) -> Result<BodyLayout, FrameError> {
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let refuse = |reason: String| Err(FrameError { reason });
        if word(0) != MAGIC {
            return refuse(format!("magic {:#x}, expected {MAGIC:#x}", word(0)));
        }
        if word(12) > PAYLOAD_MAX || word(8) > 4096 {
            return refuse(format!("{} + {} bytes are too many", word(8), word(12)));
        }
        Ok(BodyLayout { meta_bytes: word(8), payload_bytes: word(12) })
    }
}

/// A frame whose every byte follows from `tag` and its place.
pub(crate) fn frame_bytes(tag: u32, meta: usize, payload: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + meta + payload);
    for word in [MAGIC, tag, meta as u32, payload as u32] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend((0..meta + payload).map(|at| (at as u32).wrapping_mul(tag | 1).to_le_bytes()[1]));
    bytes
}

/// What the application tells the test.
#[derive(Debug, PartialEq)]
pub(crate) enum Told {
    Accepted(ConnId),
    Opened(ConnId, Opened),
    Frame(u32),
    Closed(ConnId, CloseReason),
    Timer,
    Disk(usize),
}

pub(crate) type Action = Box<dyn FnOnce(&mut Echo, &mut Context) + Send>;

/// Sends every frame back as it came. Commands are actions that run inside the reactor.
pub(crate) struct Echo {
    pub told: mpsc::Sender<Told>,
    pub is_echoing: bool,
    pub tells_frames: bool,
    pub pauses_after_each: bool,
    pub idles: u64,
}

impl Echo {
    pub fn tell(&self, what: Told) {
        self.told.send(what).expect("the test listens until the end");
    }
}

impl Application for Echo {
    type Command = Action;

    fn start(&mut self, _ctx: &mut Context) {}

    fn command(&mut self, ctx: &mut Context, action: Action) {
        action(self, ctx);
    }

    fn disk(&mut self, _ctx: &mut Context, _disk: DiskIndex, done: &mut Vec<DiskDone>) {
        for one in done.drain(..) {
            one.result.expect("the disks of these tests work");
            self.tell(Told::Disk(one.id.0 as usize));
        }
    }

    fn accepted(&mut self, ctx: &mut Context, _listener: ListenerId, socket: OwnedFd) {
        let id = ctx.adopt(socket, Box::new(TestFraming), &[]).expect("a socket");
        self.tell(Told::Accepted(id));
    }

    fn opened(&mut self, _ctx: &mut Context, conn: ConnId, how: Opened) {
        self.tell(Told::Opened(conn, how));
    }

    fn frame(&mut self, ctx: &mut Context, conn: ConnId, frame: Frame) {
        if self.tells_frames {
            let tag = frame.header[4..8].try_into().expect("4 bytes");
            self.tell(Told::Frame(u32::from_le_bytes(tag)));
        }
        if self.pauses_after_each {
            ctx.pause(conn);
        }
        if self.is_echoing {
            let mut reply = OutFrame { payload: frame.payload, ..OutFrame::default() };
            reply.head.extend_from_slice(&frame.header);
            reply.head.extend_from_slice(&frame.meta);
            // A full queue ends the connection: the test hears of it by `closed`.
            let _ = ctx.send(conn, reply);
        }
    }

    fn closed(&mut self, ctx: &mut Context, conn: ConnId, reason: CloseReason) {
        assert_eq!(ctx.send(conn, OutFrame::default()), Err(SendError::Gone));
        self.tell(Told::Closed(conn, reason));
    }

    fn timer(&mut self, _ctx: &mut Context) {
        self.tell(Told::Timer);
    }

    fn idle(&mut self, _ctx: &mut Context) {
        self.idles += 1;
    }
}

/// A running echo server and what it tells. Stopped and joined at the end of the test.
pub(crate) struct Server {
    pub handle: Handle<Action>,
    pub told: mpsc::Receiver<Told>,
    thread: Option<JoinHandle<()>>,
}

/// Far longer than anything takes: a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(60);

impl Server {
    pub fn start() -> Server {
        Server::with(Vec::new(), 1024)
    }

    pub fn with(engines: Vec<Box<dyn DiskEngine>>, command_capacity: usize) -> Server {
        let options = Options {
            name: "lane-test".to_owned(),
            command_capacity,
            spin: SPIN_MAX,
            pool: Pool::new(8 << 20),
        };
        let (told, listening) = mpsc::channel();
        let make = move || Echo {
            told,
            is_echoing: true,
            tells_frames: false,
            pauses_after_each: false,
            idles: 0,
        };
        let running = spawn(options, engines, make).expect("a reactor");
        Server { handle: running.handle, told: listening, thread: Some(running.thread) }
    }

    /// Run `action` inside the reactor and wait for its result.
    pub fn call<R: Send + 'static>(
        &self,
        action: impl FnOnce(&mut Echo, &mut Context) -> R + Send + 'static,
    ) -> R {
        let (sender, result) = mpsc::channel();
        let action = move |echo: &mut Echo, ctx: &mut Context| {
            sender.send(action(echo, ctx)).expect("the caller waits");
        };
        assert!(self.handle.try_send(Box::new(action)).is_ok(), "room for a command");
        result.recv_timeout(PATIENCE).expect("the reactor turns")
    }

    pub fn next(&self) -> Told {
        self.told.recv_timeout(PATIENCE).expect("the reactor turns")
    }

    pub fn listen(&self) -> SocketAddr {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        self.call(move |_, ctx| ctx.listen(any).expect("a port").1)
    }

    /// A TCP client whose connection the server has accepted.
    pub fn tcp(&self) -> (TcpStream, ConnId) {
        let client = TcpStream::connect(self.listen()).expect("connected");
        client.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        client.set_nodelay(true).expect("no delay");
        let told = self.next();
        let Told::Accepted(id) = told else { panic!("{told:?} instead of a connection") };
        (client, id)
    }

    /// One end of a socket pair; the server has adopted the other.
    pub fn unix(&self) -> (UnixStream, ConnId) {
        let (client, socket) = UnixStream::pair().expect("a pair");
        client.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let adoption = Adoption {
            socket: socket.into(),
            framing: Box::new(TestFraming),
            leftover: Vec::new(),
            token: 77,
        };
        self.handle.adopt(adoption).expect("room");
        let told = self.next();
        let Told::Opened(id, Opened::Adopted { token: 77 }) = told else {
            panic!("{told:?} instead of a connection")
        };
        (client, id)
    }

    /// Connect from inside the reactor.
    pub fn connect(&self, address: Address) -> ConnId {
        self.call(move |_, ctx| ctx.connect(&address, Box::new(TestFraming)).expect("begun"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("a reactor that panics aborts");
        }
    }
}

/// Send `stream` in pieces that `next_size` chooses, and take back as many bytes meanwhile.
pub(crate) fn exchange<S>(client: &S, stream: &[u8], mut next_size: impl FnMut() -> usize + Send)
where
    S: Sync,
    for<'a> &'a S: Read + Write,
{
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut rest = stream;
            while !rest.is_empty() {
                let (piece, tail) = rest.split_at(next_size().clamp(1, rest.len()));
                (&mut &*client).write_all(piece).expect("the server reads");
                rest = tail;
            }
        });
        let mut back = vec![0; stream.len()];
        (&mut &*client).read_exact(&mut back).expect("the server answers");
        assert!(back == stream, "what came back differs");
    });
}

/// xorshift64: the same numbers for the same seed.
pub(crate) fn random(seed: u64) -> impl FnMut(usize) -> usize + Send {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    }
}
