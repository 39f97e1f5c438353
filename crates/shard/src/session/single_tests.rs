//! The session's rules one by one: one store, no faults but the one that a test is about.

use super::tests::{address, as_frame, options, ticket};
use super::*;
use proto::block::BlockOp;
use proto::disk::BufList;
use proto::wire::{
    CheckedData, Failure, FenceOutcome, HelloReply, Limits, Peer, Reply, ReplyOp, RequestOp,
    Rights, Who,
};
use proto::{Lsn, Pool, Seq, VolumeId};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A session with its world's end of the connections.
struct Bench {
    session: Session,
    now: Tick,
    pool: Pool,
    paths: Vec<PathId>,
    sent: VecDeque<(PathId, Request)>,
    replies: Vec<(u64, Result<BlockData, Status>)>,
    conf_needed: Vec<u32>,
    disconnected: Vec<PathId>,
}

fn volume(size_bytes: u64, rights: Rights, epoch: u64) -> VolumeConf {
    attached(size_bytes, rights, epoch, 1)
}

fn attached(size_bytes: u64, rights: Rights, epoch: u64, attach_epoch: u64) -> VolumeConf {
    let route = |index| ShardRoute {
        index,
        epoch: Epoch(epoch),
        target: Target { address: address(0), lane: 2 },
    };
    let shards = (0..size_bytes.div_ceil(GIB) as u32).map(route).collect();
    let ticket = ticket(attach_epoch, rights);
    let conf = VolumeConf::new(VolumeId(7), (size_bytes, GIB), attach_epoch, ticket, shards);
    conf.expect("right")
}

impl Bench {
    fn new(options: Options, conf: VolumeConf) -> Bench {
        let now = Tick(1);
        let mut out = Vec::new();
        let session = Session::new(now, options, conf, &mut out);
        let mut bench = Bench {
            session,
            now,
            pool: Pool::new(1 << 20),
            paths: Vec::new(),
            sent: VecDeque::new(),
            replies: Vec::new(),
            conf_needed: Vec::new(),
            disconnected: Vec::new(),
        };
        bench.take(out);
        bench
    }

    /// A volume of 2 GiB and a bit, both paths open.
    fn open() -> Bench {
        let mut bench = Bench::new(options(None), volume(2 * GIB + 512, Rights::READ_WRITE, 1));
        bench.greet();
        bench
    }

    fn take(&mut self, out: Vec<Effect>) {
        for effect in out {
            match effect {
                Effect::Connect { path, .. } => self.paths.push(path),
                Effect::Send { path, request } => self.sent.push_back((path, request)),
                Effect::Disconnect(path) => self.disconnected.push(path),
                Effect::Reply { id, result } => self.replies.push((id, result)),
                Effect::NeedConf { shard } => self.conf_needed.push(shard),
            }
        }
    }

    fn step(&mut self, event: Event) {
        let mut out = Vec::new();
        self.session.step(self.now, event, &mut out);
        self.take(out);
    }

    fn greet(&mut self) {
        for path in std::mem::take(&mut self.paths) {
            self.step(Event::Connected(path));
            let (to, request) = self.sent.pop_back().expect("HELLO comes first");
            let RequestOp::Hello(hello) = &request.op else { panic!("not {:?}", request.op) };
            assert_eq!((to, hello.lane), (path, 2));
            let identity = Peer { store: 1, incarnation: 5, nonce: [0; 32], proof: [0; 32] };
            let reply = HelloReply {
                version: 1,
                features: 0,
                lanes: 3,
                limits: Limits::DEFAULT,
                peer: identity,
            };
            self.answer(path, &request, Ok(ReplyOp::Hello(Box::new(reply))));
        }
    }

    fn answer(&mut self, path: PathId, request: &Request, result: Result<ReplyOp, Status>) {
        let opcode = request.op.opcode();
        let result = result.map_err(|status| Failure { opcode, status, detail: 0 });
        let (command_id, shard, epoch) = (request.command_id, request.shard, request.epoch);
        let reply = Reply { command_id, shard, epoch, seq: Seq(0), result };
        self.step(Event::Frame(path, as_frame(reply.encode(), &self.pool)));
    }

    /// Answer the oldest request.
    fn answer_next(&mut self, result: Result<ReplyOp, Status>) -> PathId {
        let (path, request) = self.sent.pop_front().expect("something was sent");
        self.answer(path, &request, result);
        path
    }

    fn ask(&mut self, id: u64, op: BlockOp) {
        self.step(Event::Submit(BlockRequest { id, op }));
    }

    fn write(&mut self, id: u64, offset: u64, len: usize) {
        let mut data = BufList::new();
        let mut left = len;
        while left > 0 {
            let part = left.min(MIB as usize);
            data.push(self.pool.zeroed(part).freeze());
            left -= part;
        }
        self.ask(id, BlockOp::Write { offset, data });
    }

    /// The status of the only reply so far.
    fn only_reply(&mut self) -> (u64, Result<usize, Status>) {
        assert_eq!(self.replies.len(), 1);
        let (id, result) = self.replies.pop().expect("one");
        (id, result.map(|data| data.iter().map(|buf| buf.len()).sum()))
    }
}

#[test]
fn what_the_caller_did_wrong_never_leaves() {
    let mut bench = Bench::open();
    let size = 2 * GIB + 512;
    for (op, expected) in [
        (BlockOp::Read { offset: size - 512, len: 1024 }, Err(Status::OutOfRange)),
        (BlockOp::Discard { offset: u64::MAX - 511, len: 512 }, Err(Status::OutOfRange)),
        (BlockOp::Read { offset: 1, len: 512 }, Err(Status::Misaligned)),
        (BlockOp::Discard { offset: 0, len: 100 }, Err(Status::Misaligned)),
        (BlockOp::Read { offset: 0, len: (32 << 20) + 512 }, Err(Status::Limit)),
        (BlockOp::Read { offset: 512, len: 0 }, Ok(0)),
        (BlockOp::Flush, Ok(0)),
    ] {
        bench.ask(9, op);
        assert_eq!(bench.only_reply(), (9, expected));
    }
    assert!(bench.sent.is_empty());
    let mut reader = Bench::new(options(None), volume(GIB, Rights::READ, 1));
    reader.write(1, 0, 512);
    assert_eq!(reader.only_reply(), (1, Err(Status::ReadOnly)));
}

#[test]
fn long_requests_are_cut_and_their_parts_come_back_in_order() {
    let mut bench = Bench::open();
    let offset = GIB - MIB - 1536;
    bench.ask(1, BlockOp::Read { offset, len: 3 << 20 });
    let expected: Vec<(u32, u64, u32)> = vec![
        (0, offset, (1 << 20) - 2560),
        (0, GIB - MIB + (1 << 20) - 4096, 4096),
        (1, 0, 1 << 20),
        (1, MIB, (1 << 20) - 1536),
    ];
    let cuts: Vec<_> = bench
        .sent
        .iter()
        .map(|(_, request)| {
            let RequestOp::Read { range, .. } = &request.op else { panic!("a read") };
            (request.shard.index, range.offset(), range.length())
        })
        .collect();
    assert_eq!(cuts, expected);
    let sent: Vec<_> = bench.sent.drain(..).collect();
    for ((path, request), number) in sent.iter().zip([1u8, 2, 3, 4]).rev() {
        let RequestOp::Read { range, .. } = &request.op else { panic!("a read") };
        let mut buf = bench.pool.alloc(range.length() as usize);
        buf.fill(number);
        let data = proto::block::single(buf.freeze());
        let data = CheckedData::compute((range.offset() % 4096) as u32, data);
        assert!(bench.replies.is_empty());
        bench.answer(*path, request, Ok(ReplyOp::Read(data)));
    }
    let (_, result) = bench.replies.pop().expect("all parts are there");
    let bytes: Vec<u8> = result.expect("read").iter().flat_map(|buf| buf.to_vec()).collect();
    let model: Vec<u8> = expected
        .iter()
        .zip(1u8..)
        .flat_map(|((_, _, length), number)| vec![number; *length as usize])
        .collect();
    assert!(bytes == model);
}

#[test]
fn a_discard_of_everything_goes_piece_by_piece() {
    let conf = volume(64 * GIB, Rights::READ_WRITE, 1);
    let mut bench = Bench::new(options(None), conf);
    bench.greet();
    bench.ask(1, BlockOp::Discard { offset: 0, len: 64 * GIB });
    let mut count = 0;
    while bench.replies.is_empty() {
        assert!(bench.sent.len() <= 64, "{} at a time", bench.sent.len());
        bench.answer_next(Ok(ReplyOp::Discard));
        count += 1;
    }
    assert_eq!((count, bench.only_reply()), (1024, (1, Ok(0))));
}

#[test]
fn no_more_is_in_flight_than_the_limits_say() {
    let mut bench = Bench::open();
    for id in 0..300 {
        bench.ask(id, BlockOp::Read { offset: 0, len: 512 });
    }
    assert_eq!(bench.sent.len(), 256, "128 on each of two paths");
    let on_first = bench.sent.iter().filter(|(path, _)| *path == bench.sent[0].0).count();
    assert_eq!(on_first, 128);
    let mut bench = Bench::open();
    for id in 0..4 {
        bench.write(id, 0, 32 << 20);
    }
    assert_eq!(bench.sent.len(), 64, "32 MiB on each of two paths");
    assert!(!bench.session.wants_requests(), "128 MiB are open");
    for _ in 0..32 {
        bench.answer_next(Ok(ReplyOp::Write));
    }
    assert_eq!(bench.sent.len(), 64, "each reply lets one more go");
    assert!(bench.session.wants_requests() && bench.replies.len() == 1);
}

#[test]
fn a_failed_request_answers_when_nothing_of_it_is_under_way() {
    let mut bench = Bench::open();
    bench.write(1, 0, 3 << 20);
    bench.answer_next(Err(Status::NoSpace));
    assert!(bench.replies.is_empty(), "two pieces are at the store");
    bench.answer_next(Err(Status::Busy));
    bench.answer_next(Ok(ReplyOp::Write));
    assert_eq!(bench.only_reply(), (1, Err(Status::NoSpace)));
    assert!(bench.sent.is_empty() && bench.session.open_requests() == 0);
}

#[test]
fn bad_data_are_asked_for_over_another_path_and_believed_at_last() {
    let mut bench = Bench::open();
    bench.ask(1, BlockOp::Read { offset: 4096, len: 4096 });
    let mut used = Vec::new();
    for _ in 0..3 {
        used.push(bench.answer_next(Err(Status::BadChecksum)));
    }
    assert!(used[0] != used[1] && used[1] != used[2]);
    assert_eq!(bench.only_reply(), (1, Err(Status::BadChecksum)));
    assert_eq!(bench.session.counters().bad_checksums, 3);
}

#[test]
fn data_of_another_range_end_the_connection_and_not_the_request() {
    let mut bench = Bench::open();
    bench.ask(1, BlockOp::Read { offset: 512, len: 4096 });
    let data = proto::block::single(bench.pool.zeroed(4096).freeze());
    let path = bench.answer_next(Ok(ReplyOp::Read(CheckedData::compute(0, data))));
    assert_eq!(bench.disconnected, [path]);
    assert_eq!(bench.session.counters().violations, 1);
    let (other, _) = bench.sent.front().expect("sent again at once: a read has no ghost");
    assert_ne!(*other, path);
    assert!(bench.replies.is_empty());
}

#[test]
fn stale_requests_wait_for_news_with_growing_pauses() {
    let mut bench = Bench::open();
    bench.write(1, GIB, 4096);
    let mut pauses = Vec::new();
    for _ in 0..9 {
        bench.answer_next(Err(Status::StaleEpoch));
        let at = bench.session.wake_at().expect("it is tried again");
        pauses.push((at.0 - bench.now.0) / 1_000_000);
        bench.now = at;
        bench.step(Event::Tick);
    }
    assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
    assert_eq!(bench.conf_needed, [1; 9]);
    bench.answer_next(Err(Status::NotPrimary));
    assert!(bench.sent.is_empty());
    bench.step(Event::Configure(volume(2 * GIB + 512, Rights::READ_WRITE, 2)));
    assert_eq!(bench.sent.front().expect("at once").1.epoch, Epoch(2));
    bench.answer_next(Ok(ReplyOp::Write));
    assert_eq!(bench.only_reply(), (1, Ok(0)));
}

#[test]
fn a_renewed_ticket_is_shown_with_the_next_connection_and_ends_none() {
    let mut bench = Bench::open();
    let mut signed = ticket(1, Rights::READ_WRITE);
    signed.ticket.expires += 1_000;
    let renewed = VolumeConf::new(VolumeId(7), (2 * GIB + 512, GIB), 1, signed, Vec::new());
    bench.step(Event::Configure(renewed.expect("right")));
    assert!(bench.disconnected.is_empty() && bench.paths.is_empty());
    bench.ask(1, BlockOp::Read { offset: 0, len: 512 });
    let (path, _) = bench.sent.pop_front().expect("a route that is not named stays");
    bench.step(Event::Closed(path));
    bench.now = bench.session.wake_at().expect("it connects again");
    bench.step(Event::Tick);
    let next = bench.paths.pop().expect("begun");
    bench.step(Event::Connected(next));
    let (_, hello) = bench.sent.pop_back().expect("HELLO");
    let RequestOp::Hello(hello) = &hello.op else { panic!("not {:?}", hello.op) };
    let Who::Client(shown) = hello.who else { panic!("a session is a client") };
    assert_eq!(shown.ticket.expires, signed.ticket.expires);
}

#[test]
fn a_fenced_request_goes_on_with_a_ticket_of_a_newer_attach() {
    let mut bench = Bench::open();
    bench.write(1, 0, 4096);
    bench.answer_next(Err(Status::Fenced));
    assert_eq!(bench.conf_needed, [0]);
    bench.now = bench.now.after_millis(FENCED_MS - 1);
    bench.step(Event::Tick);
    assert!(bench.replies.is_empty(), "it is waited for the ticket");
    bench.sent.clear();
    bench.step(Event::Configure(attached(2 * GIB + 512, Rights::READ_WRITE, 2, 2)));
    bench.greet();
    // No time limit is left of what is over.
    bench.now = bench.now.after_millis(2 * FENCED_MS);
    bench.step(Event::Tick);
    let (path, request) = bench.sent.pop_front().expect("sent again");
    assert_eq!((request.epoch, request.attach_epoch), (Epoch(2), 2));
    bench.answer(path, &request, Ok(ReplyOp::Write));
    assert_eq!(bench.only_reply(), (1, Ok(0)));
}

#[test]
fn a_writer_that_was_taken_over_is_told_so_once_the_wait_is_over() {
    let mut bench = Bench::open();
    bench.write(1, 0, 4096);
    bench.write(2, GIB, 3 << 20);
    bench.ask(3, BlockOp::Read { offset: 2 * GIB, len: 512 });
    bench.answer_next(Err(Status::Fenced));
    let until = bench.now.after_millis(FENCED_MS);
    bench.answer_next(Ok(ReplyOp::Write));
    // A later refusal does not begin the wait anew, nor do routes without another attach end it.
    bench.now = bench.now.after_millis(FENCED_MS - 1_000);
    bench.step(Event::Tick);
    while let Some((path, request)) = bench.sent.pop_back_if(|(_, r)| r.shard.index == 0) {
        bench.answer(path, &request, Err(Status::Fenced));
    }
    bench.step(Event::Configure(volume(2 * GIB + 512, Rights::READ_WRITE, 2)));
    assert!(bench.replies.is_empty(), "requests stay parked, or under way");
    while bench.session.wake_at().is_some_and(|at| at < until) {
        bench.now = bench.session.wake_at().expect("just seen");
        bench.step(Event::Tick);
    }
    assert!(bench.replies.is_empty(), "not before its time");
    bench.now = until;
    bench.step(Event::Tick);
    let fenced = Some(Status::Fenced);
    let mut ends: Vec<_> = bench.replies.drain(..).map(|(id, end)| (id, end.err())).collect();
    ends.sort_unstable_by_key(|(id, _)| *id);
    assert_eq!(ends, [(1, fenced), (2, fenced), (3, fenced)]);
    assert_eq!(bench.session.open_requests(), 0);
    // What was under way is answered to nobody, and later requests do not leave.
    for (path, request) in std::mem::take(&mut bench.sent) {
        bench.answer(path, &request, Err(Status::Fenced));
    }
    for op in [BlockOp::Read { offset: 0, len: 512 }, BlockOp::Flush] {
        bench.ask(4, op);
        assert_eq!(bench.only_reply(), (4, Err(Status::Fenced)));
    }
    assert!(bench.sent.is_empty() && bench.disconnected.is_empty());
    bench.step(Event::Configure(volume(2 * GIB + 512, Rights::READ_WRITE, 3)));
    bench.ask(5, BlockOp::Flush);
    assert_eq!(bench.only_reply(), (5, Err(Status::Fenced)), "news, but no newer attach");
    bench.paths.clear();
    bench.step(Event::Configure(attached(2 * GIB + 512, Rights::READ_WRITE, 3, 2)));
    bench.greet();
    bench.write(6, 0, 4096);
    bench.answer_next(Ok(ReplyOp::Write));
    assert_eq!(bench.only_reply(), (6, Ok(0)), "attached again");
}

#[test]
fn the_outcome_of_a_lost_write_may_be_that_it_was_fenced() {
    let mut bench = Bench::open();
    bench.write(1, 0, 4096);
    let (lost, request) = bench.sent.pop_front().expect("sent");
    bench.step(Event::Closed(lost));
    let (path, fence) = bench.sent.pop_front().expect("FENCE_PATH over the other path");
    let outcome = FenceOutcome {
        command_id: request.command_id,
        lsn: Lsn { epoch: Epoch(1), seq: Seq(1) },
        status: Status::Fenced,
        detail: 0,
    };
    bench.answer(path, &fence, Ok(ReplyOp::FencePath(vec![outcome])));
    assert!(bench.replies.is_empty());
    bench.now = bench.now.after_millis(FENCED_MS);
    bench.step(Event::Tick);
    assert_eq!(bench.only_reply(), (1, Err(Status::Fenced)));
}

#[test]
fn a_time_limit_answers_and_a_late_reply_means_nothing() {
    let mut bench = Bench::new(options(Some(5_000_000)), volume(GIB, Rights::READ_WRITE, 1));
    bench.greet();
    bench.write(1, 0, 4096);
    assert_eq!(bench.session.wake_at(), Some(bench.now.after_nanos(5_000_000)));
    bench.now = bench.now.after_nanos(5_000_000);
    bench.step(Event::Tick);
    assert_eq!(bench.only_reply(), (1, Err(Status::TimedOut)));
    bench.answer_next(Ok(ReplyOp::Write));
    assert!(bench.replies.is_empty() && bench.disconnected.is_empty());
    assert_eq!(bench.session.counters().timed_out, 1);
}

#[test]
fn who_does_not_greet_in_time_is_tried_again() {
    let mut bench = Bench::new(options(None), volume(GIB, Rights::READ_WRITE, 1));
    let first = bench.paths.clone();
    bench.write(1, 0, 4096);
    bench.step(Event::Connected(first[0]));
    assert_eq!(bench.session.wake_at(), Some(bench.now.after_millis(HANDSHAKE_MS)));
    bench.now = bench.now.after_millis(HANDSHAKE_MS);
    bench.step(Event::Tick);
    assert_eq!(bench.disconnected, first, "the one that connects, and the one that says nothing");
    assert_eq!(bench.conf_needed, [0, 0], "the write waits");
    bench.sent.clear();
    bench.now = bench.session.wake_at().expect("again");
    bench.step(Event::Tick);
    bench.paths.drain(..2);
    bench.greet();
    bench.answer_next(Ok(ReplyOp::Write));
    assert_eq!(bench.only_reply(), (1, Ok(0)));
}

#[test]
fn the_end_answers_everyone() {
    let mut bench = Bench::open();
    bench.write(1, 0, 4096);
    bench.ask(2, BlockOp::Read { offset: 0, len: 512 });
    bench.step(Event::Close);
    let ends: Vec<_> = bench.replies.drain(..).map(|(id, result)| (id, result.err())).collect();
    assert_eq!(ends, [(1, Some(Status::Cancelled)), (2, Some(Status::Cancelled))]);
    assert_eq!((bench.disconnected.len(), bench.session.wake_at()), (2, None));
    bench.ask(3, BlockOp::Flush);
    assert_eq!(bench.only_reply(), (3, Err(Status::Cancelled)));
}

#[test]
fn wrong_descriptions_are_refused() {
    let good = volume(2 * GIB, Rights::READ_WRITE, 1);
    let session = Session::new(Tick(0), options(None), good, &mut Vec::new());
    let make = |volume, sizes, attach, ticket, shards: &[u32]| {
        let route = |&index| ShardRoute {
            index,
            epoch: Epoch(1),
            target: Target { address: address(0), lane: 0 },
        };
        let shards = shards.iter().map(route).collect();
        VolumeConf::new(VolumeId(volume), sizes, attach, ticket, shards)
    };
    let signed = ticket(1, Rights::READ_WRITE);
    let problem = |sizes, shards: &[u32]| make(7, sizes, 1, signed, shards).expect_err("wrong");
    assert_eq!(problem((0, GIB), &[]), ConfProblem::Size(0));
    assert_eq!(problem((513, GIB), &[]), ConfProblem::Size(513));
    assert_eq!(problem((GIB, 512), &[]), ConfProblem::ShardSize(512));
    assert_eq!(problem((1 << 50, 4096), &[]), ConfProblem::ShardSize(4096));
    assert_eq!(problem((GIB, GIB), &[1]), ConfProblem::ShardIndex(1));
    assert_eq!(problem((GIB, GIB), &[0, 0]), ConfProblem::ShardTwice(0));
    assert!(make(8, (GIB, GIB), 1, signed, &[]).is_err(), "the ticket is for volume 7");
    let shrunk = make(7, (GIB, GIB), 1, signed, &[]).expect("right by itself");
    let expected = ConfProblem::Shrinks { expected: 2 * GIB, found: GIB };
    assert_eq!(session.accepts(&shrunk), Err(expected));
    let mut other = signed;
    other.ticket.session += 1;
    let other = make(7, (2 * GIB, GIB), 1, other, &[]).expect("right by itself");
    let expected = ConfProblem::OtherSession { expected: 3, found: 4 };
    assert_eq!(session.accepts(&other), Err(expected));
    let grown = make(7, (3 * GIB, GIB), 1, signed, &[2]).expect("right");
    assert_eq!(session.accepts(&grown), Ok(()));
}
