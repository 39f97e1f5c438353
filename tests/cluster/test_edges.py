"""Ring 2: I/O of odd offsets across block, slot, region, extent and shard edges, whole stack.

One cluster, volumes of one, two and three replicas with shards of 1 GiB, all of them through NBD
and against a sparse model in memory. `PF_EDGES_SEED` replays a run, `PF_EDGES_BATCHES` makes it
longer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.support.cluster import RealCluster, temporary_cluster
from tests.support.edges import GIB, KIB, MIB, EdgeLoad
from tests.support.nbd import Command, NbdClient

from pureflash.model.rest import VolumeView

SEED = os.environ.get("PF_EDGES_SEED", "2026")
BATCHES = int(os.environ.get("PF_EDGES_BATCHES", "60"))
SIZE_BYTES = 2 * GIB + 52 * MIB + 12 * KIB
"""Three shards; the last one ends in the middle of an extent and of a slot."""
DISK_BYTES = 12 * GIB
OLD_BYTES = 10 * GIB
EXTENT_BYTES = 4 * MIB
SLOT_BYTES = 64 * KIB
SECRET_SLOT = 5
IN_FLIGHT = 64
GROWN_BYTES = 3 * GIB + 4 * KIB
"""The third shard becomes whole, and a fourth one of a single block is added."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RealCluster]:
    """Start three stores, whose disks are wide enough for all that is promised here.

    Afterwards all copies of all volumes are equal.
    """
    with temporary_cluster() as made:
        made.pf("up", "--detach", "--disk", f"{DISK_BYTES // GIB}G", "--journal", "16M")
        print(f"seed {SEED}: PF_EDGES_SEED replays it")
        yield made
        for volume in volumes_of(made):
            if volume.replicas > 1:
                told = made.pf("volume", "verify", volume.name)
                assert f"{volume.replicas} copies are equal" in told


def volumes_of(cluster: RealCluster) -> list[VolumeView]:
    with cluster.api() as api:
        return list(api.volumes())


def create(
    cluster: RealCluster, name: str, replicas: int, *flags: str, size_bytes: int = SIZE_BYTES
) -> str:
    """Make a volume and its export; gives the URI."""
    size = f"{size_bytes // KIB}K"
    cluster.pf("volume", "create", name, size, "--replicas", f"{replicas}", "--shard-size", "1G")
    return cluster.export(name, *flags)


def load_of(name: str) -> EdgeLoad:
    return EdgeLoad(size_bytes=SIZE_BYTES, shard_bytes=GIB, seed=f"{SEED} {name}")


def test_space_of_a_deleted_volume_reads_as_zeros_in_the_next(cluster: RealCluster) -> None:
    """The old volume touches so many extents that the new one must be given some of them again."""
    extents = {"old": OLD_BYTES // EXTENT_BYTES, "new": SIZE_BYTES // EXTENT_BYTES}
    assert sum(extents.values()) > DISK_BYTES // EXTENT_BYTES, "else nothing is used twice"
    with NbdClient(create(cluster, "old", 3, size_bytes=OLD_BYTES)) as client:
        secret = b"secret!!" * (SLOT_BYTES // 8)
        write_in_every_extent(client, extents["old"], secret)
    delete(cluster, "old")
    with NbdClient(create(cluster, "new", 3)) as client:
        write_in_every_extent(client, extents["new"], b"n" * 512)
        expected = b"n" * 512 + bytes(SLOT_BYTES - 512)
        for extent in range(extents["new"]):
            offset = extent * EXTENT_BYTES + SECRET_SLOT * SLOT_BYTES
            answer = client.call(Command.READ, offset, SLOT_BYTES)
            assert (answer.error, answer.data) == (0, expected), f"extent {extent}"
    delete(cluster, "new")


def write_in_every_extent(client: NbdClient, extents: int, data: bytes) -> None:
    """Write the same data into the same slot of every extent, some at a time."""
    for first in range(0, extents, IN_FLIGHT):
        waiting = {
            client.send(Command.WRITE, extent * EXTENT_BYTES + SECRET_SLOT * SLOT_BYTES, data=data)
            for extent in range(first, min(first + IN_FLIGHT, extents))
        }
        while waiting:
            answer = client.receive()
            assert answer.error == 0, answer
            waiting.remove(answer.cookie)


def delete(cluster: RealCluster, name: str) -> None:
    """Take a volume and its export away, and wait until its space is free."""
    cluster.pf("export", "delete", name)
    cluster.pf("volume", "delete", name, "--yes")


@pytest.mark.parametrize(("replicas", "flags"), [(1, ()), (2, ("--tcp",)), (3, ())])
def test_what_is_read_is_what_was_written_at_every_edge(
    cluster: RealCluster, replicas: int, flags: tuple[str, ...]
) -> None:
    name = f"r{replicas}"
    load = load_of(name)
    uri = create(cluster, name, replicas, *flags)
    with NbdClient(uri) as client:
        assert client.size_bytes == SIZE_BYTES
        load.run(client, batches=BATCHES)
        load.vast(client)
        load.run(client, batches=BATCHES // 3)
    with NbdClient(uri, is_structured=False) as another:
        load.compare_all(another)
    print(f"{name}: {load.counts}")
    assert all(load.counts[command] for command in Command if command is not Command.DISC)


def test_a_volume_grows_by_a_shard_while_it_is_written(cluster: RealCluster) -> None:
    load = load_of("grown")
    uri = create(cluster, "grown", 2)
    is_writing, is_grown = threading.Event(), threading.Event()

    def write_on() -> None:
        with NbdClient(uri) as client:
            load.run(client, batches=3)
            is_writing.set()
            while not is_grown.is_set():
                load.run(client, batches=1)
            load.run(client, batches=2)

    with ThreadPoolExecutor(max_workers=1) as pool, NbdClient(uri) as before:
        writer = pool.submit(write_on)
        try:
            assert is_writing.wait(60), "the writer has begun"
            said = cluster.pf("volume", "resize", "grown", f"{GROWN_BYTES // KIB}K")
            assert "keep the size of before" in said

            def is_served() -> bool:
                return before.call(Command.READ, GROWN_BYTES - KIB, KIB).error == 0

            cluster.wait("a client of before reaches the new space", is_served)
        finally:
            is_grown.set()
        writer.result(timeout=60)
    load.size_bytes = GROWN_BYTES

    def is_offered() -> bool:
        with NbdClient(uri) as client:
            return client.size_bytes == GROWN_BYTES

    cluster.wait("the export has the new size", is_offered)
    with NbdClient(uri) as client:
        for offset in range(SIZE_BYTES // MIB * MIB + MIB, GROWN_BYTES, 32 * MIB):
            answer = client.call(Command.READ, offset, 64 * KIB)
            assert (answer.error, answer.data) == (0, bytes(64 * KIB)), "new space is zeros"
        load.run(client, batches=BATCHES // 3)
        load.vast(client)
        load.run(client, batches=BATCHES // 3)
        load.compare_all(client)
    with cluster.api() as api:
        assert len(api.volume("grown").shards) == 4
