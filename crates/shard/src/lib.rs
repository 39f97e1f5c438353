//! One shard: `session` is the client's end of it, `replica` the serving one, `conf` who they are.
//! `heartbeat` holds the leases of a whole store, `paths` the connections of its clients, `exchange`
//! is what one request of theirs becomes.
//!
//! **Why Rust:** it runs per I/O and is a safety machine that the simulator must own.

#![forbid(unsafe_code)]

pub mod client;
pub mod conf;
pub mod exchange;
pub mod heartbeat;
pub mod mutant;
pub mod paths;
pub mod replica;
#[cfg(test)]
mod seeded;
pub mod session;
mod table;
