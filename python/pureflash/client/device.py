"""I/O on a volume from Python: a thin face over `_core.Volume`, which talks to the stores directly.

Every method blocks and releases the GIL meanwhile; a device may be used from several threads.
Offsets and lengths are bytes and multiples of 512. A write that returned is on stable media.
"""

from __future__ import annotations

import importlib
from types import TracebackType
from typing import Any, Protocol, Self

from pureflash.errors import CallerError, Code, SoftwareError
from pureflash.model.messages import VolumeSpec


class CoreVolume(Protocol):
    """`_core.Volume(spec, cluster_id=...)`."""

    def pread(self, offset: int, length: int) -> bytes:
        """Read."""

    def pwrite(self, offset: int, data: bytes) -> None:
        """Write durably."""

    def flush(self) -> None:
        """Wait for completed writes to be durable."""

    def discard(self, offset: int, length: int) -> None:
        """Give space back; reads give zeros afterwards."""

    def write_zeroes(self, offset: int, length: int) -> None:
        """Write zeros."""

    def close(self) -> None:
        """End the connections."""


class Device:
    """An attached volume; a context manager."""

    def __init__(self, volume: CoreVolume, *, size_bytes: int) -> None:
        """Wrap an open `_core.Volume`; `open_device` makes one."""
        self._volume = volume
        self.size_bytes = size_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def pread(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes. Errors: CallerError OUT_OF_RANGE, MediaError."""
        self._check(offset, length)
        return self._volume.pread(offset, length)

    def pwrite(self, data: bytes, *, offset: int) -> None:
        """Write all of `data`. Errors: CallerError OUT_OF_RANGE, READ_ONLY; MediaError NO_SPACE."""
        self._check(offset, len(data))
        self._volume.pwrite(offset, data)

    def flush(self) -> None:
        """Wait for completed writes to be durable."""
        self._volume.flush()

    def discard(self, offset: int, length: int) -> None:
        """Give space back; the range reads as zeros afterwards."""
        self._check(offset, length)
        self._volume.discard(offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Write zeros without sending them."""
        self._check(offset, length)
        self._volume.write_zeroes(offset, length)

    def close(self) -> None:
        """End the connections."""
        self._volume.close()

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise CallerError(
                Code.OUT_OF_RANGE,
                f"bytes {offset} to {offset + length} of a volume of {self.size_bytes}",
            )


def core_spec(spec: VolumeSpec) -> dict[str, Any]:
    """Describe a volume as the core takes it; shards without a primary are left out."""
    return {
        "volume_id": spec.volume_id,
        "size_bytes": spec.size_bytes,
        "shard_size_bytes": spec.shard_size_bytes,
        "attach_epoch": spec.attach_epoch,
        "ticket": bytes.fromhex(spec.ticket),
        "shards": [
            {"index": shard.index, "epoch": shard.epoch, "address": shard.address}
            for shard in spec.shards
            if shard.address
        ],
    }


def open_device(spec: VolumeSpec) -> Device:
    """Open a volume for I/O. Errors: SoftwareError UNSUPPORTED without a core that can."""
    module: Any = importlib.import_module("pureflash._core")
    if not hasattr(module, "Volume"):
        raise SoftwareError(
            Code.UNSUPPORTED,
            "this build of the core has no Volume",
            next_step="build the package again: pip install .",
        )
    volume: CoreVolume = module.Volume(core_spec(spec), cluster_id=bytes.fromhex(spec.cluster_id))
    return Device(volume, size_bytes=spec.size_bytes)
