"""Ring 2: a writer killed with SIGKILL loses nothing that was acknowledged, on each engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pureflash.testing import lane_kill

KILLS = 10


@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_acknowledged_writes_survive_kill_9(tmp_path: Path, engine: str) -> None:
    totals = lane_kill.run(tmp_path, kills=KILLS, engine=engine, seed=7, progress=False)
    assert totals.kills == KILLS
    assert totals.acknowledged >= KILLS * lane_kill.ACKS_PER_LIFE[0]
    assert totals.verified == KILLS * lane_kill.HOT_BLOCKS
    assert totals.replayed_records > 0, "a kill without a clean close leaves records to replay"
    print(
        f"{engine}: {totals.kills} kills, {totals.acknowledged} writes acknowledged,"
        f" {totals.checked_blocks} blocks decided by recovery"
    )
