"""What a metastore promises.

Theory of operation. Keys are text, values are bytes, and one counter, the *revision*, grows by
one with every change of one key. An entry carries the revision of its last change, which is what
a compare-and-swap compares; 0 stands for "absent". A batch is a set of *independent*
compare-and-swaps: each is answered by itself and some may apply where others do not. That is all
that etcd offers for batches of our size, and a planner that needs no more can be stopped between
any two of them.

An applied change is durable before it is answered. `lineage` names this history of revisions: a
database restored from a copy keeps it with a lower revision, a rebuilt one gets a new one; agents
remember both (docs/internals/replication.md, section 6).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

BATCH_MAX: Final = 128
"""etcd's limit for operations in one transaction; held by every implementation."""
VALUE_BYTES_MAX: Final = 64 * 1024
"""The largest record is a store with many disks; a value is never bulk data."""
KEY_CHARS_MAX: Final = 256
CHANGES_KEPT: Final = 10_000
"""Changes that a watch can look back on; older ones are compacted away."""


class CompactedError(Exception):
    """A watch asked for changes that are no longer kept; list again and watch from there."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its value and the revision of its last change."""

    key: str
    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Cas:
    """Set `key` to `value` (None: delete it) if its revision is `expected` (0: absent)."""

    key: str
    expected: int
    value: bytes | None


@dataclass(frozen=True, slots=True)
class CasResult:
    """`revision` is the key's revision afterwards, 0 when it is absent."""

    key: str
    is_applied: bool
    revision: int


@dataclass(frozen=True, slots=True)
class Change:
    """One applied change; `value` None: deleted."""

    revision: int
    key: str
    value: bytes | None


class Metastore(Protocol):
    """Linearizable: each call sees everything that was answered before it began.

    Errors of every call: ClusterError UNAVAILABLE when the metastore cannot be reached or written;
    of a `commit` that fails so, each change may or may not have been applied.
    """

    @property
    def lineage(self) -> str:
        """Name of this history of revisions, 32 hexadecimal digits."""

    async def begin_lineage(self, lineage: str) -> None:
        """Let this history go on under another name, durably; entries and revisions stay."""

    async def revision(self) -> int:
        """Give the newest revision; 0 before the first change."""

    async def get(self, key: str) -> Entry | None:
        """Give one entry, None when it is absent."""

    async def range(self, prefix: str, *, after: str = "", limit: int = 1_000) -> list[Entry]:
        """Give at most `limit` entries whose key starts with `prefix` and is greater than `after`.

        Shapes: sorted by key, as bytes.
        """

    async def commit(self, batch: Sequence[Cas]) -> list[CasResult]:
        """Try each of at most `BATCH_MAX` compare-and-swaps on distinct keys; answers in order."""

    def watch(self, prefix: str, *, after: int) -> AsyncIterator[list[Change]]:
        """Give every change of keys with `prefix` and a revision above `after`, in order, for ever.

        Errors: CompactedError when some of them are no longer kept.
        """

    async def close(self) -> None:
        """Release files and threads; running watches end."""


def check_batch(batch: Sequence[Cas]) -> None:
    """Crash on a batch that no implementation takes: it is our planner's bug."""
    assert len(batch) <= BATCH_MAX, f"a batch of {len(batch)}"
    assert len({cas.key for cas in batch}) == len(batch), "keys of a batch are distinct"
    for cas in batch:
        assert 0 < len(cas.key) <= KEY_CHARS_MAX, cas.key
        assert cas.value is None or len(cas.value) <= VALUE_BYTES_MAX, cas.key
        assert cas.value is not None or cas.expected != 0, "deleting what must be absent"


async def range_all(store: Metastore, prefix: str) -> list[Entry]:
    """Give every entry with `prefix`, page by page (not one snapshot; a lone writer needs none)."""
    entries: list[Entry] = []
    while True:
        page = await store.range(prefix, after=entries[-1].key if entries else "")
        entries += page
        if not page:
            return entries
