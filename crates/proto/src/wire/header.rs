//! The 64-byte header, and the one table that says what body each opcode has.

use super::data::started_blocks;
use super::hello::VERSION;
use super::{
    COMPARE_BYTES_MAX, CONF_BYTES_MAX, HEADER_BYTES, PAYLOAD_BYTES_MAX, RANGE_BYTES_MAX, WireError,
    raw,
};
use crate::checksum::crc32c;
use crate::frame::BodyLayout;
use crate::{BLOCK_BYTES, ShardId, VolumeId};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// "PFW1" as it stands on the wire, read as little-endian.
const MAGIC: u32 = u32::from_le_bytes(*b"PFW1");
const FLAG_REPLY: u16 = 1;
const FLAG_FUA: u16 = 2;
const FLAG_ERROR: u16 = 4;
/// The header CRC covers all bytes before itself.
const CRC_AT: usize = HEADER_BYTES - 4;

/// What a message asks for or answers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Opcode {
    /// First message of a connection: versions, kind, path slot, limits, proof of identity.
    Hello = 0x01,
    /// Close another path slot of this session before its requests move here.
    FencePath = 0x02,
    /// Liveness; on heartbeat connections also leases and registrations.
    Ping = 0x03,
    /// Read a range of the shard.
    Read = 0x10,
    /// Write a range of the shard.
    Write = 0x11,
    /// Barrier over completed writes.
    Flush = 0x12,
    /// Forget a range.
    Discard = 0x13,
    /// Make a range zero.
    WriteZeroes = 0x14,
    /// Write if the present content is the expected one.
    CompareAndWrite = 0x15,
    /// Primary to replica: make this operation durable.
    Prepare = 0x20,
    /// New primary to replica: this is the content of a tail block.
    Settle = 0x21,
    /// New primary asks for records above commit_lsn.
    Tails = 0x22,
    /// Primary to learner: content of a region.
    Copy = 0x23,
    /// Digests of the visible content of regions.
    Digest = 0x24,
    /// Hold, seal or release for a snapshot.
    Snap = 0x25,
    /// Fence older writers.
    Attach = 0x26,
    /// Ask for a newer configuration of the shard.
    NeedConf = 0x27,
}

impl Opcode {
    /// Every opcode, by ascending number.
    pub const ALL: [Opcode; 17] = [
        Opcode::Hello,
        Opcode::FencePath,
        Opcode::Ping,
        Opcode::Read,
        Opcode::Write,
        Opcode::Flush,
        Opcode::Discard,
        Opcode::WriteZeroes,
        Opcode::CompareAndWrite,
        Opcode::Prepare,
        Opcode::Settle,
        Opcode::Tails,
        Opcode::Copy,
        Opcode::Digest,
        Opcode::Snap,
        Opcode::Attach,
        Opcode::NeedConf,
    ];

    fn from_byte(byte: u8) -> Result<Opcode, WireError> {
        let found = Opcode::ALL.into_iter().find(|opcode| *opcode as u8 == byte);
        found.ok_or(WireError::UnknownOpcode(byte))
    }

    fn may_have_fua(self) -> bool {
        matches!(
            self,
            Opcode::Write | Opcode::Discard | Opcode::WriteZeroes | Opcode::CompareAndWrite
        )
    }
}

/// What follows the extension.
#[derive(Clone, Copy)]
enum Data {
    /// Nothing, and `length` is 0.
    None,
    /// Nothing; `length` is a range of at most so many bytes.
    RangeOnly(u32),
    /// `length` bytes of the range.
    Range(u32),
    /// The range's bytes, or nothing when the operation has no content.
    RangeOrNothing,
    /// Twice `length` bytes: compare, then write.
    RangeTwice(u32),
    /// `length` bytes of records, checksummed as if they started at offset 0.
    Records(u32),
}

/// The table of docs/reference/pfw.md: extension with its CRC, and data.
fn body_of(opcode: Opcode, is_reply: bool) -> (usize, Data) {
    match (opcode, is_reply) {
        (Opcode::Hello, false) => (raw::with_crc::<raw::Hello>(), Data::None),
        (Opcode::Hello, true) => (raw::with_crc::<raw::HelloReply>(), Data::None),
        (Opcode::FencePath, false) => (raw::with_crc::<raw::FencePath>(), Data::None),
        (Opcode::FencePath, true) => (0, Data::Records(PAYLOAD_BYTES_MAX)),
        (Opcode::Ping, _) => (raw::with_crc::<raw::Ping>(), Data::Records(PAYLOAD_BYTES_MAX)),
        (Opcode::Read, false) => (raw::with_crc::<raw::Read>(), Data::RangeOnly(PAYLOAD_BYTES_MAX)),
        (Opcode::Read, true) => (0, Data::Range(PAYLOAD_BYTES_MAX)),
        (Opcode::Write, false) => (0, Data::Range(PAYLOAD_BYTES_MAX)),
        (Opcode::Flush, _) => (0, Data::None),
        (Opcode::Discard, false) => (0, Data::RangeOnly(RANGE_BYTES_MAX)),
        (Opcode::WriteZeroes, false) => {
            (raw::with_crc::<raw::WriteZeroes>(), Data::RangeOnly(RANGE_BYTES_MAX))
        }
        (Opcode::Write | Opcode::Discard | Opcode::WriteZeroes, true) => (0, Data::None),
        (Opcode::CompareAndWrite, false) => {
            (raw::with_crc::<raw::CompareAndWrite>(), Data::RangeTwice(COMPARE_BYTES_MAX))
        }
        (Opcode::CompareAndWrite, true) => (raw::with_crc::<raw::CompareReply>(), Data::None),
        (Opcode::Prepare, false) => (raw::with_crc::<raw::Prepare>(), Data::RangeOrNothing),
        (Opcode::Settle, false) => (raw::with_crc::<raw::Settle>(), Data::RangeOrNothing),
        (Opcode::Copy, false) => (raw::with_crc::<raw::Copy>(), Data::RangeOrNothing),
        (Opcode::Tails | Opcode::NeedConf, false) => (raw::with_crc::<raw::Peer>(), Data::None),
        (Opcode::Digest, false) => (raw::with_crc::<raw::Digest>(), Data::None),
        (Opcode::Snap, false) => (raw::with_crc::<raw::Snap>(), Data::None),
        (Opcode::Attach, false) => (raw::with_crc::<raw::Attach>(), Data::None),
        (Opcode::Prepare | Opcode::Settle | Opcode::Copy | Opcode::Snap | Opcode::Attach, true) => {
            (raw::with_crc::<raw::Ack>(), Data::None)
        }
        (Opcode::Tails, true) => {
            (raw::with_crc::<raw::TailsReply>(), Data::Records(PAYLOAD_BYTES_MAX))
        }
        (Opcode::Digest, true) => (raw::with_crc::<raw::Ack>(), Data::Records(PAYLOAD_BYTES_MAX)),
        (Opcode::NeedConf, true) => (raw::with_crc::<raw::Ack>(), Data::Records(CONF_BYTES_MAX)),
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: u8,
    opcode: u8,
    flags: U16,
    command_id: U64,
    volume_id: U64,
    shard_index: U32,
    length: U32,
    place: U64,
    epoch: U64,
    position: U64,
    body_length: U32,
    header_crc: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

/// A checked header. `place` and `position` mean different things in requests and replies, so they
/// are read through [`Request`](super::Request) and [`Reply`](super::Reply).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What is asked or answered.
    pub opcode: Opcode,
    /// Whether this is a reply.
    pub is_reply: bool,
    /// Whether this is a reply without result.
    pub is_error: bool,
    /// The client wants this write on stable media (every acknowledged write is).
    pub is_fua: bool,
    /// The sender's name for the request; the reply brings it back.
    pub command_id: u64,
    /// The shard that it concerns.
    pub shard: ShardId,
    /// Bytes of the range, or of the records.
    pub length: u32,
    /// Request: first byte of the range in the shard. Reply: status, and detail above it.
    pub(super) place: u64,
    /// The shard's epoch as the sender knows it.
    pub epoch: u64,
    /// Request: attach epoch. Reply: lsn.seq.
    pub(super) position: u64,
    /// What follows on the wire.
    pub body: BodyLayout,
}

impl Header {
    /// Check one header: magic, version, CRC, opcode, flags, then lengths against the opcode.
    ///
    /// Shapes: `bytes` is exactly [`HEADER_BYTES`] long.
    pub fn parse(bytes: &[u8]) -> Result<Header, WireError> {
        let raw = RawHeader::ref_from_bytes(bytes).map_err(|_| WireError::Truncated {
            what: "header",
            expected: HEADER_BYTES as u64,
            found: bytes.len() as u64,
        })?;
        if raw.magic.get() != MAGIC {
            return Err(WireError::Magic { found: raw.magic.get() });
        }
        if raw.version != VERSION {
            return Err(WireError::Version { found: raw.version });
        }
        let expected = crc32c(&bytes[..CRC_AT]);
        if raw.header_crc.get() != expected {
            return Err(WireError::HeaderChecksum { expected, found: raw.header_crc.get() });
        }
        let opcode = Opcode::from_byte(raw.opcode)?;
        let flags = raw.flags.get();
        let has = |flag: u16| flags & flag != 0;
        let is_known = flags & !(FLAG_REPLY | FLAG_FUA | FLAG_ERROR) == 0;
        let is_meant = (!has(FLAG_ERROR) || has(FLAG_REPLY))
            && (!has(FLAG_FUA) || (!has(FLAG_REPLY) && opcode.may_have_fua()));
        if !is_known || !is_meant {
            return Err(WireError::UnknownFlags { opcode, flags });
        }
        let mut header = Header {
            opcode,
            is_reply: has(FLAG_REPLY),
            is_error: has(FLAG_ERROR),
            is_fua: has(FLAG_FUA),
            command_id: raw.command_id.get(),
            shard: ShardId { volume: VolumeId(raw.volume_id.get()), index: raw.shard_index.get() },
            length: raw.length.get(),
            place: raw.place.get(),
            epoch: raw.epoch.get(),
            position: raw.position.get(),
            body: BodyLayout::default(),
        };
        header.body = header.layout(raw.body_length.get())?;
        Ok(header)
    }

    /// Write the header; the inverse of [`Header::parse`].
    #[must_use]
    pub(super) fn bytes(&self) -> [u8; HEADER_BYTES] {
        let flag = |is_set: bool, flag: u16| if is_set { flag } else { 0 };
        let mut raw = RawHeader {
            magic: MAGIC.into(),
            version: VERSION,
            opcode: self.opcode as u8,
            flags: (flag(self.is_reply, FLAG_REPLY)
                | flag(self.is_fua, FLAG_FUA)
                | flag(self.is_error, FLAG_ERROR))
            .into(),
            command_id: self.command_id.into(),
            volume_id: self.shard.volume.0.into(),
            shard_index: self.shard.index.into(),
            length: self.length.into(),
            place: self.place.into(),
            epoch: self.epoch.into(),
            position: self.position.into(),
            body_length: (self.body.meta_bytes + self.body.payload_bytes).into(),
            header_crc: 0.into(),
        };
        raw.header_crc = crc32c(&raw.as_bytes()[..CRC_AT]).into();
        zerocopy::transmute!(raw)
    }

    /// Where the first data byte lies in its 4 KiB block.
    ///
    /// A reply has no offset, so a READ reply says it in `detail`: its CRCs can then be verified
    /// on arrival, before the request it answers is looked up.
    pub(super) fn start_in_block(&self) -> u32 {
        let byte = if self.is_reply { self.place >> 32 } else { self.place };
        (byte % BLOCK_BYTES as u64) as u32
    }

    /// Split `body_length` into meta and payload, or say why it contradicts the rest.
    fn layout(&self, body_length: u32) -> Result<BodyLayout, WireError> {
        let opcode = self.opcode;
        let (extension, data) = match self.is_error {
            true => (0, Data::None),
            false => body_of(opcode, self.is_reply),
        };
        // u64 throughout: no field of 32 bits can overflow these sums.
        let extension = extension as u64;
        let crcs = |start: u32| 4 * u64::from(started_blocks(start, self.length));
        let length = u64::from(self.length);
        let is_bare = u64::from(body_length) == extension;
        let (limit, meta, payload) = match data {
            Data::None => (0, extension, 0),
            Data::RangeOnly(limit) => (limit, extension, 0),
            Data::RangeOrNothing if is_bare => (RANGE_BYTES_MAX, extension, 0),
            Data::RangeOrNothing => {
                (PAYLOAD_BYTES_MAX, extension + crcs(self.start_in_block()), length)
            }
            Data::Range(limit) => (limit, extension + crcs(self.start_in_block()), length),
            Data::RangeTwice(limit) => {
                (limit, extension + 2 * crcs(self.start_in_block()), 2 * length)
            }
            Data::Records(limit) => (limit, extension + crcs(0), length),
        };
        if self.length > limit {
            return Err(WireError::TooLong { opcode, found: self.length, limit });
        }
        if u64::from(body_length) != meta + payload {
            let expected = meta + payload;
            return Err(WireError::BodyLength { opcode, expected, found: body_length });
        }
        let narrow = |bytes: u64| u32::try_from(bytes).expect("a part of a u32 body length");
        Ok(BodyLayout { meta_bytes: narrow(meta), payload_bytes: narrow(payload) })
    }
}
