//! Formatting and inspecting disks from Python.

use crate::errors::raise;
use lane::format::{DiskHeader, Durability, Geometry};
use node::disk::{self, FormatOptions, hex};
use node::status;
use proto::{Pool, Status};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use runtime::DiskFile;
use std::path::PathBuf;

/// 16 bytes, as identities are.
pub fn identity(name: &str, bytes: &[u8]) -> PyResult<[u8; 16]> {
    bytes.try_into().map_err(|_| {
        let text = format!("{name} has {} bytes, an identity has 16", bytes.len());
        raise(Status::Invalid, &text)
    })
}

/// Format the disk at `path` and return what `inspect_disk` would say of it.
///
/// A file that does not exist is created sparse with `size_bytes`. Errors: `CallerError` when the
/// path holds a PureFlash disk already, is held by a process or is too small; `MediaError`.
#[pyfunction]
#[pyo3(signature = (path, *, size_bytes, cluster_id, journal_bytes=None, durability="auto"))]
pub fn format_disk<'py>(
    py: Python<'py>,
    path: PathBuf,
    size_bytes: Option<u64>,
    cluster_id: &[u8],
    journal_bytes: Option<u64>,
    durability: &str,
) -> PyResult<Bound<'py, PyDict>> {
    let options = FormatOptions {
        size_bytes,
        cluster_id: identity("cluster_id", cluster_id)?,
        journal_bytes,
        durability: match durability {
            "auto" => None,
            "plp" => Some(Durability::Plp),
            "volatile" => Some(Durability::Volatile),
            other => {
                let text = format!("durability is {other:?}: use auto, plp or volatile");
                return Err(raise(Status::Invalid, &text));
            }
        },
    };
    let header = py
        .detach(|| disk::format(&path, &options))
        .map_err(|problem| raise(status::of_disk(&problem), &problem.to_string()))?;
    describe(py, &header)
}

/// Read a disk's header without changing anything.
///
/// Errors: `CallerError` for a disk that is in use or not one of ours, `MediaError`.
#[pyfunction]
pub fn inspect_disk(py: Python<'_>, path: PathBuf) -> PyResult<Bound<'_, PyDict>> {
    let header = py
        .detach(|| {
            let file = DiskFile::open(&path)?;
            disk::read_header(&file, &Pool::new(1 << 20))
        })
        .map_err(|problem| raise(status::of_disk(&problem), &problem.to_string()))?;
    describe(py, &header)
}

fn describe<'py>(py: Python<'py>, header: &DiskHeader) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("cluster_id", hex(&header.cluster_id))?;
    out.set_item("disk_uuid", hex(&header.disk_uuid))?;
    out.set_item("format_uuid", hex(&header.format_uuid))?;
    out.set_item("size_bytes", header.size)?;
    out.set_item("durability", durability_name(header.durability))?;
    out.set_item("durability_override", header.durability_override)?;
    out.set_item("atomic_bytes", header.atomic_bytes)?;
    out.set_item("sparse", header.sparse)?;
    let lanes = PyList::empty(py);
    for lane in &header.lanes {
        let geometry = Geometry::new(lane).expect("checked when the header was parsed");
        let entry = PyDict::new(py);
        entry.set_item("uuid", hex(&lane.uuid))?;
        entry.set_item("start", lane.start)?;
        entry.set_item("length", lane.length)?;
        entry.set_item("journal_bytes", lane.journal_bytes)?;
        entry.set_item("slots", geometry.slots)?;
        lanes.append(entry)?;
    }
    out.set_item("lanes", lanes)?;
    Ok(out)
}

/// As users write it.
pub fn durability_name(durability: Durability) -> &'static str {
    match durability {
        Durability::Plp => "plp",
        Durability::Volatile => "volatile",
    }
}
