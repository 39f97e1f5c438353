"""One state machine against every metastore: a dict with revisions is the oracle."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pureflash.errors import ClusterError, Code
from pureflash.metastore import keys
from pureflash.metastore.interface import (
    VALUE_BYTES_MAX,
    Cas,
    CompactedError,
    Metastore,
    range_all,
)
from pureflash.metastore.lease import (
    LEASE_MS,
    Reign,
    Term,
    raise_term,
    renew_lease,
    take_leadership,
)
from pureflash.metastore.memory import MemoryMetastore
from pureflash.metastore.sqlite import SqliteMetastore

LINEAGE = "ab" * 16
KEYS = ["a", "a/1", "a/2", "b", "b/é"]
VALUES = st.binary(max_size=8)


def memory(_: Path, kept: int = 10_000) -> Metastore:
    return MemoryMetastore(lineage=LINEAGE, changes_kept=kept)


def sqlite(folder: Path, kept: int = 10_000) -> Metastore:
    return SqliteMetastore.open(folder / "meta.sqlite", new_lineage=LINEAGE, changes_kept=kept)


Maker = Callable[..., Metastore]
each_store = pytest.mark.parametrize("make", [memory, sqlite])


class StoreMachine(RuleBasedStateMachine):
    """Random batches; after each step the metastore reads like the model."""

    make: Maker

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.store = self.run(self._open())
        self.model: dict[str, tuple[bytes, int]] = {}
        self.revision = 0
        self.changes: list[tuple[int, str, bytes | None]] = []

    async def _open(self) -> Metastore:
        return type(self).make(Path(self.folder.name))

    def run(self, awaitable: Any) -> Any:
        return self.runner.run(awaitable)

    @rule(
        batch=st.lists(
            st.tuples(st.sampled_from(KEYS), st.none() | VALUES, st.integers(0, 2)),
            max_size=4,
            unique_by=lambda each: each[0],
        )
    )
    def commit(self, batch: list[tuple[str, bytes | None, int]]) -> None:
        wanted: list[Cas] = []
        for key, value, doubt in batch:
            now = self.model[key][1] if key in self.model else 0
            expected = now if doubt == 0 else max(0, now - doubt)
            if value is None and expected == 0:
                expected = 1_000_000  # deleting what must be absent is refused as our bug
            wanted.append(Cas(key, expected, value))
        results = self.run(self.store.commit(wanted))
        assert [result.key for result in results] == [cas.key for cas in wanted]
        for cas, result in zip(wanted, results, strict=True):
            now = self.model[cas.key][1] if cas.key in self.model else 0
            assert result.is_applied == (now == cas.expected)
            if result.is_applied:
                self.revision += 1
                self.changes.append((self.revision, cas.key, cas.value))
                if cas.value is None:
                    del self.model[cas.key]
                else:
                    self.model[cas.key] = (cas.value, self.revision)
            assert result.revision == (self.model[cas.key][1] if cas.key in self.model else 0)

    @rule(prefix=st.sampled_from(["", "a", "a/", "b", "c"]), after=st.sampled_from(["", *KEYS]))
    def read_range(self, prefix: str, after: str) -> None:
        found = self.run(self.store.range(prefix, after=after, limit=2))
        expected = sorted(k for k in self.model if k.startswith(prefix) and k > after)[:2]
        assert [(e.key, e.value, e.revision) for e in found] == [
            (key, *self.model[key]) for key in expected
        ]

    @rule(data=st.data())
    def watch_from(self, data: st.DataObject) -> None:
        if not self.changes:
            return
        after = data.draw(st.integers(0, self.revision - 1))

        async def first() -> list[Any]:
            return await anext(self.store.watch("", after=after))

        found = self.run(first())
        assert [(c.revision, c.key, c.value) for c in found] == self.changes[after:]

    @rule()
    def reopen(self) -> None:
        if isinstance(self.store, SqliteMetastore):
            self.run(self.store.close())
            self.store = self.run(self._open())

    @invariant()
    def reads_like_the_model(self) -> None:
        assert self.run(self.store.revision()) == self.revision
        assert self.store.lineage == LINEAGE
        for key in KEYS:
            entry = self.run(self.store.get(key))
            found = None if entry is None else (entry.value, entry.revision)
            assert found == self.model.get(key)

    def teardown(self) -> None:
        self.run(self.store.close())
        self.runner.close()
        self.folder.cleanup()


class MemoryMachine(StoreMachine):
    make = staticmethod(memory)


class SqliteMachine(StoreMachine):
    make = staticmethod(sqlite)


TestMemory = pytest.mark.slow(MemoryMachine.TestCase)
TestMemory.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestSqlite = pytest.mark.slow(SqliteMachine.TestCase)
TestSqlite.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)


@each_store
async def test_a_watch_sees_what_is_written_after_it_began(make: Maker, tmp_path: Path) -> None:
    store = make(tmp_path)
    watch = store.watch("a/", after=0)
    pending = asyncio.ensure_future(anext(watch))
    await store.commit([Cas("b", 0, b"not watched")])
    await store.commit([Cas("a/1", 0, b"x"), Cas("c", 0, b"y")])
    found = await asyncio.wait_for(pending, 10)
    assert [(change.key, change.value) for change in found] == [("a/1", b"x")]
    await store.close()


@each_store
async def test_a_watch_ends_when_the_store_is_closed(make: Maker, tmp_path: Path) -> None:
    store = make(tmp_path)
    watching = asyncio.ensure_future(_collect(store.watch("", after=0)))
    await asyncio.sleep(0)
    await store.close()
    assert await asyncio.wait_for(watching, 10) == []


async def _collect(watch: Any) -> list[Any]:
    return [changes async for changes in watch]


@each_store
async def test_a_watch_from_before_the_compaction_is_told_so(make: Maker, tmp_path: Path) -> None:
    store = make(tmp_path, 3)
    for number in range(6):
        await store.commit([Cas(f"k{number}", 0, b"v")])
    with pytest.raises(CompactedError):
        await anext(store.watch("", after=1))
    found = await anext(store.watch("", after=3))
    assert [change.key for change in found] == ["k3", "k4", "k5"]
    await store.close()


@each_store
async def test_a_listing_is_read_page_by_page(make: Maker, tmp_path: Path) -> None:
    store = make(tmp_path)
    names = sorted(f"n/{number}" for number in range(1_100))
    for start in range(0, len(names), 100):
        await store.commit([Cas(name, 0, b"") for name in names[start : start + 100]])
    assert [entry.key for entry in await range_all(store, "n/")] == names
    await store.close()


@each_store
async def test_a_lease_keeps_the_second_conductor_out_until_it_ends(
    make: Maker, tmp_path: Path
) -> None:
    store = make(tmp_path)
    first = await take_leadership(store, owner="c1", now_ms=0)
    assert first == Term(1, (Reign(1, 0),))
    assert await take_leadership(store, owner="c2", now_ms=LEASE_MS - 1) is None
    assert await renew_lease(store, owner="c1", now_ms=LEASE_MS - 1)
    assert await take_leadership(store, owner="c2", now_ms=LEASE_MS) is None
    later = 3 * LEASE_MS
    second = await take_leadership(store, owner="c2", now_ms=later)
    assert second == Term(later // 1000, (Reign(1, 0), Reign(later // 1000, 3)))
    assert not await renew_lease(store, owner="c1", now_ms=later)
    third = await take_leadership(store, owner="c2", now_ms=later)
    assert third is not None
    assert third.term == second.term + 1, "a term is never given twice"
    fourth = await raise_term(store, now_ms=0, since=9, above=1_000, is_anew=True)
    assert fourth == Term(1_001, (Reign(1_001, 9),))
    assert await store.get(keys.TERM) is not None
    await store.close()


async def test_a_second_process_is_kept_out_of_the_file(tmp_path: Path) -> None:
    first = sqlite(tmp_path)
    with pytest.raises(ClusterError) as caught:
        sqlite(tmp_path)
    assert caught.value.code is Code.UNAVAILABLE
    assert "another conductor" in caught.value.message
    await first.close()
    again = sqlite(tmp_path)
    assert again.lineage == LINEAGE
    await again.begin_lineage("cd" * 16)
    assert again.lineage == "cd" * 16
    await again.close()
    last = sqlite(tmp_path)
    assert last.lineage == "cd" * 16, "it was written down"
    await last.close()


@pytest.mark.parametrize("damage", ["future format", "not a database"])
async def test_a_file_that_is_not_ours_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "meta.sqlite"
    if damage == "not a database":
        path.write_bytes(b"x" * 4096)
    else:
        await sqlite(tmp_path).close()
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE fact SET value = '9' WHERE name = 'format'")
        connection.close()
    before = sorted(entry.name for entry in Path("/proc/self/fd").iterdir())
    with pytest.raises(ClusterError) as caught:
        sqlite(tmp_path)
    assert str(path) in caught.value.message
    # The lock was given back: the next try fails for the same reason, not for the lock.
    with pytest.raises(ClusterError, match=r"format|database"):
        sqlite(tmp_path)
    assert sorted(entry.name for entry in Path("/proc/self/fd").iterdir()) == before


async def test_an_acknowledged_commit_is_in_the_file_with_full_synchronisation(
    tmp_path: Path,
) -> None:
    store = SqliteMetastore.open(tmp_path / "m", new_lineage=LINEAGE)
    await store.commit([Cas("a", 0, b"1")])
    pragmas = {
        name: store._connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous")
    }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}
    assert (tmp_path / "m.lock").stat().st_mode & 0o077 == 0
    await store.close()


async def test_a_full_disk_is_named_and_nothing_of_the_commit_stays(tmp_path: Path) -> None:
    """SQLite may have ended the transaction by itself when it found no room."""
    store = SqliteMetastore.open(tmp_path / "m", new_lineage=LINEAGE)
    await store.commit([Cas("a", 0, b"1")])
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(ClusterError, match="disk is full") as caught:
        await store.commit([Cas("b", 0, b"2"), Cas("c", 0, bytes(VALUE_BYTES_MAX))])
    assert "free space" in caught.value.next_step
    assert await store.get("b") is None
    store._connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
    (again,) = await store.commit([Cas("b", 0, b"2")])
    assert again.is_applied
    await store.close()
