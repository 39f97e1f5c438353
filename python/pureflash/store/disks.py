"""The disks of a store at its start: which can be served, and what is wrong with the others.

Theory of operation. One bad disk is one failed disk, not a store that does not start: each is
looked at by itself, and what is wrong with it becomes a `Fault` with a health code, a reason and a
next step, which the store's agent reports for as long as the process lives. A disk is formatted
only if there never was one (`process.known_disks`), and is served only if it is the one that was
there before. Nothing is ever written to a file that is not.

A disk can also go bad under a running store: its file is cut, removed, or another one is put in its
place, and the store would go on with what nobody finds after a restart. `DiskWatch` looks at the
path once a second, and what is not there any more is stopped.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pureflash.errors import CallerError, Code, PureFlashError
from pureflash.model.domain import Disk
from pureflash.model.settings import DiskSetting, Settings
from pureflash.process import known_disks
from pureflash.process.known_disks import KnownDisk
from pureflash.process.logs import Log
from pureflash.store.core import StoreCore

DISK_FAILED: Final = "DISK_FAILED"
WRONG_CLUSTER: Final = "WRONG_CLUSTER"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a disk is not served: a health code, the reason, and what a person can do."""

    code: str
    reason: str
    next_step: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedDisk:
    """A disk of the settings: what it is, or was when it was last there, and what is wrong."""

    disk: Disk
    setting: DiskSetting
    fault: Fault | None

    @property
    def for_core(self) -> dict[str, Any]:
        """Describe it to `_core.StoreNode`, which opens it only without a fault."""
        described: dict[str, Any] = {
            "path": str(self.setting.path),
            "engine": self.setting.engine,
            "durability": self.setting.durability,
        }
        return described if self.fault is None else described | {"failure": self.fault.reason}


@dataclass(frozen=True, slots=True)
class Probe:
    """Looks at disks of one store; writes nothing."""

    core: StoreCore
    cluster_id: str
    data: Path
    name: str

    def look(self, index: int, path: Path) -> Disk | Fault:
        """Say what is at the path of a disk: the disk that belongs there, or what is wrong."""
        known = known_disks.recall(self.data, index)
        if not path.exists():
            return self._missing(path, index, known)
        try:
            found = self.core.inspect_disk(str(path))
        except PureFlashError as problem:
            step = f"nothing was written to it, and `pf disk inspect` says what is there; {BACK}"
            return Fault(code=DISK_FAILED, reason=problem.message, next_step=step)
        if found["cluster_id"] != self.cluster_id:
            return Fault(
                code=WRONG_CLUSTER,
                reason=f"{path} belongs to cluster {found['cluster_id']}; it was not touched",
                next_step=f"give it back to its own, and {BACK}",
            )
        disk = Disk(
            index=index,
            path=str(path),
            disk_uuid=found["disk_uuid"],
            format_uuid=found["format_uuid"],
            size_bytes=found["size_bytes"],
        )
        if known is not None and known_disks.is_another(
            known, disk_uuid=disk.disk_uuid, format_uuid=disk.format_uuid
        ):
            return Fault(
                code=DISK_FAILED,
                reason=f"{path} is disk {disk.disk_uuid[:8]}, and {self.name} had disk"
                f" {known.disk_uuid[:8]} there; it was not touched",
                next_step=BACK,
            )
        return disk

    def _missing(self, path: Path, index: int, known: KnownDisk | None) -> Fault:
        if known is None or known is known_disks.UNKNOWN:
            was = f"which one, its record disk{index}.json does not say"
        else:
            was = f"disk {known.disk_uuid[:8]}, last seen at {known.path}"
        return Fault(
            code=DISK_FAILED,
            reason=f"{path} is not there, and {self.name} had a disk {index}: {was}",
            next_step=f"mount it or {BACK}",
        )


BACK: Final = "put the disk of this store back"
"""Where a next step is completed by `_with_way_on`."""


def _with_way_on(fault: Fault, name: str, *, is_alone: bool) -> Fault:
    """Say how the store takes its disk up again, and how it goes on when there is none any more.

    A store that serves another disk is not ended by itself: see `DiskWatch`.
    """
    if BACK not in fault.next_step:
        return fault
    taken_up = f": {name} takes it up by itself"
    if not is_alone:
        taken_up = f", then `kill {os.getpid()}`: {name} is started again with it"
    step = (
        f"{fault.next_step}{taken_up}; if it is lost for good: `pf down`, then"
        f" `pf up --new-disk {name}`"
    )
    return replace(fault, next_step=step)


def prepare_disks(probe: Probe, settings: Settings, log: Log) -> tuple[PreparedDisk, ...]:
    """Format the disks that never existed, and read what all of them are.

    Errors: CallerError INVALID when the settings name none. What is wrong with one is its fault.
    """
    if not settings.disks:
        raise CallerError(Code.INVALID, "the settings name no [[disk]]")
    prepared: list[PreparedDisk] = []
    for index, wanted in enumerate(settings.disks):
        found = _made(probe, index, wanted, log) or probe.look(index, wanted.path)
        if isinstance(found, Disk):
            known_disks.remember(probe.data, found)
            prepared.append(PreparedDisk(disk=found, setting=wanted, fault=None))
            continue
        log.warning("disk.failed", f"disk {index}: {found.reason}", code=found.code, disk=index)
        was = known_disks.recall(probe.data, index) or known_disks.UNKNOWN
        disk = Disk(
            index=index,
            path=str(wanted.path),
            disk_uuid=was.disk_uuid,
            format_uuid=was.format_uuid,
            size_bytes=was.size_bytes or wanted.size_bytes or 0,
        )
        prepared.append(PreparedDisk(disk=disk, setting=wanted, fault=found))
    is_alone = all(one.fault is not None for one in prepared)
    return tuple(
        one
        if one.fault is None
        else replace(one, fault=_with_way_on(one.fault, probe.name, is_alone=is_alone))
        for one in prepared
    )


def _made(probe: Probe, index: int, wanted: DiskSetting, log: Log) -> Fault | None:
    """Format a disk if there never was one; gives why that failed."""
    if wanted.path.exists() or known_disks.recall(probe.data, index) is not None:
        return None
    try:
        _format(probe.core, wanted, probe.cluster_id)
    except PureFlashError as problem:
        step = problem.next_step or f"correct the settings of {probe.name}, and start it again"
        return Fault(code=DISK_FAILED, reason=problem.message, next_step=step)
    log.info("disk.formatted", str(wanted.path), disk=index)
    return None


def _format(core: StoreCore, wanted: DiskSetting, cluster_id: str) -> None:
    if wanted.size_bytes is None:
        raise CallerError(
            Code.INVALID,
            f"{wanted.path} does not exist and its [[disk]] has no size",
            next_step="give it a size such as 10G, or correct the path",
        )
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    core.format_disk(
        str(wanted.path),
        size_bytes=wanted.size_bytes,
        cluster_id=bytes.fromhex(cluster_id),
        journal_bytes=wanted.journal_bytes,
        durability=wanted.durability,
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a path led to: the file or device, its size if it is a file, and its last change."""

    identity: tuple[int, ...]
    size_bytes: int
    changed_ns: int = 0


def look_at(path: Path) -> _Seen | None:
    """Look at what a path leads to; None when that is nothing."""
    try:
        found = path.stat()
    except OSError:
        return None
    if stat.S_ISBLK(found.st_mode):
        return _Seen((os.major(found.st_rdev), os.minor(found.st_rdev)), 0)
    return _Seen((found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns)


class DiskWatch:
    """Notices that a served disk was cut, removed or exchanged, and that a missing one is back.

    The first is stopped. A store that serves no disk at all ends when one of its disks is back, and
    its supervisor starts it again with it; one that serves others goes on until a person ends it,
    because all its replicas have to be made equal again then.
    """

    def __init__(
        self,
        disks: Sequence[PreparedDisk],
        *,
        fail: Callable[[int, str], None],
        is_back: Callable[[int, Path], bool],
        restart: Callable[[str], None],
        look: Callable[[Path], _Seen | None] = look_at,
    ) -> None:
        """Remember what is there now; `fail` is told of each disk once."""
        self._fail, self._is_back, self._restart = fail, is_back, restart
        self._look = look
        now = {one.disk.index: (one.setting.path, look(one.setting.path)) for one in disks}
        failed = {one.disk.index for one in disks if one.fault is not None}
        self._watched = {
            index: (path, seen)
            for index, (path, seen) in now.items()
            if index not in failed and seen is not None
        }
        self._awaited = now if len(failed) == len(disks) else {}

    def look(self) -> None:
        """Compare with what was there at the start."""
        for index, (path, before) in list(self._awaited.items()):
            now = self._look(path)
            if now == before:
                continue
            self._awaited[index] = (path, now)
            if now is not None and self._is_back(index, path):
                self._awaited.clear()
                self._restart(f"disk {index} is back at {path}")
                return
        for index, (path, before) in list(self._watched.items()):
            now = self._look(path)
            if now is None:
                what = f"{path} is not there any more: it was removed, renamed or unmounted"
            elif now.identity != before.identity:
                what = f"{path} is another file than the one that was opened"
            elif now.size_bytes < before.size_bytes:
                what = f"{path} was cut from {before.size_bytes} to {now.size_bytes} bytes"
            else:
                continue
            del self._watched[index]
            self._fail(index, what)
