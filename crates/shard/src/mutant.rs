//! Seeded bugs of replication: each removes one rule of docs/internals/replication.md. Every one must
//! be caught, by the simulator or by a test of one machine, which proves that their checks work. They
//! exist only with the `mutants` feature, which the wheel refuses; without it `is` is constant false
//! and costs nothing.

/// True when the seeded bugs are compiled in.
pub const MUTANTS: bool = cfg!(feature = "mutants");

/// Which rule is broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs, reason = "each name says which rule it breaks; the test table explains them")]
pub enum Mutant {
    #[default]
    None,
    /// A new primary repeats its own tail with the old lsns instead of settling every tail block.
    SettleOwnTailOnly,
    /// A replica answers TAILS while accepted operations are still in flight.
    NoQuiesceAtPromise,
    /// The promise is not persisted.
    PromiseNotPersisted,
    /// A learner's dirty regions are found without its complete_lsn.
    RejoinByRegionOnly,
    /// A refused proposal is taken as its outcome: R leaves `required` again.
    RefusalIsOutcome,
    /// A learner applies a PREPARE even when the block holds a newer operation.
    PrepareUnorderedAtLearner,
    /// The lease asks the ISR only, not the replica whose admission is pending.
    LeaseByIsr,
    /// The lease is not looked at.
    LeaseIgnored,
    /// A store that has just started serves in place of another at once.
    NoBootWait,
    /// A new primary does not wait for the end of its own promise.
    NoPromiseWait,
    /// A parked write keeps its range lock without its lsn being decided.
    ParkWithLock,
    /// A primary that was refused goes on in the same epoch.
    NackedGoesOn,
    /// A heartbeat of a deposed primary renews the promise to it.
    HeartbeatAnyEpoch,
    /// A write that is committed without the learner's acknowledgement leaves its region clean.
    NoRedirty,
    /// A COPY replaces live writes that are newer.
    DelayedCopy,
    /// The acknowledgement of an earlier pass cleans a region that is dirty again.
    LateCopied,
    /// A write is committed when the primary alone has it.
    CommitAlone,
    /// A write is committed when the ISR has it, although an admission is pending.
    AdmitNotRequired,
    /// A read does not wait for an uncommitted write of its blocks.
    DirtyRead,
    /// An old epoch is not refused.
    NoEpochCheck,
    /// Acknowledgements of an earlier incarnation count.
    NoIncarnationCheck,
    /// A duplicate PREPARE is acknowledged before it is durable.
    AckDuplicateEarly,
    /// Regions are copied without holding back new writes to them.
    NoRegionLock,
    /// Requests of a fenced path slot still run.
    NoPathFencing,
    /// A write gets its lsn although a member has no room for it.
    CreditIgnored,
    /// A primary that has given back what it was promised goes on serving.
    ReleasedGoesOn,
    /// Of the damaged blocks of a read only the first is written again.
    HealFirstOnly,
    /// What another member could not read is not written again.
    MemberDamageForgotten,
    /// A read with damaged blocks is asked as a whole from one member after the other.
    WholeRangeAsk,
}

impl Mutant {
    /// Every seeded bug.
    pub const ALL: [Mutant; 29] = [
        Mutant::SettleOwnTailOnly,
        Mutant::NoQuiesceAtPromise,
        Mutant::PromiseNotPersisted,
        Mutant::RejoinByRegionOnly,
        Mutant::RefusalIsOutcome,
        Mutant::PrepareUnorderedAtLearner,
        Mutant::LeaseByIsr,
        Mutant::LeaseIgnored,
        Mutant::NoBootWait,
        Mutant::NoPromiseWait,
        Mutant::ParkWithLock,
        Mutant::NackedGoesOn,
        Mutant::HeartbeatAnyEpoch,
        Mutant::NoRedirty,
        Mutant::DelayedCopy,
        Mutant::LateCopied,
        Mutant::CommitAlone,
        Mutant::AdmitNotRequired,
        Mutant::DirtyRead,
        Mutant::NoEpochCheck,
        Mutant::NoIncarnationCheck,
        Mutant::AckDuplicateEarly,
        Mutant::NoRegionLock,
        Mutant::NoPathFencing,
        Mutant::CreditIgnored,
        Mutant::ReleasedGoesOn,
        Mutant::HealFirstOnly,
        Mutant::MemberDamageForgotten,
        Mutant::WholeRangeAsk,
    ];

    /// Those that random worlds catch soon and surely (crates/sim/tests/mutants.rs). Each of the others
    /// breaks a rule that one machine by itself shows (`seeded.rs`).
    pub const OF_WORLDS: [Mutant; 11] = [
        Mutant::SettleOwnTailOnly,
        Mutant::PromiseNotPersisted,
        Mutant::PrepareUnorderedAtLearner,
        Mutant::ParkWithLock,
        Mutant::NoRedirty,
        Mutant::DelayedCopy,
        Mutant::CommitAlone,
        Mutant::AdmitNotRequired,
        Mutant::DirtyRead,
        Mutant::NoEpochCheck,
        Mutant::AckDuplicateEarly,
    ];

    /// True when this is the seeded bug `which` and seeded bugs are compiled in.
    #[must_use]
    #[inline]
    pub fn is(self, which: Mutant) -> bool {
        MUTANTS && self == which
    }
}
