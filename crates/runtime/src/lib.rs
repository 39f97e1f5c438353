//! The only I/O of the product: disk engines, reactor, sockets, clock.
//!
//! **Why Rust:** it runs per I/O, and it is where `unsafe` lives (io_uring's shared memory, raw
//! locks, control blocks of AIO): nowhere else but here and in `py`. It knows nothing of replication, disk format or
//! protocols: machines of other crates run *on* it, through the types of `proto`.
//!
//! - [`disk_file`] opens a disk, locks it and finds out what its promises are worth.
//! - [`blocking`] does single disk operations before a reactor exists.
//! - [`engine`] moves blocks between pooled buffers and a disk: io_uring, AIO, threads or memory.
//! - [`reactor`] is the loop of one lane's thread: disks, connections, commands, one timer.
//! - [`metrics`] counts, for readers on other threads.
//! - [`clock`], [`thread`](mod@thread) and [`wake`] are what those share.

pub mod blocking;
pub mod clock;
pub mod disk_file;
pub mod engine;
pub mod error;
pub mod metrics;
pub mod reactor;
pub mod thread;
pub mod wake;

pub use disk_file::DiskFile;
pub use error::RuntimeError;
