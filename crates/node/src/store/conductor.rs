//! What is known of the conductor: by this store's agent, and by the other stores.
//!
//! The agent tells which conductor it follows (`told`), and every heartbeat and every answer to one
//! carries that to the other stores. What their heartbeats say is kept apart (`heard`): a conductor
//! that asks for it learns of a newer one, or of a metastore further than its own, from any store that
//! has met a store which followed it (docs/internals/replication.md, section 6).
//!
//! Both only grow ([`Followed::learn`]). They have a lock of their own, which the agent and the
//! heartbeat thread take for the copy of three numbers; no thread that moves data does.

use std::sync::{Arc, Mutex, MutexGuard};

/// A conductor, as far as a store follows it; zeros: none yet.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Followed {
    /// Its term.
    pub term: u64,
    /// Lineage of its metastore.
    pub lineage: u64,
    /// Highest revision of that metastore that is known.
    pub revision: u64,
}

impl Followed {
    /// Take over what is newer. Lower terms are those of deposed conductors and say nothing; of two
    /// lineages the one with the higher term is the cluster's. Within a lineage the revision never
    /// goes back, also not with a higher term: that would be a restored metastore, and just what is
    /// to be noticed.
    fn learn(&mut self, other: Followed) {
        if other.lineage == self.lineage {
            if other.term >= self.term {
                let revision = other.revision.max(self.revision);
                *self = Followed { revision, ..other };
            }
        } else if other.term > self.term {
            *self = other;
        }
    }
}

#[derive(Default)]
struct Known {
    told: Followed,
    heard: Followed,
}

/// Both, as the control plane and the heartbeat thread see them.
#[derive(Clone, Default)]
pub(super) struct Conductor(Arc<Mutex<Known>>);

impl Conductor {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().expect("a panic under this lock has ended the process")
    }

    /// The agent has been told so.
    pub(super) fn tell(&self, followed: Followed) {
        self.lock().told.learn(followed);
    }

    /// What the agent was told.
    pub(super) fn told(&self) -> Followed {
        self.lock().told
    }

    /// Another store says so.
    pub(super) fn hear(&self, followed: Followed) {
        self.lock().heard.learn(followed);
    }

    /// What other stores have said.
    pub(super) fn heard(&self) -> Followed {
        self.lock().heard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_newer_is_learnt() {
        let followed = |term, lineage, revision| Followed { term, lineage, revision };
        let steps = [
            (followed(3, 7, 40), followed(3, 7, 40), "the first"),
            (followed(3, 7, 41), followed(3, 7, 41), "it has written on"),
            (followed(3, 7, 39), followed(3, 7, 41), "said late"),
            (followed(2, 7, 90), followed(3, 7, 41), "a deposed conductor"),
            (followed(4, 7, 12), followed(4, 7, 41), "a metastore restored from a copy"),
            (followed(4, 8, 99), followed(4, 7, 41), "another lineage that was not agreed upon"),
            (followed(5, 8, 2), followed(5, 8, 2), "the lineage of a recovered configuration"),
            (followed(4, 7, 99), followed(5, 8, 2), "the lineage before it"),
        ];
        let mut known = Followed::default();
        for (learnt, expected, why) in steps {
            known.learn(learnt);
            assert_eq!(known, expected, "{why}");
        }
    }
}
