//! `Volume`: blocking reads and writes of one volume. The GIL is released while a request is under
//! way, and signals are looked at several times a second, so that Ctrl-C ends a wait for a store
//! that is away.
//!
//! A fork copies a volume without its thread: whatever waits for an answer in the child would wait
//! for ever, and what it sent would go out on connections of the parent. So a volume knows the
//! process that opened it. Any other gets an exception from each method, and when it drops its copy
//! nothing happens: threads that it does not have are not waited for.

use crate::disk::identity;
use crate::gateway::{counters_dict, event_tuple};
use crate::{client_spec, errors};
use node::client::TRANSFER_BYTES_MAX;
use node::{BlockData, BlockOp, ClientProblem};
use proto::Status;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};
use std::os::fd::RawFd;
use std::time::Duration;

/// Time between looks at signals.
const SIGNALS_EVERY: Duration = Duration::from_millis(100);

/// What to do about a volume of another process.
const FORKED_STEP: &str =
    "open it in the process that uses it, or start that process with the method \"spawn\"";

/// An open volume. Usable from several threads of the process that opened it.
#[pyclass(frozen, module = "pureflash._core")]
pub struct Volume {
    /// Taken when it is dropped, which a forked child must not do.
    inner: Option<node::Volume>,
    /// Process that opened it.
    pid: u32,
}

impl Drop for Volume {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            std::mem::forget(self.inner.take());
        }
    }
}

fn raise<T>(result: Result<T, ClientProblem>) -> PyResult<T> {
    result.map_err(|problem| errors::client(&problem))
}

impl Volume {
    /// The volume itself, for the process that opened it. A `getpid` is cheap beside any request.
    fn own(&self) -> PyResult<&node::Volume> {
        let here = std::process::id();
        if self.pid != here {
            let opener = self.pid;
            let message = format!("the volume was opened by process {opener}, not by {here}");
            return Err(errors::raise_with_step(Status::InUse, &message, Some(FORKED_STEP)));
        }
        Ok(self.inner.as_ref().expect("only drop takes it"))
    }

    /// Carry out one request. After a signal's exception its result goes nowhere; its data are the
    /// request's own, so nothing of the caller's is still used.
    fn run(&self, py: Python<'_>, op: BlockOp) -> PyResult<BlockData> {
        let pending = raise(self.own()?.begin(op))?;
        loop {
            if let Some(result) = py.detach(|| pending.wait_for(SIGNALS_EVERY)) {
                return raise(result);
            }
            py.check_signals()?;
        }
    }
}

#[pymethods]
impl Volume {
    #[new]
    #[pyo3(signature = (spec, *, cluster_id, io_timeout_ms=None))]
    fn new(
        spec: &Bound<'_, PyDict>,
        cluster_id: &[u8],
        io_timeout_ms: Option<u64>,
    ) -> PyResult<Volume> {
        let cluster_id = identity("cluster_id", cluster_id)?;
        let spec = client_spec::read(spec)?;
        raise(node::Volume::open(cluster_id, spec, io_timeout_ms.map(Duration::from_millis)))
            .map(|inner| Volume { inner: Some(inner), pid: std::process::id() })
    }

    fn pread<'py>(
        &self,
        py: Python<'py>,
        offset: u64,
        length: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        self.own()?; // also of nothing
        let mut parts = Vec::new();
        let mut done = 0;
        while done < length {
            let count = (length - done).min(TRANSFER_BYTES_MAX);
            let len = u32::try_from(count).expect("at most 32 MiB");
            let offset = offset.saturating_add(done as u64);
            parts.push(self.run(py, BlockOp::Read { offset, len })?);
            done += count;
        }
        PyBytes::new_with(py, length, |into| {
            let mut at = 0;
            for buf in parts.iter().flatten() {
                into[at..at + buf.len()].copy_from_slice(buf);
                at += buf.len();
            }
            assert_eq!(at, length, "the session brings as many bytes as were asked for");
            Ok(())
        })
    }

    fn pwrite(&self, py: Python<'_>, offset: u64, data: PyBuffer<u8>) -> PyResult<()> {
        let volume = self.own()?;
        if !data.is_c_contiguous() {
            return Err(PyBufferError::new_err("the buffer is not contiguous"));
        }
        let length = data.len_bytes();
        let mut done = 0;
        while done < length {
            let count = (length - done).min(TRANSFER_BYTES_MAX);
            // SAFETY: the buffer is contiguous, `len_bytes` long, and cannot be freed or resized
            // while `data` holds it; the slice ends before the GIL is released, so no Python code
            // changes the bytes while they are copied.
            let buffers = unsafe {
                let start = data.buf_ptr().cast::<u8>().cast_const().add(done);
                volume.buffers(std::slice::from_raw_parts(start, count))
            };
            let offset = offset.saturating_add(done as u64);
            self.run(py, BlockOp::Write { offset, data: buffers })?;
            done += count;
        }
        Ok(())
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.run(py, BlockOp::Flush).map(drop)
    }

    fn discard(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        self.run(py, BlockOp::Discard { offset, len: length }).map(drop)
    }

    fn write_zeroes(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        let op = BlockOp::WriteZeroes { offset, len: length, keep_allocated: false };
        self.run(py, op).map(drop)
    }

    #[getter]
    fn size(&self) -> PyResult<u64> {
        Ok(self.own()?.size_bytes())
    }

    fn update(&self, py: Python<'_>, spec: &Bound<'_, PyDict>) -> PyResult<()> {
        let spec = client_spec::read(spec)?;
        let volume = self.own()?;
        raise(py.detach(|| volume.update(spec)))
    }

    fn fileno(&self) -> PyResult<RawFd> {
        Ok(self.own()?.event_fd())
    }

    fn drain<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        self.own()?.drain().iter().map(|event| event_tuple(py, event)).collect()
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let volume = self.own()?;
        let counters = raise(py.detach(|| volume.counters()))?;
        counters_dict(py, &counters)
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let volume = self.own()?;
        py.detach(|| volume.close());
        Ok(())
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    #[pyo3(signature = (exc_type, exc_value, traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        // Closed whatever has happened. An exception goes its way; also that of a forked child,
        // which has nothing to close.
        let _ = (exc_value, traceback);
        if exc_type.is_none() { self.close(py) } else { self.close(py).or(Ok(())) }
    }
}
