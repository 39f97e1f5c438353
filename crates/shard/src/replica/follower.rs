//! A replica that follows: what a secondary or learner accepts from its primary.
//!
//! An operation is applied to a block only if its lsn is above the newest one applied there; a
//! duplicate is acknowledged again only if it is the same operation and durable (section 3). As
//! there is at most one uncommitted write per block, an operation that finds a newer one in its
//! place was committed long ago, and nobody waits for it.

use super::{Asked, Ctx, Mutant, Note, Replica, Role, Work};
use crate::client::status_of;
use crate::conf::StoreId;
use crate::replica::Effect;
use lane::record::{FLAG_COPY, RangeKind};
use lane::{Op, Outcome, POISON_CRC, Problem, REGION_BLOCKS};
use proto::disk::BufList;
use proto::wire::{
    BlockState, ByteRange, CheckedData, Content, Copy, Digest, Opcode, PeerContext, PrepareOp,
    ReplyOp, RequestOp, TailOp, TailRecord, Tails,
};
use proto::{BLOCK_BYTES, Epoch, Lsn, Seq, Status, checksum};
use smallvec::SmallVec;
use std::collections::BTreeMap;

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Records of one TAILS answer; beyond that the whole shard stands for them.
const TAIL_RECORDS_MAX: usize = 10_000;

/// An operation on whole blocks.
#[derive(Clone, Debug)]
pub(super) enum Body {
    Write {
        first: u32,
        crcs: SmallVec<[u32; 4]>,
        data: BufList,
    },
    Discard {
        first: u32,
        count: u32,
    },
    /// Nobody has the content: an error until it is overwritten, never guessed data.
    Poison {
        first: u32,
        count: u32,
    },
}

impl Body {
    pub(super) fn range(&self) -> (u32, u32) {
        match self {
            Body::Write { first, crcs, .. } => (*first, crcs.len() as u32),
            Body::Discard { first, count } | Body::Poison { first, count } => (*first, *count),
        }
    }

    /// As a request to the lane; `solo` when no other replica could repair a torn overwrite.
    pub(super) fn into_op(
        self,
        shard_ix: u32,
        (lsn, commit): (Lsn, Seq),
        flags: u8,
        solo: bool,
    ) -> Op {
        match self {
            Body::Write { first, crcs, data } => {
                // No space was granted in advance for the copy of a region.
                let is_granted = flags & FLAG_COPY == 0;
                Op::Write { shard_ix, lsn, commit, first, crcs, data, flags, solo, is_granted }
            }
            Body::Discard { first, count } => {
                let kind = RangeKind::Inherit;
                Op::Range { shard_ix, lsn, commit, first, count, kind, flags }
            }
            Body::Poison { first, count } => {
                let kind = RangeKind::Poison;
                Op::Range { shard_ix, lsn, commit, first, count, kind, flags }
            }
        }
    }

    fn of_content(content: Content) -> Body {
        match content {
            Content::Data(data) => {
                let (range, crcs, data) = data.into_parts();
                Body::Write { first: blocks_of(range).0, crcs, data }
            }
            Content::Inherit(range) | Content::Zero(range) => {
                let (first, count) = blocks_of(range);
                Body::Discard { first, count }
            }
            Content::Poison(range) => {
                let (first, count) = blocks_of(range);
                Body::Poison { first, count }
            }
        }
    }

    fn of_prepare(op: PrepareOp) -> Body {
        match op {
            PrepareOp::Write(data) | PrepareOp::CompareAndWrite { data, .. } => {
                let (range, crcs, data) = data.into_parts();
                Body::Write { first: blocks_of(range).0, crcs, data }
            }
            PrepareOp::Discard(range) | PrepareOp::WriteZeroes { range, .. } => {
                let (first, count) = blocks_of(range);
                Body::Discard { first, count }
            }
        }
    }
}

/// First block and number of blocks of a range of whole blocks.
pub(super) fn blocks_of(range: ByteRange) -> (u32, u32) {
    ((range.offset() / BLOCK) as u32, (u64::from(range.length()) / BLOCK) as u32)
}

/// Regions that some blocks lie in.
pub(super) fn regions_of(first: u32, count: u32) -> std::ops::Range<u32> {
    first / REGION_BLOCKS..(first + count).div_ceil(REGION_BLOCKS)
}

/// An operation above the watermark that this life has accepted.
struct Accepted {
    first: u32,
    count: u32,
    crcs: SmallVec<[u32; 4]>,
    is_durable: bool,
    /// Who gets the acknowledgement.
    waiting: SmallVec<[Asked; 1]>,
}

impl Accepted {
    fn overlaps(&self, first: u32, count: u32) -> bool {
        self.first < first + count && first < self.first + self.count
    }
}

/// What a learner knows of the content that it is being given.
#[derive(Default)]
struct Learning {
    /// Newest resync heard of; older ones are over.
    resync_id: u64,
    /// Highest seq of a live write accepted, per region.
    live: BTreeMap<u32, Seq>,
    /// Seq of the last COPY accepted, per region.
    copied: BTreeMap<u32, Seq>,
}

/// State of a replica that follows.
pub(super) struct Follower {
    /// Everything up to here is committed, as last heard.
    pub(super) commit: Seq,
    accepted: BTreeMap<Lsn, Accepted>,
    learning: Learning,
}

impl Follower {
    pub(super) fn new(commit: Seq) -> Follower {
        Follower { commit, accepted: BTreeMap::new(), learning: Learning::default() }
    }

    pub(super) fn begin_learning(&mut self) {
        self.learning = Learning::default();
    }

    fn commit_to(&mut self, commit: Seq) {
        self.commit = self.commit.max(commit);
        let commit = self.commit;
        self.accepted.retain(|lsn, accepted| lsn.seq > commit || !accepted.is_durable);
    }
}

impl Replica {
    /// Carry out what the primary of this epoch asks.
    pub(super) fn follow(&mut self, ctx: &mut Ctx<'_, '_>, asked: Asked, op: RequestOp) {
        match op {
            RequestOp::Prepare(prepare) => {
                let prepare = *prepare;
                self.accept(ctx, asked, prepare.peer, Body::of_prepare(prepare.op));
            }
            RequestOp::Settle(settle) => {
                let settle = *settle;
                self.accept(ctx, asked, settle.peer, Body::of_content(settle.content));
            }
            RequestOp::Tails(peer) => {
                self.follower.commit_to(peer.commit_lsn.seq);
                self.tails(ctx, asked);
            }
            RequestOp::Copy(copy) => self.copy(ctx, asked, *copy),
            RequestOp::Digest(digest) => self.digest(ctx, asked, &digest),
            RequestOp::Hello(_)
            | RequestOp::FencePath { .. }
            | RequestOp::Ping(_)
            | RequestOp::Read { .. }
            | RequestOp::Write(_)
            | RequestOp::Flush
            | RequestOp::Discard(_)
            | RequestOp::WriteZeroes { .. }
            | RequestOp::CompareAndWrite { .. }
            | RequestOp::Snap(_)
            | RequestOp::Attach(..)
            | RequestOp::NeedConf(_) => unreachable!("has no context of a replica"),
        }
    }

    fn fits(&self, (first, count): (u32, u32)) -> bool {
        count > 0 && first.checked_add(count).is_some_and(|end| end <= self.blocks)
    }

    /// PREPARE and SETTLE.
    fn accept(&mut self, ctx: &mut Ctx<'_, '_>, asked: Asked, peer: PeerContext, body: Body) {
        self.follower.commit_to(peer.commit_lsn.seq);
        let (lsn, (first, count)) = (peer.lsn, body.range());
        if !self.fits((first, count)) {
            return self.answer(ctx, asked, lsn.seq, Err(Status::OutOfRange));
        }
        let crcs = match &body {
            Body::Write { crcs, .. } => crcs.clone(),
            Body::Discard { .. } | Body::Poison { .. } => SmallVec::new(),
        };
        let early = self.mutant(Mutant::AckDuplicateEarly);
        if let Some(same) = self.follower.accepted.get_mut(&lsn) {
            if (same.first, same.count, &same.crcs) != (first, count, &crcs) {
                return self.answer(ctx, asked, lsn.seq, Err(Status::Invalid));
            }
            if same.is_durable || early {
                let op = self.prepare_reply(asked, lsn);
                return self.answer(ctx, asked, lsn.seq, Ok(op));
            }
            same.waiting.push(asked);
            return;
        }
        if !self.is_new(lsn, first, count) && !self.mutant(Mutant::PrepareUnorderedAtLearner) {
            return self.answer(ctx, asked, lsn.seq, Err(Status::Cancelled));
        }
        if self.role == Role::Learner {
            for region in regions_of(first, count) {
                let live = self.follower.learning.live.entry(region).or_default();
                *live = lsn.seq.max(*live);
            }
        }
        let waiting = SmallVec::from_elem(asked, 1);
        let accepted = Accepted { first, count, crcs, is_durable: false, waiting };
        self.follower.accepted.insert(lsn, accepted);
        let request = body.into_op(self.options.shard_ix, (lsn, self.follower.commit), 0, false);
        self.lane(ctx, Work::Prepare(lsn), request);
    }

    /// Whether an operation is newer than everything that is known to have touched its blocks.
    fn is_new(&self, lsn: Lsn, first: u32, count: u32) -> bool {
        let Follower { commit, accepted, learning } = &self.follower;
        let after = accepted.range((std::ops::Bound::Excluded(lsn), std::ops::Bound::Unbounded));
        lsn.seq > *commit
            && !after.into_iter().any(|(_, newer)| newer.overlaps(first, count))
            && regions_of(first, count)
                .all(|region| learning.copied.get(&region).is_none_or(|&copied| lsn.seq > copied))
    }

    fn prepare_reply(&self, asked: Asked, lsn: Lsn) -> ReplyOp {
        let ack = self.ack(lsn, 0);
        if asked.opcode == Opcode::Settle { ReplyOp::Settle(ack) } else { ReplyOp::Prepare(ack) }
    }

    /// The lane has made an operation durable, or could not.
    pub(super) fn prepared(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        lsn: Lsn,
        result: Result<Outcome, Problem>,
    ) {
        // A follower that has gone OUT meanwhile has forgotten the operation, and the primary that
        // waits was told so by the newer epoch.
        let Some(accepted) = self.follower.accepted.get_mut(&lsn) else { return };
        let waiting = std::mem::take(&mut accepted.waiting);
        let status = match result {
            Ok(_) => {
                accepted.is_durable = true;
                ctx.out.push(Effect::Note(Note::Durable { lsn }));
                None
            }
            Err(problem) => {
                self.follower.accepted.remove(&lsn);
                Some(status_of(&problem))
            }
        };
        for asked in waiting {
            // "Acknowledgements that become ready after (1) are dropped."
            let result = if asked.epoch < self.promised && !self.mutant(Mutant::NoQuiesceAtPromise)
            {
                Err(Status::StaleEpoch)
            } else {
                status.map_or_else(|| Ok(self.prepare_reply(asked, lsn)), Err)
            };
            self.answer(ctx, asked, lsn.seq, result);
        }
    }

    // ---------------------------------------------------------------------------------- tails --

    /// Answer TAILS: a secondary with the records above the watermark, a learner with the regions
    /// that it cannot vouch for.
    fn tails(&mut self, ctx: &mut Ctx<'_, '_>, asked: Asked) {
        let complete = self.complete(ctx.view);
        let mut records = match self.role {
            Role::Learner => self.doubtful_regions(ctx, complete),
            Role::Out
            | Role::Secondary
            | Role::Settling
            | Role::Active
            | Role::Suspended
            | Role::Leaving
            | Role::Fenced => self.tail_records(ctx),
        };
        if records.len() > TAIL_RECORDS_MAX {
            records = self.whole_shard();
        }
        let reply = Tails {
            ack: self.ack(Lsn::default(), 0),
            complete_lsn: Lsn { epoch: Epoch(0), seq: complete },
            snap_seq: 0,
            records,
            results: Vec::new(),
        };
        self.answer(ctx, asked, Seq(0), Ok(ReplyOp::Tails(Box::new(reply))));
    }

    /// Own records above the watermark, as ranges.
    pub(super) fn tail_records(&self, ctx: &Ctx<'_, '_>) -> Vec<TailRecord> {
        let shard = ctx.view.tables.shard(self.options.shard_ix).expect("the lane holds it");
        let mut records = Vec::new();
        for record in shard.tail.values().flatten() {
            let (first, count) = match &record.body {
                lane::record::Body::Intent(part) | lane::record::Body::Redo(part) => {
                    (part.extent * lane::EXTENT_BLOCKS + part.first, part.count())
                }
                lane::record::Body::Range { first, count, .. } => (*first, *count),
                lane::record::Body::Resolve(_)
                | lane::record::Body::Conf(_)
                | lane::record::Body::Commit
                | lane::record::Body::Region { .. }
                | lane::record::Body::Shard(_)
                | lane::record::Body::BadSlot { .. }
                | lane::record::Body::Mount { .. }
                | lane::record::Body::Seal
                | lane::record::Body::Pad => continue,
            };
            records.extend(tail_record(record.lsn, first, count));
        }
        records
    }

    fn doubtful_regions(&self, ctx: &Ctx<'_, '_>, complete: Seq) -> Vec<TailRecord> {
        let shard = ctx.view.tables.shard(self.options.shard_ix).expect("the lane holds it");
        let mut records: Vec<TailRecord> = Vec::new();
        for (region, &value) in shard.regions.iter().enumerate() {
            if value >> 1 <= complete.0 && value & 1 == 0 {
                continue;
            }
            let first = region as u32 * REGION_BLOCKS;
            let count = REGION_BLOCKS.min(shard.blocks - first);
            let lsn = Lsn { epoch: Epoch(0), seq: Seq(value >> 1) };
            records.extend(tail_record(lsn, first, count));
        }
        records
    }

    fn whole_shard(&self) -> Vec<TailRecord> {
        // One record holds less than 4 GiB.
        const PIECE: u32 = 1 << 18;
        let firsts = (0..self.blocks).step_by(PIECE as usize);
        firsts
            .flat_map(|first| tail_record(Lsn::default(), first, PIECE.min(self.blocks - first)))
            .collect()
    }

    // --------------------------------------------------------------------------------- resync --

    fn copy(&mut self, ctx: &mut Ctx<'_, '_>, asked: Asked, copy: Copy) {
        self.follower.commit_to(copy.peer.commit_lsn.seq);
        let lsn = copy.peer.lsn;
        let (first, count) = blocks_of(copy.content.range());
        let refusal = if self.role != Role::Learner {
            Some(Status::NotPrimary)
        } else if !self.fits((first, count)) {
            Some(Status::OutOfRange)
        } else {
            self.refuse_copy(copy.resync_id, lsn.seq, regions_of(first, count))
        };
        if let Some(status) = refusal {
            return self.answer(ctx, asked, lsn.seq, Err(status));
        }
        for region in regions_of(first, count) {
            self.follower.learning.copied.insert(region, lsn.seq);
        }
        let work = Work::Copy { asked, lsn, resync_id: copy.resync_id };
        let body = Body::of_content(copy.content);
        let request =
            body.into_op(self.options.shard_ix, (lsn, self.follower.commit), FLAG_COPY, false);
        self.lane(ctx, work, request);
    }

    /// A COPY that something newer has overtaken must not replace it.
    fn refuse_copy(
        &mut self,
        resync_id: u64,
        seq: Seq,
        mut regions: std::ops::Range<u32>,
    ) -> Option<Status> {
        let is_mutant = self.mutant(Mutant::DelayedCopy);
        let learning = &mut self.follower.learning;
        if resync_id < learning.resync_id && !is_mutant {
            return Some(Status::Cancelled);
        }
        learning.resync_id = learning.resync_id.max(resync_id);
        let is_overtaken = regions.any(|region| {
            let newer = |map: &BTreeMap<u32, Seq>| map.get(&region).is_some_and(|&at| at > seq);
            newer(&learning.live) || newer(&learning.copied)
        });
        (is_overtaken && !is_mutant).then_some(Status::Busy)
    }

    pub(super) fn copy_done(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        asked: Asked,
        (lsn, resync_id): (Lsn, u64),
        result: Result<Outcome, Problem>,
    ) {
        let result = match result {
            _ if asked.epoch < self.promised => Err(Status::StaleEpoch),
            Ok(_) => Ok(ReplyOp::Copy(self.ack(lsn, resync_id))),
            Err(problem) => Err(status_of(&problem)),
        };
        self.answer(ctx, asked, lsn.seq, result);
    }

    fn digest(&mut self, ctx: &mut Ctx<'_, '_>, asked: Asked, digest: &Digest) {
        let first = digest.first_region.saturating_mul(REGION_BLOCKS);
        if digest.region_count != 1 || first >= self.blocks {
            // The primary of this version compares one region at a time.
            return self.answer(ctx, asked, Seq(0), Err(Status::Unsupported));
        }
        let count = REGION_BLOCKS.min(self.blocks - first);
        let work = Work::DigestFor { asked, lsn: digest.peer.lsn, resync_id: digest.resync_id };
        let shard_ix = self.options.shard_ix;
        self.lane(ctx, work, Op::Read { shard_ix, first, count, with_poison: true });
    }

    pub(super) fn digest_for(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        asked: Asked,
        (lsn, resync_id): (Lsn, u64),
        result: Result<Outcome, Problem>,
    ) {
        let result = match result {
            _ if asked.epoch < self.promised => Err(Status::StaleEpoch),
            Ok(outcome) => {
                let digest = digest_of(&outcome);
                Ok(ReplyOp::Digest(self.ack(lsn, resync_id), vec![digest]))
            }
            Err(problem) => Err(status_of(&problem)),
        };
        self.answer(ctx, asked, lsn.seq, result);
    }

    /// The primary cannot read a block of its own and asks for this replica's.
    pub(super) fn read_for(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        from: StoreId,
        asked: Asked,
        range: ByteRange,
    ) {
        let conf = self.stored.conf.as_ref().expect("its epoch is known");
        let is_asked = self.role == Role::Secondary && conf.primary_member().store == from;
        let (first, count) = blocks_of(range);
        if !is_asked {
            return self.answer(ctx, asked, Seq(0), Err(Status::NotPrimary));
        }
        if !self.fits((first, count)) || count > lane::lane::REQUEST_BLOCKS_MAX {
            return self.answer(ctx, asked, Seq(0), Err(Status::OutOfRange));
        }
        let shard_ix = self.options.shard_ix;
        let request = Op::Read { shard_ix, first, count, with_poison: false };
        self.lane(ctx, Work::ReadFor { asked }, request);
    }

    pub(super) fn read_for_done(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        asked: Asked,
        result: Result<Outcome, Problem>,
    ) {
        let result = match result {
            _ if asked.epoch < self.promised => Err(Status::StaleEpoch),
            Ok(Outcome::Read { data, crcs }) => {
                Ok(ReplyOp::Read(CheckedData::assume(0, crcs, data)))
            }
            Ok(Outcome::Done | Outcome::Created { .. }) => unreachable!("a read brings data"),
            Err(problem) => Err(status_of(&problem)),
        };
        self.answer(ctx, asked, Seq(0), result);
    }
}

/// Digest of what a read of the lane has brought.
pub(super) fn digest_of(outcome: &Outcome) -> u128 {
    match outcome {
        Outcome::Read { data, crcs } => {
            let is_poison = |&(_, &crc): &(u32, &u32)| crc == POISON_CRC;
            let poisoned: Vec<u32> = (0..).zip(crcs).filter(is_poison).map(|(at, _)| at).collect();
            checksum::content_digest(data.iter().map(|buf| &buf[..]), &poisoned)
        }
        Outcome::Done | Outcome::Created { .. } => unreachable!("a read brings data"),
    }
}

/// A range as a record of TAILS; what the blocks are now, the new primary sees for itself.
fn tail_record(lsn: Lsn, first: u32, count: u32) -> Option<TailRecord> {
    let length = u32::try_from(u64::from(count) * BLOCK).ok()?;
    let range = ByteRange::new(u64::from(first) * BLOCK, length).ok()?;
    let (op, state) = (TailOp::Write, BlockState::Data);
    Some(TailRecord { lsn, range, snap_seq: 0, op, state })
}
