//! Any bytes as a PFW message. What is accepted is written back with the same bytes, so nothing in
//! a message is ignored.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::Pool;
use proto::checksum::crc32c;
use proto::disk::BufList;
use proto::frame::{Frame, OutFrame};
use proto::wire::{HEADER_BYTES, Header, Reply, Request};
use smallvec::SmallVec;

fuzz_target!(|data: &[u8]| {
    if data.len() < HEADER_BYTES {
        return;
    }
    let mut bytes = data.to_vec();
    let body_length = (bytes.len() - HEADER_BYTES) as u32;
    bytes[56..60].copy_from_slice(&body_length.to_le_bytes());
    let crc = crc32c(&bytes[..60]);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    let Ok(header) = Header::parse(&bytes[..HEADER_BYTES]) else { return };
    let meta_bytes = header.body.meta_bytes as usize;
    let (meta, payload) = bytes[HEADER_BYTES..].split_at(meta_bytes);
    let mut meta = meta.to_vec();
    let mut list = BufList::new();
    if payload.is_empty() {
        // Without data the meta is an extension alone: give it the CRC that a fuzzer cannot guess.
        if let Some(at) = meta_bytes.checked_sub(4) {
            let crc = crc32c(&meta[..at]);
            meta[at..].copy_from_slice(&crc.to_le_bytes());
            bytes[HEADER_BYTES + at..].copy_from_slice(&crc.to_le_bytes());
        }
    } else {
        list.push(Pool::new(0).copy_of(payload).freeze());
    }
    let frame = Frame { header: SmallVec::new(), meta: SmallVec::from_slice(&meta), payload: list };
    let written = if header.is_reply {
        // An unknown status is read as INTERNAL: such replies are not written back the same.
        Reply::parse(&header, frame).ok().filter(|reply| reply.result.is_ok()).map(|r| r.encode())
    } else {
        Request::parse(&header, frame).ok().map(|request| request.encode())
    };
    if let Some(written) = written {
        // FENCE_PATH replies map unknown statuses in their records too; their length must agree.
        let written = flat(&written);
        assert_eq!(written.len(), bytes.len());
        if header.opcode != proto::wire::Opcode::FencePath {
            assert_eq!(written, bytes);
        }
    }
});

fn flat(frame: &OutFrame) -> Vec<u8> {
    let mut bytes = frame.head.to_vec();
    frame.payload.iter().for_each(|buf| bytes.extend_from_slice(buf));
    bytes
}
