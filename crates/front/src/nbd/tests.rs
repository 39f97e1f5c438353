//! Requests as a client writes them, and replies as a client reads them. The reader here is
//! written from the protocol document and shares nothing with the connection.

use super::*;
use proptest::prelude::*;
use proto::block::{BlockOp, BlockRequest};
use proto::disk::BufList;
use proto::frame::{BodyLayout, Frame, Framing, OutFrame};
use proto::{Pool, Status};

const SIZE: u64 = 1 << 30;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const FAST_ZERO: u16 = 16;

fn parameters() -> Parameters {
    Parameters {
        size_bytes: SIZE,
        is_read_only: false,
        is_structured: false,
        request_bytes_max: REQUEST_BYTES_MAX,
    }
}

fn simple() -> NbdConnection {
    NbdConnection::new(parameters())
}

fn structured() -> NbdConnection {
    NbdConnection::new(Parameters { is_structured: true, ..parameters() })
}

fn header(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

fn bytes(len: usize) -> BufList {
    let pool = Pool::new(0);
    let content: Vec<u8> = (0..len).map(|i| (i % 253) as u8).collect();
    content.chunks(1 << 20).map(|part| pool.copy_of(part).freeze()).collect()
}

/// Cut a request into a frame as the reactor does.
fn frame(header: &[u8]) -> Frame {
    let layout = NbdFraming.body(header).expect("a header that can be followed");
    assert_eq!(layout.meta_bytes, 0);
    let mut frame = Frame { payload: bytes(layout.payload_bytes as usize), ..Frame::default() };
    frame.header.extend_from_slice(header);
    frame
}

/// A reply as a client sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Seen {
    cookie: u64,
    errno: u32,
    data: Option<(Option<u64>, Vec<u8>)>,
    text: Option<String>,
}

fn flat(frame: &OutFrame) -> Vec<u8> {
    let mut bytes = frame.head.to_vec();
    frame.payload.iter().for_each(|buf| bytes.extend_from_slice(buf));
    bytes
}

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn seen(frame: &OutFrame) -> Seen {
    let bytes = flat(frame);
    let (head, rest) = bytes.split_at(16);
    if be(&head[..4]) == 0x6744_6698 {
        let data = (!rest.is_empty()).then(|| (None, rest.to_vec()));
        let errno = be(&head[4..8]) as u32;
        assert!(errno == 0 || data.is_none(), "no payload with an error");
        return Seen { cookie: be(&head[8..16]), errno, data, text: None };
    }
    assert_eq!(be(&head[..4]), 0x668e_33ef);
    assert_eq!(be(&head[4..6]), 1, "DONE");
    let (kind, cookie) = (be(&head[6..8]), be(&head[8..16]));
    let (length, body) = rest.split_at(4);
    assert_eq!(be(length), body.len() as u64);
    let good = Seen { cookie, errno: 0, data: None, text: None };
    match kind {
        0 => {
            assert!(body.is_empty(), "NONE has no payload");
            good
        }
        1 => {
            assert!(body.len() >= 9, "at least one byte of data");
            Seen { data: Some((Some(be(&body[..8])), body[8..].to_vec())), ..good }
        }
        0x8001 => {
            let text = String::from_utf8(body[6..].to_vec()).expect("a text for people");
            assert_eq!(be(&body[4..6]), text.len() as u64);
            Seen { errno: be(&body[..4]) as u32, text: Some(text), ..good }
        }
        other => panic!("unknown chunk type {other:#x}"),
    }
}

#[track_caller]
fn request(connection: &mut NbdConnection, header: &[u8]) -> BlockRequest {
    match connection.receive(frame(header)) {
        Ok(Incoming::Request(request)) => request,
        Ok(Incoming::Reply(reply)) => panic!("{:?} instead of a request", seen(&reply)),
        Ok(Incoming::Disconnect) => panic!("a disconnect instead of a request"),
        Err(error) => panic!("{error}"),
    }
}

#[track_caller]
fn reply(connection: &mut NbdConnection, header: &[u8]) -> Seen {
    match connection.receive(frame(header)) {
        Ok(Incoming::Reply(reply)) => seen(&reply),
        Ok(Incoming::Request(request)) => panic!("{request:?} instead of a reply"),
        Ok(Incoming::Disconnect) => panic!("a disconnect instead of a reply"),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_read_comes_back_with_its_cookie_and_its_data() {
    let data = bytes(8192).iter().flat_map(|buf| buf.to_vec()).collect::<Vec<u8>>();
    for (mut connection, offset) in [(simple(), None), (structured(), Some(4096))] {
        let request = request(&mut connection, &header(0, READ, 0xfeed_f00d, 4096, 8192));
        assert!(matches!(request.op, BlockOp::Read { offset: 4096, len: 8192 }));
        let seen = seen(&connection.complete(request.id, Ok(bytes(8192))));
        let expected = Some((offset, data.clone()));
        assert_eq!(seen, Seen { cookie: 0xfeed_f00d, errno: 0, data: expected, text: None });
        assert!(connection.is_idle());
    }
}

#[test]
fn every_writing_command_becomes_its_operation() {
    let mut connection = structured();
    let op = |connection: &mut NbdConnection, flags, command, length| {
        let request = request(connection, &header(flags, command, 9, 512, length));
        let seen = seen(&connection.complete(request.id, Ok(BufList::new())));
        assert_eq!(seen, Seen { cookie: 9, errno: 0, data: None, text: None });
        request.op
    };
    let written = op(&mut connection, FUA, WRITE, 3 << 20);
    let BlockOp::Write { offset: 512, data } = written else { panic!("{written:?}") };
    assert_eq!(data.iter().map(|buf| buf.len()).collect::<Vec<_>>(), [1 << 20; 3]);
    let trimmed = op(&mut connection, FUA, TRIM, 1 << 29);
    assert!(matches!(trimmed, BlockOp::Discard { offset: 512, len } if len == 1 << 29));
    for (flags, expected) in [(0, false), (NO_HOLE, true), (NO_HOLE | FUA, true)] {
        let zeroed = op(&mut connection, flags, WRITE_ZEROES, 1 << 29);
        let BlockOp::WriteZeroes { offset: 512, len, keep_allocated } = zeroed else {
            panic!("{zeroed:?}")
        };
        assert_eq!((len, keep_allocated), (1 << 29, expected));
    }
    let request = request(&mut connection, &header(FUA, FLUSH, 9, 0, 0));
    assert!(matches!(request.op, BlockOp::Flush));
}

#[test]
fn each_broken_rule_gets_the_errno_that_the_document_names() {
    const EPERM: u32 = 1;
    const EINVAL: u32 = 22;
    const ENOSPC: u32 = 28;
    let cases = [
        // Unknown commands: CACHE, BLOCK_STATUS, anything.
        (0, 5, 0, 512, EINVAL),
        (0, 7, 0, 512, EINVAL),
        (0, 0xffff, 0, 512, EINVAL),
        // Flags that the command does not have, or that were not offered.
        (DF, WRITE, 0, 512, EINVAL),
        (NO_HOLE, READ, 0, 512, EINVAL),
        (NO_HOLE, TRIM, 0, 512, EINVAL),
        (FAST_ZERO, WRITE_ZEROES, 0, 512, EINVAL),
        (0x8000, READ, 0, 512, EINVAL),
        // Alignment.
        (0, READ, 100, 512, EINVAL),
        (0, WRITE, 0, 100, EINVAL),
        (0, TRIM, 1, 512, EINVAL),
        // Beyond the end, by one sector, and by as much as fits.
        (0, READ, SIZE, 512, EINVAL),
        (0, READ, SIZE - 512, 1024, EINVAL),
        (0, TRIM, SIZE - 512, 1024, EINVAL),
        (0, WRITE, SIZE - 512, 1024, ENOSPC),
        (0, WRITE_ZEROES, SIZE - 512, 1024, ENOSPC),
        (0, READ, u64::MAX - 511, 512, EINVAL),
        (0, WRITE, u64::MAX - 511, 512, ENOSPC),
        // A flush has no range.
        (0, FLUSH, 512, 0, EINVAL),
        (0, FLUSH, 0, 512, EINVAL),
        // A long read costs us memory, not the client.
        (0, READ, 0, REQUEST_BYTES_MAX + 512, EINVAL),
    ];
    for (flags, command, offset, length, errno) in cases {
        for (mut connection, is_structured) in [(simple(), false), (structured(), true)] {
            let answer = reply(&mut connection, &header(flags, command, 77, offset, length));
            let case = (flags, command, offset, length);
            assert_eq!((answer.cookie, answer.errno), (77, errno), "{case:?}");
            assert_eq!(answer.text.is_some(), is_structured, "{case:?}");
            // The connection goes on.
            let next = request(&mut connection, &header(0, READ, 78, 0, 512));
            assert_eq!(seen(&connection.complete(next.id, Ok(bytes(512)))).errno, 0);
        }
    }
    let mut frozen = NbdConnection::new(Parameters { is_read_only: true, ..parameters() });
    for command in [WRITE, TRIM, WRITE_ZEROES] {
        assert_eq!(reply(&mut frozen, &header(0, command, 1, 0, 512)).errno, EPERM);
    }
    let read = request(&mut frozen, &header(0, READ, 2, 0, 512));
    assert_eq!(seen(&frozen.complete(read.id, Ok(bytes(512)))).errno, 0);
}

#[test]
fn dont_fragment_is_known_once_structured_replies_are() {
    let read = header(DF, READ, 1, 0, 2 << 20);
    assert_eq!(reply(&mut simple(), &read).errno, 22);
    let mut connection = structured();
    let request = request(&mut connection, &read);
    // The data come in several buffers, and still as one chunk.
    let seen = seen(&connection.complete(request.id, Ok(bytes(2 << 20))));
    assert_eq!(seen.data.map(|(offset, data)| (offset, data.len())), Some((Some(0), 2 << 20)));
}

#[test]
fn the_last_sector_and_an_empty_range_are_fine() {
    let mut connection = structured();
    for command in [READ, WRITE, TRIM, WRITE_ZEROES] {
        request(&mut connection, &header(0, command, 1, SIZE - 512, 512));
        for offset in [0, SIZE] {
            let seen = reply(&mut connection, &header(0, command, 2, offset, 0));
            assert_eq!(seen, Seen { cookie: 2, errno: 0, data: None, text: None });
        }
        assert_eq!(reply(&mut connection, &header(0, command, 2, SIZE + 512, 0)).cookie, 2);
    }
}

#[test]
fn what_an_export_has_grown_by_is_served_to_a_client_of_before() {
    let mut nbd = simple();
    let asked = [header(0, READ, 1, SIZE, 512), header(0, TRIM, 2, SIZE - 512, 1024)];
    for header in &asked {
        assert!(matches!(nbd.receive(frame(header)), Ok(Incoming::Reply(_))), "beyond the export");
    }
    nbd.grow(SIZE + 512);
    for header in &asked {
        assert!(matches!(nbd.receive(frame(header)), Ok(Incoming::Request(_))));
    }
    nbd.grow(SIZE); // older news, late: a volume never shrinks
    assert!(matches!(nbd.receive(frame(&asked[0])), Ok(Incoming::Request(_))));
    let beyond = header(0, READ, 4, SIZE + 512, 512);
    assert!(matches!(nbd.receive(frame(&beyond)), Ok(Incoming::Reply(_))));
}

#[test]
fn a_client_that_learned_the_block_size_is_held_to_it() {
    let limited = Parameters { request_bytes_max: 1 << 20, ..parameters() };
    let mut connection = NbdConnection::new(limited);
    assert_eq!(reply(&mut connection, &header(0, WRITE, 1, 0, (1 << 20) + 512)).errno, 22);
    assert_eq!(reply(&mut connection, &header(0, READ, 1, 0, (1 << 20) + 512)).errno, 22);
    request(&mut connection, &header(0, READ, 1, 0, 1 << 20));
    // No data, no cost: these stay unlimited.
    request(&mut connection, &header(0, WRITE_ZEROES, 1, 0, 1 << 29));
    request(&mut connection, &header(0, TRIM, 1, 0, 1 << 29));
}

#[test]
fn a_stream_that_cannot_be_followed_ends() {
    let mut good = header(0, WRITE, 1, 0, REQUEST_BYTES_MAX);
    let layout = NbdFraming.body(&good);
    assert_eq!(layout, Ok(BodyLayout { meta_bytes: 0, payload_bytes: REQUEST_BYTES_MAX }));
    let long = header(0, WRITE, 1, 0, REQUEST_BYTES_MAX + 1);
    let error = NbdFraming.body(&long).expect_err("more than we receive");
    assert!(error.reason.contains("33554433"), "{error}");
    // A READ of that length has nothing to receive.
    let long = header(0, READ, 1, 0, u32::MAX);
    assert_eq!(NbdFraming.body(&long), Ok(BodyLayout::default()));
    good[3] ^= 1;
    assert!(NbdFraming.body(&good).expect_err("wrong magic").reason.contains("magic"));
    assert!(NbdFraming.body(&good[1..]).is_err());
    assert_eq!(NbdFraming.header_bytes(), HEADER_BYTES);
    assert!(simple().receive(Frame::default()).is_err());
}

#[test]
fn disc_has_no_reply_and_what_is_under_way_is_still_answered() {
    let mut connection = simple();
    let first = request(&mut connection, &header(0, WRITE, 1, 0, 512));
    let disc = connection.receive(frame(&header(0, DISC, 2, 0, 0)));
    assert!(matches!(disc, Ok(Incoming::Disconnect)));
    assert!(!connection.wants_frames() && !connection.is_idle());
    assert_eq!(seen(&connection.complete(first.id, Ok(BufList::new()))).cookie, 1);
    assert!(connection.is_idle() && !connection.wants_frames());
}

#[test]
fn a_gateway_that_stops_answers_eshutdown_and_finishes_what_is_under_way() {
    let mut connection = simple();
    let first = request(&mut connection, &header(0, READ, 1, 0, 512));
    connection.shut_down();
    assert_eq!(reply(&mut connection, &header(0, READ, 2, 0, 512)).errno, 108);
    assert_eq!(seen(&connection.complete(first.id, Ok(bytes(512)))).errno, 0);
    let disc = connection.receive(frame(&header(0, DISC, 3, 0, 0)));
    assert!(matches!(disc, Ok(Incoming::Disconnect)));
    connection.shut_down();
    assert!(!connection.wants_frames(), "a disconnect is not taken back");
}

#[test]
fn every_status_has_an_errno_that_nbd_knows() {
    for status in Status::ALL.into_iter().filter(|status| *status != Status::Ok) {
        let mut connection = structured();
        let read = request(&mut connection, &header(0, READ, 5, 0, 512));
        let seen = seen(&connection.complete(read.id, Err(status)));
        assert!([1, 5, 22, 28, 108].contains(&seen.errno), "{status}");
        assert_eq!(seen.text.as_deref(), Some(status.meaning()));
        assert_eq!((seen.cookie, seen.data), (5, None));
    }
    for (status, errno) in [
        (Status::NoSpace, 28),
        (Status::MediaError, 5),
        (Status::Fenced, 108),
        (Status::ReadOnly, 1),
        (Status::OutOfRange, 22),
    ] {
        assert_eq!(Errno::of(status) as u32, errno, "{status}");
    }
}

#[test]
fn requests_and_bytes_under_way_are_bounded() {
    let mut connection = simple();
    let ids: Vec<u64> = (0..REQUESTS_MAX as u64)
        .map(|cookie| {
            assert!(connection.wants_frames());
            request(&mut connection, &header(0, FLUSH, cookie, 0, 0)).id
        })
        .collect();
    assert!(!connection.wants_frames(), "no place is left");
    let _ = connection.complete(ids[7], Ok(BufList::new()));
    assert!(connection.wants_frames());

    let mut connection = simple();
    let first = request(&mut connection, &header(0, READ, 1, 0, (32 << 20) - 512));
    assert!(connection.wants_frames(), "one byte below the bound");
    request(&mut connection, &header(0, READ, 2, 0, 32 << 20));
    assert!(!connection.wants_frames(), "the bound is passed");
    let _ = connection.complete(first.id, Err(Status::MediaError));
    assert!(!connection.wants_frames(), "exactly the bound is not below it");
}

#[test]
#[should_panic(expected = "one result for each request")]
fn a_second_result_is_our_bug() {
    let mut connection = simple();
    let first = request(&mut connection, &header(0, FLUSH, 1, 0, 0));
    let _ = connection.complete(first.id, Ok(BufList::new()));
    let _ = connection.complete(first.id, Ok(BufList::new()));
}

#[test]
#[should_panic(expected = "one result for each request")]
fn a_late_result_does_not_answer_the_next_request_of_its_slot() {
    let mut connection = simple();
    let first = request(&mut connection, &header(0, FLUSH, 1, 0, 0));
    let _ = connection.complete(first.id, Ok(BufList::new()));
    let second = request(&mut connection, &header(0, FLUSH, 2, 0, 0));
    assert_eq!(second.id % REQUESTS_MAX as u64, first.id % REQUESTS_MAX as u64, "same slot");
    let _ = connection.complete(first.id, Ok(BufList::new()));
}

/// What the document says about a request, in its own words and order.
fn oracle(flags: u16, command: u16, offset: u64, length: u32, p: &Parameters) -> u32 {
    let end = u128::from(offset) + u128::from(length);
    let is_write = [WRITE, TRIM, WRITE_ZEROES].contains(&command);
    let allowed = match command {
        READ if p.is_structured => FUA | DF,
        WRITE_ZEROES => FUA | NO_HOLE,
        _ => FUA,
    };
    let is_sectors = (offset | u64::from(length)) & 511 == 0;
    let is_long = [READ, WRITE].contains(&command) && length > p.request_bytes_max;
    match () {
        () if ![READ, WRITE, FLUSH, TRIM, WRITE_ZEROES].contains(&command) => 22,
        () if flags & !allowed != 0 => 22,
        () if is_write && p.is_read_only => 1,
        () if command == FLUSH => {
            if offset == 0 && length == 0 {
                0
            } else {
                22
            }
        }
        () if is_long || !is_sectors => 22,
        () if end <= u128::from(p.size_bytes) => 0,
        () if [WRITE, WRITE_ZEROES].contains(&command) => 28,
        () => 22,
    }
}

fn a_flags() -> impl Strategy<Value = u16> {
    prop_oneof![4 => Just(0u16), 2 => Just(FUA), 2 => 0..32u16, 1 => any::<u16>()]
}

fn an_offset() -> impl Strategy<Value = u64> {
    let size_sectors = 64u64;
    prop_oneof![
        6 => (0..=size_sectors + 1).prop_map(|sector| sector * 512),
        1 => 0..40_000u64,
        1 => any::<u64>(),
    ]
}

fn a_length() -> impl Strategy<Value = u32> {
    prop_oneof![6 => (0..66u32).prop_map(|sector| sector * 512), 1 => 0..40_000u32]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn verdicts_agree_with_the_document(
        flags in a_flags(), command in 0..8u16, cookie in any::<u64>(), offset in an_offset(),
        length in a_length(), is_read_only in any::<bool>(), is_structured in any::<bool>(),
    ) {
        prop_assume!(command != DISC);
        let p = Parameters {
            size_bytes: 64 * 512, is_read_only, is_structured, request_bytes_max: 16_384,
        };
        let mut connection = NbdConnection::new(p);
        let expected = oracle(flags, command, offset, length, &p);
        let incoming = connection.receive(frame(&header(flags, command, cookie, offset, length)));
        match incoming.expect("it can be followed") {
            Incoming::Request(request) => {
                prop_assert_eq!(expected, 0);
                let data = match &request.op {
                    BlockOp::Read { len, .. } => bytes(*len as usize),
                    BlockOp::Write { .. } | BlockOp::Flush | BlockOp::Discard { .. }
                    | BlockOp::WriteZeroes { .. } => BufList::new(),
                };
                let seen = seen(&connection.complete(request.id, Ok(data)));
                prop_assert_eq!((seen.cookie, seen.errno), (cookie, 0));
                let data = seen.data.map(|(_, data)| data.len());
                prop_assert_eq!(data, (command == READ).then_some(length as usize));
            }
            Incoming::Reply(reply) => {
                let seen = seen(&reply);
                prop_assert_eq!((seen.cookie, seen.errno), (cookie, expected));
                prop_assert!(seen.data.is_none() && (expected != 0 || length == 0));
            }
            Incoming::Disconnect => prop_assert!(false, "only DISC disconnects"),
        }
        prop_assert!(connection.is_idle());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Requests and results in any order: one reply each, no more under way than the bounds.
    #[test]
    fn every_request_gets_exactly_one_reply(
        steps in prop::collection::vec((any::<bool>(), 0..7u16, any::<prop::sample::Index>()), 1..600),
        is_structured in any::<bool>(),
    ) {
        let mut connection = NbdConnection::new(Parameters { is_structured, ..parameters() });
        let mut waiting: Vec<(u64, u64, u32)> = Vec::new();
        let mut answered = Vec::new();
        let mut sent = 0u64;
        for (is_request, command, which) in steps {
            if is_request && connection.wants_frames() && command != DISC {
                sent += 1;
                let length = if command == READ { 512 } else { 0 };
                match connection.receive(frame(&header(0, command, sent, 0, length))) {
                    Ok(Incoming::Request(request)) => waiting.push((request.id, sent, length)),
                    Ok(Incoming::Reply(reply)) => answered.push(seen(&reply).cookie),
                    Ok(Incoming::Disconnect) | Err(_) => prop_assert!(false, "a good request"),
                }
            } else if !waiting.is_empty() {
                let (id, cookie, length) = waiting.swap_remove(which.index(waiting.len()));
                let seen = seen(&connection.complete(id, Ok(bytes(length as usize))));
                prop_assert_eq!(seen.cookie, cookie);
                answered.push(cookie);
            }
            prop_assert!(waiting.len() <= REQUESTS_MAX);
        }
        for (id, cookie, _) in waiting {
            prop_assert_eq!(seen(&connection.complete(id, Err(Status::Internal))).errno, 5);
            answered.push(cookie);
        }
        answered.sort_unstable();
        prop_assert_eq!(answered, (1..=sent).collect::<Vec<_>>());
        prop_assert!(connection.is_idle());
    }

    #[test]
    fn arbitrary_headers_never_panic(bytes in prop::collection::vec(any::<u8>(), 24..=24)) {
        let header = [&0x2560_9513u32.to_be_bytes()[..], &bytes].concat();
        let is_write = be(&header[6..8]) == u64::from(WRITE);
        let length = be(&header[24..28]);
        let is_followed = !is_write || length <= u64::from(REQUEST_BYTES_MAX);
        prop_assert_eq!(NbdFraming.body(&header).is_ok(), is_followed);
        let mut frame = Frame::default();
        frame.header.extend_from_slice(&header);
        prop_assert!(structured().receive(frame).is_ok());
    }
}
