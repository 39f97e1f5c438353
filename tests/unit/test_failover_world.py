"""The conductor among stores that end, freeze, restart and come back, in any order.

Whatever has happened, every stored configuration follows from the last one by a legal transition,
an opening after a loss (T6) never passes over an ISR member that is there, the plan comes to rest
after every piece of news, and in the end every shard is whole again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.support.world import GIB, World, run

from pureflash.conductor import health, planner, states
from pureflash.conductor.view import View
from pureflash.metastore.interface import Cas, CasResult
from pureflash.metastore.memory import MemoryMetastore
from pureflash.metastore.records import Write
from pureflash.model.conf import Cancel
from pureflash.model.domain import HealthState, ShardConf
from pureflash.model.messages import SetPeers, decode_down
from pureflash.testing.model.conf import step_name

BEAT_MS = 1_000
HEAL_MS = 60_000
"""A gather (10 s) and twice the longest pause of a learner that was given up (30 s) fit into it."""
STORES = 4


class JudgingMetastore(MemoryMetastore):
    """Judges every configuration at the moment it is stored, with what the conductor knows."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self.steps: Counter[str] = Counter()

    async def commit(self, batch: Sequence[Cas]) -> list[CasResult]:
        for cas in batch:
            before = await self.get(cas.key)
            if cas.key.startswith("shard/") and before is not None and cas.value is not None:
                assert self.world is not None
                old = msgspec.json.decode(before.value, type=ShardConf)
                new = msgspec.json.decode(cas.value, type=ShardConf)
                self._judge(self.world.conductor.view(), old, new)
        return await super().commit(batch)

    def _judge(self, view: View, old: ShardConf, new: ShardConf) -> None:
        name = step_name(old, new)
        assert name is not None, f"{old} cannot become {new}"
        self.steps[name] += 1
        lives = {number: store.incarnation for number, store in view.stores.items()}
        there = [
            copy
            for copy in old.isr
            if view.is_online(old.member(copy).store)
            and lives[old.member(copy).store] == old.member(copy).incarnation
        ]
        if name == "T6":
            assert not there, "somebody of the ISR is there in its registered life"
        for copy in set(new.isr) - set(old.isr):
            joined = new.member(copy)
            assert lives[joined.store] == joined.incarnation, "nobody unregistered joins an ISR"


class FailoverMachine(RuleBasedStateMachine):
    """Faults at random; time passes only by `wait`."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.metastore = JudgingMetastore()
        self.world = World(stores=STORES, metastore=self.metastore, balance_after_ms=3_000)
        self.metastore.world = self.world

    def go(self, awaitable: Any) -> Any:
        return self.runner.run(awaitable)

    @initialize()
    def start(self) -> None:
        self.go(self._start())

    async def _start(self) -> None:
        world = self.world
        conductor = await world.start_conductor()
        await world.join_all()
        for replicas in (1, 2, 3):
            await conductor.create_volume(
                name=f"v{replicas}", size_bytes=2 * GIB, replicas=replicas, shard_size_bytes=GIB
            )
        await world.pump()
        world.check_rest()

    @rule(number=st.integers(1, STORES), is_seen=st.booleans())
    def end(self, number: int, is_seen: bool) -> None:
        """End a process; its supervisor sees it, or the whole machine is gone."""
        store = self.world.stores[number]
        session, store.session, store.is_frozen = store.session, None, False
        if session is not None and is_seen:
            life = store.incarnation
            self.go(self.world.conductor.store_exited(number, incarnation=life))
        elif session is not None:
            self.world.conductor.disconnect(session)

    @rule(number=st.integers(1, STORES))
    def freeze(self, number: int) -> None:
        self.world.stores[number].is_frozen = self.world.stores[number].session is not None

    @rule(number=st.integers(1, STORES))
    def come_back(self, number: int) -> None:
        self.go(self._come_back(number))

    async def _come_back(self, number: int) -> None:
        """Thaw a frozen process, in its life; start one that ended, in a new one."""
        store = self.world.stores[number]
        was_frozen, store.is_frozen = store.is_frozen, False
        if was_frozen and store.session is not None and store.session.is_closed:
            await self.world.join(number)
        elif store.session is None:
            store.incarnation += 1
            await self.world.join(number)

    @rule(seconds=st.sampled_from([1, 3, 11, 31]))
    def wait(self, seconds: int) -> None:
        self.go(self._wait(seconds * 1_000))

    async def _wait(self, ms: int) -> None:
        for _ in range(0, ms, BEAT_MS):
            self.world.clock.ms += BEAT_MS
            for number, store in self.world.stores.items():
                if store.is_up and store.session is not None and not store.session.is_closed:
                    await self.world.beat(number)
            await self.world.pump()

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """Let primaries commit; how much of it each ISR member has heard of differs."""
        for store in self.world.stores.values():
            for conf in store.leads() if store.is_up else ():
                key = (conf.volume_id, conf.index)
                for copy in conf.isr:
                    heard = self.world.stores[conf.member(copy).store].complete
                    heard[key] = heard.get(key, 0) + data.draw(st.integers(0, 2))

    @rule()
    def give_learners_up(self) -> None:
        self.go(self._give_learners_up())

    async def _give_learners_up(self) -> None:
        for store in self.world.stores.values():
            for conf in store.leads() if store.is_up else ():
                for copy in conf.learners:
                    await self.world.propose(store, conf, Cancel(copy=copy))

    @rule()
    def restart_the_conductor(self) -> None:
        self.go(self._restart_the_conductor())

    async def _restart_the_conductor(self) -> None:
        running = [number for number, store in self.world.stores.items() if store.session]
        frozen = {number for number in running if self.world.stores[number].is_frozen}
        await self.world.start_conductor()
        for number in running:
            if number not in frozen:
                await self.world.join(number)
            else:  # it will find its connection closed
                self.world.stores[number].session = closed_session()

    @rule()
    def settle(self) -> None:
        self.go(self.world.pump())

    @invariant()
    def the_plan_comes_to_rest(self) -> None:
        if not hasattr(self.world, "conductor"):
            return
        self.go(self.world.pump())
        left = [a for a in planner.plan(self.world.conductor.view()) if isinstance(a, Write)]
        assert left == []
        errors = [line for line in self.world.log.lines if line[0] == "ERROR"]
        assert errors == []

    def teardown(self) -> None:
        if hasattr(self.world, "conductor"):
            self.go(self._heal())
        self.runner.close()

    async def _heal(self) -> None:
        for number in self.world.stores:
            await self._come_back(number)
        await self._wait(HEAL_MS)
        self.world.check_rest()
        view = self.world.conductor.view()
        for volume in view.volumes.values():
            assert states.judge_volume(view, volume).state is HealthState.HEALTHY
        assert health.findings(view) == []


TestFailover = pytest.mark.slow(FailoverMachine.TestCase)
TestFailover.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def closed_session() -> Any:
    """Give a session that a stopped conductor has left behind."""
    from pureflash.conductor.agents import Session

    session = Session()
    session.close()
    return session


async def _three_replicas(world: World) -> ShardConf:
    conductor = await world.start_conductor()
    await world.join_all()
    await conductor.create_volume(name="a", size_bytes=GIB, replicas=3, shard_size_bytes=None)
    await world.pump()
    world.check_rest()
    return conductor.view().shards[1, 0]


def test_an_exit_that_a_supervisor_saw_promotes_at_once() -> None:
    async def story() -> None:
        world = World()
        before = await _three_replicas(world)
        lost = before.member(before.primary).store
        at_ms = world.clock.ms
        await world.conductor.store_exited(lost, incarnation=1)
        await world.conductor.reconcile()
        after = world.conductor.view().shards[1, 0]
        assert world.clock.ms == at_ms, "nothing waits for a period or for silence"
        assert after.epoch == before.epoch + 1
        assert after.isr == tuple(copy for copy in before.isr if copy != before.primary)
        told = [decode_down(frame) for frame in _frames(world, lost % 3 + 1)]
        assert {type(message).__name__ for message in told} >= {"Dead", "SetConf"}

    run(story())


def test_every_registration_tells_all_stores_where_the_others_are() -> None:
    async def story() -> None:
        world = World()
        await world.start_conductor()
        await world.join_all()
        told = [decode_down(frame) for frame in _frames(world, 1)]
        peers = [message.peers for message in told if isinstance(message, SetPeers)]
        assert [len(found) for found in peers] == [1, 2, 3]
        world.stores[2].incarnation = 9
        await world.join(2)
        last = [decode_down(frame) for frame in _frames(world, 1)][-1]
        assert isinstance(last, SetPeers)
        assert {peer.store: peer.incarnation for peer in last.peers} == {1: 1, 2: 9, 3: 1}

    run(story())


def _frames(world: World, number: int) -> list[str]:
    session = world.stores[number].session
    assert session is not None
    found: list[str] = []
    while not session.outbox.empty():
        frame = session.outbox.get_nowait()
        found += [frame] if frame is not None else []
    return found


def test_all_transitions_of_a_life_are_seen_in_a_rolling_restart() -> None:
    async def story() -> None:
        metastore = JudgingMetastore()
        world = World(metastore=metastore)
        metastore.world = world
        await _three_replicas(world)
        for number in (1, 2, 3):
            await world.conductor.store_exited(number, incarnation=world.stores[number].incarnation)
            world.stores[number].session = None
            await world.pump()
            view = world.conductor.view()
            assert states.volume_state(view, view.volumes[1])[0] is HealthState.DEGRADED
            world.stores[number].incarnation += 1
            await world.join(number)
            await world.pump()
            world.check_rest()
        assert set(metastore.steps) == {"T1", "T2", "T3", "T4"}

    run(story())


def test_primaries_are_spread_again_one_at_a_time_once_all_is_calm() -> None:
    async def story() -> None:
        metastore = JudgingMetastore()
        world = World(metastore=metastore, balance_after_ms=30_000)
        metastore.world = world
        conductor = await world.start_conductor()
        await world.join_all()
        await conductor.create_volume(
            name="a", size_bytes=6 * GIB, replicas=3, shard_size_bytes=GIB
        )
        await world.pump()
        for number in (1, 2):  # store 3 leads all that they led
            await conductor.store_exited(number, incarnation=1)
            world.stores[number].session = None
            await world.pump()
            world.stores[number].incarnation += 1
            await world.join(number)
            await world.pump()
        assert [len(store.leads()) for store in world.stores.values()] != [2, 2, 2]
        before = metastore.steps["T5"]
        await _beats(world, 29)
        assert metastore.steps["T5"] == before, "it may not be over yet"
        for seconds in range(31):
            last = metastore.steps["T5"]
            await _beats(world, 1)
            assert metastore.steps["T5"] <= last + 1, f"one at a time, {seconds}"
        assert [len(store.leads()) for store in world.stores.values()] == [2, 2, 2]
        steps = metastore.steps["T5"]
        await _beats(world, 60)
        assert metastore.steps["T5"] == steps, "then they stay"
        world.check_rest()

    run(story())


async def _beats(world: World, seconds: int) -> None:
    for _ in range(seconds):
        world.clock.ms += BEAT_MS
        for number in world.stores:
            await world.beat(number)
        await world.pump()
