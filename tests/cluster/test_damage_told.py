"""Ring 2: damage on one copy, on different copies and on all of them, as a user sees it.

For each: clients get the right data or an error, and status, explain, verify, metrics, events, the
log and the exit status say one thing, until it is over. How the blocks are damaged is in
`test_damage.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import httpx2
import pytest
from tests.cluster.conftest import RealCluster
from tests.cluster.test_damage import BLOCK, MIB, content, damage

from pureflash.model.exits import Exit

BLOCKS = 8 * MIB // BLOCK
UP = ("up", "--detach", "--stores", "3", "--disk", "1G", "--journal", "16M")


def codes_of(cluster: RealCluster) -> set[tuple[str, str]]:
    with cluster.api() as api:
        return {(one.code, one.subject) for one in api.cluster().health}


def metrics_of(cluster: RealCluster) -> str:
    with cluster.api() as api:
        return httpx2.get(f"http://{api.address}/metrics", trust_env=False).text


def check_faces(cluster: RealCluster, expected: set[tuple[str, str]], volume: str) -> None:
    """Every face says that these are the findings, or that there are none."""
    cluster.wait(f"{expected or 'nothing'} is told", lambda: codes_of(cluster) >= expected)
    data = {pair for pair in codes_of(cluster) if pair[0].startswith("DATA_")}
    assert data == expected
    status = cluster.pf("status")
    explain = cluster.pf("volume", "explain", volume)
    listed = cluster.pf("volume", "list", "-H", "--columns", "name,state")
    metrics = metrics_of(cluster)
    for code, subject in expected:
        assert f"{code} {subject}" in status
        family = {
            "DATA_LOST": "pureflash_lost_blocks{",
            "DATA_DAMAGED": "pureflash_damaged_blocks{",
            "DATA_DIFFERS": "pureflash_differing_regions{",
        }[code]
        assert re.search(rf'{re.escape(family)}.*volume="{volume}"', metrics)
        mark = "without any good copy" if code == "DATA_LOST" else "cannot be read"
        assert mark in explain
    is_well = not expected
    assert ("No known data errors" in status) == is_well
    assert ("Everything is as it should be" in status) == is_well
    assert (re.search(rf"^{volume}\thealthy$", listed, re.MULTILINE) is not None) == is_well
    assert bool(re.search(r"pureflash_(lost|damaged)_blocks\{", metrics)) == (not is_well)


def logged(cluster: RealCluster, code: str, event: str) -> int:
    """Count the lines of the conductor's log about a code."""
    lines = (json.loads(line) for line in cluster.layout.log("c1").read_text().splitlines())
    return sum(line["event"] == event and code in json.dumps(line) for line in lines)


def fill(cluster: RealCluster, volume: str, replicas: int, place: Path) -> bytes:
    data = b"".join(content(block, seed=replicas) for block in range(BLOCKS))
    place.write_bytes(data)
    cluster.pf("volume", "create", volume, "8M", "--replicas", str(replicas))
    cluster.wait_healthy()
    cluster.pf("image", "import", str(place), volume, "--yes")
    return data


def harm(cluster: RealCluster, stores: Iterable[str], replicas: int, *blocks: int) -> None:
    for store in stores:
        for block in blocks:
            damage(cluster.layout.disk(store), content(block, seed=replicas))


def by_role(cluster: RealCluster, volume: str) -> list[str]:
    """Name the stores of the copies, the primary first."""
    with cluster.api() as api:
        members = api.volume(volume).shards[0].members
    return [one.name for one in sorted(members, key=lambda one: one.role != "primary")]


@pytest.mark.timeout(300)
def test_damage_is_told_on_every_face_until_it_is_mended(
    cluster: RealCluster, tmp_path: Path
) -> None:
    cluster.allowed |= {"DATA_LOST", "DATA_DAMAGED", "DATA_DIFFERS"}
    cluster.pf(*UP)
    data = fill(cluster, "v3", 3, tmp_path / "in.img")
    check_faces(cluster, set(), "v3")
    with cluster.api() as api:
        shard = api.volume("v3").shards[0]
    names = {member.role: member.name for member in shard.members}
    primary, secondary = names["primary"], names["secondary"]
    third = next(member.name for member in shard.members if member.name not in (primary, secondary))

    # A secondary: nobody reads it, until it is verified.
    harm(cluster, [secondary], 3, 30, 31, 600)
    job = cluster.pf("volume", "verify", "v3", "--no-repair", status=Exit.FAILED)
    assert "cannot be read" in job
    check_faces(cluster, {("DATA_DAMAGED", f"v3/0/{secondary}")}, "v3")
    assert "3 blocks of the copy" in cluster.pf("status")
    job = cluster.pf("volume", "verify", "v3")
    assert "3 copies are equal; 3 blocks mended" in job
    cluster.wait_healthy()
    check_faces(cluster, set(), "v3")
    assert logged(cluster, "DATA_DAMAGED", "data.found") == 1, "once, not at each look"
    assert logged(cluster, "DATA_DAMAGED", "data.over") == 1

    # Other blocks on each copy: a read finds each of them somewhere.
    harm(cluster, [primary], 3, 100, 101)
    harm(cluster, [secondary], 3, 102)
    harm(cluster, [third], 3, 103)
    cluster.pf("image", "export", "v3", str(tmp_path / "out.img"))
    assert (tmp_path / "out.img").read_bytes() == data
    assert "3 copies are equal" in cluster.pf("volume", "verify", "v3")
    cluster.wait_healthy()
    check_faces(cluster, set(), "v3")
    lose_everywhere(cluster, tmp_path, primary, secondary, third)


def lose_everywhere(cluster: RealCluster, folder: Path, *stores: str) -> None:
    """Damage all copies of a block: an error for whoever reads it, and the bytes are named."""
    harm(cluster, stores, 3, 512)
    (folder / "out.img").unlink()
    cluster.pf("image", "export", "v3", str(folder / "out.img"), status=Exit.FAILED)
    check_faces(cluster, {("DATA_LOST", "v3/0")}, "v3")
    first = 512 * BLOCK
    assert f"bytes {first} to {first + BLOCK - 1} of v3 (1 block)" in cluster.pf(
        "volume", "explain", "v3"
    )
    cluster.pf("volume", "verify", "v3", status=Exit.FAILED)
    cluster.kill_and_await("c1")
    cluster.wait("it is known again", lambda: ("DATA_LOST", "v3/0") in codes_of(cluster))
    cluster.pf("image", "import", str(folder / "in.img"), "v3", "--yes")
    cluster.wait_healthy()
    check_faces(cluster, set(), "v3")
    assert "3 copies are equal" in cluster.pf("volume", "verify", "v3")


@pytest.mark.timeout(300)
def test_damage_of_a_single_copy_is_a_loss_also_after_a_restart(
    cluster: RealCluster, tmp_path: Path
) -> None:
    cluster.allowed |= {"DATA_LOST", "DATA_DAMAGED"}
    cluster.pf("up", "--detach", "--stores", "1", "--disk", "1G", "--journal", "16M")
    fill(cluster, "v1", 1, tmp_path / "in.img")
    harm(cluster, ["s1"], 1, 7, 900)
    job = cluster.pf("volume", "verify", "v1", status=Exit.FAILED)
    assert "cannot be read" in job
    check_faces(cluster, {("DATA_LOST", "v1/0")}, "v1")
    cluster.pf("down")
    cluster.pf("up", "--detach")
    cluster.wait("it is known again", lambda: ("DATA_LOST", "v1/0") in codes_of(cluster))
    check_faces(cluster, {("DATA_LOST", "v1/0")}, "v1")
    cluster.pf("image", "import", str(tmp_path / "in.img"), "v1", "--yes")
    cluster.wait_healthy()
    check_faces(cluster, set(), "v1")
