"""Ring 2: every process of the cluster and its client killed at once, under load, again and again.

A client that lives re-sends what was lost and hides it; here it dies too, so what was acknowledged
must be on the disk.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest
from tests.cluster.conftest import EXPECTED_WARNINGS, RealCluster

from pureflash.client.api import Api
from pureflash.client.cluster import Cluster
from pureflash.testing import lane_kill
from pureflash.testing.lane_kill import BLOCK_BYTES, HOT_BLOCKS, Known, Totals

ROUNDS = 3
"""In CI; `PF_KILL_ROUNDS` asks for more."""


def one_round(cluster: RealCluster, known: dict[int, Known], totals: Totals, seed: int) -> None:
    """Let a client write, then kill it and everything else; note what it said."""
    command = [sys.executable, "-m", "tests.support.volume_writer", "v1", str(seed)]
    target = random.Random(seed).randint(50, 800)
    acked = 0
    first_value = str(1 + seed * 1_000_000)
    with subprocess.Popen(
        [*command, first_value], stdout=subprocess.PIPE, env=cluster.environment
    ) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            acked += lane_kill.note(line, known, totals)
            if acked == target:
                target = -1
                # The supervisor first, or it would start the others again.
                for pid in [*cluster.processes(), writer.pid]:
                    os.kill(pid, signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL, "it wrote until it was killed"


def verify(api: Api, known: dict[int, Known], totals: Totals) -> None:
    """Compare every block with what it may hold."""
    with Cluster(api).volumes.get("v1").open(is_read_only=True) as device:
        data = device.pread(0, HOT_BLOCKS * BLOCK_BYTES)
    for block in range(HOT_BLOCKS):
        found = data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        entry = known.get(block, Known())
        value = int.from_bytes(found[4:12], "little")
        assert value in [entry.acknowledged, *entry.begun], f"block {block}: {value}, {entry}"
        assert found == lane_kill.content(block, value), f"block {block} is a mixture"
        known[block] = Known(acknowledged=value)
        totals.verified += 1


@pytest.mark.parametrize("replicas", [1, 3])
def test_nothing_acknowledged_is_lost_when_everything_is_killed_at_once(
    cluster: RealCluster, replicas: int
) -> None:
    cluster.allowed |= EXPECTED_WARNINGS | {"EXPORT_NOT_READY", "GATEWAY_OFFLINE"}
    cluster.pf("up", "--detach", "--stores", str(replicas), "--disk", "2G", "--journal", "16M")
    cluster.pf("volume", "create", "v1", "64M", "--replicas", str(replicas))
    known: dict[int, Known] = {}
    totals = Totals()
    for seed in range(int(os.environ.get("PF_KILL_ROUNDS", ROUNDS))):
        one_round(cluster, known, totals, seed)
        cluster.pf("up", "--detach")
        cluster.wait_healthy()
        with cluster.api() as api:
            verify(api, known, totals)
    print(f"{totals.acknowledged} writes acknowledged, {totals.verified} blocks compared")
    assert totals.acknowledged > 50
