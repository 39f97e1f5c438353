"""Ring 2: a writer killed with SIGKILL loses nothing that was acknowledged, on each engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pureflash.cli.machine import examine
from pureflash.testing import lane_kill

KILLS = 10


@pytest.mark.parametrize("engine", ["uring", "aio", "threads"])
def test_acknowledged_writes_survive_kill_9(tmp_path: Path, engine: str) -> None:
    totals = lane_kill.run(tmp_path, kills=KILLS, engine=engine, seed=7, progress=False)
    machine = examine(tmp_path)
    unusable = {"uring": machine.io_uring_error, "aio": machine.aio_error}
    assert totals.engine == engine or unusable.get(engine), "the engine asked for has served"
    assert totals.kills == KILLS
    assert totals.acknowledged >= KILLS * lane_kill.ACKS_PER_LIFE[0]
    assert totals.verified == KILLS * lane_kill.HOT_BLOCKS
    assert totals.replayed_records > 0, "a kill without a clean close leaves records to replay"
    print(
        f"{engine}, served by {totals.engine}: {totals.kills} kills,"
        f" {totals.acknowledged} writes acknowledged,"
        f" {totals.checked_blocks} blocks decided by recovery"
    )
