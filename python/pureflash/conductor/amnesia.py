"""Whether the metastore is the newest one, and how to rebuild it from the stores. Pure.

Theory of operation. A metastore that was restored from a copy, or made anew, does not know the last
configurations; a conductor that believed it would give shards to replicas that lack acknowledged
writes. Stores remember who led them: lineage, term and revision of the last thing they were told,
and of what other stores were told, which rides on PINGs. `why_foreign` compares that with the
reigns that the metastore knows (`pureflash.metastore.lease`). One store that remembers more is
enough: the conductor then changes nothing any more (*amnesia*), while stores and gateways go on as
they are, and `pf conductor recover-config` rebuilds the records from what the stores hold.

The store that remembers may be away when the conductor starts. So no shard's configuration changes
before all of its ISR, or more than half of the stores, have registered (`standing.is_proven`): some
of the stores that a newer configuration needs to take effect are among those, and they were told of
its reign or have heard of it.

`plan_recovery` takes for every shard the newest configuration that any store follows. Every known
store must be connected: a missing one may hold a newer configuration. A store that a person gives
up with `without` is over for good: its life is recorded as ended and its disks never register
again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pureflash.conductor.standing import is_given_up
from pureflash.conductor.view import ShardKey, View
from pureflash.errors import CallerError, ClusterError, Code
from pureflash.metastore import keys
from pureflash.metastore.lease import Reign
from pureflash.metastore.records import Write
from pureflash.model.domain import (
    SHARD_BYTES_DEFAULT,
    SHARD_BYTES_MAX,
    Cluster,
    Disk,
    Job,
    JobState,
    Member,
    NameClaim,
    ShardConf,
    Store,
    Volume,
    VolumeIntent,
)
from pureflash.model.messages import RegisterStore
from pureflash.model.rest import RecoveredObject

RECOVER_JOB: Final = "conductor.recover_config"
IDS_SKIPPED: Final = 1 << 20
"""Ids that the lost records may have given: more than a cluster makes between two copies."""


def why_foreign(
    reigns: Sequence[Reign],
    *,
    lineage: str,
    predecessors: Sequence[str],
    revision: int,
    told: RegisterStore,
) -> str:
    """Say what a store remembers that this metastore does not; empty: nothing.

    `reigns` in order, `revision` is the present one.
    """
    if told.lineage in ("", *predecessors):
        return ""
    if told.lineage != lineage:
        return (
            f"{told.name} was led by a conductor with metastore {told.lineage[:8]}, and this is"
            f" {lineage[:8]}"
        )
    own = _unknown(reigns, revision, told.name, told.term, told.revision)
    if own or not told.heard_term:
        return own
    peer = f"a peer of {told.name}"
    return _unknown(reigns, revision, peer, told.heard_term, told.heard_revision)


def _unknown(
    reigns: Sequence[Reign], revision: int, who: str, told_term: int, told_revision: int
) -> str:
    """Say why a revision told in a term is not of this metastore's history; empty: it is."""
    ends = [*(reign.since for reign in reigns[1:]), revision]
    for reign, end in zip(reigns, ends, strict=True):
        if reign.term == told_term:
            if told_revision <= end:
                return ""
            return (
                f"{who} was told of revision {told_revision} in term {told_term}, and this"
                f" metastore had only come to {end} then"
            )
    if reigns and told_term < reigns[0].term and told_revision <= reigns[0].since:
        return ""  # older than the reigns that are kept
    return f"{who} was led in term {told_term}, which this metastore knows nothing of"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a connected store says that it holds."""

    registration: RegisterStore
    confs: tuple[ShardConf, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """What recovering would write; `found` and `given_up` are for people.

    `above` is the highest term that any store remembers.
    """

    found: tuple[RecoveredObject, ...]
    given_up: tuple[str, ...]
    writes: tuple[Write, ...]
    job: Job
    above: int


def plan_recovery(
    view: View,
    held: Mapping[int, Held],
    *,
    expected: Mapping[int, str],
    lineage: str,
    without: Sequence[str],
    by: str,
) -> RecoveryPlan:
    """Rebuild the records from what the stores hold, and from those that are no older.

    `lineage` is the present one; `expected` are names by id of stores that must be there although
    nobody may have said so yet: a new metastore knows no store, so nobody would miss one. Errors:
    UNAVAILABLE while a known store is not connected, or a disk of one is not served; NOT_FOUND for
    a name in `without` that is none, UNSAFE for one that is connected, and for two configurations
    that exclude one another.
    """
    known = _known_stores(view, held, expected)
    gone = _gone(known, held, without)
    _check_stores(view, held, known, gone)
    _check_disks(view, held, without)
    confs = _newest(view, held)
    lost = _deleted(view, held, confs, gone)
    volumes = {volume.id: volume for volume in _volumes(view, held, confs) if volume.id not in lost}
    found: list[RecoveredObject] = []
    writes: list[Write] = []
    for name, write in (
        *_store_writes(view, held, known, gone),
        *_volume_writes(view, volumes, lost),
        *_shard_writes(view, confs, volumes, lost),
    ):
        writes.append(write)
        if name:
            found.append(RecoveredObject(subject=name, change=write.reason))
    disks = {name: disk for name in without if (disk := _disk_named(held, name)) is not None}
    cluster = _cluster(view, held, known, gone, lineage=lineage, volumes=volumes)
    given = {disk.format_uuid for disk in disks.values()} - {""}
    cluster = replace(cluster, given_up=tuple(sorted({*cluster.given_up, *given})))
    names = (*(known[store].name for store in sorted(gone)), *disks)
    job = _job(view, cluster, found=len(found), by=by, gone=names)
    writes = [
        Write(keys.CLUSTER, replace(cluster, next_id=job.id + 1), job.reason),
        *writes,
        Write(keys.job(job.id), job, job.reason),
    ]
    told = (one.registration for one in held.values())
    above = max((max(one.term, one.heard_term) for one in told), default=0)
    return RecoveryPlan(
        found=tuple(found), given_up=names, writes=tuple(writes), job=job, above=above
    )


def _known_stores(
    view: View, held: Mapping[int, Held], expected: Mapping[int, str]
) -> dict[int, Store]:
    """Give every store that a record, a registration or a configuration names, or the settings."""
    known = dict(view.stores)
    for one in held.values():
        told = one.registration
        before = known.get(told.store)
        known[told.store] = Store(
            id=told.store,
            name=told.name,
            incarnation=told.incarnation,
            address=told.address,
            disks=told.disks,
            exited=before.exited if before else 0,
        )
    for number, name in expected.items():
        known.setdefault(number, Store(id=number, name=name, incarnation=0, address="", disks=()))
    for member in _members(view, held):
        named = Store(
            id=member.store,
            name=f"store-{member.store}",
            incarnation=member.incarnation,
            address="",
            disks=(),
        )
        before = known.setdefault(member.store, named)
        if before.incarnation == 0:
            known[member.store] = replace(before, incarnation=member.incarnation)
    return known


def _members(view: View, held: Mapping[int, Held]) -> Iterator[Member]:
    for conf in view.shards.values():
        yield from conf.members
    for one in held.values():
        for conf in one.confs:
            yield from conf.members


def _gone(
    known: Mapping[int, Store], held: Mapping[int, Held], without: Sequence[str]
) -> frozenset[int]:
    """Find the stores that a person gives up."""
    gone: set[int] = set()
    for reference in without:
        if _disk_named(held, reference) is not None:
            continue
        found = [one for one in known.values() if reference in (one.name, str(one.id))]
        if not found:
            raise CallerError(
                Code.NOT_FOUND,
                f"there is no store {reference[:96]!r}",
                next_step="see `pf store list`",
            )
        if found[0].id in held:
            raise CallerError(
                Code.UNSAFE,
                f"{found[0].name} is connected, and what it holds counts",
                next_step=f"leave --without {found[0].name} away",
            )
        gone.add(found[0].id)
    return frozenset(gone)


def _disk_named(held: Mapping[int, Held], reference: str) -> Disk | None:
    """Find the failed disk of a connected store that `NAME/INDEX` names."""
    for told in (one.registration for one in held.values()):
        failed = {report.index for report in told.disk_reports if report.state == "failed"}
        for disk in told.disks:
            if disk.index in failed and reference == f"{told.name}/{disk.index}":
                return disk
    return None


def _check_stores(
    view: View, held: Mapping[int, Held], known: Mapping[int, Store], gone: frozenset[int]
) -> None:
    """Refuse to go on without a store that is not given up. Errors: ClusterError UNAVAILABLE."""
    if missing := [
        store.name
        for store in known.values()
        if store.id not in held and store.id not in gone and not is_given_up(view.cluster, store)
    ]:
        raise ClusterError(
            Code.UNAVAILABLE,
            f"{', '.join(missing)} not connected: a store that is missing may hold what the others"
            " know nothing of",
            next_step=f"start it; or, when it is lost for good, say so with --without {missing[0]}",
        )


def _check_disks(view: View, held: Mapping[int, Held], without: Sequence[str]) -> None:
    """Refuse to go on while a disk is not served that may hold what the others know nothing of.

    Errors: ClusterError UNAVAILABLE, which names it.
    """
    for told in (one.registration for one in held.values()):
        reasons = {it.index: it.reason for it in told.disk_reports if it.state == "failed"}
        for disk in told.disks:
            name = f"{told.name}/{disk.index}"
            is_given = disk.format_uuid in view.cluster.given_up or name in without
            if disk.index in reasons and not is_given:
                raise ClusterError(
                    Code.UNAVAILABLE,
                    f"disk {name} is not served and may hold what the others know nothing of:"
                    f" {reasons[disk.index]}",
                    next_step=f"bring it back; or, when it is lost for good, say so with"
                    f" --without {name}",
                )


def _newest(view: View, held: Mapping[int, Held]) -> dict[ShardKey, ShardConf]:
    """Give the newest configuration of every shard that anybody knows."""
    newest = dict(view.shards)
    for one in held.values():
        for conf in one.confs:
            key = (conf.volume_id, conf.index)
            before = newest.get(key)
            if before is None or conf.epoch > before.epoch:
                newest[key] = conf
            elif conf.epoch == before.epoch and conf != before:
                raise CallerError(
                    Code.UNSAFE,
                    f"shard {conf.index} of volume {conf.volume_id} has two configurations of epoch"
                    f" {conf.epoch}: {one.registration.name} follows another than the rest",
                    next_step="two conductors have led this cluster; stop the stores that followed"
                    " the one that was wrong, and give them up with --without",
                )
    return newest


def _sizes(held: Mapping[int, Held]) -> dict[ShardKey, int]:
    """Give the size in bytes of the largest replica of each shard."""
    sizes: dict[ShardKey, int] = {}
    for one in held.values():
        for report in one.registration.replicas:
            key = (report.volume_id, report.index)
            sizes[key] = max(sizes.get(key, 0), report.size_bytes)
    return sizes


def _deleted(
    view: View,
    held: Mapping[int, Held],
    confs: Mapping[ShardKey, ShardConf],
    gone: frozenset[int],
) -> frozenset[int]:
    """Give the volumes of the records that were deleted since: no store has anything of them."""
    sizes = _sizes(held)
    left = {volume_id for volume_id, _ in sizes}
    left |= {
        conf.volume_id
        for conf in confs.values()
        for member in conf.members
        if member.store in gone
        or member.store not in held
        or _is_unseen(held[member.store], member)
    }
    return frozenset(view.volumes.keys() - left)


def _is_unseen(one: Held, member: Member) -> bool:
    """Whether a connected store may have a member's replica on a disk that it does not serve."""
    told, meant = one.registration, (member.disk, member.format_uuid)
    failed = {report.index for report in told.disk_reports if report.state == "failed"}
    own = [disk for disk in told.disks if (disk.disk_uuid, disk.format_uuid) == meant]
    return any(disk.index in failed for disk in own or told.disks)


def _volumes(
    view: View, held: Mapping[int, Held], confs: Mapping[ShardKey, ShardConf]
) -> Iterator[Volume]:
    """Give every volume as the records and the stores describe it together."""
    sizes = _sizes(held)
    shards: dict[int, dict[int, int]] = {}
    for volume_id, index in confs:
        shards.setdefault(volume_id, {})[index] = sizes.get((volume_id, index), 0)
    for volume_id in sorted(view.volumes.keys() | shards.keys()):
        by_index = shards.get(volume_id, {})
        own = [conf for key, conf in confs.items() if key[0] == volume_id]
        attach_epoch = max((conf.attach_epoch for conf in own), default=1)
        known = view.volumes.get(volume_id)
        if known is not None:
            size_bytes = _grown(known, by_index)
            yield replace(
                known,
                size_bytes=size_bytes,
                attach_epoch=max(known.attach_epoch, attach_epoch),
                version=known.version + (size_bytes != known.size_bytes),
            )
        elif (found := _unnamed(view, volume_id, by_index)) is not None:
            rf = max(conf.rf for conf in own)
            yield replace(found, replicas=rf, attach_epoch=attach_epoch)


def _grown(known: Volume, by_index: Mapping[int, int]) -> int:
    """Give a volume's size by its shards: as many as came since without a gap."""
    last = known.shard_count - 1
    while by_index.get(last + 1, 0):
        last += 1
    return max(known.size_bytes, last * known.shard_size_bytes + by_index.get(last, 0))


def _unnamed(view: View, volume_id: int, by_index: Mapping[int, int]) -> Volume | None:
    """Describe a volume that only stores know; None when a shard of it is on none of them.

    Its replicas stay where they are then: inventing the missing part would be worse.
    """
    last = max(by_index)
    if set(by_index) != set(range(last + 1)) or not all(by_index.values()):
        return None
    alone = SHARD_BYTES_DEFAULT if by_index[0] <= SHARD_BYTES_DEFAULT else SHARD_BYTES_MAX
    shard_size_bytes = by_index[0] if last else alone
    return Volume(
        id=volume_id,
        name=f"recovered-{volume_id}",
        size_bytes=last * shard_size_bytes + by_index[last],
        replicas=1,
        shard_size_bytes=shard_size_bytes,
        created_at_ms=view.wall_ms,
    )


Named = tuple[str, Write]
"""A write with the name of its object, for people; empty where another write names that."""


def _store_writes(
    view: View, held: Mapping[int, Held], known: Mapping[int, Store], gone: frozenset[int]
) -> Iterator[Named]:
    for store in known.values():
        before = view.stores.get(store.id)
        ended = max(1, store.incarnation)  # of one that nobody has heard, its life is not known
        after = replace(store, exited=ended) if store.id in gone else store
        if store.id in gone:
            yield store.name, Write(keys.store(store.id), after, "given up: lost for good")
        elif store.id in held and after != before:
            reason = "as it registered" if before is None else "as it registered last"
            yield store.name, Write(keys.store(store.id), after, reason)


def _volume_writes(
    view: View, volumes: Mapping[int, Volume], lost: frozenset[int]
) -> Iterator[Named]:
    for volume in volumes.values():
        before = view.volumes.get(volume.id)
        if before is None:
            reason = f"stores hold it, and its name is lost: volume {volume.id}"
            claim = NameClaim(volume_id=volume.id)
            yield "", Write(keys.name(volume.name), claim, reason)
            yield volume.name, Write(keys.volume(volume.id), volume, reason)
        elif before != volume:
            what = "has grown" if volume.size_bytes > before.size_bytes else "was attached anew"
            yield volume.name, Write(keys.volume(volume.id), volume, f"it {what} since")
    for volume_id in sorted(lost):
        name = view.volumes[volume_id].name
        reason = "deleted since: no store has anything of it"
        if view.volumes[volume_id].intent is VolumeIntent.PRESENT and name in view.names:
            yield "", Write(keys.name(name), None, reason)
        yield name, Write(keys.volume(volume_id), None, reason)


def _shard_writes(
    view: View,
    confs: Mapping[ShardKey, ShardConf],
    volumes: Mapping[int, Volume],
    lost: frozenset[int],
) -> Iterator[Named]:
    for key, conf in sorted(confs.items()):
        before = view.shards.get(key)
        if key[0] in lost:
            name = f"{view.volumes[key[0]].name}/{key[1]}"
            yield name, Write(keys.shard(*key), None, "deleted since: no store has a replica of it")
        elif key[0] in volumes and conf != before:
            name = f"{volumes[key[0]].name}/{key[1]}"
            epochs = f"epoch {conf.epoch}, " + (f"not {before.epoch}" if before else "not known")
            yield name, Write(keys.shard(*key), conf, f"its stores follow {epochs}")


def _cluster(
    view: View,
    held: Mapping[int, Held],
    known: Mapping[int, Store],
    gone: frozenset[int],
    *,
    lineage: str,
    volumes: Mapping[int, Volume],
) -> Cluster:
    """Give the cluster's record: whose successor it is, who is given up, and ids not yet given."""
    lineages = {one.registration.lineage for one in held.values()} | {lineage}
    lineages -= {"", *view.cluster.predecessors}
    disks = {disk.format_uuid for store in gone for disk in known[store].disks}
    disks |= {member.format_uuid for member in _members(view, held) if member.store in gone}
    highest = max((view.cluster.next_id, *volumes))
    return replace(
        view.cluster,
        predecessors=(*view.cluster.predecessors, *sorted(lineages)),
        given_up=tuple(sorted({*view.cluster.given_up, *disks})),
        next_id=highest + IDS_SKIPPED,
    )


def _job(view: View, cluster: Cluster, *, found: int, by: str, gone: Sequence[str]) -> Job:
    """Give the record of the decision, which stays in the list of jobs."""
    reason = f"{by} rebuilt the configuration from the stores"
    if gone:
        reason += f", without {', '.join(gone)}"
    return Job(
        id=cluster.next_id,
        kind=RECOVER_JOB,
        target="cluster",
        volume_id=0,
        state=JobState.SUCCEEDED,
        done=found,
        total=found,
        unit="records",
        reason=reason,
        created_at_ms=view.wall_ms,
        finished_at_ms=view.wall_ms,
    )
