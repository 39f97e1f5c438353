//! Blocks that are known to be unreadable, here and everywhere, and how they are made known.
//!
//! **What it owns.** `here`: blocks whose last read on this lane failed (a wrong checksum, an error
//! of the device that a second read met again, a poisoned block), in whatever role and whoever
//! asked. And `lost`, as primary: blocks that no in-sync replica could give. A block leaves both
//! when it is written, discarded, or read well: what the last read shows counts, because a device's
//! error may pass.
//!
//! **How it gets to know.** [`Replica::seen`] looks at the answer to every operation of the lane. A
//! read of several blocks names one that is damaged, at most; the others are found by reading
//! halves again (a *probe*), a few at a time, until every damaged block is known by its own number.
//! Damage that a probe finds at a primary that serves is mended (`repair.rs`), unless the probe is
//! only to look (`Mend::No`).
//!
//! **Bounds.** A set of runs costs memory for as long as the damage lasts, and a dying disk may
//! have millions of damaged blocks. Beyond [`RUNS_MAX`] runs a block that would begin another run
//! is left out, so the number told is a lower bound then. Probes that find no room in their queue
//! are forgotten: the next read meets the same damage.
//!
//! **What it costs.** While nothing is damaged: a look at two empty maps per operation.

use super::{Ctx, Replica, Work};
use lane::lane::REQUEST_BLOCKS_MAX;
use lane::record::RangeKind;
use lane::{Op, Outcome, Problem, REGION_BLOCKS};
use std::collections::{BTreeMap, VecDeque};

/// Runs that are remembered; beyond that, what is known is a lower bound.
const RUNS_MAX: usize = 4_096;
/// Runs that are told to people; the number of blocks counts the others too.
const RUNS_TOLD: usize = 64;

/// Probes that wait.
const PROBES_WAITING_MAX: usize = 4_096;
/// Probes that the lane works on; few, because clients wait for the same disk.
const PROBES_MAX: usize = 4;

/// Blocks that cannot be read, for people.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DamageFacts {
    /// First block and number of blocks, ascending and disjoint; the first 64.
    pub runs: Vec<(u32, u32)>,
    /// All of these blocks that are remembered, also in runs that are left out above.
    pub blocks: u64,
}

/// A set of blocks.
#[derive(Default)]
pub(super) struct Blocks {
    /// End of a run, by its first block. Runs neither overlap nor touch.
    runs: BTreeMap<u32, u32>,
    blocks: u64,
}

impl Blocks {
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    pub(super) fn contains(&self, block: u32) -> bool {
        self.runs.range(..=block).next_back().is_some_and(|(_, &end)| block < end)
    }

    /// Add a block; whether it is new and there was room for it.
    pub(super) fn insert(&mut self, block: u32) -> bool {
        if self.contains(block) {
            return false;
        }
        let before = self.runs.range(..block).next_back().map(|(&first, &end)| (first, end));
        let before = before.filter(|&(_, end)| end == block);
        let after = self.runs.get(&(block + 1)).copied();
        if before.is_none() && after.is_none() && self.runs.len() >= RUNS_MAX {
            return false;
        }
        if after.is_some() {
            self.runs.remove(&(block + 1));
        }
        let first = before.map_or(block, |(first, _)| first);
        self.runs.insert(first, after.unwrap_or(block + 1));
        self.blocks += 1;
        true
    }

    /// Take out what lies in a range; whether anything did.
    pub(super) fn remove(&mut self, first: u32, count: u32) -> bool {
        let end = first + count;
        let mut is_any = false;
        while let Some((&from, &to)) =
            self.runs.range(..end).next_back().filter(|(_, to)| **to > first)
        {
            self.runs.remove(&from);
            if to > end {
                self.runs.insert(end, to);
            }
            if from < first {
                self.runs.insert(from, first);
            }
            self.blocks -= u64::from(to.min(end) - from.max(first));
            is_any = true;
        }
        is_any
    }

    /// Its runs (first block, blocks), ascending.
    pub(super) fn runs(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.runs.iter().map(|(&first, &end)| (first, end - first))
    }

    pub(super) fn facts(&self) -> DamageFacts {
        DamageFacts { runs: self.runs().take(RUNS_TOLD).collect(), blocks: self.blocks }
    }
}

/// What is done about damage that is found.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Mend {
    /// The damage is only told.
    No,
    /// The block is written again if any member has a good copy.
    Yes,
    /// The same; a block that no member has is poisoned, because it stands against a new copy.
    OrPoison,
}

/// Blocks that are read again, to know which of them are damaged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe {
    first: u32,
    count: u32,
    mend: Mend,
    /// The device has failed to read this block already.
    is_again: bool,
}

/// What an operation of the lane does to blocks.
#[derive(Clone, Copy, Debug)]
pub(super) enum Touch {
    Nothing,
    Read { first: u32, count: u32, with_poison: bool },
    Change { first: u32, count: u32, is_poison: bool },
}

impl Touch {
    pub(super) fn of(op: &Op) -> Touch {
        match op {
            Op::Read { first, count, with_poison, .. } => {
                Touch::Read { first: *first, count: *count, with_poison: *with_poison }
            }
            Op::Write { first, crcs, .. } => {
                Touch::Change { first: *first, count: crcs.len() as u32, is_poison: false }
            }
            Op::Range { first, count, kind, .. } => {
                let is_poison = matches!(kind, RangeKind::Poison);
                Touch::Change { first: *first, count: *count, is_poison }
            }
            Op::Create { .. }
            | Op::Delete { .. }
            | Op::Resize { .. }
            | Op::Conf { .. }
            | Op::Commit { .. }
            | Op::Region { .. }
            | Op::Checkpoint
            | Op::Close => Touch::Nothing,
        }
    }
}

/// All that a replica knows of damage.
#[derive(Default)]
pub(super) struct Damage {
    here: Blocks,
    lost: Blocks,
    /// Blocks that entered `here` in this life, however short they stayed.
    found: u64,
    probes: VecDeque<Probe>,
    probing: Vec<Probe>,
}

impl Damage {
    /// Begin with the blocks that are poisoned in the map.
    pub(super) fn of_poisoned(blocks: impl Iterator<Item = u32>) -> Damage {
        let mut damage = Damage::default();
        blocks.for_each(|block| damage.know(block));
        damage
    }

    fn know(&mut self, block: u32) {
        self.found += u64::from(self.here.insert(block));
    }

    fn is_clean(&self) -> bool {
        self.here.is_empty() && self.lost.is_empty()
    }

    /// These blocks can be read again, or hold something else now.
    fn forget(&mut self, first: u32, count: u32) {
        if !self.is_clean() {
            self.here.remove(first, count);
            self.lost.remove(first, count);
        }
    }

    /// No in-sync replica could give this block.
    pub(super) fn lose(&mut self, block: u32) {
        self.lost.insert(block);
    }

    /// Another member had these blocks.
    pub(super) fn regain(&mut self, first: u32, count: u32) {
        self.lost.remove(first, count);
    }

    /// The reign is over: another one knows what is lost.
    pub(super) fn end_reign(&mut self) {
        self.lost = Blocks::default();
    }

    /// The blocks that are damaged here, at most so many.
    pub(super) fn first_of_here(&self, most: usize) -> Vec<u32> {
        self.here.runs().flat_map(|(first, count)| first..first + count).take(most).collect()
    }

    /// Whether a block is known to be damaged here.
    pub(super) fn is_here(&self, block: u32) -> bool {
        self.here.contains(block)
    }

    /// Whether blocks of a region are still being read again.
    pub(super) fn is_probing(&self, region: u32) -> bool {
        self.probes.iter().chain(&self.probing).any(|probe| probe.first / REGION_BLOCKS == region)
    }

    fn probe(&mut self, probe: Probe) {
        let is_same = |other: &&mut Probe| (other.first, other.count) == (probe.first, probe.count);
        if let Some(other) = self.probes.iter_mut().find(is_same) {
            other.mend = other.mend.max(probe.mend);
        } else if self.probes.len() < PROBES_WAITING_MAX {
            self.probes.push_back(probe);
        }
    }
}

/// Whether a read that failed so shows damage of blocks: another error says nothing about them.
pub(super) fn is_damage(problem: &Problem) -> bool {
    match problem {
        Problem::BadChecksum { .. } | Problem::Poisoned { .. } | Problem::Media { .. } => true,
        Problem::NoSpace { .. }
        | Problem::OutOfRange { .. }
        | Problem::NotFound { .. }
        | Problem::AlreadyExists { .. }
        | Problem::Limit { .. }
        | Problem::Stopped { .. } => false,
    }
}

impl Replica {
    /// What is known to be unreadable here.
    #[must_use]
    pub fn damaged(&self) -> DamageFacts {
        self.damage.here.facts()
    }

    /// As primary: blocks of which no copy is left that can be read.
    #[must_use]
    pub fn lost(&self) -> DamageFacts {
        self.damage.lost.facts()
    }

    /// Blocks that were found damaged here in this life, mended or not.
    #[must_use]
    pub fn damage_found(&self) -> u64 {
        self.damage.found
    }

    /// Whether this block is known to be unreadable here.
    #[must_use]
    pub fn is_damaged(&self, block: u32) -> bool {
        self.damage.is_here(block)
    }

    /// Read runs of blocks again.
    pub(super) fn check_blocks(&mut self, ctx: &mut Ctx<'_, '_>, runs: &[(u32, u32)]) {
        for &(first, count) in runs {
            let end = first.saturating_add(count).min(self.blocks);
            let mut first = first;
            while first < end {
                // A probe lies inside one region, so work on a region can see whether probes of it
                // are left.
                let region_end = (first / REGION_BLOCKS + 1) * REGION_BLOCKS;
                let count = (end.min(region_end) - first).min(REQUEST_BLOCKS_MAX);
                self.damage.probe(Probe { first, count, mend: Mend::Yes, is_again: false });
                first += count;
            }
        }
        self.start_probes(ctx);
    }

    /// Take note of what the lane's answer shows of its blocks.
    pub(super) fn seen(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        work: &Work,
        touch: Touch,
        result: &Result<Outcome, Problem>,
    ) {
        match (touch, result) {
            (Touch::Nothing, _) | (Touch::Change { .. }, Err(_)) => {}
            (Touch::Change { first, count, is_poison: true }, Ok(_)) => {
                (first..first + count).for_each(|block| self.damage.know(block));
            }
            (Touch::Change { first, count, .. }, Ok(_)) => self.damage.forget(first, count),
            (Touch::Read { first, count, with_poison: true }, Ok(_)) => {
                let (tables, shard_ix) = (ctx.view.tables, self.options.shard_ix);
                for block in first..first + count {
                    if tables.is_poisoned(shard_ix, block) {
                        self.damage.know(block);
                    } else {
                        self.damage.forget(block, 1);
                    }
                }
            }
            (Touch::Read { first, count, .. }, Ok(_)) => self.damage.forget(first, count),
            (Touch::Read { first, count, .. }, Err(problem)) if is_damage(problem) => {
                self.read_failed(ctx, work, (first, count), problem);
            }
            (Touch::Read { .. }, Err(_)) => {}
        }
    }

    /// A read has met damage. A wrong checksum of one block and poison name the block for certain,
    /// a device's error only once it comes again for this block alone.
    fn read_failed(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        work: &Work,
        (first, count): (u32, u32),
        problem: &Problem,
    ) {
        let is_certain = match problem {
            Problem::Poisoned { block } => {
                self.damage.know(*block);
                count == 1
            }
            // A read of several blocks may fail for damaged tags, and those do not tell which block
            // is bad.
            Problem::BadChecksum { block } if count == 1 => {
                self.damage.know(*block);
                true
            }
            Problem::BadChecksum { .. }
            | Problem::Media { .. }
            | Problem::NoSpace { .. }
            | Problem::OutOfRange { .. }
            | Problem::NotFound { .. }
            | Problem::AlreadyExists { .. }
            | Problem::Limit { .. }
            | Problem::Stopped { .. } => false,
        };
        let Some(mend) = self.mend_of(work) else { return };
        if count > 1 || !is_certain {
            self.damage.probe(Probe { first, count, mend, is_again: false });
            self.start_probes(ctx);
        }
    }

    /// How damage that this read has met is mended; `None`: the reader looks closer by itself.
    fn mend_of(&self, work: &Work) -> Option<Mend> {
        match work {
            Work::Client { .. } | Work::Piece { .. } | Work::Probe(_) => None,
            // `settle.rs` tries the block again and writes it again.
            Work::Settle { count: 1, .. } => None,
            Work::CopyRead { .. } | Work::DigestRead { .. } => Some(Mend::OrPoison),
            Work::VerifyRead { .. } if self.is_repairing() => Some(Mend::Yes),
            Work::VerifyRead { .. }
            | Work::Settle { .. }
            | Work::DigestFor { .. }
            | Work::ReadFor { .. }
            | Work::Persist
            | Work::Prepare(_)
            | Work::Copy { .. }
            | Work::Local(_)
            | Work::Unwatched => Some(Mend::No),
        }
    }

    /// A block was read twice, alone, and the device has failed both times.
    pub(super) fn know_damaged(&mut self, block: u32) {
        self.damage.know(block);
    }

    fn start_probes(&mut self, ctx: &mut Ctx<'_, '_>) {
        while self.damage.probing.len() < PROBES_MAX
            && let Some(probe) = self.damage.probes.pop_front()
        {
            let (shard_ix, Probe { first, count, .. }) = (self.options.shard_ix, probe);
            self.damage.probing.push(probe);
            let request = Op::Read { shard_ix, first, count, with_poison: false };
            self.lane(ctx, Work::Probe(probe), request);
        }
    }

    /// Blocks were read again.
    pub(super) fn probed(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        probe: Probe,
        result: Result<Outcome, Problem>,
    ) {
        let Probe { first, count, mend, is_again } = probe;
        let place = self.damage.probing.iter().position(|other| other.first == first);
        self.damage.probing.remove(place.expect("it was under way"));
        match result {
            Err(problem) if is_damage(&problem) && count > 1 => {
                let half = count / 2;
                for (first, count) in [(first + half, count - half), (first, half)] {
                    let probe = Probe { first, count, mend, is_again: false };
                    self.damage.probes.push_front(probe);
                }
            }
            Err(Problem::Media { .. }) if !is_again => {
                self.damage.probes.push_front(Probe { is_again: true, ..probe });
            }
            Err(problem) if is_damage(&problem) => {
                self.damage.know(first);
                // A poisoned block stands against no new copy: it is copied as poison.
                let is_poisoned = matches!(problem, Problem::Poisoned { .. });
                self.found_here(ctx, first, if is_poisoned { mend.min(Mend::Yes) } else { mend });
            }
            Ok(_) | Err(_) => {}
        }
        self.start_probes(ctx);
        self.poke_verify(ctx);
    }

    /// A block is damaged here. A primary that serves writes it again, or knows that it is lost.
    pub(super) fn found_here(&mut self, ctx: &mut Ctx<'_, '_>, block: u32, mend: Mend) {
        if !self.reign.as_ref().is_some_and(super::reign::Reign::is_serving) {
            return;
        }
        if self.required(false).is_empty() {
            self.damage.lose(block);
        }
        if mend == Mend::OrPoison || (mend == Mend::Yes && !self.required(false).is_empty()) {
            self.mend(ctx, block, mend);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_agrees_with_a_plain_set(
            steps in prop::collection::vec((any::<bool>(), 0u32..64, 1u32..16), 0..80)
        ) {
            let (mut blocks, mut oracle) = (Blocks::default(), BTreeSet::new());
            for (is_insert, first, count) in steps {
                if is_insert {
                    prop_assert_eq!(blocks.insert(first), oracle.insert(first));
                } else {
                    let before = oracle.len();
                    oracle.retain(|block| !(first..first + count).contains(block));
                    prop_assert_eq!(blocks.remove(first, count), oracle.len() < before);
                }
                let told: Vec<u32> =
                    blocks.runs().flat_map(|(first, count)| first..first + count).collect();
                prop_assert_eq!(&told, &oracle.iter().copied().collect::<Vec<_>>());
                prop_assert_eq!(blocks.facts().blocks, oracle.len() as u64);
                let runs: Vec<(u32, u32)> = blocks.runs().collect();
                prop_assert!(runs.windows(2).all(|pair| pair[0].0 + pair[0].1 < pair[1].0));
            }
        }
    }

    #[test]
    fn beyond_the_bound_it_is_a_lower_bound() {
        let mut blocks = Blocks::default();
        (0..RUNS_MAX as u32).for_each(|run| assert!(blocks.insert(run * 2)));
        assert!(!blocks.insert(RUNS_MAX as u32 * 2), "another run has no room");
        assert!(blocks.insert(1), "a run may still grow");
        let facts = blocks.facts();
        assert_eq!((facts.blocks, facts.runs.len()), (RUNS_MAX as u64 + 1, RUNS_TOLD));
        assert_eq!(facts.runs[0], (0, 3));
    }
}
