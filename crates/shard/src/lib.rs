//! One shard: `session` is the client's end of it, `primary` the serving one.
//!
//! **Why Rust:** it runs per I/O and is a safety machine that the simulator must own.

#![forbid(unsafe_code)]

pub mod session;
