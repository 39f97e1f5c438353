"""How the conductor writes: records to the metastore, and what became of it to whoever follows.

Theory of operation. Whoever writes holds the conductor's lock, so that a record which is not
applied was changed by another conductor. What was applied is told three times, in the words of the
write's reason: to the events that users read, to the log, and to the observations of the shard,
because some of them belong to the configuration that was just replaced.
"""

from __future__ import annotations

from dataclasses import replace

from pureflash.conductor import states
from pureflash.conductor.events import EventLog
from pureflash.conductor.observations import Observations
from pureflash.conductor.specs import Clock
from pureflash.conductor.standing import lost_memory
from pureflash.errors import ClusterError, Code
from pureflash.metastore import keys
from pureflash.metastore.records import Records, Write
from pureflash.model.domain import ShardConf
from pureflash.process.logs import Log


class Writer:
    """See the module's head."""

    def __init__(
        self,
        records: Records,
        observations: Observations,
        events: EventLog,
        *,
        clock: Clock,
        log: Log,
    ) -> None:
        """Write to `records`; the rest is told."""
        self._records = records
        self._observations = observations
        self._events = events
        self._clock = clock
        self._log = log

    async def take_id(self) -> None:
        """Use up the next id: written before the record that has it, so no id is given twice."""
        cluster = self._records.cluster
        assert cluster is not None, "start() was called"
        after = replace(cluster, next_id=cluster.next_id + 1)
        await self.write_all([Write(keys.CLUSTER, after, "an id was used")])

    async def write_all(self, writes: list[Write], *, is_recovery: bool = False) -> None:
        """Write records that must all be applied; the lock makes anything else another writer."""
        if not all(await self.write(writes, is_recovery=is_recovery)):
            raise ClusterError(
                Code.UNAVAILABLE,
                "another conductor changed the metastore",
                next_step="try again; if it persists look for a second conductor",
            )

    async def write(self, writes: list[Write], *, is_recovery: bool = False) -> list[bool]:
        """Write records as far as nobody else has; says which.

        Errors: ClusterError UNAVAILABLE while the records are known to be old, but for what
        recovers them.
        """
        if self._records.amnesia is not None and not is_recovery:
            raise lost_memory(self._records.amnesia)
        before = {write.key: self._subject(write) for write in writes}
        confs = dict(self._records.shards)
        applied = await self._records.commit(writes)
        for write, is_applied in zip(writes, applied, strict=True):
            conf = write.record
            if is_applied and isinstance(conf, ShardConf) and (conf.volume_id, conf.index) in confs:
                older = confs[conf.volume_id, conf.index]
                self._observations.configured(older, conf, now_ms=self._clock.now_ms())
            if is_applied and conf is None:
                self._observations.forget(confs.keys() - self._records.shards.keys())
            if is_applied and write.key != keys.CLUSTER:
                verb = "deleted" if write.record is None else "changed"
                kind = f"{write.key.partition('/')[0]}.{verb}"
                subject = before[write.key]
                self._events.add(self._clock.wall_ms(), kind, subject, write.reason)
                self._log.info(kind, f"{subject}: {write.reason}", key=write.key)
        return applied

    def _subject(self, write: Write) -> str:
        if write.record is None and write.key.startswith("volume/"):
            volume = self._records.volumes.get(int(write.key.partition("/")[2]))
            return volume.name if volume else write.key
        return states.subject_of(write.key, write.record)
