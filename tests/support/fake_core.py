"""A fake of `pureflash._core` for tests of the processes around it: no data path, all bookkeeping.

A fake disk is a JSON file, so replicas survive a restart as they do on a real one. Answers come as
events through an eventfd, never from within a command, as the contract says. A replica follows a
configuration at once and has the role that it gives to this store's life: a primary is active, and
nothing is ever to be settled or copied. `propose` and `ask_for_conf` let a test speak for one,
`damage` holds what it reports of a shard's unreadable blocks, `checked` what it was to read again.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from pureflash.model.conf import decode
from pureflash.model.domain import ShardConf

UNDAMAGED: dict[str, Any] = {
    "damaged": [],
    "damaged_blocks": 0,
    "damage_found": 0,
    "lost": [],
    "lost_blocks": 0,
}


class _Events:
    """An eventfd and the events behind it."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._events: list[tuple[Any, ...]] = []

    def push(self, *event: Any) -> None:
        self._events.append(event)
        os.eventfd_write(self._descriptor, 1)

    def fileno(self) -> int:
        return self._descriptor

    def drain(self) -> list[tuple[Any, ...]]:
        if self._events:
            os.eventfd_read(self._descriptor)
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        os.close(self._descriptor)


class FakeStoreNode:
    """Keeps replicas in the JSON of its only disk. `refuse` makes commands fail with a message."""

    def __init__(
        self,
        *,
        store_id: int,
        incarnation: int,
        cluster_id: bytes,
        cluster_key: bytes,
        listen: str,
        disks: list[dict[str, Any]],
    ) -> None:
        assert len(cluster_id) == 16
        assert len(cluster_key) == 32
        self.store_id = store_id
        self.incarnation = incarnation
        self.refuse: tuple[int, str] | None = None
        self.peers: list[tuple[int, int, str]] = []
        self.over: set[tuple[int, int]] = set()
        self.held: dict[int, bool] = {}
        self.told = (0, 0, 0)
        self.heard = (0, 0, 0)
        self.resyncs: dict[tuple[int, int], list[dict[str, int]]] = {}
        self.found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        self.mended = 0
        self.repairing: list[bool] = []
        self.damage: dict[tuple[int, int], dict[str, Any]] = {}
        self.checked: list[tuple[int, int, list[tuple[int, int]]]] = []
        self._listen = listen
        self._path = Path(disks[0]["path"])
        self.failure: str = disks[0].get("failure", "")
        self._events = _Events()
        self.is_closed = False

    @property
    def address(self) -> str:
        return self._listen

    def fileno(self) -> int:
        return self._events.fileno()

    def drain(self) -> list[tuple[Any, ...]]:
        return self._events.drain()

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
        disk = self._read()
        if disk["disk_uuid"] != disk_uuid:
            self._events.push("failed", request_id, 23, f"no disk {disk_uuid}")
            return
        if known := disk["replicas"].get(f"{volume_id}/{index}"):
            self._follow(request_id, known, conf)
            return
        replica = {
            "volume_id": volume_id,
            "index": index,
            "copy": copy,
            "size_bytes": size_bytes,
            "disk": 0,
            "lane": 0,
            "conf": conf.hex(),
            "commit_seq": 0,
            "complete_seq": 0,
            "applied_seq": 0,
            "used_bytes": 0,
        }
        self._change(request_id, volume_id, index, replica)

    def delete_replica(self, request_id: int, volume_id: int, index: int) -> None:
        self._change(request_id, volume_id, index, None)

    def resize_replica(self, request_id: int, volume_id: int, index: int, size_bytes: int) -> None:
        self._update(request_id, volume_id, index, {"size_bytes": size_bytes})

    def confs(self) -> list[bytes]:
        return [bytes.fromhex(known["conf"]) for known in self._read()["replicas"].values()]

    def hold_growth(self, disk: int, is_held: bool) -> None:
        self.held[disk] = is_held

    def fail_disk(self, disk: int, reason: str) -> None:
        self.failure = reason
        self._events.push("disk_failed", disk, reason)

    def set_conf(self, request_id: int, volume_id: int, index: int, conf: bytes) -> None:
        known = self._read()["replicas"].get(f"{volume_id}/{index}")
        if known is None:
            self._events.push("failed", request_id, 23, "no such replica")
        else:
            self._follow(request_id, known, conf)

    def verify_replica(
        self, request_id: int, volume_id: int, index: int, is_repairing: bool
    ) -> None:
        known = self._read()["replicas"].get(f"{volume_id}/{index}")
        if known is None:
            self._events.push("failed", request_id, 23, "no such replica")
        else:
            different, unreadable = self.found
            regions = -(-int(known["size_bytes"]) // (1 << 20))
            self.repairing.append(is_repairing)
            mended = self.mended if is_repairing else 0
            self._events.push("verified", request_id, regions, 3, different, unreadable, mended)

    def check_blocks(self, volume_id: int, index: int, runs: list[tuple[int, int]]) -> None:
        self.checked.append((volume_id, index, runs))

    def transfer_primary(self, request_id: int, volume_id: int, index: int, to: int) -> None:
        known = self._read()["replicas"].get(f"{volume_id}/{index}")
        if known is None:
            self._events.push("failed", request_id, 23, "no such replica")
            return
        self._events.push("done", request_id, None)
        epoch = conf_of(known).epoch
        transition = {"kind": "transfer", "copy": to}
        self._events.push("proposal", volume_id, index, epoch, transition)

    def set_peers(self, peers: list[tuple[int, int, str]]) -> None:
        self.peers = peers

    def dead(self, store: int, incarnation: int) -> None:
        self.over.add((store, incarnation))

    def set_conductor(self, term: int, lineage: int, revision: int) -> None:
        self.told = max(self.told, (term, lineage, revision))

    def heard_conductor(self) -> tuple[int, int, int]:
        return self.heard

    def replicas(self) -> list[dict[str, Any]]:
        return [self._report(replica) for replica in self._read()["replicas"].values()]

    def propose(self, volume_id: int, index: int, transition: dict[str, Any]) -> None:
        """Let a replica of this store ask for a transition of the configuration it follows."""
        replica = self._read()["replicas"][f"{volume_id}/{index}"]
        self._events.push("proposal", volume_id, index, conf_of(replica).epoch, transition)

    def ask_for_conf(self, volume_id: int, index: int, *, newer_than: int) -> None:
        """Let a replica of this store ask for a newer configuration."""
        self._events.push("fetch_conf", volume_id, index, newer_than)

    def conf(self, volume_id: int, index: int) -> ShardConf:
        """Give the configuration that a replica follows."""
        return conf_of(self._read()["replicas"][f"{volume_id}/{index}"])

    def _report(self, replica: dict[str, Any]) -> dict[str, Any]:
        conf = conf_of(replica)
        key = (replica["volume_id"], replica["index"])
        return replica | {
            "epoch": conf.epoch,
            "promised": conf.epoch,
            "role": role_in(conf, store=self.store_id, incarnation=self.incarnation),
            "resyncs": self.resyncs.get(key, []),
            **UNDAMAGED,
            **self.damage.get(key, {}),
        }

    def _follow(self, request_id: int, replica: dict[str, Any], conf: bytes) -> None:
        is_newer = decode(conf).epoch > conf_of(replica).epoch
        new = {"conf": conf.hex()} if is_newer else {}
        self._change(request_id, replica["volume_id"], replica["index"], replica | new)

    def stats(self) -> dict[str, Any]:
        total = 0 if self.failure else self._read()["size_bytes"]
        return {
            "disks": [
                {
                    "path": str(self._path),
                    "engine": "mem",
                    "durability": "auto",
                    "state": "failed" if self.failure else "ok",
                    "reason": self.failure,
                    "bytes_total": total,
                    "bytes_free": total,
                }
            ],
            "counters": {"reads": 0, "writes": 0},
        }

    def close(self) -> None:
        assert not self.is_closed, "closed once"
        self.is_closed = True
        self._events.close()

    def _read(self) -> dict[str, Any]:
        if self.failure:
            return {"disk_uuid": "", "replicas": {}}
        disk: dict[str, Any] = json.loads(self._path.read_text())
        return disk

    def _update(self, request_id: int, volume_id: int, index: int, new: dict[str, Any]) -> None:
        replica = self._read()["replicas"].get(f"{volume_id}/{index}")
        if replica is None:
            self._events.push("failed", request_id, 23, "no such replica")
        else:
            self._change(request_id, volume_id, index, replica | new)

    def _change(
        self, request_id: int, volume_id: int, index: int, replica: dict[str, Any] | None
    ) -> None:
        if self.refuse is not None:
            self._events.push("failed", request_id, *self.refuse)
            return
        disk = self._read()
        if replica is None:
            disk["replicas"].pop(f"{volume_id}/{index}", None)
        else:
            disk["replicas"][f"{volume_id}/{index}"] = replica
        self._path.write_text(json.dumps(disk))
        self._events.push("done", request_id, None)


def conf_of(replica: dict[str, Any]) -> ShardConf:
    """Read the configuration in a replica's record on a fake disk."""
    return decode(bytes.fromhex(replica["conf"]))


def role_in(conf: ShardConf, *, store: int, incarnation: int) -> str:
    """Give the role that a configuration has for a life of a store, as a replica reports it."""
    lives = ((one.store, one.incarnation, one.copy) for one in conf.members)
    copy = next((copy for *life, copy in lives if life == [store, incarnation]), None)
    if copy == conf.primary:
        return "active"
    if copy in conf.isr:
        return "secondary"
    return "learner" if copy in conf.learners else "out"


class FakeGateway:
    """Remembers what is open; adopted sockets stay open until `finish` or `close`."""

    def __init__(self, *, cluster_id: bytes) -> None:
        assert len(cluster_id) == 16
        self.volumes: dict[int, dict[str, Any]] = {}
        self.adopted: dict[int, tuple[int, bytes, int, bool, bool]] = {}
        self._events = _Events()
        self._next = 1

    def open_volume(self, handle: int, spec: dict[str, Any]) -> None:
        assert handle not in self.volumes
        self.volumes[handle] = spec

    def update_volume(self, handle: int, spec: dict[str, Any]) -> None:
        assert handle in self.volumes
        self.volumes[handle] = spec

    def close_volume(self, handle: int) -> None:
        del self.volumes[handle]
        for number in [n for n, adopted in self.adopted.items() if adopted[2] == handle]:
            self.finish(number, "the export is gone")

    def adopt_nbd(
        self, fd: int, leftover: bytes, handle: int, structured: bool, read_only: bool
    ) -> int:
        number, self._next = self._next, self._next + 1
        # As the real one: a duplicate, the caller closes its own.
        self.adopted[number] = (os.dup(fd), leftover, handle, structured, read_only)
        return number

    def finish(self, number: int, reason: str) -> None:
        os.close(self.adopted.pop(number)[0])
        self._events.push("closed", number, reason)

    def fileno(self) -> int:
        return self._events.fileno()

    def drain(self) -> list[tuple[Any, ...]]:
        return self._events.drain()

    def stats(self) -> dict[str, Any]:
        return {"volumes": {handle: {"requests": 0} for handle in self.volumes}}

    def close(self) -> None:
        for number in list(self.adopted):
            self.finish(number, "closing")
        self._events.close()


class FakeCore:
    """The module: functions and classes by their names."""

    def __init__(self) -> None:
        self.nodes: list[FakeStoreNode] = []
        self.gateways: list[FakeGateway] = []

    def format_disk(
        self,
        path: str,
        *,
        size_bytes: int,
        cluster_id: bytes,
        journal_bytes: int | None,
        durability: str = "auto",
    ) -> dict[str, Any]:
        found = {
            "cluster_id": cluster_id.hex(),
            "disk_uuid": uuid.uuid4().hex,
            "format_uuid": uuid.uuid4().hex,
            "size_bytes": size_bytes,
            "journal_bytes": journal_bytes,
            "durability": durability,
            "replicas": {},
        }
        Path(path).write_text(json.dumps(found))
        return found

    def inspect_disk(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(Path(path).read_text())
        return found

    def StoreNode(self, **arguments: Any) -> FakeStoreNode:  # noqa: N802 - the name of a class
        node = FakeStoreNode(**arguments)
        self.nodes.append(node)
        return node

    def Gateway(self, **arguments: Any) -> FakeGateway:  # noqa: N802 - the name of a class
        gateway = FakeGateway(**arguments)
        self.gateways.append(gateway)
        return gateway
