"""Replicated volumes over real sockets: agents, conductor, API, around fake nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.fake_core import FakeStoreNode
from tests.support.server import Served, is_healthy, serving
from tests.support.views import Situation
from tests.support.world import GIB

from pureflash.conductor import planner, requests
from pureflash.errors import Code, PureFlashError
from pureflash.metastore.records import Write
from pureflash.model.domain import Job, JobState, ShardConf
from pureflash.model.messages import Verified
from pureflash.model.rest import CreateVolume

WAIT_S = 10.0

Cluster = tuple[Served, dict[int, FakeStoreNode], dict[int, AsyncExitStack]]


@asynccontextmanager
async def three_stores(folder: Path) -> AsyncIterator[Cluster]:
    """Serve a cluster of three stores with a volume `v1` of three replicas and one shard.

    Its primary is on store 2, which `ends[2].aclose()` ends, as any other.
    """
    async with serving(folder) as served, AsyncExitStack() as stack:
        nodes: dict[int, FakeStoreNode] = {}
        ends: dict[int, AsyncExitStack] = {}
        for number in (1, 2, 3):
            ends[number] = await stack.enter_async_context(AsyncExitStack())
            nodes[number] = await ends[number].enter_async_context(served.store(number))
        wish = CreateVolume(name="v1", size_bytes=GIB, replicas=3)
        made = await served.call("create_volume", wish)
        assert (made.id, made.state, made.replicas) == (1, "healthy", 3)
        yield served, nodes, ends


async def conf_at(served: Served, epoch: int) -> ShardConf:
    """Wait for an epoch of the shard of `v1`."""
    assert await served.conductor.wait_for(
        lambda view: view.shards[1, 0].epoch >= epoch, timeout_s=WAIT_S
    )
    conf = served.conductor.view().shards[1, 0]
    assert conf.epoch == epoch
    return conf


async def test_a_new_volume_is_on_all_three_and_they_know_one_another(tmp_path: Path) -> None:
    async with three_stores(tmp_path) as (served, nodes, _):
        stored = served.conductor.view().shards[1, 0]
        assert [node.conf(1, 0) for node in nodes.values()] == [stored] * 3
        roles = [replica["role"] for node in nodes.values() for replica in node.replicas()]
        assert sorted(roles) == ["active", "secondary", "secondary"]
        for node in nodes.values():
            assert [(store, address) for store, _, address in node.peers] == [
                (1, "127.0.0.1:7162"),
                (2, "127.0.0.1:7163"),
                (3, "127.0.0.1:7164"),
            ]
        (shard,) = (await served.call("volume", "v1")).shards
        assert (shard.isr, shard.primary, shard.learners) == ([1, 2, 3], 2, [])
        assert [one.role for one in shard.members] == ["secondary", "primary", "secondary"]


async def test_what_a_primary_proposes_is_stored_and_told(tmp_path: Path) -> None:
    async with three_stores(tmp_path) as (served, nodes, _):
        nodes[2].propose(1, 0, {"kind": "remove", "copy": 2})
        learning = await conf_at(served, 3)  # its store is there: T3 follows at once
        assert (learning.isr, learning.learners) == ((0, 1), (2,))
        assert await served.conductor.wait_for(
            lambda view: view.observation(2).replicas[1, 0].epoch == 3, timeout_s=WAIT_S
        )
        nodes[2].resyncs[1, 0] = [{"to": 3, "regions_left": 1, "regions_copied": 3}]
        assert await served.conductor.wait_for(
            lambda view: view.observation(2).replicas[1, 0].resyncs != (), timeout_s=WAIT_S
        )
        lines = await served.call("explain_volume", "v1")
        assert "s3 is being made equal, 3 of 4 regions copied (75 %)" in lines[1].reason
        life = learning.member(2).incarnation
        nodes[2].propose(1, 0, {"kind": "admit", "copy": 2, "incarnation": life})
        whole = await conf_at(served, 4)
        assert (whole.isr, whole.learners) == ((0, 1, 2), ())
        assert await served.conductor.wait_for(is_healthy, timeout_s=WAIT_S)
        assert nodes[1].conf(1, 0) == whole


async def test_a_replica_that_asks_is_sent_what_is_newer_and_nothing_else(tmp_path: Path) -> None:
    async with three_stores(tmp_path) as (served, nodes, _):
        sent: list[int] = []
        follow = nodes[1].set_conf

        def count(request_id: int, volume_id: int, index: int, conf: bytes) -> None:
            sent.append(request_id)
            follow(request_id, volume_id, index, conf)

        nodes[1].set_conf = count  # type: ignore[method-assign]
        nodes[1].ask_for_conf(1, 0, newer_than=1)
        nodes[1].ask_for_conf(1, 0, newer_than=0)
        nodes[2].propose(1, 0, {"kind": "transfer", "copy": 0})
        moved = await conf_at(served, 2)
        assert moved.primary == 0
        assert await served.conductor.wait_for(is_healthy, timeout_s=WAIT_S)
        assert len(sent) == 2, "one for the question about epoch 0, one for epoch 2"


async def test_an_exit_promotes_another_and_everybody_hears_that_the_life_is_over(
    tmp_path: Path,
) -> None:
    async with three_stores(tmp_path) as (served, nodes, ends):
        life = nodes[2].incarnation
        await ends[2].aclose()
        await served.call("store_exited", "s2", incarnation=life)
        after = await conf_at(served, 2)
        assert (after.primary, after.isr) == (0, (0, 2))
        assert await served.conductor.wait_for(
            lambda view: view.observation(1).replicas[1, 0].role == "active", timeout_s=WAIT_S
        )
        assert (2, life) in nodes[1].over & nodes[3].over


async def test_too_few_stores_are_named(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.store(1):
        with pytest.raises(
            PureFlashError, match=r"3 replicas need 3 stores; 1 online \(s1\)"
        ) as no:
            await served.call("create_volume", CreateVolume(name="v1", size_bytes=GIB, replicas=3))
        assert no.value.code is Code.UNAVAILABLE
        assert served.conductor.view().volumes == {}


@pytest.mark.parametrize(
    ("rf", "copies", "reason"),
    [
        (1, 1, "the only copy could be read"),
        (2, 1, "the only in-sync copy could be read"),
        (3, 2, "2 of 3 copies are in sync and equal"),
        (3, 3, "3 copies are equal"),
    ],
)
def test_a_verification_counts_the_copies_that_it_compared(
    rf: int, copies: int, reason: str
) -> None:
    situation = Situation(rf=rf, isr=tuple(range(copies)))
    job = requests.verify_job(situation.view(), situation.volume(), is_repairing=True)
    assert job is not None
    answer = Verified(id=1, term=1, regions=1024, copies=copies, different=(), unreadable=())
    view = replace(situation.view(), jobs={job.id: job}, verified={(job.id, 0): answer})
    (end,) = (
        one for one in planner.plan(view) if isinstance(one, Write) and isinstance(one.record, Job)
    )
    assert isinstance(end.record, Job)
    assert (end.record.state, end.record.reason) == (JobState.SUCCEEDED, reason)


async def test_a_verification_says_what_the_primary_found(tmp_path: Path) -> None:
    async with three_stores(tmp_path) as (served, nodes, _):

        async def verified() -> tuple[str, str, int]:
            job = await served.call("verify_volume", "v1")
            assert await served.conductor.wait_for(
                lambda view: view.jobs[job.id].is_finished, timeout_s=WAIT_S
            )
            ended = await served.call("job", job.id)
            return ended.state, ended.reason, ended.done

        assert await verified() == ("succeeded", "3 copies are equal", 1024)
        nodes[2].found = ([(7, 1)], [(9, 3), (10, 3)])
        state, reason, _ = await verified()
        assert state == "failed"
        assert reason == (
            "1 region(s) differ, the first: MiB 7 of shard 0 on s1; 2 region(s) cannot be read, the"
            " first: MiB 9 of shard 0 on s3"
        )


@pytest.mark.slow
async def test_a_verification_without_a_primary_waits_for_one(tmp_path: Path) -> None:
    async with three_stores(tmp_path) as (served, nodes, ends):
        await ends[2].aclose()
        job = await served.call("verify_volume", "v1")
        again = await served.call("verify_volume", "v1")
        assert again.id == job.id
        assert await served.conductor.wait_for(
            lambda view: view.jobs[job.id].is_finished, timeout_s=4 * WAIT_S
        )
        ended = await served.call("job", job.id)
        assert ended.state == "succeeded"
        assert nodes[2].is_closed


async def test_a_volume_has_a_copy_on_each_of_three_stores_unless_told_otherwise(
    tmp_path: Path,
) -> None:
    async with three_stores(tmp_path) as (served, _, _):
        made = await served.call("create_volume", CreateVolume(name="v2", size_bytes=GIB))
        assert made.replicas == 3
        one = CreateVolume(name="v3", size_bytes=GIB, replicas=1)
        assert (await served.call("create_volume", one)).replicas == 1
