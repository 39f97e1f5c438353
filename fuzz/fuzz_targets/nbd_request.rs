//! Any bytes as NBD requests of one connection, with results in an order that the bytes choose.
//! Each request but DISC gets exactly one reply, which is a well-formed one.
#![no_main]

use front::nbd::{HEADER_BYTES, Incoming, NbdConnection, NbdFraming, Parameters};
use libfuzzer_sys::fuzz_target;
use proto::block::BlockOp;
use proto::disk::BufList;
use proto::frame::{Frame, Framing, OutFrame};
use proto::{Pool, Status};

const SIZE_BYTES: u64 = 1 << 20;
/// Longer payloads cost time and reach nothing new.
const REQUEST_BYTES_MAX: u32 = 8192;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let parameters = Parameters {
        size_bytes: SIZE_BYTES,
        is_read_only: choice & 1 != 0,
        is_structured: choice & 2 != 0,
        request_bytes_max: REQUEST_BYTES_MAX,
    };
    let mut connection = NbdConnection::new(parameters);
    let (mut waiting, mut asked, mut answered) = (Vec::new(), 0, 0);
    for raw in data.chunks_exact(HEADER_BYTES) {
        // The first magic byte chooses whether a result comes first; then the magic is repaired.
        if raw[0] & 1 != 0 && !waiting.is_empty() {
            let (id, length) = waiting.swap_remove(usize::from(raw[1]) % waiting.len());
            check(&connection.complete(id, result(length, raw[2])), parameters.is_structured);
            answered += 1;
        }
        if !connection.wants_frames() {
            break;
        }
        let mut frame = Frame::default();
        frame.header.extend_from_slice(&0x2560_9513u32.to_be_bytes());
        frame.header.extend_from_slice(&raw[4..]);
        let Ok(layout) = NbdFraming.body(&frame.header) else { break };
        if layout.payload_bytes > 2 * REQUEST_BYTES_MAX {
            break;
        }
        frame.payload = bytes(layout.payload_bytes);
        match connection.receive(frame).expect("framing let it through") {
            Incoming::Request(request) => {
                let length = match request.op {
                    BlockOp::Read { len, .. } => len,
                    BlockOp::Write { .. }
                    | BlockOp::Flush
                    | BlockOp::Discard { .. }
                    | BlockOp::WriteZeroes { .. } => 0,
                };
                waiting.push((request.id, length));
                asked += 1;
            }
            Incoming::Reply(reply) => {
                check(&reply, parameters.is_structured);
                asked += 1;
                answered += 1;
            }
            Incoming::Disconnect => break,
        }
    }
    for (id, length) in waiting {
        check(&connection.complete(id, result(length, choice)), parameters.is_structured);
        answered += 1;
    }
    assert!(connection.is_idle());
    assert_eq!(asked, answered);
});

fn bytes(length: u32) -> BufList {
    let mut list = BufList::new();
    if length > 0 {
        list.push(Pool::new(0).zeroed(length as usize).freeze());
    }
    list
}

fn result(length: u32, choice: u8) -> Result<BufList, Status> {
    match choice % 4 {
        0 => Err(Status::ALL[1 + usize::from(choice) % (Status::ALL.len() - 1)]),
        _ => Ok(bytes(length)),
    }
}

fn check(reply: &OutFrame, is_structured: bool) {
    let payload: usize = reply.payload.iter().map(|buf| buf.len()).sum();
    if is_structured {
        let length = u32::from_be_bytes(reply.head[16..20].try_into().expect("a chunk header"));
        assert_eq!(length as usize, reply.head.len() - 20 + payload);
    } else {
        assert_eq!(reply.head.len(), 16);
        let errno = u32::from_be_bytes(reply.head[4..8].try_into().expect("a reply header"));
        assert!(errno == 0 || payload == 0);
    }
}
