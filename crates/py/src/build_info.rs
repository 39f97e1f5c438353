//! What this build of the extension module is: `pf version`, `pf doctor` and support bundles show
//! it, so that a report can be matched with the code that made it.

use pyo3::prelude::*;

/// Facts fixed when the module was compiled. Immutable, so Python may share it between threads.
#[pyclass(frozen, get_all, module = "pureflash._core")]
pub struct BuildInfo {
    version: &'static str,
    profile: &'static str,
    opt_level: &'static str,
    target: &'static str,
    features: Vec<&'static str>,
}

/// Name the version of the extension module; it always equals the package's own.
#[pyfunction]
pub fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Describe this build: version, Cargo profile, optimisation level, target and crate features.
#[pyfunction]
pub fn build_info() -> BuildInfo {
    BuildInfo {
        version: version(),
        profile: env!("PUREFLASH_PROFILE"),
        opt_level: env!("PUREFLASH_OPT_LEVEL"),
        target: env!("PUREFLASH_TARGET"),
        features: env!("PUREFLASH_FEATURES").split(',').filter(|name| !name.is_empty()).collect(),
    }
}
