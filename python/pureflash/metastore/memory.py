"""The metastore in memory: the fake of tests and of simulated worlds.

It passes the same state machine as the real ones (tests/unit/test_metastore.py). `stop_after` makes
it fail like a process that is killed between two writes: the crash tests of the conductor use it.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence

from pureflash.errors import ClusterError, Code
from pureflash.metastore.interface import (
    CHANGES_KEPT,
    Cas,
    CasResult,
    Change,
    CompactedError,
    Entry,
    check_batch,
)


class MemoryMetastore:
    """A metastore that lives as long as the object; see `interface.Metastore`."""

    def __init__(self, *, lineage: str = "0" * 32, changes_kept: int = CHANGES_KEPT) -> None:
        self._lineage = lineage
        self._entries: dict[str, Entry] = {}
        self._changes: list[Change] = []
        self._changes_kept = changes_kept
        self._revision = 0
        self._news = asyncio.Condition()
        self._is_closed = False
        self.stop_after: int | None = None
        """Changes that are still applied before every call fails; None: never."""

    @property
    def lineage(self) -> str:
        """Name of this history."""
        return self._lineage

    async def begin_lineage(self, lineage: str) -> None:
        """Let this history go on under another name."""
        self._check_running()
        self._lineage = lineage

    async def revision(self) -> int:
        """Give the newest revision."""
        self._check_running()
        return self._revision

    async def get(self, key: str) -> Entry | None:
        """Give one entry."""
        self._check_running()
        return self._entries.get(key)

    async def range(self, prefix: str, *, after: str = "", limit: int = 1_000) -> list[Entry]:
        """Give entries by prefix."""
        self._check_running()
        keys = sorted(key for key in self._entries if key.startswith(prefix) and key > after)
        return [self._entries[key] for key in keys[:limit]]

    async def commit(self, batch: Sequence[Cas]) -> list[CasResult]:
        """Apply independent compare-and-swaps."""
        check_batch(batch)
        results = [self._apply(cas) for cas in batch]
        async with self._news:
            self._news.notify_all()
        return results

    async def watch(self, prefix: str, *, after: int) -> AsyncIterator[list[Change]]:
        """Follow changes."""
        seen = after
        while True:
            async with self._news:
                while not self._is_closed and self._revision <= seen:
                    await self._news.wait()
            if self._is_closed:
                return
            if self._changes and self._changes[0].revision > seen + 1:
                raise CompactedError(seen)
            start = bisect_right(self._changes, seen, key=lambda change: change.revision)
            fresh = self._changes[start:]
            seen = self._revision
            if matching := [change for change in fresh if change.key.startswith(prefix)]:
                yield matching

    async def close(self) -> None:
        """End the watches."""
        self._is_closed = True
        async with self._news:
            self._news.notify_all()

    def _check_running(self) -> None:
        if self.stop_after == 0:
            raise ClusterError(Code.UNAVAILABLE, "the metastore was stopped")

    def _apply(self, cas: Cas) -> CasResult:
        self._check_running()
        now = self._entries.get(cas.key)
        revision = now.revision if now else 0
        if revision != cas.expected:
            return CasResult(cas.key, is_applied=False, revision=revision)
        self._revision += 1
        if cas.value is None:
            del self._entries[cas.key]
        else:
            self._entries[cas.key] = Entry(cas.key, cas.value, self._revision)
        self._changes.append(Change(self._revision, cas.key, cas.value))
        del self._changes[: -self._changes_kept]
        if self.stop_after is not None:
            self.stop_after -= 1
        return CasResult(
            cas.key, is_applied=True, revision=0 if cas.value is None else self._revision
        )
