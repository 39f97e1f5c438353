"""Ring 2: a cluster starts with what it has, and tells the truth about the rest.

`PF_SECOND_LOOK=all` meets every kind of bad disk at every store; else each kind meets one of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Final

import pytest
from tests.cluster.conftest import EXPECTED_WARNINGS, RealCluster
from tests.support.cluster import PF

from pureflash import _core
from pureflash.model.exits import Exit
from pureflash.process.lifecycle import read_ready

MIB: Final = 1 << 20
GIB: Final = 1 << 30
STORES: Final = ("s1", "s2", "s3")
UP: Final = ("up", "--detach", "--restart-delay", "1s")
NEW: Final = (*UP, "--stores", "3", "--disk", "1G", "--journal", "16M")


def remove(disk: Path) -> None:
    disk.rename(disk.with_name("kept"))


def put(disk: Path, make: Callable[[Path], object]) -> None:
    remove(disk)
    make(disk)


def cut(disk: Path) -> None:
    kept = disk.with_name("kept")
    disk.rename(kept)
    subprocess.run(["cp", "--sparse=always", str(kept), str(disk)], check=True)
    os.truncate(disk, 300 * MIB)


def make_zeros(disk: Path) -> None:
    disk.touch()
    os.truncate(disk, GIB)


def make_foreign(disk: Path) -> None:
    _core.format_disk(disk, size_bytes=GIB, cluster_id=bytes(16))


def make_other(disk: Path) -> None:
    """Put another disk of the same cluster there."""
    own = _core.inspect_disk(disk.with_name("kept"))["cluster_id"]
    _core.format_disk(disk, size_bytes=GIB, cluster_id=bytes.fromhex(own))


HARMS: Final[dict[str, tuple[Callable[[Path], None], str, str]]] = {
    "missing": (remove, "DISK_FAILED", "is not there, and"),
    "cut": (cut, "DISK_FAILED", "it was truncated or replaced"),
    "empty": (lambda disk: put(disk, Path.touch), "DISK_FAILED", "the disk ends before"),
    "zeroed": (
        lambda disk: put(disk, make_zeros),
        "DISK_FAILED",
        "never formatted by PureFlash",
    ),
    "of another cluster": (
        lambda disk: put(disk, make_foreign),
        "WRONG_CLUSTER",
        "belongs to cluster 0000",
    ),
    "of another store": (lambda disk: put(disk, make_other), "DISK_FAILED", "it was not touched"),
}


def image(path: Path, *, seed: int, mebibytes: int = 8) -> bytes:
    data = random.Random(seed).randbytes(mebibytes * MIB)
    path.write_bytes(data)
    return data


def exported(cluster: RealCluster, volume: str, place: Path) -> bytes:
    """Read a whole volume."""
    place.unlink(missing_ok=True)
    cluster.pf("image", "export", volume, str(place))
    return place.read_bytes()


def findings(cluster: RealCluster) -> set[tuple[str, str]]:
    with cluster.api() as api:
        return {(found.code, found.subject) for found in api.cluster().health}


def is_found(cluster: RealCluster, expected: tuple[str, str]) -> bool:
    return expected in findings(cluster)


def cases() -> list[tuple[str, str]]:
    if os.environ.get("PF_SECOND_LOOK") == "all":
        return list(product(HARMS, STORES))
    return [(harm, STORES[number % 3]) for number, harm in enumerate(HARMS)]


@pytest.mark.timeout(900)
def test_each_kind_of_bad_disk_costs_its_copies_and_nothing_else(
    cluster: RealCluster, tmp_path: Path
) -> None:
    cluster.allowed |= {*EXPECTED_WARNINGS, "DISK_FAILED", "WRONG_CLUSTER"}
    cluster.pf(*NEW)
    held: dict[str, tuple[set[str], bytes]] = {}
    for replicas in (1, 2, 3):
        name = f"r{replicas}"
        cluster.pf("volume", "create", name, "8M", "--replicas", str(replicas))
        data = image(tmp_path / "in.img", seed=replicas)
        cluster.pf("image", "import", str(tmp_path / "in.img"), name, "--yes")
        with cluster.api() as api:
            members = api.volume(name).shards[0].members
        held[name] = ({member.name for member in members}, data)
    for harm, store in cases():
        do, code, reason = HARMS[harm]
        cluster.pf("down")
        disk = cluster.layout.disk(store)
        do(disk)
        told = cluster.pf(*UP)
        assert f"{code} {store} disk 0" in told, (harm, store, told)
        assert reason in told
        assert "what to do:" in told
        assert set(cluster.children()) == {"c1", "g1", *STORES}
        assert {child["state"] for child in cluster.children().values()} == {"running"}
        assert (code, f"{store} disk 0") in findings(cluster)
        listed = cluster.pf("disk", "list")
        assert f"{store} disk 0: " in listed
        assert reason in listed
        for name, (stores, data) in held.items():
            with cluster.api() as api:
                state = api.volume(name).state
            if stores == {store}:
                assert state == "offline", (harm, store, name)
            else:
                assert state not in ("offline", "parked"), (harm, store, name, told)
            if name == "r3":
                assert exported(cluster, name, tmp_path / "out.img") == data
        disk.unlink(missing_ok=True)
        disk.with_name("kept").rename(disk)
        cluster.wait_healthy()
    replace_lost_disk(cluster)
    assert exported(cluster, "r3", tmp_path / "out.img") == held["r3"][1]


def replace_lost_disk(cluster: RealCluster) -> None:
    """Give s2 an empty disk, with something damaged where its own was."""
    cluster.pf("down")
    disk = cluster.layout.disk("s2")
    os.truncate(disk, 300 * MIB)
    identity = disk.stat().st_ino
    cluster.pf(*UP, "--new-disk", "s2")
    (aside,) = disk.parent.glob("disk0.img.aside-*")
    assert aside.stat().st_ino == identity
    cluster.wait_whole("r3")


@pytest.mark.timeout(300)
def test_a_disk_that_is_cut_or_exchanged_in_use_is_stopped(
    cluster: RealCluster, tmp_path: Path
) -> None:
    cluster.allowed |= {*EXPECTED_WARNINGS, "DISK_FAILED"}
    cluster.pf(*NEW)
    cluster.pf("volume", "create", "v1", "8M", "--replicas", "3")
    data = image(tmp_path / "in.img", seed=1)
    cluster.pf("image", "import", str(tmp_path / "in.img"), "v1", "--yes")
    stories: tuple[tuple[str, Callable[[Path], None], str], ...] = (
        ("s1", lambda disk: os.truncate(disk, 300 * MIB), "was cut from 1073741824 to 314572800"),
        ("s2", lambda disk: put(disk, make_foreign), "is another file than the one"),
    )
    pids = {store: child["pid"] for store, child in cluster.children().items()}
    for store, harm, reason in stories:
        disk = cluster.layout.disk(store)
        copy = tmp_path / f"{store}.img"
        subprocess.run(["cp", "--sparse=always", str(disk), str(copy)], check=True)
        harm(disk)
        expected = ("DISK_FAILED", f"{store} disk 0")
        cluster.wait(
            f"{store} is found out",
            partial(is_found, cluster, expected),
            seconds=10,
        )
        assert reason in cluster.pf("status")
        assert exported(cluster, "v1", tmp_path / "out.img") == data
    assert {store: child["pid"] for store, child in cluster.children().items()} == pids, (
        "the stores themselves go on"
    )
    cluster.pf("down")
    for store, _, _ in stories:
        disk = cluster.layout.disk(store)
        disk.unlink()
        (tmp_path / f"{store}.img").rename(disk)
        disk.with_name("kept").unlink(missing_ok=True)
    cluster.pf(*UP)
    cluster.wait_whole("v1")


@pytest.mark.timeout(300)
def test_a_cluster_whose_metastore_is_lost_is_up_and_says_how_to_rebuild_it(
    cluster: RealCluster, tmp_path: Path
) -> None:
    cluster.allowed |= EXPECTED_WARNINGS
    cluster.pf(*NEW)
    cluster.pf("volume", "create", "v1", "8M", "--replicas", "3")
    data = image(tmp_path / "in.img", seed=1)
    cluster.pf("image", "import", str(tmp_path / "in.img"), "v1", "--yes")
    with cluster.api() as api:
        identity = api.volume("v1").id
    cluster.pf("down")
    for file in cluster.layout.conductor_data.iterdir():
        file.unlink()
    told = cluster.pf(*UP)
    assert "state: amnesia" in told
    assert "pf conductor recover-config" in told
    for store in STORES:
        assert f"{store}       online" in told, "who is there is shown"
    cluster.pf("conductor", "recover-config", "--yes")
    cluster.wait_healthy()
    assert exported(cluster, f"recovered-{identity}", tmp_path / "out.img") == data


@contextlib.contextmanager
def squatter(port: int, heard: list[bytes]) -> Iterator[None]:
    """Listen on a port as another program does, which answers like a web server of its own."""
    stop = threading.Event()
    answer = b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\nConnection: close\r\n\r\n{"hello":"world"}'
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.settimeout(0.1)

        def serve() -> None:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(5)
                        heard.append(connection.recv(1 << 16))
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@pytest.mark.timeout(300)
def test_a_port_that_another_program_took_is_changed_and_never_shown_the_token(
    cluster: RealCluster,
) -> None:
    cluster.allowed |= EXPECTED_WARNINGS
    cluster.pf(*UP, "--stores", "1", "--disk", "1G", "--journal", "16M")
    cluster.pf("volume", "create", "v1", "8M", "--replicas", "1")
    cluster.pf("export", "nbd", "v1", "--tcp")
    with cluster.api() as api:
        port = int(api.address.rpartition(":")[2])
        (before,) = [export.uri for export in api.exports()]
    nbd_port = int(before.split(":")[2].split("/")[0])
    cluster.pf("down")
    heard: list[bytes] = []
    with squatter(port, heard), squatter(nbd_port, heard):
        said = cluster.pf("status", status=Exit.FAILED)
        assert "another program" in said
        assert "it was not shown the token" in said
        assert heard, "it was asked who it is"
        told = cluster.pf(*UP)
        assert "is the conductor's from now on" in told
        assert "exports over TCP have another URI now" in told
        cluster.wait_healthy()
        with cluster.api() as api:
            assert int(api.address.rpartition(":")[2]) != port
            (after,) = [export.uri for export in api.exports()]
        assert after != before
        assert cluster.run(["nbdinfo", "--size", after]).stdout.strip() == str(8 * MIB)
    token = cluster.layout.token.read_text().strip().encode()
    assert not any(token in words or b"Bearer" in words for words in heard)


@pytest.mark.timeout(300)
def test_a_start_that_meets_a_shutdown_waits_for_its_end(cluster: RealCluster) -> None:
    cluster.allowed |= EXPECTED_WARNINGS
    cluster.pf(*UP, "--stores", "1", "--disk", "1G", "--journal", "16M")
    cluster.pf("volume", "create", "v1", "8M", "--replicas", "1")
    pid = cluster.children()["s1"]["pid"]
    os.kill(pid, signal.SIGSTOP)  # so that it does not end at once
    with subprocess.Popen([PF, "down"], env=cluster.environment) as ending:

        def is_stopping() -> bool:
            return '"state":"stopping"' in cluster.layout.supervisor_file.read_text()

        cluster.wait("the shutdown has begun", is_stopping)
        with subprocess.Popen(
            [PF, *UP], env=cluster.environment, stdout=subprocess.PIPE, text=True
        ) as starting:
            os.kill(pid, signal.SIGCONT)
            said, _ = starting.communicate(timeout=120)
        assert starting.returncode == 0
        assert "already running" not in said
        assert "state: healthy" in said
        assert ending.wait(60) == 0


class Hand:
    """Processes of a cluster started by hand, with settings that `pf up` does not write."""

    def __init__(self, cluster: RealCluster) -> None:
        self._cluster = cluster
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, kind: str) -> int:
        """Start a process and wait until it is ready; gives its pid."""
        layout = self._cluster.layout
        layout.ready(name).unlink(missing_ok=True)
        command = [sys.executable, "-m", f"pureflash.{kind}", "--config", str(layout.config(name))]
        process = subprocess.Popen(command, env=self._cluster.environment)
        self._running[name] = process

        def is_ready() -> bool:
            ready = read_ready(layout.ready(name))
            return ready is not None and ready.pid == process.pid

        self._cluster.wait(f"{name} is ready", is_ready)
        return process.pid

    def stop(self, *names: str) -> None:
        for name in names or list(reversed(self._running)):
            process = self._running.pop(name)
            process.terminate()
            process.wait(30)


@pytest.mark.timeout(300)
def test_the_good_one_of_two_disks_serves_its_clients(cluster: RealCluster, tmp_path: Path) -> None:
    """Shown by the process that has the disk open, and by the bytes that it has written there."""
    cluster.allowed |= {*EXPECTED_WARNINGS, "DISK_FAILED"}
    cluster.pf(*UP, "--stores", "1", "--disk", "1G", "--journal", "16M")
    cluster.pf("down")
    settings = cluster.layout.config("s1")
    second = cluster.layout.store_data("s1") / "disk1.img"
    table = f'\n[[disk]]\npath = "{second}"\nsize = "1G"\njournal = "16M"\n'
    settings.write_text(settings.read_text() + table)
    hand = Hand(cluster)
    try:
        hand.start("c1", "api")
        hand.start("s1", "store")
        hand.start("g1", "gateway")
        for name in ("v1", "v2"):  # each on the disk with more room: one on each
            cluster.pf("volume", "create", name, "64M", "--replicas", "1")
        with cluster.api() as api:
            disks = {disk.id: Path(disk.path) for disk in api.disks()}
            on = {volume.name: disks[volume.shards[0].members[0].disk] for volume in api.volumes()}
        assert set(on.values()) == set(disks.values())
        uri = cluster.export("v1")
        hand.stop("s1")
        os.truncate(on["v2"], 300 * MIB)
        pid = hand.start("s1", "store")

        def is_told() -> bool:
            with cluster.api() as api:
                states = {volume.name: volume.state for volume in api.volumes()}
            return states == {"v1": "healthy", "v2": "offline"}

        cluster.wait("one volume is served", is_told)
        assert "it was truncated or replaced" in cluster.pf("status", status=Exit.FAILED)
        data = image(tmp_path / "in.img", seed=5, mebibytes=64)
        for source, target in ((str(tmp_path / "in.img"), uri), (uri, str(tmp_path / "out.img"))):
            copied = cluster.run(["nbdcopy", "--", source, target])
            assert copied.returncode == 0, copied.stderr
        assert (tmp_path / "out.img").read_bytes() == data
        opened = {os.path.realpath(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
        assert str(on["v1"]) in opened
        assert str(on["v2"]) not in opened
        block = data[10 * MIB : 10 * MIB + 4096]
        assert block in on["v1"].read_bytes(), "the client's bytes are on the good disk"
    finally:
        hand.stop()
