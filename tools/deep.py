"""Run the simulator and the crash explorer in turns; enter each chunk in the ledger.

Theory of operation. A chunk is a range of seeds that goes on behind the last good one of this core
and kind in docs/reference/ledger.md, so runs can be stopped and taken up again, here or elsewhere.
Its size follows from the speed of the last chunk, so that a chunk takes about `CHUNK_SECONDS` and
the last one ends with the time that was asked for. Its figures are those that the run printed
(`pureflash.testing.ledger`). A chunk in which a seed failed is entered too, and ends everything
with exit status 1: what comes after a bug is not worth the time. What did not run (it does not
build, it names no seed and prints no figures) is no evidence of anything: not entered, exit status
2. Nor is a chunk during which the core has changed, because nobody knows what it ran.

Called by tools/deep, which has built everything. Costs what it is given.
"""

from __future__ import annotations

import argparse
import os
import signal
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
LEFT_SECONDS_MIN = 10
"""With less time left no further chunk is begun; the first one always is."""
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


class NotRun(Exception):
    """A chunk is neither good nor did a seed of it fail; the text says what it is."""


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
    return run_command(command, environment, seconds_max=CHUNK_SECONDS_MAX, first_seed=first_seed)


def run_command(
    command: Sequence[str], environment: Mapping[str, str], *, seconds_max: float, first_seed: int
) -> Outcome:
    """Run a command at the root of the checkout; kill it and its children after `seconds_max`."""
    started = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own: cargo's child holds the pipe open
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds_max)
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += f"\nseed {first_seed} or a later one: no end within {seconds_max:g} s\n"
            status = 1
    return Outcome(output, status, time.monotonic() - started)


def row_of(outcome: Outcome, *, day: date, cores: tuple[str, str], kind: Kind, asked: range) -> Row:
    """Make the row of a chunk, or say why it has none; `cores` is the core before and after it.

    Errors: `NotRun` unless one core ran the very seeds that were asked for, or a seed failed.
    """
    core, core_after = cores
    if core != core_after:
        raise NotRun("the core has changed meanwhile")
    figures, result = ledger.figures_of(outcome.output), ledger.OK
    if outcome.status != 0:
        failure = ledger.failure_of(outcome.output)
        if failure is None:
            raise NotRun(f"exit status {outcome.status}, and no seed is named")
        figures, result = None, failure
    elif figures is None:
        raise NotRun("it printed no figures")
    elif (figures.first_seed, figures.seeds) != (asked.start, len(asked)):
        raise NotRun(f"it ran {figures.seeds} seeds from {figures.first_seed}")
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
    while (left := end - clock()) > LEFT_SECONDS_MIN or not rates:
        kind = kinds[turn % len(kinds)]
        turn += 1
        first = ledger.add_up(ledger.parse(path.read_text()), own, kind).next_seed
        asked = range(first, first + next_size(kind, rates.get(kind), left))
        print(f"deep: {kind.value}, seeds {asked.start} to {asked.stop - 1}", flush=True)
        outcome = run(kind, asked.start, len(asked))
        try:
            row = row_of(outcome, day=today(), cores=(own, core()), kind=kind, asked=asked)
        except NotRun as problem:
            print(f"{outcome.output}\ndeep: not entered: {problem}", file=sys.stderr)
            return 2
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
