//! Any bytes as each structure that a lane reads from its disk. The first byte chooses which; CRCs
//! are put right, so that the fuzzer reaches what lies behind them.
#![no_main]

use lane::format::{
    DiskHeader, FrameHeader, Geometry, HEADER_BYTES, LANES_START, LaneEntry, RunKind, Superblock,
    parse_manifest,
};
use lane::record::Record;
use lane::tables::Tables;
use libfuzzer_sys::fuzz_target;
use proto::checksum::crc32c;

const UUID: [u8; 16] = [4; 16];

fn with_crc(data: &[u8], len: usize, crc_at: usize) -> Vec<u8> {
    let mut bytes = data.to_vec();
    bytes.resize(len, 0);
    bytes[crc_at..crc_at + 4].fill(0);
    let crc = crc32c(&bytes);
    bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fuzz_target!(|data: &[u8]| {
    let Some((&kind, data)) = data.split_first() else { return };
    let entry =
        LaneEntry { uuid: UUID, start: LANES_START, length: 64 << 20, journal_bytes: 1 << 20 };
    let geometry = Geometry::new(&entry).expect("a lane of 64 MiB");
    match kind % 6 {
        0 => {
            let bytes = with_crc(data, HEADER_BYTES, 8);
            if let Ok(header) = DiskHeader::parse(&bytes) {
                // What was accepted can be laid out, and is written back to something accepted.
                for lane in &header.lanes {
                    Geometry::new(lane).expect("checked when it was parsed");
                }
                assert_eq!(DiskHeader::parse(&header.encode()), Ok(header));
            }
        }
        1 => drop(Superblock::parse(&with_crc(data, 4096, 8), &geometry)),
        2 => {
            let page = with_crc(data, 4096, 4);
            if let Ok((header, _, records)) = FrameHeader::parse(&page, &UUID) {
                drop(Record::decode_all(records, header.rec_count));
            }
        }
        3 => drop(parse_manifest(data, &geometry, 1)),
        4 => drop(Record::decode(data)),
        _ => {
            let kinds = [
                RunKind::Layer,
                RunKind::Shard,
                RunKind::Map,
                RunKind::Region,
                RunKind::Tail,
                RunKind::TagSide,
                RunKind::TagDelta,
                RunKind::BadSlot,
            ];
            let mut tables = Tables::new(geometry.slots, geometry.tag_pages);
            for (index, chunk) in data.chunks(200).enumerate() {
                let kind = kinds[usize::from(chunk[0]) % kinds.len()];
                drop(tables.decode_run(kind, index as u64, &chunk[1..]));
            }
        }
    }
});
