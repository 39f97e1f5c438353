//! Showing that all in-sync replicas are equal, on demand (`pf volume verify`).
//!
//! Region by region, as at an admission: no new lsn is given in the region, what is uncommitted there
//! commits, then every ISR member computes its digest of the visible content, which reads and checks
//! every block. So it compares at equal lsn without stopping the shard. A member that does not answer
//! is asked again a few times; what the configuration changes meanwhile begins the region anew.

use super::follower::digest_of;
use super::{Command, Ctx, Effect, Kind, RESEND_MS, Replica, Work};
use crate::conf::StoreId;
use lane::{Op, Outcome, Problem, REGION_BLOCKS};
use proto::wire::{Digest, RequestOp};
use proto::{Status, Tick};
use std::collections::BTreeMap;

/// Times that a region is tried before the verification is given up.
const TRIES: u32 = 20;

/// What a verification has found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VerifyReport {
    /// Regions compared.
    pub regions: u32,
    /// Copies compared, the primary's own included.
    pub copies: u32,
    /// Regions whose content is not the primary's, with the store that differs.
    pub different: Vec<(u32, StoreId)>,
    /// Regions with blocks that cannot be read, with the store that cannot.
    pub unreadable: Vec<(u32, StoreId)>,
}

/// A verification under way.
pub(super) struct Verify {
    token: u64,
    region: u32,
    tries: u32,
    /// Number of the present attempt, and when it began.
    attempt: Option<(u32, Tick)>,
    is_reading: bool,
    /// Own digest; `Some(None)`: unreadable.
    own: Option<Option<u128>>,
    /// Digests of the others; `None`: unreadable there.
    others: BTreeMap<StoreId, Option<u128>>,
    report: VerifyReport,
}

impl Replica {
    /// How far a verification is: regions done, and of how many.
    #[must_use]
    pub fn verifying(&self) -> Option<(u32, u32)> {
        let verify = self.reign.as_ref()?.verify.as_ref()?;
        Some((verify.region, self.blocks.div_ceil(REGION_BLOCKS)))
    }

    /// Begin to compare all in-sync replicas; answered by exactly one `Effect::Verified`.
    pub(super) fn verify(&mut self, ctx: &mut Ctx<'_, '_>, token: u64) {
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
            region: 0,
            tries: 0,
            attempt: None,
            is_reading: false,
            own: None,
            others: BTreeMap::new(),
            report: VerifyReport { copies, ..VerifyReport::default() },
        });
        self.verify_region(ctx);
    }

    /// Begin an attempt at the present region.
    fn verify_region(&mut self, ctx: &mut Ctx<'_, '_>) {
        let regions = self.blocks.div_ceil(REGION_BLOCKS);
        let number = self.next_job();
        let now = ctx.now;
        let reign = self.reign();
        let verify = reign.verify.as_mut().expect("under way");
        if verify.region >= regions {
            return self.end_verify(ctx, Ok(()));
        }
        verify.tries += 1;
        if verify.tries > TRIES {
            return self.end_verify(ctx, Err(Status::TimedOut));
        }
        (verify.attempt, verify.is_reading) = (Some((number, now)), false);
        (verify.own, verify.others) = (None, BTreeMap::new());
        let region = verify.region;
        reign.hold(region);
        self.poke_verify(ctx);
    }

    /// Read the region once nothing uncommitted is in it.
    pub(super) fn poke_verify(&mut self, ctx: &mut Ctx<'_, '_>) {
        let Some(reign) = &mut self.reign else { return };
        let Some(verify) = &reign.verify else { return };
        let Some((number, _)) = verify.attempt else { return };
        let region = verify.region;
        if verify.is_reading || !reign.is_serving() || !reign.is_quiet(region) {
            return;
        }
        let (epoch, lsn) = (reign.epoch, reign.commit_lsn());
        reign.verify.as_mut().expect("looked at above").is_reading = true;
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
        verify.report.regions += 1;
        (verify.region, verify.tries, verify.attempt) = (region + 1, 0, None);
        self.release_region(ctx, region);
        self.verify_region(ctx);
    }

    /// Try again what was not answered in time.
    pub(super) fn tick_verify(&mut self, ctx: &mut Ctx<'_, '_>) {
        let now = ctx.now;
        let Some(verify) = &self.reign().verify else { return };
        let Some((_, began)) = verify.attempt else { return };
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
