"""The process that something belongs to: what was opened does not come along through a fork.

A forked child (os.fork, multiprocessing's start method "fork") has a copy of every object of its
parent, but none of its threads, and shares its sockets. A request there would wait for a thread
that is not there, or take an answer that the parent waits for. So what has threads or sockets
remembers who made it and refuses everybody else at once.
"""

from __future__ import annotations

import os
from typing import Final

from pureflash.errors import CallerError, Code

NEXT_STEP: Final = (
    "connect and open in the child itself (read-only, if the parent shall go on writing),"
    ' or start it with the method "spawn"'
)


class Owner:
    """Remembers the process in which it was made; costs a `getpid` for each question."""

    def __init__(self, what: str) -> None:
        """Begin; `what` is named in the error: "the device", "the connection"."""
        self._what = what
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is the process in which it was made."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Refuse another process. Errors: CallerError IN_USE."""
        if not self.is_here:
            raise CallerError(
                Code.IN_USE,
                f"{self._what} was opened by process {self._pid}; this is its child {os.getpid()}",
                next_step=NEXT_STEP,
            )
