//! One lane in this process, for tools, tests and the demo.

use crate::disk::identity;
use crate::errors::raise;
use node::direct::{DirectLane, DirectProblem};
use node::status;
use proto::{BLOCK_BYTES, Status};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use runtime::engine::EngineChoice;
use std::path::PathBuf;
use std::sync::RwLock;

/// `auto`, `uring`, `aio` or `threads`.
pub fn engine_choice(name: &str) -> PyResult<EngineChoice> {
    match name {
        "auto" => Ok(EngineChoice::Auto),
        "uring" => Ok(EngineChoice::Uring),
        "aio" => Ok(EngineChoice::Aio),
        "threads" => Ok(EngineChoice::Threads),
        other => {
            let text = format!("engine is {other:?}: use auto, uring, aio or threads");
            Err(raise(Status::Invalid, &text))
        }
    }
}

/// The first lane of a formatted disk, opened by this process alone.
///
/// Methods block until the lane has answered and may be called from several threads: requests that
/// arrive together share journal frames and flushes. Blocks are 4,096 bytes.
#[pyclass(frozen, module = "pureflash._core")]
pub struct Lane {
    /// Many threads use it; `close` takes it away.
    inner: RwLock<Option<DirectLane>>,
}

impl Lane {
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        body: impl FnOnce(&DirectLane) -> Result<T, DirectProblem> + Send,
    ) -> PyResult<T> {
        py.detach(|| {
            let inner = self.inner.read().expect("no panic happens under this lock");
            body(inner.as_ref().ok_or(DirectProblem::Closed)?)
        })
        .map_err(|problem| raise(status::of_direct(&problem), &problem.to_string()))
    }
}

#[pymethods]
impl Lane {
    /// Open the disk at `path`, recovering what a crash left.
    #[new]
    #[pyo3(signature = (path, *, cluster_id, engine="auto"))]
    fn new(py: Python<'_>, path: PathBuf, cluster_id: &[u8], engine: &str) -> PyResult<Lane> {
        let (cluster_id, choice) = (identity("cluster_id", cluster_id)?, engine_choice(engine)?);
        let inner = py
            .detach(|| DirectLane::open(&path, &cluster_id, choice))
            .map_err(|problem| raise(status::of_direct(&problem), &problem.to_string()))?;
        Ok(Lane { inner: RwLock::new(Some(inner)) })
    }

    /// Create a replica of shard 0 of a volume; returns its shard index.
    fn create(&self, py: Python<'_>, volume_id: u64, blocks: u32) -> PyResult<u32> {
        self.with(py, |lane| lane.create(volume_id, blocks))
    }

    /// Write whole blocks; returns when they are durable.
    #[pyo3(signature = (shard_ix, first, data, *, seq, commit))]
    fn write(
        &self,
        py: Python<'_>,
        shard_ix: u32,
        first: u32,
        data: &[u8],
        seq: u64,
        commit: u64,
    ) -> PyResult<()> {
        if data.is_empty() || !data.len().is_multiple_of(BLOCK_BYTES) || data.len() > 1 << 20 {
            let text = format!("{} bytes: whole blocks of 4,096, at most 1 MiB", data.len());
            return Err(raise(Status::Misaligned, &text));
        }
        self.with(py, |lane| lane.write(shard_ix, (seq, commit), first, data))
    }

    /// Forget blocks; they read as zeros afterwards.
    #[pyo3(signature = (shard_ix, first, count, *, seq, commit))]
    fn discard(
        &self,
        py: Python<'_>,
        shard_ix: u32,
        first: u32,
        count: u32,
        seq: u64,
        commit: u64,
    ) -> PyResult<()> {
        self.with(py, |lane| lane.discard(shard_ix, (seq, commit), first, count))
    }

    /// Read whole blocks, verified against their checksums.
    fn read<'py>(
        &self,
        py: Python<'py>,
        shard_ix: u32,
        first: u32,
        count: u32,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = self.with(py, |lane| lane.read(shard_ix, first, count))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Write a checkpoint; returns when it is durable.
    fn checkpoint(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, DirectLane::checkpoint)
    }

    /// What recovery found, what the lane has done, and the replicas it holds.
    fn facts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let facts = self.with(py, DirectLane::facts)?;
        let out = PyDict::new(py);
        for (name, value) in [
            ("writes", facts.counters.writes),
            ("touches", facts.counters.touches),
            ("redos", facts.counters.redos),
            ("intents", facts.counters.intents),
            ("frames", facts.counters.frames),
            ("flushes", facts.counters.flushes),
            ("checkpoints", facts.counters.checkpoints),
            ("journal_wraps", facts.counters.journal_wraps),
            ("replayed_records", facts.report.records),
            ("verified_blocks", facts.report.verified_blocks),
            ("restored_blocks", facts.report.restored_blocks),
            ("placed_blocks", facts.report.placed_blocks),
            ("poisoned_blocks", facts.report.poisoned_blocks),
        ] {
            out.set_item(name, value)?;
        }
        out.set_item("engine", facts.engine)?;
        out.set_item("replicas", facts.replicas)?;
        Ok(out)
    }

    /// Close cleanly. A second call does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            let taken = self.inner.write().expect("no panic happens under this lock").take();
            taken.map_or(Ok(()), |mut lane| lane.close())
        })
        .map_err(|problem| raise(status::of_direct(&problem), &problem.to_string()))
    }
}
