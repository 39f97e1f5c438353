//! The slot allocator and the space counters.
//!
//! Not stored: it is rebuilt from the map and the manifest at recovery, where two claims on one slot
//! fault the lane. Two bitmaps: `used`, and `soft` for slots that a natural extent would like to
//! have next. Every slot is in exactly one counter at any time and the counters' sum is the number
//! of slots: checked after every change.
//!
//! A *credit* is a promise of one slot, taken before a write gets its lsn, so that a full disk is an
//! answer (NO_SPACE) and never a half-done operation. Clients cannot take the metadata reserve.

use crate::EXTENT_SLOTS;

/// Share of slots that soft reservations must leave free, in percent.
const SOFT_FLOOR_PERCENT: u32 = 20;
/// Share of slots that clients never get, in percent.
const RESERVE_PERCENT: u32 = 5;

/// Least number of slots that stay free for checkpoints.
const FLOOR_SLOTS: u32 = 4;

/// Slots by what they are used for. The sum is the number of slots of the lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Space {
    /// Could be handed out now.
    pub free: u32,
    /// Free, but preferred by a natural extent; given up when space is short.
    pub soft: u32,
    /// Promised to accepted writes that have not picked their slot yet.
    pub reserved: u32,
    /// Picked by writes that have not completed.
    pub inflight: u32,
    /// Freed, waiting for a checkpoint to stop referring to them.
    pub quarantined: u32,
    /// Named by the map.
    pub mapped: u32,
    /// Hold checkpoint runs and manifests.
    pub metadata: u32,
    /// Never to be used again.
    pub bad: u32,
    /// Not written yet on file media; become free as the materialise job proceeds.
    pub unmaterialised: u32,
}

impl Space {
    /// Sum of all counters.
    #[must_use]
    pub fn total(&self) -> u32 {
        self.free
            + self.soft
            + self.reserved
            + self.inflight
            + self.quarantined
            + self.mapped
            + self.metadata
            + self.bad
            + self.unmaterialised
    }
}

/// Two owners claim one slot: the map is damaged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("slot {slot} is claimed twice")]
pub struct DoubleClaim {
    /// The slot.
    pub slot: u32,
}

/// Which slots are in use.
#[derive(Clone, Debug)]
pub struct Allocator {
    slots: u32,
    /// Slots at and above this one were never written (file media).
    limit: u32,
    used: Vec<u64>,
    soft: Vec<u64>,
    space: Space,
    /// Word where the search for a single slot goes on, and for a natural extent.
    hints: [usize; 2],
}

impl Allocator {
    /// An empty allocator over `slots` slots of which the first `limit` may be handed out.
    #[must_use]
    pub fn new(slots: u32, limit: u32) -> Allocator {
        assert!(limit <= slots, "limit {limit} above {slots} slots");
        let words = slots.div_ceil(64) as usize;
        let space = Space { free: limit, unmaterialised: slots - limit, ..Space::default() };
        Allocator { slots, limit, used: vec![0; words], soft: vec![0; words], space, hints: [0; 2] }
    }

    /// The counters.
    #[must_use]
    pub fn space(&self) -> Space {
        self.space
    }

    /// Slots below this were written once.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Slots of the whole lane that clients never get.
    #[must_use]
    pub fn reserve(&self) -> u32 {
        (self.slots / 100 * RESERVE_PERCENT).max(self.floor())
    }

    /// Slots that must stay free now, so that the next checkpoints always find room.
    #[must_use]
    pub fn floor(&self) -> u32 {
        (2 * self.space.metadata).max(FLOOR_SLOTS)
    }

    /// True when `slot` is in use.
    #[must_use]
    pub fn is_used(&self, slot: u32) -> bool {
        self.used[slot as usize / 64] >> (slot % 64) & 1 == 1
    }

    fn check(&self) {
        assert_eq!(self.space.total(), self.slots, "space counters leak: {:?}", self.space);
    }

    fn mark(&mut self, slot: u32) {
        let (word, bit) = (slot as usize / 64, 1u64 << (slot % 64));
        assert_eq!(self.used[word] & bit, 0, "slot {slot} handed out twice");
        self.used[word] |= bit;
        if self.soft[word] & bit != 0 {
            self.soft[word] &= !bit;
            self.space.soft -= 1;
            self.space.free += 1;
        }
    }

    fn unmark(&mut self, slot: u32) {
        let (word, bit) = (slot as usize / 64, 1u64 << (slot % 64));
        assert_ne!(self.used[word] & bit, 0, "slot {slot} freed twice");
        self.used[word] &= !bit;
    }

    /// Claim a slot at recovery, for the map or for metadata.
    pub fn claim(&mut self, slot: u32, metadata: bool) -> Result<(), DoubleClaim> {
        assert!(slot < self.limit, "slot {slot} above the materialised limit {}", self.limit);
        if self.is_used(slot) {
            return Err(DoubleClaim { slot });
        }
        self.mark(slot);
        self.space.free -= 1;
        if metadata {
            self.space.metadata += 1;
        } else {
            self.space.mapped += 1;
        }
        self.check();
        Ok(())
    }

    /// Raise the number of slots that may be handed out.
    pub fn materialise(&mut self, limit: u32) {
        assert!(limit >= self.limit && limit <= self.slots, "the limit only grows");
        self.space.unmaterialised -= limit - self.limit;
        self.space.free += limit - self.limit;
        self.limit = limit;
        self.check();
    }

    /// Take `count` credits; false when that would touch the reserve, or, for a write that may use
    /// it, what the next checkpoints need.
    pub fn take_credit(&mut self, count: u32, may_use_reserve: bool) -> bool {
        let now = self.space.free + self.space.soft;
        let ever = now + self.space.unmaterialised;
        let is_in_reserve = ever < count.saturating_add(self.reserve());
        if count > 0
            && (now < count.saturating_add(self.floor()) || (is_in_reserve && !may_use_reserve))
        {
            return false;
        }
        if self.space.free < count {
            self.give_up_soft();
        }
        self.space.free -= count;
        self.space.reserved += count;
        self.check();
        true
    }

    /// Take one credit although the reserve is touched: for a write that was admitted with a slot
    /// which was freed before its turn. False when nothing at all is free.
    pub fn take_credit_from_reserve(&mut self) -> bool {
        if self.space.free == 0 {
            self.give_up_soft();
        }
        if self.space.free == 0 {
            return false;
        }
        self.space.free -= 1;
        self.space.reserved += 1;
        true
    }

    /// Return credits that were not needed.
    pub fn return_credit(&mut self, count: u32) {
        self.space.reserved -= count;
        self.space.free += count;
        self.check();
    }

    fn give_up_soft(&mut self) {
        self.soft.fill(0);
        self.space.free += self.space.soft;
        self.space.soft = 0;
    }

    /// Turn one credit into a slot for `position` of an extent whose natural base is `base`.
    ///
    /// A first touch (`base` none) looks for 64 adjacent free slots and soft-reserves the others,
    /// unless space is short.
    pub fn pick(&mut self, base: Option<u32>, position: u32) -> u32 {
        assert!(self.space.reserved > 0, "a slot is picked with a credit only");
        let natural = base.or_else(|| self.reserve_natural());
        let preferred = natural
            .map(|base| base + position)
            .filter(|&slot| slot < self.limit && !self.is_used(slot));
        let slot = preferred.unwrap_or_else(|| self.find_single());
        self.mark(slot);
        self.space.reserved -= 1;
        self.space.inflight += 1;
        self.check();
        slot
    }

    /// Turn one credit into a slot for what another slot does not take. The next call looks elsewhere,
    /// so that a second bad slot is not tried for ever.
    pub fn pick_other(&mut self) -> u32 {
        assert!(self.space.reserved > 0, "a slot is picked with a credit only");
        let slot = self.find_single();
        self.hints[0] = (self.hints[0] + 1) % self.used.len();
        self.mark(slot);
        self.space.reserved -= 1;
        self.space.inflight += 1;
        self.check();
        slot
    }

    fn reserve_natural(&mut self) -> Option<u32> {
        let floor = self.slots / 100 * SOFT_FLOOR_PERCENT;
        if self.space.free < floor.saturating_add(EXTENT_SLOTS) {
            if self.space.soft > 0 {
                self.give_up_soft();
            }
            return None;
        }
        let whole_words = self.limit as usize / 64;
        let (from, wrapped) = (self.hints[1].min(whole_words), 0..self.hints[1].min(whole_words));
        let word = (from..whole_words)
            .chain(wrapped)
            .find(|&word| self.used[word] == 0 && self.soft[word] == 0)?;
        self.hints[1] = word;
        self.soft[word] = u64::MAX;
        self.space.soft += EXTENT_SLOTS;
        self.space.free -= EXTENT_SLOTS;
        Some(word as u32 * EXTENT_SLOTS)
    }

    /// A slot outside soft reservations, else one inside.
    fn find_single(&mut self) -> u32 {
        for avoid_soft in [true, false] {
            let words = self.used.len();
            for step in 0..words {
                let word = (self.hints[0] + step) % words;
                let taken = self.used[word] | if avoid_soft { self.soft[word] } else { 0 };
                let slot = (word * 64) as u32 + taken.trailing_ones();
                if taken != u64::MAX && slot < self.limit {
                    self.hints[0] = word;
                    return slot;
                }
            }
        }
        unreachable!("a credit stands for a free slot: {:?}", self.space)
    }

    /// A picked slot is now named by the map.
    pub fn settle(&mut self) {
        self.space.inflight -= 1;
        self.space.mapped += 1;
        self.check();
    }

    /// The map no longer names a slot that a write in flight is about to claim again.
    pub fn unsettle(&mut self) {
        self.space.mapped -= 1;
        self.space.inflight += 1;
        self.check();
    }

    /// A picked slot is not needed after all.
    pub fn abandon(&mut self, slot: u32) {
        self.unmark(slot);
        self.space.inflight -= 1;
        self.space.free += 1;
        self.check();
    }

    /// The map no longer names `slot`, and that is durable.
    pub fn free(&mut self, slot: u32) {
        self.unmark(slot);
        self.space.mapped -= 1;
        self.space.free += 1;
        self.check();
    }

    /// The extent with this natural base is gone: its reservation ends.
    pub fn release_natural(&mut self, base: u32) {
        let released = self.soft[base as usize / 64].count_ones();
        self.soft[base as usize / 64] = 0;
        self.space.soft -= released;
        self.space.free += released;
        self.check();
    }

    /// A slot must never be used again: it leaves the free slots for good.
    pub fn retire(&mut self, slot: u32) -> Result<(), DoubleClaim> {
        self.claim(slot, false)?;
        self.space.mapped -= 1;
        self.space.bad += 1;
        self.check();
        Ok(())
    }

    /// Take `count` adjacent slots for metadata, from the reserve if need be.
    pub fn pick_metadata(&mut self, count: u32) -> Option<u32> {
        assert!((1..=EXTENT_SLOTS).contains(&count), "{count} adjacent slots");
        if self.space.free < count {
            self.give_up_soft();
        }
        if self.space.free < count {
            return None;
        }
        let first = [true, false]
            .into_iter()
            .find_map(|avoid_soft| self.find_adjacent(count, avoid_soft))?;
        for slot in first..first + count {
            self.mark(slot);
        }
        self.space.free -= count;
        self.space.metadata += count;
        self.check();
        Some(first)
    }

    fn find_adjacent(&self, count: u32, avoid_soft: bool) -> Option<u32> {
        // Metadata goes to the far end, away from where natural extents look first.
        (0..self.limit.div_ceil(64) as usize).rev().find_map(|word| {
            let taken = self.used[word] | if avoid_soft { self.soft[word] } else { 0 };
            (0..=64 - count)
                .map(|bit| (bit, (u64::MAX >> (64 - count)) << bit))
                .find(|&(bit, mask)| {
                    taken & mask == 0 && word as u32 * 64 + bit + count <= self.limit
                })
                .map(|(bit, _)| word as u32 * 64 + bit)
        })
    }

    /// A metadata slot is obsolete once the checkpoint that replaces it is durable.
    pub fn quarantine_metadata(&mut self) {
        self.space.metadata -= 1;
        self.space.quarantined += 1;
        self.check();
    }

    /// The replacing checkpoint is durable.
    pub fn free_quarantined(&mut self, slot: u32) {
        self.unmark(slot);
        self.space.quarantined -= 1;
        self.space.free += 1;
        self.check();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_touch_reserves_its_neighbours_softly() {
        let mut allocator = Allocator::new(1024, 1024);
        assert!(allocator.take_credit(1, false));
        let slot = allocator.pick(None, 5);
        assert_eq!((slot % 64, allocator.space().soft), (5, 63));
        assert!(allocator.take_credit(1, false));
        assert_eq!(allocator.pick(Some(slot - 5), 6), slot + 1, "the neighbour is its own");
        assert_eq!(allocator.space().inflight, 2);
    }

    #[test]
    fn reservations_give_way_when_space_is_short_and_the_reserve_stays() {
        let mut allocator = Allocator::new(640, 640);
        let mut taken = 0;
        while allocator.take_credit(1, false) {
            allocator.pick(None, 0);
            allocator.settle();
            taken += 1;
        }
        assert_eq!(taken, 640 - allocator.reserve());
        assert!(allocator.pick_metadata(4).is_some(), "metadata may use the reserve");
        assert_eq!(allocator.space().soft, 0);
    }

    #[test]
    fn nothing_above_the_limit_is_handed_out() {
        let mut allocator = Allocator::new(1024, 64);
        while allocator.take_credit(1, false) {
            assert!(allocator.pick(None, 63) < 64);
        }
        allocator.materialise(128);
        assert!(allocator.take_credit(1, false));
        assert!(allocator.pick(None, 0) < 128);
    }

    #[test]
    fn two_claims_on_one_slot_are_refused() {
        let mut allocator = Allocator::new(64, 64);
        allocator.claim(3, false).expect("first claim");
        assert_eq!(allocator.claim(3, true), Err(DoubleClaim { slot: 3 }));
    }
}
