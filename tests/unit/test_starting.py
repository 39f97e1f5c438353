"""A cluster that starts with what it has: bad disks, a lost metastore, a stranger at its port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import httpx2
import msgspec
import pytest
from tests.support.world import GIB, ListLog, World, attempt, run

from pureflash.client.api import Api
from pureflash.conductor import health, states
from pureflash.conductor.disk_states import disk_views
from pureflash.conductor.explaining import explain
from pureflash.errors import ClusterError, Code
from pureflash.metastore.memory import MemoryMetastore
from pureflash.model.domain import HealthState
from pureflash.model.messages import Down, Message
from pureflash.model.rest import RecoverConfig, RecoveryView
from pureflash.process.allegiance import Known
from pureflash.process.link import AgentLink

CODES = ("DISK_FAILED", "WRONG_CLUSTER")
STORES = {1: "s1", 2: "s2", 3: "s3"}


async def begun() -> World:
    """Give a world at rest with three volumes on each count of replicas."""
    world = World(metastore=MemoryMetastore(lineage="ab" * 16), expected=STORES)
    await world.start_conductor()
    await world.join_all()
    for replicas, number in product((1, 2, 3), range(3)):
        await world.conductor.create_volume(
            name=f"r{replicas}-{number}",
            size_bytes=GIB // 4,
            replicas=replicas,
            shard_size_bytes=GIB,
        )
    await world.pump()
    return world


async def reboot(world: World, metastore: MemoryMetastore | None = None) -> None:
    """Start everything again at once, each store in a new life."""
    world.clock.ms += 60_000
    world.metastore = metastore or world.metastore
    await world.start_conductor()
    for store in world.stores.values():
        store.incarnation += 1
    await world.join_all()
    await world.pump()


def codes_of(world: World) -> set[tuple[str, str]]:
    return {(it.code, it.subject) for it in health.findings(world.conductor.view())}


def check_served(world: World, lost: int) -> None:
    """Whoever has a copy elsewhere is served, and whoever has not says what would help."""
    view = world.conductor.view()
    for volume in view.volumes.values():
        verdict = states.judge_volume(view, volume)
        stores = {member.store for conf in view.shards_of(volume) for member in conf.members}
        expected = {
            (False, 1): HealthState.HEALTHY,
            (False, 2): HealthState.HEALTHY,
            (False, 3): HealthState.HEALTHY,
            (True, 1): HealthState.OFFLINE,
            (True, 2): HealthState.SINGLE_COPY,
            (True, 3): HealthState.DEGRADED,
        }[lost in stores, volume.replicas]
        assert verdict.state is expected, (volume.name, verdict)
        told = " ".join(line.reason for line in explain(view, volume))
        assert ("it cannot be read" in told) == (lost in stores)
        if verdict.state is HealthState.OFFLINE:
            assert f"brings the disk of s{lost} back" in verdict.leaves_by


@pytest.mark.parametrize(("code", "lost"), list(product(CODES, STORES)))
def test_one_bad_disk_leaves_all_other_copies_served(code: str, lost: int) -> None:
    async def story() -> None:
        world = await begun()
        world.stores[lost].disk_code = code
        await reboot(world)
        assert (code, f"s{lost} disk 0") in codes_of(world)
        assert not any(found == "STORE_OFFLINE" for found, _ in codes_of(world))
        check_served(world, lost)
        (shown,) = disk_views(world.conductor.view(), world.conductor.view().stores[lost])
        assert (shown.state, shown.reason) == ("failed", "it cannot be read")
        assert shown.next_step == "bring it back"
        assert {step for _, step in steps_of(world, code)} == {"bring it back"}
        await world.conductor.create_volume(
            name="new", size_bytes=GIB // 4, replicas=2, shard_size_bytes=GIB
        )
        await world.pump()  # the world asserts that nothing goes to the bad disk
        for _ in range(3):
            world.clock.ms += 20_000
            for number in world.stores:
                await world.beat(number)
            await world.pump()
        check_served(world, lost)
        world.stores[lost].disk_code = ""
        world.stores[lost].incarnation += 1
        await world.join(lost)
        await world.pump()
        world.clock.ms += 60_000
        for number in world.stores:
            await world.beat(number)
        await world.pump()
        assert codes_of(world) == set()
        world.check_rest()

    run(story())


def steps_of(world: World, code: str) -> list[tuple[str, str]]:
    found = health.findings(world.conductor.view())
    return [(it.subject, it.next_step) for it in found if it.code == code]


def test_a_disk_that_hangs_is_not_called_full() -> None:
    async def story() -> None:
        world = await begun()
        await reboot(world)
        observed = world.conductor.observations.stores
        for code, reason in (("DISK_HANGS", "no answer for 3 s"), ("DISK_FULL", "host is full")):
            report = msgspec.structs.replace(world.stores[1].report(), code=code, reason=reason)
            observed[1] = replace(observed[1], disks={0: report})
            assert (code, "s1 disk 0") in codes_of(world)

    run(story())


async def recover(world: World, *without: str, dry_run: bool = False) -> RecoveryView:
    wish = RecoverConfig(by="a person", without=list(without), dry_run=dry_run)
    world.conductor._settle_timeout_s = 30
    try:
        return await world.meanwhile(world.conductor.recovering.recover(wish))
    finally:
        world.conductor._settle_timeout_s = 0
        await world.pump()


async def restart_empty(world: World, *joining: int) -> None:
    world.clock.ms += 60_000
    world.metastore = MemoryMetastore(lineage="cd" * 16)
    await world.start_conductor()
    for store in world.stores.values():
        store.session = None
        store.incarnation += 1
    for number in joining:
        await world.join(number)
    await world.pump()


@pytest.mark.parametrize("joining", [(), (1,), (3, 1)])
@pytest.mark.parametrize("dry_run", [True, False])
def test_records_are_not_rebuilt_from_nothing(joining: tuple[int, ...], dry_run: bool) -> None:
    """In the first seconds nobody may have come yet, and an empty metastore knows nobody."""

    async def story() -> None:
        world = await begun()
        before = set(world.conductor.view().volumes)
        await restart_empty(world, *joining)
        problem = await attempt(recover(world, dry_run=dry_run))
        assert problem is not None
        assert problem.code is Code.UNAVAILABLE
        missing = [name for number, name in STORES.items() if number not in joining]
        assert problem.message.startswith(", ".join(missing) + " not connected")
        assert f"--without {missing[0]}" in problem.next_step
        for number in STORES.keys() - set(joining):
            await world.join(number)
        await world.pump()
        await recover(world)
        await world.join_all()
        await world.pump()
        assert set(world.conductor.view().volumes) == before
        world.check_rest()

    run(story())


def test_a_store_of_which_only_the_name_is_known_can_be_given_up() -> None:
    async def story() -> None:
        world = await begun()
        await restart_empty(world, 1, 2)
        await recover(world, "s3")
        for number in (1, 2):
            await world.join(number)
        world.clock.ms += 60_000
        for number in (1, 2):
            await world.beat(number)
        await world.pump()
        view = world.conductor.view()
        served = (HealthState.HEALTHY, HealthState.DEGRADED, HealthState.SINGLE_COPY)
        for volume in view.volumes.values():
            if {member.store for conf in view.shards_of(volume) for member in conf.members} != {3}:
                assert states.judge_volume(view, volume).state in served
        assert not any(code == "STORES_AWAITED" for code, _ in codes_of(world)), "nobody is"

    run(story())


def test_what_an_unread_disk_may_hold_is_not_left_out_of_a_recovery_unsaid() -> None:
    async def story() -> None:
        world = await begun()
        world.stores[2].disk_code = "DISK_FAILED"
        await restart_empty(world, 1, 2, 3)
        problem = await attempt(recover(world))
        assert problem is not None
        assert "disk s2/0 is not served and may hold what the others know nothing of" in (
            problem.message
        )
        assert "--without s2/0" in problem.next_step
        plan = await recover(world, "s2/0")
        assert plan.given_up == ["s2/0"]
        await world.join_all()
        await world.pump()
        assert world.conductor.view().is_online(2), "its other disks would be served"
        world.stores[2].disk_code = ""
        world.stores[2].incarnation += 1
        session = await attempt(world.join(2))
        assert session is not None
        assert "was given up" in session.message

    run(story())


def test_a_volume_on_a_disk_that_is_given_up_is_no_volume_that_was_deleted() -> None:
    """No store reports a replica of it, and that is all that is known: a person decides."""

    async def story() -> None:
        world = await begun()
        before = set(world.conductor.view().volumes)
        world.stores[2].disk_code = "DISK_FAILED"
        await reboot(world)
        plan = await recover(world, "s2/0")
        assert not any("deleted since" in change.change for change in plan.changes)
        await world.join_all()
        await world.pump()
        view = world.conductor.view()
        assert set(view.volumes) == before
        for volume in view.volumes.values():
            stores = {member.store for conf in view.shards_of(volume) for member in conf.members}
            is_lost = states.judge_volume(view, volume).state is HealthState.OFFLINE
            assert is_lost == (stores == {2})

    run(story())


@pytest.mark.parametrize(
    ("answer", "who"),
    [
        (httpx2.Response(200, json={"status": "alive", "cluster_id": "99" * 16}), "cluster '9999"),
        (httpx2.Response(200, json={"status": "alive"}), "another program"),
        (httpx2.Response(200, json=[1, 2]), "another program"),
        (httpx2.Response(200, content=b"\xff\xfe"), "another program"),
        (httpx2.Response(404, json={"cluster_id": "ab" * 16}), "another program"),
        (httpx2.RemoteProtocolError("it speaks SSH"), "another program"),
    ],
)
def test_a_token_is_not_shown_to_whoever_has_the_port(
    answer: httpx2.Response | Exception, who: str
) -> None:
    asked: list[httpx2.Request] = []

    def listen(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    transport = httpx2.MockTransport(listen)
    with Api("fake:1", "secret", cluster_id="ab" * 16, transport=transport) as api:
        for call in (api.cluster, api.volumes, lambda: next(iter(api.events()))):
            with pytest.raises(ClusterError) as found:
                call()
            assert found.value.code is Code.WRONG_CLUSTER
            assert who in found.value.message
            assert "pf up" in found.value.next_step
    assert {request.url.path for request in asked} == {"/healthz"}
    assert not any("secret" in str(request.headers) for request in asked)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b'HTTP/1.1 200 OK\r\n\r\n{"status":"alive","cluster_id":"' + b"9" * 32 + b'"}',
        b'HTTP/1.1 401 No\r\n\r\n{"status":"alive","cluster_id":"' + b"a" * 32 + b'"}',
        b"HTTP/1.1 200 OK\r\n\r\n" + b"\xff" * 100_000,
        b"",
    ],
)
async def test_an_agent_shows_its_token_to_no_stranger(answer: bytes) -> None:
    heard: list[bytes] = []
    has_asked = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        writer.close()
        has_asked.set()

    class Owner:
        def registration(self) -> Message:
            raise AssertionError("nobody is told who we are")

        def heartbeat(self, term: int) -> Message:
            raise AssertionError(f"nor that we live, in term {term}")

        def led(self, known: Known) -> None:
            raise AssertionError(f"nobody leads: {known}")

        def handle(self, command: Down, send: Callable[[Message], None]) -> None:
            raise AssertionError(f"{command} is not obeyed, {send} not used")

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        log = ListLog()
        link = AgentLink(
            address=f"{host}:{port}",
            token="secret",
            owner=Owner(),
            log=log,
            cluster_id="a" * 32,
        )
        task = asyncio.create_task(link.run())
        await asyncio.wait_for(has_asked.wait(), 10)
        async with asyncio.timeout(10):
            while not log.lines:
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert b"GET /healthz" in heard[0]
    assert not any(b"secret" in words for words in heard)
    assert "not the conductor of this cluster" in log.lines[0][2]


@pytest.mark.parametrize("way", ["back", "given up", "new disk"])
def test_a_deletion_frees_the_name_at_once_and_ends_when_the_last_store_can(way: str) -> None:
    async def story() -> None:
        world = await begun()
        store = world.stores[3]
        await world.conductor.store_exited(3, incarnation=store.incarnation)
        store.session = None
        store.incarnation += 1
        await world.pump()
        old = world.conductor.view().names["r3-0"].volume_id
        job = await world.conductor.delete_volume("r3-0", if_version=None)
        await world.pump()
        view = world.conductor.view()
        shown = states.volume_view(view, view.volumes[old])
        assert (shown.state, shown.io) == ("deleting", "none")
        assert "its name is free; space on s3 is freed when that is back" in shown.reason
        assert view.jobs[job.id].reason == "waiting for s3"
        assert not any(subject.startswith("r3-0") for _, subject in codes_of(world))
        await world.conductor.create_volume(
            name="r3-0", size_bytes=GIB, replicas=2, shard_size_bytes=GIB
        )
        await world.pump()
        if way == "given up":
            await recover(world, "s3")
            for number in (1, 2):
                await world.join(number)
        else:
            if way == "new disk":
                store.disk_uuid, store.sizes, store.confs = "ff" * 16, {}, {}
            await world.join(3)
        await world.pump()
        view = world.conductor.view()
        assert old not in view.volumes
        assert view.jobs[job.id].state == "succeeded"
        assert states.volume_view(view, view.volumes[view.names["r3-0"].volume_id]).size_bytes

    run(story())


@pytest.mark.parametrize("way", ["back", "given up", "new disk"])
def test_a_deletion_does_not_forget_what_is_on_a_disk_that_is_not_served(way: str) -> None:
    """Its store is there and reports no replica, and the disk may come back with all of them."""

    async def story() -> None:
        world = await begun()
        store = world.stores[3]
        store.disk_code = "DISK_FAILED"
        await reboot(world)
        old = world.conductor.view().names["r3-0"].volume_id
        job = await world.conductor.delete_volume("r3-0", if_version=None)
        await world.pump()
        view = world.conductor.view()
        assert (old, 0) in view.shards
        assert view.jobs[job.id].reason == "waiting for disk 0 of s3"
        shown = states.volume_view(view, view.volumes[old])
        assert "space on disk 0 of s3 is freed when that is back" in shown.reason
        if way == "given up":
            await recover(world, "s3/0")
            await world.join_all()
        elif way == "new disk":
            store.disk_uuid, store.sizes, store.confs = "ff" * 16, {}, {}
        if way != "given up":
            store.disk_code = ""
            store.incarnation += 1
            await world.join(3)
        await world.pump()
        view = world.conductor.view()
        assert old not in view.volumes
        assert view.jobs[job.id].state == "succeeded"
        if way != "given up":
            assert (old, 0) not in store.sizes, "nothing is left that no record has"
            assert not any(code == "REPLICA_UNKNOWN" for code, _ in codes_of(world))

    run(story())


def test_what_the_supervisor_starts_and_nobody_has_heard_is_a_finding() -> None:
    async def story() -> None:
        world = World(expected=STORES, gateways=("g1",))
        await world.start_conductor()
        await world.join(1)
        await world.pump()
        assert codes_of(world) == set(), "it has just started"
        world.clock.ms += 10_000
        await world.beat(1)
        await world.pump()
        assert codes_of(world) == {
            ("STORE_OFFLINE", "s2"),
            ("STORE_OFFLINE", "s3"),
            ("GATEWAY_OFFLINE", "g1"),
        }
        for number in (2, 3):
            await world.join(number)
        await world.join_gateway()
        await world.pump()
        assert codes_of(world) == set()

    run(story())


def test_nothing_is_made_in_amnesia_and_it_is_said_why() -> None:
    async def story() -> None:
        world = await begun()
        await restart_empty(world, 1, 2, 3)
        problem = await attempt(
            world.conductor.create_volume(
                name="new", size_bytes=GIB, replicas=3, shard_size_bytes=GIB
            )
        )
        assert problem is not None
        assert "lost its memory" in problem.message
        assert "recover-config" in problem.next_step

    run(story())
