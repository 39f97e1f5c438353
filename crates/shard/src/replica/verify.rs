//! Showing that all in-sync replicas are equal, on demand (`pf volume verify`).
//!
//! Region by region, as at an admission: no new lsn is given in the region, what is uncommitted
//! there commits, then every ISR member computes its digest of the visible content, which reads and
//! checks every block. So it compares at equal lsn without stopping the shard. A member that does
//! not answer is asked again a few times; what the configuration changes meanwhile begins the
//! region anew.
//!
//! **Repairing.** Where a copy of a region cannot be read, its damaged blocks are searched: here by
//! probes (`damage.rs`), at a member by asking for the region's blocks and halving what it refuses.
//! Each is mended (`repair.rs`); when nothing is left to do the region is compared once more, and
//! what cannot be read then is reported. No lsn is held back meanwhile.
//!
//! **How fast.** As fast as a resync that is not urgent (`pace.rs`): while clients are there, 20 %
//! of the time. All verifications in a lane take turns.

use super::damage::Mend;
use super::follower::digest_of;
use super::pace::Turn;
use super::repair::is_media;
use super::{Command, Ctx, Effect, Kind, Mutant, RESEND_MS, Replica, Work};
use crate::conf::StoreId;
use lane::{Op, Outcome, Problem, REGION_BLOCKS};
use proto::wire::{Digest, RequestOp};
use proto::{Status, Tick};
use std::collections::BTreeMap;

/// Times that a region is tried before the verification is given up.
const TRIES: u32 = 20;
/// Questions to one member that searches for its damaged blocks.
const SEARCH_MAX: usize = 2;
/// Time that the mending of one region may take: 256 blocks by a disk that needs 100 ms for each.
const MENDING_MS: u64 = 30_000;

/// What a verification has found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VerifyReport {
    /// Regions compared.
    pub regions: u32,
    /// Copies of which every region was compared, the primary's own included.
    pub copies: u32,
    /// Regions whose content is not the primary's, with the store that differs.
    pub different: Vec<(u32, StoreId)>,
    /// Regions with blocks that cannot be read, with the store that cannot.
    pub unreadable: Vec<(u32, StoreId)>,
    /// Damaged blocks that were written again.
    pub mended_blocks: u32,
}

/// A verification under way.
pub(super) struct Verify {
    token: u64,
    is_repairing: bool,
    region: u32,
    tries: u32,
    /// Number of the present attempt, and when it began; without one and without `mending` the
    /// region waits for its turn.
    attempt: Option<(u32, Tick)>,
    turn: Option<Turn>,
    /// Damaged blocks of the region are searched and mended.
    mending: Option<Mending>,
    /// That was done already.
    is_mended: bool,
    is_reading: bool,
    /// Own digest; `Some(None)`: unreadable.
    own: Option<Option<u128>>,
    /// Digests of the others; `None`: unreadable there.
    others: BTreeMap<StoreId, Option<u128>>,
    report: VerifyReport,
}

struct Mending {
    began: Tick,
    searches: BTreeMap<StoreId, Search>,
}

/// Blocks that a member may not be able to read.
struct Search {
    waiting: Vec<(u32, u32)>,
    /// First block, number and time of each question, by its number.
    asked: BTreeMap<u32, (u32, u32, Tick)>,
}

impl Replica {
    /// How far a verification is: regions done, and of how many.
    #[must_use]
    pub fn verifying(&self) -> Option<(u32, u32)> {
        let verify = self.reign.as_ref()?.verify.as_ref()?;
        Some((verify.region, self.blocks.div_ceil(REGION_BLOCKS)))
    }

    /// Begin to compare all in-sync replicas; answered by exactly one `Effect::Verified`.
    pub(super) fn verify(&mut self, ctx: &mut Ctx<'_, '_>, token: u64, is_repairing: bool) {
        let refusal = match &self.reign {
            Some(reign) if reign.verify.is_some() => Some(Status::Busy),
            Some(reign) if reign.is_serving() => None,
            Some(_) | None => Some(Status::NotPrimary),
        };
        if let Some(status) = refusal {
            return ctx.out.push(Effect::Verified { token, result: Err(status) });
        }
        let copies = 1 + self.required(false).len() as u32;
        self.reign().verify = Some(Verify {
            token,
            is_repairing,
            region: 0,
            tries: 0,
            attempt: None,
            turn: None,
            mending: None,
            is_mended: false,
            is_reading: false,
            own: None,
            others: BTreeMap::new(),
            report: VerifyReport { copies, ..VerifyReport::default() },
        });
        self.verify_region(ctx);
    }

    /// Whether a verification under way mends what it finds.
    pub(super) fn is_repairing(&self) -> bool {
        let verify = self.reign.as_ref().and_then(|reign| reign.verify.as_ref());
        verify.is_some_and(|verify| verify.is_repairing)
    }

    /// Begin an attempt at the present region, when its turn has come.
    fn verify_region(&mut self, ctx: &mut Ctx<'_, '_>) {
        let regions = self.blocks.div_ceil(REGION_BLOCKS);
        let number = self.next_job();
        let (now, pace) = (ctx.now, ctx.view.pace);
        let reign = self.reign();
        let verify = reign.verify.as_mut().expect("under way");
        if verify.region >= regions {
            return self.end_verify(ctx, Ok(()));
        }
        if verify.tries >= TRIES {
            return self.end_verify(ctx, Err(Status::TimedOut));
        }
        match pace.verifies().begin(now, pace.is_busy(now), false) {
            Ok(turn) => verify.turn = Some(turn),
            Err(at) => return self.wake_at(ctx, at),
        }
        verify.tries += 1;
        (verify.attempt, verify.is_reading) = (Some((number, now)), false);
        (verify.own, verify.others) = (None, BTreeMap::new());
        let region = verify.region;
        reign.hold(region);
        self.poke_verify(ctx);
    }

    /// Read the region once nothing uncommitted is in it; or go on with its mending.
    pub(super) fn poke_verify(&mut self, ctx: &mut Ctx<'_, '_>) {
        let Some(reign) = &mut self.reign else { return };
        let Some(verify) = &reign.verify else { return };
        if verify.mending.is_some() {
            return self.drive_mending(ctx);
        }
        let Some((number, _)) = verify.attempt else { return };
        let region = verify.region;
        if verify.is_reading || !reign.is_serving() || !reign.is_quiet(region) {
            return;
        }
        let (epoch, lsn) = (reign.epoch, reign.commit_lsn());
        let verify = reign.verify.as_mut().expect("looked at above");
        verify.is_reading = true;
        if let Some(turn) = &mut verify.turn {
            turn.work(ctx.now);
        }
        for to in self.required(false) {
            let command_id = Command { kind: Kind::Verify, number: u64::from(number) }.id();
            self.send(ctx, to, command_id, lsn, |peer| {
                RequestOp::Digest(Digest {
                    peer,
                    resync_id: 0,
                    layer_snap_seq: 0,
                    first_region: region,
                    region_count: 1,
                })
            });
        }
        let (first, count) = self.region_range(region);
        let shard_ix = self.options.shard_ix;
        let request = Op::Read { shard_ix, first, count, with_poison: false };
        self.lane(ctx, Work::VerifyRead { reign: epoch, number }, request);
    }

    pub(super) fn verify_read(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        number: u32,
        result: Result<Outcome, Problem>,
    ) {
        let digest = result.ok().map(|outcome| digest_of(&outcome));
        if let Some(verify) = self.attempt_numbered(number) {
            verify.own = Some(digest);
            self.compare(ctx);
        }
    }

    /// A member has its digest, or cannot read the region.
    pub(super) fn verify_came(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        from: StoreId,
        number: u64,
        digest: Option<u128>,
    ) {
        let Ok(number) = u32::try_from(number) else { return };
        if let Some(verify) = self.attempt_numbered(number) {
            verify.others.insert(from, digest);
            self.compare(ctx);
        }
    }

    fn attempt_numbered(&mut self, number: u32) -> Option<&mut Verify> {
        let verify = self.reign.as_mut()?.verify.as_mut()?;
        verify.attempt.is_some_and(|attempt| attempt.0 == number).then_some(verify)
    }

    fn compare(&mut self, ctx: &mut Ctx<'_, '_>) {
        let required = self.required(false);
        let me = self.options.store;
        let verify = self.reign().verify.as_mut().expect("under way");
        let is_complete = required.iter().all(|(store, _)| verify.others.contains_key(store));
        let Some(own) = verify.own.filter(|_| is_complete) else { return };
        if let Some(turn) = verify.turn.take() {
            ctx.view.pace.verifies().end(ctx.now, turn);
        }
        let is_unreadable = own.is_none() || verify.others.values().any(Option::is_none);
        if is_unreadable && verify.is_repairing && !verify.is_mended {
            return self.begin_mending(ctx);
        }
        let region = verify.region;
        let others = required.iter().map(|(store, _)| (*store, verify.others[store]));
        let digests: Vec<(StoreId, Option<u128>)> =
            std::iter::once((me, own)).chain(others).collect();
        for (store, digest) in digests {
            match digest {
                None => verify.report.unreadable.push((region, store)),
                // Where the own content cannot be read, the others are compared with nothing.
                Some(_) if own.is_none() || digest == own => {}
                Some(_) => verify.report.different.push((region, store)),
            }
        }
        let copies = 1 + required.len() as u32;
        verify.report.copies = verify.report.copies.min(copies);
        verify.report.regions += 1;
        (verify.region, verify.tries, verify.attempt) = (region + 1, 0, None);
        verify.is_mended = false;
        self.release_region(ctx, region);
        self.verify_region(ctx);
    }

    // -------------------------------------------------------------------------------- repairing --

    /// Search the damaged blocks of the present region, and mend them. Those here are being
    /// searched already, since the lane has said that it cannot read the region.
    fn begin_mending(&mut self, ctx: &mut Ctx<'_, '_>) {
        let now = ctx.now;
        let verify = self.reign().verify.as_mut().expect("under way");
        let region = verify.region;
        let unreadable = verify.others.iter().filter(|(_, digest)| digest.is_none());
        let stores: Vec<StoreId> = unreadable.map(|(&store, _)| store).collect();
        let range = self.region_range(region);
        let search = || Search { waiting: vec![range], asked: BTreeMap::new() };
        let searches = stores.into_iter().map(|store| (store, search())).collect();
        let verify = self.reign().verify.as_mut().expect("under way");
        verify.mending = Some(Mending { began: now, searches });
        verify.is_mended = true;
        self.abandon_attempt(ctx);
        self.drive_mending(ctx);
    }

    fn mending(&mut self) -> Option<&mut Mending> {
        self.reign.as_mut()?.verify.as_mut()?.mending.as_mut()
    }

    /// Ask what is to be asked; compare the region again when nothing is left to search or to mend.
    fn drive_mending(&mut self, ctx: &mut Ctx<'_, '_>) {
        let (now, required) = (ctx.now, self.required(false));
        let Some(mending) = self.mending() else { return };
        let is_late = now >= mending.began.after_millis(MENDING_MS);
        // Who has left the ISR is asked no more.
        mending.searches.retain(|store, search| {
            let is_over = search.waiting.is_empty() && search.asked.is_empty();
            !is_over && required.iter().any(|(other, _)| other == store)
        });
        let mut questions = Vec::new();
        for (&store, search) in &mut mending.searches {
            let room = SEARCH_MAX.saturating_sub(search.asked.len());
            for _ in 0..room {
                questions.extend(search.waiting.pop().map(|blocks| (store, blocks)));
            }
        }
        for (to, (first, count)) in questions {
            let number = self.next_job();
            let search = self.mending().and_then(|mending| mending.searches.get_mut(&to));
            let search = search.expect("just looked at");
            search.asked.insert(number, (first, count, now));
            let command = Command { kind: Kind::Repair, number: u64::from(number) };
            self.ask_blocks(ctx, to, command, first, count);
        }
        let reign = self.reign.as_ref().expect("a primary verifies");
        let verify = reign.verify.as_ref().expect("under way");
        let region = verify.region;
        let is_searching = verify.mending.as_ref().is_some_and(|m| !m.searches.is_empty());
        let is_mending = is_searching
            || self.damage.is_probing(region)
            || reign.clients.repairs.mending(region).next().is_some();
        if !is_mending || is_late {
            self.reign().verify.as_mut().expect("under way").mending = None;
            self.verify_region(ctx);
        }
    }

    /// A member has read blocks that were asked for only to see whether it can.
    pub(super) fn searched(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        from: StoreId,
        number: u32,
        result: Result<(), Status>,
    ) {
        // Seeded bug: what it cannot read is not remembered.
        let forgets = self.mutant(Mutant::MemberDamageForgotten);
        let search = self.mending().and_then(|mending| mending.searches.get_mut(&from));
        let Some(search) = search else { return };
        let Some(&(first, count, _)) = search.asked.get(&number) else { return };
        let mut damaged = None;
        match result {
            Err(status) if !is_media(status) => return, // Asked again when it is late.
            Err(_) if count > 1 => {
                let half = count / 2;
                search.waiting.extend([(first + half, count - half), (first, half)]);
            }
            Err(_) => damaged = Some(first).filter(|_| !forgets),
            Ok(()) => {}
        }
        search.asked.remove(&number);
        if let Some(block) = damaged {
            self.mend(ctx, block, Mend::Yes);
        }
        self.drive_mending(ctx);
    }

    /// A block was written again.
    pub(super) fn count_mended(&mut self, block: u32) {
        let Some(verify) = self.reign.as_mut().and_then(|reign| reign.verify.as_mut()) else {
            return;
        };
        if verify.mending.is_some() && block / REGION_BLOCKS == verify.region {
            verify.report.mended_blocks += 1;
        }
    }

    /// What was not answered in time is asked again.
    fn tick_mending(&mut self, ctx: &mut Ctx<'_, '_>) {
        let now = ctx.now;
        for search in self.mending().into_iter().flat_map(|m| m.searches.values_mut()) {
            let late = |since: Tick| now >= since.after_millis(RESEND_MS);
            let all = std::mem::take(&mut search.asked);
            for (number, (first, count, since)) in all {
                if late(since) {
                    search.waiting.push((first, count));
                } else {
                    search.asked.insert(number, (first, count, since));
                }
            }
        }
        self.drive_mending(ctx);
    }

    /// Try again what was not answered in time.
    pub(super) fn tick_verify(&mut self, ctx: &mut Ctx<'_, '_>) {
        let now = ctx.now;
        let Some(verify) = &self.reign().verify else { return };
        if verify.mending.is_some() {
            return self.tick_mending(ctx);
        }
        let Some((_, began)) = verify.attempt else { return self.verify_region(ctx) };
        if now >= began.after_millis(2 * RESEND_MS) {
            self.abandon_attempt(ctx);
            self.verify_region(ctx);
        } else {
            self.poke_verify(ctx);
        }
    }

    fn abandon_attempt(&mut self, ctx: &mut Ctx<'_, '_>) {
        let Some(verify) = &mut self.reign().verify else { return };
        let region = verify.region;
        if verify.attempt.take().is_some() {
            self.release_region(ctx, region);
        }
    }

    fn end_verify(&mut self, ctx: &mut Ctx<'_, '_>, result: Result<(), Status>) {
        self.abandon_attempt(ctx);
        if let Some(verify) = self.reign().verify.take() {
            let result = result.map(|()| verify.report);
            ctx.out.push(Effect::Verified { token: verify.token, result });
        }
    }
}

impl Verify {
    /// The reign is over.
    pub(super) fn into_token(self) -> u64 {
        self.token
    }
}
