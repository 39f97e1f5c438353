"""A running cluster that is about to be mistreated, and an honest client that must not notice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.support.cluster import RealCluster, temporary_cluster
from tests.support.nbd import FUA, Command, NbdClient
from tests.support.pfw import Cluster, Session

from pureflash.model.messages import VolumeSpec
from pureflash.model.rest import CreateExport, CreateVolume

MIB: Final = 1 << 20
VOLUME_BYTES: Final = 64 * MIB
RSS_BYTES_MAX: Final = 128 * MIB
"""How much a process may grow over all cases: buffers that a pool keeps for later, 64 MiB, and as
much again; not what strangers announced."""


@dataclass
class Target:
    """The running cluster, what is known of it, and an honest client."""

    cluster: RealCluster
    uris: dict[str, str]
    spec: VolumeSpec
    known: Cluster
    honest: NbdClient
    pids: dict[str, int]
    memory: dict[str, int]
    turns: int = field(default=0)

    @property
    def primary(self) -> str:
        """Where the primary of the volume listens."""
        return self.spec.shards[0].address

    def session(self, **changes: Any) -> Session:
        """Open a right session with the primary."""
        shard, ticket = self.spec.shards[0], bytes.fromhex(self.spec.ticket)
        cluster_id = bytes.fromhex(self.spec.cluster_id)
        return Session(shard.address, cluster_id, ticket, epoch=shard.epoch, **changes)

    def is_unharmed(self) -> None:
        """Let the honest client write and read."""
        self.turns += 1
        data = self.turns.to_bytes(8, "big") * 512
        offset = self.turns % 1024 * 4096
        assert self.honest.call(Command.WRITE, offset, data=data, flags=FUA).error == 0
        assert self.honest.call(Command.READ, offset, 4096).data == data


def rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no VmRSS")


@contextlib.contextmanager
def running_target() -> Iterator[Target]:
    """Start three stores with a volume on each transport; judge the processes at the end."""
    with temporary_cluster() as cluster:
        cluster.pf("up", "--detach", "--disk", "2G", "--journal", "16M")
        uris = {}
        with cluster.api() as api:
            for name in ("unix", "tcp", "ro", "direct"):
                api.create_volume(CreateVolume(name=name, size_bytes=VOLUME_BYTES, replicas=3))
            for name in ("unix", "tcp", "ro"):
                made_export = api.create_export(
                    CreateExport(
                        kind="nbd",
                        volume=name,
                        transport="tcp" if name == "tcp" else "unix",
                        read_only=name == "ro",
                    )
                )
                uris[name] = made_export.uri
            spec = api.attach_volume("direct")
        key = bytes.fromhex(cluster.layout.key.read_text().strip())
        pids = {name: child["pid"] for name, child in cluster.children().items()}
        with NbdClient(uris["tcp"]) as honest:
            made = Target(
                cluster=cluster,
                uris=uris,
                spec=spec,
                known=Cluster(cluster_id=bytes.fromhex(spec.cluster_id), key=key),
                honest=honest,
                pids=pids,
                memory={name: rss_bytes(pid) for name, pid in pids.items()},
            )
            made.is_unharmed()
            yield made
            made.is_unharmed()
        for name, child in cluster.children().items():
            assert (child["pid"], child["deaths"]) == (pids[name], 0), name
            grown = rss_bytes(child["pid"]) - made.memory[name]
            print(f"{name}: {grown / MIB:.1f} MiB more")
            assert grown < RSS_BYTES_MAX, name
