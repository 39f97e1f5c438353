"""Make a failing world small: fewer faults, less time, less work, and the same invariant broken.

    python -m pureflash.testing.shrink 33

Theory of operation. A change of options changes every later draw of the seed, so nothing can be cut
out of a world; but a smaller world often fails alike. This tries smaller ones, one after another,
and keeps each that still breaks the same invariant: first it leaves out faults, in halves, then in
smaller parts (delta debugging), then it bisects the length of the phase with faults, then it
lowers what else can be lowered. It ends when nothing smaller fails, or after `--tries` worlds, and
prints the options and the command that replays them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pureflash.errors import CallerError
from pureflash.testing.swarm import MakeWorld, Result, make_world, replay_command, run_seed

TRIES: Final = 400
Options = Mapping[str, int]
Fails = Callable[[Options], bool]

WORKLOAD: Final = frozenset(
    {
        *("stores", "rf", "min_write", "shards", "regions", "clients", "hot_blocks", "ops_per_s"),
        *("depth", "write_percent", "zero_percent", "safety_ms", "liveness_ms"),
        *("conductorless_ms", "plp", "atomic_blocks", "journal_pages", "disk_us", "delay_us"),
        *("restart_ms", "pause_ms", "mutant"),
    }
)
"""Options that are no faults; every other one is, and 0 leaves it out."""
LOWEST: Final = {
    "shards": 1,
    "clients": 1,
    "depth": 1,
    "hot_blocks": 1,
    "regions": 1,
    "conductorless_ms": 0,
    "zero_percent": 0,
    "disk_us": 100,
    "delay_us": 100,
}
"""What else is lowered, and how far."""
SAFETY_MS_MIN: Final = 100


def invariant(violation: str | None) -> str | None:
    """Give the name of what was broken: "I4" of "I4: at 14 ns ..."."""
    return None if violation is None else violation.split(":", 1)[0]


def faults_of(options: Options) -> list[str]:
    """Name the faults that are on."""
    return [name for name, value in options.items() if name not in WORKLOAD and value != 0]


def without(options: Options, names: Sequence[str]) -> Options:
    """Leave faults out."""
    return {**options, **dict.fromkeys(names, 0)}


def drop_faults(options: Options, fails: Fails) -> Options:
    """Leave out as many faults as possible, in parts that get smaller."""
    parts = 2
    while faults := faults_of(options):
        size = max(len(faults) // parts, 1)
        chunks = [faults[at : at + size] for at in range(0, len(faults), size)]
        smaller = (without(options, chunk) for chunk in chunks)
        found = next((tried for tried in smaller if fails(tried)), None)
        if found is not None:
            options, parts = found, max(parts - 1, 2)
        elif size == 1:
            break
        else:
            parts = min(parts * 2, len(faults))
    return options


def lower(options: Options, name: str, least: int, fails: Fails) -> Options:
    """Bisect one option down to the least value that still fails, as far as that is monotone."""
    lowest = {**options, name: least}
    if fails(lowest):
        return lowest
    good, bad = least, options[name]
    while bad - good > 1:
        middle = (good + bad) // 2
        tried = {**options, name: middle}
        if fails(tried):
            options, bad = tried, middle
        else:
            good = middle
    return options


def shrink(
    seed: int,
    options: str = "{}",
    *,
    tries: int = TRIES,
    refine: bool = False,
    make: MakeWorld = make_world,
) -> Result | None:
    """Give the smallest world found that breaks what the given one breaks; None if it does not.

    `options` of the result are all in force. With `refine` traces are judged as well.
    """
    first = run_seed(seed, options, refine=refine, make=make)
    if first.violation is None:
        return None
    broken, best, left = invariant(first.violation), first, tries

    def fails(tried: Options) -> bool:
        nonlocal best, left
        if left == 0:
            return False
        left -= 1
        try:
            result = run_seed(seed, json.dumps(dict(tried)), refine=refine, make=make)
        except CallerError:
            return False  # no world can have these together
        if invariant(result.violation) != broken:
            return False
        best = result
        return True

    found: Options = json.loads(first.options)
    found = drop_faults(found, fails)
    found = lower(found, "safety_ms", SAFETY_MS_MIN, fails)
    for name, least in LOWEST.items():
        if found.get(name, least) > least:
            found = lower(found, name, least, fails)
    drop_faults(found, fails)
    return best


def main(argv: Sequence[str] | None = None) -> int:
    """Shrink a seed; the exit status is 0 when it failed, and so could be shrunk."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("seed", type=int)
    parser.add_argument("--options", default="{}", help="JSON that replaces what the seed chose")
    parser.add_argument("--tries", type=int, default=TRIES, help="worlds to try at most")
    parser.add_argument("--refine", action="store_true", help="judge traces as well")
    asked = parser.parse_args(argv)
    found = shrink(asked.seed, asked.options, tries=asked.tries, refine=asked.refine)
    if found is None:
        print(f"seed {asked.seed} breaks nothing", file=sys.stderr)
        return 1
    options = json.loads(found.options)
    print(f"seed {found.seed}: {found.violation}")
    print(f"  faults: {', '.join(faults_of(options)) or 'none'}; {options['safety_ms']} ms")
    print(f"  replay: {replay_command(found, found.options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
