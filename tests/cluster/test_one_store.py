"""The main job with one replica, by real processes and foreign clients.

An image goes in through qemu, the store is killed under fio's verified load, and everything that
was acknowledged is there. One cluster for all of it, each story with a volume of its own; the last
one deletes it.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.cluster import EXPECTED_WARNINGS, PF, RealCluster, temporary_cluster

from pureflash import connect
from pureflash.cli.outcome import Exit
from pureflash.errors import PureFlashError

MIB = 1 << 20
IMAGE_BYTES = 64 * MIB


def make_image(path: Path, *, seed: int) -> str:
    """Write a sparse image with data in a third of it; gives its SHA-256."""
    chance = random.Random(seed)
    with path.open("wb") as file:
        for offset in range(0, IMAGE_BYTES, MIB):
            if chance.random() < 0.33:
                file.seek(offset)
                file.write(chance.randbytes(MIB))
        file.truncate(IMAGE_BYTES)
    return hash_of(path)


def hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture(scope="module")
def one() -> Iterator[RealCluster]:
    """Start a cluster with one store and a journal that is small enough to wrap."""
    with temporary_cluster() as made:
        made.pf("up", "--detach", "--stores", "1", "--disk", "4G", "--journal", "16M")
        yield made


def test_two_clusters_that_start_for_the_first_time_at_once_both_come_up() -> None:
    with temporary_cluster() as first, temporary_cluster() as second, ThreadPoolExecutor(2) as pool:
        both = (first, second)
        words = ("up", "--detach", "--stores", "1", "--disk", "1G")
        for said in [pool.submit(cluster.pf, *words) for cluster in both]:
            said.result()
        addresses = []
        for cluster in both:
            cluster.wait_healthy()
            with cluster.api() as api:
                addresses += [api.address, *(store.address for store in api.stores())]
        assert len(set(addresses)) == 4, addresses
        for stopped in [pool.submit(cluster.pf, "down") for cluster in both]:
            stopped.result()


def test_a_start_in_the_background_that_is_interrupted_goes_on_and_says_so() -> None:
    with temporary_cluster() as made:
        command = [PF, "up", "--detach", "--stores", "1", "--disk", "1G"]
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=made.environment
        ) as up:
            made.wait("it has begun", made.layout.supervisor_file.exists)
            up.send_signal(signal.SIGINT)
            _, said = up.communicate(timeout=60)
        assert up.returncode == 130
        assert "goes on starting; `pf down` stops it" in said
        made.wait_healthy()


def test_an_image_goes_through_qemu_and_a_killed_store_unchanged(one: RealCluster) -> None:
    source, back = one.home / "in.img", one.home / "out.img"
    digest = make_image(source, seed=1)
    one.pf("volume", "create", "v1", "64M")
    uri = one.export("v1")
    assert one.run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri]
                   ).returncode == 0  # fmt: skip
    one.allowed |= EXPECTED_WARNINGS
    one.kill_and_await("s1")
    one.wait_healthy()
    compared = one.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), uri])
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert one.run(["nbdcopy", uri, str(back)]).returncode == 0
    assert hash_of(back) == digest


def test_fio_verifies_every_block_over_a_store_that_is_killed_under_it(one: RealCluster) -> None:
    one.pf("volume", "create", "fio", "256M")
    uri = one.export("fio")
    one.allowed |= EXPECTED_WARNINGS
    command = [
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k",
        "--iodepth=32", "--size=256M", "--verify=crc32c", "--verify_fatal=1",
        "--serialize_overlap=1", "--time_based", "--runtime=8", "--randseed=7",
        f"--aux-path={one.home}",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=one.environment
    ) as load:

        def is_under_load() -> bool:
            with one.api() as api:
                return any(export.connections for export in api.exports())

        one.wait("fio is connected", is_under_load)
        one.kill_and_await("s1")
        output, _ = load.communicate(timeout=100)
    assert load.returncode == 0, output
    one.wait_healthy()


def test_pf_image_takes_an_image_in_and_out_and_refuses_to_overwrite(one: RealCluster) -> None:
    source, back = one.home / "in.img", one.home / "image.img"
    digest = make_image(source, seed=2)
    one.pf("volume", "create", "image", "64M")
    one.pf("image", "import", str(source), "image")
    one.pf("image", "export", "image", str(back))
    assert hash_of(back) == digest
    assert back.stat().st_blocks * 512 < IMAGE_BYTES
    assert "exists" in one.pf("image", "export", "image", str(back), status=4)
    assert "--yes" in one.pf("image", "import", str(source), "image", status=6)
    one.pf("volume", "create", "small", "32M")
    assert "resize" in one.pf("image", "import", str(source), "small", status=2)


def test_images_that_are_not_raw_arrive_whole_or_leave_the_volume_as_it_was(
    one: RealCluster,
) -> None:
    source, packed = one.home / "f.img", one.home / "f.qcow2"
    digest = make_image(source, seed=7)
    one.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(source), str(packed)])
    one.pf("volume", "create", "form", "64M")

    def content() -> str:
        back = one.home / "form.img"
        back.unlink(missing_ok=True)
        one.pf("image", "export", "form", str(back))
        assert back.stat().st_mode & 0o777 == 0o600
        return hash_of(back)

    said = one.pf("image", "import", str(packed), "form")
    assert "(qcow2) onto volume form; it takes the volume over" in said
    assert "gets FENCED" in said
    assert content() == digest
    one.run(["qemu-img", "create", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", f"{packed}.2"])
    said = one.pf("image", "import", f"{packed}.2", "form", "--yes", status=2)
    assert "is based on another file, its backing file; form was not touched" in said
    (one.home / "cut.gz").write_bytes(gzip.compress(b"x" * MIB)[:-9])
    said = one.pf("image", "import", str(one.home / "cut.gz"), "form", "--yes", status=1)
    assert "form was not touched" in said
    assert content() == digest
    other = make_image(source, seed=8)
    piped = f"gzip -1c {source} | {PF} image import - form --yes"
    result = one.run(["sh", "-c", piped])
    assert result.returncode == 0, result.stderr
    assert content() == other
    one.export("form")
    said = one.pf("image", "import", str(packed), "form", "--yes", status=4)
    assert "its clients would see errors" in said


def test_an_export_that_is_ended_leaves_nothing_and_one_that_was_killed_is_cleaned_up(
    one: RealCluster,
) -> None:
    one.allowed |= EXPECTED_WARNINGS
    folder = one.home / "out"
    folder.mkdir()
    file = folder / "image.img"
    one.pf("volume", "create", "ended", "64M")
    command = [PF, "image", "export", "ended", str(file)]
    for number, status in (
        (signal.SIGTERM, Exit.TERMINATED),
        (signal.SIGINT, Exit.INTERRUPTED),
        (signal.SIGKILL, -signal.SIGKILL),
    ):
        with (
            one.stopped("s1"),  # nobody serves: the export waits
            subprocess.Popen(command, env=one.environment, stderr=subprocess.PIPE) as export,
        ):
            one.wait("its partial file", lambda: len(list(folder.iterdir())) == 2)
            assert "is being made by another" in one.pf(*command[1:], status=4)
            export.send_signal(number)
            export.communicate(timeout=30)
        assert export.returncode == status
        assert (len(list(folder.iterdir())) == 0) == (number is not signal.SIGKILL)
    assert "removed" in one.pf(*command[1:])
    assert [path.name for path in folder.iterdir()] == ["image.img"]
    one.wait_healthy()


def test_a_second_writer_takes_the_volume_over_from_the_first(one: RealCluster) -> None:
    one.pf("volume", "create", "taken", "64M")
    with connect(data=one.layout.directory) as cluster, ThreadPoolExecutor(1) as pool:
        volume = cluster.volumes.get("taken")
        with volume.open() as first, volume.open() as second:
            second.pwrite(b"2" * 4096, offset=0)
            late = pool.submit(first.pwrite, b"1" * 4096, offset=0)
            for block in range(1, 256):
                second.pwrite(b"2" * 4096, offset=4096 * block)
            assert not late.done(), "it waits for a newer ticket, which nobody gives it"
            first.close()
            assert isinstance(late.exception(timeout=30), PureFlashError)
            assert second.pread(offset=0, length=4096) == b"2" * 4096
        assert cluster.volumes.get("taken").view.attach_epoch == 3
        one.export("taken")
        assert cluster.volumes.get("taken").view.attach_epoch == 4, "an export takes over as well"


def test_what_was_written_is_there_after_a_stop_at_the_same_addresses(one: RealCluster) -> None:
    source = one.home / "in.img"
    make_image(source, seed=3)
    one.pf("volume", "create", "kept", "64M")
    uri = one.export("kept")
    assert one.run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri]
                   ).returncode == 0  # fmt: skip
    before = one.layout.cluster_file.read_text()
    one.pf("down")
    assert one.processes() == []
    one.pf("up", "--detach")
    assert one.layout.cluster_file.read_text() == before
    assert "already running" in one.pf("up", "--detach")
    one.wait_healthy()
    compared = one.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), uri])
    assert compared.returncode == 0, compared.stdout + compared.stderr


def test_a_port_that_is_taken_is_named_with_its_holder(one: RealCluster) -> None:
    with one.api() as api:
        host, port = api.address.split(":")
    one.pf("down")
    with socket.create_server((host, int(port))):
        said = one.pf("up", "--detach")
        assert f"is the conductor's from now on: {port} is taken, held by" in said
        assert f"(pid {os.getpid()})" in said
    one.wait_healthy()


def test_a_store_whose_disk_is_gone_says_so_and_comes_back_with_it(one: RealCluster) -> None:
    one.allowed |= {*EXPECTED_WARNINGS, "DISK_FAILED"}
    one.allowed_errors |= {"process.failed"}
    source, back = one.home / "in.img", one.home / "disk.img"
    digest = make_image(source, seed=6)
    one.pf("volume", "create", "safe", "64M")
    one.pf("image", "import", str(source), "safe")
    disk, aside = one.layout.store_data("s1") / "disk0.img", one.home / "aside.img"
    disk.rename(aside)
    with disk.open("wb") as file:
        file.truncate(aside.stat().st_size)
    one.kill("s1")

    def is_told() -> bool:
        said = one.run([PF, "status"]).stdout  # its exit status is that of the cluster
        cause = "never formatted by PureFlash, or it was overwritten"
        return cause in said and "nothing was written to it" in said

    one.wait("cause and next step in pf status", is_told)
    assert disk.stat().st_blocks == 0, "and so it is"
    aside.rename(disk)
    one.wait("s1 runs", lambda: one.children()["s1"]["state"] == "running")
    one.wait_healthy()
    one.pf("image", "export", "safe", str(back))
    assert hash_of(back) == digest


def test_a_killed_conductor_and_a_killed_gateway_come_back_with_all_they_knew(
    one: RealCluster,
) -> None:
    one.allowed |= EXPECTED_WARNINGS
    one.pf("volume", "create", "plain", "64M")
    uri = one.export("plain")
    for name in ("c1", "g1"):
        one.kill_and_await(name)
        one.wait_healthy()
        with one.api() as api:
            assert {volume.state for volume in api.volumes()} == {"healthy"}

            def is_offered() -> bool:
                return uri in [export.uri for export in api.exports()]

            one.wait("the export", is_offered)


def test_purge_leaves_no_process_socket_file_or_context(one: RealCluster) -> None:
    one.pf("volume", "create", "last", "64M")
    one.export("last")
    ours = {entry.name for entry in one.home.iterdir() if entry.is_file()}
    one.check_logs()  # nothing is left to be judged afterwards
    with one.api() as api:
        address = api.address
    assert "--yes" in one.pf("down", "--purge", status=6)
    one.pf("down", "--purge", "--yes")
    assert not one.layout.directory.exists()
    assert one.processes() == []
    assert list((one.home / "run").iterdir()) == []
    assert not (one.home / "config/pureflash/context.toml").exists()
    host, port = address.split(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0
    left = {entry.name for entry in one.home.rglob("*") if entry.is_file()} - ours
    assert left == set(), f"left behind in {os.fspath(one.home)}"
