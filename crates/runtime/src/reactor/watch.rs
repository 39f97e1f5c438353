//! Since when each operation of one disk is under way, and how long those took that are over.
//!
//! A device that has stopped answering lets its reactor live: nothing else would notice. So each
//! operation goes to its engine under the number of a place here, which keeps its own name and the
//! time of its iteration. A device that answers late is worse: everything goes on, slowly. So what
//! each operation took is counted, for whoever compares disks with one another. Cost: a push and a
//! pop per operation, two additions, and a walk over the places (as many as were ever under way at
//! once) some times a second.

use crate::metrics::{Histogram, HistogramSnapshot};
use proto::Tick;
use proto::disk::{DiskOp, IoId};

/// No operation is in this place.
const FREE: Tick = Tick(u64::MAX);

/// What the operations of one disk took since its start, in nanoseconds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DiskLatency {
    /// Of reads.
    pub reads: HistogramSnapshot,
    /// Of writes, and of flushes: what makes a change durable.
    pub writes: HistogramSnapshot,
}

impl DiskLatency {
    /// Add what another lane of the same disk has counted.
    pub fn merge(&mut self, other: &DiskLatency) {
        self.reads.merge(&other.reads);
        self.writes.merge(&other.writes);
    }
}

struct Place {
    id: IoId,
    since: Tick,
    is_read: bool,
}

#[derive(Default)]
pub(super) struct Watch {
    places: Vec<Place>,
    free: Vec<u32>,
    reads: Histogram,
    writes: Histogram,
}

impl Watch {
    /// An operation is given to the engine, under the name returned.
    pub fn begin(&mut self, id: IoId, op: &DiskOp, now: Tick) -> IoId {
        let is_read = match op {
            DiskOp::Read { .. } => true,
            DiskOp::Write { .. } | DiskOp::Flush => false,
        };
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { id, since: FREE, is_read });
            u32::try_from(self.places.len() - 1).expect("memory ends before that")
        });
        self.places[place as usize] = Place { id, since: now, is_read };
        IoId(u64::from(place))
    }

    /// The engine has answered it: its own name. `now` is a look at the clock, not the iteration's
    /// time: an engine that works inside `submit` spends the time within one iteration.
    pub fn end(&mut self, place: IoId, now: Tick) -> IoId {
        let index = u32::try_from(place.0).expect("made by `begin`");
        let Place { id, since, is_read } = &mut self.places[index as usize];
        assert!(*since != FREE, "an operation is answered once");
        let took_nanos = now.0.saturating_sub(since.0);
        if *is_read { &self.reads } else { &self.writes }.record(took_nanos);
        *since = FREE;
        self.free.push(index);
        *id
    }

    /// When the oldest operation under way was given.
    pub fn oldest(&self) -> Option<Tick> {
        self.places.iter().map(|place| place.since).min().filter(|since| *since != FREE)
    }

    /// What was counted so far.
    pub fn latency(&self) -> DiskLatency {
        DiskLatency { reads: self.reads.snapshot(), writes: self.writes.snapshot() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: DiskOp = DiskOp::Read { offset: 0, len: 4096 };

    #[test]
    fn the_oldest_is_what_has_not_been_answered() {
        let mut watch = Watch::default();
        assert_eq!(watch.oldest(), None);
        let first = watch.begin(IoId(900), &READ, Tick(5));
        let second = watch.begin(IoId(901), &DiskOp::Flush, Tick(6));
        let third = watch.begin(IoId(900), &READ, Tick(7));
        assert_eq!(watch.end(second, Tick(8)), IoId(901));
        assert_eq!(watch.oldest(), Some(Tick(5)), "others overtake it");
        assert_eq!(watch.end(first, Tick(8)), IoId(900));
        assert_eq!(watch.oldest(), Some(Tick(7)), "a name that is used twice is two operations");
        assert_eq!(watch.begin(IoId(1), &READ, Tick(8)), first, "places are used again");
        assert_eq!(watch.end(third, Tick(9)), IoId(900));
        assert_eq!(watch.oldest(), Some(Tick(8)));
    }

    #[test]
    fn reads_are_counted_apart_from_what_makes_a_change_durable() {
        let mut watch = Watch::default();
        let data = proto::Pool::new(1 << 20).copy_of(&[7; 4096]).freeze();
        let write = DiskOp::Write { offset: 0, data: vec![data].into() };
        for (op, took) in [(READ, 3), (write, 7), (DiskOp::Flush, 11)] {
            let place = watch.begin(IoId(1), &op, Tick(100));
            watch.end(place, Tick(100 + took));
        }
        let behind = watch.begin(IoId(2), &READ, Tick(100));
        watch.end(behind, Tick(99));
        let latency = watch.latency();
        assert_eq!(latency.reads.buckets().collect::<Vec<_>>(), [(0, 1), (3, 1)]);
        assert_eq!(latency.writes.buckets().collect::<Vec<_>>(), [(7, 1), (11, 1)]);
        let mut both = latency.clone();
        both.merge(&latency);
        assert_eq!((both.reads.count(), both.writes.count()), (4, 4));
    }

    #[test]
    #[should_panic(expected = "answered once")]
    fn a_second_answer_is_a_bug() {
        let mut watch = Watch::default();
        let place = watch.begin(IoId(1), &READ, Tick(5));
        watch.end(place, Tick(6));
        watch.end(place, Tick(7));
    }
}
