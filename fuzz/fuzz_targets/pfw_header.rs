//! Any bytes as a PFW header, on all four kinds of connection end. A header that passes promises a
//! body within the protocol's limits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::checksum::crc32c;
use proto::wire::{HEADER_BYTES, PAYLOAD_BYTES_MAX, PfwFraming, Side};

/// Meta of the largest message: an extension and one CRC per started block.
const META_BYTES_MAX: u32 = 2048;

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    if bytes.len() >= HEADER_BYTES {
        bytes.truncate(HEADER_BYTES);
        // A fuzzer does not guess CRCs; with the right one it reaches what lies behind.
        let crc = crc32c(&bytes[..HEADER_BYTES - 4]);
        bytes[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    }
    for side in [Side::Caller, Side::Called] {
        for framing in [PfwFraming::handshake(side), PfwFraming::open(side)] {
            if let Ok(header) = framing.check(&bytes) {
                assert!(header.body.meta_bytes <= META_BYTES_MAX);
                assert!(header.body.payload_bytes <= PAYLOAD_BYTES_MAX);
            }
        }
    }
});
