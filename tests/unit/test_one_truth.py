"""Every face tells one truth: whatever a story does to data, copies and stores.

Status, volume list, explain, health codes, metrics and events are read after every step, and held
to one another and to what the stores have reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from tests.support.world import GIB, RUNS_TOLD, SimStore, World, run

from pureflash.api.metrics import ViewCollector
from pureflash.cli.status import status_lines
from pureflash.conductor import health, states
from pureflash.conductor.explaining import explain
from pureflash.metastore.memory import MemoryMetastore
from pureflash.model.domain import HealthState
from pureflash.model.messages import Verified, VerifyReplica, decode_down
from pureflash.model.rest import CapacityView, ClusterView, HealthView

Key = tuple[int, int]
Runs = tuple[tuple[int, int], ...]
DATA: Final = frozenset({"DATA_DAMAGED", "DATA_LOST", "DATA_DIFFERS"})
MARKS: Final = {
    "DATA_DAMAGED": "cannot be read",
    "DATA_LOST": "without any good copy",
    "DATA_DIFFERS": "copies differ in",
}


@dataclass
class Told:
    """What has been reported and not ended, by code: the truth that all faces are held to."""

    damaged: dict[tuple[int, Key], Runs] = field(default_factory=dict)
    lost: dict[Key, int] = field(default_factory=dict)
    differing: set[Key] = field(default_factory=set)


def blocks_of(runs: Runs) -> set[int]:
    return {block for first, count in runs for block in range(first, first + count)}


async def begun() -> World:
    world = World(metastore=MemoryMetastore(lineage="ab" * 16))
    await world.start_conductor()
    await world.join_all()
    for replicas in (1, 3):
        await world.conductor.create_volume(
            name=f"r{replicas}", size_bytes=2 * GIB, replicas=replicas, shard_size_bytes=GIB
        )
    await world.pump()
    return world


async def settle(world: World) -> None:
    """Let every store that runs say how it is, and the conductor look."""
    for number, store in world.stores.items():
        if store.session is not None:
            await world.beat(number)
    await world.pump()


def shown(world: World) -> tuple[ClusterView, list[str]]:
    """Give the cluster as `GET /v1/cluster` does, and `pf status` of it."""
    view = world.conductor.view()
    found = health.findings(view)
    state, sentence = health.cluster_state(view, found)
    volumes = [states.volume_state(view, volume)[0] for volume in view.volumes.values()]
    capacity = CapacityView(
        raw_bytes=1,
        usable_bytes=1,
        used_bytes=0,
        promised_bytes=0,
        after_one_loss_bytes=0,
        overcommit_ratio=1.0,
    )
    cluster = ClusterView(
        cluster_id="ab" * 16,
        state=state,
        sentence=sentence,
        term=1,
        lineage="ab" * 16,
        revision=1,
        capacity=capacity,
        stores=[states.store_view(view, store) for store in view.stores.values()],
        gateways=[],
        volumes_by_state={one.value: volumes.count(one) for one in set(volumes)},
        exports=0,
        running_jobs=[],
        counters={},
        health=found,
    )
    return cluster, status_lines(cluster, "127.0.0.1:7180", [])


def metrics(world: World) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(ViewCollector(world.conductor))
    text = generate_latest(registry).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def events_told(world: World) -> set[tuple[str, str]]:
    """Give the findings about data that events have opened and not closed."""
    still: set[tuple[str, str]] = set()
    for event in world.conductor.events._events:
        if event.kind == "data.found":
            still.add((event.detail.partition(":")[0], event.subject))
        elif event.kind == "data.over":
            still.discard((event.detail, event.subject))
    return still


def check(world: World, told: Told) -> None:
    view = world.conductor.view()
    cluster, lines = shown(world)
    codes = {(one.code, one.subject): one for one in cluster.health}
    check_data(world, told, {pair: one for pair, one in codes.items() if pair[0] in DATA})
    by_name = {volume.name: volume for volume in view.volumes.values()}
    counted = metrics(world)
    for code in health.CODES:
        found = sum(one == code for one, _ in codes)
        assert counted["pureflash_health", frozenset({("code", code)})] == found
    for volume in by_name.values():
        verdict = states.judge_volume(view, volume)
        listed = states.volume_view(view, volume)
        told_lines = explain(view, volume)
        about = [
            pair for pair in codes if pair[1] == volume.name or pair[1].startswith(volume.name)
        ]
        is_well = verdict.state is HealthState.HEALTHY
        assert listed.state == verdict.state == told_lines[0].state
        assert is_well == (not about), (volume.name, verdict, about)
        assert is_well == all(shard.state == "healthy" for shard in listed.shards)
        assert is_well == (not listed.reason)
        if not is_well:
            assert any(line.state != "healthy" for line in told_lines)
    is_all_well = cluster.state == HealthState.HEALTHY
    assert is_all_well == (not codes)
    assert is_all_well == ("No known data errors" in lines)
    assert is_all_well == any("Everything is as it should be" in line for line in lines)
    if not is_all_well:
        assert any(one.code in line for line in lines for one in cluster.health)
    assert events_told(world) == {pair for pair in codes if pair[0] in DATA}


def check_data(world: World, told: Told, codes: dict[tuple[str, str], HealthView]) -> None:
    """Hold findings, explain and metrics about data to what was reported by who is online."""
    view = world.conductor.view()
    names = {volume.id: volume for volume in view.volumes.values()}
    expected: set[tuple[str, str]] = set()
    for (store, key), runs in told.damaged.items():
        leader = world.stores[view.shards[key].member(view.shards[key].primary).store]
        lost = blocks_of(leader.lost.get(key, ())) if view.is_online(leader.id) else set()
        if view.is_online(store) and blocks_of(runs) - lost:
            expected.add(("DATA_DAMAGED", f"{names[key[0]].name}/{key[1]}/s{store}"))
    for key, count in told.lost.items():
        conf = view.shards[key]
        if count and view.is_online(conf.member(conf.primary).store):
            expected.add(("DATA_LOST", f"{names[key[0]].name}/{key[1]}"))
    expected |= {("DATA_DIFFERS", f"{names[key[0]].name}/{key[1]}") for key in told.differing}
    assert set(codes) == expected
    counted = metrics(world)
    for (code, subject), one in codes.items():
        name, index, *copy = subject.split("/")
        volume = view.find_volume(name)
        assert volume is not None
        assert MARKS[code] in " ".join(line.reason for line in explain(view, volume))
        family = {
            "DATA_DAMAGED": "pureflash_damaged_blocks",
            "DATA_LOST": "pureflash_lost_blocks",
            "DATA_DIFFERS": "pureflash_differing_regions",
        }[code]
        labels = {("volume", name), ("shard", index), *(("store", it) for it in copy)}
        value = counted[family, frozenset(labels)]
        assert f"{value:.0f} " in one.cause
    families = {name for name, _ in counted if "blocks" in name or "regions" in name}
    assert bool(families) == bool(codes)


Step = tuple[str, int, int]


@dataclass(frozen=True)
class Scene:
    """Whom a step is about: a store, a shard, the store of its primary, and blocks of it."""

    world: World
    told: Told
    store: SimStore
    key: Key
    primary: SimStore
    runs: Runs


async def damage(scene: Scene) -> None:
    if scene.key in scene.store.sizes:
        scene.store.damaged[scene.key] = scene.runs
        scene.told.damaged[scene.store.id, scene.key] = scene.runs


async def mend(scene: Scene) -> None:
    await damage(replace(scene, runs=()))


async def lose(scene: Scene) -> None:
    """Let nobody have some blocks: a primary that says so could not read them itself."""
    for store in scene.world.stores.values():
        store.lost.pop(scene.key, None)
    scene.primary.lost[scene.key] = scene.runs
    await damage(replace(scene, store=scene.primary))


async def find(scene: Scene) -> None:
    await lose(replace(scene, runs=()))


async def end(scene: Scene) -> None:
    store = scene.store
    if store.session is not None:
        await scene.world.conductor.store_exited(store.id, incarnation=store.incarnation)
        store.session = None
        store.incarnation += 1


async def come_back(scene: Scene) -> None:
    if scene.store.session is None:
        scene.store.disk_state = "ok"
        await scene.world.join(scene.store.id)


async def fail_disk(scene: Scene) -> None:
    scene.store.disk_state = "failed"


async def restart(scene: Scene) -> None:
    await scene.world.start_conductor()
    for store in scene.world.stores.values():
        if store.session is not None:
            store.incarnation += 1
            await scene.world.join(store.id)


async def verify(scene: Scene) -> None:
    """Let r3 be verified: every primary answers, and what came of it is noted."""
    world, is_different = scene.world, len(scene.runs) % 2 == 1
    job = await world.conductor.verify_volume("r3", is_repairing=True)
    await world.conductor.reconcile()
    for store in world.stores.values():
        await answer(world, store, is_different=is_different)
    await settle(world)
    view = world.conductor.view()
    ours = [conf for conf in view.shards.values() if view.volumes[conf.volume_id].name == "r3"]
    for conf in ours if view.jobs[job.id].is_finished else ():
        key = (conf.volume_id, conf.index)
        if is_different:
            scene.told.differing.add(key)
        elif len(conf.isr) == 3:
            scene.told.differing.discard(key)


async def answer(world: World, store: SimStore, *, is_different: bool) -> None:
    """Let a store answer the verifications that it was asked for; other commands wait."""
    session = store.session
    if session is None:
        return
    frames = [session.outbox.get_nowait() for _ in range(session.outbox.qsize())]
    for frame in frames:
        command = decode_down(frame or "")
        if not isinstance(command, VerifyReplica):
            session.outbox.put_nowait(frame)
            continue
        conf = world.conductor.view().shards[command.volume_id, command.index]
        found = Verified(
            id=command.id,
            term=command.term,
            regions=1024,
            copies=len(conf.isr),
            different=((7, conf.members[-1].store),) if is_different else (),
            unreadable=(),
        )
        await world.conductor.receive(session, found)


STEPS: Final[dict[str, Callable[[Scene], Awaitable[None]]]] = {
    step.__name__: step
    for step in (damage, mend, lose, find, end, come_back, fail_disk, verify, restart)
}


async def act(world: World, told: Told, step: Step) -> None:
    """Do one thing to the world, and note what it lets stores report."""
    kind, number, count = step
    confs = sorted(world.conductor.view().shards.items())
    key, conf = confs[number % len(confs)]
    scene = Scene(
        world=world,
        told=told,
        store=world.stores[1 + number % 3],
        key=key,
        primary=world.stores[conf.member(conf.primary).store],
        runs=tuple((4 * n, 1 + n % 2) for n in range(count)),
    )
    await STEPS[kind](scene)
    # What a primary knows goes with its reign: another one has not met the lost blocks yet.
    await settle(world)
    for place, now in world.conductor.view().shards.items():
        leader = world.stores[now.member(now.primary).store]
        told.lost[place] = sum(n for _, n in leader.lost.get(place, ()))


def tell(steps: list[Step]) -> None:
    async def story() -> None:
        world = await begun()
        told = Told()
        check(world, told)
        for step in steps:
            await act(world, told, step)
            check(world, told)
            await asyncio.sleep(0)

    run(story())


RUNS: Final = st.one_of(st.integers(0, 3), st.integers(RUNS_TOLD - 1, RUNS_TOLD + 9))
"""Runs of blocks that a step is about; a store names the first of many only."""


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 11), RUNS),
        max_size=12,
    )
)
def test_no_face_says_fine_while_another_says_it_is_not(steps: list[Step]) -> None:
    tell(steps)


@pytest.mark.parametrize("kind", STEPS)
def test_each_step_by_itself(kind: str) -> None:
    tell([(kind, number, count) for number in range(4) for count in (1, RUNS_TOLD + 6, 0)])
