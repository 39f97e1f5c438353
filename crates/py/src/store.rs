//! A store node from Python: commands in, events out, no Python on the I/O path.

use crate::disk::{durability_name, identity};
use crate::errors::raise;
use crate::lane::engine_choice;
use node::status;
use node::store::{
    self, ControlOp, DiskConfig, DiskFacts, Followed, OpenStore, PeerAddress, StoreConfig,
    StoreEvent, StoreProblem,
};
use proto::{BLOCK_BYTES, ReplicaId, ShardId, Status, VolumeId};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};
use shard::conf::ShardConf;
use shard::conf::transition::Transition;
use shard::replica::Role;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::RwLock;

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
        StoreProblem::System(problem) => status::of_disk(problem),
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
        self.accepted(self.with(|node| node.control(request_id, op))?)
    }

    fn accepted(&self, is_accepted: bool) -> PyResult<()> {
        if is_accepted {
            Ok(())
        } else {
            Err(raise(Status::Busy, "the store's command queue is full"))
        }
    }
}

/// The bytes of `conf_encode`, which must be of this shard.
fn parse(conf: &[u8], volume_id: u64, index: u32) -> PyResult<ShardConf> {
    let conf = ShardConf::decode(conf)
        .map_err(|problem| raise(Status::Invalid, &format!("a configuration: {problem}")))?;
    if conf.shard == shard_id(volume_id, index) {
        Ok(conf)
    } else {
        let text = format!("a configuration of shard {} for {volume_id}/{index}", conf.shard);
        Err(raise(Status::Invalid, &text))
    }
}

/// A proposal of a replica as a dictionary: its kind and arguments.
fn proposed<'py>(py: Python<'py>, transition: &Transition) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    let (kind, copy) = match transition {
        Transition::Remove { copy } => ("remove", copy),
        Transition::Promote { copy } => ("promote", copy),
        Transition::Admit { copy, incarnation } => {
            out.set_item("incarnation", incarnation)?;
            ("admit", copy)
        }
        Transition::Cancel { copy } => ("cancel", copy),
        Transition::Transfer { copy } => ("transfer", copy),
        Transition::AddLearner { .. }
        | Transition::Reopen { .. }
        | Transition::ForceAccept { .. }
        | Transition::Attach { .. }
        | Transition::Properties { .. } => unreachable!("only the conductor proposes it"),
    };
    out.set_item("kind", kind)?;
    out.set_item("copy", copy)?;
    Ok(out)
}

fn role_name(role: Option<Role>) -> &'static str {
    match role {
        None | Some(Role::Out) => "out",
        Some(Role::Learner) => "learner",
        Some(Role::Secondary) => "secondary",
        Some(Role::Settling) => "settling",
        Some(Role::Active) => "active",
        Some(Role::Suspended) => "suspended",
        Some(Role::Leaving) => "leaving",
        Some(Role::Fenced) => "fenced",
    }
}

fn shard_id(volume_id: u64, index: u32) -> ShardId {
    ShardId { volume: VolumeId(volume_id), index }
}

#[pymethods]
impl StoreNode {
    /// Open the disks, recovering what a crash left, and serve. A disk that cannot be opened, or
    /// that comes with a "failure", is listed as failed by `stats`; the others are served.
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
                let failure = disk.get_item("failure")?.map(|text| text.extract()).transpose()?;
                Ok(DiskConfig { path, engine, failure })
            })
            .collect::<PyResult<Vec<_>>>()?;
        let cluster_id = identity("cluster_id", cluster_id)?;
        let config = StoreConfig { store_id, incarnation, cluster_id, cluster_key, listen, disks };
        let node = py
            .detach(|| OpenStore::open(config).start())
            .map_err(|problem| store_error(&problem))?;
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
                StoreEvent::Verified { request_id, report } => {
                    let (regions, copies) = (report.regions, report.copies);
                    let (different, unreadable) = (report.different, report.unreadable);
                    let mended = report.mended_blocks;
                    ("verified", request_id, regions, copies, different, unreadable, mended)
                        .into_pyobject(py)?
                        .into_any()
                }
                StoreEvent::Proposal { shard, epoch, transition } => {
                    let place = (shard.volume.0, shard.index);
                    let transition = proposed(py, &transition)?;
                    ("proposal", place.0, place.1, epoch, transition).into_pyobject(py)?.into_any()
                }
                StoreEvent::FetchConf { shard, newer_than } => {
                    ("fetch_conf", shard.volume.0, shard.index, newer_than)
                        .into_pyobject(py)?
                        .into_any()
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
        request_id: u64,
        volume_id: u64,
        index: u32,
        copy: u8,
        size_bytes: u64,
        disk_uuid: String,
        conf: &[u8],
    ) -> PyResult<()> {
        let (conf, blocks) = (parse(conf, volume_id, index)?, blocks_of(size_bytes)?);
        let replica = ReplicaId { shard: shard_id(volume_id, index), copy };
        self.control(request_id, ControlOp::Create { disk_uuid, replica, blocks, conf })
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

    /// Follow a newer configuration; done when it, or a newer one, is followed durably.
    fn set_conf(&self, request_id: u64, volume_id: u64, index: u32, conf: &[u8]) -> PyResult<()> {
        self.control(request_id, ControlOp::SetConf(parse(conf, volume_id, index)?))
    }

    /// As primary, compare all in-sync replicas of a shard, region by region; `is_repairing`: write
    /// damaged blocks again wherever a good copy exists.
    fn verify_replica(
        &self,
        request_id: u64,
        volume_id: u64,
        index: u32,
        is_repairing: bool,
    ) -> PyResult<()> {
        self.control(request_id, ControlOp::Verify(shard_id(volume_id, index), is_repairing))
    }

    /// Read runs (first block, blocks) of a replica again, to learn whether they are damaged.
    fn check_blocks(&self, volume_id: u64, index: u32, runs: Vec<(u32, u32)>) -> PyResult<()> {
        let shard = shard_id(volume_id, index);
        self.accepted(self.with(|node| node.check_blocks(shard, runs))?)
    }

    /// As primary, give the reign to another member of the ISR; done when it was passed on.
    fn transfer_primary(
        &self,
        request_id: u64,
        volume_id: u64,
        index: u32,
        to: u8,
    ) -> PyResult<()> {
        self.control(request_id, ControlOp::Transfer(shard_id(volume_id, index), to))
    }

    /// Take over where the stores of the cluster are: (store, incarnation, "address:port") each.
    fn set_peers(&self, peers: Vec<(u64, u64, String)>) -> PyResult<()> {
        let peers = peers
            .into_iter()
            .map(|(store, incarnation, text)| {
                let address = text.parse().map_err(|_| {
                    raise(Status::Invalid, &format!("store {store} is at {text:?}: no address"))
                })?;
                Ok(PeerAddress { store, incarnation, address })
            })
            .collect::<PyResult<Vec<_>>>()?;
        self.accepted(self.with(|node| node.set_peers(peers))?)
    }

    /// Take no more of the host's file system for a disk (by its place in the store), or do again.
    fn hold_growth(&self, disk: usize, is_held: bool) -> PyResult<()> {
        self.accepted(self.with(|node| node.hold_growth(disk, is_held))?)
    }

    /// Stop a disk (by its place in the store) for good: what is behind it is not what it was.
    fn fail_disk(&self, disk: usize, reason: String) -> PyResult<()> {
        self.accepted(self.with(|node| node.fail_disk(disk, reason))?)
    }

    /// A life of a store is over for certain.
    fn dead(&self, store: u64, incarnation: u64) -> PyResult<()> {
        self.accepted(self.with(|node| node.dead(store, incarnation))?)
    }

    /// The conductor that this store follows, which its heartbeats tell the other stores from now on;
    /// what is older than what is known changes nothing.
    fn set_conductor(&self, term: u64, lineage: u64, revision: u64) -> PyResult<()> {
        self.with(|node| node.set_conductor(Followed { term, lineage, revision }))
    }

    /// (term, lineage, revision) of the newest conductor that another store's heartbeat has named;
    /// zeros: none has.
    fn heard_conductor(&self) -> PyResult<(u64, u64, u64)> {
        let heard = self.with(store::StoreNode::heard_conductor)?;
        Ok((heard.term, heard.lineage, heard.revision))
    }

    /// The replicas: volume_id, index, copy, size_bytes, disk, lane, epoch, promised, complete_seq,
    /// role, resyncs, verifying (regions done, of how many; or None), commit_seq, used_bytes, and
    /// what is known to be unreadable: damaged, damaged_blocks, damage_found (blocks in this life,
    /// mended or not), and as primary lost, lost_blocks.
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
            entry.set_item("epoch", found.conf.as_ref().map_or(0, |conf| conf.epoch.0))?;
            entry.set_item("promised", found.promised)?;
            entry.set_item("complete_seq", found.complete)?;
            entry.set_item("applied_seq", found.applied)?;
            entry.set_item("role", role_name(found.role))?;
            let resyncs = PyList::empty(py);
            for resync in &found.resyncs {
                let facts = PyDict::new(py);
                facts.set_item("to", resync.store)?;
                facts.set_item("regions_left", resync.regions_left)?;
                facts.set_item("regions_copied", resync.regions_copied)?;
                resyncs.append(facts)?;
            }
            entry.set_item("resyncs", resyncs)?;
            entry.set_item("verifying", found.verifying)?;
            entry.set_item("damaged", found.damaged.runs)?;
            entry.set_item("damaged_blocks", found.damaged.blocks)?;
            entry.set_item("damage_found", found.damage_found)?;
            entry.set_item("lost", found.lost.runs)?;
            entry.set_item("lost_blocks", found.lost.blocks)?;
            entry.set_item("commit_seq", found.commit)?;
            entry.set_item("used_bytes", found.used_bytes)?;
            out.append(entry)?;
        }
        Ok(out)
    }

    /// The configurations that its replicas follow, as bytes: what a conductor that lost its memory
    /// asks for.
    fn confs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let replicas = self.facts(py)?.replicas;
        let confs = replicas.iter().filter_map(|found| found.conf.as_ref());
        PyList::new(py, confs.map(|conf| PyBytes::new(py, &conf.encode())))
    }

    /// Disks with their state, and totals since the start.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let facts = self.facts(py)?;
        let (out, disks, counters) = (PyDict::new(py), PyList::empty(py), PyDict::new(py));
        counters.set_item("sessions", facts.sessions)?;
        counters.set_item("blocks_mended", facts.blocks_mended)?;
        for (name, hop) in hops(&facts.hops) {
            counters.set_item(format!("{name}_hops"), hop.count)?;
            counters.set_item(format!("{name}_nanos"), hop.nanos)?;
        }
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

fn hops(hops: &store::Hops) -> [(&'static str, store::Hop); 6] {
    [
        ("client_read", hops.client_reads),
        ("client_write", hops.client_writes),
        ("lane_read", hops.lane_reads),
        ("lane_write", hops.lane_writes),
        ("peer_write", hops.peer_writes),
        ("served_write", hops.served_writes),
    ]
}

fn counted(lane: &::lane::lane::Counters) -> [(&'static str, u64); 16] {
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
        ("media_errors", lane.media_errors),
        ("slots_relocated", lane.slots_relocated),
        ("relocations_failed", lane.relocations_failed),
        ("bad_slots", lane.bad_slots),
    ]
}

/// What is wrong with a disk; empty when nothing is. One that hangs has not failed yet.
fn reason(disk: &DiskFacts) -> String {
    const SLOW_NANOS: u64 = 1_000_000_000;
    match &disk.failure {
        Some(failure) => failure.clone(),
        None if disk.oldest_io_nanos >= SLOW_NANOS => {
            let seconds = disk.oldest_io_nanos as f64 / 1e9;
            format!("the device has not answered an operation for {seconds:.1} s")
        }
        None => String::new(),
    }
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
    out.set_item("reason", reason(disk))?;
    let latency = PyDict::new(py);
    for (name, seen) in [("reads", &disk.latency.reads), ("writes", &disk.latency.writes)] {
        // (upper end of a bucket in nanoseconds, operations in it): enough for differences.
        latency.set_item(name, seen.buckets().collect::<Vec<_>>())?;
        latency.set_item(format!("{name}_nanos"), seen.sum())?;
    }
    out.set_item("latency", latency)?;
    out.set_item("bytes_total", disk.bytes.0)?;
    out.set_item("bytes_free", disk.bytes.1)?;
    out.set_item("bad_slots", disk.counters.iter().map(|lane| lane.bad_slots).sum::<u64>())?;
    let recovered = node::disk::total(disk.reports.iter().copied());
    out.set_item("replayed_records", recovered.records)?;
    out.set_item("placed_blocks", recovered.placed_blocks)?;
    out.set_item("restored_blocks", recovered.restored_blocks)?;
    out.set_item("poisoned_blocks", recovered.poisoned_blocks)?;
    Ok(out)
}
