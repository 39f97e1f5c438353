"""How an open device follows its volume: new routes, new tickets, a new size.

Theory of operation. A `Follower` owns one thread for the time that a device is open. The thread
asks the conductor how the volume is now and passes the answer to the core. `Pace` decides when:
every `NEWS_S` in quiet times, which shows growth and keeps the ticket young; every `PAUSE_S` while
requests wait, which the core says with an event (no route, a stale one, no connection), or shows by
requests that are open and none answered (a store that was stopped says nothing at all).

What it guarantees. No request of the device waits for the thread, so a conductor that is away is
not missed until a route changes. Each question has a time limit, `CALL_S`; a failed one is asked
again at the same pace, and `problem` keeps why. When the conductor says that there is no such
volume any more, the core's volume is closed: what waited would wait for ever. `stop` and `join` may
be called often and by anybody, also by a garbage collector; `end` does nothing in a forked child,
which has neither the thread nor a right to its sockets. The thread knows the core's volume,
never the device: a device that is dropped without being closed is collected, and its thread ends.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from pureflash.client.owner import Owner
from pureflash.errors import Code, PureFlashError
from pureflash.model.core import core_spec
from pureflash.model.messages import VolumeSpec

NEWS_S: Final = 5.0
"""Between two looks in quiet times; a ticket lives 24 hours."""
PAUSE_S: Final = 0.5
"""Between two looks while requests wait, and between two looks at whether they do."""
CALL_S: Final = 2.0
"""For each step of a question to the conductor."""
JOIN_S: Final = 5.0
"""For the thread to end; it has no longer work than one question."""


class Followed(Protocol):
    """What a follower needs of `_core.Volume`."""

    def update(self, spec: dict[str, object], /) -> None:
        """Follow new routes, a new size or a new ticket."""

    def fileno(self) -> int:
        """Give the eventfd that is readable while events wait."""

    def drain(self) -> object:
        """Take all events, each of which says that requests wait for news."""

    def stats(self) -> Mapping[str, int]:
        """Give counters, "requests" and "replies" among them."""

    def close(self) -> None:
        """End the connections; requests that are open fail with CANCELLED."""


class Pace:
    """When to ask for news. Pure; times are seconds of a clock that only grows."""

    def __init__(self, now_s: float) -> None:
        """Begin with news that are fresh."""
        self._asked_s = now_s
        self._is_wanted = False
        self._replies = 0

    def want(self) -> None:
        """Note that requests wait for news."""
        self._is_wanted = True

    def count(self, *, requests: int, replies: int) -> None:
        """Take in the counters: open requests of which none was answered meanwhile wait."""
        self._is_wanted |= requests > replies == self._replies
        self._replies = replies

    def is_due(self, now_s: float) -> bool:
        """Say whether to ask now."""
        return now_s - self._asked_s >= (PAUSE_S if self._is_wanted else NEWS_S)

    def asked(self, now_s: float) -> None:
        """Begin anew: it was asked just now."""
        self._asked_s = now_s
        self._is_wanted = False


class Follower:
    """See the module's head."""

    def __init__(
        self,
        volume: Followed,
        ask: Callable[[str], VolumeSpec],
        *,
        ticket: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Follow for `volume`; `ask` gives the description for the session of a ticket."""
        self._owner = Owner("the follower")
        self._volume = volume
        self._ask = ask
        self._ticket = ticket
        self._clock = clock
        self._lock = threading.Lock()
        self.problem: PureFlashError | None = None
        """Why the last look failed."""
        self._ours, self._theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="pureflash-follower", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Say whether the thread runs."""
        return self._thread.is_alive()

    @property
    def is_gone(self) -> bool:
        """Say whether the volume was deleted."""
        return self.problem is not None and self.problem.code is Code.NOT_FOUND

    def look(self) -> None:
        """Ask for news now, and let the core have them."""
        # One at a time: an older answer must not come after a newer one.
        with self._lock:
            try:
                spec = self._ask(self._ticket)
                self._volume.update(core_spec(spec))
            except PureFlashError as problem:
                # The conductor is away, or the device was closed meanwhile: I/O goes on as it can.
                self.problem = problem
                if self.is_gone:
                    self._volume.close()
                return
            self.problem = None
            self._ticket = spec.ticket

    def stop(self) -> None:
        """Let the thread end soon."""
        self._ours.close()

    def join(self) -> None:
        """Wait until the thread has ended, at most `JOIN_S`."""
        # The garbage collector may call from any thread.
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_S)

    def end(self) -> None:
        """Let the thread end, and wait for that."""
        if not self._owner.is_here:
            return
        self.stop()
        self.join()

    def _run(self) -> None:
        pace = Pace(self._clock())
        poller = select.poll()
        poller.register(self._theirs, select.POLLIN)
        poller.register(self._volume.fileno(), select.POLLIN)
        with self._theirs:
            while True:
                ready = [descriptor for descriptor, _ in poller.poll(PAUSE_S * 1000)]
                if self._theirs.fileno() in ready:
                    return  # the other end was closed
                if ready:
                    self._volume.drain()
                    pace.want()
                try:
                    counters = self._volume.stats()
                    pace.count(requests=counters["requests"], replies=counters["replies"])
                except PureFlashError as problem:
                    if problem.code is Code.CANCELLED:
                        return  # it was closed
                    pace.want()  # so many requests that not even this one found a place
                if pace.is_due(self._clock()):
                    self.look()
                    pace.asked(self._clock())
