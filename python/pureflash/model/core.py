"""How a volume is described to `pureflash._core`, by whoever opens one: clients and gateways."""

from __future__ import annotations

from typing import Any

from pureflash.model.messages import VolumeSpec


def core_spec(spec: VolumeSpec) -> dict[str, Any]:
    """Turn a specification off the wire into the one that `_core` takes.

    Shards whose primary is not known yet are left out: their requests wait for an update.
    """
    return {
        "volume_id": spec.volume_id,
        "size_bytes": spec.size_bytes,
        "shard_size_bytes": spec.shard_size_bytes,
        "attach_epoch": spec.attach_epoch,
        "ticket": bytes.fromhex(spec.ticket),
        "shards": [
            {"index": shard.index, "epoch": shard.epoch, "address": shard.address}
            for shard in spec.shards
            if shard.address
        ],
    }
