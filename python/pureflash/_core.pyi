from collections.abc import Callable, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, NotRequired, Self, TypedDict, final, type_check_only

from typing_extensions import Buffer

__all__ = [
    "BuildInfo",
    "Gateway",
    "Lane",
    "StoreNode",
    "Volume",
    "World",
    "build_info",
    "conf_apply",
    "conf_decode",
    "conf_encode",
    "conf_first",
    "format_disk",
    "inspect_disk",
    "load_disk",
    "load_lane",
    "load_volume",
    "version",
]

@final
class BuildInfo:
    @property
    def version(self) -> str: ...
    @property
    def profile(self) -> str: ...
    @property
    def opt_level(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def features(self) -> list[str]: ...

def version() -> str: ...
def build_info() -> BuildInfo: ...
def conf_first(
    *,
    volume_id: int,
    index: int,
    rf: int,
    min_write: int,
    primary: int,
    members: list[dict[str, Any]],
    history_id: int,
    attach_epoch: int,
) -> dict[str, Any]: ...
def conf_apply(
    conf: dict[str, Any], epoch: int, transition: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]: ...
def conf_encode(conf: dict[str, Any]) -> bytes: ...
def conf_decode(encoded: bytes) -> dict[str, Any]: ...

class _LaneInfo(TypedDict):
    uuid: str
    start: int
    length: int
    journal_bytes: int
    slots: int

class _DiskInfo(TypedDict):
    cluster_id: str
    disk_uuid: str
    format_uuid: str
    size_bytes: int
    durability: str
    durability_override: bool
    atomic_bytes: int
    sparse: bool
    lanes: list[_LaneInfo]

def format_disk(
    path: str | PathLike[str],
    *,
    size_bytes: int | None,
    cluster_id: bytes,
    journal_bytes: int | None = None,
    durability: str = "auto",
) -> _DiskInfo: ...
def inspect_disk(path: str | PathLike[str]) -> _DiskInfo: ...

class _LaneFacts(TypedDict):
    engine: str
    writes: int
    touches: int
    redos: int
    intents: int
    frames: int
    flushes: int
    checkpoints: int
    journal_wraps: int
    replayed_records: int
    verified_blocks: int
    restored_blocks: int
    placed_blocks: int
    poisoned_blocks: int
    replicas: list[tuple[int, int, int, int, int]]

@final
class Lane:
    def __new__(
        cls, path: str | PathLike[str], *, cluster_id: bytes, engine: str = "auto"
    ) -> Lane: ...
    def create(self, volume_id: int, blocks: int) -> int: ...
    def write(self, shard_ix: int, first: int, data: bytes, *, seq: int, commit: int) -> None: ...
    def discard(self, shard_ix: int, first: int, count: int, *, seq: int, commit: int) -> None: ...
    def read(self, shard_ix: int, first: int, count: int) -> bytes: ...
    def checkpoint(self) -> None: ...
    def facts(self) -> _LaneFacts: ...
    def close(self) -> None: ...

@final
class StoreNode:
    def __new__(
        cls,
        *,
        store_id: int,
        incarnation: int,
        cluster_id: bytes,
        cluster_key: bytes,
        listen: str,
        disks: list[dict[str, Any]],
    ) -> StoreNode: ...
    @property
    def address(self) -> str: ...
    def fileno(self) -> int: ...
    def drain(self) -> list[tuple[Any, ...]]: ...
    def create_replica(
        self,
        request_id: int,
        volume_id: int,
        index: int,
        copy: int,
        size_bytes: int,
        disk_uuid: str,
        conf: bytes,
    ) -> None: ...
    def delete_replica(self, request_id: int, volume_id: int, index: int) -> None: ...
    def resize_replica(
        self, request_id: int, volume_id: int, index: int, size_bytes: int
    ) -> None: ...
    def set_conf(self, request_id: int, volume_id: int, index: int, conf: bytes) -> None: ...
    def verify_replica(
        self, request_id: int, volume_id: int, index: int, is_repairing: bool
    ) -> None: ...
    def check_blocks(self, volume_id: int, index: int, runs: Sequence[tuple[int, int]]) -> None: ...
    def transfer_primary(self, request_id: int, volume_id: int, index: int, to: int) -> None: ...
    def hold_growth(self, disk: int, is_held: bool) -> None: ...
    def fail_disk(self, disk: int, reason: str) -> None: ...
    def set_peers(self, peers: Sequence[tuple[int, int, str]]) -> None: ...
    def dead(self, store: int, incarnation: int) -> None: ...
    def set_conductor(self, term: int, lineage: int, revision: int) -> None: ...
    def heard_conductor(self) -> tuple[int, int, int]: ...
    def replicas(self) -> list[dict[str, Any]]: ...
    def confs(self) -> list[bytes]: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self) -> None: ...

@type_check_only
class ShardRoute(TypedDict):
    index: int
    epoch: int
    address: str
    lane: NotRequired[int]

@type_check_only
class VolumeSpec(TypedDict):
    volume_id: int
    size_bytes: int
    shard_size_bytes: int
    attach_epoch: int
    ticket: bytes
    shards: list[ShardRoute]

@type_check_only
class SessionStats(TypedDict):
    requests: int
    replies: int
    errors: int
    read_bytes: int
    written_bytes: int
    sent: int
    resent: int
    parked: int
    bad_checksums: int
    connects: int
    greeted: int
    lost: int
    fences: int
    violations: int
    timed_out: int

@type_check_only
class VolumeStats(SessionStats):
    size_bytes: int
    open_requests: int
    connections: int

@type_check_only
class GatewayStats(TypedDict):
    volumes: dict[int, VolumeStats]

@final
class Gateway:
    def __new__(cls, *, cluster_id: bytes) -> Self: ...
    def open_volume(self, handle: int, spec: VolumeSpec) -> None: ...
    def update_volume(self, handle: int, spec: VolumeSpec) -> None: ...
    def close_volume(self, handle: int) -> None: ...
    def adopt_nbd(
        self, fd: int, leftover: bytes, handle: int, structured: bool, read_only: bool
    ) -> int: ...
    def fileno(self) -> int: ...
    def drain(
        self,
    ) -> list[tuple[Literal["closed"], int, str] | tuple[Literal["conf_needed"], int, int]]: ...
    def stats(self) -> GatewayStats: ...
    def close(self) -> None: ...

@final
class Volume:
    def __new__(
        cls, spec: VolumeSpec, *, cluster_id: bytes, io_timeout_ms: int | None = None
    ) -> Self: ...
    def pread(self, offset: int, length: int) -> bytes: ...
    def pwrite(self, offset: int, data: Buffer) -> None: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def write_zeroes(self, offset: int, length: int) -> None: ...
    @property
    def size(self) -> int: ...
    def update(self, spec: VolumeSpec) -> None: ...
    def fileno(self) -> int: ...
    def drain(self) -> list[tuple[Literal["conf_needed"], int, int]]: ...
    def stats(self) -> SessionStats: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@type_check_only
class LoadWork(TypedDict):
    depth: int
    block_bytes: int
    read_percent: int
    span_bytes: int
    seconds: float
    operations: int | None
    is_sequential: bool
    seed: int

@type_check_only
class LoadLatency(TypedDict):
    count: int
    mean_us: float
    p50_us: float
    p99_us: float
    max_us: float

@type_check_only
class LoadReport(TypedDict):
    operations: int
    seconds: float
    flushes: int | None
    reads: LoadLatency
    writes: LoadLatency

def load_volume(
    spec: VolumeSpec,
    work: LoadWork,
    *,
    cluster_id: bytes,
    look: Callable[[], VolumeSpec | None] | None = None,
) -> LoadReport: ...
def load_lane(
    path: str | PathLike[str], work: LoadWork, *, cluster_id: bytes, engine: str = "auto"
) -> LoadReport: ...
def load_disk(path: str | PathLike[str], work: LoadWork, *, engine: str = "auto") -> LoadReport: ...

@final
class World:
    def __new__(cls, seed: int, options: str = "{}", trace: bool = False) -> World: ...
    def step(self, events: int) -> bool: ...
    def run(self) -> None: ...
    def violation(self) -> str | None: ...
    def options(self) -> str: ...
    def counts(self) -> dict[str, int]: ...
    def trace_hash(self) -> str: ...
    def take_trace(self) -> str: ...
