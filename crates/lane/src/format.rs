//! The bytes on disk: disk header, lane geometry, superblock, journal frame header, manifest.
//!
//! All integers are little-endian. Every structure carries a CRC32C over its whole page or pages
//! (with the CRC field as zero) and the identity of the lane or disk it belongs to, so a structure
//! in the wrong place is refused like a damaged one. Parsing turns bytes into types that cannot be
//! wrong; nothing is allocated from a length that was not checked against its limit.
//!
//! The format is a *development* format until version 1 is frozen with its golden image: a disk
//! made by another development revision is refused with the name of the program that made it.

use crate::{EXTENT_BLOCKS, SLOT_BLOCKS};
use proto::BLOCK_BYTES;
use proto::checksum::crc32c;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Revision of the development format; high bit set = not frozen.
pub const FORMAT_VERSION: u32 = 0x8000_0001;
/// Program name written into headers, for the refusal of another development format.
pub const MADE_BY: &str = concat!("pureflash ", env!("CARGO_PKG_VERSION"));
/// Size of one disk header copy.
pub const HEADER_BYTES: usize = 16 << 10;
/// Second copy of the disk header; the first is at 0 and the third in the last 16 KiB.
pub const HEADER_SECOND: u64 = 1 << 20;
/// First byte a lane may use.
pub const LANES_START: u64 = 2 << 20;
/// Entries of the lane table.
pub const LANES_MAX: usize = 48;
/// Segments of one lane.
pub const SEGMENTS_MAX: usize = 12;
/// Distance between the superblock pages A, A', B, B'.
pub const SUPERBLOCK_STRIDE: u64 = 64 << 10;
/// Bytes of one slot.
pub const SLOT_BYTES: u64 = (SLOT_BLOCKS as u64) * BLOCK_BYTES as u64;
/// Tags in one 4 KiB CRC page: one extent's worth of physical blocks.
pub const TAGS_PER_PAGE: u64 = 1024;
/// Most payload pages of one journal frame.
pub const FRAME_PAYLOAD_PAGES_MAX: usize = 64;
/// Bytes of records in one frame.
pub const FRAME_RECORD_BYTES: usize = BLOCK_BYTES - size_of::<RawFrame>();
/// Smallest ring that can hold a full frame, the reserve for control records and a checkpoint.
pub const RING_PAGES_MIN: u32 = 16;

const DISK_MAGIC: [u8; 8] = *b"PFDISK01";
const SUPERBLOCK_MAGIC: [u8; 8] = *b"PFLANESB";
const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"PFJF");
const MANIFEST_MAGIC: [u8; 8] = *b"PFMANIFT";
const LANE_TYPE_IN_PLACE: u8 = 1;
const LANE_STATE_ACTIVE: u8 = 1;

/// Why bytes of a disk were not accepted.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FormatError {
    /// Not our structure at all.
    #[error("{what}: no magic: this was never formatted by PureFlash, or it was overwritten")]
    Magic {
        /// Which structure.
        what: &'static str,
    },
    /// Damaged.
    #[error(
        "{what}: CRC32C is {found:#010x}, the content has {expected:#010x}: the bytes are damaged"
    )]
    Crc {
        /// Which structure.
        what: &'static str,
        /// Of the content.
        expected: u32,
        /// As stored.
        found: u32,
    },
    /// Another revision of the format.
    #[error(
        "disk format {found:#x}, made by \"{made_by}\", cannot be read by {MADE_BY} \
             (format {FORMAT_VERSION:#x}): export its volumes with that program, or re-create it with \
             `pf down --purge`"
    )]
    Version {
        /// As stored.
        found: u32,
        /// Program that formatted the disk.
        made_by: String,
    },
    /// Uses a feature this program does not know.
    #[error("the disk needs features {bits:#x} that {MADE_BY} does not know: use a newer program")]
    Incompatible {
        /// Unknown bits.
        bits: u64,
    },
    /// A field that contradicts the rest.
    #[error("{what}: {field} is {value}: {expected}")]
    Field {
        /// Which structure.
        what: &'static str,
        /// Which field.
        field: &'static str,
        /// As stored.
        value: u64,
        /// What it must be.
        expected: &'static str,
    },
    /// Structure of another lane or disk.
    #[error("{what} belongs to another lane or disk")]
    Identity {
        /// Which structure.
        what: &'static str,
    },
}

fn field(
    ok: bool,
    what: &'static str,
    field: &'static str,
    value: u64,
    expected: &'static str,
) -> Result<(), FormatError> {
    if ok { Ok(()) } else { Err(FormatError::Field { what, field, value, expected }) }
}

/// 128-bit identity: cluster, disk, format or lane.
pub type Uuid = [u8; 16];

/// What a completed write means on this device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// Power-loss protected: completed is durable, flushes are not needed.
    Plp,
    /// Volatile cache: completed becomes durable by the next flush.
    Volatile,
}

// ------------------------------------------------------------------------------- disk header --

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    crc: U32,
    header_bytes: U32,
    seq: U64,
    version: U32,
    lane_count: U32,
    compat: U64,
    ro_compat: U64,
    incompat: U64,
    cluster_id: Uuid,
    disk_uuid: Uuid,
    format_uuid: Uuid,
    size: U64,
    materialised: U64,
    shifts: [u8; 3],
    media: u8,
    durability: u8,
    durability_origin: u8,
    tag_bytes: u8,
    reserved_a: u8,
    atomic_bytes: U32,
    device_metadata_bytes: U32,
    made_by: [u8; 64],
    reserved_b: [u8; 56],
    lanes: [RawLane; LANES_MAX],
    reserved_c: [u8; HEADER_BYTES - 256 - 256 * LANES_MAX],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone)]
#[repr(C)]
struct RawLane {
    uuid: Uuid,
    kind: u8,
    state: u8,
    segment_count: u8,
    reserved_a: [u8; 5],
    journal_bytes: U64,
    segments: [[U64; 2]; SEGMENTS_MAX],
    reserved_b: [u8; 32],
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES && size_of::<RawLane>() == 256);

/// One lane of the lane table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LaneEntry {
    /// Identity, in every structure of the lane.
    pub uuid: Uuid,
    /// First byte on the disk, multiple of 64 KiB.
    pub start: u64,
    /// Bytes, multiple of 64 KiB.
    pub length: u64,
    /// Bytes of the journal ring, multiple of 4 KiB.
    pub journal_bytes: u64,
}

/// The disk header: whose disk this is, and how it is divided.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskHeader {
    /// Grows with every rewrite; the highest good copy counts.
    pub seq: u64,
    /// Cluster this disk belongs to.
    pub cluster_id: Uuid,
    /// The disk, across re-formats.
    pub disk_uuid: Uuid,
    /// This formatting of it: a replica of another formatting needs a full copy.
    pub format_uuid: Uuid,
    /// Bytes of the disk at format time.
    pub size: u64,
    /// What a completed write means.
    pub durability: Durability,
    /// True when an operator, not detection, decided the durability.
    pub durability_override: bool,
    /// Bytes that power failure leaves either old or new (512 where nothing better is known).
    pub atomic_bytes: u32,
    /// True on file media, where space must be written before clients use it.
    pub sparse: bool,
    /// Lanes in order.
    pub lanes: Vec<LaneEntry>,
}

impl DiskHeader {
    /// Encode one 16 KiB copy.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.lanes.len() <= LANES_MAX, "lane table has {LANES_MAX} entries");
        let mut raw = RawHeader::new_zeroed();
        raw.magic = DISK_MAGIC;
        raw.header_bytes = U32::new(HEADER_BYTES as u32);
        raw.seq = U64::new(self.seq);
        raw.version = U32::new(FORMAT_VERSION);
        raw.lane_count = U32::new(self.lanes.len() as u32);
        raw.cluster_id = self.cluster_id;
        raw.disk_uuid = self.disk_uuid;
        raw.format_uuid = self.format_uuid;
        raw.size = U64::new(self.size);
        raw.shifts = [12, 16, 22];
        raw.media = u8::from(self.sparse);
        raw.durability = match self.durability {
            Durability::Plp => 1,
            Durability::Volatile => 2,
        };
        raw.durability_origin = u8::from(self.durability_override);
        raw.tag_bytes = 4;
        raw.atomic_bytes = U32::new(self.atomic_bytes);
        raw.made_by[..MADE_BY.len()].copy_from_slice(MADE_BY.as_bytes());
        for (raw_lane, lane) in raw.lanes.iter_mut().zip(&self.lanes) {
            raw_lane.uuid = lane.uuid;
            raw_lane.kind = LANE_TYPE_IN_PLACE;
            raw_lane.state = LANE_STATE_ACTIVE;
            raw_lane.segment_count = 1;
            raw_lane.journal_bytes = U64::new(lane.journal_bytes);
            raw_lane.segments[0] = [U64::new(lane.start), U64::new(lane.length)];
        }
        let crc = crc32c(raw.as_bytes());
        raw.crc = U32::new(crc);
        raw.as_bytes().to_vec()
    }

    /// Parse one 16 KiB copy.
    pub fn parse(bytes: &[u8]) -> Result<DiskHeader, FormatError> {
        const WHAT: &str = "disk header";
        let raw =
            RawHeader::read_from_bytes(bytes).map_err(|_| FormatError::Magic { what: WHAT })?;
        if raw.magic != DISK_MAGIC {
            return Err(FormatError::Magic { what: WHAT });
        }
        check_crc(WHAT, bytes, 8, raw.crc.get())?;
        if raw.version.get() != FORMAT_VERSION {
            let text = raw.made_by.split(|&byte| byte == 0).next().unwrap_or_default();
            let made_by = String::from_utf8_lossy(text).into_owned();
            return Err(FormatError::Version { found: raw.version.get(), made_by });
        }
        if raw.incompat.get() != 0 {
            return Err(FormatError::Incompatible { bits: raw.incompat.get() });
        }
        field(raw.tag_bytes == 4, WHAT, "tag_bytes", raw.tag_bytes.into(), "this program reads 4")?;
        field(raw.shifts == [12, 16, 22], WHAT, "shifts", raw.shifts[0].into(), "12, 16, 22")?;
        let size = raw.size.get();
        let count = raw.lane_count.get() as usize;
        field(count <= LANES_MAX, WHAT, "lane_count", count as u64, "at most 48")?;
        let lanes = raw.lanes[..count]
            .iter()
            .map(|lane| parse_lane(lane, size))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(DiskHeader {
            seq: raw.seq.get(),
            cluster_id: raw.cluster_id,
            disk_uuid: raw.disk_uuid,
            format_uuid: raw.format_uuid,
            size,
            durability: match raw.durability {
                1 => Durability::Plp,
                2 => Durability::Volatile,
                other => {
                    return Err(FormatError::Field {
                        what: WHAT,
                        field: "durability",
                        value: other.into(),
                        expected: "1 (plp) or 2 (volatile)",
                    });
                }
            },
            durability_override: raw.durability_origin != 0,
            atomic_bytes: raw.atomic_bytes.get(),
            sparse: raw.media != 0,
            lanes,
        })
    }

    /// Where the three copies of the header of a disk of `size` bytes are.
    #[must_use]
    pub fn places(size: u64) -> [u64; 3] {
        [0, HEADER_SECOND, size / SLOT_BYTES * SLOT_BYTES - HEADER_BYTES as u64]
    }

    /// Choose among the three copies: the highest `seq` that parses.
    ///
    /// Errors: the problem of the first copy when none is good.
    pub fn choose(copies: &[Vec<u8>]) -> Result<DiskHeader, FormatError> {
        let mut first_problem = None;
        let mut best: Option<DiskHeader> = None;
        for copy in copies {
            match DiskHeader::parse(copy) {
                Ok(header) => {
                    if best.as_ref().is_none_or(|other| header.seq > other.seq) {
                        best = Some(header);
                    }
                }
                // Damage elsewhere must not hide that the disk is of another format.
                Err(problem) => {
                    if first_problem.is_none() || matches!(problem, FormatError::Version { .. }) {
                        first_problem = Some(problem);
                    }
                }
            }
        }
        best.ok_or_else(|| first_problem.expect("three copies were looked at"))
    }
}

fn parse_lane(raw: &RawLane, disk_size: u64) -> Result<LaneEntry, FormatError> {
    const WHAT: &str = "lane table";
    field(raw.kind == LANE_TYPE_IN_PLACE, WHAT, "type", raw.kind.into(), "1 (in place)")?;
    field(raw.state == LANE_STATE_ACTIVE, WHAT, "state", raw.state.into(), "1 (active)")?;
    field(raw.segment_count == 1, WHAT, "segments", raw.segment_count.into(), "1")?;
    let [start, length] = raw.segments[0].map(U64::get);
    let end = start.checked_add(length);
    field(start >= LANES_START && start % SLOT_BYTES == 0, WHAT, "start", start, "64 KiB aligned")?;
    field(end.is_some_and(|end| end <= disk_size), WHAT, "length", length, "inside the disk")?;
    let entry = LaneEntry { uuid: raw.uuid, start, length, journal_bytes: raw.journal_bytes.get() };
    Geometry::new(&entry)?;
    Ok(entry)
}

fn check_crc(
    what: &'static str,
    bytes: &[u8],
    crc_at: usize,
    found: u32,
) -> Result<(), FormatError> {
    let expected = crc_without(bytes, crc_at);
    if expected == found { Ok(()) } else { Err(FormatError::Crc { what, expected, found }) }
}

/// CRC32C of `bytes` with the four bytes at `crc_at` as zero.
fn crc_without(bytes: &[u8], crc_at: usize) -> u32 {
    let crc = crc32c(&bytes[..crc_at]);
    let crc = proto::checksum::crc32c_append(crc, &[0; 4]);
    proto::checksum::crc32c_append(crc, &bytes[crc_at + 4..])
}

// ---------------------------------------------------------------------------------- geometry --

/// Where the parts of one lane are, in bytes of the disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Identity of the lane.
    pub uuid: Uuid,
    start: u64,
    journal: u64,
    /// Pages of the journal ring.
    pub ring_pages: u32,
    tag_sides: [u64; 2],
    /// CRC pages of one side.
    pub tag_pages: u32,
    slots_start: u64,
    /// Slots of the data area.
    pub slots: u32,
}

impl Geometry {
    /// Lay out a lane.
    ///
    /// Errors: a journal or length that leaves no room.
    pub fn new(entry: &LaneEntry) -> Result<Geometry, FormatError> {
        const WHAT: &str = "lane geometry";
        let journal_bytes = entry.journal_bytes;
        let ring_pages = journal_bytes / BLOCK_BYTES as u64;
        field(
            journal_bytes.is_multiple_of(BLOCK_BYTES as u64)
                && ring_pages >= u64::from(RING_PAGES_MIN)
                && journal_bytes <= 2 << 30,
            WHAT,
            "journal_bytes",
            journal_bytes,
            "whole pages, at least 16 pages, at most 2 GiB",
        )?;
        let journal = entry.start + 4 * SUPERBLOCK_STRIDE;
        let fixed = 4 * SUPERBLOCK_STRIDE + journal_bytes;
        let room = entry.length.saturating_sub(fixed);
        // One 4 KiB CRC page serves 64 slots on each of two sides.
        let group = 64 * SLOT_BYTES + 2 * BLOCK_BYTES as u64;
        let mut slots = room / group * 64 + (room % group) / SLOT_BYTES;
        let (tag_pages, slots_start) = loop {
            let tag_pages = slots.div_ceil(64);
            let after = journal + journal_bytes + 2 * tag_pages * BLOCK_BYTES as u64;
            let slots_start = after.next_multiple_of(SLOT_BYTES);
            if slots == 0 || slots_start + slots * SLOT_BYTES <= entry.start + entry.length {
                break (tag_pages, slots_start);
            }
            slots -= 1;
        };
        field(
            (16..=u64::from(u32::MAX / 2)).contains(&slots),
            WHAT,
            "length",
            entry.length,
            "room for at least 16 slots of 64 KiB beside the journal",
        )?;
        let side = journal + journal_bytes;
        Ok(Geometry {
            uuid: entry.uuid,
            start: entry.start,
            journal,
            ring_pages: ring_pages as u32,
            tag_sides: [side, side + tag_pages * BLOCK_BYTES as u64],
            tag_pages: tag_pages as u32,
            slots_start,
            slots: slots as u32,
        })
    }

    /// Byte of the two copies of superblock `version`: pair `version mod 2`.
    #[must_use]
    pub fn superblocks(&self, version: u64) -> [u64; 2] {
        let pair = self.start + (version % 2) * 2 * SUPERBLOCK_STRIDE;
        [pair, pair + SUPERBLOCK_STRIDE]
    }

    /// Byte of a page of the journal ring.
    #[must_use]
    pub fn ring(&self, page: u32) -> u64 {
        assert!(page < self.ring_pages, "page {page} of {}", self.ring_pages);
        self.journal + u64::from(page) * BLOCK_BYTES as u64
    }

    /// Byte of CRC page `page` on `side` (0 or 1).
    #[must_use]
    pub fn tag_page(&self, side: u8, page: u32) -> u64 {
        assert!(page < self.tag_pages, "CRC page {page} of {}", self.tag_pages);
        self.tag_sides[usize::from(side)] + u64::from(page) * BLOCK_BYTES as u64
    }

    /// Byte of block `block` (0..16) of `slot`.
    #[must_use]
    pub fn slot(&self, slot: u32, block: u32) -> u64 {
        assert!(slot < self.slots && block <= SLOT_BLOCKS, "slot {slot} of {}", self.slots);
        self.slots_start + u64::from(slot) * SLOT_BYTES + u64::from(block) * BLOCK_BYTES as u64
    }

    /// The metadata areas that must be written (as zeros) when the lane is formatted.
    #[must_use]
    pub fn metadata_range(&self) -> (u64, u64) {
        (self.start, self.slots_start)
    }

    /// First byte after `slot`.
    #[must_use]
    pub fn slot_end(&self, slot: u32) -> u64 {
        self.slots_start + (u64::from(slot) + 1) * SLOT_BYTES
    }
}

/// Physical block number of block `block` of `slot`: the index of its tag.
#[must_use]
pub fn physical_block(slot: u32, block: u32) -> u64 {
    debug_assert!(block < SLOT_BLOCKS, "block {block} of a slot");
    u64::from(slot) * u64::from(SLOT_BLOCKS) + u64::from(block)
}

/// Journal size for a disk of `disk_bytes`: 1/256 of it, between 16 MiB and 2 GiB.
#[must_use]
pub fn default_journal_bytes(disk_bytes: u64) -> u64 {
    (disk_bytes / 256).clamp(16 << 20, 2 << 30) / BLOCK_BYTES as u64 * BLOCK_BYTES as u64
}

// -------------------------------------------------------------------------------- superblock --

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone)]
#[repr(C)]
struct RawSuperblock {
    magic: [u8; 8],
    crc: U32,
    reserved_a: U32,
    lane_uuid: Uuid,
    version: U64,
    incompat: U64,
    manifest_slot: U32,
    manifest_page: U16,
    manifest_pages: U16,
    manifest_crc: U32,
    replay_ring_page: U32,
    replay_frame_seq: U64,
    replay_prev_crc: U32,
    materialised: U32,
    stable_rec: U64,
    clean: u8,
    reserved_b: [u8; BLOCK_BYTES - 89],
}

const _: () = assert!(size_of::<RawSuperblock>() == BLOCK_BYTES);

/// Where contiguous metadata lies: pages of one or more adjacent slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pages {
    /// First slot.
    pub slot: u32,
    /// First 4 KiB page in that slot, 0..16.
    pub page: u16,
    /// Number of pages.
    pub pages: u16,
}

/// Where replay begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Replay {
    /// Ring page of the first frame to replay.
    pub ring_page: u32,
    /// Its sequence number.
    pub frame_seq: u64,
    /// CRC of the frame before it.
    pub prev_crc: u32,
}

/// Head of a checkpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Checkpoint number, from 1.
    pub version: u64,
    /// Where the manifest is, and its CRC.
    pub manifest: Pages,
    /// CRC32C of the manifest's bytes.
    pub manifest_crc: u32,
    /// Where replay begins.
    pub replay: Replay,
    /// All records up to this one have their data durable in place.
    pub stable_rec: u64,
    /// Slots below this one were written at least once (all, on a device).
    pub materialised: u32,
    /// The lane was closed and the journal holds nothing to replay.
    pub clean: bool,
}

impl Superblock {
    /// Encode one 4 KiB page.
    #[must_use]
    pub fn encode(&self, lane_uuid: &Uuid) -> Vec<u8> {
        let mut raw = RawSuperblock::new_zeroed();
        raw.magic = SUPERBLOCK_MAGIC;
        raw.lane_uuid = *lane_uuid;
        raw.version = U64::new(self.version);
        raw.manifest_slot = U32::new(self.manifest.slot);
        raw.manifest_page = U16::new(self.manifest.page);
        raw.manifest_pages = U16::new(self.manifest.pages);
        raw.manifest_crc = U32::new(self.manifest_crc);
        raw.replay_ring_page = U32::new(self.replay.ring_page);
        raw.replay_frame_seq = U64::new(self.replay.frame_seq);
        raw.replay_prev_crc = U32::new(self.replay.prev_crc);
        raw.materialised = U32::new(self.materialised);
        raw.stable_rec = U64::new(self.stable_rec);
        raw.clean = u8::from(self.clean);
        let crc = crc32c(raw.as_bytes());
        raw.crc = U32::new(crc);
        raw.as_bytes().to_vec()
    }

    /// Parse one page of the lane `geometry`.
    pub fn parse(bytes: &[u8], geometry: &Geometry) -> Result<Superblock, FormatError> {
        const WHAT: &str = "superblock";
        let raw =
            RawSuperblock::read_from_bytes(bytes).map_err(|_| FormatError::Magic { what: WHAT })?;
        if raw.magic != SUPERBLOCK_MAGIC {
            return Err(FormatError::Magic { what: WHAT });
        }
        check_crc(WHAT, bytes, 8, raw.crc.get())?;
        if raw.lane_uuid != geometry.uuid {
            return Err(FormatError::Identity { what: WHAT });
        }
        if raw.incompat.get() != 0 {
            return Err(FormatError::Incompatible { bits: raw.incompat.get() });
        }
        let manifest = Pages {
            slot: raw.manifest_slot.get(),
            page: raw.manifest_page.get(),
            pages: raw.manifest_pages.get(),
        };
        check_pages(WHAT, manifest, geometry, MANIFEST_PAGES_MAX)?;
        let ring_page = raw.replay_ring_page.get();
        field(ring_page < geometry.ring_pages, WHAT, "ring_page", ring_page.into(), "in the ring")?;
        let materialised = raw.materialised.get();
        field(
            materialised <= geometry.slots,
            WHAT,
            "materialised",
            materialised.into(),
            "at most the slots of the lane",
        )?;
        Ok(Superblock {
            version: raw.version.get(),
            manifest,
            manifest_crc: raw.manifest_crc.get(),
            replay: Replay {
                ring_page,
                frame_seq: raw.replay_frame_seq.get(),
                prev_crc: raw.replay_prev_crc.get(),
            },
            stable_rec: raw.stable_rec.get(),
            materialised,
            clean: raw.clean != 0,
        })
    }
}

fn check_pages(
    what: &'static str,
    pages: Pages,
    geometry: &Geometry,
    max: u16,
) -> Result<(), FormatError> {
    let last = u64::from(pages.slot) * u64::from(SLOT_BLOCKS)
        + u64::from(pages.page)
        + u64::from(pages.pages);
    field(
        (1..=max).contains(&pages.pages)
            && u32::from(pages.page) < SLOT_BLOCKS
            && last <= u64::from(geometry.slots) * u64::from(SLOT_BLOCKS),
        what,
        "pages",
        pages.pages.into(),
        "within its limit and inside the slots",
    )
}

// ----------------------------------------------------------------------------- journal frame --

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone)]
#[repr(C)]
struct RawFrame {
    magic: U32,
    crc: U32,
    lane_uuid: Uuid,
    mount_nonce: U64,
    frame_seq: U64,
    prev_crc: U32,
    ring_page: U32,
    first_rec: U64,
    rec_count: U16,
    payload_pages: U16,
    payload_crc: U32,
    durable_seq: U64,
    stable_rec: U64,
}

const _: () = assert!(size_of::<RawFrame>() == 80);

/// Head of one journal frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// Random per mount, never derived.
    pub mount_nonce: u64,
    /// Position in the journal.
    pub frame_seq: u64,
    /// CRC of the header page of frame `frame_seq - 1`.
    pub prev_crc: u32,
    /// Page of the ring where this frame begins.
    pub ring_page: u32,
    /// Lane-wide number of its first record.
    pub first_rec: u64,
    /// Records in the header page.
    pub rec_count: u16,
    /// Payload pages after the header page.
    pub payload_pages: u16,
    /// CRC32C over the little-endian CRC32C of each payload page (0 without payload).
    pub payload_crc: u32,
    /// Frames up to this one were durable when this one was built.
    pub durable_seq: u64,
    /// All records up to this one had their data durable in place.
    pub stable_rec: u64,
}

impl FrameHeader {
    /// Encode a header page with `records` into `page` (4 KiB) and return its CRC.
    pub fn encode(&self, lane_uuid: &Uuid, records: &[u8], page: &mut [u8]) -> u32 {
        assert!(records.len() <= FRAME_RECORD_BYTES && page.len() == BLOCK_BYTES);
        let raw = RawFrame {
            magic: U32::new(FRAME_MAGIC),
            crc: U32::ZERO,
            lane_uuid: *lane_uuid,
            mount_nonce: U64::new(self.mount_nonce),
            frame_seq: U64::new(self.frame_seq),
            prev_crc: U32::new(self.prev_crc),
            ring_page: U32::new(self.ring_page),
            first_rec: U64::new(self.first_rec),
            rec_count: U16::new(self.rec_count),
            payload_pages: U16::new(self.payload_pages),
            payload_crc: U32::new(self.payload_crc),
            durable_seq: U64::new(self.durable_seq),
            stable_rec: U64::new(self.stable_rec),
        };
        let head = size_of::<RawFrame>();
        page[..head].copy_from_slice(raw.as_bytes());
        page[head..head + records.len()].copy_from_slice(records);
        page[head + records.len()..].fill(0);
        let crc = crc32c(page);
        page[4..8].copy_from_slice(&crc.to_le_bytes());
        crc
    }

    /// Parse a header page: header, CRC, record bytes.
    pub fn parse<'a>(
        page: &'a [u8],
        lane_uuid: &Uuid,
    ) -> Result<(FrameHeader, u32, &'a [u8]), FormatError> {
        const WHAT: &str = "journal frame";
        let (raw, records) =
            RawFrame::read_from_prefix(page).map_err(|_| FormatError::Magic { what: WHAT })?;
        if raw.magic.get() != FRAME_MAGIC {
            return Err(FormatError::Magic { what: WHAT });
        }
        check_crc(WHAT, page, 4, raw.crc.get())?;
        if raw.lane_uuid != *lane_uuid {
            return Err(FormatError::Identity { what: WHAT });
        }
        let header = FrameHeader {
            mount_nonce: raw.mount_nonce.get(),
            frame_seq: raw.frame_seq.get(),
            prev_crc: raw.prev_crc.get(),
            ring_page: raw.ring_page.get(),
            first_rec: raw.first_rec.get(),
            rec_count: raw.rec_count.get(),
            payload_pages: raw.payload_pages.get(),
            payload_crc: raw.payload_crc.get(),
            durable_seq: raw.durable_seq.get(),
            stable_rec: raw.stable_rec.get(),
        };
        Ok((header, raw.crc.get(), records))
    }
}

// ---------------------------------------------------------------------------------- manifest --

/// Most pages of a manifest: 16 slots, 32,764 runs.
pub const MANIFEST_PAGES_MAX: u16 = 256;
/// Most bytes of one run: one slot.
pub const RUN_BYTES_MAX: usize = SLOT_BYTES as usize;
/// Flag of a run: a program that does not know the kind must refuse the mount.
const RUN_REFUSE_IF_UNKNOWN: u16 = 1;

/// What a run holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u16)]
pub enum RunKind {
    /// Extents of one group of one layer.
    Map = 1,
    /// Layer table.
    Layer = 2,
    /// Shard table.
    Shard = 3,
    /// Records above the commit watermark.
    Tail = 4,
    /// Region map of one group of one shard.
    Region = 5,
    /// Valid side and CRC of a group of CRC pages.
    TagSide = 6,
    /// Tags newer than the CRC pages.
    TagDelta = 7,
    /// Slots never to be used again.
    BadSlot = 8,
}

impl RunKind {
    fn parse(value: u16) -> Option<RunKind> {
        use RunKind::{BadSlot, Layer, Map, Region, Shard, TagDelta, TagSide, Tail};
        [Map, Layer, Shard, Tail, Region, TagSide, TagDelta, BadSlot]
            .into_iter()
            .find(|kind| *kind as u16 == value)
    }
}

/// One run of a checkpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// What it holds.
    pub kind: RunKind,
    /// Which part of it: the meaning depends on the kind.
    pub key: u64,
    /// Where it is.
    pub pages: Pages,
    /// Bytes used of those pages.
    pub bytes: u32,
    /// CRC32C of those bytes.
    pub crc: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone)]
#[repr(C)]
struct RawRun {
    kind: U16,
    flags: U16,
    slot: U32,
    page: U16,
    pages: U16,
    bytes: U32,
    crc: U32,
    reserved: U32,
    key: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone)]
#[repr(C)]
struct RawManifest {
    magic: [u8; 8],
    lane_uuid: Uuid,
    version: U64,
    count: U32,
    reserved: [u8; 28],
}

const _: () = assert!(size_of::<RawRun>() == 32 && size_of::<RawManifest>() == 64);

/// Encode a manifest; its CRC is kept in the superblock.
#[must_use]
pub fn encode_manifest(lane_uuid: &Uuid, version: u64, runs: &[Run]) -> Vec<u8> {
    let raw = RawManifest {
        magic: MANIFEST_MAGIC,
        lane_uuid: *lane_uuid,
        version: U64::new(version),
        count: U32::new(runs.len() as u32),
        reserved: [0; 28],
    };
    let mut bytes = raw.as_bytes().to_vec();
    for run in runs {
        let raw = RawRun {
            kind: U16::new(run.kind as u16),
            flags: U16::new(RUN_REFUSE_IF_UNKNOWN),
            slot: U32::new(run.pages.slot),
            page: U16::new(run.pages.page),
            pages: U16::new(run.pages.pages),
            bytes: U32::new(run.bytes),
            crc: U32::new(run.crc),
            reserved: U32::ZERO,
            key: U64::new(run.key),
        };
        bytes.extend_from_slice(raw.as_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    bytes
}

/// Parse the manifest of checkpoint `version`, whose bytes have passed their CRC.
pub fn parse_manifest(
    bytes: &[u8],
    geometry: &Geometry,
    version: u64,
) -> Result<Vec<Run>, FormatError> {
    const WHAT: &str = "manifest";
    let (raw, rest) =
        RawManifest::read_from_prefix(bytes).map_err(|_| FormatError::Magic { what: WHAT })?;
    if raw.magic != MANIFEST_MAGIC {
        return Err(FormatError::Magic { what: WHAT });
    }
    if raw.lane_uuid != geometry.uuid || raw.version.get() != version {
        return Err(FormatError::Identity { what: WHAT });
    }
    let count = raw.count.get() as usize;
    let room = rest.len() / size_of::<RawRun>();
    field(count <= room, WHAT, "count", count as u64, "within the manifest's pages")?;
    let mut runs = Vec::with_capacity(count);
    for chunk in rest.chunks_exact(size_of::<RawRun>()).take(count) {
        let raw = RawRun::read_from_bytes(chunk).expect("the chunk has the size of a run");
        let Some(kind) = RunKind::parse(raw.kind.get()) else {
            if raw.flags.get() & RUN_REFUSE_IF_UNKNOWN != 0 {
                return Err(FormatError::Incompatible { bits: raw.kind.get().into() });
            }
            continue;
        };
        let pages = Pages { slot: raw.slot.get(), page: raw.page.get(), pages: raw.pages.get() };
        check_pages("run", pages, geometry, SLOT_BLOCKS as u16)?;
        field(
            u32::from(pages.page) + u32::from(pages.pages) <= SLOT_BLOCKS
                && raw.bytes.get() <= u32::from(pages.pages) * BLOCK_BYTES as u32,
            "run",
            "bytes",
            raw.bytes.get().into(),
            "within its pages, and those in one slot",
        )?;
        runs.push(Run {
            kind,
            key: raw.key.get(),
            pages,
            bytes: raw.bytes.get(),
            crc: raw.crc.get(),
        });
    }
    Ok(runs)
}

const _: () = assert!(EXTENT_BLOCKS == 1024 && SLOT_BLOCKS == 16);
