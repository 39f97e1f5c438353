//! `Gateway`: sockets of negotiated clients go in, their I/O never comes back to Python.

use crate::disk::identity;
use crate::{client_spec, errors};
use node::gateway::{NbdAdoption, VolumeStats};
use node::{ClientEvent, ClientProblem, Counters};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// The data path of a gateway: one thread, the volumes it has open, the connections it serves.
#[pyclass(frozen, module = "pureflash._core")]
pub struct Gateway(node::Gateway);

fn raise<T>(result: Result<T, ClientProblem>) -> PyResult<T> {
    result.map_err(|problem| errors::client(&problem))
}

#[pymethods]
impl Gateway {
    #[new]
    #[pyo3(signature = (*, cluster_id))]
    fn new(cluster_id: &[u8]) -> PyResult<Gateway> {
        let cluster_id = identity("cluster_id", cluster_id)?;
        raise(node::Gateway::start(cluster_id)).map(Gateway)
    }

    fn open_volume(&self, py: Python<'_>, handle: u64, spec: &Bound<'_, PyDict>) -> PyResult<()> {
        let spec = client_spec::read(spec)?;
        raise(py.detach(|| self.0.open_volume(handle, spec)))
    }

    fn update_volume(&self, py: Python<'_>, handle: u64, spec: &Bound<'_, PyDict>) -> PyResult<()> {
        let spec = client_spec::read(spec)?;
        raise(py.detach(|| self.0.update_volume(handle, spec)))
    }

    fn close_volume(&self, py: Python<'_>, handle: u64) -> PyResult<()> {
        raise(py.detach(|| self.0.close_volume(handle)))
    }

    fn adopt_nbd(
        &self,
        py: Python<'_>,
        fd: RawFd,
        leftover: Vec<u8>,
        handle: u64,
        structured: bool,
        read_only: bool,
    ) -> PyResult<u64> {
        let socket = duplicate(fd)?;
        let adoption = NbdAdoption {
            socket,
            leftover,
            handle,
            is_structured: structured,
            is_read_only: read_only,
        };
        raise(py.detach(|| self.0.adopt_nbd(adoption)))
    }

    fn fileno(&self) -> RawFd {
        self.0.event_fd()
    }

    fn drain<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        self.0.drain().iter().map(|event| event_tuple(py, event)).collect()
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let all = raise(py.detach(|| self.0.stats()))?;
        let (stats, volumes) = (PyDict::new(py), PyDict::new(py));
        for volume in all {
            volumes.set_item(volume.handle, volume_dict(py, &volume)?)?;
        }
        stats.set_item("volumes", volumes)?;
        Ok(stats)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}

/// A descriptor of our own for the caller's socket.
fn duplicate(fd: RawFd) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(errors::client(&ClientProblem::SocketRefused(
            std::io::Error::from_raw_os_error(9), // EBADF
        )));
    }
    // SAFETY: the number is used by one call only, `fcntl(F_DUPFD_CLOEXEC)`, which fails with EBADF
    // if it names no open descriptor; the caller's descriptor is neither kept nor closed.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let owned = borrowed.try_clone_to_owned();
    owned.map_err(|error| errors::client(&ClientProblem::SocketRefused(error)))
}

/// ("closed", connection, reason) or ("conf_needed", handle, shard index).
pub fn event_tuple<'py>(py: Python<'py>, event: &ClientEvent) -> PyResult<Bound<'py, PyTuple>> {
    match event {
        ClientEvent::Closed { conn, reason } => ("closed", *conn, reason).into_pyobject(py),
        ClientEvent::ConfNeeded { handle, shard } => {
            ("conf_needed", *handle, *shard).into_pyobject(py)
        }
    }
}

fn volume_dict<'py>(py: Python<'py>, volume: &VolumeStats) -> PyResult<Bound<'py, PyDict>> {
    let dict = counters_dict(py, &volume.session)?;
    dict.set_item("size_bytes", volume.size_bytes)?;
    dict.set_item("open_requests", volume.open_requests)?;
    dict.set_item("connections", volume.connections)?;
    Ok(dict)
}

/// Counters of a session by name.
pub fn counters_dict<'py>(py: Python<'py>, counters: &Counters) -> PyResult<Bound<'py, PyDict>> {
    let Counters {
        requests,
        replies,
        errors,
        read_bytes,
        written_bytes,
        sent,
        resent,
        parked,
        bad_checksums,
        connects,
        greeted,
        lost,
        fences,
        violations,
        timed_out,
    } = *counters;
    let dict = PyDict::new(py);
    for (name, value) in [
        ("requests", requests),
        ("replies", replies),
        ("errors", errors),
        ("read_bytes", read_bytes),
        ("written_bytes", written_bytes),
        ("sent", sent),
        ("resent", resent),
        ("parked", parked),
        ("bad_checksums", bad_checksums),
        ("connects", connects),
        ("greeted", greeted),
        ("lost", lost),
        ("fences", fences),
        ("violations", violations),
        ("timed_out", timed_out),
    ] {
        dict.set_item(name, value)?;
    }
    Ok(dict)
}
