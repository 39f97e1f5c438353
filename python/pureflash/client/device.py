"""I/O on a volume from Python: a thin face over `_core.Volume`, which talks to the stores directly.

Every method blocks and releases the GIL meanwhile; a device may be used from several threads.
Offsets and lengths are bytes and multiples of 512. A write that returned is on stable media.

A device follows its volume until it or its cluster's connection is closed: requests go to whichever
store serves, a volume that grew shows its new size, tickets are renewed (`follow`). A request that
cannot be served now waits, as with a disk. Only one client writes: when another one attaches the
volume for writing, each request of this device fails with RouteError FENCED, the first after a wait
of 5 s. A failed write may then have been carried out or not; `open()` again to go on. Once the
volume is deleted every request fails with CallerError NOT_FOUND.

A device belongs to the process that opened it. In a forked child every method, `close` too, raises
CallerError IN_USE, and what the child collects or ends with disturbs nothing of the parent's.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Protocol, Self, TypeVar

from pureflash.client.follow import CALL_S, Follower
from pureflash.client.owner import Owner
from pureflash.errors import CallerError, Code, PureFlashError, SoftwareError
from pureflash.model.core import core_spec
from pureflash.model.messages import VolumeSpec

if TYPE_CHECKING:
    from pureflash.client.api import Api

_P = ParamSpec("_P")
_R = TypeVar("_R")


SECTOR_BYTES: Final = 512


class CoreVolume(Protocol):
    """`_core.Volume(spec, cluster_id=...)`; what a follower needs of it is `Followed`."""

    @property
    def size(self) -> int:
        """Size in bytes, as last told."""

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

    def __init__(self, volume: CoreVolume, *, follower: Follower | None = None) -> None:
        """Wrap an open `_core.Volume`; `open_device` makes one."""
        self._owner = Owner("the device")
        self._volume = volume
        self._follower = follower
        if follower is not None:
            # Also when nobody closes it, and before the interpreter ends.
            weakref.finalize(self, follower.end)

    def __enter__(self) -> Self:
        self._owner.check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or self._owner.is_here:  # a child's own exception goes its way
            self.close()

    @property
    def size_bytes(self) -> int:
        """Size of the volume; a few seconds old at most while a conductor is there."""
        self._owner.check()
        return self._volume.size

    @property
    def news_problem(self) -> PureFlashError | None:
        """Why it is not known how the volume is now; None when all is well, or nothing follows."""
        self._owner.check()
        return None if self._follower is None else self._follower.problem

    def pread(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes.

        Errors: CallerError OUT_OF_RANGE, MISALIGNED; MediaError.
        """
        self._check(offset, length)
        return self._ask(self._volume.pread, offset, length)

    def pwrite(self, data: bytes, *, offset: int) -> None:
        """Write all of `data`.

        Errors: CallerError OUT_OF_RANGE, MISALIGNED, READ_ONLY; MediaError NO_SPACE; RouteError
        FENCED.
        """
        self._check(offset, len(data))
        self._ask(self._volume.pwrite, offset, data)

    def flush(self) -> None:
        """Wait for completed writes to be durable."""
        self._ask(self._volume.flush)

    def discard(self, offset: int, length: int) -> None:
        """Give space back; the range reads as zeros afterwards."""
        self._check(offset, length)
        self._ask(self._volume.discard, offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Write zeros without sending them."""
        self._check(offset, length)
        self._ask(self._volume.write_zeroes, offset, length)

    def unfollow(self, *, is_awaited: bool = True) -> None:
        """Stay with the routes of now: what `Cluster.close` does to its devices."""
        self._owner.check()
        if self._follower is not None:
            self._follower.stop()
            if is_awaited:
                self._follower.join()

    def close(self) -> None:
        """End the connections."""
        self.unfollow(is_awaited=False)
        self._volume.close()
        self.unfollow()

    def _ask(self, request: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        self._owner.check()
        try:
            return request(*args, **kwargs)
        except PureFlashError as problem:
            follower = self._follower
            if problem.code is Code.CANCELLED and follower is not None and follower.is_gone:
                assert follower.problem is not None, "it says that the volume is gone"
                raise follower.problem from problem
            raise

    def _check(self, offset: int, length: int) -> None:
        if offset % SECTOR_BYTES or length % SECTOR_BYTES:
            raise CallerError(
                Code.MISALIGNED, f"{length} bytes at {offset}: both must be multiples of 512"
            )
        is_beyond = offset >= 0 and length >= 0 and offset + length > self.size_bytes
        if is_beyond and self._follower is not None and self._follower.is_alive:
            self._follower.look()  # it may have grown just now
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise CallerError(
                Code.OUT_OF_RANGE,
                f"bytes {offset} to {offset + length} of a volume of {self.size_bytes}",
            )


def open_device(api: Api, reference: str, *, is_read_only: bool = False) -> Device:
    """Attach a volume for I/O and follow it.

    Errors: SoftwareError UNSUPPORTED without a core that can; those of `Api.attach_volume`.
    """
    module: Any = importlib.import_module("pureflash._core")
    if not hasattr(module, "Volume"):
        raise SoftwareError(
            Code.UNSUPPORTED,
            "this build of the core has no Volume",
            next_step="build the package again: pip install .",
        )
    spec = api.attach_volume(reference, is_read_only=is_read_only)
    volume: Any = module.Volume(core_spec(spec), cluster_id=bytes.fromhex(spec.cluster_id))

    def ask(ticket: str) -> VolumeSpec:
        return api.renew_attach(str(spec.volume_id), ticket, timeout_s=CALL_S)

    return Device(volume, follower=Follower(volume, ask, ticket=spec.ticket))
