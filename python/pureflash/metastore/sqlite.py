"""The metastore in one SQLite file, for a cluster with a single conductor.

Theory of operation. One connection, used by one worker thread, so that nothing blocks the event
loop and calls are linearized by their queue. `journal_mode=WAL, synchronous=FULL`: a commit that
was answered survives power loss (NORMAL would lose configurations that stores were already told).
A lock on `FILE.lock` keeps a second conductor out; it is a file of its own because SQLite's POSIX
locks vanish when any descriptor of the database is closed.

Costs one fsync per batch, about a millisecond on an SSD.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

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

_T = TypeVar("_T")
FORMAT: Final = 1
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entry (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS change (
    revision INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, value BLOB) STRICT;
"""


class SqliteMetastore:
    """A metastore in a file; see `interface.Metastore`. Made by `open`."""

    def __init__(self, connection: sqlite3.Connection, *, lock: int, changes_kept: int) -> None:
        """Take over an opened file; use `open`."""
        self._connection = connection
        self._lock = lock
        self._changes_kept = changes_kept
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="metastore")
        self._news = asyncio.Condition()
        self._is_closed = False
        self._lineage: str = connection.execute(
            "SELECT value FROM fact WHERE name = 'lineage'"
        ).fetchone()[0]

    @classmethod
    def open(
        cls, path: Path, *, new_lineage: str, changes_kept: int = CHANGES_KEPT
    ) -> SqliteMetastore:
        """Open the file, making it with `new_lineage` (32 hexadecimal digits) if there is none.

        Errors: ClusterError UNAVAILABLE when another process has it, it cannot be opened, or it is
        not a metastore of this format.
        """
        lock = _lock_file(path)
        connection: sqlite3.Connection | None = None
        try:
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            found = _prepare(connection, new_lineage)
            if found != str(FORMAT):
                raise _unavailable(path, f"its format is {found}, this version knows {FORMAT}")
        except (sqlite3.Error, ClusterError) as cause:
            if connection is not None:
                connection.close()
            os.close(lock)
            if isinstance(cause, ClusterError):
                raise
            raise _damaged(path, str(cause)) from cause
        return cls(connection, lock=lock, changes_kept=changes_kept)

    @property
    def lineage(self) -> str:
        """Name of this history."""
        return self._lineage

    async def begin_lineage(self, lineage: str) -> None:
        """Let this history go on under another name."""
        await self._run(
            lambda: self._connection.execute(
                "UPDATE fact SET value = ? WHERE name = 'lineage'", (lineage,)
            )
        )
        self._lineage = lineage

    async def revision(self) -> int:
        """Give the newest revision."""
        return await self._run(self._newest)

    async def get(self, key: str) -> Entry | None:
        """Give one entry."""
        rows = await self._run(
            lambda: self._connection.execute(
                "SELECT key, value, revision FROM entry WHERE key = ?", (key,)
            ).fetchall()
        )
        return Entry(*rows[0]) if rows else None

    async def range(self, prefix: str, *, after: str = "", limit: int = 1_000) -> list[Entry]:
        """Give entries by prefix."""
        # A prefix is a range up to the prefix with a last character that no key contains.
        rows = await self._run(
            lambda: self._connection.execute(
                "SELECT key, value, revision FROM entry"
                " WHERE key >= ? AND key < ? AND key > ? ORDER BY key LIMIT ?",
                (prefix, prefix + "\U0010ffff", after, limit),
            ).fetchall()
        )
        return [Entry(*row) for row in rows]

    async def commit(self, batch: Sequence[Cas]) -> list[CasResult]:
        """Apply independent compare-and-swaps, durably, in one transaction."""
        check_batch(batch)
        results = await self._run(lambda: self._commit(batch))
        async with self._news:
            self._news.notify_all()
        return results

    async def watch(self, prefix: str, *, after: int) -> AsyncIterator[list[Change]]:
        """Follow changes."""
        seen = after
        while True:
            async with self._news:
                while not self._is_closed and await self.revision() <= seen:
                    await self._news.wait()
            if self._is_closed:
                return
            oldest, fresh = await self._run(partial(self._changes, seen))
            if oldest > seen + 1:
                raise CompactedError(seen)
            seen = fresh[-1].revision
            if matching := [change for change in fresh if change.key.startswith(prefix)]:
                yield matching

    async def close(self) -> None:
        """Close the file and let another process have it."""
        if self._is_closed:
            return
        self._is_closed = True
        async with self._news:
            self._news.notify_all()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._worker, self._connection.close)
        self._worker.shutdown()
        os.close(self._lock)

    async def _run(self, call: Callable[[], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, call)
        except sqlite3.Error as cause:
            raise ClusterError(
                Code.UNAVAILABLE,
                f"the metastore failed: {cause}",
                next_step="check free space and permissions of the conductor's data directory",
            ) from cause

    def _newest(self) -> int:
        row = self._connection.execute("SELECT max(revision) FROM change").fetchone()
        return int(row[0] or 0)

    def _changes(self, after: int) -> tuple[int, list[Change]]:
        oldest = self._connection.execute("SELECT min(revision) FROM change").fetchone()[0]
        rows = self._connection.execute(
            "SELECT revision, key, value FROM change WHERE revision > ? ORDER BY revision", (after,)
        ).fetchall()
        return int(oldest), [Change(*row) for row in rows]

    def _commit(self, batch: Sequence[Cas]) -> list[CasResult]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            results = [self._apply(cas) for cas in batch]
            self._connection.execute(
                "DELETE FROM change WHERE revision <= ?", (self._newest() - self._changes_kept,)
            )
            self._connection.execute("COMMIT")
        except BaseException:
            # Out of space SQLite ends it by itself; ending it again would hide the cause.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return results

    def _apply(self, cas: Cas) -> CasResult:
        execute = self._connection.execute
        row = execute("SELECT revision FROM entry WHERE key = ?", (cas.key,)).fetchone()
        now = int(row[0]) if row else 0
        if now != cas.expected:
            return CasResult(cas.key, is_applied=False, revision=now)
        cursor = execute("INSERT INTO change (key, value) VALUES (?, ?)", (cas.key, cas.value))
        revision = cursor.lastrowid
        assert revision is not None, "an INSERT has a row id"
        if cas.value is None:
            execute("DELETE FROM entry WHERE key = ?", (cas.key,))
            return CasResult(cas.key, is_applied=True, revision=0)
        execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", (cas.key, cas.value, revision))
        return CasResult(cas.key, is_applied=True, revision=revision)


def _prepare(connection: sqlite3.Connection, new_lineage: str) -> str:
    """Make the tables that are missing; gives the format that the file has."""
    mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    assert mode == "wal", f"journal_mode is {mode}"
    connection.execute("PRAGMA synchronous=FULL")
    connection.executescript(_SCHEMA)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT OR IGNORE INTO fact VALUES ('format', ?)", (str(FORMAT),))
    connection.execute("INSERT OR IGNORE INTO fact VALUES ('lineage', ?)", (new_lineage,))
    found = connection.execute("SELECT value FROM fact WHERE name = 'format'").fetchone()[0]
    connection.execute("COMMIT")
    return str(found)


def _lock_file(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as cause:
        raise _unavailable(path, cause.strerror or str(cause)) from cause
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as cause:
        os.close(lock)
        raise _unavailable(path, "another conductor is using it") from cause
    return lock


def _damaged(path: Path, reason: str) -> ClusterError:
    return ClusterError(
        Code.UNAVAILABLE,
        f"cannot open the metastore {path}: {reason}",
        next_step=f"restore {path.name} from a backup; or move it and what is called {path.name}-*"
        " away and start again: the conductor comes up without its memory, and `pf conductor"
        " recover-config` rebuilds it from the stores",
    )


def _unavailable(path: Path, reason: str) -> ClusterError:
    return ClusterError(
        Code.UNAVAILABLE,
        f"cannot open the metastore {path}: {reason}",
        next_step="stop the other conductor, or restore the file from a backup",
    )
