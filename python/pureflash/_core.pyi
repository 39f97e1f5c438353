from types import TracebackType
from typing import Literal, NotRequired, Self, TypedDict, final, type_check_only

from typing_extensions import Buffer

__all__ = ["BuildInfo", "Gateway", "Volume", "build_info", "version"]

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
