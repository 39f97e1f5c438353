"""The ledger of long runs: what has been simulated and crashed, of which core, with which result.

`docs/reference/ledger.md` has one row per chunk. A row is bound to `tools/corehash`, so a change of
a guide voids nothing and a change of the core voids everything; a target is met when the rows *of
one core* add up. Figures are only ever those that a run has printed, as one line of this form,
which `Figures.line` writes and `figures_of` finds:

    figures: first_seed=1000 seeds=500 simulated_hours=3.75

`make deep` appends (tools/deep.py). `python -m pureflash.testing.ledger` sums up, of the present
core and of every other one in the ledger. Everything but `main` is without side effects, except
`append`, which writes one row.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from pathlib import Path

CORE_DIGITS = 16
"""Hexadecimal digits of the core's hash in a row: 64 bits tell any two cores apart."""
RESULT_LENGTH_MAX = 120
"""Characters of a failure in a row; the whole of it is in the run's own output."""
OK = "ok"
COLUMNS = ("Date", "Core", "Kind", "From seed", "Seeds", "States", "Simulated hours", "Result")
LEDGER = Path("docs/reference/ledger.md")

_FIGURES = re.compile(r"figures: ((?:[a-z_]+=[0-9.]+ ?)+)\s*")
_NONE = "-"


class Kind(StrEnum):
    """What kind of run a row tells of."""

    SIMULATOR = "simulator"
    CRASH = "crash explorer"


class LedgerBroken(ValueError):
    """A row of the ledger cannot be read; the text names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a run has printed about itself; None is what its kind does not count."""

    first_seed: int
    seeds: int
    states: int | None = None
    simulated_hours: float | None = None

    def line(self) -> str:
        """Write the line that a run prints, and that `figures_of` reads."""
        words = [f"first_seed={self.first_seed}", f"seeds={self.seeds}"]
        if self.states is not None:
            words.append(f"states={self.states}")
        if self.simulated_hours is not None:
            words.append(f"simulated_hours={self.simulated_hours:.3f}")
        return "figures: " + " ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One chunk. `figures` is None when the run ended before it had printed any."""

    day: date
    core: str
    kind: Kind
    first_seed: int
    figures: Figures | None
    result: str

    @property
    def is_ok(self) -> bool:
        """True when the run was good to its end, so that its figures count."""
        return self.result == OK and self.figures is not None

    def text(self) -> str:
        """Write the row as a line of the table, without line end."""
        found = self.figures
        states = found.states if found else None
        hours = found.simulated_hours if found else None
        cells = (
            self.day.isoformat(),
            self.core,
            self.kind.value,
            str(self.first_seed),
            str(found.seeds) if found else _NONE,
            _NONE if states is None else str(states),
            _NONE if hours is None else f"{hours:.3f}",
            self.result,
        )
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True, slots=True)
class Sum:
    """What the good rows of one core and kind add up to, and how many rows were not good."""

    seeds: int = 0
    states: int = 0
    simulated_hours: float = 0.0
    failures: int = 0
    next_seed: int = 0


def figures_of(output: str) -> Figures | None:
    """Find the last line of figures in what a run has printed; None if there is none."""
    found = None
    for line in output.splitlines():
        if match := _FIGURES.fullmatch(line.strip()):
            found = match[1]
    if found is None:
        return None
    words = dict(word.split("=") for word in found.split())
    try:
        return Figures(
            first_seed=int(words["first_seed"]),
            seeds=int(words["seeds"]),
            states=int(words["states"]) if "states" in words else None,
            simulated_hours=(
                float(words["simulated_hours"]) if "simulated_hours" in words else None
            ),
        )
    except (KeyError, ValueError):
        return None


def failure_of(output: str) -> str | None:
    """Find the first line of a failed run's output that names a seed; None if it has run none."""
    for line in output.splitlines():
        if re.search(r"\bseed \d", line):
            text = f"FAILED: {' '.join(line.split())}".replace("|", "/")
            return text[:RESULT_LENGTH_MAX].rstrip()
    return None


def short_core(core_hash: str) -> str:
    """Shorten the output of tools/corehash to what a row holds."""
    if not re.fullmatch(r"[0-9a-f]{64}\s*", core_hash):
        raise LedgerBroken(f"not a hash of a core: {core_hash!r}")
    return core_hash[:CORE_DIGITS]


def parse(text: str) -> list[Row]:
    """Read every row of a ledger. `LedgerBroken` names the first line that is not one."""
    lines = text.splitlines()
    head = f"| {' | '.join(COLUMNS)} |"
    if head not in lines:
        raise LedgerBroken(f"no line {head!r}")
    start = lines.index(head) + 2
    return [_row(number + 1, lines[number]) for number in range(start, len(lines))]


def _row(number: int, line: str) -> Row:
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    try:
        day, core, kind, first_seed, seeds, states, hours, result = cells
        figures = None
        if seeds != _NONE:
            figures = Figures(
                first_seed=int(first_seed),
                seeds=int(seeds),
                states=None if states == _NONE else int(states),
                simulated_hours=None if hours == _NONE else float(hours),
            )
        row = Row(
            day=date.fromisoformat(day),
            core=core,
            kind=Kind(kind),
            first_seed=int(first_seed),
            figures=figures,
            result=result,
        )
    except ValueError as problem:
        raise LedgerBroken(f"line {number}: {problem}: {line}") from problem
    if not re.fullmatch(rf"[0-9a-f]{{{CORE_DIGITS}}}", core) or not result:
        raise LedgerBroken(f"line {number}: no core or no result: {line}")
    return row


def append(path: Path, row: Row) -> None:
    """Add one row at the end, or nothing: `LedgerBroken` when what is there cannot be read."""
    text = path.read_text()
    parse(text)
    parse(f"{text.rstrip()}\n{row.text()}\n")
    with path.open("a") as file:
        file.write(("" if text.endswith("\n") else "\n") + row.text() + "\n")


def add_up(rows: Sequence[Row], core: str, kind: Kind) -> Sum:
    """Sum the rows of one core and kind; a seed counts once, whoever ran it again.

    A row that overlaps one that was counted is left out as a whole, because what its other seeds
    brought is not known. `next_seed` is one behind the last seed that was good.
    """
    of_core = [row for row in rows if row.core == core and row.kind is kind]
    counted: list[range] = []
    seeds, states, hours = 0, 0, 0.0
    for row in of_core:
        figures = row.figures
        if figures is None or not row.is_ok:
            continue
        span = range(figures.first_seed, figures.first_seed + figures.seeds)
        if any(span.start < other.stop and other.start < span.stop for other in counted):
            continue
        counted.append(span)
        seeds += figures.seeds
        states += figures.states or 0
        hours += figures.simulated_hours or 0.0
    return Sum(
        seeds=seeds,
        states=states,
        simulated_hours=hours,
        failures=sum(not row.is_ok for row in of_core),
        next_seed=max((span.stop for span in counted), default=0),
    )


def report(rows: Sequence[Row], present: str) -> str:
    """Say what the ledger adds up to: the present core first, then the others as they appear."""
    cores = list(dict.fromkeys([present, *(row.core for row in rows)]))
    lines = []
    for core in cores:
        lines.append(f"core {core}{' (this checkout)' if core == present else ''}")
        for kind in Kind:
            total = add_up(rows, core, kind)
            lines.append(
                f"  {kind.value:<15} {total.seeds} seeds, {total.states} states,"
                f" {total.simulated_hours:.3f} simulated hours, {total.failures} failed chunks"
            )
    return "\n".join(lines)


def present_core(root: Path) -> str:
    """Ask tools/corehash of the checkout at `root` for its core, as rows name it."""
    command = [sys.executable, str(root / "tools/corehash"), str(root)]
    return short_core(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> int:
    """Print what the ledger of a checkout adds up to."""
    parser = argparse.ArgumentParser(description="Sum up the ledger of long runs.")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: here)")
    root: Path = parser.parse_args().root
    print(report(parse((root / LEDGER).read_text()), present_core(root)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
