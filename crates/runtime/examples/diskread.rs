//! What an engine itself costs: random reads of 4 KiB from a file or device, nothing else.
//!
//!     cargo run --release -p pureflash-runtime --example diskread -- PATH [auto|aio|threads] 32 3
//!
//! Arguments: disk (at least 1 MiB; write the file before, holes read too fast), engine, requests
//! outstanding, seconds. Prints reads per second and CPU-seconds per million reads, all threads.
//! The same with fio: `fio --name=r --filename=PATH --rw=randread --bs=4k --iodepth=32 --direct=1
//! --ioengine=io_uring --norandommap --randrepeat=0 --time_based --runtime=3`.

use proto::disk::{DiskOp, DiskRequest, IoId};
use proto::{BLOCK_BYTES, Pool};
use runtime::engine::{DiskEngine, EngineChoice, open};
use runtime::{DiskFile, clock};
use rustix::event::{PollFd, PollFlags, poll};
use std::path::Path;

struct Load {
    random: u64,
    blocks: u64,
}

impl Load {
    fn queue(&mut self, engine: &mut dyn DiskEngine) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let offset = self.random % self.blocks * BLOCK_BYTES as u64;
        let op = DiskOp::Read { offset, len: BLOCK_BYTES as u32 };
        engine.queue(DiskRequest { id: IoId(0), op });
    }
}

fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, engine, depth, seconds] = &arguments[..] else {
        eprintln!("usage: diskread PATH auto|aio|threads DEPTH SECONDS");
        std::process::exit(2);
    };
    let choice = match engine.as_str() {
        "threads" => EngineChoice::Threads,
        "aio" => EngineChoice::Aio,
        _ => EngineChoice::Auto,
    };
    let depth: u32 = depth.parse().expect("a number of requests");
    let seconds: u64 = seconds.parse().expect("a number of seconds");
    let disk = DiskFile::open(Path::new(path)).unwrap_or_else(|error| {
        eprintln!("{error}");
        std::process::exit(1);
    });
    let (mut engine, probe) = open(choice, &disk, &Pool::new(4 << 20), depth).expect("an engine");
    println!("{}; direct: {}; {:?}", probe.reasons.join("; "), disk.is_direct(), disk.promise());
    let mut load = Load { random: 1, blocks: disk.size_bytes() / BLOCK_BYTES as u64 };
    let mut done = Vec::new();
    let (begun, cpu_before) = (clock::now(), cpu_seconds());
    (0..depth).for_each(|_| load.queue(&mut *engine));
    while clock::now() < begun.after_millis(seconds * 1000) {
        engine.submit();
        if engine.arm() {
            poll(&mut [PollFd::from_borrowed_fd(engine.wake_fd(), PollFlags::IN)], None)
                .expect("poll");
            rustix::io::read(engine.wake_fd(), &mut [0u8; 8]).expect("a signal");
        }
        engine.reap(&mut done);
        for one in done.drain(..) {
            one.result.expect("the disk reads");
            load.queue(&mut *engine);
        }
    }
    let (elapsed, cpu) = ((clock::now().0 - begun.0) as f64 * 1e-9, cpu_seconds() - cpu_before);
    let reads = engine.counters().reads as f64;
    println!("{:.0} reads/s, {:.2} CPU-s per million", reads / elapsed, cpu / reads * 1e6);
}
