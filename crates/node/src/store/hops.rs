//! Where the time of a request goes, as sums that a reader turns into means.
//!
//! Sums and not histograms: the parts of a mean add up to the whole, those of a quantile do not, and
//! a budget is read part by part. Each costs two additions and, at its end, a look at the clock.

use proto::Tick;
use proto::wire::RequestOp;
use runtime::clock;

/// How often something took place, and how long it took in all.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hop {
    /// Times.
    pub count: u64,
    /// Nanoseconds.
    pub nanos: u64,
}

impl Hop {
    /// Something that has begun then is over now.
    pub(super) fn over(&mut self, since: Tick) {
        self.count += 1;
        self.nanos += clock::now().0.saturating_sub(since.0);
    }
}

/// The hops of a store's data thread, since it started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hops {
    /// A client's READ, from its frame to its reply.
    pub client_reads: Hop,
    /// A client's change, from its frame to its reply.
    pub client_writes: Hop,
    /// A read of a lane, of whatever replica and for whatever reason.
    pub lane_reads: Hop,
    /// A write or discard of a lane, until it is durable.
    pub lane_writes: Hop,
    /// PREPARE to another store, until its answer is here.
    pub peer_writes: Hop,
    /// PREPARE of another store, from its frame to the answer.
    pub served_writes: Hop,
}

/// What a lane is asked to do, as far as hops tell it apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LaneWork {
    Read,
    Write,
    /// Configurations, watermarks: they are not on a request's way.
    Other,
}

impl LaneWork {
    pub(super) fn of(op: &lane::Op) -> LaneWork {
        match op {
            lane::Op::Read { .. } => LaneWork::Read,
            lane::Op::Write { .. } | lane::Op::Range { .. } => LaneWork::Write,
            lane::Op::Create { .. }
            | lane::Op::Delete { .. }
            | lane::Op::Resize { .. }
            | lane::Op::Conf { .. }
            | lane::Op::Commit { .. }
            | lane::Op::Region { .. }
            | lane::Op::Checkpoint
            | lane::Op::Close => LaneWork::Other,
        }
    }
}

/// Whether a message is the hop of a write to another replica.
pub(super) fn is_prepare(op: &RequestOp) -> bool {
    matches!(op, RequestOp::Prepare(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hop_counts_and_adds_up() {
        let mut hop = Hop::default();
        let since = clock::now();
        hop.over(Tick(since.0.saturating_sub(1_000)));
        hop.over(Tick(u64::MAX));
        assert_eq!(hop.count, 2);
        assert!(hop.nanos >= 1_000, "the second has taken no time: its clock was ahead");
    }
}
