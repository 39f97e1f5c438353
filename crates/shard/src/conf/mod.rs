//! Who serves a shard: its configuration, the encoded form, and the steps from one to the next.
//!
//! A `ShardConf` never changes for a given (shard, epoch, history_id). `transition.rs` holds the only
//! functions that make the next one; the conductor applies them, stores the result by one
//! compare-and-swap, and only then tells anyone. Replicas keep the encoded form in their lane and
//! pass it on to whoever asks with NEED_CONF.

pub mod codec;
pub mod transition;

#[cfg(test)]
mod tests;

use proto::{Epoch, Seq, ShardId};

/// Number of a replica among those of its shard; configurations name members by it.
pub type CopyId = u8;
/// A store node, numbered by the conductor.
pub type StoreId = u64;
/// Fresh at every process start of a store; 0 names nobody.
pub type Incarnation = u64;

/// Members of one configuration at most: the largest `rf` with room for replicas that left.
pub const MEMBERS_MAX: usize = 8;

/// The bits of a history's number from here on count how often a person has forced one (T7); those
/// below are of the shard's first history and stay. 511 can be forced within 53 bits, and each has
/// room for 2^44 operations: five years of 100,000 a second in one shard.
pub const HISTORY_SHIFT: u32 = 44;

/// One replica: where it is, and which life of it is meant.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Member {
    /// Its number.
    pub copy: CopyId,
    /// The store that holds it.
    pub store: StoreId,
    /// The life of that store that is meant: a restarted replica is a different one.
    pub incarnation: Incarnation,
    /// The disk that holds it.
    pub disk: [u8; 16],
    /// The formatting of that disk that is meant.
    pub format_uuid: [u8; 16],
}

/// Who serves a shard. Lists are ascending; every number in `isr` and `learners` has a member.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ShardConf {
    /// Which shard.
    pub shard: ShardId,
    /// Grows by one with every transition.
    pub epoch: Epoch,
    /// Replicas wanted.
    pub rf: u8,
    /// Replicas without which no write is committed.
    pub min_write: u8,
    /// The one that serves clients; in `isr`.
    pub primary: CopyId,
    /// In-sync replicas; never empty.
    pub isr: Vec<CopyId>,
    /// Replicas that are being made equal; none of `isr`.
    pub learners: Vec<CopyId>,
    /// Every replica that exists, in the ISR or not.
    pub members: Vec<Member>,
    /// Changes only when a human forces a history (T7); see `HISTORY_SHIFT`.
    pub history_id: u64,
    /// Writers attached with a smaller one are refused.
    pub attach_epoch: u64,
}

impl ShardConf {
    /// The member with this number.
    #[must_use]
    pub fn member(&self, copy: CopyId) -> Option<&Member> {
        self.members.iter().find(|member| member.copy == copy)
    }

    /// The member on this store.
    #[must_use]
    pub fn on_store(&self, store: StoreId) -> Option<&Member> {
        self.members.iter().find(|member| member.store == store)
    }

    /// Number of the history that follows this one when a human forces it.
    #[must_use]
    pub fn next_history(&self) -> u64 {
        self.history_id + (1 << HISTORY_SHIFT)
    }

    /// Every operation that is ordered in this history has a seq above this one.
    ///
    /// A replica of the history before may have gone further than the one that was chosen, and seqs
    /// are compared without looking at histories: an operation below what such a replica has
    /// committed would be a late duplicate to it, and its old watermark would vouch for writes that
    /// it never had. So each history has seqs of its own, above those of all before it.
    #[must_use]
    pub fn first_seq(&self) -> Seq {
        Seq(self.history_id >> HISTORY_SHIFT << HISTORY_SHIFT)
    }

    /// The primary's member.
    #[must_use]
    pub fn primary_member(&self) -> &Member {
        self.member(self.primary).expect("the primary is a member")
    }

    /// Members of the ISR, in order.
    pub fn isr_members(&self) -> impl Iterator<Item = &Member> + '_ {
        self.isr.iter().filter_map(|copy| self.member(*copy))
    }

    /// Members that are learners, in order.
    pub fn learner_members(&self) -> impl Iterator<Item = &Member> + '_ {
        self.learners.iter().filter_map(|copy| self.member(*copy))
    }
}
