"""Exit statuses of `pf` and of what it runs; scripts rely on them, so none changes its meaning.

Pure, and imports nothing of ours: the command line needs it before anything else is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final


class Exit(IntEnum):
    """What a status means (docs/internals/interfaces.md, section 3)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    IN_THE_WAY = 4  # exists already, or is in use
    UNAVAILABLE = 5
    UNSAFE = 6
    NOT_SERVED = 7  # of `pf up` alone: it is up, and no volume can be served
    INTERRUPTED = 130  # 128 + SIGINT, as shells have it
    TERMINATED = 143  # 128 + SIGTERM


_EXIT_OF_CODE: Final[Mapping[str, Exit]] = {
    "INVALID": Exit.USAGE,
    "OUT_OF_RANGE": Exit.USAGE,
    "MISALIGNED": Exit.USAGE,
    "LIMIT": Exit.USAGE,
    "NOT_FOUND": Exit.NOT_FOUND,
    "ALREADY_EXISTS": Exit.IN_THE_WAY,
    "IN_USE": Exit.IN_THE_WAY,
    "BUSY": Exit.UNAVAILABLE,
    "UNAVAILABLE": Exit.UNAVAILABLE,
    "NO_QUORUM": Exit.UNAVAILABLE,
    "TIMED_OUT": Exit.UNAVAILABLE,
    "UNSAFE": Exit.UNSAFE,
}


def exit_of_code(name: str) -> Exit:
    """Choose the status of an error by the name of its code; without a row it is `FAILED`."""
    return _EXIT_OF_CODE.get(name, Exit.FAILED)
