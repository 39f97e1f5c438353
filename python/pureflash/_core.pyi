from os import PathLike
from typing import TypedDict, final

__all__ = ["BuildInfo", "Lane", "build_info", "format_disk", "inspect_disk", "version"]

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
