"""The conductor against a simulated world: a dict model, and a crash after every single write."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.support.world import GIB, World, attempt, run

from pureflash.conductor import health, planner, states
from pureflash.errors import Code, PureFlashError
from pureflash.metastore.records import Write
from pureflash.model.domain import HealthState, StoreState
from pureflash.model.messages import SILENT_MS, CreateReplica
from pureflash.model.ticket import verify_ticket

NAMES = ["v1", "v2", "v3"]


class ConductorMachine(RuleBasedStateMachine):
    """Users, failures and restarts at random; the model is a dict of sizes by name."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.world = World(stores=3)
        self.model: dict[str, int] = {}
        self.copies: dict[str, int] = {}
        self.exported: set[str] = set()

    def go(self, awaitable: Any) -> Any:
        return self.runner.run(awaitable)

    @initialize()
    def start(self) -> None:
        self.go(self._restart())

    async def _restart(self) -> None:
        await self.world.start_conductor()
        await self.world.join_all()
        await self.world.join_gateway()
        await self.world.pump()

    @rule(
        name=st.sampled_from(NAMES),
        gib=st.integers(1, 8),
        shard=st.sampled_from([1, 2, 16]),
        replicas=st.integers(1, 3),
    )
    def create(self, name: str, gib: int, shard: int, replicas: int) -> None:
        error = self.go(
            attempt(
                self.world.conductor.create_volume(
                    name=name,
                    size_bytes=gib * GIB,
                    replicas=replicas,
                    shard_size_bytes=shard * GIB,
                )
            )
        )
        promised = sum(size * self.copies[name] for name, size in self.model.items())
        if name in self.model:
            assert error is not None
            assert error.code is Code.ALREADY_EXISTS
        elif promised + replicas * gib * GIB > 3 * 10 * GIB * 95 // 100:
            assert error is not None
            assert error.code is Code.NO_SPACE
        elif error is None:
            self.model[name] = gib * GIB
            self.copies[name] = replicas
        else:
            assert error.code is Code.NO_SPACE  # not enough disks have room for a shard

    @rule(name=st.sampled_from(NAMES), gib=st.integers(1, 9))
    def resize(self, name: str, gib: int) -> None:
        error = self.go(
            attempt(self.world.conductor.resize_volume(name, size_bytes=gib * GIB, if_version=None))
        )
        if name not in self.model:
            assert error is not None
            assert error.code is Code.NOT_FOUND
        elif gib * GIB < self.model[name]:
            assert error is not None
            assert error.code is Code.INVALID
        elif error is None:
            self.model[name] = gib * GIB
        else:
            assert error.code is Code.NO_SPACE

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        error = self.go(attempt(self.world.conductor.delete_volume(name, if_version=None)))
        if name not in self.model:
            assert error is not None
            assert error.code is Code.NOT_FOUND
        elif name in self.exported:
            assert error is not None
            assert error.code is Code.IN_USE
        else:
            assert error is None
            del self.model[name]
        self.go(self.world.pump())

    @rule(name=st.sampled_from(NAMES))
    def export(self, name: str) -> None:
        error = self.go(
            attempt(
                self.world.conductor.create_export(
                    kind="nbd", volume=name, transport="unix", is_read_only=False, gateway=None
                )
            )
        )
        assert (error is None) == (name in self.model)
        if error is None:
            self.exported.add(name)

    @rule(name=st.sampled_from(NAMES))
    def unexport(self, name: str) -> None:
        view = self.world.conductor.view()
        volume = view.find_volume(name)
        for export in view.exports_of(volume.id) if volume else []:
            self.go(self.world.conductor.delete_export(export.id))
            self.exported.discard(name)

    @rule()
    def restart_the_conductor(self) -> None:
        self.go(self._restart())

    @rule(number=st.integers(1, 3))
    def restart_a_store(self, number: int) -> None:
        store = self.world.stores[number]
        old = store.incarnation
        self.go(self.world.conductor.store_exited(number, incarnation=old))
        assert not self.world.conductor.view().is_online(number)
        store.incarnation += 1
        self.go(self.world.join(number))

    @rule()
    def settle(self) -> None:
        self.go(self.world.pump())

    @invariant()
    def names_and_sizes_are_those_of_the_model(self) -> None:
        if not hasattr(self.world, "conductor"):
            return
        self.go(self.world.pump())
        self.world.check_rest()
        view = self.world.conductor.view()
        assert {v.name: v.size_bytes for v in view.volumes.values()} == self.model
        assert sorted(self.world.offered) == sorted(self.exported)
        for volume in view.volumes.values():
            assert states.volume_state(view, volume) == (HealthState.HEALTHY, "")
        assert health.findings(view) == []

    def teardown(self) -> None:
        self.runner.close()


TestConductor = pytest.mark.slow(ConductorMachine.TestCase)
TestConductor.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


async def _from_the_start(world: World, replicas: int) -> None:
    await world.start_conductor()
    await world.join_all()
    await world.join_gateway()
    await _story(world, replicas)


async def _story(world: World, replicas: int) -> None:
    """Everything that writes: two volumes, a restart, growth, an export, a deletion."""
    conductor = world.conductor

    async def once(request: Any) -> None:
        error = await attempt(request)
        # A request that is repeated after a crash may find its work done.
        done = (None, Code.ALREADY_EXISTS, Code.NOT_FOUND)
        if error is not None and error.code not in done:
            raise error
        await world.pump()

    await once(
        conductor.create_volume(
            name="a", size_bytes=2 * GIB, replicas=replicas, shard_size_bytes=GIB
        )
    )
    await once(
        conductor.create_volume(name="b", size_bytes=GIB, replicas=replicas, shard_size_bytes=GIB)
    )
    world.stores[1].incarnation += 1
    await world.join(1)
    await world.pump()
    await once(conductor.resize_volume("a", size_bytes=3 * GIB + 4096, if_version=None))
    await once(
        conductor.create_export(
            kind="nbd", volume="a", transport="unix", is_read_only=False, gateway=None
        )
    )
    await once(conductor.delete_volume("b", if_version=None))


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_conductor_that_stops_after_any_write_converges_after_its_restart(replicas: int) -> None:
    async def story() -> int:
        world = World()
        await world.start_conductor()
        await world.join_all()
        await world.join_gateway()
        await _story(world, replicas)
        world.check_rest()
        assert {volume.name for volume in world.conductor.view().volumes.values()} == {"a"}
        return await world.metastore.revision()

    writes = asyncio.run(story())
    assert writes > 20

    async def crash_after(count: int) -> bool:
        world = World()
        world.metastore.stop_after = count
        crash = await attempt(_from_the_start(world, replicas))
        assert crash is None or crash.code is Code.UNAVAILABLE
        world.metastore.stop_after = None
        await world.start_conductor()
        await world.join_all()
        await world.join_gateway()
        await world.pump()
        world.check_rest()
        await _story(world, replicas)
        world.check_rest()
        view = world.conductor.view()
        assert {volume.name: volume.size_bytes for volume in view.volumes.values()} == {
            "a": 3 * GIB + 4096
        }
        assert world.offered == ("a",)
        assert not [a for a in planner.plan(view) if not isinstance(a, planner.Offer)]
        return crash is not None

    crashes = [asyncio.run(crash_after(count)) for count in range(writes)]
    assert sum(crashes) > writes - 10  # the last few are lost in a background pass


def test_a_configuration_is_stored_before_a_store_is_told() -> None:
    async def story() -> None:
        world = World(stores=1)
        await world.start_conductor()
        await world.join(1)
        await world.conductor.create_volume(
            name="a", size_bytes=2 * GIB, replicas=1, shard_size_bytes=GIB
        )
        view = world.conductor.view()
        first = planner.plan(view)
        assert {type(action) for action in first} == {Write}
        await world.pump()
        told = [command for command in world.stores[1].told if isinstance(command, CreateReplica)]
        assert sorted(command.index for command in told) == [0, 1]
        stored = {conf.index: conf for conf in view.shards.values()}
        assert {command.index: command.conf for command in told} == stored

    run(story())


def test_a_shard_of_a_store_that_is_away_is_not_forgotten_by_a_deletion() -> None:
    async def story() -> None:
        world = World(stores=1)
        await world.start_conductor()
        await world.join(1)
        conductor = world.conductor
        await conductor.create_volume(name="a", size_bytes=GIB, replicas=1, shard_size_bytes=None)
        await world.pump()
        await conductor.store_exited(1, incarnation=1)
        await world.pump()
        job = await conductor.delete_volume("a", if_version=None)
        await world.pump()
        assert world.held() == {(1, 0)}
        view = conductor.view()
        assert (1, 0) in view.shards
        assert view.jobs[job.id].reason == "waiting for s1"
        assert not view.names  # the name is free at once
        world.stores[1].incarnation = 2
        await world.join(1)
        await world.pump()
        assert world.held() == set()
        assert conductor.view().jobs[job.id].state == "succeeded"
        assert not conductor.view().volumes

    run(story())


def test_a_silent_store_is_suspected_then_gone_and_comes_back_by_registering() -> None:
    async def story() -> None:
        world = World(stores=1)
        conductor = await world.start_conductor()
        await world.join(1)
        await conductor.create_volume(name="a", size_bytes=GIB, replicas=1, shard_size_bytes=None)
        await world.pump()
        world.clock.ms += SILENT_MS - 1
        await world.pump()
        assert conductor.view().is_online(1)
        world.clock.ms += 1
        await world.pump()
        view = conductor.view()
        assert view.observation(1).state is StoreState.SUSPECTED
        assert states.volume_state(view, view.volumes[1])[0] is HealthState.PARKED
        assert [finding.code for finding in health.findings(view)] == [
            "STORE_SUSPECTED",
            "VOLUME_PARKED",
        ]
        await world.beat(1)
        assert conductor.view().is_online(1)
        world.clock.ms += 2 * SILENT_MS
        await world.pump()
        await world.pump()
        view = conductor.view()
        assert view.observation(1).state is StoreState.OFFLINE
        assert planner.routes(view, view.volumes[1])[0].address == ""
        assert world.stores[1].session is None, "its connection was closed, so it registers anew"
        await world.join(1)
        await world.pump()
        world.check_rest()
        assert health.findings(conductor.view()) == []

    run(story())


def test_a_refused_command_is_shown_and_tried_again_after_a_pause() -> None:
    async def story() -> None:
        world = World(stores=1)
        conductor = await world.start_conductor()
        await world.join(1)
        world.stores[1].refusal = (int(Code.NO_SPACE), "the disk is full")
        await conductor.create_volume(name="a", size_bytes=GIB, replicas=1, shard_size_bytes=None)
        await world.pump()
        assert len(world.stores[1].told) == 1, "not again at once"
        view = conductor.view()
        state, reason = states.volume_state(view, view.volumes[1])
        assert state is HealthState.PARKED
        assert "the disk is full" in reason
        world.stores[1].refusal = None
        world.clock.ms += 1_000
        await world.beat(1)
        await world.pump()
        world.check_rest()

    run(story())


def test_a_metastore_that_fails_is_logged_once_and_the_conductor_goes_on_after_it() -> None:
    async def story() -> None:
        world = World(stores=1)
        await world.start_conductor()
        await world.join(1)
        world.metastore.stop_after = 0
        for _ in range(5):
            world.clock.ms += 4_000  # the lease is to be renewed each time
            await world.conductor.reconcile()
        assert [event for _, event, _ in world.log.lines].count("metastore.failed") == 1
        world.metastore.stop_after = None
        await world.join(1)
        await world.conductor.create_volume(
            name="a", size_bytes=GIB, replicas=1, shard_size_bytes=None
        )
        await world.pump()
        world.check_rest()

    run(story())


def test_an_older_incarnation_of_a_store_may_not_register() -> None:
    async def story() -> None:
        world = World(stores=1)
        await world.start_conductor()
        world.stores[1].incarnation = 5
        await world.join(1)
        world.stores[1].incarnation = 4
        error = await attempt(world.join(1))
        assert error is not None
        assert error.code is Code.UNAVAILABLE
        assert world.conductor.view().stores[1].incarnation == 5
        await world.conductor.store_exited(1, incarnation=4)
        assert world.conductor.view().is_online(1), "the exit of an older life is no news"

    run(story())


def test_a_life_that_was_reported_to_have_ended_may_not_register_again() -> None:
    async def story() -> None:
        world = World(stores=2)
        await world.start_conductor()
        world.stores[1].incarnation = 5
        await world.join_all()
        await world.conductor.store_exited(1, incarnation=5)
        error = await attempt(world.join(1))
        assert error is not None
        assert error.code is Code.UNAVAILABLE
        assert "incarnation 5 of s1 was reported to have ended" in error.message
        assert "start the store again" in (error.next_step or "")
        assert not world.conductor.view().is_online(1)

        # Another conductor knows it from the metastore: the others were told for good.
        await world.start_conductor()
        assert await attempt(world.join(1)) is not None
        world.stores[1].incarnation = 6
        await world.join_all()
        assert world.conductor.view().is_online(1)
        assert world.conductor.view().stores[1].exited == 5
        await world.conductor.store_exited(1, incarnation=5)
        assert world.conductor.view().is_online(1), "said twice is no news of the next life"

    run(story())


def test_the_end_of_a_life_that_has_not_registered_yet_keeps_it_out() -> None:
    async def story() -> None:
        world = World(stores=1)
        await world.start_conductor()
        await world.join(1)
        await world.conductor.store_exited(1, incarnation=2)
        assert world.conductor.view().is_online(1), "the registered life is another one"
        world.stores[1].incarnation = 2
        assert await attempt(world.join(1)) is not None, "its message was on its way when it died"
        world.stores[1].incarnation = 3
        await world.join(1)
        assert world.conductor.view().is_online(1)

    run(story())


def test_an_attach_gives_routes_and_a_ticket_of_the_volume() -> None:
    async def story() -> None:
        world = World(stores=2)
        conductor = await world.start_conductor()
        await world.join_all()
        await world.join_gateway()
        await conductor.create_volume(
            name="a", size_bytes=2 * GIB, replicas=1, shard_size_bytes=GIB
        )
        await world.pump()
        spec = await conductor.attaching.attach("a", is_read_only=False)
        assert {route.address for route in spec.shards} == {"127.0.0.1:7162", "127.0.0.1:7163"}
        now = world.clock.wall_ms() // 1000
        ticket = verify_ticket(bytes(32), bytes.fromhex(spec.ticket), now=now)
        assert (ticket.volume_id, ticket.attach_epoch, ticket.rights) == (1, 2, 3)
        await world.pump()
        confs = conductor.view().shards.values()
        assert {conf.attach_epoch for conf in confs} == {2}, "who was attached before is fenced"
        await conductor.create_export(
            kind="nbd", volume="a", transport="unix", is_read_only=False, gateway=None
        )
        with pytest.raises(PureFlashError) as caught:
            await conductor.attaching.attach("a", is_read_only=False)
        assert caught.value.code is Code.IN_USE
        spec = await conductor.attaching.attach("a", is_read_only=True)
        assert (spec.volume_id, spec.attach_epoch) == (1, 3), "a reader takes nothing over"

    run(story())


def test_an_export_is_gone_when_its_gateway_has_said_so_and_not_while_it_says_nothing() -> None:
    async def story() -> None:
        world = World(stores=1)
        world.settle_timeout_s = 60
        conductor = await world.start_conductor()
        await world.join_all()
        await world.join_gateway()
        made = conductor.create_volume(name="a", size_bytes=GIB, replicas=1, shard_size_bytes=None)
        await world.meanwhile(made)
        offered = conductor.create_export(
            kind="nbd", volume="a", transport="unix", is_read_only=False, gateway=None
        )
        number, _ = await world.meanwhile(offered)
        await world.join_gateway()  # it connects anew, and is offered the export once more
        await conductor.reconcile()
        deletion = asyncio.create_task(conductor.delete_export(number))
        for _ in range(10):
            await asyncio.sleep(0)
            await conductor.reconcile()
        assert not deletion.done(), "the gateway has an offer of it, and answered nothing yet"
        await world.pump()
        await deletion
        assert world.offered == ()

    run(story())


def test_another_cluster_and_a_second_conductor_are_refused() -> None:
    async def story() -> None:
        world = World(stores=1)
        first = await world.start_conductor()
        error = await attempt(first.__class__.start(_other_owner(world)))
        assert error is not None
        assert error.code is Code.UNAVAILABLE

    run(story())


def _other_owner(world: World) -> Any:
    from dataclasses import replace

    conductor = world.conductor
    conductor._identity = replace(conductor._identity, owner="c2")
    return conductor
