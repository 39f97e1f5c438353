"""Ring 2: the conductor's metastore is replaced by an older copy of it, under a running cluster."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest
from tests.cluster.conftest import EXPECTED_WARNINGS, RealCluster

from pureflash.model.exits import Exit
from pureflash.model.rest import RecoverConfig

MIB = 1 << 20


def random_file(path: Path, *, seed: int, mebibytes: int) -> bytes:
    data = random.Random(seed).randbytes(mebibytes * MIB)
    path.write_bytes(data)
    return data


def copy_through_nbd(cluster: RealCluster, source: str, target: str) -> None:
    """Copy with a client that knows nothing of the conductor."""
    result = cluster.run(["nbdcopy", "--", source, target])
    assert result.returncode == 0, result.stderr


def state_of(cluster: RealCluster) -> str:
    with cluster.api() as api:
        return api.cluster().state


def can_recover(cluster: RealCluster) -> bool:
    """Whether no store is missing."""
    with cluster.api() as api:
        api.recover_config(RecoverConfig(by="a test", dry_run=True))
    return True


@pytest.mark.timeout(300)
def test_an_older_metastore_is_found_out_and_rebuilt(cluster: RealCluster, tmp_path: Path) -> None:
    cluster.allowed |= EXPECTED_WARNINGS
    up = ("up", "--detach", "--restart-delay", "2s")
    cluster.pf(*up, "--stores", "3", "--disk", "1G", "--journal", "16M")
    cluster.pf("volume", "create", "v1", "32M", "--replicas", "3")
    uri = cluster.export("v1")
    metastore = cluster.layout.directory / "conductor" / "meta.sqlite"
    backup = tmp_path / "backup.sqlite"
    with sqlite3.connect(metastore) as present, sqlite3.connect(backup) as copied:
        present.backup(copied)
    cluster.pf("volume", "create", "v2", "8M", "--replicas", "2")
    second = random_file(tmp_path / "second.img", seed=2, mebibytes=8)
    cluster.pf("image", "import", str(tmp_path / "second.img"), "v2", "--yes")
    with cluster.api() as api:
        identity = api.volume("v2").id

    create = ("volume", "create", "v3", "8M", "--replicas", "2")
    first = cluster.primary_of("v1")
    newest = random_file(tmp_path / "newest.img", seed=3, mebibytes=32)
    with cluster.stopped(first):
        cluster.wait("another takes over", lambda: cluster.primary_of("v1") != first)
        cluster.kill("c1")  # and it comes back 2 s later
        for suffix in ("-wal", "-shm"):
            Path(f"{metastore}{suffix}").unlink(missing_ok=True)
        metastore.write_bytes(backup.read_bytes())
        cluster.wait("it is found out", lambda: state_of(cluster) == "amnesia")
        # Clients go on: nothing of their path has to ask the conductor.
        copy_through_nbd(cluster, str(tmp_path / "newest.img"), uri)
        shown = cluster.pf("status")
        print(shown)
        assert "AMNESIA" in shown
        assert "pf conductor recover-config" in shown
        refused = cluster.pf(*create, status=Exit.UNAVAILABLE)
        assert "pf conductor recover-config" in refused
    # The copy that was the primary by the old records, and lacks what came since, is back.
    cluster.wait("all are connected", lambda: can_recover(cluster))
    plan = cluster.pf("conductor", "recover-config", "--dry-run")
    print(plan)
    assert f"recovered-{identity}" in plan
    assert "nothing was changed" in plan
    assert state_of(cluster) == "amnesia"
    print(cluster.pf("conductor", "recover-config", "--yes"))
    cluster.wait_whole("v1")
    cluster.wait_healthy()
    copy_through_nbd(cluster, uri, str(tmp_path / "read.img"))
    assert (tmp_path / "read.img").read_bytes() == newest
    assert "3 copies are equal" in cluster.pf("volume", "verify", "v1")
    cluster.pf("image", "export", f"recovered-{identity}", str(tmp_path / "back.img"))
    assert (tmp_path / "back.img").read_bytes() == second
    cluster.pf(*create)
