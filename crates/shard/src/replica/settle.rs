//! The beginning of a reign: tails collected, every block in doubt settled, promises waited out.
//!
//! A write of the last reign that was not acknowledged may be on some members and not on others. The
//! new primary asks every ISR member for the records above its watermark and writes, for each block
//! in the *union* of all tails, its own present content to every member as a new operation with a new
//! lsn; old lsns are never sent again. So such a write is everywhere or nowhere before anybody reads
//! (section 5). A block that cannot be read here is taken from a member that can; one that nobody can
//! read for a while is poisoned on all of them: an error until it is overwritten, never guessed data,
//! and never something else on the next primary.

use super::Effect;
use super::follower::{Body, blocks_of};
use super::reign::{Owner, Phase, Reign};
use super::{Command, Ctx, Kind, Mutant, Note, RESEND_MS, Replica, Role, SILENT_MS, Work};
use crate::conf::{Incarnation, ShardConf, StoreId};
use lane::lane::REQUEST_BLOCKS_MAX;
use lane::{Op, Outcome, Problem};
use proto::wire::{CheckedData, RequestOp, TailRecord, Tails};
use proto::{BLOCK_BYTES, Lsn, Seq, Tick};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Settling operations and reads at a time.
const PARALLEL_MAX: usize = 64;

/// How far the beginning has come.
pub(super) struct Settling {
    /// Members whose tails have come; all of them when `is_asking` is over.
    answered: BTreeSet<StoreId>,
    is_asking: bool,
    asked: Tick,
    highest: Seq,
    /// Blocks to settle: first, number.
    queue: VecDeque<(u32, u32)>,
    /// Contents that found no room for their lsn.
    stash: Vec<Body>,
    /// Own reads under way.
    reading: usize,
    /// Blocks that cannot be read here.
    unreadable: BTreeMap<u32, Unreadable>,
    /// Blocks that are tried again with the next tick: first, number.
    later: Vec<(u32, u32)>,
}

/// What blocks of the own copy show.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    Data,
    /// Zeros that are not stored.
    Nothing,
    /// Known to be lost.
    Poison,
}

struct Unreadable {
    problem: Problem,
    /// Members that were asked for it.
    asked: Vec<StoreId>,
}

impl Settling {
    fn add(&mut self, records: &[TailRecord]) {
        for record in records {
            self.highest = self.highest.max(record.lsn.seq);
            self.queue.push_back(blocks_of(record.range));
        }
    }

    /// Sort the blocks of all tails and join what overlaps.
    fn join(&mut self, blocks: u32) {
        let mut ranges: Vec<(u32, u32)> = std::mem::take(&mut self.queue).into();
        ranges.sort_unstable();
        for (first, count) in ranges {
            let end = first.saturating_add(count).min(blocks);
            match self.queue.back_mut() {
                Some(last) if first <= last.0 + last.1 => {
                    last.1 = last.1.max(end.saturating_sub(last.0));
                }
                _ if first < end => self.queue.push_back((first, end - first)),
                _ => {}
            }
        }
    }
}

impl Replica {
    fn settling(&mut self) -> Option<&mut Settling> {
        match &mut self.reign.as_mut()?.phase {
            Phase::Settling(settling) => Some(settling),
            Phase::Active => None,
        }
    }

    /// Become primary.
    pub(super) fn begin_reign(&mut self, ctx: &mut Ctx<'_, '_>) {
        let shard = ctx.view.tables.shard(self.options.shard_ix).expect("the lane holds it");
        let regions = shard.regions.iter().map(|value| Seq(value >> 1)).max();
        let commit = shard.commit.max(self.follower.commit);
        // A history that a person forced has seqs of its own.
        let first = self.stored.conf.as_ref().map_or(Seq(0), ShardConf::first_seq);
        let highest = commit.max(shard.applied.seq).max(regions.unwrap_or_default()).max(first);
        let mut settling = Settling {
            answered: BTreeSet::new(),
            is_asking: true,
            asked: ctx.now,
            highest,
            queue: VecDeque::new(),
            stash: Vec::new(),
            reading: 0,
            unreadable: BTreeMap::new(),
            later: Vec::new(),
        };
        settling.add(&self.tail_records(ctx));
        self.reign = Some(Reign::new(self.epoch(), ctx.now, commit, settling));
        self.keep_resyncs(ctx);
        self.claim(ctx);
        self.ask_tails(ctx);
        self.tails_complete(ctx);
    }

    fn ask_tails(&mut self, ctx: &mut Ctx<'_, '_>) {
        let required = self.required(false);
        let now = ctx.now;
        let Some(settling) = self.settling() else { return };
        settling.asked = now;
        let answered = settling.answered.clone();
        for to in required {
            if !answered.contains(&to.0) {
                self.ask_tails_of(ctx, to);
            }
        }
    }

    /// Ask one replica for what it has above its watermark.
    pub(super) fn ask_tails_of(&self, ctx: &mut Ctx<'_, '_>, to: (StoreId, Incarnation)) {
        let command_id = Command { kind: Kind::Tails, number: 0 }.id();
        self.send(ctx, to, command_id, Lsn::default(), RequestOp::Tails);
    }

    pub(super) fn tails_came(&mut self, ctx: &mut Ctx<'_, '_>, from: StoreId, tails: Tails) {
        let is_required = self.required(false).iter().any(|(store, _)| *store == from);
        if !is_required {
            return self.learner_answered(ctx, from, &tails);
        }
        let Some(settling) = self.settling() else { return };
        if !settling.is_asking || !settling.answered.insert(from) {
            return;
        }
        settling.add(&tails.records);
        settling.highest = settling.highest.max(tails.complete_lsn.seq);
        let reign = self.reign();
        reign.commit = reign.commit.max(tails.complete_lsn.seq);
        self.tails_complete(ctx);
    }

    /// Go on once every ISR member's tail is here.
    fn tails_complete(&mut self, ctx: &mut Ctx<'_, '_>) {
        let required = self.required(false);
        let (blocks, own_only) = (self.blocks, self.mutant(Mutant::SettleOwnTailOnly));
        let Some(settling) = self.settling() else { return };
        let is_complete = required.iter().all(|(store, _)| settling.answered.contains(store));
        if !settling.is_asking || !is_complete {
            return;
        }
        settling.is_asking = false;
        settling.join(blocks);
        let next = settling.highest.0 + 1;
        self.reign().next_seq = next;
        if own_only {
            // Seeded bug: what only others have in their tails stays as it is.
            let own = self.tail_records(ctx);
            let settling = self.settling().expect("just looked at");
            settling.queue.clear();
            settling.add(&own);
            settling.join(blocks);
        }
        self.settle_more(ctx);
    }

    /// Settle as much as may be under way at a time; serve when nothing is left.
    pub(super) fn settle_more(&mut self, ctx: &mut Ctx<'_, '_>) {
        loop {
            let open = self.reign().open.len();
            let Some(settling) = self.settling() else { return };
            if settling.is_asking || open + settling.reading >= PARALLEL_MAX {
                return;
            }
            if let Some(body) = settling.stash.pop() {
                if !self.settle(ctx, body) {
                    return;
                }
                continue;
            }
            let Some((first, count)) = settling.queue.pop_front() else { break };
            let (here, shown) = self.run_of(ctx, first, count);
            let settling = self.settling().expect("just looked at");
            if here < count {
                settling.queue.push_front((first + here, count - here));
            }
            // Another member may have the content of a block that is poisoned here.
            if shown != Shown::Nothing {
                settling.reading += 1;
                let (reign, shard_ix) = (self.reign().epoch, self.options.shard_ix);
                let request = Op::Read { shard_ix, first, count: here, with_poison: false };
                self.lane(ctx, Work::Settle { reign, first, count: here }, request);
            } else if !self.settle(ctx, Body::Discard { first, count: here }) {
                return;
            }
        }
        self.try_activate(ctx);
    }

    /// How many blocks from `first` show the same kind of thing.
    pub(super) fn run_of(&self, ctx: &Ctx<'_, '_>, first: u32, count: u32) -> (u32, Shown) {
        let (tables, shard_ix) = (ctx.view.tables, self.options.shard_ix);
        let shown = |block: u32| {
            if tables.is_poisoned(shard_ix, block) {
                Shown::Poison
            } else if tables.has_content(shard_ix, block) {
                Shown::Data
            } else {
                Shown::Nothing
            }
        };
        let (kind, most) = (shown(first), count.min(REQUEST_BLOCKS_MAX));
        ((first..first + most).take_while(|&block| shown(block) == kind).count() as u32, kind)
    }

    /// Give a content its new lsn; false when it has to wait.
    fn settle(&mut self, ctx: &mut Ctx<'_, '_>, body: Body) -> bool {
        match self.assign(ctx, Owner::Settling, body) {
            Ok(_) => true,
            Err(body) => {
                self.settling().expect("only settling calls").stash.push(body);
                false
            }
        }
    }

    /// A settling operation is committed, or the own disk has failed it and there is nobody else.
    pub(super) fn settled(&mut self, ctx: &mut Ctx<'_, '_>, blocks: (u32, u32), is_done: bool) {
        if let Some(settling) = self.settling().filter(|_| !is_done) {
            settling.later.push(blocks);
        }
        self.settle_more(ctx);
    }

    pub(super) fn settle_read(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        (first, count): (u32, u32),
        result: Result<Outcome, Problem>,
    ) {
        let Some(settling) = self.settling() else { return };
        settling.reading -= 1;
        match result {
            Ok(Outcome::Read { data, crcs }) => {
                settling.stash.push(Body::Write { first, crcs, data });
            }
            Ok(Outcome::Done | Outcome::Created { .. }) => unreachable!("a read brings data"),
            Err(_) if count > 1 => {
                (first..first + count).for_each(|block| settling.queue.push_back((block, 1)));
            }
            Err(problem) => {
                settling.unreadable.insert(first, Unreadable { problem, asked: Vec::new() });
                self.ask_content(ctx, first);
            }
        }
        self.settle_more(ctx);
    }

    /// Ask the next member for a block that cannot be read here.
    fn ask_content(&mut self, ctx: &mut Ctx<'_, '_>, block: u32) {
        let required = self.required(false);
        let reign = self.reign().epoch.0;
        let Some(settling) = self.settling() else { return };
        let Some(unreadable) = settling.unreadable.get_mut(&block) else { return };
        match required.iter().find(|(store, _)| !unreadable.asked.contains(store)) {
            Some(&(to, _)) => {
                unreadable.asked.push(to);
                let number = (reign & 0xff_ffff) << 32 | u64::from(block);
                let command = Command { kind: Kind::Read, number };
                self.ask_blocks(ctx, to, command, block, 1);
            }
            None => {
                let Unreadable { problem, .. } =
                    settling.unreadable.remove(&block).expect("looked at above");
                if self.reign().is_lost(block, &problem, required.is_empty()) {
                    self.damage.lose(block);
                    ctx.out.push(Effect::Note(Note::Lost { block }));
                    self.settle(ctx, Body::Poison { first: block, count: 1 });
                } else {
                    self.settling().expect("looked at above").later.push((block, 1));
                }
                self.settle_more(ctx);
            }
        }
    }

    /// A member has answered what a block holds that cannot be read here.
    pub(super) fn content_came(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        number: u64,
        content: Option<CheckedData>,
    ) {
        let reign = self.reign.as_ref().map_or(0, |reign| reign.epoch.0);
        let block = (number & 0xffff_ffff) as u32;
        let Some(settling) = self.settling() else { return };
        if number >> 32 != reign & 0xff_ffff || !settling.unreadable.contains_key(&block) {
            return;
        }
        match content.filter(|content| content.length() as usize == BLOCK_BYTES) {
            Some(content) => {
                settling.unreadable.remove(&block);
                let (crcs, data) = content.into_parts();
                settling.stash.push(Body::Write { first: block, crcs, data });
                self.settle_more(ctx);
            }
            None => self.ask_content(ctx, block),
        }
    }

    /// Serve, if everything is settled and no promise or boot wait stands against it.
    fn try_activate(&mut self, ctx: &mut Ctx<'_, '_>) {
        let may_serve = self.may_serve(ctx);
        let reign = self.reign.as_mut().expect("settling");
        let Phase::Settling(settling) = &reign.phase else { return };
        let is_settled = !settling.is_asking
            && settling.queue.is_empty()
            && settling.stash.is_empty()
            && settling.reading == 0
            && settling.unreadable.is_empty()
            && settling.later.is_empty()
            && reign.open.is_empty();
        if !is_settled || !may_serve || reign.is_suspended {
            return;
        }
        reign.commit = Seq(reign.next_seq - 1);
        reign.phase = Phase::Active;
        self.set_role(ctx, Role::Active);
        self.unpark(ctx);
        self.mend_known(ctx);
    }

    /// Whether nobody else may still be serving (section 4): own promises have ended, and those of an
    /// earlier life too, unless that life's primary is known to be over.
    fn may_serve(&self, ctx: &Ctx<'_, '_>) -> bool {
        let has_promised = ctx.now < ctx.view.leases.promised_until(self.shard)
            && !self.mutant(Mutant::NoPromiseWait);
        let boot_end = self.options.booted.after_nanos(self.options.timing.grace_nanos);
        let must_wait = self.boot_primary.is_some_and(|(store, incarnation)| {
            let is_over = self.dead.get(&store).is_some_and(|&newest| incarnation <= newest);
            store != self.options.store && !is_over
        });
        let is_waiting = ctx.now < boot_end && must_wait && !self.mutant(Mutant::NoBootWait);
        !has_promised && !is_waiting
    }

    pub(super) fn settling_reconfigured(&mut self, ctx: &mut Ctx<'_, '_>) {
        if self.settling().is_none() {
            return;
        }
        // Members that have left the ISR answer no more; who is left is asked once more.
        let blocks: Vec<u32> =
            self.settling().map_or(Vec::new(), |s| s.unreadable.keys().copied().collect());
        for block in blocks {
            self.ask_content(ctx, block);
        }
        self.ask_tails(ctx);
        self.tails_complete(ctx);
        self.settle_more(ctx);
    }

    pub(super) fn tick_settling(&mut self, ctx: &mut Ctx<'_, '_>) {
        let now = ctx.now;
        let Some(settling) = self.settling() else { return };
        let is_due = now >= settling.asked.after_millis(RESEND_MS);
        if is_due && settling.is_asking {
            self.ask_tails(ctx);
        } else if is_due {
            settling.asked = now;
            settling.queue.extend(settling.later.drain(..));
            // An answer may have been lost: begin again with the first member.
            settling.unreadable.values_mut().for_each(|unreadable| unreadable.asked.clear());
            let blocks: Vec<u32> = settling.unreadable.keys().copied().collect();
            blocks.into_iter().for_each(|block| self.ask_content(ctx, block));
        }
        self.settle_more(ctx);
    }

    /// Whether a member has let the new primary wait for its tail.
    pub(super) fn owes_tails(&self, ctx: &Ctx<'_, '_>, store: StoreId) -> bool {
        let Some(reign) = &self.reign else { return false };
        match &reign.phase {
            Phase::Settling(settling) => {
                settling.is_asking
                    && !settling.answered.contains(&store)
                    && ctx.now >= reign.began.after_millis(SILENT_MS)
            }
            Phase::Active => false,
        }
    }
}
