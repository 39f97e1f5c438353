//! Range locks of one shard: readers share, writers exclude, first come first served.
//!
//! An operation holds its whole range at once, so there is no deadlock; it waits for every earlier
//! operation that conflicts with it, granted or not, so nobody starves. A writer whose record is
//! durable and whose payload is only waiting to be placed (REDO) lets readers pass: they are served
//! from its buffer.

use std::ops::Range;

/// Name of the operation that holds or wants a lock.
pub type OpIx = u32;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hold {
    Shared,
    Exclusive,
    /// Exclusive among writers, transparent to readers.
    Placing,
}

#[derive(Clone, Debug)]
struct Entry {
    op: OpIx,
    blocks: Range<u32>,
    hold: Hold,
    granted: bool,
}

impl Entry {
    fn conflicts(&self, other: &Entry) -> bool {
        let overlap = self.blocks.start < other.blocks.end && other.blocks.start < self.blocks.end;
        let compatible = matches!(
            (self.hold, other.hold),
            (Hold::Shared, Hold::Shared | Hold::Placing) | (Hold::Placing, Hold::Shared)
        );
        overlap && !compatible
    }
}

/// All locks of one shard, in order of arrival.
#[derive(Clone, Debug, Default)]
pub struct RangeLocks {
    entries: Vec<Entry>,
}

impl RangeLocks {
    /// Ask for a lock; true when it is granted at once.
    pub fn acquire(&mut self, op: OpIx, blocks: Range<u32>, exclusive: bool) -> bool {
        let hold = if exclusive { Hold::Exclusive } else { Hold::Shared };
        let mut entry = Entry { op, blocks, hold, granted: false };
        entry.granted = !self.entries.iter().any(|other| other.conflicts(&entry));
        let granted = entry.granted;
        self.entries.push(entry);
        granted
    }

    /// Let readers pass a granted writer; append the operations that may go on to `out`.
    pub fn placing(&mut self, op: OpIx, out: &mut Vec<OpIx>) {
        let entry = self.entries.iter_mut().find(|entry| entry.op == op);
        let entry = entry.expect("the writer holds its lock");
        assert!(entry.granted && entry.hold == Hold::Exclusive, "a granted writer");
        entry.hold = Hold::Placing;
        self.grant(out);
    }

    /// Give a lock back; append the operations that may go on to `out`.
    pub fn release(&mut self, op: OpIx, out: &mut Vec<OpIx>) {
        let index = self.entries.iter().position(|entry| entry.op == op);
        self.entries.remove(index.expect("the operation holds a lock"));
        self.grant(out);
    }

    fn grant(&mut self, out: &mut Vec<OpIx>) {
        for index in 0..self.entries.len() {
            let entry = &self.entries[index];
            if !entry.granted
                && !self.entries[..index].iter().any(|earlier| earlier.conflicts(entry))
            {
                out.push(entry.op);
                self.entries[index].granted = true;
            }
        }
    }

    /// True when nobody holds or waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_writer_is_not_overtaken_by_readers() {
        let (mut locks, mut ready) = (RangeLocks::default(), Vec::new());
        assert!(locks.acquire(1, 0..4, false));
        assert!(!locks.acquire(2, 2..3, true), "the reader is before it");
        assert!(!locks.acquire(3, 2..3, false), "the writer is before it");
        assert!(locks.acquire(4, 8..9, true), "elsewhere is free");
        locks.release(1, &mut ready);
        assert_eq!(ready, vec![2]);
        ready.clear();
        locks.release(2, &mut ready);
        assert_eq!(ready, vec![3]);
    }

    #[test]
    fn readers_pass_a_writer_that_only_places_and_writers_do_not() {
        let (mut locks, mut ready) = (RangeLocks::default(), Vec::new());
        assert!(locks.acquire(1, 0..1, true));
        assert!(!locks.acquire(2, 0..1, false));
        assert!(!locks.acquire(3, 0..1, true));
        locks.placing(1, &mut ready);
        assert_eq!(ready, vec![2]);
        ready.clear();
        locks.release(1, &mut ready);
        assert!(ready.is_empty(), "the second writer waits for the reader");
        locks.release(2, &mut ready);
        assert_eq!(ready, vec![3]);
    }
}
