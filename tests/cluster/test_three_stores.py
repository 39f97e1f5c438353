"""Ring 2: three replicas by real processes. Stores are killed and stopped under verified load.

fio writes and verifies all the time and must see neither an error nor a write that takes longer
than 5 s; after each blow the cluster must become whole again by itself before the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.conftest import EXPECTED_WARNINGS, RealCluster
from tests.support.cluster import temporary_cluster
from tests.support.late_reads import LateReader

from pureflash.client.cluster import Cluster, Volume
from pureflash.client.device import Device
from pureflash.errors import Code, RouteError
from pureflash.model.rest import ShardView

CYCLES = 10
"""In CI; `PF_NEMESIS_CYCLES` asks for more."""
DOWN_S = 12
"""A killed store stays down for more than 5 x G: failover and not its restart saves the day."""
STOPPED_S = 4.0
"""More than G: a stopped primary has a successor when it wakes up."""
CONDUCTOR_STOPPED_S = 15.0
"""In CI; `PF_CONDUCTOR_STOPPED_S` asks for more."""
LATE_VOLUMES = 5
LATE_STOPS = 2
LATE_SUCCESSIONS_MIN = 5
"""Of all volumes that the stopped stores served."""
WRITE_S_MAX = 5.0
LOAD_MIB = 128


@pytest.fixture
def three(cluster: RealCluster) -> RealCluster:
    """Start a cluster with three stores and a volume on all of them."""
    cluster.allowed |= EXPECTED_WARNINGS | {"EXPORT_NOT_READY"}
    return cluster


def start(cluster: RealCluster, *, restart_delay: str = "1s", replicas: int = 3) -> str:
    """Bring the cluster up; gives the URI of a new volume."""
    cluster.pf(
        "up", "--detach", "--disk", "2G", "--journal", "16M", "--restart-delay", restart_delay
    )
    cluster.pf("volume", "create", "v1", f"{LOAD_MIB}M", "--replicas", str(replicas))
    cluster.wait_healthy()
    return cluster.export("v1")


class Load:
    """fio at work, until it is told to stop; then it verifies what it has written."""

    def __init__(self, cluster: RealCluster, uri: str, size: str) -> None:
        self._output = cluster.home / "fio.json"
        command = [
            "fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k",
            "--iodepth=32", f"--size={size}", "--verify=crc32c", "--verify_fatal=1",
            "--serialize_overlap=1", "--time_based", "--runtime=1800", "--randseed=7",
            "--rate_iops=2000", f"--aux-path={cluster.home}", "--output-format=json",
            f"--output={self._output}",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, env=cluster.environment)

    def finish(self) -> dict[str, Any]:
        """Let fio end its writing and verify; gives its report."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=120)
        text = self._output.read_text()
        job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
        return job


@contextlib.contextmanager
def loaded(
    cluster: RealCluster, uri: str, *, size: str = f"{LOAD_MIB}M", write_s_max: float = WRITE_S_MAX
) -> Iterator[None]:
    """Keep fio at work in the block; afterwards it must have seen nothing of what happened."""
    load = Load(cluster, uri, size)
    try:

        def is_writing() -> bool:
            with cluster.api() as api:
                return any(export.connections for export in api.exports())

        cluster.wait("fio is connected", is_writing)
        yield
        assert load.process.poll() is None, "fio has ended: it saw an error"
        job = load.finish()
    finally:
        if load.process.poll() is None:
            load.process.kill()
            load.process.wait()
    assert job["error"] == 0
    assert job["write"]["total_ios"] > 1000
    longest_s = job["write"]["clat_ns"]["max"] / 1e9
    print(f"{job['write']['total_ios']} writes, longest {longest_s:.2f} s")
    assert longest_s < write_s_max


def check_bench(cluster: RealCluster) -> None:
    """Measure with `pf bench`: the stores' counters reach it and explain a replicated request."""
    report = json.loads(cluster.pf("bench", "--size", "8M", "--seconds", "0.3", "-o", "json"))
    assert report["replicas"] == 3
    assert [budget["kind"] for budget in report["budgets"]] == ["write", "read"]
    for budget in report["budgets"]:
        parts = {part["part"]: part for part in budget["parts"]}
        whole = sum(part["mean_us"] for part in parts.values() if not part["is_inside"])
        assert whole == pytest.approx(budget["whole"]["mean_us"]), "the parts add up"
        assert parts["disk"]["mean_us"] > 0
        # A hop that missed requests, or held others, would not lie inside the whole.
        assert all(part["mean_us"] > 0 for part in parts.values() if part["part"] != "secondary")
    assert all(load["iops"] > 0 for load in report["loads"])
    assert cluster.pf("volume", "list", "-o", "name").split() == ["v1"], "its volume is gone"


def check_direct(device: Device, volume: Volume) -> None:
    """Go on with a device whose primary was just killed; then let another client take over."""
    device.pwrite(b"b" * 4096, offset=0)
    assert device.pread(0, 8192) == b"b" * 4096 + b"a" * 4096, "the same device, another store"
    with volume.open() as second, volume.open(is_read_only=True) as reader:
        # From its opening on, before its first request.
        with pytest.raises(RouteError) as caught:
            device.pwrite(b"c" * 4096, offset=0)
        assert caught.value.code is Code.FENCED
        assert "another client attached this volume for writing" in str(caught.value)
        with pytest.raises(RouteError, match="attach again"):
            device.pread(0, 4096)
        assert second.pread(0, 4096) == b"b" * 4096, "what was fenced has no effect"
        second.pwrite(b"d" * 4096, offset=0)
        assert reader.pread(0, 8192) == b"d" * 4096 + b"a" * 4096
        with volume.open() as third:
            # A reader is nobody's rival: it follows the attaches of others.
            third.pwrite(b"e" * 4096, offset=0)
            assert reader.pread(0, 4096) == b"e" * 4096


def test_a_primary_that_is_killed_has_a_successor_at_once(three: RealCluster) -> None:
    uri = start(three, restart_delay=f"{DOWN_S}s")
    # Beside the NBD client of v1, a program with a volume of its own on the same primary.
    with three.api() as api, Cluster(api) as connection, loaded(three, uri):
        first = three.primary_of("v1")
        # Two copies go to the stores with the most room, so that the primaries take turns.
        made = (connection.volumes.create(f"d{n}", "32MiB", replicas=2) for n in range(6))
        volume = next(found for found in made if f"s{found.view.shards[0].primary}" == first)
        with volume.open() as device:
            device.pwrite(b"a" * 8192, offset=0)
            volume.resize("64MiB")
            device.pwrite(b"a" * 4096, offset=device.size_bytes)
            assert device.size_bytes == 64 << 20
            killed = three.kill(first)
            check_direct(device, volume)
        three.wait("another primary", lambda: three.primary_of("v1") != first, seconds=10)
        shown = three.pf("volume", "explain", "v1")
        assert first in shown
        three.wait("its restart", lambda: three.children()[first]["pid"] not in (None, killed))
        three.wait_whole("v1")
        assert three.primary_of("v1") != first


@pytest.mark.timeout(1800)
def test_stores_are_killed_and_stopped_again_and_again(three: RealCluster) -> None:
    uri = start(three, restart_delay=f"{DOWN_S}s")
    chance = random.Random(11)
    with loaded(three, uri):
        for cycle in range(int(os.environ.get("PF_NEMESIS_CYCLES", CYCLES))):
            name = three.primary_of("v1") if cycle % 3 else chance.choice(["s1", "s2", "s3"])
            if cycle % 2:
                with three.stopped(name):
                    threading.Event().wait(STOPPED_S)
            else:
                three.kill_and_await(name)
            three.wait_whole("v1")
            assert "3 copies are equal" in three.pf("volume", "verify", "v1")


def test_two_replicas_survive_either(three: RealCluster) -> None:
    uri = start(three, replicas=2)
    with loaded(three, uri):
        for _ in range(2):
            three.kill_and_await(three.primary_of("v1"))
            three.wait_whole("v1")


@pytest.mark.timeout(600)
def test_an_image_is_the_same_on_whichever_store_serves_it(
    three: RealCluster, tmp_path: Path
) -> None:
    uri = start(three)
    source = tmp_path / "in.img"
    source.write_bytes(random.Random(5).randbytes(LOAD_MIB << 20))
    convert = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri]
    assert three.run(convert).returncode == 0
    served = set()
    for _ in range(3):
        served.add(three.primary_of("v1"))
        compare = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), uri]
        compared = three.run(compare)
        assert compared.returncode == 0, compared.stdout + compared.stderr
        three.kill_and_await(three.primary_of("v1"))
        three.wait_whole("v1")
    assert len(served) >= 2, served


@pytest.mark.timeout(600)
def test_primaries_are_handed_back_under_load_without_being_noticed(three: RealCluster) -> None:
    """T5: the store that returned leads its share again, and no write waits for a promise's end."""
    three.environment["PF_LIMITS_BALANCE_AFTER_S"] = "3"
    three.pf("up", "--detach", "--disk", "4G", "--journal", "16M", "--restart-delay", "1s")
    three.pf("volume", "create", "v1", "3G", "--shard-size", "1G")
    three.wait_healthy()
    uri = three.export("v1")

    def leads() -> list[int]:
        with three.api() as api:
            primaries = [shard.primary for shard in api.volume("v1").shards]
        return [primaries.count(store) for store in (1, 2, 3)]

    three.wait("one each", lambda: leads() == [1, 1, 1])
    three.kill_and_await("s1")
    three.wait("its successor", lambda: leads()[0] == 0, seconds=10)
    three.wait("all replicas in sync", lambda: not any(map(out_of_sync, shards_of(three))))
    with loaded(three, uri, size="3G", write_s_max=1.0):
        three.wait("one each again", lambda: leads() == [1, 1, 1])
    assert "proposed to transfer copy" in three.layout.log("c1").read_text()
    assert "3 copies are equal" in three.pf("volume", "verify", "v1")


def shards_of(cluster: RealCluster) -> list[ShardView]:
    """Show the shards of the volume."""
    with cluster.api() as api:
        return api.volume("v1").shards


def out_of_sync(shard: ShardView) -> bool:
    """Whether a copy is missing."""
    return len(shard.isr) < 3


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[RealCluster, str]]:
    """Start one cluster for the stories that only stop processes; gives it and the URI of v1."""
    with temporary_cluster() as made:
        made.allowed |= EXPECTED_WARNINGS | {"EXPORT_NOT_READY"}
        yield made, start(made)


@pytest.mark.timeout(600)
def test_a_stopped_conductor_is_not_missed(shared: tuple[RealCluster, str]) -> None:
    cluster, uri = shared
    with loaded(cluster, uri):
        seconds = float(os.environ.get("PF_CONDUCTOR_STOPPED_S", CONDUCTOR_STOPPED_S))
        with cluster.stopped("c1"):
            threading.Event().wait(seconds)
    cluster.wait_healthy()
    check_bench(cluster)


def test_late_reads_of_a_stopped_primary_are_refused(shared: tuple[RealCluster, str]) -> None:
    """An old value must not come back from a primary that slept through its own succession.

    Reads wait in its socket when it wakes up, and more come while it does; what its successor has
    acknowledged meanwhile is newer than all that it has.
    """
    cluster, _ = shared
    for number in range(LATE_VOLUMES):
        cluster.pf("volume", "create", f"late{number}", "4M", "--replicas", "3")
    told: Counter[str] = Counter()
    successions = 0
    for _ in range(LATE_STOPS):
        cluster.wait_healthy()
        with cluster.api() as api:
            primaries = {view.name: f"s{view.shards[0].primary}" for view in api.volumes()}
        late = {name: store for name, store in primaries.items() if name.startswith("late")}
        ((stopped, _),) = Counter(late.values()).most_common(1)
        with contextlib.ExitStack() as stack:
            readers = [
                stack.enter_context(LateReader(cluster, name))
                for name, store in late.items()
                if store == stopped
            ]
            with cluster.stopped(stopped):
                for reader in readers:
                    reader.write_through_successor(stopped)
                    reader.ask()
            for reader in readers:
                reader.ask()
            for reader in readers:
                told += reader.refusals()
                successions += 1
            cluster.wait_healthy()
            for reader in readers:
                reader.ask()
                told += reader.refusals()
    print(f"{successions} successions, late reads: {dict(told)}")
    assert successions >= LATE_SUCCESSIONS_MIN
