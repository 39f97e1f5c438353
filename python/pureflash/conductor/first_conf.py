"""The first configuration of a shard; every later one follows from it by a transition. Pure.

All replicas are empty, so all are in the ISR. `history_id` is the volume's id: it only has to
differ between volumes until a person forces a history (T7), which takes a greater one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pureflash.conductor.placement import Room
from pureflash.model.conf import first
from pureflash.model.domain import REPLICAS_MAX, Member, ShardConf, Volume

MIN_WRITE: Final = {1: 1, 2: 1, 3: 2}
"""In-sync replicas without which no write is committed, by the replicas that are wanted. Of two
one is enough: otherwise the loss of either would stop the volume."""
assert set(MIN_WRITE) == set(range(1, REPLICAS_MAX + 1)), "every number that a user may ask for"


def first_conf(volume: Volume, index: int, *, placed: Sequence[Room]) -> ShardConf:
    """Make the configuration of a new shard with one replica on each disk of `placed`.

    Copies are numbered by store. The primary moves on by one store from shard to shard and begins
    elsewhere from volume to volume, which spreads the load of small and of large volumes.
    """
    assert len(placed) == volume.replicas, "placed for this volume"
    rooms = sorted(placed, key=lambda room: room.store.id)
    members = [
        Member(
            copy=copy,
            store=room.store.id,
            incarnation=room.store.incarnation,
            disk=room.disk.disk_uuid,
            format_uuid=room.disk.format_uuid,
        )
        for copy, room in enumerate(rooms)
    ]
    return first(
        volume_id=volume.id,
        index=index,
        rf=volume.replicas,
        min_write=MIN_WRITE[volume.replicas],
        primary=(volume.id + index) % volume.replicas,
        members=members,
        history_id=volume.id,
        attach_epoch=volume.attach_epoch,
    )
