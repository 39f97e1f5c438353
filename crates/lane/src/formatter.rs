//! Laying out a fresh disk: what to write, in which order. Executing it is the runtime's business.

use crate::format::{
    DiskHeader, Durability, FormatError, Geometry, HEADER_BYTES, LANES_START, LaneEntry, Pages,
    Replay, SLOT_BYTES, Superblock, Uuid, default_journal_bytes, encode_manifest,
};
use proto::checksum::crc32c;

/// One lane per this many bytes of disk.
const LANE_BYTES: u64 = 256 << 30;
/// Most lanes chosen by default.
const LANES_DEFAULT_MAX: u64 = 4;

/// Slots that formatting writes on file media (4 MiB).
const FORMATTED_SLOTS: u32 = 64;

/// What to format.
#[derive(Clone, Debug)]
pub struct FormatRequest {
    /// Bytes of the disk.
    pub size: u64,
    /// Cluster it will belong to.
    pub cluster_id: Uuid,
    /// Identity of the disk.
    pub disk_uuid: Uuid,
    /// Identity of this formatting.
    pub format_uuid: Uuid,
    /// One random identity per lane; as many lanes are made as the size asks for, at most these.
    pub lane_uuids: Vec<Uuid>,
    /// Journal per lane; the default for the disk's size when `None`.
    pub journal_bytes: Option<u64>,
    /// What a completed write means.
    pub durability: Durability,
    /// True when an operator decided that.
    pub durability_override: bool,
    /// Bytes that power failure leaves either old or new.
    pub atomic_bytes: u32,
    /// Space must be written before clients use it (file media).
    pub sparse: bool,
}

/// Writes that make a disk, to be done in this order with a flush after each group, so that an
/// interrupted format leaves a disk that nobody takes for a good one.
#[derive(Clone, Debug)]
pub struct FormatPlan {
    /// Ranges (offset, length) to fill with zeros.
    pub zeroes: Vec<(u64, u64)>,
    /// Superblocks and manifests.
    pub structures: Vec<(u64, Vec<u8>)>,
    /// The three copies of the disk header, last.
    pub headers: Vec<(u64, Vec<u8>)>,
    /// The header, parsed.
    pub header: DiskHeader,
}

/// Plan a format.
///
/// Errors: a size or journal that leaves no room for the smallest lane.
pub fn format_disk(request: &FormatRequest) -> Result<FormatPlan, FormatError> {
    if request.size < LANES_START + (1 << 20) {
        return Err(FormatError::Field {
            what: "disk",
            field: "size",
            value: request.size,
            expected: "at least 3 MiB, and room for a journal and slots",
        });
    }
    let usable_end = request.size / SLOT_BYTES * SLOT_BYTES - SLOT_BYTES.min(request.size);
    let room = usable_end.saturating_sub(LANES_START);
    let wanted = request.size.div_ceil(LANE_BYTES).clamp(1, LANES_DEFAULT_MAX);
    let count = wanted.min(request.lane_uuids.len() as u64);
    assert!(count > 0, "the caller gives at least one lane identity");
    let length = room / count / SLOT_BYTES * SLOT_BYTES;
    let journal_bytes =
        request.journal_bytes.unwrap_or_else(|| default_journal_bytes(request.size / count));
    let lanes: Vec<LaneEntry> = (0..count)
        .map(|ix| LaneEntry {
            uuid: request.lane_uuids[ix as usize],
            start: LANES_START + ix * length,
            length,
            journal_bytes,
        })
        .collect();
    let header = DiskHeader {
        seq: 1,
        cluster_id: request.cluster_id,
        disk_uuid: request.disk_uuid,
        format_uuid: request.format_uuid,
        size: request.size,
        durability: request.durability,
        durability_override: request.durability_override,
        atomic_bytes: request.atomic_bytes,
        sparse: request.sparse,
        lanes,
    };
    let (mut zeroes, mut structures) = (Vec::new(), Vec::new());
    for lane in &header.lanes {
        let geometry = Geometry::new(lane)?;
        let (start, end) = geometry.metadata_range();
        // The first slots are written too: a lane can write checkpoints although its host is full.
        let written = FORMATTED_SLOTS.min(geometry.slots);
        zeroes.push((start, end + u64::from(written) * SLOT_BYTES - start));
        let manifest = encode_manifest(&lane.uuid, 1, &[]);
        let superblock = Superblock {
            version: 1,
            manifest: Pages { slot: 0, page: 0, pages: 1 },
            manifest_crc: crc32c(&manifest),
            replay: Replay { ring_page: 0, frame_seq: 1, prev_crc: 0 },
            stable_rec: 0,
            materialised: if request.sparse { written } else { geometry.slots },
            clean: true,
        };
        structures.push((geometry.slot(0, 0), manifest));
        let page = superblock.encode(&lane.uuid);
        structures.extend(geometry.superblocks(1).map(|at| (at, page.clone())));
    }
    let places = DiskHeader::places(request.size);
    let bytes = header.encode();
    assert_eq!(bytes.len(), HEADER_BYTES);
    let headers = places.iter().map(|&at| (at, bytes.clone())).collect();
    Ok(FormatPlan { zeroes, structures, headers, header })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(size: u64) -> FormatRequest {
        FormatRequest {
            size,
            cluster_id: [1; 16],
            disk_uuid: [2; 16],
            format_uuid: [3; 16],
            lane_uuids: (0..4).map(|ix| [10 + ix; 16]).collect(),
            journal_bytes: None,
            durability: Durability::Volatile,
            durability_override: false,
            atomic_bytes: 512,
            sparse: true,
        }
    }

    #[test]
    fn the_header_survives_a_round_trip_and_any_single_flip_is_found() {
        let plan = format_disk(&request(10 << 30)).expect("10 GiB is enough");
        let bytes = &plan.headers[0].1;
        assert_eq!(DiskHeader::parse(bytes).expect("our own"), plan.header);
        for at in (0..bytes.len()).step_by(97) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(DiskHeader::parse(&damaged).is_err(), "flip at {at} went unnoticed");
        }
    }

    #[test]
    fn one_good_copy_of_three_is_enough() {
        let plan = format_disk(&request(1 << 30)).expect("1 GiB is enough");
        let mut copies: Vec<Vec<u8>> =
            plan.headers.iter().map(|(_, bytes)| bytes.clone()).collect();
        copies[0].fill(0);
        copies[2][500] ^= 4;
        assert_eq!(DiskHeader::choose(&copies).expect("the second copy is good"), plan.header);
        copies[1][0] = 0;
        assert!(DiskHeader::choose(&copies).is_err());
    }

    #[test]
    fn another_development_format_is_refused_by_name() {
        let mut bytes = format_disk(&request(1 << 30)).expect("fits").headers[0].1.clone();
        bytes[24] ^= 2;
        bytes[8..12].fill(0);
        let crc = crc32c(&bytes);
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
        let text = DiskHeader::parse(&bytes).expect_err("other version").to_string();
        assert!(text.contains("made by \"pureflash") && text.contains("pf down --purge"), "{text}");
    }

    #[test]
    fn a_disk_that_is_too_small_is_refused_with_the_reason() {
        let problem =
            format_disk(&request(12 << 20)).expect_err("no room beside 16 MiB of journal");
        assert!(problem.to_string().contains("room for at least 16 slots"), "{problem}");
    }

    #[test]
    fn a_two_terabyte_disk_gets_four_lanes_that_do_not_overlap() {
        let plan = format_disk(&request(2 << 40)).expect("fits");
        assert_eq!(plan.header.lanes.len(), 4);
        for pair in plan.header.lanes.windows(2) {
            assert!(pair[0].start + pair[0].length <= pair[1].start);
        }
    }
}
