"""Worlds with chosen faults: what each is about is seen to happen, and nothing else goes wrong.

Every fault that a scenario does not name is off. Each runs with a few seeds, judged by the
executable specification as well.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Final, NamedTuple

import pytest
from tests.scenario.conftest import run_good

from pureflash import _core
from pureflash.errors import CallerError, Code
from pureflash.testing.shrink import WORKLOAD

SEEDS: Final = range(9_000, 9_006)
CALM: Final = {name: 0 for name in json.loads(_core.World(1).options()) if name not in WORKLOAD}
CALM_WORK: Final = {"disk_us": 100, "delay_us": 100, "restart_ms": 500, "ops_per_s": 20}


class Scenario(NamedTuple):
    """Options beside calm ones, and counts that have to be there or must not."""

    name: str
    options: dict[str, int]
    happens: tuple[str, ...]
    never: tuple[str, ...] = ()


SCENARIOS = (
    Scenario(
        "nothing goes wrong",
        {},
        ("reply", "op.write", "op.read"),
        ("reply.error", "transition.T1", "transition.T2", "transition.T6", "fault.crash"),
    ),
    Scenario(
        "one store after another is killed under load",
        {"crash_every_ms": 2_000, "ops_per_s": 40},
        ("fault.crash", "transition.T2", "transition.T1", "transition.T3", "transition.T4"),
        ("fault.crash_all", "fault.drop"),
    ),
    Scenario(
        "the power fails, and what was not flushed is gone",
        {
            "crash_all_every_ms": 4_000,
            "lose_unflushed": 1,
            "plp": 0,
            "disk_us": 5_000,
            "ops_per_s": 100,
            "clients": 4,
        },
        ("fault.crash_all", "transition.T6", "fault.lose_unflushed"),
        ("fault.drop",),
    ),
    Scenario(
        "machines fail alone in the middle of writes, and pages are torn",
        {
            "crash_every_ms": 1_000,
            "lose_unflushed": 1,
            "torn": 1,
            "atomic_blocks": 0,
            "disk_us": 5_000,
            "ops_per_s": 40,
        },
        ("fault.torn", "fault.lose_unflushed", "transition.T4"),
        ("fault.crash_all",),
    ),
    Scenario(
        "a store is killed in its recovery, again and again",
        {"crash_every_ms": 3_000, "crash_in_recovery": 4_000, "storm_percent": 50},
        ("fault.crash_in_recovery", "fault.storm", "transition.T4"),
        ("fault.crash_all",),
    ),
    Scenario(
        "links are cut in one direction only",
        {"partition_every_ms": 1_500, "asymmetric_percent": 100},
        ("fault.partition_begins", "transition.T1"),
        ("fault.crash", "transition.T6"),
    ),
    Scenario(
        "one store alone reaches both sides",
        {"partition_every_ms": 1_500, "bridge_percent": 100},
        ("fault.partition_begins", "transition.T1"),
        ("fault.crash",),
    ),
    Scenario(
        "stores sleep longer than every lease, with clocks ten percent off",
        {"pause_every_ms": 1_500, "long_pause_percent": 100, "clock_permille": 100},
        ("fault.long_pause", "transition.T2"),
        ("fault.crash",),
    ),
    Scenario(
        "messages are lost, doubled, late and out of order",
        {"drop": 1_000, "duplicate": 1_000, "slow_message": 200, "reorder": 1},
        ("fault.drop", "fault.duplicate", "fault.slow_message", "op.write"),
        ("fault.crash", "fault.partition"),
    ),
    Scenario(
        "the conductor comes and goes while stores are killed",
        {"conductor_every_ms": 2_000, "crash_every_ms": 3_000},
        ("fault.conductor", "fault.crash", "transition.T4"),
    ),
    Scenario(
        "clients lose their connections and frames are held up",
        {"connection_every_ms": 500, "frame_hold": 100},
        ("fault.connection", "fault.frame_hold"),
        ("fault.crash", "transition.T2"),
    ),
    Scenario(
        "disks are slow, stuck and refuse to read and write",
        {
            "eio_read": 50,
            "eio_write": 10,
            "slow_disk_every_ms": 3_000,
            "stuck_disk_every_ms": 3_000,
        },
        ("fault.eio_read", "fault.eio_write", "fault.slow_disk", "fault.stuck_disk"),
        ("fault.crash_all", "fault.partition"),
    ),
    Scenario(
        "members that are well are left out, as if their disks were slow, and come back",
        {"demote_every_ms": 500, "crash_every_ms": 4_000, "ops_per_s": 40},
        ("fault.demote", "transition.T1", "transition.T3", "transition.T4"),
        ("fault.partition", "transition.T6"),
    ),
    Scenario(
        "a shard with one replica on a disk with bad slots",
        {"stores": 1, "rf": 1, "min_write": 1, "crash_every_ms": 3_000, "eio_write": 20},
        ("fault.eio_write_alone", "relocated", "op.write"),
        ("fault.eio_write", "transition.T2", "transition.T4"),
    ),
    Scenario(
        "a shard with one replica and power failures",
        {"stores": 1, "rf": 1, "min_write": 1, "crash_all_every_ms": 4_000, "torn": 1},
        ("fault.crash_all", "transition.T6", "op.write"),
        ("transition.T2", "transition.T4"),
    ),
    Scenario(
        "five stores, and a member that stays away is replaced",
        {"stores": 5, "crash_every_ms": 1_500, "restart_ms": 4_000},
        ("fault.crash", "transition.T3", "transition.T4"),
    ),
)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_scenario(scenario: Scenario) -> None:
    counts: Counter[str] = Counter()
    for seed in SEEDS:
        counts.update(run_good(seed, CALM | CALM_WORK | scenario.options).counts)
    missing = [name for name in scenario.happens if counts[name] == 0]
    assert not missing, counts
    unwanted = [name for name in scenario.never if counts[name] != 0]
    assert not unwanted, counts


@pytest.mark.parametrize("options", ['{"dorp": 1}', '{"stores": 9}', "[]", '{"mutant": 1}'])
def test_options_that_no_world_has_are_refused(options: str) -> None:
    with pytest.raises(CallerError) as caught:
        _core.World(1, options)
    assert caught.value.code is Code.INVALID
