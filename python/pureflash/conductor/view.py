"""Everything a planner may look at: records, observations, and the time.

A `View` is a reading, not a copy: the service makes one whenever it plans, and planners never
change it. Monotonic milliseconds are used for silence, never for records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from pureflash.conductor.pace import Pace
from pureflash.model.domain import (
    Amnesia,
    Cluster,
    Differing,
    Disk,
    Export,
    Job,
    NameClaim,
    ShardConf,
    Store,
    StoreState,
    Volume,
    VolumeIntent,
)
from pureflash.model.messages import (
    DiskReport,
    ExportReport,
    ReplicaReport,
    ReplicaTransition,
    Verified,
)
from pureflash.model.names import read_id

RESERVE_PERCENT: Final = 5
"""Kept free on each disk for settling and resync (docs/internals/replication.md, section 8)."""

ShardKey = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreObservation:
    """What a store told, and when. `heard_at_ms` monotonic; None before the first message."""

    state: StoreState = StoreState.OFFLINE
    cause: str = "it has not registered since the conductor started"
    heard_at_ms: int | None = None
    registered_at_ms: int | None = None
    disks: Mapping[int, DiskReport] = field(default_factory=dict)
    replicas: Mapping[ShardKey, ReplicaReport] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayObservation:
    """What a gateway told."""

    is_connected: bool
    heard_at_ms: int
    exports: Mapping[int, ExportReport] = field(default_factory=dict)
    answered: int = 0
    """The number of the newest list of exports that it has answered."""
    connections: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A command that a store refused; it is sent again at `retry_at_ms` (monotonic)."""

    code: int
    message: str
    attempts: int
    retry_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a replica on `store`, in this life, has proposed for its shard's configuration."""

    store: int
    incarnation: int
    volume_id: int
    index: int
    epoch: int
    transition: ReplicaTransition


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One reading of the world. `in_flight` are commands that are not answered yet.

    `backoffs`: (volume, index, copy) of a learner that was given up, and when it may be tried again
    (monotonic). `verified`: what was found, by job and shard index. `started_ms`: when this
    conductor began. `changed_ms`: when it stored a shard's present configuration (monotonic).
    `transferred_ms`: when it last asked for a transfer; `balance_after_ms`: calm before it does.
    `amnesia`: what stores remember and the records do not.
    `paces`: how disks keep pace with one another, by uuid.
    """

    now_ms: int
    wall_ms: int
    overcommit_ratio: float
    cluster: Cluster
    stores: Mapping[int, Store]
    volumes: Mapping[int, Volume]
    names: Mapping[str, NameClaim]
    shards: Mapping[ShardKey, ShardConf]
    exports: Mapping[int, Export]
    jobs: Mapping[int, Job]
    observed: Mapping[int, StoreObservation]
    gateways: Mapping[str, GatewayObservation]
    in_flight: frozenset[tuple[int, str, int, int]] = frozenset()
    failures: Mapping[tuple[int, int, int], Failure] = field(default_factory=dict)
    proposals: tuple[Asked, ...] = ()
    backoffs: Mapping[tuple[int, int, int], int] = field(default_factory=dict)
    verified: Mapping[tuple[int, int], Verified] = field(default_factory=dict)
    started_ms: int = 0
    changed_ms: Mapping[ShardKey, int] = field(default_factory=dict)
    transferred_ms: int | None = None
    balance_after_ms: int = 0
    amnesia: Amnesia | None = None
    differing: Mapping[ShardKey, Differing] = field(default_factory=dict)
    expected_stores: Mapping[int, str] = field(default_factory=dict)
    expected_gateways: tuple[str, ...] = ()
    """Names of what the supervisor of this conductor starts, registered or not."""
    paces: Mapping[str, Pace] = field(default_factory=dict)

    def observation(self, store_id: int) -> StoreObservation:
        """Give what is known of a store; a store never heard of is OFFLINE."""
        return self.observed.get(store_id, StoreObservation())

    def is_online(self, store_id: int) -> bool:
        """Whether commands can be sent to a store."""
        return self.observation(store_id).state is StoreState.ONLINE

    def shards_of(self, volume: Volume) -> list[ShardConf]:
        """Give the stored configurations of a volume by index; some may be missing."""
        found = (self.shards.get((volume.id, index)) for index in range(volume.shard_count))
        return [conf for conf in found if conf is not None]

    def exports_of(self, volume_id: int) -> list[Export]:
        """Give the exports of a volume."""
        return [export for export in self.exports.values() if export.volume_id == volume_id]

    def find_volume(self, reference: str) -> Volume | None:
        """Find a volume by name or id; one that is being deleted has an id only."""
        if claim := self.names.get(reference):
            found = self.volumes.get(claim.volume_id)
            return found if found and found.intent is VolumeIntent.PRESENT else None
        volume_id = read_id(reference)
        return None if volume_id is None else self.volumes.get(volume_id)

    def find_store(self, reference: str) -> Store | None:
        """Find a store by name or id."""
        named = (store for store in self.stores.values() if store.name == reference)
        store_id = read_id(reference)
        return next(named, None if store_id is None else self.stores.get(store_id))


def usable_bytes(disk: Disk, report: DiskReport | None) -> int:
    """Give the bytes of a disk that may be promised; 0 for a disk that reported a failure.

    Before its store reported, the size of the disk stands in for its data area.
    """
    if report is not None and report.state == "failed":
        return 0
    total = disk.size_bytes if report is None else report.bytes_total
    return total * (100 - RESERVE_PERCENT) // 100


def used_bytes(report: DiskReport) -> int:
    """Give the bytes of a disk that hold something; its reserve is neither used nor free."""
    promisable = report.bytes_total * (100 - RESERVE_PERCENT) // 100
    return max(0, promisable - report.bytes_free)


def promised_by_disk(view: View) -> dict[str, int]:
    """Sum the sizes of all replicas by the uuid of their disk, in bytes."""
    promised: dict[str, int] = {}
    for (volume_id, index), conf in view.shards.items():
        volume = view.volumes.get(volume_id)
        if volume is None or index >= volume.shard_count:
            continue  # what a stopped conductor left; the reconciler removes it
        for member in conf.members:
            promised[member.disk] = promised.get(member.disk, 0) + volume.shard_bytes(index)
    return promised
