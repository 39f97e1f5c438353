//! `pureflash._core`: what Python sees of the Rust half.
//!
//! **Why Rust:** it is the seam itself. It holds no logic: one file per exposed class, each thin.
//! No Rust thread calls Python, and no Python runs per I/O; see docs/internals/architecture.md.

mod build_info;
mod client_spec;
mod errors;
mod gateway;
mod volume;

use pyo3::prelude::*;

/// The module that maturin puts beside the Python sources.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::build_info::{BuildInfo, build_info, version};
    #[pymodule_export]
    use super::gateway::Gateway;
    #[pymodule_export]
    use super::volume::Volume;
}
