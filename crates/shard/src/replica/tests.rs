//! One replica by itself, rule by rule of docs/internals/replication.md. Whole shards are the
//! simulator's (`crates/sim`): here the test decides which answer comes first, so that each rule has
//! the one schedule in which breaking it shows. `rules` are the ones that a seeded bug breaks.

mod bench;
mod damage;
mod history;
mod pace;
mod roles;
pub(crate) mod rules;
