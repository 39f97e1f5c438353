//! The simulated world: the real lane, shard and session machines, unchanged types, on virtual time,
//! network and disks. Seed in, trace out.
//!
//! One seed decides everything: which faults happen and how strong, the schedule, the workload. A
//! world ends after a safety phase with faults, a liveness phase on a healthy core and a rest in
//! which every copy is compared; or at the first broken invariant of docs/internals/replication.md
//! section 9, where it stops. The same seed and build give the same trace, event for event: nothing
//! here iterates over a set without order, asks a clock or draws a number of its own.
//!
//! `world` joins the parts; `store` is one store process; `conductor` the register of configurations;
//! `client` a session and its workload; `network`, `disk`, `faults` the ways in which things fail;
//! `check` and `history` the model of the truth; `phases` the life of a world.
//!
//! **Why Rust:** it drives the safety machines event by event, some hundred thousand times a second;
//! Python steps it, chooses options, shrinks and reports.

#![forbid(unsafe_code)]

pub mod check;
pub mod client;
mod codec;
pub mod conductor;
mod connections;
mod content;
pub mod disk;
mod events;
mod faults;
mod genesis;
pub mod history;
pub mod network;
pub mod options;
mod phases;
pub mod random;
mod rot;
pub mod store;
pub mod trace;
mod world;

pub use options::Options;
pub use world::{World, WorldProblem};
