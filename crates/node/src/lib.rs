//! Wiring: what a process is made of, assembled from the machines (`lane`, `shard`, `front`) and the
//! runtime. It decides nothing that a machine could decide.
//!
//! **Why Rust:** it runs per I/O.

#![forbid(unsafe_code)]

pub mod client;
pub mod direct;
pub mod disk;
#[cfg(test)]
mod faulty;
pub mod framing;
pub mod gateway;
pub mod lanes;
mod link;
pub mod load;
pub mod spec;
pub mod status;
pub mod store;

pub use client::Volume;
pub use gateway::Gateway;
pub use link::ClientEvent;
pub use proto::block::{BlockData, BlockOp};
pub use shard::session::{Counters, ShardRoute, Target, VolumeConf as VolumeSpec};

use proto::Status;
use proto::wire::WireError;
use runtime::RuntimeError;
use shard::session::ConfProblem;
use std::io;

/// Why a gateway or a volume client refuses or fails.
#[derive(Debug, thiserror::Error)]
pub enum ClientProblem {
    /// The description of a volume cannot be used.
    #[error(transparent)]
    Conf(#[from] ConfProblem),
    /// The bytes of a ticket are none.
    #[error("not a signed ticket: {0}")]
    Ticket(#[from] WireError),
    /// An address of a store.
    #[error("{address:?} is no address: {reason}")]
    Address {
        /// As given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The operating system.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The socket cannot be adopted.
    #[error("the socket cannot be adopted: {0}")]
    SocketRefused(io::Error),
    /// More was read behind the handshake than may be.
    #[error("{0} bytes behind the handshake, the limit is 65536")]
    LeftoverTooLong(usize),
    /// The volume has all the connections that it may have.
    #[error("the volume has 65536 connections")]
    TooManyConnections,
    /// Nobody fetches the ends of connections.
    #[error("8192 ended connections were not fetched with drain()")]
    EventsNotDrained,
    /// No volume is open under this handle, or it is being closed.
    #[error("no volume is open under handle {0}")]
    UnknownHandle(u64),
    /// A volume is open under this handle.
    #[error("handle {0} is in use")]
    HandleInUse(u64),
    /// The command queue is full.
    #[error("the data path is behind with its commands")]
    Busy,
    /// It was closed.
    #[error("it is closed")]
    Stopped,
    /// A newer attach has fenced this one.
    #[error(
        "another client attached this volume for writing; attach again to go on (a write that \
         failed now may have been carried out before or not: read it back)"
    )]
    TakenOver,
    /// The volume said no.
    #[error("{0}")]
    Failed(Status),
}

impl ClientProblem {
    /// Why a session has answered a request with this status.
    #[must_use]
    pub fn of_reply(status: Status) -> ClientProblem {
        if status == Status::Fenced {
            return ClientProblem::TakenOver;
        }
        ClientProblem::Failed(status)
    }

    /// The code that tells the user how to react.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            ClientProblem::Conf(_)
            | ClientProblem::Ticket(_)
            | ClientProblem::Address { .. }
            | ClientProblem::SocketRefused(_) => Status::Invalid,
            ClientProblem::Runtime(_) => Status::Unavailable,
            ClientProblem::LeftoverTooLong(_)
            | ClientProblem::TooManyConnections
            | ClientProblem::EventsNotDrained => Status::Limit,
            ClientProblem::UnknownHandle(_) => Status::NotFound,
            ClientProblem::HandleInUse(_) => Status::InUse,
            ClientProblem::Busy => Status::Busy,
            ClientProblem::Stopped => Status::Cancelled,
            ClientProblem::TakenOver => Status::Fenced,
            ClientProblem::Failed(status) => *status,
        }
    }
}
