"""Records and states of the control plane, in the words of the glossary.

Theory of operation. A *record* is a frozen dataclass that the metastore keeps as JSON under the key
of `pureflash.metastore.keys`; it holds intent and configuration, never an observation. A *state* is
computed from records and observations; where it is a machine, the enum stands beside its table of
transitions and one function applies it, so that an illegal step crashes instead of spreading.

Ids are below 2^53, because they travel in JSON; sizes are bytes; times are milliseconds since 1970.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

ID_MAX: Final = 2**53 - 1
GIB: Final = 1024**3
SHARD_BYTES_DEFAULT: Final = 16 * GIB
SHARD_BYTES_MIN: Final = 1 * GIB
SHARD_BYTES_MAX: Final = 64 * GIB
REPLICAS_MAX: Final = 3
SHARDS_PER_VOLUME_MAX: Final = 16_384
"""256 TiB of default shards: what one listing and one reconciler pass handle without paging."""


class VolumeIntent(StrEnum):
    """What the user wants of a volume; DELETING is never left but by the record's end."""

    PRESENT = "present"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """`volume/ID`. `version` grows with every change that a user asked for (If-Match)."""

    id: int
    name: str
    size_bytes: int
    replicas: int
    shard_size_bytes: int
    created_at_ms: int
    version: int = 1
    attach_epoch: int = 1
    intent: VolumeIntent = VolumeIntent.PRESENT

    @property
    def shard_count(self) -> int:
        """Number of shards; the last may be shorter than the others."""
        return -(-self.size_bytes // self.shard_size_bytes)

    def shard_bytes(self, index: int) -> int:
        """Give the size of shard `index` in bytes."""
        assert 0 <= index < self.shard_count, "the caller iterates over existing shards"
        return min(self.shard_size_bytes, self.size_bytes - index * self.shard_size_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One replica in a configuration: where it is and which life of it is meant."""

    copy: int
    store: int
    incarnation: int
    disk: str
    format_uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConf:
    """`shard/VOLUME/INDEX`: immutable per (shard, epoch, history_id); numbers in it are copies."""

    volume_id: int
    index: int
    epoch: int
    rf: int
    min_write: int
    primary: int
    isr: tuple[int, ...]
    learners: tuple[int, ...]
    members: tuple[Member, ...]
    history_id: int
    attach_epoch: int

    def member(self, copy: int) -> Member:
        """Give the member with this copy number; asking for one that is not there is a bug."""
        return next(member for member in self.members if member.copy == copy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Differing:
    """`differing/VOLUME/INDEX`: copies of a shard that a verification found to differ.

    It stays until one finds all copies equal: the difference does not end by being forgotten.
    `regions` are (region of 1 MiB, store that differs from the primary), the first ones of `count`.
    """

    volume_id: int
    index: int
    regions: tuple[tuple[int, int], ...]
    count: int
    job: int
    found_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk as its store registered it."""

    index: int
    path: str
    disk_uuid: str
    format_uuid: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """`store/ID`: the newest registration of a store node. `address` is host:port.

    `exited` is the newest incarnation that its supervisor has seen end; 0: none. Others were told
    that it is over for certain, so no incarnation up to it may ever register again.
    """

    id: int
    name: str
    incarnation: int
    address: str
    disks: tuple[Disk, ...]
    exited: int = 0


class ExportKind(StrEnum):
    """Front ends that an export can use."""

    NBD = "nbd"


class Transport(StrEnum):
    """How clients of an export connect: a 0600 unix socket, or TCP on loopback."""

    UNIX = "unix"
    TCP = "tcp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """`export/ID`: the wish that a gateway offers a volume. It survives restarts of everything."""

    id: int
    kind: ExportKind
    volume_id: int
    gateway: str
    transport: Transport
    is_read_only: bool
    created_at_ms: int


class JobState(StrEnum):
    """Where long work stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


# The row is what it was, the column what it becomes; a test compares this with the table.
#
#            queued  running  succeeded  failed  cancelled
# queued     .       x        .          .       x
# running    .       .        x          x       x
# succeeded  .       .        .          .       .
# failed     .       .        .          .       .
# cancelled  .       .        .          .       .
JOB_TRANSITIONS: Final[Mapping[JobState, frozenset[JobState]]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`job/ID`: long work of the conductor. `done` of `total`, counted in `unit`.

    `is_repairing` is of a verification. The last three are of a forced history (T7): which shard,
    whose copy, and the history.
    """

    id: int
    kind: str
    target: str
    volume_id: int
    state: JobState
    done: int
    total: int
    unit: str
    reason: str
    created_at_ms: int
    finished_at_ms: int | None = None
    is_repairing: bool = False
    index: int | None = None
    store: int | None = None
    history_id: int | None = None

    @property
    def is_finished(self) -> bool:
        """Whether nothing can change it any more."""
        return not JOB_TRANSITIONS[self.state]


def next_job_state(now: JobState, wanted: JobState) -> JobState:
    """Step the machine of a job; an illegal step is our bug and crashes."""
    assert wanted is now or wanted in JOB_TRANSITIONS[now], f"job: {now} -> {wanted}"
    return wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`cluster`: who we are, and the counter that all ids come from.

    `predecessors` are the lineages that this one was recovered from; `given_up` the format_uuids of
    disks that a person vouched to be lost when it was.
    """

    cluster_id: str
    next_id: int
    created_at_ms: int
    predecessors: tuple[str, ...] = ()
    given_up: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Amnesia:
    """`amnesia`: stores remember what this metastore does not; absent while they do not."""

    reason: str
    since_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NameClaim:
    """`name/NAME`: which volume has the name."""

    volume_id: int


class StoreState(StrEnum):
    """What the detector believes about a store."""

    OFFLINE = "offline"
    ONLINE = "online"
    SUSPECTED = "suspected"


class StoreEvent(StrEnum):
    """What the detector learns. EXITED comes from a supervisor, which saw the process end."""

    REGISTERED = "registered"
    HEARD = "heard"
    SILENT = "silent"
    GONE = "gone"
    EXITED = "exited"


# The row is the state, the column what is learned, and where they meet the state that it leads to;
# a test compares this with the table.
#
#            registered  heard   silent     gone     exited
# offline    online      .       .          .        offline
# online     online      online  suspected  .        offline
# suspected  online      online  .          offline  offline
STORE_TRANSITIONS: Final[Mapping[tuple[StoreState, StoreEvent], StoreState]] = {
    (StoreState.OFFLINE, StoreEvent.REGISTERED): StoreState.ONLINE,
    (StoreState.OFFLINE, StoreEvent.EXITED): StoreState.OFFLINE,
    (StoreState.ONLINE, StoreEvent.REGISTERED): StoreState.ONLINE,
    (StoreState.ONLINE, StoreEvent.HEARD): StoreState.ONLINE,
    (StoreState.ONLINE, StoreEvent.SILENT): StoreState.SUSPECTED,
    (StoreState.ONLINE, StoreEvent.EXITED): StoreState.OFFLINE,
    (StoreState.SUSPECTED, StoreEvent.REGISTERED): StoreState.ONLINE,
    (StoreState.SUSPECTED, StoreEvent.HEARD): StoreState.ONLINE,
    (StoreState.SUSPECTED, StoreEvent.GONE): StoreState.OFFLINE,
    (StoreState.SUSPECTED, StoreEvent.EXITED): StoreState.OFFLINE,
}


def next_store_state(now: StoreState, event: StoreEvent) -> StoreState:
    """Step the machine of a store; a pair without a row is our bug and crashes."""
    assert (now, event) in STORE_TRANSITIONS, f"store: {event} while {now}"
    return STORE_TRANSITIONS[now, event]


class HealthState(StrEnum):
    """State of a volume or a shard, worst last; each comes with a cause."""

    DELETING = "deleting"
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    SINGLE_COPY = "single_copy"
    PARKED = "parked"
    OFFLINE = "offline"
    AMNESIA = "amnesia"


def worst(states: list[HealthState]) -> HealthState:
    """Give the worst of them; of none, HEALTHY."""
    order = list(HealthState)
    return max(states, key=order.index, default=HealthState.HEALTHY)
