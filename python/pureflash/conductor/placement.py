"""Placement: which disk holds a replica. Pure, and the same view gives the same answer.

Rules. Replicas of a shard lie on distinct stores, so as many stores as replicas have to be online;
nothing is placed on fewer, as the missing copies would not be made later. A disk takes a replica
only if what it has promised, with the replica, stays within usable x `overcommit_ratio`. Of those
that can take it the one with the most room left wins, which spreads the shards of a volume; ties go
to the lower id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pureflash.conductor.view import View, promised_by_disk, usable_bytes
from pureflash.errors import ClusterError, Code, MediaError
from pureflash.model.domain import Disk, Member, Store
from pureflash.units import format_sizes

RAISE_RATIO: Final = (
    "raise overcommit_ratio (`PF_LIMITS_OVERCOMMIT_RATIO=1.5 pf up`, after `pf down`)"
)
"""The end of a next step; space that is promised twice can run out."""


@dataclass(slots=True)
class Room:
    """A disk and the bytes that may still be promised on it; placing takes from it."""

    store: Store
    disk: Disk
    room_bytes: int


def rooms(view: View) -> list[Room]:
    """List the disks of all online stores with their room."""
    promised = promised_by_disk(view)
    found: list[Room] = []
    for store in sorted(view.stores.values(), key=lambda store: store.id):
        if not view.is_online(store.id):
            continue
        reports = view.observation(store.id).disks
        for disk in store.disks:
            limit = int(usable_bytes(disk, reports.get(disk.index)) * view.overcommit_ratio)
            found.append(Room(store, disk, limit - promised.get(disk.disk_uuid, 0)))
    return found


def home_of(view: View, member: Member, size_bytes: int) -> str | None:
    """Choose the disk of a member's store for its replica; gives its uuid.

    The disk of the configuration, while the store has it; a store whose disk was replaced takes the
    replica on the one with the most room. None when none has room. A disk that has failed may come
    back with its replica, so no other one of its store takes the place: a store has one at most.
    """
    store = view.stores[member.store]
    meant = (member.disk, member.format_uuid)
    for disk in store.disks:
        if (disk.disk_uuid, disk.format_uuid) == meant:
            report = view.observation(store.id).disks.get(disk.index)
            has_failed = report is not None and report.state == "failed"
            return None if has_failed else member.disk
    fitting = [
        room for room in rooms(view) if room.store.id == store.id and room.room_bytes >= size_bytes
    ]
    best = max(fitting, key=lambda room: (room.room_bytes, -room.disk.index), default=None)
    return None if best is None else best.disk.disk_uuid


def check_stores(replicas: int, available: Sequence[Room]) -> None:
    """Refuse what has too few stores. Errors: ClusterError UNAVAILABLE, which says how many."""
    names = sorted({room.store.name for room in available})
    if len(names) >= replicas:
        return
    needed = f"{replicas} replicas need {replicas} stores" if replicas > 1 else "a store is needed"
    online = f"{len(names)} online ({', '.join(names)})" if names else "no store is online"
    fewer = f", or use --replicas {len(names)}" if names else ""
    raise ClusterError(
        Code.UNAVAILABLE,
        f"{needed}; {online}",
        next_step=f"see `pf store list`; start or add stores and try again{fewer}",
    )


def place_shard(size_bytes: int, replicas: int, available: Sequence[Room]) -> list[Room]:
    """Choose `replicas` disks on distinct stores and take `size_bytes` from the room of each.

    Errors: as `check_stores`; MediaError NO_SPACE, which says what is missing. Nothing is taken
    then.
    """
    check_stores(replicas, available)
    chosen: list[Room] = []
    for room in sorted(available, key=lambda room: (-room.room_bytes, room.store.id)):
        if room.room_bytes < size_bytes or len(chosen) == replicas:
            break
        if all(room.store.id != other.store.id for other in chosen):
            chosen.append(room)
    if len(chosen) < replicas:
        raise _no_room(size_bytes, replicas, available)
    for room in chosen:
        room.room_bytes -= size_bytes
    return chosen


def _no_room(size_bytes: int, replicas: int, available: Sequence[Room]) -> MediaError:
    fitting = {room.store.id for room in available if room.room_bytes >= size_bytes}
    largest = max(0, *(room.room_bytes for room in available), 0)
    size, room = format_sizes(size_bytes, largest)
    return MediaError(
        Code.NO_SPACE,
        f"{replicas} replica(s) of a shard of {size} need {replicas} store(s) with room for it and"
        f" {len(fitting)} have it; the largest room on a disk is {room}",
        next_step=f"use a smaller --shard-size, delete volumes, add a disk, or {RAISE_RATIO}",
    )
