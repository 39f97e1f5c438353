//! The primary's order: lsns, replication, commitment.
//!
//! An operation gets its lsn, goes to the own lane and in parallel to every replica that is
//! `required` (the ISR, and the one whose admission is pending) and to the learners, and is
//! committed when all of `required` have it durable and the ISR is not below min_write (section 3).
//! One reign lasts as long as configurations keep naming this life primary; lsns carry the epoch in
//! which it began, so that an acknowledgement of another reign cannot be taken for one of this.

use super::follower::{Body, regions_of};
use super::repair::is_media;
use super::resync::Resync;
use super::serve::Clients;
use super::settle::Settling;
use super::transfer::Leaving;
use super::verify::Verify;
use super::{
    Command, Ctx, Effect, Kind, Mutant, Note, REPEAT_MS, RESEND_MS, Replica, Role, SILENT_MS, Work,
};
use crate::client::status_of;
use crate::conf::transition::Transition;
use crate::conf::{Incarnation, Member, StoreId};
use lane::{Outcome, Problem};
use proto::wire::{
    ByteRange, CheckedData, Content, Prepare, PrepareOp, RangeData, ReplyOp, RequestOp, Settle,
};
use proto::{BLOCK_BYTES, Epoch, Lsn, Seq, Status, Tick};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet};

/// Operations without commitment.
const OPEN_MAX: usize = 256;
/// "highest lsn - commit_lsn <= 1,024, else no new lsn" (section 1).
const SEQ_WINDOW: u64 = 1_024;
const BLOCK: u64 = BLOCK_BYTES as u64;
/// Times that no member could read a block before the block is given up; RESEND_MS lie between.
const READ_TRIES: u32 = 20;

/// Who waits for an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Owner {
    /// A client's task.
    Task(u32),
    /// A task that writes a damaged block again. It changes nothing that a client could see, so it
    /// goes on below min_write too: a new copy may wait for the block, and min_write for that copy.
    Heal(u32),
    /// The beginning of the reign.
    Settling,
}

#[derive(PartialEq, Eq, Debug)]
enum Local {
    Running,
    Durable,
    Failed(Status),
}

/// An operation that is not committed.
pub(super) struct Open {
    lsn: Lsn,
    body: Body,
    owner: Owner,
    local: Local,
    /// The lane was told that nobody else has it.
    is_solo: bool,
    /// Lives of stores that have it durable.
    acked: SmallVec<[(StoreId, Incarnation); 4]>,
    began: Tick,
    sent: Tick,
}

impl Open {
    /// Whether it lies in a region.
    fn touches(&self, region: u32) -> bool {
        let (first, count) = self.body.range();
        regions_of(first, count).contains(&region)
    }
}

/// Slots that a store's lane has for new data, as last heard.
struct Credit {
    slots: u64,
    /// When it was said, or asked for last.
    asked: Tick,
    /// It was asked for and has not been said yet.
    is_asked: bool,
}

/// Whether there is room for an operation.
pub(super) enum Room {
    Enough,
    /// A member said a while ago that it has none, and is asked again.
    Asked,
    Lacking,
}

/// Whether the reign serves yet.
pub(super) enum Phase {
    Settling(Settling),
    Active,
}

/// All that a replica is as primary.
pub(super) struct Reign {
    /// In which it began.
    pub(super) epoch: Epoch,
    pub(super) phase: Phase,
    /// Was refused: no lsn, no acknowledgement, no read, until a newer configuration comes.
    pub(super) is_suspended: bool,
    pub(super) next_seq: u64,
    /// Everything up to here is committed.
    pub(super) commit: Seq,
    pub(super) open: BTreeMap<Seq, Open>,
    pub(super) clients: Clients,
    /// Regions in which no new lsn is given, with the number of those who want it so.
    holds: BTreeMap<u32, u32>,
    pub(super) resyncs: BTreeMap<StoreId, Resync>,
    /// The learner that counts as required.
    pub(super) pending_admit: Option<StoreId>,
    /// A verification under way.
    pub(super) verify: Option<Verify>,
    /// It is being given away.
    pub(super) leaving: Option<Leaving>,
    /// Members that have reported an error of their own.
    pub(super) failed: BTreeSet<StoreId>,
    /// What other stores' lanes had for new data when they last said so.
    credits: BTreeMap<StoreId, Credit>,
    /// Times that nobody could read a block.
    unreadable: BTreeMap<u32, u32>,
    pub(super) began: Tick,
}

impl Reign {
    pub(super) fn new(epoch: Epoch, now: Tick, commit: Seq, settling: Settling) -> Reign {
        Reign {
            epoch,
            phase: Phase::Settling(settling),
            is_suspended: false,
            next_seq: 0,
            commit,
            open: BTreeMap::new(),
            clients: Clients::default(),
            holds: BTreeMap::new(),
            resyncs: BTreeMap::new(),
            pending_admit: None,
            verify: None,
            leaving: None,
            failed: BTreeSet::new(),
            credits: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            began: now,
        }
    }

    pub(super) fn commit_lsn(&self) -> Lsn {
        Lsn { epoch: self.epoch, seq: self.commit }
    }

    fn advance_commit(&mut self) {
        // While the reign settles, the last reign's watermark stands: a member that cuts its tail
        // before *every* block in doubt is settled would forget that the other blocks are in doubt.
        if matches!(self.phase, Phase::Settling(_)) {
            return;
        }
        let upto = self.open.first_key_value().map_or(self.next_seq, |(seq, _)| seq.0);
        self.commit = self.commit.max(Seq(upto - 1));
    }

    /// Give no new lsn in a region.
    pub(super) fn hold(&mut self, region: u32) {
        *self.holds.entry(region).or_default() += 1;
    }

    fn unhold(&mut self, region: u32) {
        let count = self.holds.get_mut(&region).expect("held before");
        *count -= 1;
        if *count == 0 {
            self.holds.remove(&region);
        }
    }

    /// Whether everything uncommitted in a region is durable here and at `store`.
    pub(super) fn is_covered(&self, region: u32, life: (StoreId, Incarnation)) -> bool {
        self.open
            .values()
            .filter(|open| open.touches(region))
            .all(|open| open.local == Local::Durable && open.acked.contains(&life))
    }

    /// Whether nothing uncommitted is in a region.
    pub(super) fn is_quiet(&self, region: u32) -> bool {
        !self.open.values().any(|open| open.touches(region))
    }

    /// Nobody could read a block, this time; whether it is lost for good. A device's error may
    /// pass, here or at a member; a block that is damaged here and has no other in-sync copy is
    /// lost.
    pub(super) fn is_lost(&mut self, block: u32, problem: &Problem, is_alone: bool) -> bool {
        let tries = self.unreadable.entry(block).or_default();
        *tries += 1;
        let is_damaged = matches!(problem, Problem::BadChecksum { .. } | Problem::Poisoned { .. });
        let is_lost = *tries >= READ_TRIES || (is_damaged && is_alone);
        if is_lost {
            self.unreadable.remove(&block);
        }
        is_lost
    }

    pub(super) fn is_serving(&self) -> bool {
        let is_released = self.leaving.as_ref().is_some_and(Leaving::is_released);
        matches!(self.phase, Phase::Active) && !self.is_suspended && !is_released
    }

    /// The first block that waits to be mended and that no operation under way replaces.
    pub(super) fn next_to_heal(&self) -> Option<u32> {
        let is_open = |block: u32| {
            self.open.values().any(|open| {
                let (first, count) = open.body.range();
                (first..first + count).contains(&block)
            })
        };
        self.clients.repairs.wanted().find(|&block| !is_open(block))
    }

    /// Whether requests may begin: those under way go on while the reign is being given away.
    pub(super) fn takes_requests(&self) -> bool {
        self.is_serving() && self.leaving.is_none()
    }
}

impl Replica {
    /// Stores that must have an operation, and promise the lease, beside this one.
    pub(super) fn required(&self, with_admit: bool) -> SmallVec<[(StoreId, Incarnation); 4]> {
        let conf = self.stored.conf.as_ref().expect("a primary has a configuration");
        let admit = self.reign.as_ref().and_then(|reign| reign.pending_admit);
        let admit = admit.filter(|_| with_admit);
        let is_required =
            |member: &&Member| conf.isr.contains(&member.copy) || admit == Some(member.store);
        let others = conf.members.iter().filter(is_required);
        others
            .filter(|member| member.store != self.options.store)
            .map(|member| (member.store, member.incarnation))
            .collect()
    }

    /// Stores that operations are sent to: the required ones and every learner.
    fn receivers(&self) -> SmallVec<[(StoreId, Incarnation); 4]> {
        let conf = self.stored.conf.as_ref().expect("a primary has a configuration");
        let takes_part = |member: &&Member| {
            conf.isr.contains(&member.copy) || conf.learners.contains(&member.copy)
        };
        let others = conf.members.iter().filter(takes_part);
        others
            .filter(|member| member.store != self.options.store)
            .map(|member| (member.store, member.incarnation))
            .collect()
    }

    /// Whether a write could need more space than a required member has: a disk that is full must
    /// be an answer to the client, not the failure of a replica. Grants are not counted one by one;
    /// what is under way beyond the last report may use each lane's reserve.
    ///
    /// A member that lacks room never says by itself that it has some again, because nothing is
    /// sent to it. So a report that is `REPEAT_MS` old is no reason to refuse: the member is asked,
    /// and its answer, or its removal, decides.
    pub(super) fn room_for(&mut self, ctx: &mut Ctx<'_, '_>, body: &Body) -> Room {
        let Body::Write { first, crcs, .. } = body else { return Room::Enough };
        let (tables, shard_ix) = (ctx.view.tables, self.options.shard_ix);
        let needed = tables.slots_needed(shard_ix, *first, crcs.len() as u32);
        if needed == 0 || self.mutant(Mutant::CreditIgnored) {
            return Room::Enough;
        }
        let mut room = if ctx.view.free_slots < needed { Room::Lacking } else { Room::Enough };
        for to in self.required(true) {
            let Some(credit) = self.reign().credits.get_mut(&to.0) else { continue };
            if credit.slots >= u64::from(needed) {
                continue;
            }
            let is_due = ctx.now >= credit.asked.after_millis(REPEAT_MS);
            if is_due {
                (credit.asked, credit.is_asked) = (ctx.now, true);
            }
            if !credit.is_asked {
                room = Room::Lacking;
            } else if matches!(room, Room::Enough) {
                room = Room::Asked;
            }
            if is_due {
                self.ask_tails_of(ctx, to);
            }
        }
        room
    }

    /// Ask for the leases that reads need, from now on.
    pub(super) fn claim(&mut self, ctx: &mut Ctx<'_, '_>) {
        let stores = self.required(true).to_vec();
        let (reign, epoch) = (self.reign().epoch, self.epoch());
        ctx.out.push(Effect::Claim { reign, epoch, stores });
    }

    pub(super) fn reign(&mut self) -> &mut Reign {
        self.reign.as_mut().expect("a primary reigns")
    }

    /// Whether the ISR is large enough for clients' writes.
    pub(super) fn has_min_write(&self) -> bool {
        self.stored.conf.as_ref().is_some_and(|conf| conf.isr.len() >= usize::from(conf.min_write))
    }

    /// Whether no other replica is in the ISR.
    fn is_alone(&self) -> bool {
        self.stored.conf.as_ref().is_some_and(|conf| conf.isr.len() == 1)
    }

    // ----------------------------------------------------------------------------- operations --

    /// Give an operation its lsn and send it on its way; give it back when it has to wait.
    pub(super) fn assign(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        owner: Owner,
        body: Body,
    ) -> Result<Seq, Body> {
        let (first, count) = body.range();
        let has_min_write = self.has_min_write();
        let no_hold = self.mutant(Mutant::NoRegionLock);
        let shard_ix = self.options.shard_ix;
        let is_solo = self.is_alone();
        let reign = self.reign();
        let (is_client, is_settle) = (matches!(owner, Owner::Task(_)), owner == Owner::Settling);
        let is_held =
            !no_hold && regions_of(first, count).any(|region| reign.holds.contains_key(&region));
        // While a reign settles, its watermark is the last reign's: the window would close for good
        // when a forced history began far above that. Settling operations have a bound of their
        // own.
        let is_far = !is_settle && reign.next_seq - reign.commit.0 > SEQ_WINDOW;
        let is_full = reign.open.len() >= OPEN_MAX || is_far;
        if reign.is_suspended
            || is_full
            || (!is_settle && (is_held || !reign.is_serving()))
            || (is_client && !has_min_write)
        {
            return Err(body);
        }
        let seq = Seq(reign.next_seq);
        reign.next_seq += 1;
        let lsn = Lsn { epoch: reign.epoch, seq };
        let commit = reign.commit;
        let request = body.clone().into_op(shard_ix, (lsn, commit), 0, is_solo);
        let acked = SmallVec::new();
        let (local, began, sent) = (Local::Running, ctx.now, ctx.now);
        let open = Open { lsn, body, owner, local, is_solo, acked, began, sent };
        reign.open.insert(seq, open);
        let is_heal = matches!(owner, Owner::Heal(_));
        ctx.out.push(Effect::Note(Note::Assigned { lsn, first, count, is_settle, is_heal }));
        self.lane(ctx, Work::Local(seq), request);
        for to in self.receivers() {
            self.send_open(ctx, seq, to);
        }
        Ok(seq)
    }

    fn send_open(&self, ctx: &mut Ctx<'_, '_>, seq: Seq, to: (StoreId, Incarnation)) {
        let open = &self.reign.as_ref().expect("a primary reigns").open[&seq];
        let (first, count) = open.body.range();
        let range = |count: u32| {
            let length = u32::try_from(u64::from(count) * BLOCK).expect("cut when it was planned");
            ByteRange::new(u64::from(first) * BLOCK, length).expect("whole blocks of the shard")
        };
        let data = |crcs: &SmallVec<[u32; 4]>, data: &proto::disk::BufList| {
            RangeData::join(range(count), CheckedData::assume(0, crcs.clone(), data.clone()))
        };
        let command_id = Command { kind: Kind::Prepare, number: seq.0 }.id();
        let body = &open.body;
        self.send(ctx, to, command_id, open.lsn, |peer| match (open.owner, body) {
            (Owner::Task(_) | Owner::Heal(_), Body::Write { crcs, data: bytes, .. }) => {
                let op = PrepareOp::Write(data(crcs, bytes));
                RequestOp::Prepare(Box::new(Prepare { peer, op }))
            }
            (Owner::Task(_) | Owner::Heal(_), Body::Discard { .. }) => {
                let op = PrepareOp::Discard(range(count));
                RequestOp::Prepare(Box::new(Prepare { peer, op }))
            }
            (Owner::Settling, Body::Write { crcs, data: bytes, .. }) => {
                let content = Content::Data(data(crcs, bytes));
                RequestOp::Settle(Box::new(Settle { peer, layer_snap_seq: 0, content }))
            }
            (Owner::Settling, Body::Discard { .. }) => {
                let content = Content::Inherit(range(count));
                RequestOp::Settle(Box::new(Settle { peer, layer_snap_seq: 0, content }))
            }
            (Owner::Settling | Owner::Task(_) | Owner::Heal(_), Body::Poison { .. }) => {
                let content = Content::Poison(range(count));
                RequestOp::Settle(Box::new(Settle { peer, layer_snap_seq: 0, content }))
            }
        });
    }

    /// The own copy of an operation is durable, or failed.
    pub(super) fn local_done(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        seq: Seq,
        result: Result<Outcome, Problem>,
    ) {
        let Some(reign) = &mut self.reign else { return };
        // The write was an earlier reign's, in the same life.
        let Some(open) = reign.open.get_mut(&seq) else { return };
        match result {
            Ok(_) => {
                open.local = Local::Durable;
                let lsn = open.lsn;
                ctx.out.push(Effect::Note(Note::Durable { lsn }));
            }
            Err(problem) => open.local = Local::Failed(status_of(&problem)),
        }
        self.try_commit(ctx, seq);
        self.poke_resyncs(ctx);
        self.poke_verify(ctx);
    }

    /// A replica has answered.
    pub(super) fn acknowledged(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        from: StoreId,
        kind: Kind,
        number: u64,
        op: ReplyOp,
    ) {
        let Some(ack) = ack_of(&op) else { return };
        let Some(conf) = self.stored.conf.as_ref().filter(|_| self.reign.is_some()) else {
            return;
        };
        // "Acks whose epoch is before this reign are dropped", and so are those of another life.
        let is_life = conf.on_store(from).is_some_and(|member| {
            member.incarnation == ack.incarnation || self.mutant(Mutant::NoIncarnationCheck)
        });
        if !is_life || ack.history_id != conf.history_id {
            return;
        }
        let credit = Credit { slots: ack.credit, asked: ctx.now, is_asked: false };
        let before = self.reign().credits.insert(from, credit);
        if before.is_some_and(|before| before.is_asked) {
            self.start_waiting(ctx);
        }
        match (kind, op) {
            (Kind::Prepare, ReplyOp::Prepare(_) | ReplyOp::Settle(_)) => {
                let reign = self.reign();
                let (seq, life) = (Seq(number), (from, ack.incarnation));
                let is_of_reign = ack.lsn_epoch == reign.epoch;
                let Some(open) = reign.open.get_mut(&seq) else {
                    if is_of_reign {
                        self.owed_answered(ctx, life, seq, true);
                    }
                    return;
                };
                if ack.lsn_epoch == open.lsn.epoch && !open.acked.contains(&life) {
                    open.acked.push(life);
                    self.heard_learner(ctx.now, from);
                    self.try_commit(ctx, seq);
                    self.poke_resyncs(ctx);
                    self.poke_verify(ctx);
                }
            }
            (Kind::Tails, ReplyOp::Tails(tails)) => self.tails_came(ctx, from, *tails),
            (Kind::Copy, ReplyOp::Copy(_)) => self.copied(ctx, from, number, ack.resync_id),
            (Kind::Digest, ReplyOp::Digest(_, digests)) => {
                self.digest_came(ctx, from, (number, ack.resync_id), &digests);
            }
            (Kind::Verify, ReplyOp::Digest(_, digests)) => {
                self.verify_came(ctx, from, number, digests.first().copied());
            }
            // An answer that does not belong to its question is of no use.
            (
                Kind::Prepare
                | Kind::Tails
                | Kind::Copy
                | Kind::Digest
                | Kind::NeedConf
                | Kind::Read
                | Kind::Repair
                | Kind::Verify
                | Kind::Unknown,
                _,
            ) => {}
        }
    }

    /// A replica could not do what it was asked.
    pub(super) fn peer_failed(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        from: StoreId,
        kind: Kind,
        number: u64,
        status: Status,
    ) {
        if self.reign.is_none() {
            return;
        }
        let is_media = is_media(status);
        if kind == Kind::Digest && is_media {
            // A learner that cannot read what it was given is given it again.
            return self.learner_unreadable(ctx, from, number);
        }
        if kind == Kind::Verify {
            // The member cannot read the region; after any other failure the region is tried again.
            if is_media {
                self.verify_came(ctx, from, number, None);
            }
            return;
        }
        let is_its_own = matches!(
            status,
            Status::MediaError
                | Status::BadChecksum
                | Status::DiskFailed
                | Status::NoSpace
                | Status::Internal
                | Status::OutOfRange
        );
        if is_its_own && matches!(kind, Kind::Prepare | Kind::Copy | Kind::Digest) {
            self.member_failed(ctx, from);
        } else if kind == Kind::Prepare {
            let conf = self.stored.conf.as_ref();
            let life = conf.and_then(|conf| conf.on_store(from)).map(|m| (from, m.incarnation));
            if let Some(life) = life {
                self.owed_answered(ctx, life, Seq(number), false);
            }
        } else if kind == Kind::Read {
            self.content_came(ctx, number, None);
        } else if kind == Kind::Repair {
            self.read_elsewhere(ctx, (from, number), Err(status));
        } else if matches!(kind, Kind::Copy | Kind::Digest) {
            self.abandon_job(ctx, from, number);
        }
    }

    /// A replica has an error of its own: it is proposed to go.
    pub(super) fn member_failed(&mut self, ctx: &mut Ctx<'_, '_>, from: StoreId) {
        self.reign().failed.insert(from);
        self.proposed_at = None;
        self.tick_reign(ctx);
    }

    /// Commit an operation if all that must have it do.
    pub(super) fn try_commit(&mut self, ctx: &mut Ctx<'_, '_>, seq: Seq) {
        let required = self.required(!self.mutant(Mutant::AdmitNotRequired));
        let has_min_write = self.has_min_write();
        let alone = self.mutant(Mutant::CommitAlone);
        let any_life = self.mutant(Mutant::NoIncarnationCheck);
        let no_redirty = self.mutant(Mutant::NoRedirty);
        let store = self.options.store;
        let Some(reign) = &mut self.reign else { return };
        if reign.is_suspended {
            return;
        }
        let Some(open) = reign.open.get(&seq) else { return };
        if let Local::Failed(status) = open.local {
            // With other members in the ISR this replica must leave (T2). Alone, nobody can take
            // over: the lane gets the write again and may try another slot, which it was not told
            // while there were others.
            if required.is_empty() && status == Status::MediaError && !open.is_solo {
                self.write_again(ctx, seq, true);
            } else if required.is_empty() {
                let open = reign.open.remove(&seq).expect("looked at above");
                reign.advance_commit();
                self.operation_over(ctx, &open, Err(status));
            }
            return;
        }
        let has = |life: &(StoreId, Incarnation)| {
            let is_any_life = any_life && open.acked.iter().any(|acked| acked.0 == life.0);
            open.acked.contains(life) || is_any_life
        };
        let is_acked = alone || required.iter().all(has);
        let is_enough = has_min_write || !matches!(open.owner, Owner::Task(_));
        if open.local != Local::Durable || !is_acked || !is_enough {
            return;
        }
        let open = reign.open.remove(&seq).expect("looked at above");
        let (first, count) = open.body.range();
        for resync in reign.resyncs.values_mut() {
            // "A write that commits *without* R's ack re-dirties its region first."
            if !open.acked.contains(&resync.life()) && !no_redirty {
                resync.committed_without(ctx.now, seq, (first, count));
            }
        }
        reign.advance_commit();
        let mut acked: Vec<StoreId> = open.acked.iter().map(|life| life.0).collect();
        acked.push(store);
        acked.sort_unstable();
        acked.dedup();
        ctx.out.push(Effect::Note(Note::Committed { lsn: open.lsn, acked }));
        self.operation_over(ctx, &open, Ok(seq));
        self.start_waiting(ctx);
    }

    /// Give an operation to the lane once more; `is_solo`: this is the only in-sync replica now.
    fn write_again(&mut self, ctx: &mut Ctx<'_, '_>, seq: Seq, is_solo: bool) {
        let shard_ix = self.options.shard_ix;
        let reign = self.reign();
        let commit = reign.commit;
        let open = reign.open.get_mut(&seq).expect("it is under way");
        (open.local, open.is_solo) = (Local::Running, is_solo);
        let request = open.body.clone().into_op(shard_ix, (open.lsn, commit), 0, is_solo);
        self.lane(ctx, Work::Local(seq), request);
    }

    /// A write that waits for more replicas was damaged here meanwhile: the lane gets it again,
    /// because a new copy cannot be made before the block can be read.
    pub(super) fn restore_open(&mut self, ctx: &mut Ctx<'_, '_>) {
        if self.has_min_write() {
            return;
        }
        let (damage, reign) = (&self.damage, self.reign.as_ref().expect("a primary reigns"));
        let is_damaged = |open: &Open| {
            let (first, count) = open.body.range();
            open.local == Local::Durable
                && matches!(open.body, Body::Write { .. })
                && (first..first + count).any(|block| damage.is_here(block))
        };
        let damaged = reign.open.iter().filter(|(_, open)| is_damaged(open));
        let again: Vec<(Seq, bool)> = damaged.map(|(&seq, open)| (seq, open.is_solo)).collect();
        for (seq, is_solo) in again {
            self.write_again(ctx, seq, is_solo);
        }
    }

    fn operation_over(&mut self, ctx: &mut Ctx<'_, '_>, open: &Open, result: Result<Seq, Status>) {
        match open.owner {
            Owner::Task(task) | Owner::Heal(task) => self.change_over(ctx, task, result),
            Owner::Settling => self.settled(ctx, open.body.range(), result.is_ok()),
        }
    }

    /// Let new lsns be given in a region again.
    pub(super) fn release_region(&mut self, ctx: &mut Ctx<'_, '_>, region: u32) {
        self.reign().unhold(region);
        self.start_waiting(ctx);
    }

    // -------------------------------------------------------------------------- configurations --

    /// A newer configuration keeps this life primary.
    pub(super) fn reconfigured(&mut self, ctx: &mut Ctx<'_, '_>) {
        let conf = self.stored.conf.as_ref().expect("just stored");
        let learners: BTreeSet<StoreId> =
            conf.learner_members().map(|member| member.store).collect();
        let reign = self.reign.as_mut().expect("stays primary");
        reign.is_suspended = false;
        // A transfer was proposed for an epoch that is past.
        reign.leaving = None;
        reign.failed.clear();
        // The outcome of a pending admission is known now, if it is in the ISR or no learner.
        reign.pending_admit = reign.pending_admit.filter(|store| learners.contains(store));
        self.keep_resyncs(ctx);
        let role = match self.reign().phase {
            Phase::Settling(_) => Role::Settling,
            Phase::Active => Role::Active,
        };
        self.set_role(ctx, role);
        self.claim(ctx);
        // "Re-send uncommitted PREPAREs (same lsn, new epoch)."
        let seqs: Vec<Seq> = self.reign().open.keys().copied().collect();
        for seq in seqs {
            self.resend(ctx, seq);
            self.try_commit(ctx, seq);
        }
        self.settling_reconfigured(ctx);
        self.start_waiting(ctx);
        self.start_reads(ctx);
    }

    fn resend(&mut self, ctx: &mut Ctx<'_, '_>, seq: Seq) {
        let receivers = self.receivers();
        let Some(open) = self.reign().open.get_mut(&seq) else { return };
        open.sent = ctx.now;
        let missing: SmallVec<[(StoreId, Incarnation); 4]> =
            receivers.into_iter().filter(|life| !open.acked.contains(life)).collect();
        for to in missing {
            self.send_open(ctx, seq, to);
        }
    }

    /// Refused by a replica that has promised a newer epoch.
    pub(super) fn suspend(&mut self, ctx: &mut Ctx<'_, '_>) {
        self.reign().is_suspended = true;
        self.set_role(ctx, Role::Suspended);
    }

    /// Another primary reigns, or none: nothing of this reign is answered with success any more.
    pub(super) fn end_reign(&mut self, ctx: &mut Ctx<'_, '_>) {
        let mut reign = self.reign.take().expect("only a reign ends");
        self.damage.end_reign();
        ctx.out.push(Effect::Unclaim);
        if let Some(verify) = reign.verify.take() {
            let (token, result) = (verify.into_token(), Err(Status::NotPrimary));
            ctx.out.push(Effect::Verified { token, result });
        }
        for token in reign.clients.end() {
            let result = Err(Status::NotPrimary);
            ctx.out.push(Effect::Reply { token, result });
        }
        self.set_role(ctx, Role::Fenced);
    }

    // ------------------------------------------------------------------------------------ time --

    /// What is due: messages without answer, members without life, reads without lease.
    pub(super) fn tick_reign(&mut self, ctx: &mut Ctx<'_, '_>) {
        let now = ctx.now;
        if self.reign().is_suspended {
            self.fetch(ctx, None);
            return;
        }
        let due: Vec<Seq> = self
            .reign()
            .open
            .iter()
            .filter(|(_, open)| now >= open.sent.after_millis(RESEND_MS))
            .map(|(&seq, _)| seq)
            .collect();
        for seq in due {
            self.resend(ctx, seq);
        }
        self.tick_settling(ctx);
        self.tick_resyncs(ctx);
        self.tick_repairs(ctx);
        self.tick_verify(ctx);
        self.start_waiting(ctx);
        self.start_reads(ctx);
        if self.may_propose(now)
            && let Some(transition) = self.wanted_change(ctx)
        {
            self.propose(ctx, transition);
        }
    }

    /// The transition that the state of members asks for, the most urgent first.
    fn wanted_change(&self, ctx: &Ctx<'_, '_>) -> Option<Transition> {
        let reign = self.reign.as_ref()?;
        if let Some(transfer) = reign.leaving.as_ref().and_then(Leaving::proposal) {
            // Without leases nothing is known of the others any more.
            return Some(transfer);
        }
        let conf = self.stored.conf.as_ref()?;
        let others = || conf.isr_members().filter(|member| member.store != self.options.store);
        let is_own_failed = reign.open.values().any(|open| matches!(open.local, Local::Failed(_)));
        if is_own_failed && let Some(other) = others().find(|other| !self.is_silent(ctx, other)) {
            return Some(Transition::Promote { copy: other.copy });
        }
        if let Some(silent) = others().find(|member| self.is_silent(ctx, member)) {
            return Some(Transition::Remove { copy: silent.copy });
        }
        self.wanted_of_learners(ctx)
    }

    /// Whether a member has failed, died, or answered nothing that it was asked for too long.
    fn is_silent(&self, ctx: &Ctx<'_, '_>, member: &Member) -> bool {
        let reign = self.reign.as_ref().expect("a primary reigns");
        let limit = |since: Tick| ctx.now >= since.after_millis(SILENT_MS);
        let life = (member.store, member.incarnation);
        let owes = |open: &Open| limit(open.began) && !open.acked.contains(&life);
        let leases = ctx.view.leases;
        let lease = leases.lease_until(self.shard, member.store, member.incarnation);
        // Without a heartbeat acknowledged for SILENT_MS: the lease ended that much less L ago.
        let lease_nanos = self.options.timing.lease_nanos;
        let link = Tick((lease.0 + SILENT_MS * 1_000_000).saturating_sub(lease_nanos));
        let is_link_dead =
            limit(reign.began) && self.adopted_at.is_some_and(limit) && ctx.now > link;
        self.is_dead(member)
            || reign.failed.contains(&member.store)
            || is_link_dead
            || reign.open.values().any(owes)
            || self.owes_tails(ctx, member.store)
    }

    /// Whether a learner has failed or is dead.
    pub(super) fn is_lost(&self, member: &Member) -> bool {
        let reign = self.reign.as_ref().expect("a primary reigns");
        self.is_dead(member) || reign.failed.contains(&member.store)
    }
}

fn ack_of(op: &ReplyOp) -> Option<proto::wire::Ack> {
    match op {
        ReplyOp::Prepare(ack)
        | ReplyOp::Settle(ack)
        | ReplyOp::Copy(ack)
        | ReplyOp::Digest(ack, _)
        | ReplyOp::Snap(ack)
        | ReplyOp::Attach(ack)
        | ReplyOp::NeedConf(ack, _) => Some(*ack),
        ReplyOp::Tails(tails) => Some(tails.ack),
        ReplyOp::Hello(_)
        | ReplyOp::FencePath(_)
        | ReplyOp::Ping(_)
        | ReplyOp::Read(_)
        | ReplyOp::Write
        | ReplyOp::Flush
        | ReplyOp::Discard
        | ReplyOp::WriteZeroes
        | ReplyOp::CompareAndWrite(_) => None,
    }
}
