"""The same seed gives the same world: everywhere, always, watched or not (I28)."""

import os
import subprocess
import sys

from pureflash import _core
from pureflash.testing.swarm import run_seed

SEED = 11
TIMES = 20
PRINT_HASH = (
    "from pureflash.testing.swarm import run_seed; "
    f"result = run_seed({SEED}); print(result.trace_hash, result.violation)"
)


def test_the_same_seed_gives_the_same_trace_twenty_times() -> None:
    hashes = {run_seed(SEED).trace_hash for _ in range(TIMES)}
    assert len(hashes) == 1, hashes
    (found,) = hashes
    assert len(found) == 32
    assert found != run_seed(SEED + 1).trace_hash


def test_watching_a_world_does_not_change_it() -> None:
    assert run_seed(SEED, refine=True).trace_hash == run_seed(SEED).trace_hash


def test_steps_of_any_size_give_the_same_world() -> None:
    whole = _core.World(SEED)
    whole.run()
    small = _core.World(SEED)
    while small.step(7):
        pass
    assert small.trace_hash() == whole.trace_hash()
    assert small.counts() == whole.counts()


def test_another_process_with_another_hash_seed_gives_the_same_world() -> None:
    found = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            (sys.executable, "-c", PRINT_HASH),
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
        )
        found.add(done.stdout.strip())
    here = run_seed(SEED)
    assert found == {f"{here.trace_hash} {here.violation}"}


def test_the_trace_is_given_once_and_only_if_asked_for() -> None:
    silent = _core.World(SEED)
    silent.step(10_000)
    assert silent.take_trace() == ""
    told = _core.World(SEED, "{}", True)
    told.step(10_000)
    assert told.take_trace().startswith('{"t":0,"k":"')
    assert told.take_trace() == ""
    assert told.trace_hash() == silent.trace_hash()
