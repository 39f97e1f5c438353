"""Run the simulator and the crash explorer in turns; enter each chunk in the ledger.

Theory of operation. A chunk is a range of seeds that goes on behind the last good one of this core
and kind in docs/reference/ledger.md, so runs can be stopped and taken up again, here or elsewhere.
Its size follows from the speed of the last chunk, so that a chunk takes about `CHUNK_SECONDS` and
the last one ends with the time that was asked for. Its figures are those that the run printed
(`pureflash.testing.ledger`); a run that prints none has failed. A failed chunk is entered too, and
ends everything with exit status 1: what comes after a bug is not worth the time. If the core
changes meanwhile the chunk is not entered, because nobody knows what it ran.

Called by tools/deep, which has built everything. Costs what it is given.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from pureflash.testing import ledger
from pureflash.testing.ledger import Kind, Row

ROOT = Path(__file__).resolve().parents[1]
CHUNK_SECONDS = 300
"""What a chunk should take: little enough to lose, long enough for start-up not to matter."""
CHUNK_SECONDS_MAX = 3600
"""A chunk that takes this long hangs."""
SEEDS_MIN = 10
"""Fewer seeds are not worth a row."""
FIRST_SEEDS: Mapping[Kind, int] = {Kind.SIMULATOR: 100, Kind.CRASH: 4000}
"""Size of the first chunk, whose speed is not known; each takes a minute or so."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run: all that it printed, its exit status, and its time."""

    output: str
    status: int
    seconds: float


Runner = Callable[[Kind, int, int], Outcome]
"""Runs a chunk: kind, first seed, seeds."""


def command_of(kind: Kind, first_seed: int, seeds: int) -> tuple[Sequence[str], dict[str, str]]:
    """Give the command of a chunk, and what it finds in its environment."""
    match kind:
        case Kind.SIMULATOR:
            swarm = (sys.executable, "-m", "pureflash.testing.swarm")
            return (*swarm, "--seeds", str(seeds), "--from-seed", str(first_seed)), {}
        case Kind.CRASH:
            cargo = ("cargo", "test", "--release", "--locked", "--package", "pureflash-lane")
            which = ("--test", "crash", "random_lives", "--", "--nocapture")
            return (*cargo, *which), {
                "PF_CRASH_SEED": str(first_seed),
                "PF_CRASH_TRIALS": str(seeds),
            }


def run_chunk(kind: Kind, first_seed: int, seeds: int) -> Outcome:
    """Run one chunk to its end, or until it is clear that it hangs."""
    command, environment = command_of(kind, first_seed, seeds)
    started = time.monotonic()
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=CHUNK_SECONDS_MAX,
        )
        output, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired:
        output, status = f"no end within {CHUNK_SECONDS_MAX} s", 1
    return Outcome(output, status, time.monotonic() - started)


def row_of(outcome: Outcome, *, day: date, core: str, kind: Kind, asked: range) -> Row:
    """Make the row of a chunk. It is good only if it ran the very seeds that it was asked to."""
    figures = ledger.figures_of(outcome.output)
    if outcome.status != 0:
        result = ledger.failure_of(outcome.output)
        figures = None
    elif figures is None:
        result = "FAILED: it printed no figures"
    elif (figures.first_seed, figures.seeds) != (asked.start, len(asked)):
        result = f"FAILED: it ran {figures.seeds} seeds from {figures.first_seed}"
        figures = None
    else:
        result = ledger.OK
    return Row(
        day=day, core=core, kind=kind, first_seed=asked.start, figures=figures, result=result
    )


def next_size(kind: Kind, rate: float | None, seconds_left: float) -> int:
    """Choose how many seeds the next chunk has; `rate` is seeds per second of the last one."""
    if rate is None:
        return FIRST_SEEDS[kind]
    return max(int(rate * min(CHUNK_SECONDS, seconds_left)), SEEDS_MIN)


def go_deep(
    path: Path,
    kinds: Sequence[Kind],
    *,
    seconds: float,
    core: Callable[[], str],
    run: Runner = run_chunk,
    clock: Callable[[], float] = time.monotonic,
    today: Callable[[], date] = lambda: datetime.now(UTC).date(),
) -> int:
    """Run chunks of `kinds` in turns until the time is up; the exit status."""
    end = clock() + seconds
    own = core()
    rates: dict[Kind, float] = {}
    turn = 0
    while (left := end - clock()) > 0:
        kind = kinds[turn % len(kinds)]
        turn += 1
        first = ledger.add_up(ledger.parse(path.read_text()), own, kind).next_seed
        asked = range(first, first + next_size(kind, rates.get(kind), left))
        print(f"deep: {kind.value}, seeds {asked.start} to {asked.stop - 1}", flush=True)
        outcome = run(kind, asked.start, len(asked))
        if core() != own:
            print("deep: the core has changed meanwhile: not entered", file=sys.stderr)
            return 1
        row = row_of(outcome, day=today(), core=own, kind=kind, asked=asked)
        ledger.append(path, row)
        print(row.text(), flush=True)
        if not row.is_ok:
            print(outcome.output, flush=True)
            return 1
        rates[kind] = len(asked) / max(outcome.seconds, 0.001)
    print(ledger.report(ledger.parse(path.read_text()), own))
    return 0


def main() -> int:
    """Run; see the module's head."""
    parser = argparse.ArgumentParser(description="Long runs into the ledger.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument(
        "--kind", action="append", choices=[kind.value for kind in Kind], help="default: all"
    )
    arguments = parser.parse_args()
    kinds = [Kind(kind) for kind in arguments.kind or list(Kind)]
    return go_deep(
        ROOT / ledger.LEDGER,
        kinds,
        seconds=60 * arguments.minutes,
        core=lambda: ledger.present_core(ROOT),
    )


if __name__ == "__main__":
    sys.exit(main())
