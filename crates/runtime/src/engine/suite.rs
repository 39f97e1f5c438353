//! One suite for every engine: whatever an engine is made of, a lane sees the same disk.

use super::*;
use crate::disk_file::tests::Folder;
use crate::disk_file::{DiskFd, DiskFile, create_sparse};
use proto::buffer::Buf;
use proto::disk::BufList;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::PipeFlags;
use std::collections::HashMap;
use std::io::Write;
use std::os::fd::OwnedFd;

const BLOCK: u64 = BLOCK_BYTES as u64;
const DISK_BYTES: u64 = 16 << 20;
/// Small, so that every test overflows it.
const DEPTH: u32 = 8;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Uring,
    Aio,
    Threads,
    Inline,
    Mem,
}

/// A disk of one kind, and engines over it.
struct Rig {
    kind: Kind,
    pool: Pool,
    memory: MemDisk,
    disk: DiskFile,
    _folder: Folder,
}

impl Rig {
    fn new(kind: Kind) -> Rig {
        let folder = Folder::new();
        let path = folder.path("disk0.img");
        create_sparse(&path, DISK_BYTES).expect("a file");
        let disk = DiskFile::open(&path).expect("a disk");
        let memory = MemDisk::new(DISK_BYTES);
        assert_eq!(memory.size_bytes(), DISK_BYTES);
        Rig { kind, pool: Pool::new(4 << 20), memory, disk, _folder: folder }
    }

    fn engine(&self) -> Box<dyn DiskEngine> {
        let pool = self.pool.clone();
        let fd = Arc::clone(self.disk.fd());
        match self.kind {
            Kind::Uring => Box::new(Uring::new(fd, pool, DEPTH).expect("a ring")),
            Kind::Aio => Box::new(Aio::new(fd, pool, DEPTH).expect("a context")),
            Kind::Threads => Box::new(Threads::new(fd, pool, DEPTH).expect("threads")),
            Kind::Inline => Box::new(Inline::new(fd, pool).expect("an inline engine")),
            Kind::Mem => Box::new(Mem::new(self.memory.clone(), pool).expect("a mem engine")),
        }
    }

    fn block(&self, value: u64) -> Buf {
        let mut block = self.pool.alloc(BLOCK_BYTES);
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&value.to_le_bytes());
        }
        block.freeze()
    }
}

fn read(id: u64, offset: u64, len: u64) -> DiskRequest {
    DiskRequest { id: IoId(id), op: DiskOp::Read { offset, len: len as u32 } }
}

fn write(id: u64, offset: u64, data: impl IntoIterator<Item = Buf>) -> DiskRequest {
    let data: BufList = data.into_iter().collect();
    DiskRequest { id: IoId(id), op: DiskOp::Write { offset, data } }
}

/// Sleep on the wake-up descriptor, as the reactor does, until something is ready.
fn wait(engine: &mut dyn DiskEngine, out: &mut Vec<DiskDone>) {
    let before = out.len();
    while out.len() == before {
        assert!(engine.in_flight() > 0, "nothing left to wait for");
        if engine.arm() {
            let wake = engine.wake_fd();
            let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
            let mut fds = [PollFd::from_borrowed_fd(wake, PollFlags::IN)];
            assert_eq!(poll(&mut fds, Some(&limit)).expect("poll"), 1, "no wake-up in 60 s");
            rustix::io::read(wake, &mut [0u8; 8]).expect("a signal to take back");
        }
        engine.reap(out);
    }
}

/// Run `requests` to their end; results by id.
fn run(engine: &mut dyn DiskEngine, requests: Vec<DiskRequest>) -> HashMap<u64, DiskDone> {
    let count = requests.len();
    requests.into_iter().for_each(|request| engine.queue(request));
    assert_eq!(engine.in_flight(), count);
    engine.submit();
    let mut done = Vec::new();
    while done.len() < count {
        wait(engine, &mut done);
    }
    assert_eq!(engine.in_flight(), 0);
    let by_id: HashMap<_, _> = done.into_iter().map(|done| (done.id.0, done)).collect();
    assert_eq!(by_id.len(), count, "each request is answered once");
    by_id
}

fn data(done: &DiskDone) -> &Buf {
    done.result.as_ref().expect("success").as_ref().expect("a read brings data")
}

fn what_is_written_is_read(kind: Kind) {
    let rig = Rig::new(kind);
    let mut engine = rig.engine();
    assert!(engine.arm(), "nothing is ready before anything was asked");
    let one = run(&mut *engine, vec![write(1, 5 * BLOCK, [rig.block(77)])]);
    assert!(matches!(one[&1].result, Ok(None)));
    let back = run(&mut *engine, vec![read(2, 4 * BLOCK, 3 * BLOCK)]);
    let bytes = data(&back[&2]);
    assert!(bytes[..BLOCK_BYTES].iter().all(|&byte| byte == 0), "never written: zeros");
    assert_eq!(bytes[BLOCK_BYTES..2 * BLOCK_BYTES], rig.block(77)[..]);
    assert_eq!(bytes.as_ptr() as usize % BLOCK_BYTES, 0, "aligned for O_DIRECT");
    let counters = engine.counters();
    assert_eq!((counters.writes, counters.written_bytes), (1, BLOCK));
    assert_eq!((counters.reads, counters.read_bytes), (1, 3 * BLOCK));
    drop(engine);
    let again = run(&mut *rig.engine(), vec![read(3, 5 * BLOCK, BLOCK)]);
    assert_eq!(data(&again[&3])[..], rig.block(77)[..], "the disk outlives its engine");
}

fn gathered_writes_land_in_order(kind: Kind) {
    let rig = Rig::new(kind);
    let mut engine = rig.engine();
    for count in [2, 3, 17, 256] {
        // Slices of one buffer, as the lane cuts them, among buffers of their own.
        let mut long = rig.pool.alloc(3 * BLOCK_BYTES);
        long.fill(9);
        let long = long.freeze();
        let parts: Vec<_> = (0..count)
            .map(|n| if n % 5 == 1 { long.slice(4096..12288) } else { rig.block(n) })
            .collect();
        let expected: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        run(&mut *engine, vec![write(1, 8 * BLOCK, parts)]);
        let mut found = Vec::new();
        for (index, piece) in expected.chunks(64 * BLOCK_BYTES).enumerate() {
            let at = 8 * BLOCK + index as u64 * 64 * BLOCK;
            let back = run(&mut *engine, vec![read(2, at, piece.len() as u64)]);
            found.extend_from_slice(data(&back[&2]));
        }
        assert!(found == expected, "{count} buffers");
    }
}

/// Random requests, more than the depth, none overlapping another in flight, against a model.
fn a_deep_queue_behaves_like_an_array(kind: Kind) {
    let rig = Rig::new(kind);
    let mut engine = rig.engine();
    let mut model = vec![0u64; 512];
    let mut random = 0x9E37_79B9_7F4A_7C15_u64;
    for round in 0..20u64 {
        let mut requests = Vec::new();
        let mut expected = HashMap::new();
        for block in 0..model.len() as u64 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            if random.is_multiple_of(3) {
                requests.push(write(block, block * BLOCK, [rig.block(random)]));
                model[block as usize] = random;
            } else if random % 3 == 1 {
                requests.push(read(block, block * BLOCK, BLOCK));
                expected.insert(block, model[block as usize]);
            }
        }
        assert!(requests.len() > 20 * DEPTH as usize);
        let done = run(&mut *engine, requests);
        for (block, value) in expected {
            assert_eq!(data(&done[&block])[..], rig.block(value)[..], "round {round}");
        }
    }
}

fn flushes_are_answered_and_counted(kind: Kind) {
    let rig = Rig::new(kind);
    let mut engine = rig.engine();
    let flush = |id| DiskRequest { id: IoId(id), op: DiskOp::Flush };
    let requests = (0..8).map(|n| write(n, n * BLOCK, [rig.block(n)]));
    run(&mut *engine, requests.collect());
    let done = run(&mut *engine, vec![flush(1), flush(2)]);
    assert!(done.values().all(|done| matches!(done.result, Ok(None))));
    assert_eq!((engine.counters().flushes, engine.counters().errors), (2, 0));
}

fn reading_past_the_end_is_short(kind: Kind) {
    let rig = Rig::new(kind);
    let mut engine = rig.engine();
    let requests = vec![
        read(1, DISK_BYTES, BLOCK),
        read(2, DISK_BYTES - BLOCK, 4 * BLOCK),
        read(3, DISK_BYTES - BLOCK, BLOCK),
    ];
    let done = run(&mut *engine, requests);
    assert_eq!(done[&1].result.as_ref().err(), Some(&DiskError::Short));
    assert_eq!(done[&2].result.as_ref().err(), Some(&DiskError::Short));
    assert_eq!(data(&done[&3]).len(), BLOCK_BYTES, "the last block is there");
    assert_eq!(engine.counters().errors, 2);
}

/// A lane that stops drops its engine with requests under way: they end, nothing is torn.
fn dropping_waits_for_what_is_in_flight(kind: Kind) {
    let rig = Rig::new(kind);
    for round in 1..=50u64 {
        let mut engine = rig.engine();
        for n in 0..u64::from(DEPTH) - 1 {
            engine.queue(write(n, n * BLOCK, [rig.block(round)]));
        }
        engine.queue(read(99, 0, 64 * BLOCK));
        engine.submit();
        // Beyond the depth, and never submitted: discarded without harm.
        engine.queue(write(100, 100 * BLOCK, [rig.block(round)]));
        drop(engine);
        let back = run(&mut *rig.engine(), vec![read(1, 0, u64::from(DEPTH) * BLOCK)]);
        for n in 0..DEPTH as usize - 1 {
            let block = &data(&back[&1])[n * BLOCK_BYTES..(n + 1) * BLOCK_BYTES];
            assert_eq!(block[..], rig.block(round)[..], "round {round}, block {n}");
        }
    }
}

fn an_engine_may_be_made_by_another_thread(kind: Kind) {
    let rig = Rig::new(kind);
    let mut engine = rig.engine();
    let request = write(1, 0, [rig.block(5)]);
    let lane = std::thread::spawn(move || {
        run(&mut *engine, vec![request]);
        engine
    });
    // Dropped by a thread that never ran it: idle, so there is nothing to wait for.
    drop(lane.join().expect("the lane ran"));
    let back = run(&mut *rig.engine(), vec![read(2, 0, BLOCK)]);
    assert_eq!(data(&back[&2])[..], rig.block(5)[..]);
}

fn its_name_is_its_kind(kind: Kind) {
    let name = format!("{kind:?}").to_lowercase();
    assert_eq!(Rig::new(kind).engine().name(), name);
}

macro_rules! suite {
    ($($case:ident),* $(,)?) => {
        mod uring { $(#[test] fn $case() { super::$case(super::Kind::Uring); })* }
        mod aio { $(#[test] fn $case() { super::$case(super::Kind::Aio); })* }
        mod threads { $(#[test] fn $case() { super::$case(super::Kind::Threads); })* }
        mod inline { $(#[test] fn $case() { super::$case(super::Kind::Inline); })* }
        mod mem { $(#[test] fn $case() { super::$case(super::Kind::Mem); })* }
    };
}

suite!(
    what_is_written_is_read,
    gathered_writes_land_in_order,
    a_deep_queue_behaves_like_an_array,
    flushes_are_answered_and_counted,
    reading_past_the_end_is_short,
    dropping_waits_for_what_is_in_flight,
    an_engine_may_be_made_by_another_thread,
    its_name_is_its_kind,
);

/// A descriptor opened for reading refuses writes: the errno arrives, the engine lives on.
#[test]
fn an_errno_is_reported_with_its_request() {
    for kind in [Kind::Uring, Kind::Aio, Kind::Threads, Kind::Inline] {
        let mut rig = Rig::new(kind);
        let flags = rustix::fs::OFlags::RDONLY;
        let fd = rustix::fs::open(rig.disk.path(), flags, rustix::fs::Mode::empty());
        rig.disk = rig.disk.with_fd(DiskFd::unlocked(fd.expect("opened for reading")));
        let mut engine = rig.engine();
        let requests = vec![write(1, 0, [rig.block(1)]), read(2, 0, BLOCK)];
        let done = run(&mut *engine, requests);
        assert_eq!(done[&1].result.as_ref().err(), Some(&DiskError::Errno(libc::EBADF)));
        assert_eq!(data(&done[&2]).len(), BLOCK_BYTES);
        let counters = engine.counters();
        assert_eq!((counters.errors, counters.writes, counters.written_bytes), (1, 1, 0));
    }
}

/// An engine over any descriptor.
fn engine_over(kind: Kind, fd: OwnedFd) -> Box<dyn DiskEngine> {
    let (fd, pool) = (Arc::new(DiskFd::unlocked(fd)), Pool::new(0));
    match kind {
        Kind::Uring => Box::new(Uring::new(fd, pool, DEPTH).expect("a ring")),
        Kind::Aio => Box::new(Aio::new(fd, pool, DEPTH).expect("a context")),
        Kind::Threads => Box::new(Threads::new(fd, pool, DEPTH).expect("threads")),
        Kind::Inline => Box::new(Inline::new(fd, pool).expect("an inline engine")),
        Kind::Mem => panic!("it has no descriptor"),
    }
}

/// A pipe of packets gives one of them per read: the file here that answers with half of a read.
/// (`pread` does not read pipes; what `threads` does with a short answer is tested below.)
#[test]
fn a_short_read_is_continued() {
    for kind in [Kind::Uring, Kind::Aio] {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::DIRECT).expect("a pipe");
        let mut writer = std::fs::File::from(writer);
        writer.write_all(&[1; BLOCK_BYTES]).expect("the first half");
        writer.write_all(&[2; BLOCK_BYTES]).expect("the second half");
        let mut engine = engine_over(kind, reader);
        engine.queue(read(1, 0, 2 * BLOCK));
        engine.submit();
        let mut done = Vec::new();
        wait(&mut *engine, &mut done);
        let bytes = data(&done[0]);
        assert!(bytes[..BLOCK_BYTES].iter().all(|&byte| byte == 1), "{kind:?}");
        assert!(bytes[BLOCK_BYTES..].iter().all(|&byte| byte == 2), "{kind:?}");
        assert_eq!(engine.counters().reads, 1);
    }
}

/// What waits in a pipe is not there yet: half an answer is none until the rest has come.
#[test]
fn half_of_a_read_is_no_answer() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut writer = std::fs::File::from(OwnedFd::from(writer));
    writer.write_all(&[1; BLOCK_BYTES]).expect("the first half");
    let mut ring = engine_over(Kind::Uring, reader.into());
    ring.queue(read(1, 0, 2 * BLOCK));
    ring.submit();
    let mut done = Vec::new();
    ring.reap(&mut done);
    assert!(done.is_empty(), "one half is no answer");
    writer.write_all(&[2; BLOCK_BYTES]).expect("the second half");
    wait(&mut *ring, &mut done);
    assert_eq!(data(&done[0]).len(), 2 * BLOCK_BYTES);
}

/// A descriptor that cannot be flushed stands for a disk whose flush fails: the errno arrives with
/// that request, once, and no engine takes it for a success or asks a second time.
#[test]
fn a_failed_flush_is_an_error_on_every_engine() {
    for kind in [Kind::Uring, Kind::Aio, Kind::Threads] {
        let (reader, _writer) = std::io::pipe().expect("a pipe");
        let mut engine = engine_over(kind, reader.into());
        let done = run(&mut *engine, vec![DiskRequest { id: IoId(1), op: DiskOp::Flush }]);
        let error = done[&1].result.as_ref().err();
        assert_eq!(error, Some(&DiskError::Errno(libc::EINVAL)), "{kind:?}");
        assert_eq!((engine.counters().flushes, engine.counters().errors), (1, 1), "{kind:?}");
    }
}

/// A call that waits (`threads`, and everything before a lane runs) goes on after short answers and
/// signals, ends at the end of the file, and does not repeat an error.
#[test]
fn a_transfer_goes_on_until_its_end() {
    let follow = |total, answers: &[Result<usize, Errno>]| {
        let mut answers = answers.iter().copied();
        let mut asked = Vec::new();
        let result = transfer(total, |done| {
            asked.push(done);
            answers.next().expect("not asked again")
        });
        (result, asked)
    };
    let (short, gone) = (Err(DiskError::Short), Err(Errno::IO));
    assert_eq!(follow(8192, &[Ok(8192)]), (Ok(()), vec![0]));
    assert_eq!(follow(8192, &[Ok(4096), Ok(4096)]), (Ok(()), vec![0, 4096]));
    assert_eq!(follow(8192, &[Ok(6000), Ok(4096)]), (Ok(()), vec![0, 4096]));
    assert_eq!(follow(4096, &[Err(Errno::INTR), Ok(4096)]), (Ok(()), vec![0, 0]));
    assert_eq!(follow(4096, &[Err(Errno::AGAIN), Ok(4096)]), (Ok(()), vec![0, 0]));
    assert_eq!(follow(4096, &[Ok(0)]), (short, vec![0]));
    assert_eq!(follow(4096, &[gone]), (Err(DiskError::Errno(libc::EIO)), vec![0]));
    let for_ever = vec![Err(Errno::INTR); RETRIES_MAX as usize];
    assert_eq!(follow(4096, &for_ever).0, Err(DiskError::Errno(libc::EAGAIN)));
}

/// Only the thread that runs a ring can wait for it. Dropped by another one while the kernel owns a
/// buffer, it must neither hang nor free: memory is leaked instead.
#[test]
fn a_ring_in_use_may_be_dropped_by_a_stranger() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let lane = std::thread::spawn(move || {
        let fd = Arc::new(DiskFd::unlocked(reader));
        let mut ring = Uring::new(fd, Pool::new(0), DEPTH).expect("a ring");
        ring.queue(read(1, 0, BLOCK));
        ring.submit();
        assert_eq!(ring.in_flight(), 1, "a read of an empty pipe waits");
        ring
    });
    let ring = lane.join().expect("the lane ran");
    // On a kernel without deferred task run anyone can wait; the end of the pipe ends the wait.
    drop(writer);
    drop(ring);
}

#[test]
fn transfers_resume_at_whole_blocks() {
    let at = |done, moved, total| match progress(done, moved, total) {
        Progress::Complete => "complete".to_owned(),
        Progress::Again { done } => format!("again {done}"),
        Progress::AtEnd => "end".to_owned(),
    };
    assert_eq!(at(0, 8192, 8192), "complete");
    assert_eq!(at(4096, 4096, 8192), "complete");
    assert_eq!(at(0, 4096, 8192), "again 4096");
    assert_eq!(at(0, 6000, 8192), "again 4096");
    assert_eq!(at(4096, 100, 12288), "end");
    assert_eq!(at(0, 0, 4096), "end");
}

#[test]
#[should_panic(expected = "not on a block")]
fn a_request_off_the_blocks_is_our_bug() {
    Rig::new(Kind::Mem).engine().queue(read(1, 512, BLOCK));
}

/// Forbid one system call to the calling thread and its children, as a container runtime does.
fn forbid(call: libc::c_long, errno: i32) {
    let jump = |code: u32, k: u32, jt, jf| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut filter = [
        jump(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        jump(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, call as u32, 0, 1),
        jump(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32, 0, 0),
        jump(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: both calls take plain numbers and one `sock_fprog` that lives across the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program), 0);
    }
}

/// What a thread gets that may not make these calls: for each choice the engine and the findings.
fn open_without(calls: &'static [libc::c_long], errno: i32) -> Vec<(&'static str, Vec<String>)> {
    // A thread of its own: the filter cannot be taken off again.
    let lane = std::thread::spawn(move || {
        calls.iter().for_each(|&call| forbid(call, errno));
        let rig = Rig::new(Kind::Threads);
        let choices = [EngineChoice::Auto, EngineChoice::Uring, EngineChoice::Aio];
        let opened = choices.map(|choice| {
            let (mut engine, probed) =
                open(choice, &rig.disk, &rig.pool, DEPTH).expect("never a refusal");
            assert_eq!(engine.name(), probed.kind.to_string());
            assert_eq!(probed, probe(choice, &rig.disk), "the probe alone says the same");
            run(&mut *engine, vec![write(1, 0, [rig.block(1)])]);
            (engine.name(), probed.reasons)
        });
        opened.to_vec()
    });
    lane.join().expect("the lane ran")
}

#[test]
fn where_io_uring_is_forbidden_aio_takes_over() {
    for errno in [libc::EPERM, libc::ENOSYS] {
        let opened = open_without(&[libc::SYS_io_uring_setup], errno);
        for (name, reasons) in &opened {
            assert_eq!((*name, &*reasons[reasons.len() - 1]), ("aio", AIO_WORKS));
        }
        let why = &opened[0].1[0];
        assert!(why.starts_with("uring: not usable here: "), "{why}");
        assert_eq!(opened[2].1[0], "aio: asked for by the configuration");
    }
}

#[test]
fn where_both_are_forbidden_threads_take_over() {
    for errno in [libc::EPERM, libc::ENOSYS] {
        let opened = open_without(&[libc::SYS_io_uring_setup, libc::SYS_io_setup], errno);
        for (name, reasons) in &opened {
            assert_eq!(*name, "threads");
            let why = &reasons[reasons.len() - 2];
            assert!(why.starts_with("aio: not usable here: "), "{why}");
            assert_eq!(reasons[reasons.len() - 1], "threads: nothing faster is usable here");
        }
    }
}

const AIO_WORKS: &str = "aio: one read and one flush done";

#[test]
fn the_probe_says_what_it_found() {
    let rig = Rig::new(Kind::Uring);
    let threads = probe(EngineChoice::Threads, &rig.disk);
    assert_eq!(threads.reasons, ["threads: asked for by the configuration"]);
    let aio = probe(EngineChoice::Aio, &rig.disk);
    assert_eq!(aio.reasons, ["aio: asked for by the configuration", AIO_WORKS]);
    let auto = probe(EngineChoice::Auto, &rig.disk);
    let (engine, opened) = open(EngineChoice::Auto, &rig.disk, &rig.pool, DEPTH).expect("opened");
    assert_eq!(auto, opened);
    assert_eq!(engine.name(), auto.kind.to_string());
    assert_eq!(auto.reasons.len(), 1);
}

#[test]
fn a_file_in_memory_is_served_inline_unless_something_else_is_asked_for() {
    let made = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&made, DISK_BYTES).expect("a size");
    let fd = Arc::new(DiskFd::unlocked(made));
    let pool = Pool::new(1 << 20);
    let (mut engine, probed) = open_fd(EngineChoice::Auto, &fd, &pool, DEPTH).expect("opened");
    assert_eq!((engine.name(), probed.kind), ("inline", EngineKind::Inline));
    assert_eq!(probed.reasons, ["inline: the file is in memory (tmpfs)"]);
    let block = pool.copy_of(&[7; BLOCK_BYTES]).freeze();
    run(&mut *engine, vec![write(1, BLOCK, [block])]);
    let threads = probe_fd(EngineChoice::Threads, &fd);
    assert_eq!(threads.kind, EngineKind::Threads);
    let asked = probe_fd(EngineChoice::Uring, &fd);
    assert_ne!(asked.kind, EngineKind::Inline, "{:?}", asked.reasons);
}
