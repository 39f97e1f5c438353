//! How fast learners are made equal: at full speed while no client is there, else a share of the
//! time.
//!
//! **A share of the time, not of bytes.** Nobody knows what a disk can do; it differs by device, by
//! size and by what else it has to do, and a configured figure is wrong on the next machine. What
//! is known is how long the last region took, from the order to read it until the learner had it:
//! that is what both disks and the network between them give now. After a region that took t, the
//! next region begins no sooner than when t is `SHARE_PERCENT` of the time since the order: in the
//! pause clients have the disks to themselves. The busier clients keep the disks, the longer a
//! region takes and the longer the pause: so a resync yields without knowing who else is there.
//!
//! **What is urgent** gets a larger share, `SHARE_URGENT_PERCENT`: all of it while there is one
//! copy only, because the shard is one fault away from its end; and the comparisons before an
//! admission, because clients wait for the learner already, and because a comparison writes
//! nothing.
//!
//! **It always ends.** A pause is over `TURN_NANOS` after its region began: 32 MiB/s at least,
//! however slow clients make the disks. A region that fails or is never acknowledged delays the
//! next one no longer than that either.
//!
//! **Nobody there.** Without a client's operation for `IDLE_MS` there is no pause at all. An
//! operation of a client is a request at the primary, or a PREPARE at a follower; of any shard in
//! the lane, because it is the lane's disk that they share.
//!
//! **What is shared.** Regions to copy take turns over all shards of a lane ([`Pace`]): a store
//! that comes back needs all its shards at once. The shard that just had its turn is told first
//! when the next turn is, so shards tend to be done one after the other, and the first is safe
//! soonest. Shards with one copy have turns of their own, so that they wait for no other.
//! Comparisons wait for no other shard either, and keep to their share one by one: a learner that
//! clients wait for is to be admitted, or given up, soon.
//!
//! **Verifications** of all shards of a lane have turns of their own: they keep to the same share
//! of the time apart from the copies, so that neither waits for the other.
//!
//! Time comes in with events; nothing here measures it.

use proto::Tick;
use std::cell::Cell;

/// Part of the time that copying to learners takes while clients are there.
const SHARE_PERCENT: u64 = 20;
/// The same where it is urgent.
const SHARE_URGENT_PERCENT: u64 = 60;
/// Longest distance of two turns: 32 regions of 1 MiB in a second.
const TURN_NANOS: u64 = 1_000_000_000 / 32;
/// Clients are gone after this long without an operation. Much longer than an operation on slow
/// disks takes: else a resync would take the disks for itself just because clients wait for them.
const IDLE_MS: u64 = 1_000;

/// Turns of work under one share of the time; one at a time, but no turn waits for a late one.
#[derive(Default)]
pub(super) struct Turns {
    /// No turn begins before.
    next: Cell<Tick>,
    /// Of the newest turn.
    number: Cell<u64>,
}

/// A turn that has begun.
#[derive(Clone, Copy)]
pub(super) struct Turn {
    number: u64,
    is_urgent: bool,
    /// When the work was ordered: the time from the turn's begin to here was waiting for clients.
    since: Option<Tick>,
}

impl Turn {
    /// Whether it counts among the urgent ones.
    pub(super) fn is_urgent(self) -> bool {
        self.is_urgent
    }

    /// The work is ordered.
    pub(super) fn work(&mut self, now: Tick) {
        self.since = Some(now);
    }
}

impl Turns {
    /// Begin a turn, or learn when to ask again.
    pub(super) fn begin(&self, now: Tick, is_busy: bool, is_urgent: bool) -> Result<Turn, Tick> {
        if is_busy && now < self.next.get() {
            return Err(self.next.get());
        }
        self.number.set(self.number.get() + 1);
        self.next.set(now.after_nanos(TURN_NANOS));
        Ok(Turn { number: self.number.get(), is_urgent, since: None })
    }

    /// A turn's work is done. If another turn has begun meanwhile, that turn decides when the next
    /// may begin.
    pub(super) fn end(&self, now: Tick, turn: Turn) {
        let Some(since) = turn.since.filter(|_| turn.number == self.number.get()) else { return };
        let percent = if turn.is_urgent { SHARE_URGENT_PERCENT } else { SHARE_PERCENT };
        let pause_nanos = (now.0 - since.0) * (100 - percent) / percent;
        self.next.set(now.after_nanos(pause_nanos).min(self.next.get()));
    }
}

/// What the resyncs of all shards of one lane share. The lane's host has one and shows it in every
/// [`View`](super::View).
#[derive(Default)]
pub struct Pace {
    /// The last operation of a client.
    client_at: Cell<Option<Tick>>,
    copies: Turns,
    /// Of shards with one copy.
    urgent_copies: Turns,
    /// Of verifications (`verify.rs`).
    verifies: Turns,
}

impl Pace {
    /// A client's operation has come.
    pub(super) fn client(&self, now: Tick) {
        self.client_at.set(Some(now));
    }

    /// Whether clients are there.
    pub(super) fn is_busy(&self, now: Tick) -> bool {
        self.client_at.get().is_some_and(|at| now < at.after_millis(IDLE_MS))
    }

    /// The turns in which regions are compared for people.
    pub(super) fn verifies(&self) -> &Turns {
        &self.verifies
    }

    /// The turns in which regions are copied.
    pub(super) fn copies(&self, is_urgent: bool) -> &Turns {
        if is_urgent { &self.urgent_copies } else { &self.copies }
    }
}
