"""What the operations of each disk took lately, for the conductor, which compares disks.

Theory of operation. The data thread only counts: each operation into a histogram that grows from
the start of the process on. Here, at every heartbeat, the histogram is looked at; the difference to
the look before is what happened in between, and the difference to the look `WINDOW` heartbeats ago
is what the 99th percentile is of. The mean forgets: each heartbeat with operations moves it by
`WEIGHT` of the way to its own. A disk without operations in the window has no figures, and its mean
begins anew with the next ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pureflash.model.messages import DiskLatency

WINDOW: Final = 10
"""Heartbeats: 5 s."""
WEIGHT: Final = 0.2
"""Of the newest heartbeat in the mean: a step is followed by 9/10 within the window."""


@dataclass(frozen=True, slots=True)
class Look:
    """A histogram at one moment: operations by the upper end of their bucket, and all their time.

    Nanoseconds, since the start of the process.
    """

    counts: Mapping[int, int]
    total_nanos: int

    def since(self, before: Look) -> Look:
        """Give what came after another look."""
        counts = {
            upper: count - before.counts.get(upper, 0)
            for upper, count in self.counts.items()
            if count > before.counts.get(upper, 0)
        }
        return Look(counts, self.total_nanos - before.total_nanos)

    @property
    def operations(self) -> int:
        """Count them."""
        return sum(self.counts.values())

    def quantile_nanos(self, percent: int) -> int:
        """Give the upper end of the first bucket that covers so many of them; 0 without any."""
        rank = max(1, -(-self.operations * percent // 100))
        seen = 0
        for upper, count in sorted(self.counts.items()):
            seen += count
            if seen >= rank:
                return upper
        return 0


class Meter:
    """One kind of operation of one disk."""

    def __init__(self) -> None:
        self._looks: deque[Look] = deque(maxlen=WINDOW + 1)
        self._ewma_nanos: float | None = None

    def look(self, now: Look) -> tuple[int, int, int]:
        """Take a look in; gives mean and 99th percentile in us, and the operations of the window.

        The first look only begins: what a process does at its start is not what it serves.
        """
        if self._looks:
            fresh = now.since(self._looks[-1])
            if count := fresh.operations:
                mean = fresh.total_nanos / count
                old = mean if self._ewma_nanos is None else self._ewma_nanos
                self._ewma_nanos = old + WEIGHT * (mean - old)
        self._looks.append(now)
        window = now.since(self._looks[0])
        count = window.operations
        if count == 0 or self._ewma_nanos is None:
            self._ewma_nanos = None
            return 0, 0, 0
        return round(self._ewma_nanos / 1000), window.quantile_nanos(99) // 1000, count


class Meters:
    """All disks of a store, by their index."""

    def __init__(self) -> None:
        self._disks: dict[int, tuple[Meter, Meter]] = {}

    def look(self, disks: Sequence[Mapping[str, Any]]) -> dict[int, DiskLatency]:
        """Take in the disks of `StoreNode.stats()`; called once for each heartbeat."""
        found: dict[int, DiskLatency] = {}
        for index, disk in enumerate(disks):
            seen = disk.get("latency")
            if seen is None:
                continue
            writes, reads = self._disks.setdefault(index, (Meter(), Meter()))
            write_ewma_us, write_p99_us, write_count = writes.look(_look(seen, "writes"))
            read_ewma_us, read_p99_us, read_count = reads.look(_look(seen, "reads"))
            found[index] = DiskLatency(
                write_ewma_us=write_ewma_us,
                write_p99_us=write_p99_us,
                writes=write_count,
                read_ewma_us=read_ewma_us,
                read_p99_us=read_p99_us,
                reads=read_count,
            )
        return found


def _look(seen: Mapping[str, Any], kind: str) -> Look:
    return Look(dict(seen[kind]), seen[f"{kind}_nanos"])
