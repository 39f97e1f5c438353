"""Worlds of many seeds hold every invariant, and every fault is really there."""

import pytest
from tests.scenario.conftest import SEEDS, describe, fixed_seeds, run_good

from pureflash.testing.swarm import Total, report, run_seeds

REFINED = 10
"""Every tenth world is also judged by the executable specification."""
FAULTS = (
    *(
        "ambush",
        "client",
        "conductor",
        "connection",
        "crash",
        "crash_all",
        "crash_in_recovery",
        "demote",
        "drop",
        "duplicate",
    ),
    *("eio_read", "eio_write", "eio_write_alone", "flap", "frame_hold", "long_pause"),
    *(
        "lose_unflushed",
        "partition",
        "partition_begins",
        "pause",
        "rot",
        "slow_disk",
        "slow_message",
        "storm",
        "stuck_disk",
        "torn",
    ),
)
TRANSITIONS = ("T1", "T2", "T3", "T4", "T6", "T8")
OPERATIONS = ("flush", "read", "write", "zero")
COUNT_MIN = 100
HELPED = 40
"""Seeds in which pages are torn and completed writes lost: the swarm alone has too few of these."""
HELPED_FROM = 21_000
HELP = (
    '{"torn": 1, "lose_unflushed": 1, "atomic_blocks": 0, "plp": 0, "disk_us": 5000, '
    '"ops_per_s": 40, "crash_every_ms": 1000, "crash_all_every_ms": 5000}'
)
ALONE = 60
"""Seeds in which the only replica's disk has bad slots."""
ALONE_FROM = 22_000
ALONE_OPTIONS = '{"stores": 1, "rf": 1, "min_write": 1, "crash_every_ms": 3000, "eio_write": 20}'


@pytest.mark.timeout(600)
def test_worlds_hold_every_invariant_and_have_every_fault(
    capsys: pytest.CaptureFixture[str],
) -> None:
    total = Total()
    broken = []
    for seeds, options in [
        (range(1, SEEDS + 1), "{}"),
        (range(HELPED_FROM, HELPED_FROM + HELPED), HELP),
        (range(ALONE_FROM, ALONE_FROM + ALONE), ALONE_OPTIONS),
    ]:
        for result in run_seeds(seeds, options, refine=REFINED):
            total.add(result)
            if result.violation is not None:
                broken.append(describe(result, options))
    with capsys.disabled():
        print("", *report(total), sep="\n  ")
    assert not broken, "\n".join(broken[:5])
    assert total.seeds == SEEDS + HELPED + ALONE
    assert total.refined == sum(count // REFINED for count in (SEEDS, HELPED, ALONE))
    expected = min(COUNT_MIN, SEEDS // 5)
    for prefix, names in [
        ("fault.", FAULTS),
        ("transition.", TRANSITIONS),
        ("op.", OPERATIONS),
    ]:
        counts = total.of_kind(prefix)
        rare = {name: counts.get(name, 0) for name in names if counts.get(name, 0) < expected}
        assert not rare, f"fewer than {expected} {prefix}: {rare}"
    unknown = set(total.of_kind("fault.")) - set(FAULTS)
    assert not unknown, f"faults that nobody expects {COUNT_MIN} of: {unknown}"


@pytest.mark.parametrize(("seed", "options"), fixed_seeds())
def test_a_world_that_once_showed_a_bug_is_good(seed: int, options: str) -> None:
    run_good(seed, options)
