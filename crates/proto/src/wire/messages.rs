//! Requests and replies: from a received frame to a value, and from a value to a frame.
//!
//! The header, the extension and the data of one message meet here. `RequestOp` and `ReplyOp` have
//! one variant per opcode; matches over them are exhaustive, so a new opcode does not compile until
//! both directions know it.

use super::data::{ByteRange, CheckedData, RangeData, length_of};
use super::header::{Header, Opcode};
use super::hello::{Hello, HelloReply};
use super::peer::{
    Ack, AttachOp, Copy, Digest, PeerContext, Prepare, ResultRecord, Settle, Snap, TailRecord,
    Tails, inside_one_block,
};
use super::{HEADER_BYTES, ID_LIMIT, SECTOR_BYTES, WireError, raw};
use crate::checksum::crc32c;
use crate::disk::BufList;
use crate::frame::{BodyLayout, Frame, OutFrame};
use crate::{BLOCK_BYTES, Epoch, Lsn, Seq, ShardId, Status, VolumeId};
use smallvec::SmallVec;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// On the wire "the volume as it is now"; snapshots have smaller numbers.
const SNAP_SEQ_HEAD: u64 = u64::MAX;
const OPTION_KEEP_ALLOCATED: u32 = 1;

/// What became of a COMPARE_AND_WRITE.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CompareOutcome {
    /// Equal, and the new data are durable.
    Written,
    /// Not equal; nothing was written.
    Different {
        /// First byte that differs, counted from the range's start.
        at: u32,
    },
}

impl CompareOutcome {
    fn to_wire(self) -> (u32, u32) {
        match self {
            CompareOutcome::Written => (0, 0),
            CompareOutcome::Different { at } => (1, at),
        }
    }

    fn from_wire(outcome: u32, at: u32) -> Result<CompareOutcome, WireError> {
        match (outcome, at) {
            (0, 0) => Ok(CompareOutcome::Written),
            (1, at) if at < BLOCK_BYTES as u32 => Ok(CompareOutcome::Different { at }),
            (0 | 1, at) => Err(WireError::Field { name: "first_difference", value: at.into() }),
            (other, _) => Err(WireError::Field { name: "outcome", value: other.into() }),
        }
    }
}

/// What became of a request of a fenced path slot that had an lsn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FenceOutcome {
    /// The request.
    pub command_id: u64,
    /// Its place in the order.
    pub lsn: Lsn,
    /// Its result.
    pub status: Status,
    /// As in the reply that it would have got.
    pub detail: u32,
}

/// What one record of a PING says about a shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum HeartbeatKind {
    /// The sender is its primary and asks for a lease.
    Lease = 1,
    /// No longer listed.
    Drop = 2,
    /// Promises of heartbeats up to this one are given back (T5).
    Release = 3,
    /// Reply: refused; `epoch` is the one promised.
    Refused = 4,
}

/// One record of a PING.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeartbeatEntry {
    /// The shard.
    pub shard: ShardId,
    /// The epoch that is meant.
    pub epoch: Epoch,
    /// What is said.
    pub kind: HeartbeatKind,
}

/// PING and its reply. A client's PING has only `sequence`; the rest is 0.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ping {
    /// Counts heartbeats of this connection; the reply repeats it.
    pub sequence: u64,
    /// The heartbeat that the entries are a difference to; 0 = complete list.
    /// In a reply: the newest heartbeat that is held, which this acknowledges; 0 = none.
    pub base_sequence: u64,
    /// Store that sends.
    pub store: u64,
    /// Its incarnation.
    pub incarnation: u64,
    /// The receiver's incarnation as the sender knows it.
    pub peer_incarnation: u64,
    /// Highest conductor term that the sender knows.
    pub term: u64,
    /// Lineage of the metastore.
    pub lineage: u64,
    /// Highest revision of it that the sender knows.
    pub revision: u64,
    /// Leases and what became of them.
    pub entries: Vec<HeartbeatEntry>,
}

/// What a request asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RequestOp {
    /// See [`Hello`].
    Hello(Box<Hello>),
    /// Close another path slot of the session.
    FencePath {
        /// Which slot.
        slot: u8,
        /// Up to which opening of it.
        generation: u64,
    },
    /// See [`Ping`].
    Ping(Ping),
    /// Read a range.
    Read {
        /// Which bytes.
        range: ByteRange,
        /// A snapshot, or the volume as it is now.
        snap_seq: Option<u64>,
    },
    /// Write a range.
    Write(RangeData),
    /// Barrier.
    Flush,
    /// Forget a range.
    Discard(ByteRange),
    /// Make a range zero.
    WriteZeroes {
        /// Which bytes.
        range: ByteRange,
        /// Keep space for it.
        is_kept_allocated: bool,
    },
    /// Write if the content is the expected one.
    CompareAndWrite {
        /// Expected content.
        compare: CheckedData,
        /// New content.
        write: RangeData,
        /// The session has the results of its commands up to this one.
        acked_upto: u64,
    },
    /// See [`Prepare`].
    Prepare(Box<Prepare>),
    /// See [`Settle`].
    Settle(Box<Settle>),
    /// Records above commit_lsn.
    Tails(PeerContext),
    /// See [`Copy`].
    Copy(Box<Copy>),
    /// See [`Digest`].
    Digest(Digest),
    /// See [`Snap`].
    Snap(Snap),
    /// Order and identity, and whom to refuse.
    Attach(PeerContext, AttachOp),
    /// A configuration newer than the header's epoch.
    NeedConf(PeerContext),
}

impl RequestOp {
    /// The opcode on the wire.
    #[must_use]
    pub fn opcode(&self) -> Opcode {
        match self {
            RequestOp::Hello(_) => Opcode::Hello,
            RequestOp::FencePath { .. } => Opcode::FencePath,
            RequestOp::Ping(_) => Opcode::Ping,
            RequestOp::Read { .. } => Opcode::Read,
            RequestOp::Write(_) => Opcode::Write,
            RequestOp::Flush => Opcode::Flush,
            RequestOp::Discard(_) => Opcode::Discard,
            RequestOp::WriteZeroes { .. } => Opcode::WriteZeroes,
            RequestOp::CompareAndWrite { .. } => Opcode::CompareAndWrite,
            RequestOp::Prepare(_) => Opcode::Prepare,
            RequestOp::Settle(_) => Opcode::Settle,
            RequestOp::Tails(_) => Opcode::Tails,
            RequestOp::Copy(_) => Opcode::Copy,
            RequestOp::Digest(_) => Opcode::Digest,
            RequestOp::Snap(_) => Opcode::Snap,
            RequestOp::Attach(..) => Opcode::Attach,
            RequestOp::NeedConf(_) => Opcode::NeedConf,
        }
    }
}

/// A request with everything that rides in its header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// Chosen by the sender, unique among its requests without reply.
    pub command_id: u64,
    /// The shard.
    pub shard: ShardId,
    /// Its epoch as the sender knows it.
    pub epoch: Epoch,
    /// The volume's attach epoch as the sender knows it.
    pub attach_epoch: u64,
    /// On stable media before the reply; true of every write, carried for the record.
    pub is_fua: bool,
    /// What is asked.
    pub op: RequestOp,
}

impl Request {
    /// Make a value of a received frame whose header was parsed.
    pub fn parse(header: &Header, frame: Frame) -> Result<Request, WireError> {
        if header.is_reply {
            return Err(WireError::Unexpected { opcode: header.opcode, is_reply: true });
        }
        check_frame(header, &frame)?;
        let op = parse_request_op(header, &frame.meta, frame.payload)?;
        Ok(Request {
            command_id: header.command_id,
            shard: header.shard,
            epoch: Epoch(header.epoch),
            attach_epoch: header.position,
            is_fua: header.is_fua,
            op,
        })
    }

    /// Make the frame to send.
    #[must_use]
    pub fn encode(&self) -> OutFrame {
        let mut body = Body::new();
        match &self.op {
            RequestOp::Hello(hello) => body.extension(&hello.to_raw()),
            RequestOp::FencePath { slot, generation } => body.extension(&raw::FencePath {
                generation: (*generation).into(),
                slot: u32::from(*slot).into(),
            }),
            RequestOp::Ping(ping) => body.ping(ping),
            RequestOp::Read { range, snap_seq } => {
                body.extension(&raw::Read { snap_seq: snap_seq.unwrap_or(SNAP_SEQ_HEAD).into() });
                body.range(*range);
            }
            RequestOp::Write(data) => body.range_and_data(data.range(), Some(data.checked())),
            RequestOp::Flush => {}
            RequestOp::Discard(range) => body.range(*range),
            RequestOp::WriteZeroes { range, is_kept_allocated } => {
                let options = if *is_kept_allocated { OPTION_KEEP_ALLOCATED } else { 0 };
                body.extension(&raw::WriteZeroes { options: options.into() });
                body.range(*range);
            }
            RequestOp::CompareAndWrite { compare, write, acked_upto } => {
                assert_eq!(compare.length(), write.range().length(), "compares what it writes");
                body.extension(&raw::CompareAndWrite { acked_upto: (*acked_upto).into() });
                body.range(write.range());
                body.data(compare);
                body.data(write.checked());
            }
            RequestOp::Prepare(prepare) => {
                body.extension(&prepare.to_raw());
                body.range_and_data(prepare.range(), prepare.data());
            }
            RequestOp::Settle(settle) => {
                body.extension(&settle.to_raw());
                body.range_and_data(settle.content.range(), settle.content.data());
            }
            RequestOp::Copy(copy) => {
                body.extension(&copy.to_raw());
                body.range_and_data(copy.content.range(), copy.content.data());
            }
            RequestOp::Tails(peer) | RequestOp::NeedConf(peer) => body.extension(&peer.to_raw()),
            RequestOp::Digest(digest) => body.extension(&digest.to_raw()),
            RequestOp::Snap(snap) => body.extension(&snap.to_raw()),
            RequestOp::Attach(peer, op) => body.extension(&op.to_raw(*peer)),
        }
        body.finish(Header {
            opcode: self.op.opcode(),
            is_reply: false,
            is_error: false,
            is_fua: self.is_fua,
            command_id: self.command_id,
            shard: self.shard,
            length: 0,
            place: 0,
            epoch: self.epoch.0,
            position: self.attach_epoch,
            body: BodyLayout::default(),
        })
    }
}

/// The result of a request that was carried out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReplyOp {
    /// See [`HelloReply`].
    Hello(Box<HelloReply>),
    /// The slot is closed; these of its requests had an lsn, all others had no effect.
    FencePath(Vec<FenceOutcome>),
    /// See [`Ping`].
    Ping(Ping),
    /// The data.
    Read(CheckedData),
    /// Durable on every replica that is required.
    Write,
    /// Passed.
    Flush,
    /// Forgotten.
    Discard,
    /// Zero.
    WriteZeroes,
    /// Written or not.
    CompareAndWrite(CompareOutcome),
    /// Durable here.
    Prepare(Ack),
    /// Durable here.
    Settle(Ack),
    /// See [`Tails`].
    Tails(Box<Tails>),
    /// Durable here.
    Copy(Ack),
    /// XXH3-128 of each region that was asked for.
    Digest(Ack, Vec<u128>),
    /// Done here.
    Snap(Ack),
    /// Refused from now on, durably.
    Attach(Ack),
    /// The configuration, as `shard` encodes it.
    NeedConf(Ack, Vec<u8>),
}

impl ReplyOp {
    /// The opcode on the wire.
    #[must_use]
    pub fn opcode(&self) -> Opcode {
        match self {
            ReplyOp::Hello(_) => Opcode::Hello,
            ReplyOp::FencePath(_) => Opcode::FencePath,
            ReplyOp::Ping(_) => Opcode::Ping,
            ReplyOp::Read(_) => Opcode::Read,
            ReplyOp::Write => Opcode::Write,
            ReplyOp::Flush => Opcode::Flush,
            ReplyOp::Discard => Opcode::Discard,
            ReplyOp::WriteZeroes => Opcode::WriteZeroes,
            ReplyOp::CompareAndWrite(_) => Opcode::CompareAndWrite,
            ReplyOp::Prepare(_) => Opcode::Prepare,
            ReplyOp::Settle(_) => Opcode::Settle,
            ReplyOp::Tails(_) => Opcode::Tails,
            ReplyOp::Copy(_) => Opcode::Copy,
            ReplyOp::Digest(..) => Opcode::Digest,
            ReplyOp::Snap(_) => Opcode::Snap,
            ReplyOp::Attach(_) => Opcode::Attach,
            ReplyOp::NeedConf(..) => Opcode::NeedConf,
        }
    }
}

/// A request that was not carried out; the reply's epoch is the one that the refuser knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failure {
    /// What was asked.
    pub opcode: Opcode,
    /// Why not; never [`Status::Ok`].
    pub status: Status,
    /// Particulars that the status defines, else 0.
    pub detail: u32,
}

/// The one reply to a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    /// The request's.
    pub command_id: u64,
    /// The request's.
    pub shard: ShardId,
    /// The epoch that the replier knows.
    pub epoch: Epoch,
    /// seq of the operation's lsn; 0 if it has none.
    pub seq: Seq,
    /// What became of it.
    pub result: Result<ReplyOp, Failure>,
}

impl Reply {
    /// Answer the request of `header` with an error.
    #[must_use]
    pub fn refuse(header: &Header, epoch: Epoch, status: Status, detail: u32) -> Reply {
        assert_ne!(status, Status::Ok, "a refusal has a reason");
        Reply {
            command_id: header.command_id,
            shard: header.shard,
            epoch,
            seq: Seq(0),
            result: Err(Failure { opcode: header.opcode, status, detail }),
        }
    }

    /// Make a value of a received frame whose header was parsed.
    pub fn parse(header: &Header, frame: Frame) -> Result<Reply, WireError> {
        if !header.is_reply {
            return Err(WireError::Unexpected { opcode: header.opcode, is_reply: false });
        }
        check_frame(header, &frame)?;
        // Status and detail share the field that is the offset in a request.
        let (number, detail) = ((header.place & 0xffff_ffff) as u32, (header.place >> 32) as u32);
        let is_ok = number == Status::Ok.number();
        if is_ok == header.is_error {
            return Err(WireError::Field { name: "status", value: number.into() });
        }
        if is_ok && detail != 0 && header.opcode != Opcode::Read {
            return Err(WireError::Field { name: "detail", value: detail.into() });
        }
        let result = if is_ok {
            Ok(parse_reply_op(header, &frame.meta, frame.payload)?)
        } else {
            // A newer peer may know more codes; what they mean here is "it failed".
            let status = Status::try_from(number).unwrap_or(Status::Internal);
            Err(Failure { opcode: header.opcode, status, detail })
        };
        Ok(Reply {
            command_id: header.command_id,
            shard: header.shard,
            epoch: Epoch(header.epoch),
            seq: Seq(header.position),
            result,
        })
    }

    /// Make the frame to send.
    #[must_use]
    pub fn encode(&self) -> OutFrame {
        let mut body = Body::new();
        let opcode = match &self.result {
            Ok(op) => {
                body.reply(op);
                op.opcode()
            }
            Err(failure) => {
                assert_ne!(failure.status, Status::Ok, "a failure has a reason");
                body.place = u64::from(failure.status.number()) | u64::from(failure.detail) << 32;
                failure.opcode
            }
        };
        body.finish(Header {
            opcode,
            is_reply: true,
            is_error: self.result.is_err(),
            is_fua: false,
            command_id: self.command_id,
            shard: self.shard,
            length: 0,
            place: 0,
            epoch: self.epoch.0,
            position: self.seq.0,
            body: BodyLayout::default(),
        })
    }
}

/// What both directions have in common before the opcode matters.
fn check_frame(header: &Header, frame: &Frame) -> Result<(), WireError> {
    let parts = [
        ("meta", header.body.meta_bytes, frame.meta.len() as u64),
        ("payload", header.body.payload_bytes, frame.payload.iter().map(|b| b.len() as u64).sum()),
    ];
    for (what, expected, found) in parts {
        if u64::from(expected) != found {
            return Err(WireError::Truncated { what, expected: expected.into(), found });
        }
    }
    let volume = header.shard.volume.0;
    if volume >= ID_LIMIT {
        return Err(WireError::Field { name: "volume_id", value: volume });
    }
    Ok(())
}

fn parse_request_op(
    header: &Header,
    meta: &[u8],
    payload: BufList,
) -> Result<RequestOp, WireError> {
    let opcode = header.opcode;
    let range = || ByteRange::new(header.place, header.length);
    let start = header.start_in_block();
    // Nothing after the extension means: no data, which DISCARD and the like have.
    let some = |crcs: &[u8], payload: BufList| match crcs.is_empty() {
        true => Ok(None),
        false => CheckedData::verify(start, crcs, payload).map(Some),
    };
    let has_range = matches!(
        opcode,
        Opcode::Read
            | Opcode::Write
            | Opcode::Discard
            | Opcode::WriteZeroes
            | Opcode::CompareAndWrite
            | Opcode::Prepare
            | Opcode::Settle
            | Opcode::Copy
    );
    if !has_range && header.place != 0 {
        return Err(WireError::Field { name: "offset", value: header.place });
    }
    Ok(match opcode {
        Opcode::Hello => {
            let (raw, _) = raw::take::<raw::Hello>(meta)?;
            RequestOp::Hello(Box::new(Hello::from_raw(&raw)?))
        }
        Opcode::FencePath => {
            let (raw, _) = raw::take::<raw::FencePath>(meta)?;
            let slot = u8::try_from(raw.slot.get());
            let slot =
                slot.map_err(|_| WireError::Field { name: "slot", value: raw.slot.get().into() })?;
            RequestOp::FencePath { slot, generation: raw.generation.get() }
        }
        Opcode::Ping => RequestOp::Ping(parse_ping(meta, payload)?),
        Opcode::Read => {
            let (raw, _) = raw::take::<raw::Read>(meta)?;
            let snap_seq = Some(raw.snap_seq.get()).filter(|seq| *seq != SNAP_SEQ_HEAD);
            RequestOp::Read { range: range()?, snap_seq }
        }
        Opcode::Write => {
            RequestOp::Write(RangeData::join(range()?, CheckedData::verify(start, meta, payload)?))
        }
        Opcode::Flush => RequestOp::Flush,
        Opcode::Discard => RequestOp::Discard(range()?),
        Opcode::WriteZeroes => {
            let (raw, _) = raw::take::<raw::WriteZeroes>(meta)?;
            let options = raw.options.get();
            if options > OPTION_KEEP_ALLOCATED {
                return Err(WireError::Field { name: "options", value: options.into() });
            }
            RequestOp::WriteZeroes { range: range()?, is_kept_allocated: options != 0 }
        }
        Opcode::CompareAndWrite => parse_compare(header, meta, payload)?,
        Opcode::Prepare => {
            let (raw, crcs) = raw::take::<raw::Prepare>(meta)?;
            let data = some(crcs, payload)?;
            RequestOp::Prepare(Box::new(Prepare::from_raw(&raw, range()?, data)?))
        }
        Opcode::Settle => {
            let (raw, crcs) = raw::take::<raw::Settle>(meta)?;
            let data = some(crcs, payload)?;
            RequestOp::Settle(Box::new(Settle::from_raw(&raw, range()?, data)?))
        }
        Opcode::Copy => {
            let (raw, crcs) = raw::take::<raw::Copy>(meta)?;
            let data = some(crcs, payload)?;
            RequestOp::Copy(Box::new(Copy::from_raw(&raw, range()?, data)?))
        }
        Opcode::Tails => RequestOp::Tails(PeerContext::from_raw(&raw::take(meta)?.0)),
        Opcode::NeedConf => RequestOp::NeedConf(PeerContext::from_raw(&raw::take(meta)?.0)),
        Opcode::Digest => RequestOp::Digest(Digest::from_raw(&raw::take(meta)?.0)?),
        Opcode::Snap => RequestOp::Snap(Snap::from_raw(&raw::take(meta)?.0)?),
        Opcode::Attach => {
            let (raw, _) = raw::take::<raw::Attach>(meta)?;
            RequestOp::Attach(PeerContext::from_raw(&raw.peer), AttachOp::from_raw(&raw)?)
        }
    })
}

fn parse_compare(header: &Header, meta: &[u8], payload: BufList) -> Result<RequestOp, WireError> {
    let (raw, crcs) = raw::take::<raw::CompareAndWrite>(meta)?;
    let range = ByteRange::new(header.place, header.length)?;
    let (compare, write) = split(payload, range.length() as usize);
    let (compare_crcs, write_crcs) = crcs.split_at(crcs.len() / 2);
    let start = header.start_in_block();
    let compare = CheckedData::verify(start, compare_crcs, compare)?;
    let write = RangeData::join(range, CheckedData::verify(start, write_crcs, write)?);
    let write = inside_one_block(write)?;
    Ok(RequestOp::CompareAndWrite { compare, write, acked_upto: raw.acked_upto.get() })
}

/// Cut a list of buffers after `len` bytes, sharing their pages.
fn split(list: BufList, len: usize) -> (BufList, BufList) {
    let (mut front, mut back) = (BufList::new(), BufList::new());
    let mut left = len;
    for buf in list {
        let cut = left.min(buf.len());
        if cut > 0 {
            front.push(buf.slice(0..cut));
        }
        if cut < buf.len() {
            back.push(buf.slice(cut..buf.len()));
        }
        left -= cut;
    }
    (front, back)
}

fn parse_reply_op(header: &Header, meta: &[u8], payload: BufList) -> Result<ReplyOp, WireError> {
    let ack = || raw::take::<raw::Ack>(meta).map(|(raw, _)| Ack::from_raw(&raw));
    Ok(match header.opcode {
        Opcode::Hello => {
            let (raw, _) = raw::take::<raw::HelloReply>(meta)?;
            ReplyOp::Hello(Box::new(HelloReply::from_raw(&raw)?))
        }
        Opcode::FencePath => {
            let bytes = record_bytes(meta, payload)?;
            let outcomes = records::<raw::FenceOutcome>(&bytes)?;
            ReplyOp::FencePath(outcomes.iter().map(fence_outcome).collect::<Result<_, _>>()?)
        }
        Opcode::Ping => ReplyOp::Ping(parse_ping(meta, payload)?),
        Opcode::Read => {
            let (start, length) = ((header.place >> 32) as u32, header.length);
            let is_inside = start < BLOCK_BYTES as u32;
            if !is_inside || !start.is_multiple_of(SECTOR_BYTES) {
                return Err(WireError::Field { name: "detail", value: start.into() });
            }
            ByteRange::new(start.into(), length)?;
            ReplyOp::Read(CheckedData::verify(start, meta, payload)?)
        }
        Opcode::Write => ReplyOp::Write,
        Opcode::Flush => ReplyOp::Flush,
        Opcode::Discard => ReplyOp::Discard,
        Opcode::WriteZeroes => ReplyOp::WriteZeroes,
        Opcode::CompareAndWrite => {
            let (raw, _) = raw::take::<raw::CompareReply>(meta)?;
            let outcome = (raw.outcome.get(), raw.first_difference.get());
            ReplyOp::CompareAndWrite(CompareOutcome::from_wire(outcome.0, outcome.1)?)
        }
        Opcode::Prepare => ReplyOp::Prepare(ack()?),
        Opcode::Settle => ReplyOp::Settle(ack()?),
        Opcode::Copy => ReplyOp::Copy(ack()?),
        Opcode::Snap => ReplyOp::Snap(ack()?),
        Opcode::Attach => ReplyOp::Attach(ack()?),
        Opcode::Tails => ReplyOp::Tails(Box::new(parse_tails(meta, payload)?)),
        Opcode::Digest => {
            let (raw, crcs) = raw::take::<raw::Ack>(meta)?;
            let bytes = record_bytes(crcs, payload)?;
            let digests = records::<[u8; 16]>(&bytes)?;
            let digests = digests.iter().map(|digest| u128::from_le_bytes(*digest)).collect();
            ReplyOp::Digest(Ack::from_raw(&raw), digests)
        }
        Opcode::NeedConf => {
            let (raw, crcs) = raw::take::<raw::Ack>(meta)?;
            ReplyOp::NeedConf(Ack::from_raw(&raw), record_bytes(crcs, payload)?)
        }
    })
}

fn fence_outcome(raw: &raw::FenceOutcome) -> Result<FenceOutcome, WireError> {
    Ok(FenceOutcome {
        command_id: raw.command_id.get(),
        lsn: Lsn { epoch: Epoch(raw.epoch.get()), seq: Seq(raw.seq.get()) },
        // As in an error reply, a code that only a newer peer knows means "it failed".
        status: Status::try_from(raw.status.get()).unwrap_or(Status::Internal),
        detail: raw.detail.get(),
    })
}

fn parse_ping(meta: &[u8], payload: BufList) -> Result<Ping, WireError> {
    let (raw, crcs) = raw::take::<raw::Ping>(meta)?;
    let bytes = record_bytes(crcs, payload)?;
    let entries = records::<raw::HeartbeatEntry>(&bytes)?;
    Ok(Ping {
        sequence: raw.sequence.get(),
        base_sequence: raw.base_sequence.get(),
        store: raw.store.get(),
        incarnation: raw.incarnation.get(),
        peer_incarnation: raw.peer_incarnation.get(),
        term: raw.term.get(),
        lineage: raw.lineage.get(),
        revision: raw.revision.get(),
        entries: entries.iter().map(heartbeat_entry).collect::<Result<_, _>>()?,
    })
}

fn heartbeat_entry(raw: &raw::HeartbeatEntry) -> Result<HeartbeatEntry, WireError> {
    let kind = match raw.kind.get() {
        1 => HeartbeatKind::Lease,
        2 => HeartbeatKind::Drop,
        3 => HeartbeatKind::Release,
        4 => HeartbeatKind::Refused,
        other => return Err(WireError::Field { name: "kind", value: other.into() }),
    };
    let volume = raw.volume.get();
    if volume >= ID_LIMIT {
        return Err(WireError::Field { name: "volume_id", value: volume });
    }
    let shard = ShardId { volume: VolumeId(volume), index: raw.shard_index.get() };
    Ok(HeartbeatEntry { shard, epoch: Epoch(raw.epoch.get()), kind })
}

fn parse_tails(meta: &[u8], payload: BufList) -> Result<Tails, WireError> {
    let (raw, crcs) = raw::take::<raw::TailsReply>(meta)?;
    let bytes = record_bytes(crcs, payload)?;
    let counts = (raw.record_count.get(), raw.result_count.get());
    let lengths = (
        u64::from(counts.0) * size_of::<raw::TailRecord>() as u64,
        u64::from(counts.1) * size_of::<raw::ResultRecord>() as u64,
    );
    if lengths.0 + lengths.1 != bytes.len() as u64 {
        return Err(WireError::Field { name: "record_count", value: counts.0.into() });
    }
    let (first, second) = bytes.split_at(lengths.0 as usize);
    let result = |raw: &raw::ResultRecord| -> Result<ResultRecord, WireError> {
        Ok(ResultRecord {
            session: raw.session.get(),
            session_command: raw.session_command.get(),
            lsn: Lsn { epoch: Epoch(raw.epoch.get()), seq: Seq(raw.seq.get()) },
            outcome: CompareOutcome::from_wire(raw.outcome.get(), raw.first_difference.get())?,
        })
    };
    Ok(Tails {
        ack: Ack::from_raw(&raw.ack),
        complete_lsn: Lsn {
            epoch: Epoch(raw.complete_epoch.get()),
            seq: Seq(raw.complete_seq.get()),
        },
        snap_seq: raw.snap_seq.get(),
        records: records(first)?.iter().map(TailRecord::from_raw).collect::<Result<_, _>>()?,
        results: records(second)?.iter().map(result).collect::<Result<_, _>>()?,
    })
}

/// Check the CRCs of records and put them into one piece.
fn record_bytes(crcs: &[u8], payload: BufList) -> Result<Vec<u8>, WireError> {
    Ok(CheckedData::verify(0, crcs, payload)?.to_vec())
}

/// View bytes as whole records.
fn records<T: FromBytes + Immutable + KnownLayout + Unaligned>(
    bytes: &[u8],
) -> Result<&[T], WireError> {
    <[T]>::ref_from_bytes(bytes)
        .map_err(|_| WireError::Field { name: "length", value: bytes.len() as u64 })
}

/// The parts of a message while it is put together.
struct Body {
    /// Room for the header, then extensions and CRCs.
    head: SmallVec<[u8; 128]>,
    payload: BufList,
    records: Vec<u8>,
    length: u32,
    place: u64,
}

impl Body {
    fn new() -> Body {
        let head = SmallVec::from_slice(&[0; HEADER_BYTES]);
        Body { head, payload: BufList::new(), records: Vec::new(), length: 0, place: 0 }
    }

    fn extension<T: IntoBytes + Immutable>(&mut self, extension: &T) {
        raw::put(&mut self.head, extension);
    }

    fn range(&mut self, range: ByteRange) {
        (self.place, self.length) = (range.offset(), range.length());
    }

    fn data(&mut self, data: &CheckedData) {
        for crc in data.crcs() {
            self.head.extend(crc.to_le_bytes());
        }
        self.payload.extend(data.data().iter().cloned());
    }

    fn range_and_data(&mut self, range: ByteRange, data: Option<&CheckedData>) {
        self.range(range);
        if let Some(data) = data {
            self.data(data);
        }
    }

    fn records(&mut self, bytes: Vec<u8>) {
        self.length = u32::try_from(bytes.len()).expect("senders keep records below the limit");
        for block in bytes.chunks(BLOCK_BYTES) {
            self.head.extend(crc32c(block).to_le_bytes());
        }
        self.records = bytes;
    }

    fn ping(&mut self, ping: &Ping) {
        self.extension(&raw::Ping {
            sequence: ping.sequence.into(),
            base_sequence: ping.base_sequence.into(),
            store: ping.store.into(),
            incarnation: ping.incarnation.into(),
            peer_incarnation: ping.peer_incarnation.into(),
            term: ping.term.into(),
            lineage: ping.lineage.into(),
            revision: ping.revision.into(),
        });
        let mut bytes = Vec::new();
        for entry in &ping.entries {
            let raw = raw::HeartbeatEntry {
                volume: entry.shard.volume.0.into(),
                epoch: entry.epoch.0.into(),
                shard_index: entry.shard.index.into(),
                kind: (entry.kind as u32).into(),
            };
            bytes.extend_from_slice(raw.as_bytes());
        }
        self.records(bytes);
    }

    fn reply(&mut self, op: &ReplyOp) {
        match op {
            ReplyOp::Hello(hello) => self.extension(&hello.to_raw()),
            ReplyOp::FencePath(outcomes) => {
                let mut bytes = Vec::new();
                for outcome in outcomes {
                    let raw = raw::FenceOutcome {
                        command_id: outcome.command_id.into(),
                        epoch: outcome.lsn.epoch.0.into(),
                        seq: outcome.lsn.seq.0.into(),
                        status: outcome.status.number().into(),
                        detail: outcome.detail.into(),
                    };
                    bytes.extend_from_slice(raw.as_bytes());
                }
                self.records(bytes);
            }
            ReplyOp::Ping(ping) => self.ping(ping),
            ReplyOp::Read(data) => {
                self.data(data);
                self.length = data.length();
                self.place = u64::from(data.start_in_block()) << 32;
            }
            ReplyOp::Write | ReplyOp::Flush | ReplyOp::Discard | ReplyOp::WriteZeroes => {}
            ReplyOp::CompareAndWrite(outcome) => {
                let (outcome, at) = outcome.to_wire();
                let raw =
                    raw::CompareReply { outcome: outcome.into(), first_difference: at.into() };
                self.extension(&raw);
            }
            ReplyOp::Prepare(ack)
            | ReplyOp::Settle(ack)
            | ReplyOp::Copy(ack)
            | ReplyOp::Snap(ack)
            | ReplyOp::Attach(ack) => self.extension(&ack.to_raw()),
            ReplyOp::Tails(tails) => self.tails(tails),
            ReplyOp::Digest(ack, digests) => {
                self.extension(&ack.to_raw());
                self.records(digests.iter().flat_map(|digest| digest.to_le_bytes()).collect());
            }
            ReplyOp::NeedConf(ack, conf) => {
                self.extension(&ack.to_raw());
                self.records(conf.clone());
            }
        }
    }

    fn tails(&mut self, tails: &Tails) {
        let count = |len: usize| u32::try_from(len).expect("records fit one message");
        self.extension(&raw::TailsReply {
            ack: tails.ack.to_raw(),
            complete_epoch: tails.complete_lsn.epoch.0.into(),
            complete_seq: tails.complete_lsn.seq.0.into(),
            snap_seq: tails.snap_seq.into(),
            record_count: count(tails.records.len()).into(),
            result_count: count(tails.results.len()).into(),
        });
        let mut bytes = Vec::new();
        for record in &tails.records {
            bytes.extend_from_slice(record.to_raw().as_bytes());
        }
        for result in &tails.results {
            let (outcome, at) = result.outcome.to_wire();
            let raw = raw::ResultRecord {
                session: result.session.into(),
                session_command: result.session_command.into(),
                epoch: result.lsn.epoch.0.into(),
                seq: result.lsn.seq.0.into(),
                outcome: outcome.into(),
                first_difference: at.into(),
            };
            bytes.extend_from_slice(raw.as_bytes());
        }
        self.records(bytes);
    }

    /// Complete the header and put it in front.
    fn finish(mut self, mut header: Header) -> OutFrame {
        header.length = self.length;
        header.place = self.place;
        let payload_bytes = length_of(&self.payload) + self.records.len() as u32;
        header.body =
            BodyLayout { meta_bytes: (self.head.len() - HEADER_BYTES) as u32, payload_bytes };
        self.head[..HEADER_BYTES].copy_from_slice(&header.bytes());
        // What we send must pass our own check, or the other side would end the connection.
        assert!(Header::parse(&self.head[..HEADER_BYTES]).is_ok(), "own header is right");
        self.head.extend_from_slice(&self.records);
        OutFrame { head: self.head, payload: self.payload }
    }
}
