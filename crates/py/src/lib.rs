//! `pureflash._core`: what Python sees of the Rust half.
//!
//! **Why Rust:** it is the seam itself. It holds no logic: one file per exposed class, each thin.
//! No Rust thread calls Python, and no Python runs per I/O; see docs/internals/architecture.md.

mod build_info;
mod client_spec;
mod conf;
mod disk;
mod errors;
mod gateway;
mod lane;
mod load;
mod store;
mod volume;
mod world;

use pyo3::prelude::*;

// What users run never carries the seeded bugs of the tests.
const _: () = assert!(!::lane::MUTANTS, "the wheel refuses the lane's `mutants` feature");
const _: () = assert!(!::shard::mutant::MUTANTS, "the wheel refuses the `mutants` feature");

/// The module that maturin puts beside the Python sources.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::build_info::{BuildInfo, build_info, version};
    #[pymodule_export]
    use super::conf::{conf_apply, conf_decode, conf_encode, conf_first};
    #[pymodule_export]
    use super::disk::{format_disk, inspect_disk};
    #[pymodule_export]
    use super::gateway::Gateway;
    #[pymodule_export]
    use super::lane::Lane;
    #[pymodule_export]
    use super::load::{load_disk, load_lane, load_volume};
    #[pymodule_export]
    use super::store::StoreNode;
    #[pymodule_export]
    use super::volume::Volume;
    #[pymodule_export]
    use super::world::World;
}
