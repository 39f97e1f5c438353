//! Seeded bugs: each removes one rule of docs/internals/lane.md. The crash explorer must catch every
//! one, which proves that its checks work. They exist only with the `mutants` feature, which the
//! wheel refuses; without it `is` is constant false and costs nothing.

/// True when the seeded bugs are compiled in.
pub const MUTANTS: bool = cfg!(feature = "mutants");

/// Which rule is broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs, reason = "each name says which rule it breaks; the test table explains them")]
pub enum Mutant {
    #[default]
    None,
    ParallelOverwrite,
    AckWithoutPrefix,
    NoNonce,
    NonceSequential,
    NoResolve,
    ResolveWithoutSuspect,
    EarlyReuse,
    VerifyPerRecord,
    SingleTagSide,
    StableBeforePlaced,
    LearnerRaisesRegion,
    AckBeforeFlush,
    MoveWithoutNeighbours,
    MoveBeforeWritten,
}

impl Mutant {
    /// Every seeded bug.
    pub const ALL: [Mutant; 14] = [
        Mutant::ParallelOverwrite,
        Mutant::AckWithoutPrefix,
        Mutant::NoNonce,
        Mutant::NonceSequential,
        Mutant::NoResolve,
        Mutant::ResolveWithoutSuspect,
        Mutant::EarlyReuse,
        Mutant::VerifyPerRecord,
        Mutant::SingleTagSide,
        Mutant::StableBeforePlaced,
        Mutant::LearnerRaisesRegion,
        Mutant::AckBeforeFlush,
        Mutant::MoveWithoutNeighbours,
        Mutant::MoveBeforeWritten,
    ];

    /// True when this is the seeded bug `which` and seeded bugs are compiled in.
    #[must_use]
    #[inline]
    pub fn is(self, which: Mutant) -> bool {
        MUTANTS && self == which
    }
}
