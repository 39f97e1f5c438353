"""How members and disks stand: what is believed of them, and what not."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from tests.support.views import KEY, Situation, disk_report, member

from pureflash.conductor import health
from pureflash.conductor.damage import Damage, damage_of, lost_ranges
from pureflash.conductor.disk_states import disk_views
from pureflash.conductor.pace import Pace, Stage
from pureflash.conductor.standing import failed_disk, has_good_disk, is_given_up
from pureflash.model.domain import GIB
from pureflash.model.messages import ReplicaReport


def damaged(situation: Situation, store: int) -> Situation:
    """Let the copy on a store have a block that cannot be read."""
    now = situation.seen[store].replicas[KEY]
    return on(situation, store, msgspec.structs.replace(now, damaged=((4, 1),), damaged_blocks=1))


def on(situation: Situation, store: int, report: ReplicaReport) -> Situation:
    return situation.change(store, replicas={KEY: report})


def test_every_damaged_copy_is_a_finding_while_its_store_is_heard() -> None:
    situation = damaged(damaged(Situation(), 2), 3)
    found = [finding.subject for finding in health.data_findings(situation.view())]
    assert found == ["v1/0/s2", "v1/0/s3"]
    found = [finding.subject for finding in health.data_findings(situation.suspected(2).view())]
    assert found == ["v1/0/s3"], "what a silent store said is old"
    assert damage_of(situation.offline(3).view(), KEY).is_none


def test_a_disk_that_its_store_has_not_registered_is_not_relied_on() -> None:
    situation = Situation()
    assert has_good_disk(situation.view(), KEY, member(1))
    now = situation.seen[2].replicas[KEY]
    there = {0: disk_report(), 3: msgspec.structs.replace(disk_report(), index=3)}
    on(situation, 2, msgspec.structs.replace(now, disk=3)).change(2, disks=there)
    assert not has_good_disk(situation.view(), KEY, member(1))


def test_a_disk_that_was_formatted_anew_is_not_the_one_that_failed() -> None:
    view = Situation().without_replica(3).failed_disk(3).view()
    assert failed_disk(view, KEY, member(2)) is not None
    assert failed_disk(view, KEY, replace(member(2), format_uuid="ee" * 16)) is None


def test_a_store_is_given_up_with_all_of_its_disks() -> None:
    view = Situation().view()
    (disk,) = view.stores[1].disks
    other = replace(disk, index=1, disk_uuid="dd" * 16, format_uuid="ee" * 16)
    store = replace(view.stores[1], disks=(disk, other))
    one = replace(view.cluster, given_up=(disk.format_uuid,))
    both = replace(view.cluster, given_up=(disk.format_uuid, other.format_uuid))
    assert [is_given_up(cluster, store) for cluster in (view.cluster, one, both)] == [
        False,
        False,
        True,
    ]


def test_a_disk_that_was_slow_and_has_failed_is_shown_as_failed() -> None:
    view = Situation().failed_disk(2).view()
    pace = Pace(since_ms=0, judged_ms=0, stage=Stage.SLOW, cause="far later than the others")
    view = replace(view, paces={member(1).disk: pace})
    (shown,) = disk_views(view, view.stores[2])
    assert (shown.state, shown.reason) == ("failed", "a flush failed")


def test_what_is_lost_is_told_in_bytes_of_the_volume() -> None:
    lines = lost_ranges(Situation().volume(), 1, Damage(lost_blocks=5, ranges=((4, 2),)))
    first = GIB + 4 * 4096
    assert lines == [f"bytes {first} to {first + 8191} of v1 (2 blocks)", "and 3 blocks more"]
