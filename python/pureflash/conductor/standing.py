"""How a member of a shard stands: what was told of it, and whether it can be relied on. Pure.

The functions from `is_given_up` on ask whether the conductor's own records can be relied on: it may
have started on an old metastore (`pureflash.conductor.amnesia`).
"""

from __future__ import annotations

from typing import Final

from pureflash.conductor.view import ShardKey, View
from pureflash.errors import ClusterError, Code
from pureflash.model.domain import Amnesia, Cluster, Member, ShardConf, Store, Volume
from pureflash.model.messages import DiskReport, ReplicaReport

RECOVER: Final = "`pf conductor recover-config`"
"""What rebuilds records that are not the newest."""


def store_name(view: View, store_id: int) -> str:
    """Name a store, also one that nothing is known of."""
    store = view.stores.get(store_id)
    return store.name if store else f"store {store_id}"


def is_reborn(view: View, member: Member) -> bool:
    """Whether a newer life of the member's store has registered."""
    store = view.stores.get(member.store)
    return store is not None and store.incarnation != member.incarnation


def is_good(view: View, key: ShardKey, member: Member) -> bool:
    """Whether a member is there, in the life that is meant, with a disk that works."""
    is_there = view.is_online(member.store) and not is_reborn(view, member)
    return is_there and has_good_disk(view, key, member)


def has_good_disk(view: View, key: ShardKey, member: Member) -> bool:
    """Whether the replica is there and its disk has not failed."""
    report = report_of(view, key, member)
    if report is None:
        return False
    disk = view.observation(member.store).disks.get(report.disk)
    store = view.stores.get(member.store)
    is_registered = store is not None and any(it.index == report.disk for it in store.disks)
    return disk is not None and disk.state != "failed" and is_registered


def failed_disk(view: View, key: ShardKey, member: Member) -> DiskReport | None:
    """Give the report of the failed disk that a member's replica lies on; None: it has not failed.

    A disk that could not be opened tells nothing of its replicas: then the configuration says which
    disk it is.
    """
    seen, store = view.observation(member.store), view.stores.get(member.store)
    report = report_of(view, key, member)
    if report is not None:
        index = report.disk
    else:
        meant = (member.disk, member.format_uuid)
        there = store.disks if store is not None else ()
        found = (it.index for it in there if (it.disk_uuid, it.format_uuid) == meant)
        index = next(found, -1)
    disk = seen.disks.get(index)
    return disk if disk is not None and disk.state == "failed" else None


def unserved_disk(view: View, member: Member) -> DiskReport | None:
    """Give the report of a failed disk that may hold a member's replica unseen; None: no such.

    The disk of the configuration, while the store has it, else any. One that a person has given up
    never comes back.
    """
    store = view.stores.get(member.store)
    there = store.disks if store is not None else ()
    meant = (member.disk, member.format_uuid)
    own = tuple(it for it in there if (it.disk_uuid, it.format_uuid) == meant)
    reports = view.observation(member.store).disks
    for disk in own or there:
        report = reports.get(disk.index)
        is_failed = report is not None and report.state == "failed"
        if is_failed and disk.format_uuid not in view.cluster.given_up:
            return report
    return None


def report_of(view: View, key: ShardKey, member: Member) -> ReplicaReport | None:
    """Give what the member's store told of its replica; None: nothing."""
    return view.observation(member.store).replicas.get(key)


def is_given_up(cluster: Cluster, store: Store) -> bool:
    """Whether a person has vouched that a store, with these disks, is lost for good.

    Of a store that nobody has heard no disk is known: then an ended life in its record says so.
    """
    if not store.disks:
        return store.exited > 0
    return all(disk.format_uuid in cluster.given_up for disk in store.disks)


def awaited(view: View) -> list[Store]:
    """Give the stores that have not registered since this conductor started."""
    return [
        store
        for store in view.stores.values()
        if view.observation(store.id).heard_at_ms is None and not is_given_up(view.cluster, store)
    ]


def is_proven(view: View, conf: ShardConf) -> bool:
    """Whether enough stores have registered to know that this is the shard's newest configuration.

    That is all of its ISR, or more than half of all stores.
    """
    missing = {store.id for store in awaited(view)}
    if not missing.intersection(conf.member(copy).store for copy in conf.isr):
        return True
    return has_heard_most(view)


def has_heard_most(view: View) -> bool:
    """Whether more than half of all stores have registered since this conductor started."""
    counted = [store for store in view.stores.values() if not is_given_up(view.cluster, store)]
    return 2 * (len(counted) - len(awaited(view))) > len(counted)


def is_known(view: View, volume: Volume | None) -> bool:
    """Whether the records of a volume, or their lack of it, are certainly not old."""
    is_here = volume is not None and all(is_proven(view, conf) for conf in view.shards_of(volume))
    return is_here or has_heard_most(view)


def check_memory(view: View, volume: Volume | None) -> None:
    """Refuse to describe a volume to a client from records that may be old; None: not in them.

    Its routes may be old, and a volume may be unknown only to these records.
    Errors: ClusterError UNAVAILABLE.
    """
    if view.amnesia is not None:
        raise lost_memory(view.amnesia)
    if not is_known(view, volume):
        names = ", ".join(store.name for store in awaited(view)) or "any store"
        raise ClusterError(
            Code.UNAVAILABLE,
            f"the conductor has started and not heard {names} yet; its records may be old",
            next_step="try again in a moment; see `pf status`",
        )


def lost_memory(amnesia: Amnesia) -> ClusterError:
    """Give the error of every request that cannot be answered without the records."""
    return ClusterError(
        Code.UNAVAILABLE,
        f"the conductor lost its memory: {amnesia.reason}",
        next_step=f"rebuild its records from the stores: {RECOVER}",
    )
