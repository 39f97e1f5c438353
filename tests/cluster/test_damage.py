"""Ring 2: blocks of a disk file are damaged under a store that runs, and what becomes of them.

Every block that is written here has content of its own, by which it is found in the disk file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.conftest import RealCluster
from tests.support.pfw import Session, status

from pureflash import _core
from pureflash.errors import Code
from pureflash.model.exits import Exit
from pureflash.model.ticket import Rights, Ticket, make_ticket

BLOCK = 4096
MIB = 1 << 20
CLUSTER = bytes(range(16))
KEY = b"k" * 32
VOLUME = 7
SHARD_BYTES = 4 * MIB
BLOCKS = 16
"""Written in each shard, at its start."""


def content(block: int, *, seed: int = 1) -> bytes:
    return random.Random(f"{seed}/{block}").randbytes(BLOCK)


def wait(what: str, is_so: Callable[[], bool], *, seconds: float = 30) -> None:
    pause, deadline = threading.Event(), time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        pause.wait(0.02)


# --------------------------------------------------------------------------------- disk files ----


def places(disk: Path, wanted: bytes) -> list[int]:
    """Find the blocks of a disk file that have this content."""
    found = []
    with disk.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        at = mapped.find(wanted)
        while at >= 0:
            if at % BLOCK == 0:
                found.append(at)
            at = mapped.find(wanted, at + 1)
    return found


def damage(disk: Path, wanted: bytes) -> None:
    """Flip a bit of the block with this content, past what the store or the kernel has cached."""
    offsets = places(disk, wanted)
    assert offsets, "it is on the disk"
    with mmap.mmap(-1, BLOCK) as aligned:
        aligned[:] = bytes([wanted[0] ^ 1]) + wanted[1:]
        with contextlib.closing(_Direct(disk)) as file:
            for offset in offsets:
                assert os.pwritev(file.descriptor, [aligned], offset) == BLOCK
    assert not places(disk, wanted)


class _Direct:
    """A disk file opened past the page cache, where its file system can do that."""

    def __init__(self, path: Path) -> None:
        try:
            self.descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_SYNC)
        except OSError as problem:
            if problem.errno != errno.EINVAL:
                raise
            self.descriptor = os.open(path, os.O_WRONLY | os.O_SYNC)

    def close(self) -> None:
        os.close(self.descriptor)


# ------------------------------------------------------------------------ stores in this process --


class Stores:
    """Stores in this process that hold one shard, the first one as its primary."""

    def __init__(self, folder: Path, count: int) -> None:
        self.disks = [folder / f"disk{number}.img" for number in range(count)]
        for disk in self.disks:
            _core.format_disk(disk, size_bytes=128 * MIB, cluster_id=CLUSTER)
        self.nodes: list[_core.StoreNode] = []
        self.life = 0
        self.session: Session | None = None
        self.start()

    def start(self) -> None:
        """Start all stores, with the shard as they left it if there is one."""
        self.close()
        self.life += 1
        self.nodes = [
            _core.StoreNode(
                store_id=number + 1,
                incarnation=self.life,
                cluster_id=CLUSTER,
                cluster_key=KEY,
                listen="127.0.0.1:0",
                disks=[{"path": str(disk), "engine": "auto"}],
            )
            for number, disk in enumerate(self.disks)
        ]
        peers = [(number + 1, self.life, node.address) for number, node in enumerate(self.nodes)]
        for number, node in enumerate(self.nodes):
            node.set_peers(peers)
            size, uuid = SHARD_BYTES, self.uuid(node)
            node.create_replica(self.life, VOLUME, 0, number, size, uuid, self.conf())
        wait("it serves", lambda: self.facts(0)["role"] == "active")
        ticket = Ticket(
            volume_id=VOLUME,
            attach_epoch=1,
            session=self.life,
            expires=1 << 40,
            rights=Rights.READ_WRITE,
        )
        signed = make_ticket(KEY, ticket)
        self.session = Session(self.nodes[0].address, CLUSTER, signed, epoch=self.life, path_slot=0)

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
        for node in self.nodes:
            node.close()

    @staticmethod
    def uuid(node: _core.StoreNode) -> str:
        uuid: str = node.stats()["disks"][0]["disk_uuid"]
        return uuid

    def conf(self) -> bytes:
        copies = list(range(len(self.nodes)))
        uuids = [self.uuid(node) for node in self.nodes]
        encoded: bytes = _core.conf_encode(
            {
                "volume_id": VOLUME,
                "index": 0,
                "epoch": self.life,
                "rf": len(copies),
                "min_write": 1,
                "primary": 0,
                "isr": copies,
                "learners": [],
                "members": [
                    {
                        "copy": copy,
                        "store": copy + 1,
                        "incarnation": self.life,
                        "disk": uuid,
                        "format_uuid": uuid,
                    }
                    for copy, uuid in zip(copies, uuids, strict=True)
                ],
                "history_id": VOLUME,
                "attach_epoch": 1,
            }
        )
        return encoded

    def facts(self, number: int) -> dict[str, Any]:
        """Give what a store tells of its replica."""
        replicas = self.nodes[number].replicas()
        return replicas[0] if replicas else {"role": "none"}

    def mended(self) -> int:
        mended: int = self.nodes[0].stats()["counters"]["blocks_mended"]
        return mended

    def fill(self, *, seed: int = 1) -> None:
        assert self.session is not None
        data = b"".join(content(block, seed=seed) for block in range(BLOCKS))
        assert status(self.session.write(0, data)) is Code.OK
        # The next operation tells the lane that this one is committed: it is in no tail any more,
        # whose blocks a new reign reads by itself.
        assert status(self.session.write(BLOCKS * BLOCK, bytes(BLOCK))) is Code.OK

    def read(self, first: int, count: int) -> tuple[Code, bytes]:
        assert self.session is not None
        reply = self.session.read(first * BLOCK, count * BLOCK)
        return status(reply), reply.data

    def damage(self, number: int, *blocks: int) -> None:
        for block in blocks:
            damage(self.disks[number], content(block))

    def verify(self, *, is_repairing: bool) -> tuple[Any, ...]:
        """Compare all copies; gives different, unreadable, mended blocks."""
        self.nodes[0].verify_replica(99, VOLUME, 0, is_repairing)
        answers: list[tuple[Any, ...]] = []

        def has_answered() -> bool:
            events = self.nodes[0].drain()
            answers.extend(event for event in events if event[0] in ("verified", "failed"))
            return bool(answers)

        wait("it is compared", has_answered)
        (answer,) = answers
        assert answer[:4] == ("verified", 99, SHARD_BYTES // MIB, len(self.nodes))
        return answer[4:]


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Callable[[int], Stores]]:
    """Give a way to make stores, once; they are closed after the test."""
    made: list[Stores] = []

    def make(count: int) -> Stores:
        made.append(Stores(tmp_path, count))
        made[0].fill()
        return made[0]

    yield make
    for one in made:
        one.close()


def test_a_read_of_several_damaged_blocks_is_served_and_mends_all_of_them(
    stores: Callable[[int], Stores],
) -> None:
    three = stores(3)
    three.damage(0, 1, 2, 9)
    three.damage(1, 2)
    three.damage(2, 3)
    expected = b"".join(content(block) for block in range(12))
    assert three.read(0, 12) == (Code.OK, expected), "no copy has all of it, and all of it is there"
    wait("all are mended", lambda: three.mended() == 3)
    for number in (0, 1):
        for block in (1, 2, 9):
            assert places(three.disks[number], content(block)), f"block {block} of disk {number}"
        assert three.facts(number)["damaged_blocks"] == 0
    assert three.facts(0)["damage_found"] == 3
    assert three.facts(0)["lost_blocks"] == 0


def test_a_verification_tells_what_is_damaged_and_mends_it_when_asked_to(
    stores: Callable[[int], Stores],
) -> None:
    three = stores(3)
    three.damage(0, 5)
    three.damage(2, 3, 4, 11)
    assert three.verify(is_repairing=False) == ([], [(0, 1), (0, 3)], 0)
    wait("it knows its own", lambda: three.facts(0)["damaged"] == [(5, 1)])
    wait("so does a secondary", lambda: three.facts(2)["damaged"] == [(3, 2), (11, 1)])
    assert three.facts(2)["damaged_blocks"] == 3
    assert three.mended() == 0, "it was only to look"
    assert three.verify(is_repairing=True) == ([], [], 4)
    assert [three.facts(number)["damaged_blocks"] for number in range(3)] == [0, 0, 0]
    for block in (3, 4, 5, 11):
        assert all(places(disk, content(block)) for disk in three.disks)


def test_what_no_copy_has_is_told_as_lost_until_it_is_overwritten(
    stores: Callable[[int], Stores],
) -> None:
    three = stores(3)
    for number in range(3):
        three.damage(number, 6)
    assert three.read(0, 4)[0] is Code.OK
    assert three.read(4, 4)[0] is Code.BAD_CHECKSUM
    assert three.facts(0)["lost"] == [(6, 1)]
    assert three.facts(0)["lost_blocks"] == 1
    assert three.verify(is_repairing=True) == ([], [(0, 1), (0, 2), (0, 3)], 0)
    three.fill(seed=2)
    assert three.facts(0)["lost_blocks"] == 0
    assert three.facts(0)["damaged_blocks"] == 0
    assert three.verify(is_repairing=True) == ([], [], 0)


def test_a_single_copy_tells_its_damage_also_after_a_restart_once_it_is_read_again(
    stores: Callable[[int], Stores],
) -> None:
    one = stores(1)
    one.damage(0, 2, 3, 8)
    assert one.read(0, BLOCKS)[0] is Code.BAD_CHECKSUM
    assert one.facts(0)["damaged"] == one.facts(0)["lost"] == [(2, 2), (8, 1)]
    one.start()
    assert one.facts(0)["damaged_blocks"] == 0, "nobody has read them in this life"
    one.nodes[0].check_blocks(VOLUME, 0, [(2, 2), (8, 1), (12, 1), (1 << 20, 5)])
    wait("it is known again", lambda: one.facts(0)["damaged"] == [(2, 2), (8, 1)])
    assert one.facts(0)["lost_blocks"] == 3
    one.fill(seed=2)
    assert one.facts(0)["damaged_blocks"] == one.facts(0)["lost_blocks"] == 0


# ------------------------------------------------------------------------------ a whole cluster --


@pytest.mark.timeout(180)
def test_a_store_tells_of_damage_in_its_log_and_knows_it_after_a_restart(
    cluster: RealCluster, tmp_path: Path
) -> None:
    cluster.allowed |= {"DATA_LOST", "DATA_DAMAGED"}
    cluster.pf("up", "--detach", "--stores", "1", "--disk", "1G", "--journal", "16M")
    cluster.pf("volume", "create", "v1", "8M", "--replicas", "1")
    cluster.wait_healthy()
    image = tmp_path / "image"
    image.write_bytes(b"".join(content(block) for block in range(8 * MIB // BLOCK)))
    cluster.pf("image", "import", str(image), "v1", "--yes")
    disk = cluster.layout.disk("s1")
    for block in (40, 41, 700):
        damage(disk, content(block))
    cluster.pf("image", "export", "v1", str(tmp_path / "copy"), status=Exit.FAILED)

    def told(event: str) -> list[dict[str, Any]]:
        lines = (json.loads(line) for line in cluster.layout.log("s1").read_text().splitlines())
        return [line for line in lines if line["event"] == event]

    kept = disk.with_name("damage.json")
    cluster.wait("it is told", lambda: len(told("replica.lost")) == 1)
    cluster.wait("and kept", lambda: "[40,2]" in kept.read_text())
    (line,) = told("replica.lost")
    assert (line["level"], line["code"], line["shard"]) == ("WARNING", "DATA_LOST", 0)
    cluster.kill_and_await("s1")
    cluster.wait("it is known again", lambda: len(told("replica.lost")) == 2)
    cluster.pf("image", "import", str(image), "v1", "--yes")
    cluster.wait("its end is told", lambda: len(told("replica.readable")) == 1)
    cluster.pf("image", "export", "v1", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
