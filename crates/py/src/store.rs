//! A store node from Python: commands in, events out, no Python on the I/O path.

use crate::disk::{durability_name, identity};
use crate::errors::raise;
use crate::lane::engine_choice;
use node::status;
use node::store::{
    self, ControlOp, DiskConfig, DiskFacts, OpenStore, Serving, StoreConfig, StoreEvent,
    StoreProblem,
};
use proto::{BLOCK_BYTES, ReplicaId, ShardId, Status, VolumeId};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::RwLock;

/// What the data path needs of a shard's configuration, whose JSON only Python reads.
fn serving(py: Python<'_>, conf: &[u8]) -> PyResult<Serving> {
    let facts = py.import("json")?.call_method1("loads", (PyBytes::new(py, conf),))?;
    let number = |name: &str| facts.get_item(name).and_then(|value| value.extract::<u64>());
    Ok(Serving { epoch: number("epoch")?, attach_epoch: number("attach_epoch")? })
}

/// Identity of the disk that the configuration names for a copy.
fn disk_of(py: Python<'_>, conf: &[u8], copy: u8) -> PyResult<String> {
    let facts = py.import("json")?.call_method1("loads", (PyBytes::new(py, conf),))?;
    for member in facts.get_item("members")?.try_iter()? {
        let member = member?;
        if member.get_item("copy")?.extract::<u8>()? == copy {
            return member.get_item("disk")?.extract();
        }
    }
    Err(raise(Status::Invalid, &format!("the configuration has no member with copy {copy}")))
}

fn blocks_of(size_bytes: u64) -> PyResult<u32> {
    let blocks = size_bytes / BLOCK_BYTES as u64;
    let fits = size_bytes.is_multiple_of(BLOCK_BYTES as u64);
    u32::try_from(blocks).ok().filter(|&blocks| fits && blocks > 0).ok_or_else(|| {
        let text = format!("a shard of {size_bytes} bytes: whole blocks of 4,096, up to 64 GiB");
        raise(Status::Invalid, &text)
    })
}

fn store_error(problem: &StoreProblem) -> PyErr {
    let status = match problem {
        StoreProblem::Disk(problem) => status::of_disk(problem),
        StoreProblem::Listen { .. } => Status::InUse,
    };
    raise(status, &problem.to_string())
}

/// The data side of a store process: its disks, its shards, its clients' connections.
///
/// Commands return at once and are answered by an event with their `request_id`; `fileno` is
/// readable while events wait, `drain` takes them.
#[pyclass(frozen, module = "pureflash._core")]
pub struct StoreNode {
    inner: RwLock<Option<store::StoreNode>>,
}

impl StoreNode {
    fn with<T>(&self, body: impl FnOnce(&store::StoreNode) -> T) -> PyResult<T> {
        let inner = self.inner.read().expect("no panic happens under this lock");
        let node = inner.as_ref();
        node.map(body).ok_or_else(|| raise(Status::Unavailable, "the store is closed"))
    }

    fn control(&self, request_id: u64, op: ControlOp) -> PyResult<()> {
        if self.with(|node| node.control(request_id, op))? {
            Ok(())
        } else {
            Err(raise(Status::Busy, "the store's command queue is full"))
        }
    }
}

fn shard_id(volume_id: u64, index: u32) -> ShardId {
    ShardId { volume: VolumeId(volume_id), index }
}

#[pymethods]
impl StoreNode {
    /// Open the disks, recovering what a crash left, and serve.
    #[new]
    #[pyo3(signature = (*, store_id, incarnation, cluster_id, cluster_key, listen, disks))]
    fn new(
        py: Python<'_>,
        store_id: u64,
        incarnation: u64,
        cluster_id: &[u8],
        cluster_key: Vec<u8>,
        listen: &str,
        disks: Vec<Bound<'_, PyDict>>,
    ) -> PyResult<StoreNode> {
        let listen: SocketAddr = listen.parse().map_err(|_| {
            raise(Status::Invalid, &format!("listen is {listen:?}: use ADDRESS:PORT"))
        })?;
        let disks = disks
            .iter()
            .map(|disk| {
                let path: PathBuf = disk.as_any().get_item("path")?.extract()?;
                let engine = match disk.get_item("engine")? {
                    Some(name) => engine_choice(&name.extract::<String>()?)?,
                    None => engine_choice("auto")?,
                };
                Ok(DiskConfig { path, engine })
            })
            .collect::<PyResult<Vec<_>>>()?;
        let cluster_id = identity("cluster_id", cluster_id)?;
        let config = StoreConfig { store_id, incarnation, cluster_id, cluster_key, listen, disks };
        let open = py.detach(|| OpenStore::open(config)).map_err(|p| store_error(&p))?;
        let mut serves = BTreeMap::new();
        for (shard, conf) in open.confs() {
            // A replica whose configuration never became durable waits for the control plane.
            if !conf.is_empty() {
                serves.insert(shard, serving(py, conf)?);
            }
        }
        let node = py.detach(|| open.start(&serves)).map_err(|p| store_error(&p))?;
        Ok(StoreNode { inner: RwLock::new(Some(node)) })
    }

    /// host:port of the data listener.
    #[getter]
    fn address(&self) -> PyResult<String> {
        self.with(|node| node.address().to_string())
    }

    /// The eventfd that is readable while events wait.
    fn fileno(&self) -> PyResult<i32> {
        self.with(store::StoreNode::event_fd)
    }

    /// Take all events.
    fn drain<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let out = PyList::empty(py);
        for event in self.with(store::StoreNode::drain)? {
            let tuple = match event {
                StoreEvent::Done { request_id } => {
                    ("done", request_id, py.None()).into_pyobject(py)?.into_any()
                }
                StoreEvent::Failed { request_id, status, message } => {
                    ("failed", request_id, status.number(), message).into_pyobject(py)?.into_any()
                }
                StoreEvent::DiskFailed { disk, message } => {
                    ("disk_failed", disk, message).into_pyobject(py)?.into_any()
                }
            };
            out.append(tuple.cast_into::<PyTuple>()?)?;
        }
        Ok(out)
    }

    /// Make a replica with its first configuration; done also when it exists with this size.
    #[allow(clippy::too_many_arguments, reason = "the control message's fields, in its order")]
    fn create_replica(
        &self,
        py: Python<'_>,
        request_id: u64,
        volume_id: u64,
        index: u32,
        copy: u8,
        size_bytes: u64,
        conf: Vec<u8>,
    ) -> PyResult<()> {
        let (serving, blocks) = (serving(py, &conf)?, blocks_of(size_bytes)?);
        let disk_uuid = disk_of(py, &conf, copy)?;
        let replica = ReplicaId { shard: shard_id(volume_id, index), copy };
        let op = ControlOp::Create { disk_uuid, replica, blocks, conf, serving };
        self.control(request_id, op)
    }

    /// Forget a replica and free its space; done also when there is none.
    fn delete_replica(&self, request_id: u64, volume_id: u64, index: u32) -> PyResult<()> {
        self.control(request_id, ControlOp::Delete(shard_id(volume_id, index)))
    }

    /// Let a replica grow.
    fn resize_replica(
        &self,
        request_id: u64,
        volume_id: u64,
        index: u32,
        size_bytes: u64,
    ) -> PyResult<()> {
        let blocks = blocks_of(size_bytes)?;
        self.control(request_id, ControlOp::Resize(shard_id(volume_id, index), blocks))
    }

    /// Follow a newer configuration.
    fn set_conf(
        &self,
        py: Python<'_>,
        request_id: u64,
        volume_id: u64,
        index: u32,
        conf: Vec<u8>,
    ) -> PyResult<()> {
        let serving = serving(py, &conf)?;
        self.control(request_id, ControlOp::SetConf(shard_id(volume_id, index), conf, serving))
    }

    /// The replicas: volume_id, index, copy, size_bytes, disk, lane, conf, commit_seq, used_bytes.
    fn replicas<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let out = PyList::empty(py);
        for found in self.facts(py)?.replicas {
            let entry = PyDict::new(py);
            entry.set_item("volume_id", found.replica.shard.volume.0)?;
            entry.set_item("index", found.replica.shard.index)?;
            entry.set_item("copy", found.replica.copy)?;
            entry.set_item("size_bytes", u64::from(found.blocks) * BLOCK_BYTES as u64)?;
            entry.set_item("disk", found.disk)?;
            entry.set_item("lane", found.lane)?;
            entry.set_item("conf", PyBytes::new(py, &found.conf))?;
            entry.set_item("commit_seq", found.commit)?;
            entry.set_item("used_bytes", found.used_bytes)?;
            out.append(entry)?;
        }
        Ok(out)
    }

    /// Disks with their state, and totals since the start.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let facts = self.facts(py)?;
        let (out, disks, counters) = (PyDict::new(py), PyList::empty(py), PyDict::new(py));
        counters.set_item("sessions", facts.sessions)?;
        for disk in &facts.disks {
            disks.append(describe(py, disk)?)?;
            for lane in &disk.counters {
                for (name, value) in counted(lane) {
                    let before: u64 =
                        counters.get_item(name)?.map_or(Ok(0), |value| value.extract())?;
                    counters.set_item(name, before + value)?;
                }
            }
        }
        out.set_item("disks", disks)?;
        out.set_item("counters", counters)?;
        Ok(out)
    }

    /// Close the disks cleanly and end the threads. A second call does nothing.
    fn close(&self, py: Python<'_>) {
        py.detach(|| {
            let taken = self.inner.write().expect("no panic happens under this lock").take();
            if let Some(mut node) = taken {
                node.close();
            }
        });
    }
}

impl StoreNode {
    fn facts(&self, py: Python<'_>) -> PyResult<store::StoreFacts> {
        py.detach(|| self.with(store::StoreNode::facts))?
            .ok_or_else(|| raise(Status::Unavailable, "the store has stopped"))
    }
}

fn counted(lane: &::lane::lane::Counters) -> [(&'static str, u64); 12] {
    [
        ("writes", lane.writes),
        ("reads", lane.reads),
        ("blocks_written", lane.blocks_written),
        ("blocks_read", lane.blocks_read),
        ("touches", lane.touches),
        ("redos", lane.redos),
        ("intents", lane.intents),
        ("frames", lane.frames),
        ("flushes", lane.flushes),
        ("checkpoints", lane.checkpoints),
        ("journal_wraps", lane.journal_wraps),
        ("checksum_errors", lane.checksum_errors),
    ]
}

fn describe<'py>(py: Python<'py>, disk: &DiskFacts) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("disk_uuid", &disk.uuid)?;
    out.set_item("path", disk.path.to_string_lossy())?;
    out.set_item("engine", disk.engine)?;
    out.set_item("engine_reason", &disk.engine_reason)?;
    out.set_item("durability", durability_name(disk.durability))?;
    out.set_item("durability_reason", &disk.durability_reason)?;
    out.set_item("state", if disk.failure.is_some() { "failed" } else { "online" })?;
    out.set_item("reason", disk.failure.as_deref().unwrap_or(""))?;
    out.set_item("bytes_total", disk.bytes.0)?;
    out.set_item("bytes_free", disk.bytes.1)?;
    let recovered = node::disk::total(disk.reports.iter().copied());
    out.set_item("replayed_records", recovered.records)?;
    out.set_item("placed_blocks", recovered.placed_blocks)?;
    out.set_item("restored_blocks", recovered.restored_blocks)?;
    out.set_item("poisoned_blocks", recovered.poisoned_blocks)?;
    Ok(out)
}
