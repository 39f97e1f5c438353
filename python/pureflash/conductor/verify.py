"""`volume verify`: a job that lets every primary compare the in-sync replicas of its shard. Pure.

Theory of operation. The job's record is the intent. What a primary found is kept by (job, shard)
until all shards have answered; a conductor that starts again asks again. A primary that changes
meanwhile answers with an error, and its successor is asked. The job ends SUCCEEDED only when every
region of every shard was compared and found equal and readable on every in-sync replica; that the
volume is degraded, so that copies are missing from the comparison, is in its reason. A primary that
is asked to repair mends blocks that cannot be read where another copy has them, and compares again.
Copies that differ although each can be read are not mended, because nothing shows which is right:
they are written down (`Differing`), and are a finding until a later verification ends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pureflash.conductor.damage import RANGES_SHOWN, blocks
from pureflash.conductor.requests import VERIFY_JOB
from pureflash.conductor.tell import Tell
from pureflash.conductor.view import View
from pureflash.metastore import keys
from pureflash.metastore.records import Write
from pureflash.model.domain import (
    Differing,
    Job,
    JobState,
    ShardConf,
    StoreState,
    Volume,
    VolumeIntent,
    next_job_state,
)
from pureflash.model.messages import Verified, VerifyReplica


def plan_verify(view: View) -> Iterator[Write | Tell]:
    """Give the next actions of all verifications."""
    for job in view.jobs.values():
        if job.kind != VERIFY_JOB or job.is_finished:
            continue
        volume = view.volumes.get(job.volume_id)
        if volume is None or volume.intent is not VolumeIntent.PRESENT:
            yield _end(view, job, JobState.FAILED, "the volume is gone", job.done)
            continue
        found = [view.verified.get((job.id, index)) for index in range(volume.shard_count)]
        answers = [answer for answer in found if answer is not None]
        if len(answers) == volume.shard_count:
            yield from _remember(view, job, volume, answers)
            yield _judge(view, job, volume, answers)
            continue
        yield from _ask(view, job, volume, found)


def _ask(
    view: View, job: Job, volume: Volume, found: list[Verified | None]
) -> Iterator[Write | Tell]:
    done, waiting = 0, ""
    for index, answer in enumerate(found):
        conf = view.shards.get((volume.id, index))
        if answer is not None:
            done += answer.regions
            continue
        if conf is None:
            continue
        store = conf.member(conf.primary).store
        seen = view.observation(store)
        report = seen.replicas.get((volume.id, index))
        if report is not None and report.verifying is not None:
            done += report.verifying[0]
        is_serving = report is not None and report.role == "active"
        if seen.state is not StoreState.ONLINE or not is_serving:
            waiting = f"shard {index} has no primary that serves"
            continue
        if _is_growing(view, conf):
            waiting = f"shard {index} is still growing on some of its stores"
            continue
        command = VerifyReplica(
            id=0, term=0, volume_id=volume.id, index=index, is_repairing=job.is_repairing
        )
        tell = Tell(store, command, f"job {job.id}")
        failure = view.failures.get((store, volume.id, index))
        is_held_back = failure is not None and view.now_ms < failure.retry_at_ms
        if tell.key not in view.in_flight and not is_held_back:
            yield tell
    now = replace(job, state=next_job_state(job.state, JobState.RUNNING), done=done, reason=waiting)
    if now != job:
        yield Write(keys.job(job.id), now, "progress")


def _is_growing(view: View, conf: ShardConf) -> bool:
    """Whether copies have different sizes: their last regions would differ for that alone."""
    key = (conf.volume_id, conf.index)
    stores = [conf.member(copy).store for copy in conf.isr]
    reports = (view.observation(store).replicas.get(key) for store in stores)
    return len({report.size_bytes for report in reports if report is not None}) > 1


def _remember(view: View, job: Job, volume: Volume, answers: list[Verified]) -> Iterator[Write]:
    """Keep which shards have copies that differ, until all copies of one were found equal."""
    for index, answer in enumerate(answers):
        key = keys.differing(volume.id, index)
        before = view.differing.get((volume.id, index))
        if answer.different:
            found = Differing(
                volume_id=volume.id,
                index=index,
                regions=answer.different[:RANGES_SHOWN],
                count=len(answer.different),
                job=job.id,
                found_at_ms=view.wall_ms,
            )
            yield Write(key, found, "copies that are in sync differ")
        elif before is not None and answer.copies >= volume.replicas and not answer.unreadable:
            yield Write(key, None, "all copies were found equal")


def _judge(view: View, job: Job, volume: Volume, answers: list[Verified]) -> Write:
    regions = sum(answer.regions for answer in answers)
    different = [
        (index, *pair) for index, answer in enumerate(answers) for pair in answer.different
    ]
    unreadable = [
        (index, *pair) for index, answer in enumerate(answers) for pair in answer.unreadable
    ]
    count = sum(answer.mended_blocks for answer in answers)
    mended = [f"{blocks(count)} mended"] if count else []
    if different or unreadable:
        parts = []
        for what, pairs in (("differ", different), ("cannot be read", unreadable)):
            if pairs:
                index, region, store = pairs[0]
                name = view.stores[store].name if store in view.stores else f"store {store}"
                parts.append(
                    f"{len(pairs)} region(s) {what}, the first: MiB {region} of shard {index} on"
                    f" {name}"
                )
        return _end(view, job, JobState.FAILED, "; ".join([*parts, *mended]), regions)
    copies = min(answer.copies for answer in answers)
    how_many = f"{copies} of {volume.replicas}" if copies < volume.replicas else str(copies)
    if copies > 1:
        reason = f"{how_many} copies are {'in sync and ' if copies < volume.replicas else ''}equal"
    else:  # nothing to compare it with
        which = "only" if volume.replicas == 1 else "only in-sync"
        reason = f"the {which} copy could be read"
    return _end(view, job, JobState.SUCCEEDED, "; ".join([reason, *mended]), regions)


def _end(view: View, job: Job, state: JobState, reason: str, done: int) -> Write:
    running = next_job_state(job.state, JobState.RUNNING)
    after = replace(
        job,
        state=next_job_state(running, state),
        done=done,
        reason=reason,
        finished_at_ms=view.wall_ms,
    )
    return Write(keys.job(job.id), after, reason)
