"""What a user asks for, judged before anything is stored. Pure.

Each function takes the view and a wish and gives the record to store, or raises the error that the
user reads. Nothing here promises space twice: the reconciler places with the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from pureflash.conductor.placement import RAISE_RATIO, Room, check_stores, place_shard, rooms
from pureflash.conductor.view import View, usable_bytes, used_bytes
from pureflash.errors import (
    CallerError,
    ClusterError,
    Code,
    MediaError,
)
from pureflash.model.domain import (
    REPLICAS_MAX,
    SHARD_BYTES_DEFAULT,
    SHARD_BYTES_MAX,
    SHARD_BYTES_MIN,
    SHARDS_PER_VOLUME_MAX,
    Cluster,
    Export,
    ExportKind,
    Job,
    JobState,
    Store,
    Transport,
    Volume,
    VolumeIntent,
)
from pureflash.model.messages import RegisterGateway, RegisterStore
from pureflash.model.names import check_name
from pureflash.units import (
    BLOCK_BYTES,
    LARGEST_SIZE,
    SIZE_BYTES_MAX,
    format_size,
    format_sizes,
)

DELETE_JOB: Final = "volume.delete"
VERIFY_JOB: Final = "volume.verify"
REGION_BYTES: Final = 1 << 20
"""What replicas compare at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Bytes over all known stores; see `rest.CapacityView`."""

    raw_bytes: int
    usable_bytes: int
    used_bytes: int
    promised_bytes: int
    largest_store_bytes: int


def capacity(view: View) -> Capacity:
    """Add up what there is and what is promised: volume sizes times replicas."""
    raw = usable = used = largest = 0
    for store in view.stores.values():
        reports = view.observation(store.id).disks
        store_usable = 0
        for disk in store.disks:
            report = reports.get(disk.index)
            raw += disk.size_bytes
            store_usable += usable_bytes(disk, report)
            used += used_bytes(report) if report else 0
        usable += store_usable
        largest = max(largest, store_usable)
    promised = sum(volume.size_bytes * volume.replicas for volume in view.volumes.values())
    return Capacity(
        raw_bytes=raw,
        usable_bytes=usable,
        used_bytes=used,
        promised_bytes=promised,
        largest_store_bytes=largest,
    )


def find_volume(view: View, reference: str) -> Volume:
    """Find a volume by name or id. Errors: CallerError NOT_FOUND."""
    volume = view.find_volume(reference)
    if volume is None:
        raise CallerError(
            Code.NOT_FOUND,
            f"there is no volume {reference[:96]!r}",
            next_step="see `pf volume list`",
        )
    return volume


def default_replicas(view: View) -> int:
    """Give the replicas of a volume for which nobody said how many: the most there can be."""
    return max(1, min(REPLICAS_MAX, len(view.stores)))


def new_volume(
    view: View,
    *,
    name: str,
    size_bytes: int,
    replicas: int,
    shard_size_bytes: int | None,
) -> Volume:
    """Judge a wish for a volume; gives the record, with the next free id.

    Errors: INVALID, LIMIT, ALREADY_EXISTS, NO_SPACE, UNAVAILABLE with too few stores.
    """
    check_name(name)
    _check_size(size_bytes)
    _check_replicas(replicas)
    shard_bytes = SHARD_BYTES_DEFAULT if shard_size_bytes is None else shard_size_bytes
    _check_shard_size(shard_bytes)
    if name in view.names:
        raise CallerError(
            Code.ALREADY_EXISTS,
            f"a volume named {name} exists",
            next_step=f"choose another name; `pf volume show {name}` shows that one",
        )
    volume = Volume(
        id=view.cluster.next_id,
        name=name,
        size_bytes=size_bytes,
        replicas=replicas,
        shard_size_bytes=shard_bytes,
        created_at_ms=view.wall_ms,
    )
    _check_shard_count(volume)
    _check_space(view, volume, more_bytes=size_bytes, first_shard=0)
    return volume


def resized(view: View, volume: Volume, *, size_bytes: int, if_version: int | None) -> Volume:
    """Judge a resize; gives the changed record, or the same one when nothing changes.

    Errors: INVALID for shrinking, LIMIT, IN_USE, NO_SPACE, UNAVAILABLE with too few stores.
    """
    check_version(volume, if_version)
    _check_size(size_bytes)
    if volume.intent is not VolumeIntent.PRESENT:
        raise CallerError(Code.IN_USE, f"{volume.name} is being deleted")
    if size_bytes < volume.size_bytes:
        now, wanted = format_sizes(volume.size_bytes, size_bytes)
        raise CallerError(
            Code.INVALID,
            f"{volume.name} has {now}; a volume cannot shrink to {wanted}",
            next_step="make a smaller volume and copy what you need",
        )
    if size_bytes == volume.size_bytes:
        return volume
    grown = replace(volume, size_bytes=size_bytes, version=volume.version + 1)
    _check_shard_count(grown)
    _check_space(
        view,
        grown,
        more_bytes=size_bytes - volume.size_bytes,
        first_shard=volume.shard_count,
    )
    return grown


def delete_job(view: View, volume: Volume, *, if_version: int | None) -> Job | None:
    """Judge a deletion; gives the job that carries it out, None when one is under way.

    Errors: IN_USE while the volume is exported.
    """
    check_version(volume, if_version)
    exports = view.exports_of(volume.id)
    if exports:
        raise CallerError(
            Code.IN_USE,
            f"{volume.name} is exported by {exports[0].kind}",
            next_step=f"`pf export delete {volume.name}` first",
        )
    if any(
        job.volume_id == volume.id and job.kind == DELETE_JOB and not job.is_finished
        for job in view.jobs.values()
    ):
        return None
    return Job(
        id=view.cluster.next_id,
        kind=DELETE_JOB,
        target=volume.name,
        volume_id=volume.id,
        state=JobState.QUEUED,
        done=0,
        total=volume.shard_count,
        unit="shards",
        reason="",
        created_at_ms=view.wall_ms,
    )


def verify_job(view: View, volume: Volume, *, is_repairing: bool) -> Job | None:
    """Judge a verification; gives the job that carries it out, None when one is under way."""
    if volume.intent is not VolumeIntent.PRESENT:
        raise CallerError(Code.NOT_FOUND, f"{volume.name} is being deleted")
    if any(
        job.volume_id == volume.id and job.kind == VERIFY_JOB and not job.is_finished
        for job in view.jobs.values()
    ):
        return None
    regions = sum(
        -(-volume.shard_bytes(index) // REGION_BYTES) for index in range(volume.shard_count)
    )
    return Job(
        id=view.cluster.next_id,
        kind=VERIFY_JOB,
        target=volume.name,
        volume_id=volume.id,
        state=JobState.QUEUED,
        done=0,
        total=regions,
        unit="MiB",
        reason="",
        created_at_ms=view.wall_ms,
        is_repairing=is_repairing,
    )


def running_job(view: View, volume: Volume, kind: str) -> Job:
    """Give the job of this kind that is under way for a volume, which the caller knows to be."""
    return next(
        job
        for job in view.jobs.values()
        if job.volume_id == volume.id and job.kind == kind and not job.is_finished
    )


def new_export(
    view: View,
    *,
    kind: str,
    volume: Volume,
    transport: str,
    is_read_only: bool,
    gateway: str | None,
) -> Export:
    """Judge a wish for an export; gives the record, or the existing one when it is the same.

    Errors: INVALID kind or transport, IN_USE, UNAVAILABLE without a gateway.
    """
    if kind not in set(ExportKind):
        raise CallerError(Code.INVALID, f"no front end {kind[:32]!r}", next_step="use nbd")
    if transport not in set(Transport):
        raise CallerError(
            Code.INVALID, f"no transport {transport[:32]!r}", next_step="use unix or tcp"
        )
    if volume.intent is not VolumeIntent.PRESENT:
        raise CallerError(Code.IN_USE, f"{volume.name} is being deleted")
    for export in view.exports_of(volume.id):
        if (export.transport, export.is_read_only) == (transport, is_read_only):
            return export
        raise CallerError(
            Code.IN_USE,
            f"{volume.name} is exported already, over {export.transport}"
            f"{' read-only' if export.is_read_only else ''}",
            next_step=f"`pf export delete {volume.name}` first",
        )
    return Export(
        id=view.cluster.next_id,
        kind=ExportKind(kind),
        volume_id=volume.id,
        gateway=_choose_gateway(view, gateway),
        transport=Transport(transport),
        is_read_only=is_read_only,
        created_at_ms=view.wall_ms,
    )


def check_attach(view: View, volume: Volume, *, is_read_only: bool) -> None:
    """Judge a direct attach. Errors: IN_USE when it would write beside an export's clients."""
    if volume.intent is not VolumeIntent.PRESENT:
        raise CallerError(Code.IN_USE, f"{volume.name} is being deleted")
    writers = [export for export in view.exports_of(volume.id) if not export.is_read_only]
    if writers and not is_read_only:
        raise CallerError(
            Code.IN_USE,
            f"{volume.name} is exported for writing by {writers[0].kind}",
            next_step=f"write through the export, or `pf export delete {volume.name}` first",
        )


def check_version(volume: Volume, if_version: int | None) -> None:
    """Hold a request to the version that its sender saw. Errors: IN_USE when it moved on."""
    if if_version is not None and if_version != volume.version:
        raise CallerError(
            Code.IN_USE,
            f"{volume.name} has version {volume.version}, not {if_version}",
            next_step="read it again, look at what changed, and repeat",
        )


def _choose_gateway(view: View, wanted: str | None) -> str:
    connected = sorted(name for name, seen in view.gateways.items() if seen.is_connected)
    if wanted is not None:
        if wanted not in view.gateways:
            raise CallerError(Code.NOT_FOUND, f"there is no gateway {wanted[:96]!r}")
        return wanted
    if not connected:
        raise ClusterError(Code.UNAVAILABLE, "no gateway is connected")
    return connected[0]


def _check_size(size_bytes: int) -> None:
    if size_bytes <= 0:
        raise CallerError(Code.INVALID, "a volume needs a size greater than zero")
    if size_bytes > SIZE_BYTES_MAX:
        raise CallerError(Code.LIMIT, f"the largest volume is {LARGEST_SIZE}")
    if size_bytes % BLOCK_BYTES:
        raise CallerError(
            Code.INVALID,
            f"size_bytes {size_bytes} is not a multiple of {BLOCK_BYTES}",
            next_step=f"round it up to {-(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES}",
        )


def _check_replicas(replicas: int) -> None:
    if not 1 <= replicas <= REPLICAS_MAX:
        raise CallerError(
            Code.INVALID,
            f"replicas is {replicas}; use 1 to {REPLICAS_MAX}",
            next_step=f"--replicas 1 to {REPLICAS_MAX}, each on a store of its own",
        )


def _check_shard_size(shard_bytes: int) -> None:
    is_power = shard_bytes > 0 and shard_bytes & (shard_bytes - 1) == 0
    if not is_power or not SHARD_BYTES_MIN <= shard_bytes <= SHARD_BYTES_MAX:
        raise CallerError(
            Code.INVALID,
            f"a shard size of {format_size(max(0, shard_bytes))} ({shard_bytes} bytes)",
            next_step="use a power of two from 1G to 64G: 1G, 2G, 4G, 8G, 16G, 32G or 64G",
        )


def _check_shard_count(volume: Volume) -> None:
    if volume.shard_count > SHARDS_PER_VOLUME_MAX:
        raise CallerError(
            Code.LIMIT,
            f"{volume.shard_count} shards; a volume has at most {SHARDS_PER_VOLUME_MAX}",
            next_step="use a larger --shard-size",
        )


def _check_space(view: View, volume: Volume, *, more_bytes: int, first_shard: int) -> None:
    """Refuse what cannot be promised: in stores, in sum, and shard by shard on the disks."""
    available = rooms(view)
    if first_shard < volume.shard_count:
        check_stores(volume.replicas, available)
    now = capacity(view)
    limit = int(now.usable_bytes * view.overcommit_ratio)
    wanted = now.promised_bytes + more_bytes * volume.replicas
    if wanted > limit:
        asked, most = format_sizes(wanted, limit)
        raise MediaError(
            Code.NO_SPACE,
            f"volumes would have {asked} with their replicas; {most} is the"
            f" limit (usable space x overcommit_ratio {view.overcommit_ratio:g})",
            next_step=f"delete volumes, add a disk, or {RAISE_RATIO}",
        )
    if first_shard:
        _grow_last_shard(view, volume, first_shard - 1, available)
    for index in range(first_shard, volume.shard_count):
        place_shard(volume.shard_bytes(index), volume.replicas, available)


def _grow_last_shard(view: View, grown: Volume, index: int, available: Sequence[Room]) -> None:
    """Take the growth of the shard that was the last one from the disks that hold it."""
    more_bytes = grown.shard_bytes(index) - view.volumes[grown.id].shard_bytes(index)
    conf = view.shards.get((grown.id, index))
    disks = {member.disk for member in conf.members} if conf else set()
    for room in available:
        if room.disk.disk_uuid in disks:
            if room.room_bytes < more_bytes:
                more, left = format_sizes(more_bytes, max(0, room.room_bytes))
                raise MediaError(
                    Code.NO_SPACE,
                    f"shard {index} grows by {more}; its disk on {room.store.name} has room for"
                    f" {left}",
                    next_step=f"free space on that store, or {RAISE_RATIO}",
                )
            room.room_bytes -= more_bytes


def check_cluster(own: str, message: RegisterStore | RegisterGateway) -> None:
    """Refuse an agent of another cluster. Errors: ClusterError(WRONG_CLUSTER)."""
    if message.cluster_id != own:
        raise ClusterError(
            Code.WRONG_CLUSTER,
            f"the agent belongs to cluster {message.cluster_id[:32]}, not to this one",
        )


def check_given_up(cluster: Cluster, message: RegisterStore) -> None:
    """Refuse a store with a disk that a person gave up. Errors: ClusterError(UNAVAILABLE).

    One that is not served has nothing to say that could count.
    """
    failed = {report.index for report in message.disk_reports if report.state == "failed"}
    for disk in message.disks:
        if disk.index not in failed and disk.format_uuid in cluster.given_up:
            raise ClusterError(
                Code.UNAVAILABLE,
                f"disk {disk.index} of {message.name} was given up when the configuration was"
                " recovered, and what is on it does not count any more",
                next_step=f"let it begin with an empty one: `pf up --new-disk {message.name}`,"
                " after moving this one away",
            )


def check_registration(known: Store | None, message: RegisterStore) -> None:
    """Refuse a life of a store that cannot be the present one.

    Errors: ClusterError(UNAVAILABLE) for a life older than the registered one, and for one whose
    supervisor has seen it end: others have taken back what they had promised to it.
    """
    if known is not None and known.incarnation > message.incarnation:
        raise ClusterError(
            Code.UNAVAILABLE,
            f"{message.name} has registered a newer incarnation {known.incarnation}",
            next_step="end the older process of this store",
        )
    if known is not None and known.exited >= message.incarnation:
        raise ClusterError(
            Code.UNAVAILABLE,
            f"incarnation {message.incarnation} of {message.name} was reported to have ended, and"
            " the other stores count on that",
            next_step="start the store again: a new process has a new incarnation",
        )
