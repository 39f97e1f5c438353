//! One lane: one core's share of one disk.
//!
//! It owns a superblock pair, a journal, a checkpoint, an allocator, an extent map and a data area,
//! and is run by exactly one thread. It is a machine: requests and disk completions in, disk
//! operations and replies out (`lane::Lane`). What it guarantees, in every crash: nothing that was
//! acknowledged is lost, nothing is invented, every block returned was verified. The rules R1-R12
//! that comments cite are in docs/internals/lane.md.
//!
//! **Why Rust:** it runs per I/O and is a safety machine that the simulator must own.

#![forbid(unsafe_code)]

pub mod alloc;
mod checkpoint;
mod deltas;
pub mod format;
mod formatter;
mod journal;
pub mod lane;
pub mod locks;
pub mod map;
pub mod mutant;
pub mod record;
pub mod recover;
pub mod tables;
pub mod tags;

pub use formatter::{FormatRequest, format_disk};
pub use lane::{Effects, Event, Lane, Op, Outcome, POISON_CRC, Problem, Reply, Request};
pub use mutant::{MUTANTS, Mutant};
pub use recover::{Fault, Mount, MountParameters, MountStep};

/// Blocks (4 KiB) of one slot, the allocation unit on disk.
pub const SLOT_BLOCKS: u32 = 16;
/// Slots of one extent.
pub const EXTENT_SLOTS: u32 = 64;
/// Blocks of one extent, a 4 MiB-aligned slice of a shard.
pub const EXTENT_BLOCKS: u32 = SLOT_BLOCKS * EXTENT_SLOTS;
/// Blocks of one region, the unit in which resync remembers the last write (1 MiB).
pub const REGION_BLOCKS: u32 = 256;
/// Largest shard: 64 GiB.
pub const SHARD_BLOCKS_MAX: u32 = 16 << 20;
/// "No slot" in formats.
pub const NO_SLOT: u32 = u32::MAX;
