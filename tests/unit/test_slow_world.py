"""A slow disk among three, from heartbeats to configurations: the conductor as a whole."""

from __future__ import annotations

from tests.support.world import GIB, World, run

from pureflash.conductor import health, states
from pureflash.conductor.slow import DEMOTE_MS, DEMOTE_PAUSE_MS, EVEN_MS, SLOW_MS
from pureflash.model.domain import HealthState, ShardConf
from pureflash.model.messages import DiskLatency

BEAT_MS = 2_000
"""Rarer than in life, for the time of this test; a store is suspected after 2,250."""
QUICK = DiskLatency(write_ewma_us=2_000, write_p99_us=6_000, writes=500)
LATE = DiskLatency(write_ewma_us=150_000, write_p99_us=300_000, writes=30)
BALANCE_MS = 30_000


class Cluster(World):
    """Three stores whose disks are measured, and a volume of six shards."""

    def __init__(self) -> None:
        super().__init__(slow_disk_us=20_000, balance_after_ms=BALANCE_MS)
        for store in self.stores.values():
            store.latency = QUICK

    async def begin(self) -> None:
        """Start everything; every store leads two shards."""
        conductor = await self.start_conductor()
        await self.join_all()
        await conductor.create_volume(
            name="v1", size_bytes=6 * GIB, replicas=3, shard_size_bytes=GIB
        )
        await self.pump()
        await self.wait(10 * BALANCE_MS)
        assert self.leads() == {1: 2, 2: 2, 3: 2}
        self.check_rest()

    async def wait(self, ms: int) -> None:
        for _ in range(0, ms, BEAT_MS):
            self.clock.ms += BEAT_MS
            for number in self.stores:
                await self.beat(number)
            await self.pump()

    def confs(self) -> list[ShardConf]:
        return list(self.conductor.view().shards.values())

    def leads(self) -> dict[int, int]:
        """Count the shards that each store leads."""
        primaries = [conf.member(conf.primary).store for conf in self.confs()]
        return {number: primaries.count(number) for number in self.stores}

    def in_sync(self) -> dict[int, int]:
        """Count the in-sync copies that each store has."""
        found = [conf.member(copy).store for conf in self.confs() for copy in conf.isr]
        return {number: found.count(number) for number in self.stores}

    def codes(self) -> set[str]:
        return {found.code for found in health.findings(self.conductor.view())}

    def warned(self) -> list[str]:
        return [event for level, event, _ in self.log.lines if level == "WARNING"]


def test_a_slow_disk_loses_its_primaries_then_its_copies_and_gets_both_back() -> None:
    async def story() -> None:
        world = Cluster()
        await world.begin()
        world.stores[2].latency = LATE
        await world.wait(SLOW_MS)
        assert world.leads()[2] == 2
        await world.wait(BEAT_MS)
        assert world.leads() == {1: 3, 2: 0, 3: 3}
        assert world.codes() == {"DISK_SLOW"}
        assert world.warned() == ["disk.slow"]

        await world.wait(DEMOTE_MS - 2 * BEAT_MS)
        assert world.in_sync() == {1: 6, 2: 6, 3: 6}
        await world.wait(2 * BEAT_MS)
        assert world.in_sync() == {1: 6, 2: 0, 3: 6}
        assert world.warned() == ["disk.slow", "disk.demoted"]
        assert world.codes() == {"DISK_SLOW", "REPLICAS_OUT", "VOLUME_DEGRADED"}
        view = world.conductor.view()
        (volume,) = view.volumes.values()
        assert states.volume_state(view, volume)[0] is HealthState.DEGRADED
        await world.wait(DEMOTE_PAUSE_MS)
        assert world.in_sync() == {1: 6, 2: 0, 3: 6}, "it is slow, so it stays out"
        assert world.leads() == {1: 3, 2: 0, 3: 3}

        world.stores[2].latency = QUICK  # another cluster's load was on it, say
        await world.wait(EVEN_MS + BEAT_MS)
        assert world.in_sync() == {1: 6, 2: 6, 3: 6}
        await world.wait(2 * BALANCE_MS)
        assert world.leads() == {1: 2, 2: 2, 3: 2}, "and leads its share again"
        assert world.codes() == set()
        world.check_rest()

    run(story())


def test_a_new_conductor_finds_a_slow_disk_again_and_takes_its_time_to_demote_it() -> None:
    async def story() -> None:
        world = Cluster()
        await world.begin()
        world.stores[2].latency = LATE
        await world.wait(SLOW_MS + DEMOTE_MS + BEAT_MS)
        assert world.in_sync()[2] == 0
        await world.start_conductor()
        await world.join_all()
        await world.wait(BEAT_MS)
        assert world.in_sync()[2] == 6, "it knows nothing of that disk yet"
        await world.wait(DEMOTE_PAUSE_MS - 2 * BEAT_MS)
        assert world.in_sync()[2] == 6
        assert world.leads()[2] == 0
        await world.wait(BEAT_MS)
        assert world.in_sync()[2] == 0

    run(story())


def test_a_store_that_ends_while_another_is_demoted_leaves_two_copies_where_it_can() -> None:
    async def story() -> None:
        world = Cluster()
        await world.begin()
        world.stores[2].latency = LATE
        await world.wait(SLOW_MS + DEMOTE_MS + BEAT_MS)
        lost = world.stores[3]
        lost.session = None
        await world.conductor.store_exited(3, incarnation=lost.incarnation)
        for _ in range(5):
            world.clock.ms += BEAT_MS
            for number in (1, 2):
                await world.beat(number)
            await world.pump()
        assert world.in_sync() == {1: 6, 2: 6, 3: 0}, "a slow copy is better than a single one"
        assert world.leads() == {1: 6, 2: 0, 3: 0}

    run(story())
