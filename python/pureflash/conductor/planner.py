"""The reconciler's mind: from records and observations to the next actions, each with its reason.

Theory of operation. `plan` is a pure function of a view. It compares what is wanted with what is,
and gives actions of three kinds: writes to the metastore, commands to stores, export lists for
gateways. It is level-triggered: nothing depends on having seen an event, so a conductor that stops
anywhere and starts again plans the rest. Two rules make that safe:

* a configuration is stored before a store is told (a command appears only for stored shards);
* a shard's record goes only when its store, online, serves the disk and reports no replica: nothing
  is forgotten that still holds data.

A volume is deleted by a job, and the job's record is the intent, written first:
`QUEUED -> volume DELETING -> RUNNING -> replicas, shards, name, volume gone -> SUCCEEDED`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from pureflash.conductor.amnesia import RECOVER_JOB
from pureflash.conductor.balance import plan_balance
from pureflash.conductor.failover import plan_failover
from pureflash.conductor.first_conf import first_conf
from pureflash.conductor.force import FORCE_JOB
from pureflash.conductor.placement import home_of, place_shard, rooms
from pureflash.conductor.requests import DELETE_JOB
from pureflash.conductor.slow import plan_moves
from pureflash.conductor.standing import (
    has_heard_most,
    is_given_up,
    is_proven,
    unserved_disk,
)
from pureflash.conductor.states import waiting_stores
from pureflash.conductor.tell import Tell
from pureflash.conductor.verify import plan_verify
from pureflash.conductor.view import View
from pureflash.errors import ClusterError, MediaError
from pureflash.metastore import keys
from pureflash.metastore.records import Write
from pureflash.model.domain import (
    Export,
    Job,
    JobState,
    Member,
    ShardConf,
    Volume,
    VolumeIntent,
    next_job_state,
)
from pureflash.model.messages import (
    CreateReplica,
    DeleteReplica,
    ReplicaReport,
    ResizeReplica,
    SetConf,
    ShardRoute,
)

FIRST_EPOCH: Final = 1
"""Of a shard whose replicas have yet to be made."""
JOBS_KEPT: Final = 100
"""Finished jobs that stay visible; older ones are forgotten."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """One export as its gateway should offer it; tickets are added when it is sent."""

    export: Export
    volume: Volume
    routes: tuple[ShardRoute, ...]


@dataclass(frozen=True, slots=True)
class Offer:
    """The exports that a connected gateway should have."""

    gateway: str
    plans: tuple[ExportPlan, ...]


Action = Write | Tell | Offer


def plan(view: View) -> list[Action]:
    """Give the next actions, in no order that matters; none when everything is as wanted.

    And none in amnesia: nothing may follow from records that are not the newest.
    """
    if view.amnesia is not None:
        return []
    return [
        *_plan_jobs(view),
        *_plan_names(view),
        *_plan_new_shards(view),
        *_plan_attach_epochs(view),
        *plan_failover(view),
        *_plan_replicas(view),
        *_plan_ends(view),
        *plan_verify(view),
        *plan_moves(view),
        *plan_balance(view),
        *_plan_exports(view),
    ]


def routes(view: View, volume: Volume) -> tuple[ShardRoute, ...]:
    """Give where each shard's primary is; an empty address while its store is not online."""
    found: list[ShardRoute] = []
    for index in range(volume.shard_count):
        conf = view.shards.get((volume.id, index))
        if conf is None:
            found.append(ShardRoute(index=index, epoch=0, address=""))
            continue
        store_id = conf.member(conf.primary).store
        store = view.stores.get(store_id)
        has_replica = (volume.id, index) in view.observation(store_id).replicas
        is_there = store is not None and view.is_online(store_id) and has_replica
        address = store.address if store is not None and is_there else ""
        found.append(ShardRoute(index=index, epoch=conf.epoch, address=address))
    return tuple(found)


def _plan_jobs(view: View) -> Iterator[Write]:
    for job in view.jobs.values():
        if job.kind == DELETE_JOB and not job.is_finished:
            yield from _plan_delete_job(view, job)
    # What a person decided about a volume is kept as long as the volume.
    finished = sorted(
        (
            job
            for job in view.jobs.values()
            if job.is_finished
            and job.kind != RECOVER_JOB
            and not (job.kind == FORCE_JOB and job.volume_id in view.volumes)
        ),
        key=lambda job: job.id,
    )
    for job in finished[:-JOBS_KEPT]:
        yield Write(keys.job(job.id), None, f"more than {JOBS_KEPT} finished jobs")


def _plan_delete_job(view: View, job: Job) -> Iterator[Write]:
    volume = view.volumes.get(job.volume_id)
    key = keys.job(job.id)
    if volume is None:
        running = replace(job, state=JobState.RUNNING)
        if job.state is JobState.QUEUED:
            yield Write(key, running, "the volume is gone already")
            return
        state = next_job_state(job.state, JobState.SUCCEEDED)
        done = replace(job, state=state, done=job.total, reason="", finished_at_ms=view.wall_ms)
        yield Write(key, done, "the volume is gone")
    elif job.state is JobState.QUEUED and volume.intent is VolumeIntent.PRESENT:
        if exports := view.exports_of(volume.id):
            reason = f"exported by {exports[0].kind} in the meantime"
            state = next_job_state(job.state, JobState.CANCELLED)
            end = replace(job, state=state, reason=reason, finished_at_ms=view.wall_ms)
            yield Write(key, end, reason)
            return
        gone = replace(volume, intent=VolumeIntent.DELETING, version=volume.version + 1)
        yield Write(keys.volume(volume.id), gone, f"job {job.id} deletes it")
    else:
        left = len(view.shards_of(volume))
        state = next_job_state(job.state, JobState.RUNNING)
        waiting = waiting_stores(view, volume)
        reason = f"waiting for {', '.join(waiting)}" if waiting else ""
        now = replace(job, state=state, done=job.total - left, reason=reason)
        if now != job:
            yield Write(key, now, "progress")


def _plan_names(view: View) -> Iterator[Write]:
    for name, claim in view.names.items():
        volume = view.volumes.get(claim.volume_id)
        if volume is None:
            yield Write(keys.name(name), None, "its volume was never stored")
        elif volume.intent is VolumeIntent.DELETING:
            yield Write(keys.name(name), None, "its volume is being deleted")


def _plan_new_shards(view: View) -> Iterator[Write]:
    missing = [
        (volume, index)
        for volume in view.volumes.values()
        if volume.intent is VolumeIntent.PRESENT
        for index in range(volume.shard_count)
        if (volume.id, index) not in view.shards
    ]
    if not missing:
        return
    available = rooms(view)
    for volume, index in missing:
        try:
            placed = place_shard(volume.shard_bytes(index), volume.replicas, available)
        except (MediaError, ClusterError):
            continue  # shown as the shard's reason (`states`); planned again when there is room
        conf = first_conf(volume, index, placed=placed)
        reason = f"most room is on {', '.join(room.store.name for room in placed)}"
        yield Write(keys.shard(volume.id, index), conf, reason)


def _plan_attach_epochs(view: View) -> Iterator[Write]:
    """Let a volume follow a shard whose writers of before were fenced (T7): then all of it is."""
    newest: dict[int, int] = {}
    for (volume_id, _), conf in view.shards.items():
        newest[volume_id] = max(newest.get(volume_id, 0), conf.attach_epoch)
    for volume_id, attach_epoch in newest.items():
        volume = view.volumes.get(volume_id)
        if volume is not None and volume.attach_epoch < attach_epoch:
            after = replace(volume, attach_epoch=attach_epoch)
            yield Write(keys.volume(volume_id), after, "writers of before a decision are fenced")


def _plan_replicas(view: View) -> Iterator[Tell]:
    for (volume_id, index), conf in view.shards.items():
        for member in conf.members:
            if not view.is_online(member.store):
                continue
            report = view.observation(member.store).replicas.get((volume_id, index))
            if report is None and not _may_be_made(view, conf, member):
                continue
            tell = _replica_command(view, conf, member, report)
            if tell is not None and not _is_held_back(view, tell):
                yield tell


def _may_be_made(view: View, conf: ShardConf, member: Member) -> bool:
    """Whether a replica that its store does not have is to be made there, empty.

    One that counts as in sync was there and is lost: an empty one in its place would be believed.
    Only a new shard's replicas are made by the life of the store that its first configuration
    names; what is out of the ISR is filled by its primary.
    """
    store = view.stores.get(member.store)
    is_first_life = store is not None and store.incarnation == member.incarnation
    return member.copy not in conf.isr or (conf.epoch == FIRST_EPOCH and is_first_life)


def _replica_command(
    view: View, conf: ShardConf, member: Member, report: ReplicaReport | None
) -> Tell | None:
    """Give the command that brings one replica nearer to what is wanted."""
    volume_id, index = conf.volume_id, conf.index
    volume = view.volumes.get(volume_id)
    head = {"id": 0, "term": 0}
    if volume is None or volume.intent is VolumeIntent.DELETING or index >= volume.shard_count:
        if report is None:
            return None
        delete = DeleteReplica(volume_id=volume_id, index=index, **head)
        return Tell(member.store, delete, "its volume is being deleted")
    size_bytes = volume.shard_bytes(index)
    if report is None:
        return _creation(view, conf, member, size_bytes)
    if report.size_bytes < size_bytes:
        resize = ResizeReplica(volume_id=volume_id, index=index, size_bytes=size_bytes, **head)
        return Tell(member.store, resize, "the volume has grown")
    if report.epoch < conf.epoch:
        push = SetConf(volume_id=volume_id, index=index, conf=conf, **head)
        return Tell(member.store, push, f"the store has epoch {report.epoch}")
    return None


def _creation(view: View, conf: ShardConf, member: Member, size_bytes: int) -> Tell | None:
    """Give the command that makes a replica; without room that is the copy's reason (`states`)."""
    disk = home_of(view, member, size_bytes)
    if disk is None:
        return None
    create = CreateReplica(
        id=0,
        term=0,
        volume_id=conf.volume_id,
        index=conf.index,
        copy=member.copy,
        size_bytes=size_bytes,
        disk=disk,
        conf=conf,
    )
    return Tell(member.store, create, "the store does not have it")


def _is_held_back(view: View, tell: Tell) -> bool:
    """Whether the same command is under way, or failed a moment ago."""
    if tell.key in view.in_flight:
        return True
    failure = view.failures.get((tell.store, tell.command.volume_id, tell.command.index))
    return failure is not None and view.now_ms < failure.retry_at_ms


def _plan_ends(view: View) -> Iterator[Write]:
    """Remove what a deletion leaves: shard records without replicas, then the volume."""
    left: set[int] = set()
    for (volume_id, index), conf in view.shards.items():
        volume = view.volumes.get(volume_id)
        if volume is not None and volume.intent is VolumeIntent.PRESENT:
            continue
        left.add(volume_id)
        is_empty = all(_is_empty(view, member, conf) for member in conf.members)
        if is_empty:
            yield Write(keys.shard(volume_id, index), None, "no store has a replica of it")
    for volume_id, index in view.differing.keys() - view.shards.keys():
        yield Write(keys.differing(volume_id, index), None, "its shard is gone")
    named = {claim.volume_id for claim in view.names.values()}
    for volume in view.volumes.values():
        is_deleting = volume.intent is VolumeIntent.DELETING
        if is_deleting and volume.id not in left and volume.id not in named:
            yield Write(keys.volume(volume.id), None, "nothing of it is left")


def _is_empty(view: View, member: Member, conf: ShardConf) -> bool:
    """Whether a member's store holds nothing of a shard any more, or is lost for good."""
    store, key = view.stores.get(member.store), (conf.volume_id, conf.index)
    if store is not None and is_given_up(view.cluster, store):
        return True
    is_gone = view.is_online(member.store) and key not in view.observation(member.store).replicas
    if not is_gone or unserved_disk(view, member) is not None:
        return False
    return not _has_command(view, member.store, *key)


def _has_command(view: View, store: int, volume_id: int, index: int) -> bool:
    kinds = ("CreateReplica", "ResizeReplica", "SetConf", "DeleteReplica")
    return any((store, kind, volume_id, index) in view.in_flight for kind in kinds)


def _plan_exports(view: View) -> Iterator[Write | Offer]:
    """Offer gateways what they should have: what is missing in a list is taken away there.

    So nothing is offered before enough stores were heard to know that the records are not old.
    """
    is_heard = any(view.is_online(store) for store in view.stores)
    is_known = is_heard and all(is_proven(view, conf) for conf in view.shards.values())
    if not is_known and not has_heard_most(view):
        return
    wanted: dict[str, list[ExportPlan]] = {
        name: [] for name, gateway in view.gateways.items() if gateway.is_connected
    }
    for export in sorted(view.exports.values(), key=lambda export: export.id):
        volume = view.volumes.get(export.volume_id)
        if volume is None or volume.intent is VolumeIntent.DELETING:
            yield Write(keys.export(export.id), None, "its volume is gone")
        elif export.gateway in wanted:
            wanted[export.gateway].append(ExportPlan(export, volume, routes(view, volume)))
    for name, plans in wanted.items():
        yield Offer(name, tuple(plans))
