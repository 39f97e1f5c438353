"""Which disks are slow and what is done about them: `slow` on its own, on a clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import msgspec
import pytest
from tests.support.views import KEY, NOW_MS, Situation

from pureflash.conductor import health, slow, states
from pureflash.conductor.balance import plan_balance
from pureflash.conductor.disk_states import disk_views
from pureflash.conductor.disks import changes
from pureflash.conductor.failover import plan_failover
from pureflash.conductor.pace import Pace, Stage
from pureflash.conductor.planner import plan
from pureflash.conductor.slow import (
    DEMOTE_MS,
    DEMOTE_PAUSE_MS,
    EVEN_MS,
    FORGET_MS,
    GAP_MS,
    MOVES_MAX,
    OPERATIONS_MIN,
    PAUSE_MS,
    SLOW_MS,
    STRIKES_KEPT_MS,
)
from pureflash.conductor.tell import Tell
from pureflash.conductor.view import View
from pureflash.model.conf import Cancel
from pureflash.model.domain import Disk, HealthState, ShardConf
from pureflash.model.messages import DiskLatency, TransferPrimary
from pureflash.testing.model.conf import step_name

FLOOR_US = 20_000
TICK_MS = 1_000
QUICK = DiskLatency(write_ewma_us=3_000, write_p99_us=9_000, writes=100)
LATE = DiskLatency(write_ewma_us=200_000, write_p99_us=400_000, writes=20)
IDLE = DiskLatency()
LONG_AGO_MS = -DEMOTE_PAUSE_MS


def writes(ewma_us: int, p99_us: int, *, count: int = 100) -> DiskLatency:
    """Make figures of writes."""
    return DiskLatency(write_ewma_us=ewma_us, write_p99_us=p99_us, writes=count)


def reads(ewma_us: int, p99_us: int, *, count: int = 100) -> DiskLatency:
    """Make figures of reads, beside writes that are quick."""
    return msgspec.structs.replace(QUICK, read_ewma_us=ewma_us, read_p99_us=p99_us, reads=count)


def uuid_of(store: int) -> str:
    """Name the disk of a store, as `views` does."""
    return f"{store:032x}"


@dataclass
class Story:
    """A situation over time: every tick the stores report, and all disks are judged."""

    situation: Situation = field(default_factory=lambda: Situation(started_ms=LONG_AGO_MS))
    figures: dict[int, DiskLatency | None] = field(default_factory=dict)
    paces: Mapping[str, Pace] = field(default_factory=dict)
    now_ms: int = NOW_MS
    floor_us: int = FLOOR_US
    alter: Callable[[View], View] = lambda view: view

    def view(self) -> View:
        """Give what the conductor sees now."""
        for store, seen in self.situation.seen.items():
            if 0 in seen.disks:
                latency = self.figures.get(store, QUICK)
                report = msgspec.structs.replace(seen.disks[0], latency=latency)
                self.situation.change(store, disks={0: report})
        view = replace(self.situation.view(), now_ms=self.now_ms, paces=self.paces)
        return self.alter(view)

    def lasts(self, ms: int) -> Story:
        """Let time pass."""
        for _ in range(0, ms, TICK_MS):
            self.now_ms += TICK_MS
            self.paces = slow.judge(self.paces, self.view(), floor_us=self.floor_us)
        return self

    def late(self, *stores: int, figures: DiskLatency = LATE) -> Story:
        """Let disks be late from now on."""
        self.figures.update(dict.fromkeys(stores, figures))
        return self

    def stages(self) -> list[Stage]:
        """Give the stages of all disks, by store."""
        return [self.paces[uuid_of(store)].stage for store in sorted(self.situation.lives)]

    def planned(self) -> tuple[str, ShardConf] | None:
        """Give the transition that is planned and the configuration that it makes."""
        writes = list(plan_failover(self.view()))
        if not writes:
            return None
        after = writes[0].record
        assert isinstance(after, ShardConf)
        name = step_name(self.situation.conf(), after)
        assert name is not None, "a second opinion agrees that this is a step"
        return name, after

    def take(self) -> str:
        """Store what is planned; gives its name."""
        planned = self.planned()
        assert planned is not None
        name, after = planned
        self.situation.isr, self.situation.learners = after.isr, after.learners
        self.situation.primary = after.primary
        for copy in range(self.situation.rf):
            role = "learner" if copy in after.learners else "out"
            role = "secondary" if copy in after.isr else role
            self.situation.tell(copy + 1, role="active" if copy == after.primary else role)
        return name


def moves(view: View) -> list[tuple[int, int, int]]:
    """Give (store, shard, to) of the requests to hand over."""
    found: list[tuple[int, int, int]] = []
    for tell in slow.plan_moves(view):
        assert isinstance(tell.command, TransferPrimary)
        assert tell.reason
        found.append((tell.store, tell.command.index, tell.command.to))
    return found


def slow_for(ms: int, store: int = 3, **situation: object) -> Story:
    """Tell of a disk that was found slow `ms` ago."""
    story = Story(Situation(started_ms=LONG_AGO_MS, **situation))  # type: ignore[arg-type]
    story.late(store).lasts(SLOW_MS + TICK_MS)
    assert story.paces[uuid_of(store)].stage is Stage.SLOW
    return story.lasts(ms)


EVEN, SLOW, DEMOTED = Stage.EVEN, Stage.SLOW, Stage.DEMOTED


@pytest.mark.parametrize(
    ("what", "figures", "expected"),
    [
        ("one of three", {3: LATE}, [EVEN, EVEN, SLOW]),
        ("two of three: then it is no odd one", {2: LATE, 3: LATE}, [EVEN, EVEN, EVEN]),
        ("all", {1: LATE, 2: LATE, 3: LATE}, [EVEN, EVEN, EVEN]),
        ("all idle", dict.fromkeys((1, 2, 3), IDLE), [EVEN, EVEN, EVEN]),
        ("nobody has measured", dict.fromkeys((1, 2, 3)), [EVEN, EVEN, EVEN]),
        ("one of two that are busy", {2: IDLE, 3: LATE}, [EVEN, EVEN, EVEN]),
        (
            "too few operations",
            {3: writes(200_000, 400_000, count=OPERATIONS_MIN - 1)},
            [EVEN, EVEN, EVEN],
        ),
        (
            "as few as a second each leaves",
            {3: writes(1_000_000, 1_500_000, count=OPERATIONS_MIN)},
            [EVEN, EVEN, SLOW],
        ),
        ("a long tail only", {3: writes(3_000, 900_000)}, [EVEN, EVEN, EVEN]),
        ("a high mean only", {3: writes(30_000, 30_000)}, [EVEN, EVEN, EVEN]),
        ("below the floor", {3: writes(20_000, 400_000)}, [EVEN, EVEN, EVEN]),
        ("just above it", {3: writes(20_001, 36_001)}, [EVEN, EVEN, SLOW]),
        (
            "peers that are old disks, too",
            {1: writes(60_000, 90_000), 2: writes(50_000, 150_000), 3: LATE},
            [EVEN, EVEN, EVEN],
        ),
        (
            "reads",
            {1: reads(200_000, 300_000), 2: reads(1_000, 2_000), 3: reads(1_000, 2_000)},
            [SLOW, EVEN, EVEN],
        ),
        ("reads that nobody else does", {1: reads(200_000, 300_000)}, [EVEN, EVEN, EVEN]),
    ],
)
def test_a_disk_is_slow_beside_its_peers(
    what: str, figures: dict[int, DiskLatency | None], expected: list[Stage]
) -> None:
    story = Story(figures=figures).lasts(SLOW_MS + TICK_MS)
    assert story.stages() == expected, what


def test_it_has_to_last() -> None:
    story = Story().late(3).lasts(SLOW_MS)
    assert story.stages() == [EVEN, EVEN, EVEN]
    assert story.lasts(TICK_MS).stages() == [EVEN, EVEN, SLOW]
    story = Story().late(3).lasts(SLOW_MS).late(3, figures=QUICK).lasts(TICK_MS)
    assert story.late(3).lasts(SLOW_MS).stages() == [EVEN, EVEN, EVEN], "it begins anew"
    story = Story().late(3).lasts(SLOW_MS).late(3, figures=IDLE).lasts(GAP_MS)
    assert story.late(3).lasts(TICK_MS).stages() == [EVEN, EVEN, EVEN], "nobody knows what was"


def test_nothing_is_judged_when_it_is_switched_off() -> None:
    story = Story(floor_us=0).late(3).lasts(SLOW_MS + DEMOTE_MS)
    assert story.paces == {}
    story = slow_for(0)
    story.floor_us = 0
    assert story.lasts(TICK_MS).paces == {}


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("its store is silent", lambda situation: situation.suspected(3)),
        ("it has failed, which is another matter", lambda situation: situation.failed_disk(3)),
    ],
)
def test_only_disks_that_serve_are_judged(why: str, change: Callable[[Situation], object]) -> None:
    story = Story().late(3)
    change(story.situation)
    assert story.lasts(SLOW_MS + TICK_MS).stages() == [EVEN, EVEN, EVEN], why


def test_a_disk_that_is_filled_is_busy_unless_it_was_slow_before() -> None:
    story = Story(Situation(isr=(0, 1), learners=(2,), started_ms=LONG_AGO_MS)).late(3)
    assert story.lasts(SLOW_MS + TICK_MS).stages() == [EVEN, EVEN, EVEN]
    story.paces = {uuid_of(3): replace(story.paces[uuid_of(3)], strikes=1)}
    assert story.lasts(SLOW_MS + TICK_MS).stages() == [EVEN, EVEN, SLOW]
    assert story.planned() is not None
    assert story.take() == "T8", "and what fills it is ended"
    assert story.planned() is None


def test_a_slow_disk_is_even_again_after_it_was_near_its_peers_for_a_while() -> None:
    story = slow_for(0).late(3, figures=QUICK).lasts(EVEN_MS)
    assert story.stages() == [EVEN, EVEN, SLOW]
    assert story.lasts(TICK_MS).stages() == [EVEN, EVEN, EVEN]
    assert story.paces[uuid_of(3)].strikes == 1
    story.late(3).lasts(SLOW_MS + TICK_MS).late(3, figures=QUICK)
    assert story.lasts(2 * EVEN_MS).stages() == [EVEN, EVEN, SLOW], "the second time twice that"
    assert story.lasts(TICK_MS).stages() == [EVEN, EVEN, EVEN]
    story.now_ms += STRIKES_KEPT_MS
    assert story.lasts(TICK_MS).paces[uuid_of(3)].strikes == 0


def test_between_near_and_far_nothing_changes() -> None:
    between = writes(30_000, 60_000)
    peers: dict[int, DiskLatency | None] = dict.fromkeys((1, 2), writes(10_000, 20_000))
    story = Story(figures=peers | {3: between}).lasts(SLOW_MS + TICK_MS)
    assert story.stages() == [EVEN, EVEN, EVEN]
    story = slow_for(0)
    story.figures.update(peers | {3: between})
    assert story.lasts(2 * EVEN_MS).stages()[2].value != "even"


def test_what_was_slow_with_reads_is_not_even_because_writes_are_quick() -> None:
    story = Story().late(1, figures=reads(200_000, 300_000))
    story.late(2, 3, figures=reads(1_000, 2_000)).lasts(SLOW_MS + TICK_MS)
    assert story.stages() == [SLOW, EVEN, EVEN]
    story.late(1, figures=QUICK)  # its primaries have moved: nobody reads from it any more
    assert story.lasts(2 * EVEN_MS).stages() == [SLOW, EVEN, EVEN]
    assert story.lasts(FORGET_MS).stages() == [EVEN, EVEN, EVEN]


# Primaries.


def test_a_primary_on_a_slow_disk_hands_over() -> None:
    story = slow_for(0, store=1)
    assert moves(story.view()) == [(1, 0, 1)]
    assert [tell for tell in plan(story.view()) if isinstance(tell, Tell)], "and it is planned"


@pytest.mark.parametrize(
    ("why", "story"),
    [
        ("a secondary is slow", slow_for(0)),
        ("nobody else has a copy", slow_for(0, store=1, isr=(0,))),
    ],
)
def test_nobody_is_asked_when(why: str, story: Story) -> None:
    assert moves(story.view()) == [], why


def test_who_is_asked_is_there_and_who_takes_over_is_good() -> None:
    troubles: list[Callable[[Situation], object]] = [
        lambda situation: situation.tell(1, role="settling"),
        lambda situation: situation.tell(1, verifying=(1, 2)),
        lambda situation: situation.suspected(1),
        lambda situation: situation.suspected(2, 3),
    ]
    for change in troubles:
        story = slow_for(0, store=1)
        change(story.situation)
        assert moves(story.view()) == []
    story = slow_for(0, store=1)
    story.situation.suspected(2)
    assert moves(story.view()) == [(1, 0, 2)]
    story = slow_for(0, store=1)
    story.paces = dict(story.paces) | {uuid_of(2): story.paces[uuid_of(1)]}
    assert moves(story.view()) == [(1, 0, 2)], "from one slow disk to another is no help"


def many(view: View, count: int = 2 * MOVES_MAX) -> View:
    """Give shards like the situation's one."""
    conf = view.shards[KEY]
    observed = {
        store: replace(
            seen,
            replicas={
                (KEY[0], index): msgspec.structs.replace(report, index=index)
                for report in seen.replicas.values()
                for index in range(count)
            },
        )
        for store, seen in view.observed.items()
    }
    shards = {(KEY[0], index): replace(conf, index=index) for index in range(count)}
    return replace(view, shards=shards, observed=observed)


def test_some_at_a_time_are_asked_and_spread_over_the_others() -> None:
    story = slow_for(0, store=1)
    view = many(story.view())
    asked = moves(view)
    assert len(asked) == MOVES_MAX
    assert sorted(to for _, _, to in asked) == [1] * (MOVES_MAX // 2) + [2] * (MOVES_MAX // 2)
    in_flight = frozenset((1, "TransferPrimary", KEY[0], index) for _, index, _ in asked)
    others = moves(replace(view, in_flight=in_flight))
    assert {index for _, index, _ in others}.isdisjoint({index for _, index, _ in asked})
    assert moves(replace(view, transferred_ms=view.now_ms - PAUSE_MS + 1)) == []
    assert len(moves(replace(view, transferred_ms=view.now_ms - PAUSE_MS))) == MOVES_MAX


def test_balance_gives_nothing_to_a_slow_disk() -> None:
    for store, is_calm in ((3, False), (None, True)):
        story = slow_for(0) if store else Story().lasts(TICK_MS)
        view = replace(many(story.view(), 3), balance_after_ms=1_000, started_ms=LONG_AGO_MS)
        assert bool(list(plan_balance(view))) == is_calm


def test_a_failover_prefers_a_disk_that_is_not_slow() -> None:
    story = slow_for(0, store=2)
    story.situation.offline(1)
    planned = story.planned()
    assert planned is not None
    assert (planned[0], planned[1].primary) == ("T2", 2)
    story.situation.offline(3)
    planned = story.planned()
    assert planned is not None
    assert (planned[0], planned[1].primary) == ("T2", 1), "a slow one is better than none"


# Demotion.


def test_a_secondary_is_demoted_after_a_minute_and_kept_out() -> None:
    story = slow_for(DEMOTE_MS - TICK_MS)
    assert story.stages() == [EVEN, EVEN, SLOW]
    assert story.planned() is None
    assert story.lasts(TICK_MS).stages() == [EVEN, EVEN, DEMOTED]
    assert story.take() == "T1"
    assert story.situation.isr == (0, 1)
    assert story.planned() is None, "it is not taken back at once"
    # Nothing goes to it any more, so nothing is measured.
    story.late(3, figures=IDLE).lasts(FORGET_MS - TICK_MS)
    assert story.planned() is None
    story.lasts(2 * TICK_MS)
    assert story.stages() == [EVEN, EVEN, EVEN]
    assert story.take() == "T3", "then it is tried again"


def test_a_quick_operation_now_and_then_does_not_put_the_trial_off() -> None:
    story = slow_for(DEMOTE_MS)
    assert story.take() == "T1"
    for _ in range(FORGET_MS // (10 * TICK_MS)):
        story.late(3, figures=QUICK).lasts(TICK_MS).late(3, figures=IDLE).lasts(9 * TICK_MS)
    assert story.stages() == [EVEN, EVEN, EVEN]


def test_a_copy_comes_back_when_its_disk_is_measured_to_be_even() -> None:
    story = slow_for(DEMOTE_MS)
    assert story.take() == "T1"
    story.late(3, figures=QUICK).lasts(EVEN_MS)  # it has other replicas
    assert story.planned() is None
    story.lasts(TICK_MS)
    assert story.take() == "T3"


def test_a_disk_that_still_leads_what_others_could_lead_is_not_demoted() -> None:
    story = slow_for(2 * DEMOTE_MS, store=1)
    assert story.stages() == [SLOW, EVEN, EVEN]
    story.situation.primary = 1
    assert story.lasts(DEMOTE_MS).stages() == [SLOW, EVEN, EVEN]
    assert story.lasts(TICK_MS).stages() == [DEMOTED, EVEN, EVEN]
    assert story.take() == "T1"
    assert story.situation.isr == (1, 2)


def test_a_disk_that_is_not_late_any_more_is_not_demoted() -> None:
    story = slow_for(DEMOTE_MS - TICK_MS).late(3, figures=QUICK)
    assert story.lasts(4 * TICK_MS).stages() == [EVEN, EVEN, SLOW]
    story = slow_for(DEMOTE_MS - GAP_MS - TICK_MS).late(3, figures=IDLE)
    assert story.lasts(DEMOTE_MS).stages() == [EVEN, EVEN, SLOW], "nor one that is idle now"


@pytest.mark.parametrize(
    ("why", "changes"),
    [
        ("of two copies none can be spared", {"rf": 2, "isr": (0, 1)}),
        ("nor the only one", {"rf": 1, "isr": (0,)}),
        ("nor one of the last two", {"isr": (0, 2)}),
    ],
)
def test_a_slow_copy_is_better_than_a_single_one(why: str, changes: dict[str, object]) -> None:
    situation = Situation(started_ms=LONG_AGO_MS, **changes)  # type: ignore[arg-type]
    view = situation.view()
    late = situation.isr[-1] + 1
    pace = Pace(
        since_ms=0, judged_ms=NOW_MS, late_ms=NOW_MS, stage=Stage.SLOW, idle_ms=0, kind="writes"
    )
    story = Story(situation, paces=dict.fromkeys([uuid_of(late)], pace)).late(late)
    assert view.shards[KEY].isr == situation.isr
    story.lasts(TICK_MS)
    assert story.paces[uuid_of(late)].stage is Stage.SLOW, why
    story.paces = dict(story.paces) | {uuid_of(late): replace(pace, stage=Stage.DEMOTED)}
    planned = story.planned()
    assert planned is None or planned[0] == "T3", f"{why}, whatever its stage"


def test_one_that_is_silent_does_not_count_among_the_others() -> None:
    story = slow_for(DEMOTE_MS)
    story.situation.suspected(2)
    assert story.planned() is None


def test_a_copy_on_a_slow_disk_comes_back_when_it_is_needed() -> None:
    story = slow_for(DEMOTE_MS)
    assert story.take() == "T1"
    story.situation.isr = (0,)
    story.situation.tell(2, role="out").offline(2)
    assert story.take() == "T3"


def test_one_disk_of_the_cluster_is_demoted_in_five_minutes() -> None:
    story = Story(Situation(rf=3, started_ms=LONG_AGO_MS))
    # Disks that serve other shards, so that two of five can be slow.
    story.alter = with_peers
    story.late(2, 3).lasts(SLOW_MS + TICK_MS + DEMOTE_MS)
    assert story.stages() == [EVEN, DEMOTED, SLOW]
    demoted_ms = story.paces[uuid_of(2)].demoted_ms
    assert demoted_ms == story.now_ms
    assert story.take() == "T1"
    story.lasts(DEMOTE_PAUSE_MS - TICK_MS)
    assert story.stages() == [EVEN, DEMOTED, SLOW]
    # The first is out, so the second cannot be spared; with a shard that can, it is its turn.
    story.situation.isr = (0, 1, 2)
    story.lasts(TICK_MS)
    assert story.stages() == [EVEN, DEMOTED, DEMOTED]


def with_peers(view: View) -> View:
    """Add three stores with quick disks and nothing of the shard."""
    stores, observed = dict(view.stores), dict(view.observed)
    for number in (11, 12, 13):
        disk = Disk(
            index=0,
            path="disk0.img",
            disk_uuid=uuid_of(number),
            format_uuid=uuid_of(number + 100),
            size_bytes=1 << 30,
        )
        stores[number] = replace(stores[1], id=number, name=f"s{number}", disks=(disk,))
        observed[number] = replace(observed[1], replicas={})
    return replace(view, stores=stores, observed=observed)


def test_a_new_conductor_demotes_nothing_for_five_minutes() -> None:
    story = Story(Situation(started_ms=NOW_MS)).late(3).lasts(DEMOTE_PAUSE_MS - TICK_MS)
    assert story.stages() == [EVEN, EVEN, SLOW]
    assert story.lasts(TICK_MS).stages() == [EVEN, EVEN, DEMOTED]


def test_a_disk_that_was_replaced_has_nothing_to_do_with_the_one_before() -> None:
    story = slow_for(DEMOTE_MS)
    assert story.take() == "T1"

    def replaced(view: View) -> View:
        disk = replace(view.stores[3].disks[0], disk_uuid="f" * 32)
        return replace(view, stores=dict(view.stores) | {3: replace(view.stores[3], disks=(disk,))})

    story.alter = replaced
    planned = story.planned()
    assert planned is not None
    assert planned[0] == "T3", "the configuration names the old one; the replica is on the new one"
    story.late(3, figures=QUICK).lasts(TICK_MS)
    assert story.paces["f" * 32].stage is EVEN
    assert uuid_of(3) not in story.paces


def test_learners_are_given_up_only_where_they_can_be_spared() -> None:
    story = slow_for(0)
    story.situation.isr, story.situation.learners = (0, 1), (2,)
    story.situation.tell(3, role="learner")
    planned = story.planned()
    assert planned is not None
    assert planned[0] == step_name_of(Cancel(copy=2))
    story.situation.isr = (0,)
    story.situation.tell(2, role="out").offline(2)
    assert story.planned() is None


def step_name_of(_: Cancel) -> str:
    return "T8"


# What people see.


def test_every_stage_is_explained() -> None:
    story = slow_for(0)
    (found,) = [one for one in health.findings(story.view()) if one.code == "DISK_SLOW"]
    assert found.subject == "s3 disk 0"
    assert "writes take 200.0 ms on average and 99 % of them up to 400.0 ms" in found.cause
    assert "those of other disks 3.0 ms on average" in found.cause
    assert "other disks lead what it led" in found.next_step
    (shown,) = disk_views(story.view(), story.view().stores[3])
    assert (shown.state, shown.reason) == ("slow", found.cause)
    assert (shown.write_ewma_us, shown.write_p99_us, shown.read_p99_us) == (200_000, 400_000, None)

    story.lasts(DEMOTE_MS)
    assert story.take() == "T1"
    view = story.view()
    (found,) = [one for one in health.findings(view) if one.code == "DISK_SLOW"]
    assert "left out of every shard with enough other copies; while it" in found.next_step
    verdict = states.judge_volume(view, view.volumes[KEY[0]])
    assert verdict.state is HealthState.DEGRADED
    assert "the disk of s3 is slow; while it is idle it is tried again in 300 s" in verdict.cause
    assert verdict.leaves_by == (
        "a quicker disk of s3, by itself or by a person who replaces it; the rest happens by itself"
    )
    shown_store = states.store_view(view, view.stores[3])
    assert shown_store.out_reason == "1 on a slow disk"
    assert shown_store.disks[0].state == "demoted"


def test_changes_are_told_once() -> None:
    story = slow_for(0)
    before = replace(story.view(), paces={})
    (change,) = changes(before, story.paces)
    assert change.subject == "s3 disk 0"
    assert change.text.startswith("other disks lead what it led: writes take")
    assert list(changes(story.view(), story.paces)) == []
    view = story.view()
    story.late(3, figures=QUICK).lasts(EVEN_MS + TICK_MS)
    (change,) = changes(view, story.paces)
    assert change.text == "it counts as even with the others again"
