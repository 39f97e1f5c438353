"""What `pf volume explain` says: a volume, its shards and their copies, a line each. Pure.

The sentences are those of `states`; this page only puts them together, and adds what a person has
decided about a shard.
"""

from __future__ import annotations

from pureflash.conductor.damage import damage_of, lost_ranges
from pureflash.conductor.standing import store_name
from pureflash.conductor.states import (
    Verdict,
    judge_shard,
    judge_volume,
    member_view,
)
from pureflash.conductor.view import View
from pureflash.model.domain import HealthState, ShardConf, Volume
from pureflash.model.rest import ExplainLine, timestamp


def explain(view: View, volume: Volume) -> list[ExplainLine]:
    """Say of a volume, its shards and their copies what is so and why.

    With one replica there is nothing more to say of the copy than of its shard.
    """
    verdict = judge_volume(view, volume)
    reason = _said(verdict.cause or "all shards serve", verdict)
    lines = [ExplainLine(subject=volume.name, state=verdict.state, reason=reason)]
    for index in range(volume.shard_count):
        verdict = judge_shard(view, volume, index)
        subject = f"{volume.name}/{index}"
        conf = view.shards.get((volume.id, index))
        where = _where(view, conf) if conf else "not placed"
        text = _said(f"{where}; {verdict.cause}" if verdict.cause else where, verdict)
        lines.append(ExplainLine(subject=subject, state=verdict.state, reason=text))
        lines += _forced_lines(view, volume, index, subject)
        lines += [
            ExplainLine(subject=subject, state="lost", reason=text)
            for text in lost_ranges(volume, index, damage_of(view, (volume.id, index)))
        ]
        if conf is None or volume.replicas == 1:
            continue
        for member in conf.members:
            shown = member_view(view, volume, conf, member)
            text = f"{shown.reason or 'fine'}; disk {member.disk[:8]}"
            name = f"{subject}/{shown.name}"
            lines.append(ExplainLine(subject=name, state=shown.role, reason=text))
    return lines


def _forced_lines(view: View, volume: Volume, index: int, subject: str) -> list[ExplainLine]:
    """Tell of each time that a person decided which copy of a shard counts (T7)."""
    place = (volume.id, index)
    return [
        ExplainLine(
            subject=subject, state="forced", reason=f"{timestamp(job.created_at_ms)}: {job.reason}"
        )
        for job in sorted(view.jobs.values(), key=lambda job: job.id)
        if job.history_id is not None and (job.volume_id, job.index) == place
    ]


def _said(text: str, verdict: Verdict) -> str:
    """Add what I/O does and who leaves the state, where that is not the ordinary."""
    if verdict.state is HealthState.HEALTHY:
        return text
    return f"{text}; I/O: {verdict.io}; leaves by: {verdict.leaves_by}"


def _where(view: View, conf: ShardConf) -> str:
    """Say where a shard lies."""
    primary = conf.member(conf.primary)
    name = store_name(view, primary.store)
    if len(conf.members) == 1:
        return f"primary on {name}, disk {primary.disk[:8]}, epoch {conf.epoch}"
    in_sync = " ".join(store_name(view, conf.member(copy).store) for copy in conf.isr)
    learners = " ".join(store_name(view, conf.member(copy).store) for copy in conf.learners)
    learning = f", learning {learners}" if learners else ""
    return f"primary on {name}, in sync {in_sync}{learning}, epoch {conf.epoch}"
