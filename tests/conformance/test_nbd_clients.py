"""Ring 3: NBD clients that did not learn the protocol from us, unmodified, on three replicas.

What each of them reports as success is checked once more by another one, and each kind of check is
also shown to fail on wrong data.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.conformance.conftest import Exporter
from tests.support.cluster import RealCluster

MIB = 1 << 20
IMAGE_BYTES = 96 * MIB
NBDINFO = ("nbdinfo", "--json", "--no-content")
"""Without a look at the content: where there is no `file` program it prints bytes of its memory."""


def hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give a sparse image: data in a third of it, also in odd places, zeros elsewhere."""
    chance = random.Random(96)
    path = tmp_path / "in.img"
    with path.open("wb") as file:
        for offset in range(0, IMAGE_BYTES, MIB):
            if chance.random() < 0.33:
                file.seek(offset + 512 * chance.randrange(2048))
                file.write(chance.randbytes(512 * chance.randrange(1, 512)))
        file.truncate(IMAGE_BYTES)
    return path


def succeed(cluster: RealCluster, *command: str | Path) -> str:
    """Run a client, which must succeed; gives its output."""
    result = cluster.run([str(part) for part in command])
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def qemu_io(cluster: RealCluster, uri: str, *commands: str, is_read_only: bool = False) -> str:
    """Run qemu-io with commands; its exit status does not tell of every failure, its text does."""
    flags = [part for command in commands for part in ("-c", command)]
    mode = ["-r"] if is_read_only else []
    result = cluster.run(["qemu-io", "-f", "raw", *mode, *flags, uri])
    return result.stdout + result.stderr


def test_nbdinfo_sees_what_the_export_can_do(cluster: RealCluster, export: Exporter) -> None:
    uri = export("96M")
    seen: dict[str, Any] = json.loads(succeed(cluster, *NBDINFO, uri))
    assert seen["protocol"] == "newstyle-fixed"
    assert seen["structured"] is True
    (found,) = seen["exports"]
    assert found["export-size"] == IMAGE_BYTES
    can = {name for name in found if name.startswith("can_") and found[name]}
    assert can == {
        "can_df", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero",
    }  # fmt: skip
    assert found["is_read_only"] is False
    blocks = [found[f"block_size_{name}"] for name in ("minimum", "preferred", "maximum")]
    assert blocks == [512, 4096, MIB]
    assert succeed(cluster, "nbdinfo", "--size", uri).strip() == str(IMAGE_BYTES)
    listed = json.loads(succeed(cluster, *NBDINFO, "--list", uri.replace("/v0", "/")))
    assert [one["export-name"] for one in listed["exports"]] == ["v0"]


def test_nbdinfo_sees_a_read_only_export_and_tcp(cluster: RealCluster, export: Exporter) -> None:
    uri = export("96M", "--tcp", "--read-only")
    assert uri.startswith("nbd://127.0.0.1:")
    (found,) = json.loads(succeed(cluster, *NBDINFO, uri))["exports"]
    assert found["is_read_only"] is True
    refused = qemu_io(cluster, uri, "write -P 1 0 4k")
    assert "Permission denied" in refused
    assert "read 4096/4096 bytes" in qemu_io(cluster, uri, "read -P 0 0 4k", is_read_only=True)


def test_qemu_img_takes_an_image_in_and_out(
    cluster: RealCluster, export: Exporter, image: Path, tmp_path: Path
) -> None:
    uri = export("96M")
    shown = json.loads(succeed(cluster, "qemu-img", "info", "--output=json", uri))
    assert shown["virtual-size"] == IMAGE_BYTES
    qcow, back = tmp_path / "in.qcow2", tmp_path / "out.img"
    succeed(cluster, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, qcow)
    succeed(cluster, "qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow, uri)
    compare = ("qemu-img", "compare", "-f", "raw", "-F", "raw")
    assert "identical" in succeed(cluster, *compare, image, uri)
    succeed(cluster, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, back)
    assert hash_of(back) == hash_of(image)
    # Sixteen requests at once, out of order, and the volume as both source and target.
    second = export("96M")
    convert = ("qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw")
    succeed(cluster, *convert, uri, second)
    assert "identical" in succeed(cluster, *compare, uri, second)
    assert "wrote 512/512" in qemu_io(cluster, second, "write -P 7 512 512")
    differing = cluster.run([*compare, str(image), second])
    assert differing.returncode == 1, "a difference of one sector is seen"


def test_qemu_io_patterns_zeros_and_discards(cluster: RealCluster, export: Exporter) -> None:
    uri = export("96M")
    told = qemu_io(
        cluster,
        uri,
        "write -P 0xa1 0 1M",
        "write -P 0xb2 511k 2k",  # across blocks and a slot
        "write -f -P 0xc3 1047552 2048",  # FUA, across a region
        "aio_write -P 0xd4 4194048 512",  # the last sectors of an extent
        "aio_write -P 0xe5 4194560 1M",
        "aio_flush",
        "write -z 64k 64k",
        "write -z -u 256k 3584",
        "discard 768k 128k",
        "flush",
        "read -P 0xa1 0 64k",
        "read -P 0 64k 64k",
        "read -P 0xa1 128k 128k",
        "read -P 0 256k 3584",
        "read -P 0xa1 265728 512",
        "read -P 0xb2 511k 2k",
        "read -P 0xa1 513k 255k",
        "read -P 0 768k 128k",
        "read -P 0xc3 1047552 2048",
        "read -P 0xd4 4194048 512",
        "read -P 0xe5 4194560 1M",
        "read -P 0 1049600 3144448",  # never written
    )
    assert "failed" not in told, told
    assert told.count("bytes at offset") == 20, "all but the two flushes: " + told
    assert "Pattern verification failed" in qemu_io(cluster, uri, "read -P 0xa2 0 512")
    # As a new connection, and as another client.
    assert "failed" not in qemu_io(cluster, uri, "read -P 0xe5 4194560 1M")


def test_nbdcopy_uses_several_connections(
    cluster: RealCluster, export: Exporter, image: Path, tmp_path: Path
) -> None:
    uri, second = export("96M"), export("96M", "--tcp")
    back = tmp_path / "out.img"
    succeed(cluster, "nbdcopy", "--connections=4", "--requests=32", "--flush", image, uri)
    succeed(cluster, "nbdcopy", "--connections=4", "--request-size=524288", uri, second)
    succeed(cluster, "nbdcopy", second, back)
    assert hash_of(back) == hash_of(image)
    assert "identical" in succeed(
        cluster, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri
    )


@pytest.mark.parametrize("block", ["4k", "512"])
def test_fio_verifies_what_it_writes(cluster: RealCluster, export: Exporter, block: str) -> None:
    uri = export("32M")
    told = succeed(
        cluster,
        *("fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", f"--bs={block}"),
        *("--iodepth=32", "--size=32M", "--io_size=16M", "--verify=crc32c", "--verify_fatal=1"),
        *("--serialize_overlap=1", "--randseed=7", "--output-format=json"),
        f"--aux-path={cluster.home}",
    )
    (job,) = json.loads(told[told.index("{") :])["jobs"]
    assert job["error"] == 0
    assert job["read"]["io_bytes"] > 0
    assert job["write"]["io_bytes"] > 0


def test_fio_trims_and_reads_zeros(cluster: RealCluster, export: Exporter) -> None:
    uri = export("32M")
    common = (
        *("fio", "--ioengine=nbd", f"--uri={uri}", "--bs=64k", "--iodepth=8", "--size=32M"),
        f"--aux-path={cluster.home}",
    )
    succeed(cluster, *common, "--name=fill", "--rw=write", "--buffer_pattern=0x5a")
    assert "failed" not in qemu_io(cluster, uri, "read -P 0x5a 0 32M")
    succeed(cluster, *common, "--name=trim", "--rw=trim")
    assert "failed" not in qemu_io(cluster, uri, "read -P 0 0 32M")


def test_a_client_that_is_killed_leaves_nothing_behind(
    cluster: RealCluster, export: Exporter
) -> None:
    uri = export("32M")
    command = [
        *("fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=64k"),
        *("--iodepth=32", "--size=32M", "--time_based", "--runtime=600", "--thread"),
        f"--aux-path={cluster.home}",
    ]

    def connections() -> int:
        with cluster.api() as api:
            return sum(found.connections for found in api.exports())

    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=cluster.environment
    ) as load:
        try:
            cluster.wait("fio is connected", lambda: connections() > 0)
        finally:
            load.kill()
    cluster.wait("its connection is gone", lambda: connections() == 0)
    assert "failed" not in qemu_io(cluster, uri, "write -P 9 0 32M", "read -P 9 0 32M")
