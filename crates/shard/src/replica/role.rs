//! The roles of a replica, and which may follow which.
//!
//! Theory of operation. A replica has one role at a time. Two things give it one: a configuration
//! that became durable here, and its own reign while it is primary. `Replica::set_role` is the
//! place where it changes, and a change that is not in the table crashes the process: a primary
//! that serves without having settled is worse than one that is away. Configurations may be
//! skipped, so a follower may become whatever a newer one calls it, also in one step.

/// What a replica is at present.
///
/// The row is what it was, the column what it becomes; a test compares this with the table.
///
/// ```text
///            Out  Learner  Secondary  Settling  Active  Suspended  Leaving  Fenced
/// Out         .      x         x         x        .         .         .        x
/// Learner     x      .         x         x        .         .         .        x
/// Secondary   x      x         .         x        .         .         .        x
/// Settling    .      .         .         .        x         x         .        x
/// Active      .      .         .         .        .         x         x        x
/// Suspended   .      .         .         x        x         .         .        x
/// Leaving     .      .         .         .        x         x         .        x
/// Fenced      x      x         x         x        .         .         .        .
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// Not named by its configuration, or by an earlier life's name.
    Out,
    /// Being made equal.
    Learner,
    /// In the ISR, not primary.
    Secondary,
    /// Named primary; not yet serving.
    Settling,
    /// Serving.
    Active,
    /// Was refused by a replica that has promised a newer epoch: waits for that configuration.
    Suspended,
    /// Has given its reign away: waits for the configuration that says so.
    Leaving,
    /// The configuration that it served in is over, or what it promised could not be stored.
    Fenced,
}

use Role::{Active, Fenced, Learner, Leaving, Out, Secondary, Settling, Suspended};

impl Role {
    /// Whether a replica of this role may have that one next. A reign serves only after it settled,
    /// and ends only in being fenced; what is fenced serves again only through settling.
    #[must_use]
    pub fn may_become(self, next: Role) -> bool {
        let followers: &[Role] = match self {
            Out => &[Learner, Secondary, Settling, Fenced],
            Learner => &[Out, Secondary, Settling, Fenced],
            Secondary => &[Out, Learner, Settling, Fenced],
            Settling => &[Active, Suspended, Fenced],
            Active => &[Suspended, Leaving, Fenced],
            Suspended => &[Settling, Active, Fenced],
            Leaving => &[Active, Suspended, Fenced],
            Fenced => &[Out, Learner, Secondary, Settling],
        };
        followers.contains(&next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Role; 8] = [Out, Learner, Secondary, Settling, Active, Suspended, Leaving, Fenced];

    #[test]
    fn the_drawing_is_the_table() {
        let drawing: Vec<Vec<&str>> = include_str!("role.rs")
            .lines()
            .skip_while(|line| *line != "/// ```text")
            .skip(1)
            .take_while(|line| *line != "/// ```")
            .map(|line| line.trim_start_matches('/').split_whitespace().collect())
            .collect();
        let names: Vec<String> = ALL.iter().map(|role| format!("{role:?}")).collect();
        assert_eq!(drawing[0], names, "the columns");
        assert_eq!(drawing.len(), 1 + ALL.len());
        for (row, was) in drawing[1..].iter().zip(ALL) {
            assert_eq!(row[0], format!("{was:?}"));
            let marks: Vec<&str> =
                ALL.map(|next| if was.may_become(next) { "x" } else { "." }).to_vec();
            assert_eq!(row[1..], marks, "{was:?}");
        }
    }

    #[test]
    fn nothing_serves_that_has_not_settled_since_it_followed_or_was_fenced() {
        for was in ALL {
            assert!(!was.may_become(was));
            let has_reign = matches!(was, Settling | Active | Suspended | Leaving);
            assert_eq!(was.may_become(Active), has_reign && was != Active, "{was:?}");
            assert_eq!(was.may_become(Leaving), was == Active, "{was:?}");
            assert!(was == Fenced || was.may_become(Fenced), "{was:?}");
            let is_followed_by_follower =
                [Out, Learner, Secondary].iter().any(|next| was.may_become(*next));
            assert_eq!(is_followed_by_follower, !has_reign, "a reign ends fenced: {was:?}");
        }
    }
}
