//! The I/O phase of each front end: foreign requests become [`proto::block::BlockRequest`]s, and
//! their results become foreign replies.
//!
//! **Why Rust:** it runs once per I/O. Everything before the first I/O (negotiation, login,
//! discovery, authentication) is Python, which hands over the socket and the parameters that were
//! agreed. No socket, clock or thread is here: frames in, frames out.

#![forbid(unsafe_code)]

pub mod nbd;
