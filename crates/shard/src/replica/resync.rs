//! Making learners equal: what they need, how it is copied, how equality is shown, admission.
//!
//! A region is needed when its last write is above the learner's complete_lsn, by the primary's
//! region map or by the learner's own (its own unfinished writes), or when either is in doubt about
//! it (section 5). A region is read while no new lsn is given in it and everything uncommitted
//! there is durable here and at the learner; those writes need not be committed, because below
//! min_write they will be only once the learner is admitted. A write that commits without the
//! learner makes its region needed again.
//!
//! One region at a time is on its way to a learner; how soon the next one follows is `pace.rs`.
//!
//! When nothing is needed the learner becomes required for acknowledgements and the lease, each
//! region that was copied is compared by digest under the same hold, and its admission is proposed:
//! from the moment it is required every region that was shown to be equal stays equal, so no lock
//! on the whole shard is needed (ADR 6).

use super::follower::{digest_of, regions_of};
use super::pace::{Turn, Turns};
use super::reign::Reign;
use super::settle::Shown;
use super::{Command, Ctx, Effect, Kind, Mutant, Note, REPEAT_MS, Replica, SILENT_MS, Work};
use crate::conf::transition::Transition;
use crate::conf::{Incarnation, Member, StoreId};
use lane::{Op, Outcome, Problem, REGION_BLOCKS};
use proto::disk::BufList;
use proto::wire::{ByteRange, CheckedData, Content, Copy, Digest, RangeData, RequestOp, Tails};
use proto::{BLOCK_BYTES, Lsn, Seq, Tick};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Room for the parts of one region in a command's number.
const PART_BITS: u32 = 16;
/// Digests that may differ before the resync begins again from nothing.
const MISMATCHES_MAX: u32 = 3;

/// Operations whose acknowledgement by a learner is waited for after their commitment.
const OWED_MAX: usize = 4_096;
/// How long it is waited for.
const OWED_MS: u64 = 1_000;

/// One region on its way, or being compared.
struct Job {
    number: u32,
    region: u32,
    is_digest: bool,
    began: Tick,
    turn: Turn,
    stage: Stage,
}

enum Stage {
    /// Something uncommitted in the region is not durable at both ends yet.
    Waiting,
    /// The lane is reading it.
    Reading,
    /// These parts of it are not acknowledged.
    Sent(BTreeSet<u16>),
    /// Own digest and the learner's.
    Comparing { own: Option<u128>, other: Option<u128> },
}

/// The resync of one learner.
pub(super) struct Resync {
    to: (StoreId, Incarnation),
    id: u64,
    /// It has said what it holds.
    is_known: bool,
    asked: Option<Tick>,
    heard: Tick,
    /// Regions to copy.
    dirty: BTreeSet<u32>,
    /// Committed without its acknowledgement, which may still come: first block, number, when.
    owed: BTreeMap<Seq, (u32, u32, Tick)>,
    /// Regions copied and not compared.
    unverified: BTreeSet<u32>,
    job: Option<Job>,
    /// Turns of its comparisons.
    compares: Turns,
    /// Since when its next region waits for its turn.
    waits: Option<Tick>,
    copied: u32,
    mismatches: u32,
    /// Times that a region which was copied could not be read there.
    unreadable: BTreeMap<u32, u32>,
    /// Admission was proposed in this configuration.
    is_proposed: bool,
}

impl Resync {
    /// An operation was committed without the learner. The learner was sent it too, and often
    /// acknowledges just a little later; the operation's regions are needed again only if no
    /// acknowledgement comes.
    pub(super) fn committed_without(&mut self, now: Tick, seq: Seq, (first, count): (u32, u32)) {
        if self.is_known && self.owed.len() < OWED_MAX {
            self.owed.insert(seq, (first, count, now));
        } else {
            self.dirty.extend(regions_of(first, count));
        }
    }

    /// The learner has an operation after all; whether that was owed.
    fn settle_owed(&mut self, seq: Seq) -> bool {
        self.owed.remove(&seq).is_some()
    }

    /// The learner will not acknowledge an operation any more.
    fn redirty(&mut self, seq: Seq) {
        if let Some((first, count, _)) = self.owed.remove(&seq) {
            self.dirty.extend(regions_of(first, count));
        }
    }

    /// Regions whose acknowledgement was owed too long are copied instead.
    fn redirty_late(&mut self, now: Tick) {
        let is_late = |since: &Tick| now >= since.after_millis(OWED_MS);
        let late: Vec<Seq> =
            self.owed.iter().filter(|(_, (_, _, since))| is_late(since)).map(|(&s, _)| s).collect();
        late.into_iter().for_each(|seq| self.redirty(seq));
    }

    /// The learner's turn has come. While the learner waited it was asked for nothing, so the wait
    /// does not count as silence.
    fn waited(&mut self, now: Tick) {
        if let Some(since) = self.waits.take() {
            self.heard = self.heard.after_nanos(now.0 - since.0).min(now);
        }
    }

    /// The learner, in the life that is being made equal.
    pub(super) fn life(&self) -> (StoreId, Incarnation) {
        self.to
    }

    fn job_numbered(&mut self, number: u32) -> Option<&mut Job> {
        self.job.as_mut().filter(|job| job.number == number)
    }
}

/// How far a resync is, for people.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ResyncFacts {
    /// The learner's store.
    pub store: StoreId,
    /// Regions that it still needs, as known now.
    pub regions_left: u32,
    /// Regions copied so far.
    pub regions_copied: u32,
}

fn part_of(number: u64) -> (u32, u16) {
    ((number >> PART_BITS) as u32, (number & 0xffff) as u16)
}

impl Replica {
    /// The resyncs under way.
    #[must_use]
    pub fn resyncs(&self) -> Vec<ResyncFacts> {
        let resyncs = self.reign.as_ref().map(|reign| reign.resyncs.values());
        let facts = |resync: &Resync| ResyncFacts {
            store: resync.to.0,
            regions_left: resync.dirty.len() as u32 + u32::from(resync.job.is_some()),
            regions_copied: resync.copied,
        };
        resyncs.into_iter().flatten().map(facts).collect()
    }

    /// Begin, keep and end resyncs as the configuration says.
    pub(super) fn keep_resyncs(&mut self, ctx: &mut Ctx<'_, '_>) {
        let conf = self.stored.conf.as_ref().expect("a primary has a configuration");
        let learners: BTreeMap<StoreId, Member> =
            conf.learner_members().map(|member| (member.store, *member)).collect();
        let is_same = |to: &(StoreId, Incarnation)| {
            learners.get(&to.0).is_some_and(|member| member.incarnation == to.1)
        };
        let resyncs = &self.reign().resyncs;
        let over: Vec<StoreId> =
            resyncs.iter().filter(|(_, r)| !is_same(&r.to)).map(|(&store, _)| store).collect();
        for store in over {
            self.drop_job(ctx, store);
            let reign = self.reign();
            reign.resyncs.remove(&store);
            if reign.pending_admit == Some(store) {
                reign.pending_admit = None;
            }
        }
        for (&store, member) in &learners {
            let id = self.epoch().0 << 16 | u64::from(member.copy);
            let (now, reign) = (ctx.now, self.reign());
            let resync = reign.resyncs.entry(store).or_insert_with(|| Resync {
                to: (store, member.incarnation),
                id,
                is_known: false,
                asked: None,
                heard: now,
                dirty: BTreeSet::new(),
                owed: BTreeMap::new(),
                unverified: BTreeSet::new(),
                job: None,
                compares: Turns::default(),
                waits: None,
                copied: 0,
                mismatches: 0,
                unreadable: BTreeMap::new(),
                is_proposed: false,
            });
            resync.is_proposed = false;
        }
    }

    /// A learner has said up to where it is complete and which regions it cannot vouch for.
    pub(super) fn learner_answered(&mut self, ctx: &mut Ctx<'_, '_>, from: StoreId, tails: &Tails) {
        let region_only = self.mutant(Mutant::RejoinByRegionOnly);
        let shard = ctx.view.tables.shard(self.options.shard_ix).expect("the lane holds it");
        let Some(resync) = self.reign().resyncs.get_mut(&from).filter(|r| !r.is_known) else {
            return;
        };
        (resync.is_known, resync.heard) = (true, ctx.now);
        let complete = tails.complete_lsn.seq;
        for (region, &value) in shard.regions.iter().enumerate() {
            if value >> 1 > complete.0 || value & 1 == 1 {
                resync.dirty.insert(region as u32);
            }
        }
        if !region_only {
            for record in &tails.records {
                let first = (record.range.offset() / BLOCK) as u32;
                let count = (u64::from(record.range.length()) / BLOCK) as u32;
                resync.dirty.extend(regions_of(first, count));
            }
        }
        let regions = shard.regions.len() as u32;
        resync.dirty.retain(|&region| region < regions);
        self.poke_resyncs(ctx);
    }

    /// A learner has an operation that was committed without it, or will never have it.
    pub(super) fn owed_answered(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        life: (StoreId, Incarnation),
        seq: Seq,
        is_done: bool,
    ) {
        let Some(resync) = self.reign().resyncs.get_mut(&life.0).filter(|r| r.to == life) else {
            return;
        };
        if is_done {
            if resync.settle_owed(seq) {
                resync.heard = ctx.now;
            }
        } else {
            resync.redirty(seq);
        }
        self.poke_resyncs(ctx);
    }

    pub(super) fn heard_learner(&mut self, now: Tick, from: StoreId) {
        if let Some(resync) = self.reign().resyncs.get_mut(&from) {
            resync.heard = now;
        }
    }

    /// Move every resync on as far as it goes.
    pub(super) fn poke_resyncs(&mut self, ctx: &mut Ctx<'_, '_>) {
        let Some(reign) = &self.reign else { return };
        if !reign.is_serving() {
            return;
        }
        let stores: Vec<StoreId> = reign.resyncs.keys().copied().collect();
        for store in stores {
            self.poke(ctx, store);
        }
    }

    fn poke(&mut self, ctx: &mut Ctx<'_, '_>, store: StoreId) {
        let no_hold = self.mutant(Mutant::NoRegionLock);
        let waits_for_commit = self.mutant(Mutant::ParkWithLock);
        let (now, pace) = (ctx.now, ctx.view.pace);
        let is_single = self.stored.conf.as_ref().is_some_and(|conf| conf.isr.len() == 1);
        let reign = self.reign.as_mut().expect("checked by the caller");
        let is_failed = reign.failed.contains(&store); // It is to go: nothing more is asked of it.
        let resync = reign.resyncs.get_mut(&store);
        let Some(resync) = resync.filter(|r| r.is_known && !(is_failed && r.job.is_none())) else {
            return;
        };
        if resync.job.is_none() {
            let is_digest = resync.dirty.is_empty();
            if is_digest && reign.pending_admit != Some(store) {
                if reign.pending_admit.is_some() {
                    // One admission at a time.
                    return;
                }
                // From now on nothing is committed without it.
                reign.pending_admit = Some(store);
                self.claim(ctx);
                return self.poke(ctx, store);
            }
            if is_digest && !resync.owed.is_empty() {
                // Operations committed without the learner are still on their way to it.
                return;
            }
            let left = if is_digest { &resync.unverified } else { &resync.dirty };
            if left.is_empty() {
                return self.caught_up(ctx, store);
            }
            let (damage, repairs) = (&self.damage, &reign.clients.repairs);
            let is_readable = |&&region: &&u32| !repairs.stand_against(damage, region);
            let Some(&region) = left.iter().find(is_readable) else {
                // The learner is asked for nothing until they can be read, and not silent for it.
                resync.heard = now;
                return;
            };
            let turns = if is_digest { &resync.compares } else { pace.copies(is_single) };
            let turn = match turns.begin(now, pace.is_busy(now), is_digest || is_single) {
                Ok(turn) => turn,
                Err(at) => {
                    resync.waits.get_or_insert(now);
                    return self.wake_at(ctx, at);
                }
            };
            resync.waited(now);
            let left = if is_digest { &mut resync.unverified } else { &mut resync.dirty };
            left.remove(&region);
            self.jobs = self.jobs.wrapping_add(1);
            let (number, stage) = (self.jobs, Stage::Waiting);
            resync.job = Some(Job { number, region, is_digest, began: now, turn, stage });
            if !no_hold {
                reign.hold(region);
            }
        }
        let resync = &reign.resyncs[&store];
        let job = resync.job.as_ref().expect("just begun");
        let (number, region, is_digest) = (job.number, job.region, job.is_digest);
        let is_ready = matches!(job.stage, Stage::Waiting)
            && (no_hold
                || if waits_for_commit {
                    reign.is_quiet(region)
                } else {
                    reign.is_covered(region, resync.to)
                });
        if is_ready {
            self.read_region(ctx, store, number, region, is_digest);
        }
    }

    pub(super) fn region_range(&self, region: u32) -> (u32, u32) {
        let first = region * REGION_BLOCKS;
        (first, REGION_BLOCKS.min(self.blocks - first))
    }

    fn read_region(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        store: StoreId,
        job: u32,
        region: u32,
        is_digest: bool,
    ) {
        let (first, count) = self.region_range(region);
        let (reign, shard_ix) = (self.reign().epoch, self.options.shard_ix);
        let now = ctx.now;
        let to = {
            let resync = self.reign().resyncs.get_mut(&store).expect("has a job");
            let job = resync.job.as_mut().expect("has a job");
            job.turn.work(now);
            job.stage = if is_digest {
                Stage::Comparing { own: None, other: None }
            } else {
                Stage::Reading
            };
            (resync.to, resync.id)
        };
        if is_digest {
            let command_id = Command { kind: Kind::Digest, number: u64::from(job) }.id();
            let lsn = self.reign().commit_lsn();
            self.send(ctx, to.0, command_id, lsn, |peer| {
                RequestOp::Digest(Digest {
                    peer,
                    resync_id: to.1,
                    layer_snap_seq: 0,
                    first_region: region,
                    region_count: 1,
                })
            });
        }
        let work = if is_digest {
            Work::DigestRead { reign, store, job }
        } else {
            Work::CopyRead { reign, store, job }
        };
        self.lane(ctx, work, Op::Read { shard_ix, first, count, with_poison: true });
    }

    // ------------------------------------------------------------------------------------ copy --

    /// A region was read: send it, part by part, and let new lsns be given in it again. A later
    /// write is sent after the COPY; should the write overtake it, the learner refuses the COPY.
    pub(super) fn copy_read(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        store: StoreId,
        job: u32,
        result: Result<Outcome, Problem>,
    ) {
        let resync = self.reign().resyncs.get_mut(&store);
        let Some(region) = resync.and_then(|r| Some(r.job_numbered(job)?.region)) else { return };
        let (data, crcs) = match result {
            Ok(Outcome::Read { data, crcs }) => (data, crcs),
            Ok(Outcome::Done | Outcome::Created { .. }) => unreachable!("a read brings data"),
            Err(_) => {
                // Unreadable here: what is damaged is being looked for and mended (`seen`). The
                // region stays needed, and is tried again.
                return self.abandon_job(ctx, store, u64::from(job) << PART_BITS);
            }
        };
        let shard = ctx.view.tables.shard(self.options.shard_ix).expect("the lane holds it");
        let seq = Seq(shard.regions[region as usize] >> 1);
        let (first, count) = self.region_range(region);
        let lsn = Lsn { epoch: self.reign().epoch, seq };
        let mut parts = Vec::new();
        let mut at = 0;
        while at < count {
            let (here, shown) = self.run_of(ctx, first + at, count - at);
            let offset = u64::from(first + at) * BLOCK;
            let range = ByteRange::new(offset, here * BLOCK_BYTES as u32).expect("whole blocks");
            parts.push(match shown {
                Shown::Data => {
                    let piece = blocks_in(&data, at, here);
                    let crcs = SmallVec::from_slice(&crcs[at as usize..(at + here) as usize]);
                    Content::Data(RangeData::join(range, CheckedData::assume(0, crcs, piece)))
                }
                Shown::Nothing => Content::Inherit(range),
                Shown::Poison => Content::Poison(range),
            });
            at += here;
        }
        let count = parts.len() as u16;
        let resync = self.reign().resyncs.get_mut(&store).expect("looked at above");
        let (to, resync_id) = (resync.to, resync.id);
        resync.job.as_mut().expect("looked at above").stage = Stage::Sent((0..count).collect());
        for (part, content) in parts.into_iter().enumerate() {
            let number = u64::from(job) << PART_BITS | part as u64;
            let command_id = Command { kind: Kind::Copy, number }.id();
            let is_last = part + 1 == usize::from(count);
            self.send(ctx, to, command_id, lsn, |peer| {
                RequestOp::Copy(Box::new(Copy {
                    peer,
                    resync_id,
                    layer_snap_seq: 0,
                    is_last,
                    content,
                }))
            });
        }
        self.unhold_job(ctx, region);
    }

    /// The learner has a part of a region.
    pub(super) fn copied(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        from: StoreId,
        number: u64,
        resync_id: u64,
    ) {
        let is_late_counted = self.mutant(Mutant::LateCopied);
        let now = ctx.now;
        let (job, part) = part_of(number);
        let Some(resync) = self.reign().resyncs.get_mut(&from) else { return };
        if resync.id != resync_id {
            return;
        }
        resync.heard = now;
        let Some(found) = resync.job_numbered(job) else { return };
        let (region, turn) = (found.region, found.turn);
        let Stage::Sent(left) = &mut found.stage else { return };
        left.remove(&part);
        if !left.is_empty() {
            return;
        }
        ctx.view.pace.copies(turn.is_urgent()).end(now, turn);
        resync.job = None;
        resync.copied += 1;
        if is_late_counted {
            // Seeded bug: it was needed again meanwhile.
            resync.dirty.remove(&region);
        }
        resync.unverified.insert(region);
        ctx.out.push(Effect::Note(Note::Copied { to: from, region }));
        self.poke(ctx, from);
    }

    // --------------------------------------------------------------------------------- compare --

    pub(super) fn digest_read(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        store: StoreId,
        job: u32,
        result: Result<Outcome, Problem>,
    ) {
        match result {
            Ok(outcome) => self.digest_known(ctx, store, job, Some(digest_of(&outcome)), None),
            // As in `copy_read`.
            Err(_) => self.abandon_job(ctx, store, u64::from(job)),
        }
    }

    pub(super) fn digest_came(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        from: StoreId,
        (number, resync_id): (u64, u64),
        digests: &[u128],
    ) {
        if self.reign().resyncs.get(&from).is_none_or(|resync| resync.id != resync_id) {
            return;
        }
        self.heard_learner(ctx.now, from);
        if let (Ok(job), Some(&digest)) = (u32::try_from(number), digests.first()) {
            self.digest_known(ctx, from, job, None, Some(digest));
        }
    }

    fn digest_known(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        store: StoreId,
        job: u32,
        ours: Option<u128>,
        theirs: Option<u128>,
    ) {
        let Some(resync) = self.reign().resyncs.get_mut(&store) else { return };
        let Some(found) = resync.job_numbered(job) else { return };
        let (region, turn) = (found.region, found.turn);
        let Stage::Comparing { own, other } = &mut found.stage else { return };
        (*own, *other) = (own.or(ours), other.or(theirs));
        let (Some(own), Some(other)) = (*own, *other) else { return };
        resync.compares.end(ctx.now, turn);
        resync.job = None;
        if own != other {
            resync.mismatches += 1;
            resync.dirty.insert(region);
            ctx.out.push(Effect::Note(Note::Different { store, region }));
        }
        self.unhold_job(ctx, region);
        self.poke(ctx, store);
    }

    /// The learner cannot read a region that it was given: it is copied again, a few times.
    pub(super) fn learner_unreadable(&mut self, ctx: &mut Ctx<'_, '_>, from: StoreId, number: u64) {
        let Some(resync) = self.reign().resyncs.get_mut(&from) else { return };
        let job = resync.job.as_ref().filter(|job| job.is_digest);
        let Some(job) = job.filter(|job| u64::from(job.number) == number) else { return };
        let (region, turn) = (job.region, job.turn);
        resync.compares.end(ctx.now, turn);
        resync.heard = ctx.now;
        resync.job = None;
        resync.dirty.insert(region);
        let times = resync.unreadable.entry(region).or_default();
        *times += 1;
        let is_hopeless = *times >= MISMATCHES_MAX;
        self.unhold_job(ctx, region);
        if is_hopeless {
            return self.member_failed(ctx, from);
        }
        self.poke(ctx, from);
    }

    /// Nothing is needed and everything was compared: propose admission, until the outcome is read.
    fn caught_up(&mut self, ctx: &mut Ctx<'_, '_>, store: StoreId) {
        let reign = self.reign.as_mut().expect("a primary reigns");
        let resync = reign.resyncs.get_mut(&store).expect("caught up");
        if reign.pending_admit != Some(store) || resync.is_proposed {
            return;
        }
        resync.is_proposed = true;
        let regions = resync.copied;
        ctx.out.push(Effect::Note(Note::CaughtUp { store, regions }));
        let transition = self.admission(store);
        if let Some(transition) = transition {
            self.propose(ctx, transition);
        }
    }

    fn admission(&self, store: StoreId) -> Option<Transition> {
        let member = self.stored.conf.as_ref()?.on_store(store)?;
        Some(Transition::Admit { copy: member.copy, incarnation: member.incarnation })
    }

    // ------------------------------------------------------------------------------------ time --

    /// What learners ask for: to be admitted, or to be given up.
    pub(super) fn wanted_of_learners(&self, ctx: &Ctx<'_, '_>) -> Option<Transition> {
        let reign = self.reign.as_ref()?;
        let conf = self.stored.conf.as_ref()?;
        for (&store, resync) in &reign.resyncs {
            let member = conf.on_store(store)?;
            let is_silent = resync.owes(reign) && ctx.now >= resync.heard.after_millis(SILENT_MS);
            if is_silent || self.is_lost(member) || resync.mismatches >= MISMATCHES_MAX {
                // A pending admission may race with this cancel: the conductor decides which of
                // them comes first, and the next configuration tells.
                return Some(Transition::Cancel { copy: member.copy });
            }
            if resync.is_proposed {
                return self.admission(store);
            }
        }
        None
    }

    pub(super) fn tick_resyncs(&mut self, ctx: &mut Ctx<'_, '_>) {
        if !self.reign().is_serving() {
            return;
        }
        let now = ctx.now;
        let stores: Vec<StoreId> = self.reign().resyncs.keys().copied().collect();
        for store in stores {
            let resync = self.reign().resyncs.get_mut(&store).expect("just listed");
            let to = resync.to;
            let must_ask =
                !resync.is_known && resync.asked.is_none_or(|at| now >= at.after_millis(REPEAT_MS));
            if must_ask {
                resync.asked = Some(now);
                self.ask_tails_of(ctx, to);
                continue;
            }
            resync.redirty_late(now);
            let is_late = |job: &Job| now >= job.began.after_millis(SILENT_MS);
            if resync.job.as_ref().is_some_and(is_late) {
                self.drop_job(ctx, store);
            }
            let is_refusal_believed = self.mutant(Mutant::RefusalIsOutcome);
            let reign = self.reign();
            if is_refusal_believed && reign.resyncs[&store].is_proposed {
                // Seeded bug: no configuration has come, so the proposal must have failed. All of
                // it is tried again, and until then the learner counts for nothing.
                let resync = reign.resyncs.get_mut(&store).expect("just listed");
                (resync.is_known, resync.is_proposed) = (false, false);
                reign.pending_admit = None;
            }
            self.poke(ctx, store);
        }
    }

    /// A job did not succeed: its region is needed still.
    pub(super) fn abandon_job(&mut self, ctx: &mut Ctx<'_, '_>, store: StoreId, number: u64) {
        let Some(resync) = self.reign().resyncs.get_mut(&store) else { return };
        let is_it = |job: &Job| {
            u64::from(job.number) == if job.is_digest { number } else { number >> PART_BITS }
        };
        if resync.job.as_ref().is_some_and(is_it) {
            self.drop_job(ctx, store);
        }
    }

    fn drop_job(&mut self, ctx: &mut Ctx<'_, '_>, store: StoreId) {
        let Some(resync) = self.reign().resyncs.get_mut(&store) else { return };
        let Some(job) = resync.job.take() else { return };
        if job.is_digest {
            resync.unverified.insert(job.region);
        } else {
            resync.dirty.insert(job.region);
        }
        if !matches!(job.stage, Stage::Sent(_)) {
            self.unhold_job(ctx, job.region);
        }
    }

    fn unhold_job(&mut self, ctx: &mut Ctx<'_, '_>, region: u32) {
        if !self.mutant(Mutant::NoRegionLock) {
            self.release_region(ctx, region);
        }
    }
}

impl Resync {
    /// Whether the learner owes an answer.
    fn owes(&self, reign: &Reign) -> bool {
        !self.is_known || self.job.is_some() || reign.pending_admit == Some(self.to.0)
    }
}

/// Blocks `at..at + count` of a list of buffers, sharing their pages.
fn blocks_in(list: &BufList, at: u32, count: u32) -> BufList {
    let (mut skip, mut left) = (at as usize * BLOCK_BYTES, count as usize * BLOCK_BYTES);
    let mut out = BufList::new();
    for buf in list {
        let from = skip.min(buf.len());
        skip -= from;
        let to = (from + left).min(buf.len());
        if from < to {
            left -= to - from;
            out.push(buf.slice(from..to));
        }
    }
    assert_eq!(left, 0, "the list is long enough");
    out
}
