"""A metastore that is not the newest: found out by what stores remember, and rebuilt from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.world import GIB, World, attempt, run

from pureflash.conductor import failover, health, planner
from pureflash.conductor.amnesia import why_foreign
from pureflash.errors import ClusterError, Code, PureFlashError
from pureflash.metastore.lease import Reign
from pureflash.metastore.memory import MemoryMetastore
from pureflash.model.domain import HealthState
from pureflash.model.messages import Recall, Recalled, SetConf, decode_down
from pureflash.model.rest import RecoverConfig, RecoveryView
from pureflash.process.allegiance import Allegiance

LINEAGE = "ab" * 16
LATER = "cd" * 16
REIGNS = (Reign(10, 5), Reign(20, 50), Reign(30, 90))


def copy_of(metastore: MemoryMetastore) -> MemoryMetastore:
    """Copy a metastore as a backup does."""
    copied = MemoryMetastore(lineage=metastore.lineage)
    copied._entries = dict(metastore._entries)
    copied._changes = list(metastore._changes)
    copied._revision = metastore._revision
    return copied


async def begun(*, stores: int = 3, replicas: int = 3, gib: int = 2) -> World:
    """Give a world at rest with the volume v1 of shards of 1 GiB."""
    world = World(stores=stores, metastore=MemoryMetastore(lineage=LINEAGE))
    await world.start_conductor()
    await world.join_all()
    await create(world, "v1", gib=gib, replicas=replicas)
    return world


async def create(world: World, name: str, *, gib: int, replicas: int = 3) -> None:
    await world.conductor.create_volume(
        name=name, size_bytes=gib * GIB, replicas=replicas, shard_size_bytes=GIB
    )
    await world.pump()


async def restart(world: World, metastore: MemoryMetastore, *joining: int) -> None:
    """Start a conductor on another metastore, later, and let some stores register."""
    world.clock.ms += 60_000
    world.metastore = metastore
    await world.start_conductor()
    for number in joining:
        await world.join(number)
    await world.pump()


async def lose(world: World, number: int) -> None:
    """End a store's process; another incarnation may come back."""
    store = world.stores[number]
    await world.conductor.store_exited(number, incarnation=store.incarnation)
    store.session = None
    store.incarnation += 1
    await world.pump()


async def pass_time(world: World, seconds: int) -> None:
    """Let time pass while all stores that are up say so."""
    for _ in range(seconds):
        world.clock.ms += 1_000
        for number, store in world.stores.items():
            if store.session is not None:
                await world.beat(number)
        await world.pump()


def state_of(world: World) -> HealthState:
    view = world.conductor.view()
    return health.cluster_state(view, health.findings(view))[0]


def codes_of(world: World) -> set[str]:
    return {finding.code for finding in health.findings(world.conductor.view())}


async def recover(world: World, *without: str, dry_run: bool = False) -> RecoveryView:
    """Rebuild the records; every connection ends with that."""
    wish = RecoverConfig(by="a person", without=list(without), dry_run=dry_run)
    world.conductor._settle_timeout_s = 30
    plan = await world.meanwhile(world.conductor.recovering.recover(wish))
    world.conductor._settle_timeout_s = 0
    await world.pump()
    return plan


@pytest.mark.parametrize(
    ("lineage", "term", "revision", "expected"),
    [
        ("", 0, 0, ""),
        (LINEAGE, 10, 50, ""),
        (LINEAGE, 10, 51, "told of revision 51 in term 10"),
        (LINEAGE, 20, 90, ""),
        (LINEAGE, 20, 91, "only come to 90"),
        (LINEAGE, 30, 99, ""),
        (LINEAGE, 30, 101, "only come to 100"),
        (LINEAGE, 25, 60, "led in term 25"),
        (LINEAGE, 31, 60, "led in term 31"),
        (LINEAGE, 9, 5, ""),
        (LINEAGE, 9, 6, "led in term 9"),
        ("ee" * 16, 1, 1, "metastore eeeeeeee"),
        (LATER, 99, 999, ""),
    ],
)
def test_what_a_store_remembers_is_compared_with_the_reigns(
    lineage: str, term: int, revision: int, expected: str
) -> None:
    world = World(stores=1)
    store = world.stores[1]
    known = store.allegiance.known
    store.allegiance.known = type(known)(lineage=lineage, term=term, revision=revision)
    for is_heard in (False, True) if lineage == LINEAGE else (False,):
        if is_heard:
            store.allegiance.known = type(known)(
                lineage=lineage, term=10, revision=9, heard_term=term, heard_revision=revision
            )
        found = why_foreign(
            REIGNS,
            lineage=LINEAGE,
            predecessors=(LATER,),
            revision=100,
            told=store.registration(),
        )
        assert expected in found
        assert bool(expected) == bool(found)


def test_a_restored_metastore_changes_nothing_and_is_rebuilt() -> None:
    async def story() -> None:
        world = await begun()
        backup = copy_of(world.metastore)
        await world.conductor.resize_volume("v1", size_bytes=4 * GIB, if_version=None)
        await world.pump()
        await lose(world, 1)
        newest = {key: conf.epoch for key, conf in world.stores[2].confs.items()}
        await create(world, "v2", gib=3, replicas=2)
        told = len(world.stores[2].told)
        await restart(world, backup, 2)
        assert state_of(world) is HealthState.AMNESIA
        assert "AMNESIA" in codes_of(world)
        await world.join(1)
        await world.join(3)
        await pass_time(world, 30)
        assert len(world.stores[2].told) == told, "nobody is told anything"
        assert planner.plan(world.conductor.view()) == []
        refused = await attempt(world.conductor.delete_volume("v1", if_version=None))
        assert refused is not None
        assert refused.code is Code.UNAVAILABLE
        assert "recover-config" in refused.next_step
        plan = await recover(world, dry_run=True)
        assert plan.job is None
        assert state_of(world) is HealthState.AMNESIA, "a dry run changes nothing"
        await recover(world)
        await world.join_all()
        await world.pump()
        view = world.conductor.view()
        for key, epoch in newest.items():
            assert view.shards[key].epoch >= epoch
        assert view.volumes[view.names["v1"].volume_id].size_bytes == 4 * GIB
        found = next(volume for volume in view.volumes.values() if volume.name != "v1")
        assert found.name == f"recovered-{found.id}"
        assert (found.size_bytes, found.replicas, found.shard_size_bytes) == (3 * GIB, 2, GIB)
        assert state_of(world) is HealthState.HEALTHY
        world.check_rest()
        await create(world, "v3", gib=1)
        world.check_rest()
        await restart(world, world.metastore, 1, 2, 3)
        assert state_of(world) is HealthState.HEALTHY, "it stays recovered"

    run(story())


def test_amnesia_outlasts_the_conductor_that_found_it() -> None:
    async def story() -> None:
        world = await begun()
        backup = copy_of(world.metastore)
        await create(world, "v2", gib=1)
        await restart(world, backup, 3)
        assert state_of(world) is HealthState.AMNESIA
        # The store that remembers is away now, and the metastore has long been further.
        for _ in range(30):
            world.clock.ms += 5_000
            await world.conductor.reconcile()
        await restart(world, backup)
        assert state_of(world) is HealthState.AMNESIA
        assert planner.plan(world.conductor.view()) == []

    run(story())


def test_parts_of_two_answers_are_not_taken_for_one() -> None:
    async def story() -> None:
        world = await begun(gib=3)
        await restart(world, MemoryMetastore(lineage=LATER))
        await world.join(1)
        recovering = world.conductor.recovering
        recovering.ask()  # another store has come, and whoever has not answered is asked again
        session = world.stores[1].session
        assert session is not None
        numbers = []
        while not session.outbox.empty():
            command = decode_down(session.outbox.get_nowait() or "")
            assert isinstance(command, Recall)
            numbers.append(command.id)
        held = tuple(world.stores[1].confs.values())
        for number, confs, is_last in (
            (numbers[0], held[2:], True),  # the rest of the first answer
            (numbers[1], held[:2], False),
            (numbers[1], held[2:], True),
        ):
            assert 1 not in recovering._recalled
            part = Recalled(id=number, term=0, confs=confs, is_last=is_last)
            await world.conductor.receive(session, part)
        assert recovering._recalled[1] == held

    run(story())


def test_clients_are_told_nothing_old() -> None:
    async def story() -> None:
        world = await begun()
        await world.join_gateway()
        backup = copy_of(world.metastore)
        await create(world, "v2", gib=1)
        spec = await world.conductor.attaching.attach("v2", is_read_only=True)
        await world.conductor.create_export(
            kind="nbd", volume="v2", transport="unix", is_read_only=False, gateway=None
        )
        await world.pump()
        assert world.offered == ("v2",)
        await restart(world, backup)
        await world.join_gateway()
        # Before any store is there, and in amnesia: what clients and gateways have stays as it is.
        for number in (None, 1, 2, 3):
            if number is not None:
                await world.join(number)
            await world.pump()
            assert world.offered == ("v2",), "an old list would take the export away"
            with pytest.raises(ClusterError) as caught:
                world.conductor.attaching.renew("v2", ticket=spec.ticket)
            assert caught.value.code is Code.UNAVAILABLE, "NOT_FOUND would close the client"
            with pytest.raises(ClusterError):
                await world.conductor.attaching.attach("v1", is_read_only=True)
        await recover(world)
        await world.join_all()
        await world.pump()
        name = f"recovered-{spec.volume_id}"
        again = world.conductor.attaching.renew(name, ticket=spec.ticket)
        assert again.volume_id == spec.volume_id

    run(story())


def test_what_a_peer_remembers_is_found_out_from_whoever_heard_it() -> None:
    async def story() -> None:
        world = await begun()
        backup = copy_of(world.metastore)
        await lose(world, 1)  # s3 remembers; s1 does not, but will hear it
        known = world.stores[3].allegiance.known
        world.stores[1].allegiance.known = type(known)(lineage=known.lineage, term=known.term)
        await restart(world, backup, 1)
        assert state_of(world) is not HealthState.AMNESIA
        assert world.stores[1].allegiance.heard(known.term, known.lineage_number, known.revision)
        await world.beat(1)
        await world.pump()
        assert state_of(world) is HealthState.AMNESIA
        assert "a peer of s1" in health.findings(world.conductor.view())[0].cause

    run(story())


def test_a_metastore_that_was_made_anew_is_rebuilt() -> None:
    async def story() -> None:
        world = await begun(gib=3)
        before = world.conductor.view()
        await restart(world, MemoryMetastore(lineage=LATER), 1, 2, 3)
        assert state_of(world) is HealthState.AMNESIA
        assert "metastore abababab" in health.findings(world.conductor.view())[0].cause
        await recover(world)
        await world.join_all()
        await world.pump()
        view = world.conductor.view()
        assert dict(view.shards) == dict(before.shards)
        (volume,) = view.volumes.values()
        assert volume.size_bytes == 3 * GIB
        assert view.cluster.predecessors == (LINEAGE, LATER)
        world.check_rest()

    run(story())


def test_a_volume_deleted_since_does_not_come_back() -> None:
    async def story() -> None:
        world = await begun()
        backup = copy_of(world.metastore)
        await world.conductor.delete_volume("v1", if_version=None)
        await world.pump()
        await restart(world, backup, 1, 2, 3)
        plan = await recover(world)
        assert any("deleted since" in change.change for change in plan.changes)
        await world.join_all()
        await world.pump()
        assert not world.conductor.view().volumes
        assert not world.held(), "no empty replica was made for it"
        world.check_rest()

    run(story())


async def one_left_behind() -> tuple[World, MemoryMetastore]:
    """Two copies; s1 has left the ISR after the backup, and s2 alone has the newest writes."""
    world = await begun(stores=2, replicas=2, gib=1)
    backup = copy_of(world.metastore)
    for conf in world.stores[1].confs.values():
        assert len(conf.isr) == 2
    await lose(world, 1)
    (conf,) = world.stores[2].confs.values()
    assert [conf.member(copy).store for copy in conf.isr] == [2]
    world.stores[2].session = None
    return world, backup


def test_while_the_newest_store_is_away_no_older_copy_is_opened() -> None:
    async def story() -> None:
        world, backup = await one_left_behind()
        await restart(world, backup, 1)
        await pass_time(world, 60)
        assert not [told for told in world.stores[1].told if is_reopened(told)]
        assert "STORES_AWAITED" in codes_of(world)
        await world.join(2)
        await world.pump()
        assert state_of(world) is HealthState.AMNESIA
        await recover(world)
        await world.join_all()
        await world.pump()
        assert state_of(world) is HealthState.HEALTHY
        world.check_rest()

    run(story())


def is_reopened(told: object) -> bool:
    """Whether a command lets s1, the older copy, lead."""
    return isinstance(told, SetConf) and told.conf.member(told.conf.primary).store == 1


def test_without_that_rule_the_older_copy_would_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        world, backup = await one_left_behind()
        monkeypatch.setattr(failover, "is_proven", lambda *_: True)
        await restart(world, backup, 1)
        await pass_time(world, 60)
        assert [told for told in world.stores[1].told if is_reopened(told)], "its writes are lost"

    run(story())


def test_a_store_that_is_lost_for_good_is_given_up_and_never_comes_back() -> None:
    async def story() -> None:
        world, backup = await one_left_behind()
        await restart(world, backup, 1)
        with pytest.raises(ClusterError, match="s2 not connected") as caught:
            await recover(world)
        assert "--without s2" in caught.value.next_step
        for wrong, code in (("s9", Code.NOT_FOUND), ("s1", Code.UNSAFE)):
            with pytest.raises(PureFlashError) as other:
                await recover(world, wrong)
            assert other.value.code is code
        plan = await recover(world, "s2")
        assert plan.given_up == ["s2"]
        await world.join(1)
        await pass_time(world, 15)
        (conf,) = world.conductor.view().shards.values()
        assert conf.member(conf.primary).store == 1
        assert len(conf.isr) == 1
        with pytest.raises(ClusterError, match="was given up"):
            await world.join(2)

    run(story())


def test_two_configurations_of_one_epoch_are_not_chosen_from() -> None:
    async def story() -> None:
        world = await begun(gib=1)
        ((key, conf),) = world.stores[2].confs.items()
        world.stores[2].confs[key] = replace(conf, isr=conf.isr[:2])
        await restart(world, MemoryMetastore(lineage=LATER), 1, 2, 3)
        with pytest.raises(PureFlashError, match="two configurations of epoch") as caught:
            await recover(world)
        assert caught.value.code is Code.UNSAFE

    run(story())


def test_recovery_that_is_stopped_anywhere_is_begun_again() -> None:
    async def stopped_after(commits: int) -> bool:
        world = await begun()
        backup = copy_of(world.metastore)
        await lose(world, 1)
        await create(world, "v2", gib=2, replicas=2)
        await restart(world, backup, 1, 2, 3)
        left = commits
        commit = backup.commit

        async def failing(batch: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise ClusterError(Code.UNAVAILABLE, "no metastore")
            return await commit(batch)  # type: ignore[arg-type]

        backup.commit = failing  # type: ignore[method-assign,assignment]
        has_failed = await attempt(recover(world)) is not None
        backup.commit = commit  # type: ignore[method-assign]
        await restart(world, backup, 1, 2, 3)
        if world.conductor.view().amnesia is not None:
            await recover(world)
            await world.join_all()
            await world.pump()
        assert len(world.conductor.view().volumes) == 2
        assert state_of(world) is HealthState.HEALTHY
        world.check_rest()
        return has_failed

    async def story() -> None:
        tried = 0
        while await stopped_after(tried):
            tried += 1
        assert tried >= 3, "records, the term, and the end of amnesia are written one by one"

    run(story())


@pytest.mark.slow
@given(st.lists(st.sampled_from(["create", "grow", "lose", "back", "backup", "beat"]), max_size=12))
def test_no_restored_metastore_is_believed(steps: list[str]) -> None:
    """Whatever happened since the backup: no shard ever goes back, and all of it is recovered."""

    async def story() -> None:
        world = await begun(gib=1)
        backup = copy_of(world.metastore)
        made, size = 1, 1
        for step in steps:
            if step == "create" and made < 4:
                made += 1
                await create(world, f"v{made}", gib=1, replicas=2)
            elif step == "grow" and size < 3 and world.stores[1].session is not None:
                size += 1
                await world.conductor.resize_volume("v1", size_bytes=size * GIB, if_version=None)
                await world.pump()
            elif step == "lose" and all(store.session for store in world.stores.values()):
                await lose(world, 1)
            elif step == "back" and world.stores[1].session is None:
                await world.join(1)
                await world.pump()
            elif step == "backup":
                backup = copy_of(world.metastore)
            elif step == "beat":
                await pass_time(world, 1)
        epochs = {
            key: max(
                store.confs[key].epoch for store in world.stores.values() if key in store.confs
            )
            for key in world.held()
        }
        await restart(world, backup, 2, 3)
        await world.join(1)
        await world.pump()
        if world.conductor.view().amnesia is not None:
            await recover(world)
            await world.join_all()
        await world.pump()
        view = world.conductor.view()
        assert view.shards.keys() == epochs.keys()
        assert all(view.shards[key].epoch >= epoch for key, epoch in epochs.items())
        assert view.volumes[view.names["v1"].volume_id].size_bytes == size * GIB
        world.check_rest()

    run(story())


def test_what_peers_were_told_does_not_replace_what_was_told_here() -> None:
    allegiance = Allegiance()
    known = type(allegiance.known)(lineage=LINEAGE, term=6, revision=200)
    allegiance.known = known
    number = known.lineage_number
    assert allegiance.heard(7, number, 105)
    assert (allegiance.known.term, allegiance.known.revision) == (6, 200)
    assert allegiance.least_term == 7
    assert not allegiance.heard(7, number, 105)
    assert not allegiance.heard(9, number + 1, 500), "of another lineage nothing follows"
