"""Run simulated worlds, seed by seed, on two processes; say what happened and what went wrong.

    python -m pureflash.testing.swarm --seeds 500 --from-seed 1 --refine 10

Theory of operation. A seed decides everything about a world, the strength of each fault included
(swarm testing). `run_seed` runs one to its end and gives a `Result`; every `--refine`-th one is
also traced and judged by the executable specification. `run_seeds` spreads seeds over processes in
small batches and adds up. The command prints progress, how often each fault and each transition
happened, how much time was simulated and how fast, and last the line of figures that the ledger
reads. A violation is printed with its seed, its options and the command that replays it; the exit
status is 1 then. A panic of a machine is a violation too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Final, Protocol

from pureflash import _core
from pureflash.errors import PureFlashError
from pureflash.testing.ledger import Figures
from pureflash.testing.model.replication import RefinementError, Specification

PROCESSES: Final = 2
BATCH_SEEDS: Final = 8
"""Seeds that a process takes at once: little enough to share evenly."""
STEP_EVENTS: Final = 50_000
"""Events between two looks at a world; a traced one is judged that often."""
WORLD_EVENTS_MAX: Final = 20_000_000
"""A world with more events does not end; those of the seeds have about 25,000."""
SHOWN_MAX: Final = 10
"""Violations that are printed in full."""
NANOS: Final = 1e9


class World(Protocol):
    """What `_core.World` offers and this module uses."""

    def step(self, events: int) -> bool:
        """Run at most so many events; False when the world is over."""

    def violation(self) -> str | None:
        """Give the first broken invariant."""

    def options(self) -> str:
        """Give the options in force, as JSON."""

    def counts(self) -> dict[str, int]:
        """Count what has happened."""

    def trace_hash(self) -> str:
        """Hash what has happened."""

    def take_trace(self) -> str:
        """Give the lines since the last call."""


MakeWorld = Callable[[int, str, bool], World]
"""Makes the world of (seed, options, trace)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one seed. `options` are all in force; `violation` is None for a good one."""

    seed: int
    violation: str | None
    options: str
    counts: Mapping[str, int]
    trace_hash: str
    refined_lines: int = 0


@dataclass(slots=True)
class Total:
    """What became of many."""

    seeds: int = 0
    refined: int = 0
    refined_lines: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Take one more into account."""
        self.seeds += 1
        self.refined += result.refined_lines > 0
        self.refined_lines += result.refined_lines
        self.counts.update(result.counts)
        if result.violation is not None:
            self.violations.append(result)

    @property
    def simulated_seconds(self) -> float:
        """Virtual time of all worlds together."""
        return self.counts["sim.nanos"] / NANOS

    def of_kind(self, prefix: str) -> dict[str, int]:
        """Give the counts whose names begin so, without that beginning, in order."""
        names = sorted(name for name in self.counts if name.startswith(prefix))
        return {name.removeprefix(prefix): self.counts[name] for name in names}


def make_world(seed: int, options: str, trace: bool) -> World:
    """Make the real thing."""
    return _core.World(seed, options, trace)


def run_seed(
    seed: int, options: str = "{}", *, refine: bool = False, make: MakeWorld = make_world
) -> Result:
    """Run one world to its end; with `refine` also judge its trace.

    Errors: `PureFlashError` INVALID for options that no world can have.
    """
    world = make(seed, options, refine)
    options_in_force = world.options()
    specification = Specification() if refine else None
    try:
        violation = _run(world, specification)
    except BaseException as panic:
        # PyO3 gives a Rust panic this type, which no `except Exception` may swallow.
        if type(panic).__name__ != "PanicException":
            raise
        return Result(
            seed=seed,
            violation=f"panic: {panic}",
            options=options_in_force,
            counts={},
            trace_hash="",
        )
    return Result(
        seed=seed,
        violation=violation,
        options=options_in_force,
        counts=world.counts(),
        trace_hash=world.trace_hash(),
        refined_lines=specification.line_count if specification else 0,
    )


def _run(world: World, specification: Specification | None) -> str | None:
    """Run it to its end; the first violation, of the world's own checks or the specification."""
    events, goes_on = 0, True
    try:
        while goes_on:
            if events >= WORLD_EVENTS_MAX:
                return f"I23: no end after {events} events"
            goes_on = world.step(STEP_EVENTS)
            events += STEP_EVENTS
            if specification is not None:
                specification.feed(world.take_trace())
        violation = world.violation()
        if specification is not None and violation is None:
            specification.finish()
    except RefinementError as refused:
        return world.violation() or f"refinement: {refused}"
    return violation


def _run_batch(seeds: Sequence[int], options: str, refine: int) -> list[Result]:
    """Run a few, in a process of the pool."""
    return [run_seed(seed, options, refine=refine > 0 and seed % refine == 0) for seed in seeds]


def run_seeds(
    seeds: Sequence[int], options: str = "{}", *, refine: int = 0, processes: int = PROCESSES
) -> Iterator[Result]:
    """Run many, in no order; every seed that `refine` divides is judged too, with 0 none."""
    batches = [seeds[at : at + BATCH_SEEDS] for at in range(0, len(seeds), BATCH_SEEDS)]
    if processes == 1:
        for batch in batches:
            yield from _run_batch(batch, options, refine)
        return
    # Spawned and not forked: nothing of this process, a pool's threads for one, is in the others.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        todo: set[Future[list[Result]]] = {
            pool.submit(_run_batch, batch, options, refine) for batch in batches
        }
        while todo:
            done, todo = wait(todo, return_when=FIRST_COMPLETED)
            for future in done:
                yield from future.result()


def replay_command(result: Result, options: str) -> str:
    """Write the command that shows a violation again; `options` are those that were given."""
    given = "" if options == "{}" else f" --options '{options}'"
    seed = f"--seeds 1 --from-seed {result.seed} --refine 1"
    return f"python -m pureflash.testing.swarm {seed}{given}"


def report(total: Total, seconds: float = 0.0) -> Iterator[str]:
    """Say what happened, as lines."""
    for title, prefix in [
        ("faults", "fault."),
        ("transitions", "transition."),
        ("operations", "op."),
    ]:
        counts = total.of_kind(prefix).items()
        yield f"{title}: {', '.join(f'{name} {count}' for name, count in counts) or 'none'}"
    speed = ""
    if seconds > 0:
        speed = f" in {seconds:.1f} s ({total.simulated_seconds / seconds:.0f} per second)"
    yield (
        f"{total.seeds} worlds, {total.simulated_seconds:.0f} s simulated{speed}, "
        f"{total.counts['events']} events, {total.counts['reply']} replies"
    )
    if total.refined:
        yield f"{total.refined} traces of {total.refined_lines} lines judged by the specification"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=500, help="how many")
    parser.add_argument("--from-seed", type=int, default=1, help="the first")
    parser.add_argument("--refine", type=int, default=0, metavar="K", help="judge every K-th")
    parser.add_argument("--options", default="{}", help="JSON that replaces what the seed chose")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parsed = parser.parse_args(argv)
    if parsed.seeds < 1 or parsed.from_seed < 0 or parsed.refine < 0 or parsed.processes < 1:
        parser.error("numbers of seeds and processes are positive")
    try:
        json.loads(parsed.options)
    except json.JSONDecodeError as cause:
        parser.error(f"--options: {cause}")
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Run a swarm; the exit status."""
    asked = _arguments(argv)
    seeds = range(asked.from_seed, asked.from_seed + asked.seeds)
    total, started = Total(), time.monotonic()
    shown = max(asked.seeds // 10, 1)
    try:
        for result in run_seeds(
            seeds, asked.options, refine=asked.refine, processes=asked.processes
        ):
            total.add(result)
            if result.violation is not None and len(total.violations) <= SHOWN_MAX:
                print(f"seed {result.seed}: {result.violation}")
                print(f"  options: {result.options}")
                print(f"  replay: {replay_command(result, asked.options)}")
            if total.seeds % shown == 0:
                print(f"swarm: {total.seeds} of {asked.seeds} worlds", file=sys.stderr, flush=True)
    except PureFlashError as cause:
        print(f"swarm: {cause}", file=sys.stderr)
        return 2
    print("\n".join(report(total, time.monotonic() - started)))
    if total.violations:
        print(f"{len(total.violations)} of {total.seeds} worlds broke an invariant")
        return 1
    hours = total.simulated_seconds / 3600
    print(Figures(first_seed=seeds.start, seeds=total.seeds, simulated_hours=hours).line())
    return 0


if __name__ == "__main__":
    sys.exit(main())
