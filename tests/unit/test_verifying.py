"""The job of a verification: whom it asks, what its answers mean, and when a finding is over."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.support.views import KEY, Situation

from pureflash.conductor import requests
from pureflash.conductor.tell import Tell
from pureflash.conductor.verify import plan_verify
from pureflash.conductor.view import View
from pureflash.metastore import keys
from pureflash.metastore.records import Write
from pureflash.model.domain import GIB, Differing, Job
from pureflash.model.messages import Verified, VerifyReplica

FOUND = Differing(
    volume_id=KEY[0], index=KEY[1], regions=((7, 2),), count=1, job=3, found_at_ms=1_000
)


def answer(*, copies: int = 3, unreadable: tuple[tuple[int, int], ...] = ()) -> Verified:
    return Verified(id=1, term=1, regions=1024, copies=copies, different=(), unreadable=unreadable)


def verifying(situation: Situation, *, is_repairing: bool = True) -> View:
    """Give the view of a situation in which a verification has begun."""
    view = situation.view()
    job = requests.verify_job(view, situation.volume(), is_repairing=is_repairing)
    assert job is not None
    return replace(view, jobs={job.id: job}, differing={KEY: FOUND})


def asked(view: View) -> list[VerifyReplica]:
    told = [action.command for action in plan_verify(view) if isinstance(action, Tell)]
    return [command for command in told if isinstance(command, VerifyReplica)]


@pytest.mark.parametrize("is_repairing", [True, False])
def test_a_primary_mends_only_if_that_was_asked_for(is_repairing: bool) -> None:
    (command,) = asked(verifying(Situation(), is_repairing=is_repairing))
    assert command.is_repairing is is_repairing


def test_copies_of_different_sizes_are_not_compared() -> None:
    """Their last regions would differ for that alone, which is no finding."""
    view = verifying(Situation().tell(2, size_bytes=GIB // 2))
    assert not asked(view)
    (write,) = (action for action in plan_verify(view) if isinstance(action, Write))
    assert isinstance(write.record, Job)
    assert write.record.reason == "shard 0 is still growing on some of its stores"


@pytest.mark.parametrize(
    ("found", "is_over"),
    [
        (answer(), True),
        (answer(copies=2), False),
        (answer(unreadable=((9, 1),)), False),
    ],
)
def test_a_difference_is_over_when_every_copy_was_read_and_found_equal(
    found: Verified, is_over: bool
) -> None:
    view = verifying(Situation())
    (job_id,) = view.jobs
    view = replace(view, verified={(job_id, 0): found})
    writes = [action for action in plan_verify(view) if isinstance(action, Write)]
    ended = [write for write in writes if write.key == keys.differing(*KEY)]
    assert [write.record for write in ended] == ([None] if is_over else [])


def test_a_volume_has_as_many_equal_copies_as_its_least_shard() -> None:
    view = verifying(Situation())
    (job_id,) = view.jobs
    volume = replace(view.volumes[KEY[0]], size_bytes=2 * GIB)
    verified = {(job_id, 0): answer(), (job_id, 1): answer(copies=2)}
    view = replace(view, volumes={volume.id: volume}, verified=verified)
    (end,) = (
        action.record
        for action in plan_verify(view)
        if isinstance(action, Write) and isinstance(action.record, Job)
    )
    assert end.reason == "2 of 3 copies are in sync and equal"
