"""States of volumes and shards, each with its cause, and the views that users see. Pure.

Theory of operation. A state is never stored: `judge_shard` reads it off the configuration and what
the stores report, and says with it why it is so, what I/O does meanwhile and who leaves it. First
the primary is looked at, because without it nothing is served; then the other copies. What one
member lacks is said once, by `_condition` for members of the ISR and by `out_reason` for the
others, and everything that people read is put together from these two.

| State | Means | Leaves by |
|---|---|---|
| healthy | every copy is in sync and the primary serves | a failure |
| degraded | served, with fewer copies than wanted or one that does not answer | the conductor |
| single_copy | served from the only copy in sync | the conductor |
| parked | I/O or writes wait for something that comes by itself | what is named |
| offline | the primary is not there and nobody can take over | a person, who brings it back |
| deleting | its deletion frees its space; its name is free already | the conductor |
| amnesia | stores follow newer records than the conductor has | a person, who has them rebuilt |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import Final

from pureflash.conductor.damage import copy_text, damage_of, io_text, sentence, way_out
from pureflash.conductor.disk_states import disk_views
from pureflash.conductor.failover import GATHER_MS
from pureflash.conductor.placement import home_of, place_shard, rooms
from pureflash.conductor.slow import is_held_out, place_of, trial
from pureflash.conductor.standing import (
    RECOVER,
    failed_disk,
    is_given_up,
    store_name,
    unserved_disk,
)
from pureflash.conductor.view import View
from pureflash.errors import ClusterError, MediaError
from pureflash.metastore.records import Record
from pureflash.model.domain import (
    Amnesia,
    Cluster,
    Differing,
    Export,
    HealthState,
    Job,
    Member,
    NameClaim,
    ShardConf,
    Store,
    StoreState,
    Volume,
    VolumeIntent,
    worst,
)
from pureflash.model.messages import ResyncReport
from pureflash.model.rest import (
    ExportView,
    JobView,
    MemberView,
    ShardView,
    StoreView,
    VolumeView,
    timestamp,
)

SERVED: Final = "reads and writes are served"
WAIT: Final = "reads and writes wait; none fails"
WRITES_WAIT: Final = "reads are served, writes wait; none fails"
MAY_PAUSE: Final = "reads and writes are served, after a pause of up to 3 s; none fails"
AS_STORES_KNOW: Final = "reads and writes go on while no store fails; none fails"
RECOVERS: Final = f"a person, by {RECOVER}"
BY_ITSELF: Final = "nobody has to do anything"

ROLE_TEXTS: Final = {
    "settling": "makes the last writes equal everywhere before it serves",
    "leaving": "hands over to another store",
    "suspended": "was told of a newer configuration and fetches it",
    "fenced": "is not the primary of the newest configuration any more",
}
"""What a primary that reports such a role is doing."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A state, its cause (empty when healthy), what I/O does, and who leaves the state."""

    state: HealthState
    cause: str
    io: str
    leaves_by: str


class Condition(Enum):
    """How a member of an ISR is, as far as its store's state and reports tell."""

    FINE = "fine"
    COMING = "coming"  # its store makes it, or lets it grow
    REBORN = "reborn"  # another life of its store than the configuration means
    AWAY = "away"  # suspected: it may be heard again at any time
    GONE = "gone"
    FAILED = "failed"  # its disk
    LOST = "lost"  # its store is back without it, and an empty one must not take its place


class OutKind(StrEnum):
    """Why a member is not in the ISR; the values end a sentence that begins with a number."""

    LEARNING = "being made equal"
    PAUSED = "paused after an attempt that was given up"
    WAITING = "waiting to be made equal"
    AWAY = "on a store that is not there"
    FAILED = "on a failed disk"
    SLOW = "on a slow disk"


def judge_shard(view: View, volume: Volume, index: int) -> Verdict:
    """Say how one shard is."""
    if view.amnesia is not None:
        return Verdict(HealthState.AMNESIA, view.amnesia.reason, AS_STORES_KNOW, RECOVERS)
    conf = view.shards.get((volume.id, index))
    if conf is None:
        why = _why_not_placed(view, volume, index)
        return Verdict(HealthState.PARKED, why, WAIT, "the conductor, which places it when it can")
    verdict = _judge_primary(view, volume, conf) or _judge_copies(view, volume, conf)
    return _with_damage(view, volume, index, verdict)


def _with_damage(view: View, volume: Volume, index: int, verdict: Verdict) -> Verdict:
    """Add what is known to be wrong with the data: then a shard is not healthy."""
    found = damage_of(view, (volume.id, index))
    if found.is_none:
        return verdict
    cause = sentence(view, found)
    if verdict.state is not HealthState.HEALTHY:
        return replace(verdict, cause=f"{verdict.cause}; {cause}")
    io = io_text(found) or verdict.io
    return Verdict(HealthState.DEGRADED, cause, io, way_out(volume, found))


def shard_state(view: View, volume: Volume, index: int) -> tuple[HealthState, str]:
    """Give the state of one shard and its cause; the cause of HEALTHY is empty."""
    verdict = judge_shard(view, volume, index)
    return verdict.state, verdict.cause


def _judge_primary(view: View, volume: Volume, conf: ShardConf) -> Verdict | None:
    """Say what keeps the primary from serving; None when it serves."""
    primary = conf.member(conf.primary)
    condition, why = _condition(view, volume, conf, primary)
    if condition is Condition.FINE:
        why = _why_not_active(view, conf, primary)
        return Verdict(HealthState.PARKED, why, WAIT, BY_ITSELF) if why else None
    if condition is Condition.COMING:
        return Verdict(
            HealthState.PARKED, why, WAIT, f"{store_name(view, primary.store)}, when it can"
        )
    return _judge_lost_primary(view, volume, conf, why)


def _judge_lost_primary(view: View, volume: Volume, conf: ShardConf, why: str) -> Verdict:
    """Say who can take over from a primary that is not there."""
    found: dict[Condition, list[str]] = {}
    causes: list[str] = []
    for copy in conf.isr:
        member = conf.member(copy)
        condition, cause = _condition(view, volume, conf, member)
        found.setdefault(condition, []).append(store_name(view, member.store))
        if cause:
            causes.append(cause)
    if takers := found.get(Condition.FINE):
        leaves_by = f"the conductor, which makes {takers[0]} primary"
        return Verdict(HealthState.PARKED, f"{why}; another copy takes over", WAIT, leaves_by)
    if back := found.get(Condition.REBORN):
        others = [name for names in found.values() for name in names if name not in back]
        leaves_by = f"the conductor, which opens it again with {', '.join(back)}"
        if others:
            leaves_by += f" after up to {GATHER_MS // 1000} s for {', '.join(others)}"
        return Verdict(HealthState.PARKED, "; ".join(causes), WAIT, leaves_by)
    if away := found.get(Condition.AWAY):
        leaves_by = f"{' or '.join(away)}, when heard again"
        return Verdict(HealthState.PARKED, "; ".join(causes), WAIT, leaves_by)
    return Verdict(HealthState.OFFLINE, "; ".join(causes), WAIT, _who_helps(view, conf, found))


def _who_helps(view: View, conf: ShardConf, found: dict[Condition, list[str]]) -> str:
    """Say what a person can do for a shard of which no in-sync copy can be opened."""
    ways: list[str] = []
    if gone := found.get(Condition.GONE):
        ways.append(f"the start of {' or '.join(gone)}")
    steps: list[str] = []
    if lost := found.get(Condition.LOST):
        steps.append(f"puts the disk of {' or '.join(lost)} back")
    if failed := found.get(Condition.FAILED):
        steps.append(f"brings the disk of {' or '.join(failed)} back")
    out = [member.store for member in conf.members if member.copy not in conf.isr]
    if names := [store_name(view, store) for store in out if view.is_online(store)]:
        steps.append(
            f"gives up what only the lost copies hold and goes on with {' or '.join(names)}"
            " (`pf volume force-accept`)"
        )
    if steps:
        ways.append(f"a person, who {', or '.join(steps)}")
    elif ways:
        ways = [f"{ways[0]}, by a supervisor or a person"]
    return ", or ".join(ways) or "a person; see `pf status`"


def _judge_copies(view: View, volume: Volume, conf: ShardConf) -> Verdict:
    """Judge a shard whose primary serves by its other copies."""
    troubles: list[str] = []
    for copy in conf.isr:
        condition, why = _condition(view, volume, conf, conf.member(copy))
        if condition is Condition.COMING:
            return Verdict(HealthState.PARKED, why, WAIT, BY_ITSELF)
        if why:
            troubles.append(f"{why}; it is in the ISR")
    out = [member for member in conf.members if member.copy not in conf.isr]
    reasons = [(store_name(view, member.store), *out_reason(view, conf, member)) for member in out]
    missing = [text for _, _, text in reasons]
    leaves_by = "the conductor, which has the missing copies made equal"
    if needed := _needed_first(view, out, reasons):
        leaves_by = f"{' and '.join(needed)}; the rest happens by itself"
    count = f"{len(conf.isr)} of {conf.rf} copies in sync"
    cause = "; ".join([count, *missing, *troubles])
    if len(conf.isr) < conf.min_write:
        short = f"{count}, a write needs {conf.min_write}"
        cause = "; ".join([short, *missing, *troubles])
        return Verdict(HealthState.PARKED, cause, WRITES_WAIT, leaves_by)
    if troubles:
        whom = "it" if len(troubles) == 1 else "them"
        leaves_by = f"the primary, which takes {whom} out of the ISR and goes on"
        return Verdict(HealthState.DEGRADED, cause, MAY_PAUSE, leaves_by)
    if len(conf.isr) >= conf.rf:
        return Verdict(HealthState.HEALTHY, "", SERVED, "")
    is_single = len(conf.isr) == 1
    state = HealthState.SINGLE_COPY if is_single else HealthState.DEGRADED
    return Verdict(state, cause, SERVED, leaves_by)


def _needed_first(
    view: View, out: Sequence[Member], reasons: Sequence[tuple[str, OutKind, str]]
) -> list[str]:
    """Say what has to happen before missing copies can be made equal."""
    needed: list[str] = []
    gone: list[str] = []
    for member, (name, kind, _) in zip(out, reasons, strict=True):
        if kind is OutKind.FAILED:
            needed.append(f"a person, who replaces a disk of {name}")
        elif kind is OutKind.SLOW:
            needed.append(f"a quicker disk of {name}, by itself or by a person who replaces it")
        elif kind is OutKind.AWAY and view.observation(member.store).state is StoreState.OFFLINE:
            gone.append(name)
        elif kind is OutKind.AWAY:
            needed.append(f"{name}, when heard again")
    if gone:
        needed.append(f"the start of {' and '.join(gone)}, by a supervisor or a person")
    return needed


def _condition(
    view: View, volume: Volume, conf: ShardConf, member: Member
) -> tuple[Condition, str]:
    """Say how a member of the ISR is, and what is wrong with it; that is empty when FINE."""
    name = store_name(view, member.store)
    seen = view.observation(member.store)
    if seen.state is not StoreState.ONLINE:
        is_gone = seen.state is StoreState.OFFLINE
        why = f"{name} is {seen.state}: {seen.cause}"
        return (Condition.GONE if is_gone else Condition.AWAY), why
    return _condition_there(view, volume, conf, member)


def _condition_there(
    view: View, volume: Volume, conf: ShardConf, member: Member
) -> tuple[Condition, str]:
    """Say how a member of the ISR is whose store is online."""
    key = (conf.volume_id, conf.index)
    store = view.stores.get(member.store)
    name = store_name(view, member.store)
    seen = view.observation(member.store)
    report = seen.replicas.get(key)
    failure = view.failures.get((member.store, *key))
    is_reborn = store is not None and store.incarnation != member.incarnation
    if (disk := failed_disk(view, key, member)) is not None:
        return Condition.FAILED, f"disk {disk.index} of {name} failed: {disk.reason}"
    if report is None:
        if is_reborn:
            return Condition.LOST, f"{name} came back without its copy: its disk is another one"
        why = f"{name} refused it: {failure.message}" if failure else f"{name} is making it"
        return Condition.COMING, why
    if is_reborn:
        return Condition.REBORN, f"{name} has restarted"
    if report.size_bytes < volume.shard_bytes(conf.index):
        why = f"{name} refused: {failure.message}" if failure else f"{name} is growing it"
        return Condition.COMING, why
    return Condition.FINE, ""


def _why_not_active(view: View, conf: ShardConf, primary: Member) -> str:
    """Say why a primary that is fine does not serve; empty when it does."""
    name = store_name(view, primary.store)
    report = view.observation(primary.store).replicas[conf.volume_id, conf.index]
    if report.epoch < conf.epoch:
        return f"{name} follows epoch {report.epoch}, and {conf.epoch} is stored"
    if report.role == "active":
        return ""
    return f"{name} {ROLE_TEXTS.get(report.role, f'does not serve yet: it is {report.role}')}"


def out_reason(view: View, conf: ShardConf, member: Member) -> tuple[OutKind, str]:
    """Say why a member is not in the ISR, as a kind and as a sentence."""
    name = store_name(view, member.store)
    seen = view.observation(member.store)
    if seen.state is not StoreState.ONLINE:
        return OutKind.AWAY, f"{name} is {seen.state}: {seen.cause}"
    key = (conf.volume_id, conf.index)
    report = seen.replicas.get(key)
    if (disk := failed_disk(view, key, member)) is not None:
        return OutKind.FAILED, f"disk {disk.index} of {name} failed: {disk.reason}"
    if member.copy in conf.learners:
        return OutKind.LEARNING, f"{name} is being made equal, {_progress(view, conf, member)}"
    if is_held_out(view, key, conf, member):
        when = trial(view, place_of(view, key, member))
        return OutKind.SLOW, f"the disk of {name} is slow; {when}"
    retry_at_ms = view.backoffs.get((conf.volume_id, conf.index, member.copy), 0)
    if view.now_ms < retry_at_ms:
        seconds = -(-(retry_at_ms - view.now_ms) // 1000)
        return OutKind.PAUSED, f"{name} could not be made equal and is tried again in {seconds} s"
    if report is None and home_of(view, member, _shard_bytes(view, conf)) is None:
        why = "has no room for it on any of its disks"
    elif conf.learners:
        why = f"is made equal after {store_name(view, conf.member(conf.learners[0]).store)}"
    else:
        why = "waits to be made equal"
    return OutKind.WAITING, f"{name} {why}"


def _shard_bytes(view: View, conf: ShardConf) -> int:
    """Give the size of a shard; 0 when its volume does not have it any more."""
    volume = view.volumes.get(conf.volume_id)
    is_there = volume is not None and conf.index < volume.shard_count
    return volume.shard_bytes(conf.index) if volume is not None and is_there else 0


def _resync(view: View, conf: ShardConf, member: Member) -> ResyncReport | None:
    """Give what the primary reports about making a member equal."""
    primary = view.observation(conf.member(conf.primary).store)
    report = primary.replicas.get((conf.volume_id, conf.index))
    resyncs = report.resyncs if report else ()
    return next((resync for resync in resyncs if resync.to == member.store), None)


def _progress(view: View, conf: ShardConf, member: Member) -> str:
    resync = _resync(view, conf, member)
    if resync is None:
        return "about to begin"
    total = resync.regions_copied + resync.regions_left
    percent = 100 * resync.regions_copied // total if total else 100
    return f"{resync.regions_copied} of {total} regions copied ({percent} %)"


def _why_not_placed(view: View, volume: Volume, index: int) -> str:
    try:
        place_shard(volume.shard_bytes(index), volume.replicas, rooms(view))
    except (MediaError, ClusterError) as problem:
        return problem.message
    return "it is about to be placed"


def judge_volume(view: View, volume: Volume) -> Verdict:
    """Give the worst of a volume's shards."""
    if volume.intent is VolumeIntent.DELETING:
        waiting = waiting_stores(view, volume)
        cause = "it is being deleted, and its name is free"
        if waiting:
            cause += f"; space on {', '.join(waiting)} is freed when that is back"
        return Verdict(HealthState.DELETING, cause, "none", "its deletion")
    verdicts = [judge_shard(view, volume, index) for index in range(volume.shard_count)]
    state = worst([verdict.state for verdict in verdicts])
    causes = [f"shard {i}: {it.cause}" for i, it in enumerate(verdicts) if it.state is state]
    more = f", and {len(causes) - 1} more" if len(causes) > 1 else ""
    first = next(verdict for verdict in verdicts if verdict.state is state)
    cause = causes[0] + more if first.cause else ""
    return Verdict(state, cause, first.io, first.leaves_by)


def waiting_stores(view: View, volume: Volume) -> list[str]:
    """Name what may hold replicas of a volume, is not there and not given up: stores and disks."""
    names: dict[str, None] = {}
    members = [member for conf in view.shards_of(volume) for member in conf.members]
    for member in sorted(members, key=lambda member: member.store):
        store = view.stores.get(member.store)
        if store is None or is_given_up(view.cluster, store):
            continue
        if not view.is_online(store.id):
            names[store.name] = None
        elif (disk := unserved_disk(view, member)) is not None:
            names[f"disk {disk.index} of {store.name}"] = None
    return list(names)


def volume_state(view: View, volume: Volume) -> tuple[HealthState, str]:
    """Give the worst state of a volume's shards and its cause."""
    verdict = judge_volume(view, volume)
    return verdict.state, verdict.cause


def volume_view(view: View, volume: Volume) -> VolumeView:
    """Show a volume as `GET /v1/volumes/REF` does."""
    verdict = judge_volume(view, volume)
    return VolumeView(
        id=volume.id,
        name=volume.name,
        size_bytes=volume.size_bytes,
        replicas=volume.replicas,
        shard_size_bytes=volume.shard_size_bytes,
        state=verdict.state,
        reason=verdict.cause,
        io=verdict.io,
        leaves_by=verdict.leaves_by,
        version=volume.version,
        created_at=timestamp(volume.created_at_ms),
        used_bytes=_used_bytes(view, volume),
        attach_epoch=volume.attach_epoch,
        shards=[_shard_view(view, volume, index) for index in range(volume.shard_count)],
    )


def _shard_view(view: View, volume: Volume, index: int) -> ShardView:
    verdict = judge_shard(view, volume, index)
    conf = view.shards.get((volume.id, index))
    store_of = {member.copy: member.store for member in conf.members} if conf else {}
    return ShardView(
        index=index,
        epoch=conf.epoch if conf else 0,
        state=verdict.state,
        reason=verdict.cause,
        io=verdict.io,
        leaves_by=verdict.leaves_by,
        primary=store_of[conf.primary] if conf else None,
        isr=[store_of[copy] for copy in conf.isr] if conf else [],
        learners=[store_of[copy] for copy in conf.learners] if conf else [],
        members=[member_view(view, volume, conf, one) for one in conf.members] if conf else [],
    )


def member_view(view: View, volume: Volume, conf: ShardConf, member: Member) -> MemberView:
    """Show a copy: its role, and what is wrong with it."""
    role = role_in(conf, member)
    damage = damage_of(view, (conf.volume_id, conf.index))
    damaged = [copy_text(view, one) for one in damage.copies if one.store == member.store]
    if member.copy in conf.isr:
        _, reason = _condition(view, volume, conf, member)
        if not reason and role == "primary":
            reason = _why_not_active(view, conf, member)
    else:
        _, reason = out_reason(view, conf, member)
    resync = _resync(view, conf, member) if role == "learner" else None
    return MemberView(
        copy=member.copy,
        store=member.store,
        name=store_name(view, member.store),
        role=role,
        reason="; ".join(filter(None, [reason, *damaged])),
        disk=member.disk,
        incarnation=member.incarnation,
        regions_left=resync.regions_left if resync else None,
        regions_copied=resync.regions_copied if resync else None,
    )


def role_in(conf: ShardConf, member: Member) -> str:
    """Give the role that a configuration has for a member."""
    if member.copy == conf.primary:
        return "primary"
    if member.copy in conf.isr:
        return "secondary"
    return "learner" if member.copy in conf.learners else "out"


def _used_bytes(view: View, volume: Volume) -> int | None:
    total = 0
    for index in range(volume.shard_count):
        conf = view.shards.get((volume.id, index))
        for member in conf.members if conf else ():
            report = view.observation(member.store).replicas.get((volume.id, index))
            if report is None or report.used_bytes is None:
                return None
            total += report.used_bytes
    return total


def store_view(view: View, store: Store) -> StoreView:
    """Show a store as `GET /v1/stores/REF` does."""
    seen = view.observation(store.id)
    silent = None if seen.heard_at_ms is None else max(0, view.now_ms - seen.heard_at_ms)
    here = [
        (conf, member)
        for conf in view.shards.values()
        for member in conf.members
        if member.store == store.id
    ]
    out = [(conf, member) for conf, member in here if member.copy not in conf.isr]
    return StoreView(
        id=store.id,
        name=store.name,
        state=seen.state,
        reason=seen.cause,
        address=store.address,
        incarnation=store.incarnation,
        silent_ms=silent,
        replicas=len(here),
        replicas_out=len(out),
        # Of a store that is not there `reason` says it already.
        out_reason=why_out(view, out) if view.is_online(store.id) else "",
        disks=disk_views(view, store),
    )


def replicas_out(view: View) -> dict[int, list[tuple[ShardConf, Member]]]:
    """Give the members that are not in sync by their store, in one pass over all shards."""
    found: dict[int, list[tuple[ShardConf, Member]]] = {}
    for conf in view.shards.values():
        for member in conf.members:
            if member.copy not in conf.isr:
                found.setdefault(member.store, []).append((conf, member))
    return found


def why_out(view: View, out: list[tuple[ShardConf, Member]]) -> str:
    """Sum up why replicas of a store are not in sync; empty when all are."""
    kinds = Counter(out_reason(view, conf, member)[0] for conf, member in out)
    parts = [f"{count} {kind}" for kind, count in sorted(kinds.items())]
    resyncs = [_resync(view, conf, member) for conf, member in out if member.copy in conf.learners]
    left = sum(resync.regions_left for resync in resyncs if resync)
    return "; ".join([*parts, f"{left} regions left"] if left else parts)


def export_view(view: View, export: Export) -> ExportView:
    """Show an export as `GET /v1/exports/ID` does."""
    volume = view.volumes.get(export.volume_id)
    gateway = view.gateways.get(export.gateway)
    report = gateway.exports.get(export.id) if gateway else None
    if gateway is None or not gateway.is_connected:
        state, reason = "offline", f"gateway {export.gateway} is not connected"
    elif report is None:
        state, reason = "pending", f"gateway {export.gateway} has not answered yet"
    else:
        state, reason = ("ready" if report.is_ready else "failed"), report.reason
    return ExportView(
        id=export.id,
        kind=export.kind,
        volume=volume.name if volume else str(export.volume_id),
        uri=report.uri if report and state == "ready" else "",
        gateway=export.gateway,
        state=state,
        reason=reason,
        read_only=export.is_read_only,
        transport=export.transport,
        connections=report.connections if report else 0,
    )


def job_view(job: Job) -> JobView:
    """Show a job as `GET /v1/jobs/ID` does."""
    return JobView(
        id=job.id,
        kind=job.kind,
        target=job.target,
        state=job.state,
        done=job.done,
        total=job.total,
        unit=job.unit,
        reason=job.reason,
        created_at=timestamp(job.created_at_ms),
        finished_at=None if job.finished_at_ms is None else timestamp(job.finished_at_ms),
    )


def subject_of(key: str, record: Record | None) -> str:
    """Name what a record is about, for events and logs."""
    match record:
        case Volume() | Store():
            return record.name
        case Job():
            return f"{record.kind} {record.target}"
        case Amnesia() | Cluster() | Differing() | Export() | NameClaim() | ShardConf() | None:
            return key
