"""All records of the metastore, typed and in memory, for the one conductor that leads.

Theory of operation. `load` reads everything once; from then on the leader is the only writer, so
the copy stays equal to the metastore. `commit` compares with the revision that the copy has; when
that fails somebody else wrote, the copy of that key is read again and the caller plans anew. When a
commit *fails* its outcome is unknown, and every key of the batch is read again before the next use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from pureflash.errors import ClusterError
from pureflash.metastore import keys
from pureflash.metastore.interface import BATCH_MAX, Cas, Metastore, range_all
from pureflash.model.domain import (
    Amnesia,
    Cluster,
    Differing,
    Export,
    Job,
    NameClaim,
    ShardConf,
    Store,
    Volume,
)

Record = Amnesia | Cluster | Differing | Export | Job | NameClaim | ShardConf | Store | Volume
_R = TypeVar("_R")
PREFIXES: Final = (
    *(keys.CLUSTER, keys.AMNESIA),
    *("store/", "volume/", "name/", "shard/", "export/", "job/", "differing/"),
)


@dataclass(frozen=True, slots=True)
class Write:
    """A record that should have this value (None: be absent), and why."""

    key: str
    record: Record | None
    reason: str


class Records:
    """The leader's copy of the metastore."""

    def __init__(self, metastore: Metastore) -> None:
        """Make an empty copy; `load` fills it."""
        self.metastore = metastore
        self.cluster: Cluster | None = None
        self.amnesia: Amnesia | None = None
        self.stores: dict[int, Store] = {}
        self.volumes: dict[int, Volume] = {}
        self.names: dict[str, NameClaim] = {}
        self.shards: dict[tuple[int, int], ShardConf] = {}
        self.exports: dict[int, Export] = {}
        self.jobs: dict[int, Job] = {}
        self.differing: dict[tuple[int, int], Differing] = {}
        self.revision = 0
        self._revisions: dict[str, int] = {}
        self._doubtful: set[str] = set()

    async def load(self) -> None:
        """Read every record."""
        for prefix in PREFIXES:
            for entry in await range_all(self.metastore, prefix):
                self._keep(entry.key, entry.value, entry.revision)
        self.revision = await self.metastore.revision()

    async def commit(self, writes: Sequence[Write]) -> list[bool]:
        """Try each write by itself; gives which were applied, in order.

        Errors: ClusterError as `Metastore.commit`; what was applied is found out later.
        """
        await self._settle_doubts()
        applied: list[bool] = []
        for start in range(0, len(writes), BATCH_MAX):
            applied += await self._commit_batch(writes[start : start + BATCH_MAX])
        return applied

    async def _commit_batch(self, writes: Sequence[Write]) -> list[bool]:
        batch = [
            Cas(
                write.key,
                self._revisions.get(write.key, 0),
                None if write.record is None else msgspec.json.encode(write.record),
            )
            for write in writes
        ]
        try:
            results = await self.metastore.commit(batch)
        except ClusterError:
            self._doubtful.update(cas.key for cas in batch)
            raise
        for cas, result in zip(batch, results, strict=True):
            if result.is_applied:
                self._keep(cas.key, cas.value, result.revision)
            else:
                self._doubtful.add(cas.key)
        await self._settle_doubts()
        self.revision = await self.metastore.revision()
        return [result.is_applied for result in results]

    async def _settle_doubts(self) -> None:
        for key in sorted(self._doubtful):
            entry = await self.metastore.get(key)
            self._keep(key, entry.value if entry else None, entry.revision if entry else 0)
            self._doubtful.discard(key)

    def _keep(self, key: str, value: bytes | None, revision: int) -> None:
        """Let the copy of one key follow the metastore."""
        if value is None:
            self._revisions.pop(key, None)
        else:
            self._revisions[key] = revision
        kind, _, rest = key.partition("/")
        match kind:
            case keys.CLUSTER:
                self.cluster = None if value is None else msgspec.json.decode(value, type=Cluster)
            case keys.AMNESIA:
                self.amnesia = None if value is None else msgspec.json.decode(value, type=Amnesia)
            case "name":
                _put(self.names, rest, value, NameClaim)
            case "shard":
                _put(self.shards, _shard_key(rest), value, ShardConf)
            case "differing":
                _put(self.differing, _shard_key(rest), value, Differing)
            case _:
                self._keep_numbered(kind, int(rest), value)

    def _keep_numbered(self, kind: str, number: int, value: bytes | None) -> None:
        """Let the copy of a record follow whose key is a kind and an id."""
        match kind:
            case "store":
                _put(self.stores, number, value, Store)
            case "volume":
                _put(self.volumes, number, value, Volume)
            case "export":
                _put(self.exports, number, value, Export)
            case "job":
                _put(self.jobs, number, value, Job)
            case _:
                raise AssertionError(f"no record lives under {kind}/{number}")


def _shard_key(text: str) -> tuple[int, int]:
    volume_id, _, index = text.partition("/")
    return int(volume_id), int(index)


_K = TypeVar("_K")


def _put(table: dict[_K, _R], key: _K, value: bytes | None, kind: type[_R]) -> None:
    if value is None:
        table.pop(key, None)
    else:
        table[key] = msgspec.json.decode(value, type=kind)
