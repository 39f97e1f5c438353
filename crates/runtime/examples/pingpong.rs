//! What the reactor itself costs: a closed loop between two reactors over one loopback TCP
//! connection, with nothing behind. 64-byte header; `read` brings a payload back, `write` takes
//! one.
//!
//!     cargo run --release -p pureflash-runtime --example pingpong -- read 32 3 4096 [SPIN_US]
//!
//! Arguments: direction, requests outstanding, seconds, payload bytes, longest spin. Prints
//! requests per second, CPU-seconds of both ends per million requests (all threads of the process,
//! user and system) and system calls of the server per request.

use proto::Pool;
use proto::buffer::Buf;
use proto::disk::DiskDone;
use proto::frame::{BodyLayout, Frame, FrameError, Framing, OutFrame};
use runtime::clock;
use runtime::reactor::{
    Address, Application, CloseReason, ConnId, Context, DiskIndex, ListenerId, Opened, Options,
    Running, spawn,
};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::Duration;

const HEADER_BYTES: usize = 64;
const MAGIC: u32 = 0x5052_4550;
/// What the server reads from: large enough to miss the caches, as real data does.
const STORE_BYTES: usize = 256 << 20;
const CHUNK_BYTES: usize = 1 << 20;

/// Header: magic, payload bytes that follow, payload bytes wanted (u32 each), id (u64), zeros.
struct PingFraming;

impl Framing for PingFraming {
    fn header_bytes(&self) -> usize {
        HEADER_BYTES
    }

    fn body(&mut self, header: &[u8]) -> Result<BodyLayout, FrameError> {
        if word(header, 0) != MAGIC || word(header, 4) as usize > CHUNK_BYTES {
            return Err(FrameError { reason: "not a ping".to_owned() });
        }
        Ok(BodyLayout { meta_bytes: 0, payload_bytes: word(header, 4) })
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn header(payload_bytes: u32, wanted_bytes: u32, id: u64) -> OutFrame {
    let mut frame = OutFrame::default();
    for number in [MAGIC, payload_bytes, wanted_bytes] {
        frame.head.extend_from_slice(&number.to_le_bytes());
    }
    frame.head.extend_from_slice(&id.to_le_bytes());
    frame.head.resize(HEADER_BYTES, 0);
    frame
}

struct Server {
    store: Vec<Buf>,
    random: u64,
    listening: mpsc::Sender<SocketAddr>,
}

impl Application for Server {
    type Command = ();

    fn start(&mut self, ctx: &mut Context) {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (_, address) = ctx.listen(any).expect("a port");
        self.listening.send(address).expect("main waits");
    }

    fn accepted(&mut self, ctx: &mut Context, _listener: ListenerId, socket: OwnedFd) {
        ctx.adopt(socket, Box::new(PingFraming), &[]).expect("a socket");
    }

    fn frame(&mut self, ctx: &mut Context, conn: ConnId, frame: Frame) {
        let wanted = word(&frame.header, 8) as usize;
        let mut reply = header(wanted as u32, 0, 0);
        reply.head[12..20].copy_from_slice(&frame.header[12..20]);
        if wanted > 0 {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            let chunk = &self.store[self.random as usize % self.store.len()];
            let places = (CHUNK_BYTES - wanted) / 4096 + 1;
            let start = (self.random >> 32) as usize % places * 4096;
            // Copied, as a memory disk does.
            reply.payload.push(ctx.pool().copy_of(&chunk[start..start + wanted]).freeze());
        }
        let _ = ctx.send(conn, reply);
    }

    fn command(&mut self, _ctx: &mut Context, (): ()) {}
    fn disk(&mut self, _ctx: &mut Context, _disk: DiskIndex, _done: &mut Vec<DiskDone>) {}
    fn opened(&mut self, _ctx: &mut Context, _conn: ConnId, _how: Opened) {}
    fn closed(&mut self, _ctx: &mut Context, _conn: ConnId, _reason: CloseReason) {}
    fn timer(&mut self, _ctx: &mut Context) {}
    fn idle(&mut self, _ctx: &mut Context) {}
}

struct Client {
    server: SocketAddr,
    depth: u64,
    payload: Option<Buf>,
    wanted_bytes: u32,
    sent: u64,
    done: u64,
    is_over: bool,
    seconds: u64,
    result: mpsc::Sender<u64>,
}

impl Client {
    fn ask(&mut self, ctx: &mut Context, conn: ConnId) {
        let bytes = self.payload.as_ref().map_or(0, |buf| buf.len() as u32);
        let mut request = header(bytes, self.wanted_bytes, self.sent);
        request.payload.extend(self.payload.clone());
        self.sent += 1;
        ctx.send(conn, request).expect("the server is there");
    }
}

impl Application for Client {
    type Command = ();

    fn start(&mut self, ctx: &mut Context) {
        let address = Address::Tcp(self.server);
        ctx.connect(&address, Box::new(PingFraming)).expect("begun");
    }

    fn opened(&mut self, ctx: &mut Context, conn: ConnId, _how: Opened) {
        ctx.set_timer(Some(ctx.now().after_millis(self.seconds * 1000)));
        for _ in 0..self.depth {
            self.ask(ctx, conn);
        }
    }

    fn frame(&mut self, ctx: &mut Context, conn: ConnId, frame: Frame) {
        assert_eq!(
            frame.payload.iter().map(|b| b.len()).sum::<usize>(),
            self.wanted_bytes as usize
        );
        self.done += 1;
        if !self.is_over {
            self.ask(ctx, conn);
        } else if self.done == self.sent {
            self.result.send(self.done).expect("main waits");
            ctx.close(conn);
        }
    }

    fn timer(&mut self, _ctx: &mut Context) {
        self.is_over = true;
    }

    fn command(&mut self, _ctx: &mut Context, (): ()) {}
    fn disk(&mut self, _ctx: &mut Context, _disk: DiskIndex, _done: &mut Vec<DiskDone>) {}
    fn accepted(&mut self, _ctx: &mut Context, _listener: ListenerId, _socket: OwnedFd) {}
    fn closed(&mut self, _ctx: &mut Context, _conn: ConnId, _reason: CloseReason) {}
    fn idle(&mut self, _ctx: &mut Context) {}
}

fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let text = |at: usize, default: &str| {
        arguments.get(at).map_or_else(|| default.to_owned(), String::clone)
    };
    let number =
        |at: usize, default: &str| text(at, default).parse::<u64>().expect("a whole number");
    let is_write = text(0, "read") == "write";
    let (depth, seconds, bytes) = (number(1, "32"), number(2, "3"), number(3, "4096") as u32);
    assert!(depth > 0 && bytes > 0 && bytes as usize <= CHUNK_BYTES, "see the head of this file");
    let spin = Duration::from_micros(number(4, "20"));
    let options = |name: &str| Options {
        name: name.to_owned(),
        command_capacity: 1,
        spin,
        pool: Pool::new(4 << 20),
    };
    let mut fill = Pool::new(0).alloc(CHUNK_BYTES);
    fill.fill(0x5A);
    let pool = Pool::new(0);
    let store = (0..STORE_BYTES / CHUNK_BYTES).map(|_| pool.copy_of(&fill).freeze()).collect();
    let (listening, address) = mpsc::channel();
    let server = move || Server { store, random: 88_172_645_463_325_252, listening };
    let server = spawn(options("server"), Vec::new(), server).expect("a reactor");
    let (result, over) = mpsc::channel();
    let client = Client {
        server: address.recv().expect("the server listens"),
        depth,
        payload: is_write.then(|| fill.freeze().slice(0..bytes as usize)),
        wanted_bytes: if is_write { 0 } else { bytes },
        sent: 0,
        done: 0,
        is_over: false,
        seconds,
        result,
    };
    let (begun, cpu_before) = (clock::now(), cpu_seconds());
    let client = spawn(options("client"), Vec::new(), move || client).expect("a reactor");
    let done = over.recv().expect("the client ends") as f64;
    let (elapsed, cpu) = ((clock::now().0 - begun.0) as f64 * 1e-9, cpu_seconds() - cpu_before);
    let counted = server.handle.metrics();
    let calls = [&counted.receive_calls, &counted.send_calls, &counted.waits];
    let calls = calls.map(|counter| counter.get() as f64 / done);
    println!(
        "{:.0} requests/s, {:.2} CPU-s per million, server calls per request: \
         {:.3} receive + {:.3} send + {:.3} wait",
        done / elapsed,
        cpu / done * 1e6,
        calls[0],
        calls[1],
        calls[2],
    );
    for Running { handle, thread } in [client, server] {
        handle.stop();
        thread.join().expect("a reactor that panics aborts");
    }
}
