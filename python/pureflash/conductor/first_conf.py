"""The first configuration of a shard, and the only one this version makes.

Every later configuration comes from the transition functions of `crates/shard` (`conf`), which do
not exist yet; until they do a shard keeps epoch 1 and one replica, nothing here changes a stored
configuration, and a store that restarts serves its replica under it again.
"""

from __future__ import annotations

from pureflash.model.domain import Disk, Member, ShardConf, Store, Volume

FIRST_EPOCH = 1


def first_conf(volume: Volume, index: int, *, store: Store, disk: Disk) -> ShardConf:
    """Make the configuration of a new shard with its one replica on `disk` of `store`.

    `history_id` is the volume's id: it only has to differ between volumes until T7 gives a new one.
    """
    assert volume.replicas == 1, "more replicas are refused before a volume is stored"
    member = Member(
        copy=0,
        store=store.id,
        incarnation=store.incarnation,
        disk=disk.disk_uuid,
        format_uuid=disk.format_uuid,
    )
    return ShardConf(
        volume_id=volume.id,
        index=index,
        epoch=FIRST_EPOCH,
        rf=1,
        min_write=1,
        primary=0,
        isr=(0,),
        learners=(),
        members=(member,),
        history_id=volume.id,
        attach_epoch=volume.attach_epoch,
    )
