//! Wiring: what a process is made of, assembled from the machines (`lane`, `shard`, `front`) and the
//! runtime. It decides nothing that a machine could decide.
//!
//! **Why Rust:** it runs per I/O.

#![forbid(unsafe_code)]

pub mod direct;
pub mod disk;
pub mod lanes;
pub mod status;
