//! Load for measuring, at three depths of the stack: a volume, a lane, a bare disk.
//!
//! The calls block with the GIL released and look at signals several times a second, so that Ctrl-C
//! ends them; the load itself ends by itself soon after, at the latest when its time is over.

use crate::disk::identity;
use crate::lane::engine_choice;
use crate::{client_spec, errors};
use node::ClientProblem;
use node::load::{self, LoadOptions, LoadProblem, PendingLoad, SECONDS_MAX};
use proto::Status;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use runtime::metrics::HistogramSnapshot;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Time between looks at signals.
const SIGNALS_EVERY: Duration = Duration::from_millis(100);
/// Time between looks for news of a volume in quiet times; as `client/follow.py` has it.
const NEWS_EVERY: Duration = Duration::from_secs(5);
/// Time between looks for news while requests wait for them.
const NEWS_WANTED_EVERY: Duration = Duration::from_millis(500);

/// What all three calls take: depth, block_bytes, read_percent, span_bytes, seconds, operations,
/// is_sequential, seed.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Work {
    depth: u32,
    block_bytes: u32,
    read_percent: u32,
    span_bytes: u64,
    seconds: f64,
    operations: Option<u64>,
    is_sequential: bool,
    seed: u64,
}

impl Work {
    fn options(self) -> PyResult<LoadOptions> {
        let time = Duration::try_from_secs_f64(self.seconds).map_err(|_| {
            let text = format!("{} seconds: 0 to {SECONDS_MAX}", self.seconds);
            errors::raise(Status::Invalid, &text)
        })?;
        Ok(LoadOptions {
            depth: self.depth,
            block_bytes: self.block_bytes,
            read_percent: self.read_percent,
            span_bytes: self.span_bytes,
            is_sequential: self.is_sequential,
            time,
            operations: self.operations,
            seed: self.seed,
        })
    }
}

fn raise(problem: &LoadProblem) -> PyErr {
    errors::raise(problem.status(), &problem.to_string())
}

/// Wait for a report: operations, seconds, flushes (or None), and of "reads" and "writes" count,
/// mean_us, p50_us, p99_us, max_us. `meanwhile` is called again and again.
fn wait<'py>(
    py: Python<'py>,
    begun: Result<PendingLoad, LoadProblem>,
    mut meanwhile: impl FnMut(&PendingLoad) -> PyResult<()>,
) -> PyResult<Bound<'py, PyDict>> {
    let pending = begun.map_err(|problem| raise(&problem))?;
    let report = loop {
        if let Some(result) = py.detach(|| pending.wait_for(SIGNALS_EVERY)) {
            break result.map_err(|problem| raise(&problem))?;
        }
        py.check_signals()?;
        meanwhile(&pending)?;
    };
    let out = PyDict::new(py);
    out.set_item("operations", report.operations)?;
    out.set_item("seconds", report.elapsed.as_secs_f64())?;
    out.set_item("flushes", report.flushes)?;
    out.set_item("reads", latency(py, &report.reads)?)?;
    out.set_item("writes", latency(py, &report.writes)?)?;
    Ok(out)
}

fn latency<'py>(py: Python<'py>, seen: &HistogramSnapshot) -> PyResult<Bound<'py, PyDict>> {
    let (out, count) = (PyDict::new(py), seen.count());
    let micros = |nanos: u64| nanos as f64 / 1000.0;
    out.set_item("count", count)?;
    out.set_item("mean_us", if count == 0 { 0.0 } else { micros(seen.sum()) / count as f64 })?;
    for (name, per_mille) in [("p50_us", 500), ("p99_us", 990), ("max_us", 1000)] {
        out.set_item(name, micros(seen.quantile(per_mille)))?;
    }
    Ok(out)
}

/// Put load on a volume through a session of its own. `look` gives a newer description, or None; it
/// is called by this thread, twice a second at most while requests wait, else every five seconds.
#[pyfunction]
#[pyo3(signature = (spec, work, *, cluster_id, look=None))]
pub fn load_volume<'py>(
    py: Python<'py>,
    spec: &Bound<'_, PyDict>,
    work: Work,
    cluster_id: &[u8],
    look: Option<&Bound<'_, PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let (cluster_id, spec) = (identity("cluster_id", cluster_id)?, client_spec::read(spec)?);
    let (mut since, mut is_wanted) = (Instant::now(), false);
    wait(py, load::run_volume(cluster_id, spec, work.options()?), |pending| {
        is_wanted |= pending.wants_news();
        let pause = if is_wanted { NEWS_WANTED_EVERY } else { NEWS_EVERY };
        let Some(look) = look.filter(|_| since.elapsed() >= pause) else { return Ok(()) };
        let found = look.call0()?;
        (since, is_wanted) = (Instant::now(), false);
        if found.is_none() {
            return Ok(());
        }
        let spec = client_spec::read(found.cast::<PyDict>()?)?;
        // The run may just have ended.
        match py.detach(|| pending.update(spec)) {
            Ok(()) | Err(ClientProblem::Stopped) => Ok(()),
            Err(problem) => Err(errors::client(&problem)),
        }
    })
}

/// Put load on the first lane of a formatted disk that no other process uses.
#[pyfunction]
#[pyo3(signature = (path, work, *, cluster_id, engine="auto"))]
pub fn load_lane<'py>(
    py: Python<'py>,
    path: PathBuf,
    work: Work,
    cluster_id: &[u8],
    engine: &str,
) -> PyResult<Bound<'py, PyDict>> {
    let (cluster_id, choice) = (identity("cluster_id", cluster_id)?, engine_choice(engine)?);
    let options = work.options()?;
    // Opening recovers the lane, which may take seconds.
    let begun = py.detach(|| load::run_lane(&path, &cluster_id, choice, options));
    wait(py, begun, |_| Ok(()))
}

/// Read from a file or device through its engine alone.
#[pyfunction]
#[pyo3(signature = (path, work, *, engine="auto"))]
pub fn load_disk<'py>(
    py: Python<'py>,
    path: PathBuf,
    work: Work,
    engine: &str,
) -> PyResult<Bound<'py, PyDict>> {
    let (choice, options) = (engine_choice(engine)?, work.options()?);
    let begun = py.detach(|| load::run_disk(&path, choice, options));
    wait(py, begun, |_| Ok(()))
}
