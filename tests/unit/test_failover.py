"""Every rule of the failover planner, each as a situation and the configuration that it makes.

The guards themselves are the core's and are tested there; here is which transition is chosen, when,
and whom it names (docs/internals/replication.md, sections 2 and 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from tests.support.views import EPOCH, KEY, NOW_MS, Situation, life_of

from pureflash.conductor.failover import GATHER_MS, START_MS, plan_failover
from pureflash.metastore import keys
from pureflash.model.conf import Admit, Cancel, Promote, Remove, Transfer
from pureflash.model.domain import ShardConf, VolumeIntent
from pureflash.testing.model.conf import step_name


@dataclass(frozen=True)
class Becomes:
    """What is planned: a transition, what it leaves, and the lives of members that are new."""

    name: str
    primary: int
    isr: tuple[int, ...]
    learners: tuple[int, ...] = ()
    new_lives: tuple[int, ...] = ()


def planned(situation: Situation) -> Becomes | None:
    """Give what the planner wants to store."""
    writes = list(plan_failover(situation.view()))
    if not writes:
        return None
    (write,) = writes
    after, before = write.record, situation.conf()
    assert write.key == keys.shard(*KEY)
    assert write.reason
    assert isinstance(after, ShardConf)
    assert after.epoch == EPOCH + 1
    name = step_name(before, after)
    assert name is not None, "a second opinion agrees that this is a step"
    new_lives = tuple(
        one.copy for one in after.members if one.incarnation != before.member(one.copy).incarnation
    )
    for one in after.members:
        if one.copy in new_lives:
            assert one.incarnation == situation.lives[one.store], "the registered life, no other"
    return Becomes(name, after.primary, after.isr, after.learners, new_lives)


Row = tuple[str, Situation, Becomes | None]


def alone() -> Situation:
    """Copy 0 is all that is left of three."""
    return Situation(isr=(0,))


def pair() -> Situation:
    """Copy 2 is out."""
    return Situation(isr=(0, 1))


def learning() -> Situation:
    """Copy 2 is being made equal."""
    return Situation(isr=(0, 1), learners=(2,))


REMOVED: list[Row] = [
    ("a restarted secondary", Situation().reborn(3), Becomes("T1", 0, (0, 1))),
    ("one at a time", Situation().reborn(2, 3), Becomes("T1", 0, (0, 2))),
    ("not one that is silent: its primary knows better", Situation().suspected(3), None),
    ("not one whose process ended, either", Situation().offline(3), None),
    ("not the last that is there", pair().reborn(1).offline(2), None),
]

PROMOTED: list[Row] = [
    ("when the primary is silent", Situation().suspected(1), Becomes("T2", 1, (1, 2))),
    ("when its process ended", Situation().offline(1), Becomes("T2", 1, (1, 2))),
    ("when its store has restarted", Situation().reborn(1), Becomes("T2", 1, (1, 2))),
    ("when its disk failed", Situation().failed_disk(1), Becomes("T2", 1, (1, 2))),
    (
        "the one that knows most",
        Situation().offline(1).tell(2, complete_seq=3).tell(3, complete_seq=4),
        Becomes("T2", 2, (1, 2)),
    ),
    (
        "one that is there, although another knows more",
        Situation().offline(1).tell(2, complete_seq=9).suspected(2),
        Becomes("T2", 2, (1, 2)),
    ),
    (
        "one with a disk that works",
        Situation().offline(1).failed_disk(2),
        Becomes("T2", 2, (1, 2)),
    ),
    (
        "one that has the replica",
        Situation().offline(1).without_replica(2),
        Becomes("T2", 2, (1, 2)),
    ),
    (
        "one in the life that the configuration means",
        Situation().offline(1).reborn(2),
        Becomes("T2", 2, (1, 2)),
    ),
    (
        "never one outside the ISR",
        alone().offline(1),
        None,
    ),
    (
        "not before a new conductor has heard of the primary's store",
        Situation(started_ms=NOW_MS - START_MS + 1).unheard(1),
        None,
    ),
    (
        "but not later than this, either",
        Situation(started_ms=NOW_MS - START_MS).unheard(1),
        Becomes("T2", 1, (1, 2)),
    ),
    (
        "before anything else",
        Situation().offline(1).reborn(3).asks(1, Remove(copy=1)),
        Becomes("T2", 1, (1, 2)),
    ),
]

REOPENED: list[Row] = [
    (
        "as soon as all are back",
        Situation().reborn(1, 2, 3).tell(2, complete_seq=8).tell(3, complete_seq=8),
        Becomes("T6", 1, (0, 1, 2), (), (0, 1, 2)),
    ),
    (
        "without those that do not come back in time",
        Situation().reborn(2, waited_ms=GATHER_MS).reborn(3, waited_ms=1).offline(1),
        Becomes("T6", 1, (1, 2), (), (1, 2)),
    ),
    ("not before that", Situation().reborn(2, 3, waited_ms=GATHER_MS - 1).offline(1), None),
    (
        "at once when the ISR had one member",
        alone().reborn(1),
        Becomes("T6", 0, (0,), (), (0,)),
    ),
    (
        "with one replica",
        Situation(rf=1, isr=(0,)).reborn(1),
        Becomes("T6", 0, (0,), (), (0,)),
    ),
    (
        "and what learners had does not count",
        Situation(rf=3, isr=(0,), learners=(1,)).reborn(1, 2),
        Becomes("T6", 0, (0,), (), (0,)),
    ),
    ("not of those that were out", alone().offline(1).reborn(2, 3), None),
    (
        "without a failed disk",
        pair().reborn(1, 2).failed_disk(1),
        Becomes("T6", 1, (1,), (), (1,)),
    ),
    ("not with failed disks only", alone().reborn(1).failed_disk(1), None),
    (
        "not while one of the ISR is there in its life",
        Situation().reborn(1, 2, waited_ms=GATHER_MS),
        Becomes("T2", 2, (1, 2)),
    ),
    ("not of a store that is silent again", alone().reborn(1).suspected(1), None),
    ("not before a store has its replica", alone().reborn(1).without_replica(1), None),
]

PROPOSED: list[Row] = [
    (
        "T1 by the primary",
        Situation().asks(1, Remove(copy=2)),
        Becomes("T1", 0, (0, 1)),
    ),
    ("T1 by nobody else", Situation().asks(2, Remove(copy=2)), None),
    (
        "T2 by the one that is to be it",
        Situation().asks(3, Promote(copy=2)),
        Becomes("T2", 2, (1, 2)),
    ),
    (
        "T2 by the primary, whose disk fails",
        Situation().asks(1, Promote(copy=1)),
        Becomes("T2", 1, (1, 2)),
    ),
    ("T2 of one that is not there", Situation().offline(2).asks(1, Promote(copy=1)), None),
    (
        "T4 of the life that was made equal",
        learning().asks(1, Admit(copy=2, incarnation=life_of(3))),
        Becomes("T4", 0, (0, 1, 2)),
    ),
    ("T4 of no other life", learning().asks(1, Admit(copy=2, incarnation=9)), None),
    ("T4 by the primary only", learning().asks(3, Admit(copy=2, incarnation=31)), None),
    ("T5 by the primary", Situation().asks(1, Transfer(copy=1)), Becomes("T5", 1, (0, 1, 2))),
    ("T8 by the primary", learning().asks(1, Cancel(copy=2)), Becomes("T8", 0, (0, 1))),
    ("of another epoch", Situation().asks(1, Remove(copy=2), epoch=EPOCH - 1), None),
    ("of another life", Situation().asks(1, Remove(copy=2), life=life_of(1) + 1), None),
    (
        "a refused one does not stand in the way of the next",
        Situation().asks(2, Remove(copy=2)).asks(1, Remove(copy=2)),
        Becomes("T1", 0, (0, 1)),
    ),
]

CANCELLED: list[Row] = [
    ("a learner that restarted", learning().reborn(3), Becomes("T8", 0, (0, 1))),
    ("a learner that ended", learning().offline(3), Becomes("T8", 0, (0, 1))),
    ("a silent learner", learning().suspected(3), Becomes("T8", 0, (0, 1))),
    ("not one that is there", learning(), None),
]

ADDED: list[Row] = [
    ("one that is there", pair(), Becomes("T3", 0, (0, 1), (2,))),
    ("in its new life", pair().reborn(3), Becomes("T3", 0, (0, 1), (2,), (2,))),
    ("one at a time", alone(), Becomes("T3", 0, (0,), (1,))),
    ("and no second one beside it", Situation(rf=3, isr=(0,), learners=(1,)), None),
    (
        "the next, when the first is not there",
        alone().offline(2),
        Becomes("T3", 0, (0,), (2,)),
    ),
    ("not a silent one", pair().suspected(3), None),
    ("not one with a failed disk", pair().failed_disk(3), None),
    ("not one without its replica", pair().without_replica(3), None),
    ("not one that was just given up", pair().paused(2, for_ms=1), None),
    (
        "one whose pause is over",
        pair().paused(2, for_ms=0),
        Becomes("T3", 0, (0, 1), (2,)),
    ),
    (
        "the other during a pause",
        alone().paused(1, for_ms=9),
        Becomes("T3", 0, (0,), (2,)),
    ),
]

QUIET: list[Row] = [
    ("all is well", Situation(), None),
    ("the volume is deleted", Situation(intent=VolumeIntent.DELETING).reborn(1, 2, 3), None),
    ("everything is gone", Situation().offline(1, 2, 3), None),
]

TABLES = {
    "remove": REMOVED,
    "promote": PROMOTED,
    "reopen": REOPENED,
    "propose": PROPOSED,
    "cancel": CANCELLED,
    "add": ADDED,
    "nothing": QUIET,
}
ROWS = [
    pytest.param(situation, expected, id=f"{table}: {name}")
    for table, rows in TABLES.items()
    for name, situation, expected in rows
]


@pytest.mark.parametrize(("situation", "expected"), ROWS)
def test_the_most_urgent_transition_is_planned(
    situation: Situation, expected: Becomes | None
) -> None:
    assert planned(situation) == expected
