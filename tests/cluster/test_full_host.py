"""Ring 2: the file system that holds all disk files fills up, and is really full for a while.

It hits all replicas at once, so it must never look like a failing replica: what needs new space is
refused, everything else goes on, and nothing is removed or lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from tests.support.cluster import EXPECTED_WARNINGS, RealCluster, temporary_cluster
from tests.support.nbd import Command, NbdClient

from pureflash.model.exits import Exit
from pureflash.model.rest import ShardView

MIB = 1 << 20
SLOT_BYTES = 64 << 10
BALLAST_BYTES = 1200 * MIB
"""Somebody else's, deleted later: what it gives back ends the restraint of every store, also of one
that looks only after the disk files of the others have grown."""
STORES_BYTES = 850 * MIB
"""For three disk files and the rest of the cluster, until 1 GiB is left."""
LEAST_BYTES = 1 << 30
"""What the stores leave free."""
HOST_BYTES = LEAST_BYTES + BALLAST_BYTES + STORES_BYTES
VOLUME_BYTES = 512 * MIB
IN_FLIGHT = 16


def content(slot: int, turn: int) -> bytes:
    return (slot << 8 | turn).to_bytes(8, "big") * (SLOT_BYTES // 8)


class Writer:
    """Writes slots of a volume, and knows what each must hold."""

    def __init__(self, client: NbdClient) -> None:
        self.client = client
        self.held: dict[int, bytes] = {}
        self._turn = 0

    def write(self, slots: list[int]) -> list[int]:
        """Write these, some at a time; gives those for which there was no space."""
        self._turn += 1
        refused: list[int] = []
        for first in range(0, len(slots), IN_FLIGHT):
            waiting = {
                self.client.send(
                    Command.WRITE, slot * SLOT_BYTES, data=content(slot, self._turn)
                ): slot
                for slot in slots[first : first + IN_FLIGHT]
            }
            while waiting:
                answer = self.client.receive()
                slot = waiting.pop(answer.cookie)
                if answer.error == errno.ENOSPC:
                    refused.append(slot)
                else:
                    assert answer.error == 0, answer
                    self.held[slot] = content(slot, self._turn)
        return refused

    def check(self, slots: list[int]) -> None:
        """Read these back; what was never acknowledged is zeros."""
        for first in range(0, len(slots), IN_FLIGHT):
            waiting = {
                self.client.send(Command.READ, slot * SLOT_BYTES, SLOT_BYTES): slot
                for slot in slots[first : first + IN_FLIGHT]
            }
            while waiting:
                answer = self.client.receive()
                slot = waiting.pop(answer.cookie)
                assert answer.error == 0, answer
                assert answer.data == self.held.get(slot, bytes(SLOT_BYTES)), f"slot {slot}"


def take(path: Path, size_bytes: int) -> None:
    """Make a file that has its space."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)


def fill(cluster: RealCluster) -> Path:
    """Take all that is left, to the last block, as another program would."""
    path = cluster.layout.directory / "somebody-else"
    with path.open("wb", buffering=0) as file:
        free = free_bytes(cluster)
        # Not all of it at once: the cluster writes its logs meanwhile.
        os.posix_fallocate(file.fileno(), 0, free - 16 * MIB)
        with contextlib.suppress(OSError):
            while True:
                file.seek(0, os.SEEK_END)
                file.write(bytes(4096))
    assert free_bytes(cluster) == 0
    return path


def free_bytes(cluster: RealCluster) -> int:
    about = os.statvfs(cluster.layout.directory)
    return about.f_bavail * about.f_frsize


def check_whole(cluster: RealCluster, before: ShardView) -> None:
    """Nobody was removed: the shard is as it was."""
    with cluster.api() as api:
        (now,) = api.volume("v1").shards
    assert (now.epoch, now.isr, now.primary) == (before.epoch, before.isr, before.primary)
    assert (now.state, len(now.isr)) == ("healthy", 3)


def lives_of(cluster: RealCluster, name: str) -> set[int]:
    """Give the processes that run as this child; the supervisor cannot write its report now."""
    config = os.fsencode(f"{cluster.environment['PF_DATA']}/config/{name}.toml")
    found: set[int] = set()
    for pid in cluster.processes():
        with contextlib.suppress(OSError):  # it has just ended
            if config in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


def story(cluster: RealCluster, writer: Writer, before: ShardView, ballast: Path) -> None:
    """Nearly full, full to the last block, and with room again."""
    slots = list(range(VOLUME_BYTES // SLOT_BYTES))
    first = 0
    while free_bytes(cluster) >= LEAST_BYTES:
        assert writer.write(slots[first : first + IN_FLIGHT]) == []
        first += IN_FLIGHT

    def are_held() -> bool:
        assert writer.write(slots[:IN_FLIGHT]) == []
        with cluster.api() as api:
            found = [one for one in api.cluster().health if one.code == "DISK_FULL"]
        return len(found) == 3

    cluster.wait("every store has noticed", are_held)
    refused = writer.write(slots[first:])
    taken = sorted(writer.held)
    print(f"{len(taken)} slots taken, {len(refused)} refused, {free_bytes(cluster)} bytes left")
    assert len(taken) > 200
    assert len(refused) > 1000
    assert writer.write(taken[::4]) == [], "their space is theirs"
    writer.check(taken[::8] + refused[::8])
    check_whole(cluster, before)

    somebody = fill(cluster)
    assert writer.write(taken[::4]) == [], "also when nothing at all is left"
    assert set(writer.write(refused[:64])) == set(refused[:64])
    writer.check(taken[::8])
    check_whole(cluster, before)

    killed = cluster.kill("s1")
    cluster.wait("s1 is started again", lambda: lives_of(cluster, "s1") - {killed} != set())

    somebody.unlink()
    ballast.unlink()
    # First everybody notices, also s1 in its new life: what is written next takes of the room.
    cluster.wait_healthy()
    assert writer.write(refused[-512:]) == []
    writer.check(taken + refused[-512:])
    cluster.wait_healthy()
    with cluster.api() as api:
        assert len(api.volume("v1").shards[0].isr) == 3, "and s1 is back"
    assert "3 copies are equal" in cluster.pf("volume", "verify", "v1")


def test_a_cluster_without_room_to_start_says_so() -> None:
    with temporary_cluster(host_bytes=320 * MIB) as cluster:
        cluster.allowed |= EXPECTED_WARNINGS | {"PROCESS_GIVEN_UP", "DISK_FULL"}
        cluster.allowed_errors |= {"metastore.failed", "process.failed"}
        cluster.has_torn_lines = True
        said = cluster.pf(
            "up", "--detach", "--disk", "1G", "--journal", "64M", status=Exit.NOT_SERVED
        )
        assert "state: offline" in said
        assert "No known data errors" not in said
        assert "did not start: it ended with" in said


def test_a_full_host_refuses_new_data_and_harms_nothing() -> None:
    with temporary_cluster(host_bytes=HOST_BYTES) as cluster:
        cluster.allowed |= EXPECTED_WARNINGS | {"DISK_FULL"}  # s1 is killed, too
        # The conductor cannot store that s1 is away, nor s1 that it has a new life.
        cluster.allowed_errors |= {"metastore.failed", "process.failed"}
        cluster.has_torn_lines = True
        ballast = cluster.layout.directory / "ballast"
        cluster.pf("up", "--detach", "--disk", "2G", "--journal", "16M")
        take(ballast, BALLAST_BYTES)
        cluster.pf("volume", "create", "v1", f"{VOLUME_BYTES // MIB}M", "--replicas", "3")
        cluster.wait_healthy()
        uri = cluster.export("v1")
        with cluster.api() as api:
            (before,) = api.volume("v1").shards

        with NbdClient(uri) as client:
            story(cluster, Writer(client), before, ballast)
