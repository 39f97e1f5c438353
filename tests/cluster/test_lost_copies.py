"""Ring 2: the last in-sync copy is lost for good, and a person decides that an older one counts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.cluster.conftest import EXPECTED_WARNINGS, RealCluster

from pureflash.model.exits import Exit

MIB = 1 << 20
SIZE_MIB = 32


def fill(cluster: RealCluster, path: Path, *, seed: int, mebibytes: int) -> bytes:
    """Write random data onto the start of the volume; gives it."""
    data = random.Random(seed).randbytes(mebibytes * MIB)
    path.write_bytes(data)
    cluster.pf("image", "import", str(path), "v1", "--yes")
    return data


def state_of(cluster: RealCluster) -> str:
    with cluster.api() as api:
        return api.volume("v1").state


@pytest.mark.timeout(300)
def test_a_person_brings_a_volume_back_from_an_older_copy(
    cluster: RealCluster, tmp_path: Path
) -> None:
    cluster.allowed |= EXPECTED_WARNINGS | {"DISK_FAILED"}
    # Nothing that was killed comes back before everything is started again.
    up = ("up", "--detach", "--restart-delay", "600s")
    cluster.pf(*up, "--stores", "2", "--disk", "1G", "--journal", "16M")
    cluster.pf("volume", "create", "v1", f"{SIZE_MIB}M", "--replicas", "2")
    cluster.wait_healthy()
    old = fill(cluster, tmp_path / "old.img", seed=1, mebibytes=8)
    gone = cluster.primary_of("v1")
    left = {"s1": "s2", "s2": "s1"}[gone]
    cluster.kill(left)
    cluster.wait("one goes on alone", lambda: state_of(cluster) == "single_copy")
    new = fill(cluster, tmp_path / "new.img", seed=2, mebibytes=4)
    cluster.kill(gone)
    cluster.wait("its end is known", lambda: state_of(cluster) == "offline")
    cluster.pf("down")
    cluster.layout.disk(gone).unlink()
    missing = cluster.pf(*up, status=Exit.NOT_SERVED)
    assert f"{cluster.layout.disk(gone)} is not there" in missing
    assert f"pf up --new-disk {gone}" in missing
    assert not cluster.layout.disk(gone).exists(), "no empty one takes its place by itself"
    cluster.pf("down")
    cluster.pf(*up, "--new-disk", left, status=Exit.UNSAFE)
    cluster.pf(*up, "--new-disk", gone, status=Exit.NOT_SERVED)  # it is up, and says what is wrong
    cluster.wait("it is offline", lambda: state_of(cluster) == "offline")
    shown = cluster.pf("volume", "show", "v1")
    assert f"{gone} came back without its copy" in shown
    assert "pf volume force-accept" in shown
    force = ("volume", "force-accept", "v1", "--shard", "0", "--copy", left)
    refused = cluster.pf(*force[:-1], gone, "--yes", status=Exit.UNSAFE)
    assert "is in sync" in refused
    assert "What is lost" in cluster.pf(*force, "--dry-run")
    assert state_of(cluster) == "offline"
    print(cluster.pf(*force, "--yes"))
    cluster.wait("it serves", lambda: state_of(cluster) != "offline")
    copy = tmp_path / "copy.img"
    cluster.pf("image", "export", "v1", str(copy))
    found = copy.read_bytes()[: len(old)]
    assert found == old, "what was there when this copy left, and nothing of what came after"
    assert not found.startswith(new[:MIB])
    cluster.wait_whole("v1")
    assert "2 copies are equal" in cluster.pf("volume", "verify", "v1")
    assert "forced" in cluster.pf("volume", "explain", "v1")
    # The store that lost everything takes over with what it was given.
    cluster.kill(left)
    cluster.wait("it takes over", lambda: cluster.primary_of("v1") == gone)
    copy.unlink()
    cluster.pf("image", "export", "v1", str(copy))
    assert copy.read_bytes()[: len(old)] == old
