//! A simulated world, stepped from Python: tests, swarms and shrinking live there.

use crate::errors::raise;
use proto::Status;
use pyo3::prelude::*;
use sim::WorldProblem;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

/// The world of one seed: real machines on virtual time, network and disks.
///
/// It ends after a phase with faults, one in which everything must become healthy, and a rest in
/// which every copy is compared; or at the first broken invariant. The same seed, options and build
/// give the same world.
#[pyclass(frozen, module = "pureflash._core")]
pub struct World {
    inner: Mutex<sim::World>,
}

impl World {
    fn inner(&self) -> PyResult<MutexGuard<'_, sim::World>> {
        // A panic of a machine under test is a finding; the world that it happened in is over.
        self.inner.lock().map_err(|_| raise(Status::Internal, "the world panicked before"))
    }
}

#[pymethods]
impl World {
    /// Make the world of `seed`. `options` is JSON that replaces what the seed chose.
    #[new]
    #[pyo3(signature = (seed, options="{}", trace=false))]
    fn new(py: Python<'_>, seed: u64, options: &str, trace: bool) -> PyResult<World> {
        let made = py.detach(|| sim::World::new(seed, options, trace));
        let world = made.map_err(|problem| {
            let status = match &problem {
                WorldProblem::Options(_) => Status::Invalid,
                WorldProblem::Disk(_) => Status::Internal,
            };
            raise(status, &problem.to_string())
        })?;
        Ok(World { inner: Mutex::new(world) })
    }

    /// Run at most so many events. False when the world is over.
    fn step(&self, py: Python<'_>, events: u64) -> PyResult<bool> {
        py.detach(|| Ok(self.inner()?.step(events)))
    }

    /// Run to the end.
    fn run(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            self.inner()?.run();
            Ok(())
        })
    }

    /// The first broken invariant, as "I3: ...".
    fn violation(&self) -> PyResult<Option<String>> {
        Ok(self.inner()?.violation().map(str::to_owned))
    }

    /// The options in force, as JSON.
    fn options(&self) -> PyResult<String> {
        Ok(self.inner()?.options())
    }

    /// How often what has happened.
    fn counts(&self) -> PyResult<BTreeMap<&'static str, u64>> {
        Ok(self.inner()?.counts())
    }

    /// XXH3-128, in hex, of everything that has happened.
    fn trace_hash(&self) -> PyResult<String> {
        Ok(self.inner()?.trace_hash())
    }

    /// The trace's lines since the last call; empty unless it is kept.
    fn take_trace(&self) -> PyResult<String> {
        Ok(self.inner()?.take_trace())
    }
}
