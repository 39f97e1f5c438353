"""A fake of `pureflash._core` for tests of the processes around it: no data path, all bookkeeping.

A fake disk is a JSON file, so replicas survive a restart as they do on a real one. Answers come as
events through an eventfd, never from within a command, as the contract says.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


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
        self._listen = listen
        self._path = Path(disks[0]["path"])
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
        conf: bytes,
    ) -> None:
        replica = {
            "volume_id": volume_id,
            "index": index,
            "copy": copy,
            "size_bytes": size_bytes,
            "disk": 0,
            "lane": 0,
            "conf": conf.decode(),
            "commit_seq": 0,
            "used_bytes": 0,
        }
        self._change(request_id, volume_id, index, replica)

    def delete_replica(self, request_id: int, volume_id: int, index: int) -> None:
        self._change(request_id, volume_id, index, None)

    def resize_replica(self, request_id: int, volume_id: int, index: int, size_bytes: int) -> None:
        self._update(request_id, volume_id, index, {"size_bytes": size_bytes})

    def set_conf(self, request_id: int, volume_id: int, index: int, conf: bytes) -> None:
        self._update(request_id, volume_id, index, {"conf": conf.decode()})

    def replicas(self) -> list[dict[str, Any]]:
        found = self._read()["replicas"].values()
        return [replica | {"conf": replica["conf"].encode()} for replica in found]

    def stats(self) -> dict[str, Any]:
        disk = self._read()
        total = disk["size_bytes"]
        return {
            "disks": [
                {
                    "path": str(self._path),
                    "engine": "mem",
                    "durability": "auto",
                    "state": "ok",
                    "reason": "",
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
