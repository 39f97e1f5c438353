"""States of volumes and shards, each with its cause, and the views that users see. Pure."""

from __future__ import annotations

from pureflash.conductor.placement import place_shard, rooms
from pureflash.conductor.view import View
from pureflash.errors import MediaError
from pureflash.metastore.records import Record
from pureflash.model.domain import (
    Cluster,
    Export,
    HealthState,
    Job,
    NameClaim,
    ShardConf,
    Store,
    StoreState,
    Volume,
    VolumeIntent,
    worst,
)
from pureflash.model.rest import (
    DiskView,
    ExplainLine,
    ExportView,
    JobView,
    ShardView,
    StoreView,
    VolumeView,
    timestamp,
)


def shard_state(view: View, volume: Volume, index: int) -> tuple[HealthState, str]:
    """Give the state of one shard and its cause; the cause of HEALTHY is empty.

    With one replica there is no degraded: PARKED waits for something that comes by itself (I/O is
    kept and goes on then), OFFLINE needs its store back.
    """
    conf = view.shards.get((volume.id, index))
    if conf is None:
        return HealthState.PARKED, _why_not_placed(view, volume, index)
    store_id = conf.member(conf.primary).store
    store = view.stores.get(store_id)
    name = store.name if store else f"store {store_id}"
    seen = view.observation(store_id)
    if seen.state is not StoreState.ONLINE:
        is_gone = seen.state is StoreState.OFFLINE
        state = HealthState.OFFLINE if is_gone else HealthState.PARKED
        return state, f"{name} is {seen.state}: {seen.cause}"
    report = seen.replicas.get((volume.id, index))
    failure = view.failures.get((store_id, volume.id, index))
    if report is None:
        why = f"{name} refused it: {failure.message}" if failure else f"{name} is making it"
        return HealthState.PARKED, why
    disk = seen.disks.get(report.disk)
    if disk is not None and disk.state == "failed":
        return HealthState.OFFLINE, f"disk {disk.index} of {name} failed: {disk.reason}"
    if report.size_bytes < volume.shard_bytes(index):
        why = f"{name} refused: {failure.message}" if failure else f"{name} is growing it"
        return HealthState.PARKED, why
    return HealthState.HEALTHY, ""


def _why_not_placed(view: View, volume: Volume, index: int) -> str:
    try:
        place_shard(volume.shard_bytes(index), volume.replicas, rooms(view))
    except MediaError as problem:
        return problem.message
    return "it is about to be placed"


def volume_state(view: View, volume: Volume) -> tuple[HealthState, str]:
    """Give the worst state of a volume's shards and its cause."""
    if volume.intent is VolumeIntent.DELETING:
        return HealthState.OFFLINE, "it is being deleted"
    states = [shard_state(view, volume, index) for index in range(volume.shard_count)]
    state = worst([state for state, _ in states])
    causes = [f"shard {i}: {why}" for i, (it, why) in enumerate(states) if it is state and why]
    more = f", and {len(causes) - 1} more" if len(causes) > 1 else ""
    return state, causes[0] + more if causes else ""


def volume_view(view: View, volume: Volume) -> VolumeView:
    """Show a volume as `GET /v1/volumes/REF` does."""
    state, reason = volume_state(view, volume)
    shards = [_shard_view(view, volume, index) for index in range(volume.shard_count)]
    return VolumeView(
        id=volume.id,
        name=volume.name,
        size_bytes=volume.size_bytes,
        replicas=volume.replicas,
        shard_size_bytes=volume.shard_size_bytes,
        state=state,
        reason=reason,
        version=volume.version,
        created_at=timestamp(volume.created_at_ms),
        used_bytes=_used_bytes(view, volume),
        attach_epoch=volume.attach_epoch,
        shards=shards,
    )


def _shard_view(view: View, volume: Volume, index: int) -> ShardView:
    state, reason = shard_state(view, volume, index)
    conf = view.shards.get((volume.id, index))
    store_of = {member.copy: member.store for member in conf.members} if conf else {}
    return ShardView(
        index=index,
        epoch=conf.epoch if conf else 0,
        state=state,
        reason=reason,
        primary=store_of[conf.primary] if conf else None,
        isr=[store_of[copy] for copy in conf.isr] if conf else [],
        learners=[store_of[copy] for copy in conf.learners] if conf else [],
    )


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


def explain(view: View, volume: Volume) -> list[ExplainLine]:
    """Say of a volume and each shard what is so and why, with where it lies."""
    state, reason = volume_state(view, volume)
    lines = [ExplainLine(subject=volume.name, state=state, reason=reason or "all shards serve")]
    for index in range(volume.shard_count):
        state, reason = shard_state(view, volume, index)
        conf = view.shards.get((volume.id, index))
        where = "not placed"
        if conf is not None:
            member = conf.member(conf.primary)
            store = view.stores.get(member.store)
            name = store.name if store else f"store {member.store}"
            where = f"primary on {name}, disk {member.disk[:8]}, epoch {conf.epoch}"
        text = f"{where}; {reason}" if reason else where
        lines.append(ExplainLine(subject=f"{volume.name}/{index}", state=state, reason=text))
    return lines


def store_view(view: View, store: Store) -> StoreView:
    """Show a store as `GET /v1/stores/REF` does."""
    seen = view.observation(store.id)
    silent = None if seen.heard_at_ms is None else max(0, view.now_ms - seen.heard_at_ms)
    return StoreView(
        id=store.id,
        name=store.name,
        state=seen.state,
        reason=seen.cause,
        address=store.address,
        incarnation=store.incarnation,
        silent_ms=silent,
        replicas=sum(
            member.store == store.id for conf in view.shards.values() for member in conf.members
        ),
        disks=disk_views(view, store),
    )


def disk_views(view: View, store: Store) -> list[DiskView]:
    """Show the disks of a store; what is not known while it is away is None."""
    seen = view.observation(store.id)
    views: list[DiskView] = []
    for disk in store.disks:
        report = seen.disks.get(disk.index) if seen.state is not StoreState.OFFLINE else None
        views.append(
            DiskView(
                id=disk.disk_uuid,
                store=store.name,
                index=disk.index,
                path=disk.path,
                size_bytes=disk.size_bytes,
                state=report.state if report else "unknown",
                reason=report.reason if report else f"{store.name} is {seen.state}",
                engine=report.engine if report else None,
                bytes_total=report.bytes_total if report else None,
                bytes_free=report.bytes_free if report else None,
            )
        )
    return views


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
        case Cluster() | Export() | NameClaim() | ShardConf() | None:
            return key
