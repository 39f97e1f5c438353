"""Keep a store from filling the file system that its disk files lie on.

Theory of operation. A disk file is sparse: it takes room of its host as data comes in. A host that
is full hits every file on it at once, so ENOSPC must never be met by a write that has its place
among the others: that would look like a failing replica, on all copies together. Therefore a store
stops growing its disk files while room is left: below 5 % or 1 GiB the disk behaves as a full one.
New data is refused with NO_SPACE before anything is changed; overwrites go on, since their room is
taken already. Growth is allowed again a quarter above that, so that it does not flutter.

Devices have their own room and are not looked at.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from pureflash.process.logs import Log
from pureflash.units import format_size

LEAST_BYTES: Final = 1 << 30
"""What a store leaves of its host's file system, however small that is."""
LEAST_PERCENT: Final = 5
"""The same as a share of the file system."""
LOOK_S: Final = 1.0
"""Seconds between two looks. Meanwhile files grow by steps of 64 MiB as fast as data come in; they
may go below the least, and one that meets the end of the space stops growing by itself."""

Room = tuple[int, int]
"""Bytes free and in all."""


def must_hold(room: Room, *, is_held: bool) -> bool:
    """Say whether disk files on a file system with this room may not grow."""
    free, total = room
    least = max(LEAST_BYTES, total * LEAST_PERCENT // 100)
    return free < (least * 5 // 4 if is_held else least)


def measure(path: Path) -> Room:
    """Give the room of the file system that a file lies on."""
    usage = shutil.disk_usage(path)
    return usage.free, usage.total


class HostSpace:
    """The disks of one store whose files share the host's file system with others."""

    def __init__(
        self,
        paths: Mapping[int, Path],
        *,
        hold: Callable[[int, bool], None],
        log: Log,
        room: Callable[[Path], Room] = measure,
    ) -> None:
        """Watch these disks, by their place in the store; `hold` is told of changes."""
        self._paths = {index: path for index, path in paths.items() if path.is_file()}
        self._hold = hold
        self._log = log
        self._room = room
        self._held: dict[int, str] = {}

    @property
    def held(self) -> Mapping[int, str]:
        """Disks that may not grow, and why."""
        return self._held

    def look(self) -> None:
        """Measure now, and tell what has changed."""
        for index, path in self._paths.items():
            room = self._room(path)
            was_held = index in self._held
            if must_hold(room, is_held=was_held):
                free, total = (format_size(size) for size in room)
                self._held[index] = f"the host's file system has {free} of {total} left"
                if not was_held:
                    why = self._held[index]
                    self._log.warning("disk.host_full", why, code="DISK_FULL", disk=index)
                    self._hold(index, True)
            elif was_held:
                del self._held[index]
                self._log.info("disk.host_has_room", "new data is taken again", disk=index)
                self._hold(index, False)
