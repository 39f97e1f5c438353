//! What will happen, and when: a heap of (time, order of scheduling).

use crate::conductor::Status;
use crate::store::Input;
use proto::Epoch;
use proto::frame::Frame;
use shard::conf::transition::Transition;
use shard::conf::{Incarnation, ShardConf, StoreId};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Times are multiples of this, so that some things happen at the same instant and share a turn.
const GRAIN: u64 = 4_000;

/// Who has a hand in faults; each comes again and again on its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Nemesis {
    /// Changes who reaches whom.
    Partition,
    /// Crashes one store.
    Crash,
    /// Crashes all.
    CrashAll,
    /// Stops one store for a while.
    Pause,
    /// Makes one disk slow for a while.
    SlowDisk,
    /// Holds the next operation of one disk for seconds.
    StuckDisk,
    /// Takes the conductor away for a while.
    Conductor,
    /// Breaks one connection of a client.
    Connection,
    /// Ends one client.
    Client,
    /// Fences earlier writers.
    Attach,
    /// Asks a primary to give its reign to another member.
    Transfer,
    /// Copies of blocks are damaged.
    Rot,
    /// Leaves a member out of an ISR whose store is well, as one with a slow disk is.
    Demote,
    /// Takes every member of an ISR away for good, as far as anybody can tell.
    Lose,
}

/// One thing that happens.
#[derive(Debug)]
pub enum What {
    /// A disk operation of a store's life completes.
    Disk(StoreId, Incarnation, u64),
    /// A store's machines want to be woken.
    Timer(StoreId, Incarnation),
    /// A message arrives at a store, whatever its life; `Some`: only at this one.
    Arrive(StoreId, Option<Incarnation>, Box<Input>),
    /// A store's agent reports.
    Agent(StoreId, Incarnation),
    /// A status arrives at the conductor.
    Status(Status),
    /// A proposal arrives at the conductor.
    Proposal(StoreId, Incarnation, u32, Epoch, Transition),
    /// A question for a configuration arrives at the conductor.
    Fetch(StoreId, u32, Epoch),
    /// The conductor looks around.
    ConductorTick,
    /// The conductor is back.
    ConductorBack,
    /// A client's connection comes about, or not.
    Connect(u64),
    /// A frame arrives at a client.
    ToClient(u64, Box<Frame>),
    /// A frame arrives at a store.
    ToServer(u64, Box<Frame>),
    /// A client learns that its connection has ended.
    ClientClosed(u64),
    /// A store learns that a client's connection has ended.
    ServerClosed(u64),
    /// A session wants to be woken.
    ClientTimer(usize),
    /// A client asks something.
    Ask(usize),
    /// A client hears of configurations.
    ClientConf(usize, Vec<ShardConf>),
    /// A store is started.
    Boot(StoreId),
    /// A store crashes; in this life only.
    Crash(StoreId, Incarnation),
    /// A paused store goes on.
    Resume(StoreId, Incarnation),
    /// A slow disk is as fast as the others again.
    DiskRecovers(StoreId),
    /// A cut link flaps.
    Flap(u64, u64, u32),
    /// A primary and the learner that it proposes are cut apart.
    Ambush(StoreId, StoreId),
    /// A person decides which copy of a shard counts, while it is still at this epoch.
    Decide(u32, Epoch),
    /// Every link works again.
    Heal,
    /// Faults.
    Nemesis(Nemesis),
    /// The phases look whether it is time.
    Phase,
}

/// The heap.
#[derive(Default)]
pub struct Events {
    heap: BinaryHeap<Reverse<(u64, u64, u32)>>,
    slots: Vec<Option<What>>,
    free: Vec<u32>,
    count: u64,
}

impl Events {
    /// Let it happen at `at`, or a grain later.
    pub fn push(&mut self, at: u64, what: What) {
        let at = at.div_ceil(GRAIN) * GRAIN;
        self.count += 1;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u32::try_from(self.slots.len() - 1).expect("a world has few things under way")
        });
        self.slots[slot as usize] = Some(what);
        self.heap.push(Reverse((at, self.count, slot)));
    }

    /// When the next one happens.
    #[must_use]
    pub fn next_at(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse((at, ..))| *at)
    }

    /// Take the next one.
    pub fn pop(&mut self) -> Option<(u64, What)> {
        let Reverse((at, _, slot)) = self.heap.pop()?;
        self.free.push(slot);
        let what = self.slots[slot as usize].take().expect("filled when it was scheduled");
        Some((at, what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_happen_by_time_and_then_in_the_order_of_scheduling() {
        let mut events = Events::default();
        for (at, store) in [(9_000, 1), (5_000, 2), (8_500, 3), (100, 4)] {
            events.push(at, What::Boot(store));
        }
        let mut order = Vec::new();
        while let Some((at, What::Boot(store))) = events.pop() {
            order.push((at, store));
        }
        assert_eq!(order, [(4_000, 4), (8_000, 2), (12_000, 1), (12_000, 3)]);
    }
}
