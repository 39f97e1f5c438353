"""States of a shard: for each, its cause, what I/O does, and who leaves it; and what users see."""

from __future__ import annotations

from dataclasses import replace

import pytest
from msgspec import structs
from tests.support.views import EPOCH, Situation

from pureflash.cli.status import status_lines
from pureflash.conductor import explaining, health, states
from pureflash.conductor.view import used_bytes
from pureflash.model.domain import GIB, HealthState
from pureflash.model.messages import DiskReport, ResyncReport
from pureflash.model.rest import CapacityView, ClusterView

Row = tuple[str, Situation, HealthState, str, str, str]

ABOUT = "s2 is being made equal, about to begin"
COPYING = (ResyncReport(to=3, regions_left=30, regions_copied=10),)

START_OF = "the start of"
GOES_ON = "gives up what only the lost copies hold and goes on with"
ROWS: list[Row] = [
    ("all is well", Situation(), HealthState.HEALTHY, "", states.SERVED, ""),
    ("one replica", Situation(rf=1, isr=(0,)), HealthState.HEALTHY, "", states.SERVED, ""),
    (
        "a learner is copied",
        Situation(isr=(0, 1), learners=(2,)).tell(1, resyncs=COPYING),
        HealthState.DEGRADED,
        "2 of 3 copies in sync; s3 is being made equal, 10 of 40 regions copied (25 %)",
        states.SERVED,
        "the conductor, which has the missing copies made equal",
    ),
    (
        "a store is away and out",
        Situation(isr=(0, 1)).offline(3),
        HealthState.DEGRADED,
        "2 of 3 copies in sync; s3 is offline: its process ended",
        states.SERVED,
        "the start of s3, by a supervisor or a person; the rest happens by itself",
    ),
    (
        "a store is silent and out",
        Situation(isr=(0, 1)).suspected(3),
        HealthState.DEGRADED,
        "2 of 3 copies in sync; s3 is suspected: silent for more than 2250 ms",
        states.SERVED,
        "s3, when heard again; the rest happens by itself",
    ),
    (
        "a learner was given up",
        Situation(isr=(0, 1)).paused(2, for_ms=2_500),
        HealthState.DEGRADED,
        "2 of 3 copies in sync; s3 could not be made equal and is tried again in 3 s",
        states.SERVED,
        "the conductor, which has the missing copies made equal",
    ),
    (
        "its disk failed",
        Situation(isr=(0, 1)).failed_disk(3),
        HealthState.DEGRADED,
        "2 of 3 copies in sync; disk 0 of s3 failed: a flush failed",
        states.SERVED,
        "a person, who replaces a disk of s3; the rest happens by itself",
    ),
    (
        "one of the ISR does not answer",
        Situation().suspected(3),
        HealthState.DEGRADED,
        "3 of 3 copies in sync; s3 is suspected: silent for more than 2250 ms; it is in the ISR",
        states.MAY_PAUSE,
        "the primary, which takes it out of the ISR and goes on",
    ),
    (
        "one copy of two",
        Situation(rf=2, isr=(0,)),
        HealthState.SINGLE_COPY,
        "1 of 2 copies in sync; s2 waits to be made equal",
        states.SERVED,
        "the conductor, which has the missing copies made equal",
    ),
    (
        "below min_write",
        Situation(isr=(0,), learners=(1,)),
        HealthState.PARKED,
        f"1 of 3 copies in sync, a write needs 2; {ABOUT}; s3 is made equal after s2",
        states.WRITES_WAIT,
        "the conductor, which has the missing copies made equal",
    ),
    (
        "two are gone and writes wait",
        Situation(isr=(0,)).offline(2, 3),
        HealthState.PARKED,
        (
            "1 of 3 copies in sync, a write needs 2; s2 is offline: its process ended;"
            " s3 is offline: its process ended"
        ),
        states.WRITES_WAIT,
        "the start of s2 and s3, by a supervisor or a person; the rest happens by itself",
    ),
    (
        "one is gone and the other one's disk failed",
        Situation(isr=(0,)).offline(2).failed_disk(3),
        HealthState.PARKED,
        (
            "1 of 3 copies in sync, a write needs 2; s2 is offline: its process ended;"
            " disk 0 of s3 failed: a flush failed"
        ),
        states.WRITES_WAIT,
        (
            "a person, who replaces a disk of s3 and the start of s2, by a supervisor or a person;"
            " the rest happens by itself"
        ),
    ),
    (
        "a copy is not made yet",
        Situation().without_replica(3),
        HealthState.PARKED,
        "s3 is making it",
        states.WAIT,
        states.BY_ITSELF,
    ),
    (
        "the primary settles",
        Situation().tell(1, role="settling"),
        HealthState.PARKED,
        "s1 makes the last writes equal everywhere before it serves",
        states.WAIT,
        states.BY_ITSELF,
    ),
    (
        "the primary has not heard of its reign",
        Situation().tell(1, role="secondary", epoch=EPOCH - 1),
        HealthState.PARKED,
        "s1 follows epoch 4, and 5 is stored",
        states.WAIT,
        states.BY_ITSELF,
    ),
    (
        "the primary's store ended and another is there",
        Situation().offline(1),
        HealthState.PARKED,
        "s1 is offline: its process ended; another copy takes over",
        states.WAIT,
        "the conductor, which makes s2 primary",
    ),
    (
        "all restarted, one is not back",
        Situation().reborn(2, 3).offline(1),
        HealthState.PARKED,
        "s1 is offline: its process ended; s2 has restarted; s3 has restarted",
        states.WAIT,
        "the conductor, which opens it again with s2, s3 after up to 10 s for s1",
    ),
    (
        "the only copy is silent",
        Situation(isr=(0,)).suspected(1),
        HealthState.PARKED,
        "s1 is suspected: silent for more than 2250 ms",
        states.WAIT,
        "s1, when heard again",
    ),
    (
        "the only copy in sync is gone, the others do not count",
        Situation(isr=(0,)).offline(1),
        HealthState.OFFLINE,
        "s1 is offline: its process ended",
        states.WAIT,
        f"{START_OF} s1, or a person, who {GOES_ON} s2 or s3 (`pf volume force-accept`)",
    ),
    (
        "the only copy in sync is gone, and so are the others",
        Situation(isr=(0,)).offline(1, 2, 3),
        HealthState.OFFLINE,
        "s1 is offline: its process ended",
        states.WAIT,
        f"{START_OF} s1, by a supervisor or a person",
    ),
    (
        "the store of the only copy in sync is back on another disk",
        Situation(rf=2, isr=(0,)).reborn(1).without_replica(1),
        HealthState.OFFLINE,
        "s1 came back without its copy: its disk is another one",
        states.WAIT,
        f"a person, who puts the disk of s1 back, or {GOES_ON} s2 (`pf volume force-accept`)",
    ),
    (
        "every copy is gone",
        Situation(rf=2, isr=(0, 1)).offline(1, 2),
        HealthState.OFFLINE,
        "s1 is offline: its process ended; s2 is offline: its process ended",
        states.WAIT,
        f"{START_OF} s1 or s2, by a supervisor or a person",
    ),
    (
        "the only disk failed",
        Situation(rf=1, isr=(0,)).failed_disk(1),
        HealthState.OFFLINE,
        "disk 0 of s1 failed: a flush failed",
        states.WAIT,
        "a person, who brings the disk of s1 back",
    ),
]


@pytest.mark.parametrize(
    ("situation", "state", "cause", "io", "leaves_by"),
    [pytest.param(*row[1:], id=row[0]) for row in ROWS],
)
def test_a_shard_has_a_state_with_all_that_one_wants_to_know(
    situation: Situation, state: HealthState, cause: str, io: str, leaves_by: str
) -> None:
    view, volume = situation.view(), situation.volume()
    assert states.judge_shard(view, volume, 0) == states.Verdict(state, cause, io, leaves_by)
    shown = states.volume_view(view, volume)
    assert (shown.state, shown.io, shown.leaves_by) == (state, io, leaves_by)
    assert shown.reason == (f"shard 0: {cause}" if cause else "")
    shard = shown.shards[0]
    assert (shard.state, shard.reason, shard.io, shard.leaves_by) == (state, cause, io, leaves_by)
    codes = {finding.code for finding in health.findings(view)}
    expected = {
        HealthState.DEGRADED: "VOLUME_DEGRADED",
        HealthState.SINGLE_COPY: "VOLUME_SINGLE_COPY",
        HealthState.PARKED: "VOLUME_PARKED",
        HealthState.OFFLINE: "VOLUME_OFFLINE",
    }
    assert {code for code in codes if code.startswith("VOLUME_")} == (
        {expected[state]} if state in expected else set()
    )


def test_every_copy_is_shown_with_its_role_and_progress() -> None:
    situation = Situation(isr=(0, 1), learners=(2,)).tell(1, resyncs=COPYING)
    (shard,) = states.volume_view(situation.view(), situation.volume()).shards
    assert [(one.name, one.role, one.reason) for one in shard.members] == [
        ("s1", "primary", ""),
        ("s2", "secondary", ""),
        ("s3", "learner", "s3 is being made equal, 10 of 40 regions copied (25 %)"),
    ]
    assert [(one.regions_left, one.regions_copied) for one in shard.members] == [
        (None, None),
        (None, None),
        (30, 10),
    ]
    assert (shard.primary, shard.isr, shard.learners) == (1, [1, 2], [3])
    lines = explaining.explain(situation.view(), situation.volume())
    assert [(line.subject, line.state) for line in lines] == [
        ("v1", "degraded"),
        ("v1/0", "degraded"),
        ("v1/0/s1", "primary"),
        ("v1/0/s2", "secondary"),
        ("v1/0/s3", "learner"),
    ]
    assert lines[1].reason.startswith("primary on s1, in sync s1 s2, learning s3, epoch 5; 2 of 3")
    assert "I/O: reads and writes are served; leaves by: the conductor" in lines[1].reason


def test_the_status_says_why_a_store_has_replicas_that_are_out() -> None:
    situation = Situation(isr=(0, 1), learners=(2,)).tell(1, resyncs=COPYING)
    view = situation.view()
    shown = [states.store_view(view, store) for store in view.stores.values()]
    assert [(one.replicas, one.replicas_out) for one in shown] == [(1, 0), (1, 0), (1, 1)]
    assert shown[2].out_reason == "1 being made equal; 30 regions left"
    seen = ClusterView(
        cluster_id="ab" * 16,
        state="degraded",
        sentence="A sentence.",
        term=1,
        lineage="0",
        revision=1,
        capacity=CapacityView(
            raw_bytes=30 * GIB,
            usable_bytes=28 * GIB,
            used_bytes=0,
            promised_bytes=3 * GIB,
            after_one_loss_bytes=19 * GIB,
            overcommit_ratio=1.0,
        ),
        stores=shown,
        gateways=[],
        volumes_by_state={"degraded": 1},
        exports=0,
        running_jobs=[],
        counters={},
        health=health.findings(view),
    )
    lines = status_lines(seen, "127.0.0.1:7180", [])
    assert any(line.split()[:1] == ["s3"] and "1 (1 out)" in line for line in lines)
    assert "  REPLICAS_OUT s3: 1 being made equal; 30 regions left" in lines


@pytest.mark.parametrize(
    ("situation", "state", "sentence"),
    [
        (Situation(), HealthState.HEALTHY, "Everything is as it should be."),
        (
            Situation(isr=(0, 1)).offline(3),
            HealthState.DEGRADED,
            "A store node is not there; its copies are out of reach: s3 (1 more below).",
        ),
        (
            Situation(isr=(0, 1)).failed_disk(3),
            HealthState.DEGRADED,
            "A disk is not served: missing, not readable, or stopped: s3 disk 0 (2 more below).",
        ),
        (
            Situation(isr=(0,)).offline(1),
            HealthState.OFFLINE,
            "A store node is not there; its copies are out of reach: s1 (3 more below).",
        ),
    ],
)
def test_a_cluster_is_offline_only_if_something_is_not_served(
    situation: Situation, state: HealthState, sentence: str
) -> None:
    view = situation.view()
    found = health.findings(view)
    assert health.cluster_state(view, found) == (state, sentence)


def test_a_cluster_without_any_store_there_is_offline_even_without_volumes() -> None:
    view = replace(Situation().offline(1, 2, 3).view(), volumes={}, shards={})
    state, _ = health.cluster_state(view, health.findings(view))
    assert state is HealthState.OFFLINE


@pytest.mark.parametrize(
    ("situation", "why"),
    [
        (Situation(isr=(0, 1)), "1 waiting to be made equal"),
        (Situation(isr=(0, 1)).paused(2, for_ms=1), "1 paused after an attempt that was given up"),
        (Situation(isr=(0, 1)).failed_disk(3), "1 on a failed disk"),
        (Situation(isr=(0, 1)).offline(3), ""),
        (Situation(), ""),
    ],
)
def test_a_store_says_why_its_replicas_are_out(situation: Situation, why: str) -> None:
    view = situation.view()
    assert states.store_view(view, view.stores[3]).out_reason == why


def test_the_reserve_of_a_disk_is_not_shown_as_used() -> None:
    report = DiskReport(
        index=0, state="online", reason="", engine="mem", bytes_total=100 * GIB, bytes_free=95 * GIB
    )
    assert used_bytes(report) == 0
    assert used_bytes(structs.replace(report, bytes_free=90 * GIB)) == 5 * GIB
    assert used_bytes(structs.replace(report, bytes_free=96 * GIB)) == 0, "an empty disk, rounded"
