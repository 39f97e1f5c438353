"""What the store process expects of `pureflash._core`, so that a type checker sees both sides.

Commands return at once and are answered by an event with their `request_id`; events wait in a
bounded queue behind an eventfd until `drain` takes them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pureflash.errors import Code, SoftwareError


class StoreNode(Protocol):
    """`_core.StoreNode(*, store_id, incarnation, cluster_id, cluster_key, listen, disks)`.

    `disks`: [{"path": str, "engine": str}], opened with recovery before the constructor returns.
    One that cannot be, or comes with a "failure", is failed in `stats`; the others are served.
    """

    @property
    def address(self) -> str:
        """host:port of the data listener."""

    def fileno(self) -> int:
        """Give the eventfd that is readable while events wait."""

    def drain(self) -> list[tuple[Any, ...]]:
        """Take all events.

        ("done", request_id, result | None), ("failed", request_id, code, message),
        ("disk_failed", disk_index, message), ("proposal", volume_id, index, epoch, {"kind": ..}),
        ("fetch_conf", volume_id, index, newer_than_epoch),
        ("verified", request_id, regions, copies, [(region, store)] different, [..] unreadable,
        mended_blocks).
        """

    def create_replica(
        self,
        request_id: int,
        volume_id: int,
        index: int,
        copy: int,
        size_bytes: int,
        disk_uuid: str,
        conf: bytes,
    ) -> None:
        """Make a replica on a disk; done also when it exists with this size, and follows `conf`."""

    def delete_replica(self, request_id: int, volume_id: int, index: int) -> None:
        """Forget a replica and free its space; done also when there is none."""

    def resize_replica(self, request_id: int, volume_id: int, index: int, size_bytes: int) -> None:
        """Let a replica grow."""

    def set_conf(self, request_id: int, volume_id: int, index: int, conf: bytes) -> None:
        """Follow a newer configuration, as `conf_encode` wrote it; done when it does, durably."""

    def transfer_primary(self, request_id: int, volume_id: int, index: int, to: int) -> None:
        """As primary, give the reign to member `to` of the ISR; done when it was passed on."""

    def verify_replica(
        self, request_id: int, volume_id: int, index: int, is_repairing: bool
    ) -> None:
        """As primary, compare all in-sync replicas of a shard; answered by "verified".

        `is_repairing`: write damaged blocks again wherever a good copy exists.
        """

    def check_blocks(self, volume_id: int, index: int, runs: list[tuple[int, int]]) -> None:
        """Read runs (first block, blocks) here again, to learn whether they are damaged.

        No event answers; `replicas` shows what was found.
        """

    def hold_growth(self, disk: int, is_held: bool) -> None:
        """Take no more of the host's file system for a disk, or do again."""

    def fail_disk(self, disk: int, reason: str) -> None:
        """Stop a disk for good; the event "disk_failed" tells when it has."""

    def set_peers(self, peers: list[tuple[int, int, str]]) -> None:
        """Take over (store, incarnation, host:port) of every store; earlier lives are over."""

    def dead(self, store: int, incarnation: int) -> None:
        """Take note that a life of a store is over for certain."""

    def set_conductor(self, term: int, lineage: int, revision: int) -> None:
        """Follow this conductor: heartbeats tell other stores so; what is older changes nothing."""

    def heard_conductor(self) -> tuple[int, int, int]:
        """Give term, lineage, revision of the newest conductor that others named, or zeros."""

    def replicas(self) -> Sequence[Mapping[str, Any]]:
        """Give volume_id, index, copy, size_bytes, disk, lane, used_bytes, commit_seq, epoch, role.

        And promised, complete_seq, applied_seq of each,
        "resyncs": [{to, regions_left, regions_copied}], and what is known to be unreadable:
        "damaged": [(first block, blocks)], at most 64 runs, "damaged_blocks", "damage_found" (all
        blocks that were damaged in this life, mended or not), and as primary "lost" and
        "lost_blocks": what cannot be read anywhere.
        """

    def confs(self) -> Sequence[bytes]:
        """Give the configurations that its replicas follow, as `conf_encode` writes them."""

    def stats(self) -> Mapping[str, Any]:
        """Give "disks": [{path, engine, durability, state, reason, bytes_total, bytes_free, ..}].

        And "counters": {name: int}, totals since the start. A disk's "latency" are histograms since
        the start: {"writes": [(upper end of the bucket in ns, operations)], "writes_nanos": their
        sum, "reads": .., "reads_nanos": ..}.
        """

    def close(self) -> None:
        """Stop the threads and close the disks cleanly; blocks until that is done."""


class StoreCore(Protocol):
    """The part of the module `pureflash._core` that a store needs."""

    def format_disk(
        self,
        path: str,
        *,
        size_bytes: int,
        cluster_id: bytes,
        journal_bytes: int | None,
        durability: str = "auto",
    ) -> Mapping[str, Any]:
        """Make a disk, as a sparse file where there is no such file."""

    def inspect_disk(self, path: str) -> Mapping[str, Any]:
        """Give cluster_id (hex), disk_uuid, format_uuid, size, durability, lanes, .."""

    def StoreNode(  # noqa: N802 - the name of a class
        self,
        *,
        store_id: int,
        incarnation: int,
        cluster_id: bytes,
        cluster_key: bytes,
        listen: str,
        disks: list[dict[str, Any]],
    ) -> StoreNode:
        """Open the disks and start."""


def load_core() -> StoreCore:
    """Load the extension module.

    Errors: SoftwareError UNSUPPORTED when this build has no store; ImportError when it is broken.
    """
    module: Any = importlib.import_module("pureflash._core")
    for name in ("format_disk", "inspect_disk", "StoreNode"):
        if not hasattr(module, name):
            raise SoftwareError(
                Code.UNSUPPORTED,
                f"this build of the core has no {name}",
                next_step="build the package again: pip install .",
            )
    core: StoreCore = module
    return core
