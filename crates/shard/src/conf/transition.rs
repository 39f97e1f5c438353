//! T1 to T9: the only functions that make a configuration from another.

use super::{CopyId, Incarnation, Member};

/// What is asked to change. Each is applied to one epoch of one shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Transition {
    /// T1: leave this member out of the ISR.
    Remove {
        /// Which.
        copy: CopyId,
    },
    /// T2: make this member primary, and leave the old primary out of the ISR.
    Promote {
        /// Which.
        copy: CopyId,
    },
    /// T3: begin to make this replica equal. Replaces the member with its number, if there is one.
    AddLearner {
        /// Which, in which life.
        member: Member,
    },
    /// T4: take a learner into the ISR; its digests were equal.
    Admit {
        /// Which.
        copy: CopyId,
        /// The life that was made equal.
        incarnation: Incarnation,
    },
    /// T5: make this member primary; the old one is drained and stays in the ISR.
    Transfer {
        /// Which.
        copy: CopyId,
    },
    /// T6: open the shard again after every member of its ISR was lost at once.
    Reopen {
        /// The new primary.
        primary: CopyId,
        /// The good members that are there, with their new lives; `primary` is one of them.
        present: Vec<Member>,
    },
    /// T7: a human decides on a history.
    ForceAccept {
        /// Whose content counts.
        member: Member,
        /// The new history.
        history_id: u64,
    },
    /// T8: stop making this replica equal.
    Cancel {
        /// Which.
        copy: CopyId,
    },
    /// T9: refuse writers attached earlier.
    Attach {
        /// The new one.
        attach_epoch: u64,
    },
    /// T9: change what the shard is to have.
    Properties {
        /// Replicas wanted.
        rf: u8,
        /// Replicas without which no write is committed.
        min_write: u8,
    },
}
