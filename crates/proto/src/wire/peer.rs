//! What replicas of one shard say to each other: the types, and their way from and to raw bytes.

use super::data::{ByteRange, CheckedData, RangeData};
use super::header::Opcode;
use super::{COMPARE_BYTES_MAX, PAYLOAD_BYTES_MAX, WireError, raw};
use crate::{BLOCK_BYTES, Epoch, Lsn, Seq};

/// Digests of 16 bytes that fit into one reply; also the regions of the largest shard (64 GiB).
const REGIONS_MAX: u32 = PAYLOAD_BYTES_MAX / 16;
const OPTION_KEEP_ALLOCATED: u32 = 1;
const OPTION_LAST: u32 = 1;

/// What every message between replicas carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PeerContext {
    /// The operation's place in the order; TAILS: the last one that the asker knows.
    pub lsn: Lsn,
    /// Everything up to here is committed.
    pub commit_lsn: Lsn,
    /// The top layer that the operation belongs to.
    pub snap_seq: u64,
    /// The receiver's incarnation as the sender knows it; another one must refuse.
    pub incarnation: u64,
    /// Changes when a human forces a history (T7); another one must refuse.
    pub history_id: u64,
}

impl PeerContext {
    pub(super) fn to_raw(self) -> raw::Peer {
        raw::Peer {
            seq: self.lsn.seq.0.into(),
            commit_epoch: self.commit_lsn.epoch.0.into(),
            commit_seq: self.commit_lsn.seq.0.into(),
            snap_seq: self.snap_seq.into(),
            incarnation: self.incarnation.into(),
            lsn_epoch: self.lsn.epoch.0.into(),
            history_id: self.history_id.into(),
        }
    }

    pub(super) fn from_raw(raw: &raw::Peer) -> PeerContext {
        let lsn = |epoch: u64, seq: u64| Lsn { epoch: Epoch(epoch), seq: Seq(seq) };
        PeerContext {
            lsn: lsn(raw.lsn_epoch.get(), raw.seq.get()),
            commit_lsn: lsn(raw.commit_epoch.get(), raw.commit_seq.get()),
            snap_seq: raw.snap_seq.get(),
            incarnation: raw.incarnation.get(),
            history_id: raw.history_id.get(),
        }
    }
}

/// What a replica stores about a block; the numbers are those of the lane's map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum BlockState {
    /// The layer below shows through.
    Inherit = 0,
    /// Content is stored.
    Data = 1,
    /// Zeros.
    Zero = 2,
    /// Known to be lost; an error until it is overwritten.
    Poison = 3,
}

impl BlockState {
    pub(super) fn parse(value: u32) -> Result<BlockState, WireError> {
        match value {
            0 => Ok(BlockState::Inherit),
            1 => Ok(BlockState::Data),
            2 => Ok(BlockState::Zero),
            3 => Ok(BlockState::Poison),
            other => Err(WireError::Field { name: "state", value: other.into() }),
        }
    }
}

/// A range of one state, with its data if it has any.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// Stored content.
    Data(RangeData),
    /// The layer below shows through.
    Inherit(ByteRange),
    /// Zeros.
    Zero(ByteRange),
    /// Known to be lost.
    Poison(ByteRange),
}

impl Content {
    pub(super) fn state(&self) -> BlockState {
        match self {
            Content::Data(_) => BlockState::Data,
            Content::Inherit(_) => BlockState::Inherit,
            Content::Zero(_) => BlockState::Zero,
            Content::Poison(_) => BlockState::Poison,
        }
    }

    /// Where it belongs.
    #[must_use]
    pub fn range(&self) -> ByteRange {
        match self {
            Content::Data(data) => data.range(),
            Content::Inherit(range) | Content::Zero(range) | Content::Poison(range) => *range,
        }
    }

    pub(super) fn data(&self) -> Option<&CheckedData> {
        match self {
            Content::Data(data) => Some(data.checked()),
            Content::Inherit(_) | Content::Zero(_) | Content::Poison(_) => None,
        }
    }

    fn parse(state: u32, range: ByteRange, data: Option<CheckedData>) -> Result<Self, WireError> {
        let range = whole_blocks(range)?;
        match (BlockState::parse(state)?, data) {
            (BlockState::Data, Some(data)) => Ok(Content::Data(RangeData::join(range, data))),
            (BlockState::Inherit, None) => Ok(Content::Inherit(range)),
            (BlockState::Zero, None) => Ok(Content::Zero(range)),
            (BlockState::Poison, None) => Ok(Content::Poison(range)),
            (BlockState::Data, None)
            | (BlockState::Inherit | BlockState::Zero | BlockState::Poison, Some(_)) => {
                Err(WireError::Field { name: "state", value: state.into() })
            }
        }
    }
}

/// A client's operation on its way to the replicas.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PrepareOp {
    /// Store these data.
    Write(RangeData),
    /// Forget the range.
    Discard(ByteRange),
    /// The range is zero from now on.
    WriteZeroes {
        /// Which bytes.
        range: ByteRange,
        /// Keep space for it.
        is_kept_allocated: bool,
    },
    /// The comparison held: store these data, and remember that it did.
    CompareAndWrite {
        /// Whose command.
        session: u64,
        /// Its command id in that session.
        session_command: u64,
        /// Results up to here may be forgotten.
        acked_upto: u64,
        /// What is written.
        data: RangeData,
    },
}

/// PREPARE.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prepare {
    /// Order and identity.
    pub peer: PeerContext,
    /// What to make durable.
    pub op: PrepareOp,
}

impl Prepare {
    pub(super) fn range(&self) -> ByteRange {
        match &self.op {
            PrepareOp::Write(data) | PrepareOp::CompareAndWrite { data, .. } => data.range(),
            PrepareOp::Discard(range) | PrepareOp::WriteZeroes { range, .. } => *range,
        }
    }

    pub(super) fn data(&self) -> Option<&CheckedData> {
        match &self.op {
            PrepareOp::Write(data) | PrepareOp::CompareAndWrite { data, .. } => {
                Some(data.checked())
            }
            PrepareOp::Discard(_) | PrepareOp::WriteZeroes { .. } => None,
        }
    }

    pub(super) fn to_raw(&self) -> raw::Prepare {
        let (op, options, once) = match &self.op {
            PrepareOp::Write(_) => (Opcode::Write, 0, (0, 0, 0)),
            PrepareOp::Discard(_) => (Opcode::Discard, 0, (0, 0, 0)),
            PrepareOp::WriteZeroes { is_kept_allocated, .. } => {
                let options = if *is_kept_allocated { OPTION_KEEP_ALLOCATED } else { 0 };
                (Opcode::WriteZeroes, options, (0, 0, 0))
            }
            PrepareOp::CompareAndWrite { session, session_command, acked_upto, .. } => {
                (Opcode::CompareAndWrite, 0, (*session, *session_command, *acked_upto))
            }
        };
        raw::Prepare {
            peer: self.peer.to_raw(),
            session: once.0.into(),
            session_command: once.1.into(),
            acked_upto: once.2.into(),
            op: u32::from(op as u8).into(),
            options: options.into(),
        }
    }

    pub(super) fn from_raw(
        raw: &raw::Prepare,
        range: ByteRange,
        data: Option<CheckedData>,
    ) -> Result<Prepare, WireError> {
        let range = whole_blocks(range)?;
        let field = |name, value: u64| WireError::Field { name, value };
        let (op, options) = (raw.op.get(), raw.options.get());
        let is_once = op == u32::from(Opcode::CompareAndWrite as u8);
        let once = (raw.session.get(), raw.session_command.get(), raw.acked_upto.get());
        if !is_once && once != (0, 0, 0) {
            return Err(field("session", once.0));
        }
        let is_zeroes = op == u32::from(Opcode::WriteZeroes as u8);
        if options > if is_zeroes { OPTION_KEEP_ALLOCATED } else { 0 } {
            return Err(field("options", options.into()));
        }
        let written = |data: Option<CheckedData>| {
            let data = data.ok_or(field("op", op.into()))?;
            Ok(RangeData::join(range, data))
        };
        let bare = |data: Option<CheckedData>| match data {
            None => Ok(range),
            Some(_) => Err(field("op", op.into())),
        };
        let op = match op {
            0x11 => PrepareOp::Write(written(data)?),
            0x13 => PrepareOp::Discard(bare(data)?),
            0x14 => PrepareOp::WriteZeroes { range: bare(data)?, is_kept_allocated: options != 0 },
            0x15 => PrepareOp::CompareAndWrite {
                session: once.0,
                session_command: once.1,
                acked_upto: once.2,
                data: written(data).and_then(inside_one_block)?,
            },
            other => return Err(field("op", other.into())),
        };
        Ok(Prepare { peer: PeerContext::from_raw(&raw.peer), op })
    }
}

/// Replicas exchange whole blocks: the primary has merged every fragment.
fn whole_blocks(range: ByteRange) -> Result<ByteRange, WireError> {
    let is_whole = |value: u64| value.is_multiple_of(BLOCK_BYTES as u64);
    match is_whole(range.offset()) && is_whole(range.length().into()) {
        true => Ok(range),
        false => Err(WireError::Misaligned { offset: range.offset(), length: range.length() }),
    }
}

/// COMPARE_AND_WRITE touches one block only.
pub(super) fn inside_one_block(data: RangeData) -> Result<RangeData, WireError> {
    let range = data.range();
    match range.start_in_block() + range.length() <= COMPARE_BYTES_MAX {
        true => Ok(data),
        false => Err(WireError::Range { offset: range.offset(), length: range.length() }),
    }
}

/// SETTLE: content that the new primary decided for a tail range.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settle {
    /// A new lsn of the new epoch.
    pub peer: PeerContext,
    /// The layer that holds it.
    pub layer_snap_seq: u64,
    /// What it is.
    pub content: Content,
}

impl Settle {
    pub(super) fn to_raw(&self) -> raw::Settle {
        raw::Settle {
            peer: self.peer.to_raw(),
            layer_snap_seq: self.layer_snap_seq.into(),
            state: (self.content.state() as u32).into(),
        }
    }

    pub(super) fn from_raw(
        raw: &raw::Settle,
        range: ByteRange,
        data: Option<CheckedData>,
    ) -> Result<Settle, WireError> {
        Ok(Settle {
            peer: PeerContext::from_raw(&raw.peer),
            layer_snap_seq: raw.layer_snap_seq.get(),
            content: Content::parse(raw.state.get(), range, data)?,
        })
    }
}

/// COPY: content of part of a region for a learner; `peer.lsn` is the region's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Copy {
    /// Order and identity.
    pub peer: PeerContext,
    /// The resync that it belongs to; another one must refuse.
    pub resync_id: u64,
    /// The layer that holds it.
    pub layer_snap_seq: u64,
    /// Whether the region is complete with it.
    pub is_last: bool,
    /// What it is.
    pub content: Content,
}

impl Copy {
    pub(super) fn to_raw(&self) -> raw::Copy {
        raw::Copy {
            peer: self.peer.to_raw(),
            resync_id: self.resync_id.into(),
            layer_snap_seq: self.layer_snap_seq.into(),
            state: (self.content.state() as u32).into(),
            options: if self.is_last { OPTION_LAST } else { 0 }.into(),
        }
    }

    pub(super) fn from_raw(
        raw: &raw::Copy,
        range: ByteRange,
        data: Option<CheckedData>,
    ) -> Result<Copy, WireError> {
        let options = raw.options.get();
        if options > OPTION_LAST {
            return Err(WireError::Field { name: "options", value: options.into() });
        }
        Ok(Copy {
            peer: PeerContext::from_raw(&raw.peer),
            resync_id: raw.resync_id.get(),
            layer_snap_seq: raw.layer_snap_seq.get(),
            is_last: options == OPTION_LAST,
            content: Content::parse(raw.state.get(), range, data)?,
        })
    }
}

/// DIGEST: the visible content of some regions of one layer, as XXH3-128.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Digest {
    /// `peer.lsn` is the applied lsn at which both sides compare.
    pub peer: PeerContext,
    /// The resync that it belongs to; 0 for a scrub.
    pub resync_id: u64,
    /// The layer that is looked at.
    pub layer_snap_seq: u64,
    /// First 1 MiB region.
    pub first_region: u32,
    /// How many, 1 to 65,536.
    pub region_count: u32,
}

impl Digest {
    pub(super) fn to_raw(&self) -> raw::Digest {
        raw::Digest {
            peer: self.peer.to_raw(),
            resync_id: self.resync_id.into(),
            layer_snap_seq: self.layer_snap_seq.into(),
            first_region: self.first_region.into(),
            region_count: self.region_count.into(),
        }
    }

    pub(super) fn from_raw(raw: &raw::Digest) -> Result<Digest, WireError> {
        let (first_region, region_count) = (raw.first_region.get(), raw.region_count.get());
        let is_shard = first_region.checked_add(region_count).is_some();
        if region_count == 0 || region_count > REGIONS_MAX || !is_shard {
            return Err(WireError::Field { name: "region_count", value: region_count.into() });
        }
        Ok(Digest {
            peer: PeerContext::from_raw(&raw.peer),
            resync_id: raw.resync_id.get(),
            layer_snap_seq: raw.layer_snap_seq.get(),
            first_region,
            region_count,
        })
    }
}

/// One step of a snapshot on one shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum SnapAction {
    /// Stop starting writes for this cut and drain.
    Hold = 1,
    /// Seal the top layer; `target_snap_seq` is the new one.
    Seal = 2,
    /// Give up the hold.
    Release = 3,
    /// Drop the sealed layer `target_snap_seq`.
    Delete = 4,
}

/// SNAP.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snap {
    /// Order and identity.
    pub peer: PeerContext,
    /// The cut across shards that it belongs to.
    pub cut_id: u64,
    /// The layer that the action names; 0 for hold and release.
    pub target_snap_seq: u64,
    /// What to do.
    pub action: SnapAction,
}

impl Snap {
    pub(super) fn to_raw(&self) -> raw::Snap {
        raw::Snap {
            peer: self.peer.to_raw(),
            cut_id: self.cut_id.into(),
            target_snap_seq: self.target_snap_seq.into(),
            action: (self.action as u32).into(),
        }
    }

    pub(super) fn from_raw(raw: &raw::Snap) -> Result<Snap, WireError> {
        let action = match raw.action.get() {
            1 => SnapAction::Hold,
            2 => SnapAction::Seal,
            3 => SnapAction::Release,
            4 => SnapAction::Delete,
            other => return Err(WireError::Field { name: "action", value: other.into() }),
        };
        Ok(Snap {
            peer: PeerContext::from_raw(&raw.peer),
            cut_id: raw.cut_id.get(),
            target_snap_seq: raw.target_snap_seq.get(),
            action,
        })
    }
}

/// ATTACH: whom to refuse from now on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttachOp {
    /// Refuse writers of every smaller attach epoch.
    Advance {
        /// The new one.
        attach_epoch: u64,
    },
    /// Refuse one session of one client for a time.
    Block {
        /// Client id.
        client: u64,
        /// Session id.
        session: u64,
        /// Seconds since 1970 (UTC).
        until: u64,
    },
}

impl AttachOp {
    pub(super) fn to_raw(self, peer: PeerContext) -> raw::Attach {
        let (attach_epoch, client, session, until, action) = match self {
            AttachOp::Advance { attach_epoch } => (attach_epoch, 0, 0, 0, 1),
            AttachOp::Block { client, session, until } => (0, client, session, until, 2),
        };
        raw::Attach {
            peer: peer.to_raw(),
            attach_epoch: attach_epoch.into(),
            client: client.into(),
            session: session.into(),
            until: until.into(),
            action: action.into(),
        }
    }

    pub(super) fn from_raw(raw: &raw::Attach) -> Result<AttachOp, WireError> {
        let (client, session, until) = (raw.client.get(), raw.session.get(), raw.until.get());
        match (raw.action.get(), raw.attach_epoch.get()) {
            (1, attach_epoch) if (client, session, until) == (0, 0, 0) => {
                Ok(AttachOp::Advance { attach_epoch })
            }
            (2, 0) => Ok(AttachOp::Block { client, session, until }),
            (action, _) => Err(WireError::Field { name: "action", value: action.into() }),
        }
    }
}

/// A replica's answer; the seq of its lsn is in the reply's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ack {
    /// The replica's own incarnation.
    pub incarnation: u64,
    /// The history that it belongs to.
    pub history_id: u64,
    /// Epoch of the lsn that is acknowledged.
    pub lsn_epoch: Epoch,
    /// COPY and DIGEST: the resync answered; else 0.
    pub resync_id: u64,
    /// 64 KiB slots that the replica's lane has for new data: what may be sent to it before it is
    /// refused.
    pub credit: u64,
}

impl Ack {
    pub(super) fn to_raw(self) -> raw::Ack {
        raw::Ack {
            incarnation: self.incarnation.into(),
            history_id: self.history_id.into(),
            lsn_epoch: self.lsn_epoch.0.into(),
            resync_id: self.resync_id.into(),
            credit: self.credit.into(),
        }
    }

    pub(super) fn from_raw(raw: &raw::Ack) -> Ack {
        Ack {
            incarnation: raw.incarnation.get(),
            history_id: raw.history_id.get(),
            lsn_epoch: Epoch(raw.lsn_epoch.get()),
            resync_id: raw.resync_id.get(),
            credit: raw.credit.get(),
        }
    }
}

/// What a record of a tail did to its range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum TailOp {
    /// A write, also one of COMPARE_AND_WRITE.
    Write = 0x11,
    /// A discard.
    Discard = 0x13,
    /// Zeros.
    WriteZeroes = 0x14,
    /// An earlier, unfinished SETTLE.
    Settle = 0x21,
}

/// One record above the commit watermark.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TailRecord {
    /// Its place in the order.
    pub lsn: Lsn,
    /// What it touched.
    pub range: ByteRange,
    /// The layer that holds it.
    pub snap_seq: u64,
    /// What it did.
    pub op: TailOp,
    /// What the range is now, here.
    pub state: BlockState,
}

impl TailRecord {
    pub(super) fn to_raw(self) -> raw::TailRecord {
        raw::TailRecord {
            epoch: self.lsn.epoch.0.into(),
            seq: self.lsn.seq.0.into(),
            offset: self.range.offset().into(),
            snap_seq: self.snap_seq.into(),
            length: self.range.length().into(),
            op: (self.op as u32).into(),
            state: (self.state as u32).into(),
        }
    }

    pub(super) fn from_raw(raw: &raw::TailRecord) -> Result<TailRecord, WireError> {
        let op = match raw.op.get() {
            0x11 => TailOp::Write,
            0x13 => TailOp::Discard,
            0x14 => TailOp::WriteZeroes,
            0x21 => TailOp::Settle,
            other => return Err(WireError::Field { name: "op", value: other.into() }),
        };
        Ok(TailRecord {
            lsn: Lsn { epoch: Epoch(raw.epoch.get()), seq: Seq(raw.seq.get()) },
            range: ByteRange::new(raw.offset.get(), raw.length.get())?,
            snap_seq: raw.snap_seq.get(),
            op,
            state: BlockState::parse(raw.state.get())?,
        })
    }
}

/// The remembered result of an exactly-once command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ResultRecord {
    /// Whose.
    pub session: u64,
    /// Which.
    pub session_command: u64,
    /// When.
    pub lsn: Lsn,
    /// What it answered.
    pub outcome: super::CompareOutcome,
}

/// Answer to TAILS.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tails {
    /// Who answers.
    pub ack: Ack,
    /// The highest commit_lsn that it received while in the ISR.
    pub complete_lsn: Lsn,
    /// Its top layer.
    pub snap_seq: u64,
    /// Records above the commit watermark, by lsn.
    pub records: Vec<TailRecord>,
    /// Results to hand over.
    pub results: Vec<ResultRecord>,
}
