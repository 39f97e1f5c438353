"""T7: what a person is told before deciding about lost copies, what is refused, and what is done.

The guards of the configuration are the core's and tested there; here are the words, the record, and
that what was decided is carried out, once (docs/internals/replication.md, section 2).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.server import Served, serving
from tests.support.views import EPOCH, KEY, Situation, life_of
from tests.support.world import GIB, World, attempt, run
from tests.unit.test_commands import commands_of

from pureflash.cli.outcome import Exit
from pureflash.conductor import explaining, planner, states
from pureflash.conductor.force import FORCE_JOB, ForcePlan, judge_force, writes_of
from pureflash.conductor.view import StoreObservation
from pureflash.errors import Code, PureFlashError
from pureflash.metastore.records import Write
from pureflash.model.conf import next_history, operation_text
from pureflash.model.domain import (
    HealthState,
    JobState,
    ShardConf,
    StoreState,
    Volume,
    VolumeIntent,
)
from pureflash.model.messages import CreateReplica
from pureflash.model.rest import CreateVolume, ForceAccept
from pureflash.testing.model.conf import step_name


def judged(
    situation: Situation, store: str = "s2", *, index: int = 0, may_revoke: bool = False
) -> ForcePlan:
    view = situation.view()
    return judge_force(
        view, situation.volume(), index=index, reference=store, may_revoke=may_revoke
    )


def lost() -> Situation:
    """Copy 0 went on alone to 900 and is gone; copy 1 left at 500, copy 2 is half full."""
    return (
        Situation(isr=(0,), learners=(2,))
        .tell(1, complete_seq=900, applied_seq=900)
        .ended(1)
        .tell(2, complete_seq=500, applied_seq=503)
        .tell(3, complete_seq=0, applied_seq=880)
    )


def test_the_plan_says_all_that_is_known_and_what_is_lost() -> None:
    plan = judged(lost())
    rows = [(one.name, one.role, one.last_seq, one.is_consistent, one.note) for one in plan.copies]
    assert rows == [
        ("s1", "primary", 900, True, "in sync; the end of s1 was reported"),
        ("s2", "out", 500, True, "everything up to there, and some of the next 3"),
        (
            "s3",
            "learner",
            0,
            False,
            "no consistent point: it was being made equal, parts are newer, up to 880",
        ),
    ]
    assert plan.loss == (
        "every write acknowledged after operation 500,"
        " at least 400 by the last report of a copy in sync"
    )
    assert plan.revoke == ()
    half = judged(lost(), "s3")
    assert "the copy on s3 has no consistent point" in half.loss


def test_one_that_was_being_made_equal_is_told_from_one_that_left() -> None:
    gone = Situation(isr=(0,)).ended(1)
    near = judged(gone.tell(2, complete_seq=500, applied_seq=500 + 1_024))
    far = judged(gone.tell(2, complete_seq=500, applied_seq=500 + 1_025))
    assert (near.copies[1].is_consistent, far.copies[1].is_consistent) == (True, False)


def test_what_is_not_known_is_said_to_be_so() -> None:
    plan = judged(Situation(isr=(0,)).unheard(1).unheard(3), may_revoke=True)
    assert plan.copies[0].last_seq is None
    assert plan.copies[2].note == "nothing is known of it"
    assert "how many is not known" in plan.loss


def test_operations_of_a_forced_history_are_counted_anew() -> None:
    assert operation_text(17) == "17"
    assert operation_text(next_history(0) + 17) == "17 of history 1"


REFUSED: list[tuple[str, Situation, str, Code, str, str]] = [
    ("no such store", lost(), "s9", Code.NOT_FOUND, "no store 's9'", "pf store list"),
    (
        "a copy in sync",
        lost(),
        "s1",
        Code.UNSAFE,
        "is in sync: it is opened by itself, without loss",
        "start s1",
    ),
    (
        "a copy that is not there",
        lost().offline(2),
        "s2",
        Code.UNAVAILABLE,
        "s2 is offline",
        "start s2",
    ),
    (
        "a copy on a failed disk",
        lost().failed_disk(2),
        "s2",
        Code.UNAVAILABLE,
        "s2 has no usable copy of v1/0",
        "pf disk list",
    ),
    (
        "while clients hold what is lost",
        lost().exported(),
        "s2",
        Code.IN_USE,
        "exported for writing by nbd",
        "pf export delete v1",
    ),
    (
        "while a copy in sync serves",
        Situation(isr=(0,)),
        "s2",
        Code.UNSAFE,
        "the copy of v1/0 on s1 is in sync and there; nothing has to be lost",
        "wait until it is opened",
    ),
    (
        "while a copy in sync is about to be opened",
        Situation(isr=(0,)).reborn(1),
        "s2",
        Code.UNSAFE,
        "nothing has to be lost",
        "wait until it is opened",
    ),
    (
        "while the store of a copy in sync runs, with a broken disk",
        Situation(isr=(0,)).failed_disk(1),
        "s2",
        Code.UNSAFE,
        "s1 runs, and may still serve v1/0",
        "stop s1",
    ),
    (
        "while a silent store may serve clients that reach it",
        Situation(isr=(0,)).offline(1),
        "s2",
        Code.UNSAFE,
        "nobody has seen the end of its process",
        "--revoke",
    ),
    (
        "while one of several may",
        Situation(isr=(0, 1)).ended(1).suspected(2),
        "s3",
        Code.UNSAFE,
        "s2 may still serve v1/0",
        "start s2 again",
    ),
]


@pytest.mark.parametrize(
    ("situation", "store", "code", "text", "next_step"),
    [pytest.param(*row[1:], id=row[0]) for row in REFUSED],
)
def test_what_is_not_proven_is_refused_with_what_to_do(
    situation: Situation, store: str, code: Code, text: str, next_step: str
) -> None:
    with pytest.raises(PureFlashError) as caught:
        judged(situation, store)
    assert caught.value.code is code
    assert text in caught.value.message
    assert next_step in caught.value.next_step


def test_shards_and_copies_that_are_not_there_are_named() -> None:
    with pytest.raises(PureFlashError, match="v1 has no shard 3"):
        judged(lost(), index=3)
    four = lost()
    four.lives[4] = life_of(4)
    with pytest.raises(PureFlashError, match="s4 has no copy of v1/0") as caught:
        judged(four, "s4")
    assert "s1, s2, s3" in caught.value.next_step
    with pytest.raises(PureFlashError, match="is being deleted"):
        judged(replace(lost(), intent=VolumeIntent.DELETING))


def test_a_person_vouches_for_what_nobody_saw_but_not_against_what_is_seen() -> None:
    silent = judged(Situation(isr=(0,)).offline(1), may_revoke=True)
    assert [store.name for store in silent.revoke] == ["s1"]
    with pytest.raises(PureFlashError, match="s1 runs"):
        judged(Situation(isr=(0,)).failed_disk(1), may_revoke=True)
    with pytest.raises(PureFlashError, match="nothing has to be lost"):
        judged(Situation(isr=(0,)), may_revoke=True)


def test_the_record_and_the_configuration_are_stored_together() -> None:
    situation = lost()
    view = situation.view()
    job, writes = writes_of(view, judged(situation), by="ada")
    assert [write.key for write in writes] == ["job/9", "shard/7/0"]
    after = writes[1].record
    assert isinstance(after, ShardConf)
    assert step_name(situation.conf(), after) == "T7"
    assert (after.primary, after.isr, after.learners, after.epoch) == (1, (1,), (), EPOCH + 1)
    assert (after.history_id, after.attach_epoch) == (next_history(KEY[0]), 2)
    assert (job.kind, job.state, job.target) == (FORCE_JOB, JobState.SUCCEEDED, "v1/0")
    assert job.reason == (
        "ada decided that the copy on s2 counts, from epoch 6 on; lost: every write acknowledged"
        " after operation 500, at least 400 by the last report of a copy in sync"
    )
    for nobody in ("", "  ", "a\nb", "x" * 97):
        with pytest.raises(PureFlashError, match="who made it"):
            writes_of(view, judged(situation), by=nobody)


def test_the_record_stays_as_long_as_its_volume() -> None:
    situation = Situation()
    (job, _) = writes_of(lost().view(), judged(lost()), by="ada")
    situation.jobs = {job.id: job} | {
        number: replace(job, id=number, kind="volume.verify", history_id=None)
        for number in range(100, 100 + planner.JOBS_KEPT + 1)
    }
    gone = [one.key for one in planner.plan(situation.view()) if isinstance(one, Write)]
    assert gone == ["job/100"], "the oldest of the others"
    lines = explaining.explain(situation.view(), situation.volume())
    assert [line.reason for line in lines if line.state == "forced"] == [
        f"1970-01-01T00:00:00.000Z: {job.reason}"
    ]


def test_all_shards_of_a_volume_fence_who_wrote_before() -> None:
    view = Situation().view()
    conf = replace(view.shards[KEY], attach_epoch=4)
    actions = planner.plan(replace(view, shards={KEY: conf}))
    (volume,) = (one.record for one in actions if isinstance(one, Write))
    assert isinstance(volume, Volume)
    assert volume.attach_epoch == 4


# ------------------------------------------------------------------------- carried out, in a world


async def alone_then_lost(world: World) -> tuple[str, int, int]:
    """Let one of two copies go on alone and end; gives the volume, the lost store and the other."""
    conductor = await world.start_conductor()
    await world.join_all()
    volume = await conductor.create_volume(
        name="v1", size_bytes=GIB, replicas=2, shard_size_bytes=GIB
    )
    await world.pump()
    conf = world.conductor.view().shards[volume.id, 0]
    primary = conf.member(conf.primary).store
    (other,) = (one.store for one in conf.members if one.store != primary)
    await leave(world, other)
    await world.pump()
    assert len(world.conductor.view().shards[volume.id, 0].isr) == 1, "it goes on alone"
    await leave(world, primary)
    await return_of(world, other)
    await world.pump()
    return volume.name, primary, other


async def leave(world: World, number: int, *, is_seen: bool = True) -> None:
    """End a store's process."""
    store = world.stores[number]
    session, store.session = store.session, None
    assert session is not None
    if is_seen:
        await world.conductor.store_exited(number, incarnation=store.incarnation)
    else:
        world.conductor.disconnect(session)


async def return_of(world: World, number: int) -> None:
    """Start a store again."""
    world.stores[number].incarnation += 1
    await world.join(number)


def wish(store: int, *, revoke: bool = False, dry_run: bool = False) -> ForceAccept:
    return ForceAccept(shard=0, store=f"s{store}", by="ada", revoke=revoke, dry_run=dry_run)


def test_what_was_decided_is_done_once_and_the_lost_store_is_made_equal_again() -> None:
    async def story() -> None:
        world = World(stores=2)
        name, gone, left = await alone_then_lost(world)
        view = world.conductor.view()
        volume = view.find_volume(name)
        assert volume is not None
        assert states.volume_state(view, volume)[0] is HealthState.OFFLINE
        force = world.conductor.forcing.force_accept
        shown = await force(name, wish(left, dry_run=True))
        assert shown.job is None
        assert world.conductor.view().shards == view.shards, "nothing was changed"
        done = await force(name, wish(left))
        assert done.job is not None
        await world.pump()
        view = world.conductor.view()
        assert states.volume_state(view, volume)[0] is HealthState.SINGLE_COPY
        assert view.volumes[volume.id].attach_epoch == 2, "who was attached is fenced"
        shards = view.shards
        again = await force(name, wish(left))
        assert again.job == done.job, "the same again is answered with the same record"
        await world.pump()
        assert world.conductor.view().shards == shards
        # The lost store comes back with a disk that holds nothing.
        lost_store = world.stores[gone]
        lost_store.sizes.clear()
        lost_store.confs.clear()
        lost_store.disk_uuid = "d" * 32
        await return_of(world, gone)
        await world.pump()
        world.check_rest()
        (made,) = [one for one in lost_store.told if isinstance(one, CreateReplica)][-1:]
        assert made.disk == "d" * 32
        conf = world.conductor.view().shards[volume.id, 0]
        assert next(one for one in conf.members if one.store == gone).disk == "d" * 32

    run(story())


def test_a_life_that_was_revoked_never_registers_again() -> None:
    async def story() -> None:
        world = World(stores=2)
        name, gone, left = await alone_then_lost(world)
        force = world.conductor.forcing.force_accept
        await force(name, wish(left))
        await world.pump()
        await return_of(world, gone)
        await world.pump()
        world.check_rest()
        # Now the other way round, and nobody sees the second end.
        conf = world.conductor.view().shards[1, 0]
        primary = conf.member(conf.primary).store
        other = gone if primary == left else left
        await leave(world, other)
        await world.pump()
        frozen = world.stores[primary].incarnation
        await leave(world, primary, is_seen=False)
        world.clock.ms += 10_000
        await return_of(world, other)
        await world.pump()
        error = await attempt(force(name, wish(other)))
        assert error is not None
        assert error.code is Code.UNSAFE
        done = await force(name, wish(other, revoke=True))
        assert done.revoked == [f"s{primary}"]
        await world.pump()
        error = await attempt(world.join(primary))
        assert error is not None, "the life that was frozen thaws"
        assert "reported to have ended" in error.message
        assert world.stores[primary].incarnation == frozen
        assert world.conductor.view().observation(primary).state is StoreState.OFFLINE
        world.stores[primary].session = None
        await return_of(world, primary)
        await world.pump()
        world.check_rest()

    run(story())


# --------------------------------------------------------------------------- from the command line

Command = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.mark.slow
async def test_a_person_decides_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(tmp_path) as served:
        command = commands_of(served, monkeypatch, capsys)
        async with served.store(1), served.store(2):
            await served.call("create_volume", CreateVolume(name="v1", size_bytes=GIB, replicas=2))
            shard = (await served.call("volume", "v1")).shards[0]
        left = next(one.store for one in shard.members if one.store != shard.primary)
        await decide(served, command, shard.primary, left)


async def decide(served: Served, command: Command, gone: int, left: int) -> None:
    """Let `gone` have been the last copy in sync, and go on with `left`."""
    arguments = ("volume", "force-accept", "v1", "--shard", "0", "--copy", f"s{left}")
    conf = served.conductor.view().shards[1, 0]
    copy = next(one.copy for one in conf.members if one.store == gone)
    alone = replace(conf, epoch=conf.epoch + 1, isr=(copy,))
    await served.conductor.records.commit([Write("shard/1/0", alone, "it went on alone")])
    served.conductor.observations.stores[gone] = StoreObservation(cause="silent")
    async with served.store(left):
        status, _, err = await command(*arguments, "--yes")
        assert status == Exit.UNSAFE, err
        assert "nobody has seen the end of its process" in err
        assert "--revoke" in err
        life = served.conductor.view().stores[gone].incarnation
        await served.call("store_exited", f"s{gone}", incarnation=life)
        status, out, err = await command(*arguments, "--dry-run")
        assert status == Exit.OK, err
        assert f"s{left} *" in out
        assert "What is lost: every write acknowledged after operation 0" in out
        assert out.endswith("nothing was changed\n")
        status, _, err = await command(*arguments)
        assert status == Exit.UNSAFE, "there is no terminal to ask on"
        assert served.conductor.view().shards[1, 0] == alone
        status, out, err = await command(*arguments, "--yes", "-o", "json")
        assert status == Exit.OK, err
        assert f"decided that the copy on s{left} counts" in json.loads(out)["job"]["reason"]
        assert "This cannot be undone." in err
        status, repeated, _ = await command(*arguments, "--yes")
        assert status == Exit.OK
        assert repeated.split()[:2] == ["job", str(json.loads(out)["job"]["id"])], "the same job"
        status, out, _ = await command("volume", "explain", "v1", "-o", "json")
        assert '"state": "forced"' in out
        status, _, err = await command(*arguments[:4], "7", *arguments[5:], "--yes")
        assert status == Exit.NOT_FOUND
        assert "v1 has no shard 7" in err
