"""Run the steps of `make test` after setup, and sum them up: time, budget, tests, verdict.

Called by tools/test, which has set the programs up and tells how long that took. Output streams
through untouched; the summary lines of cargo and pytest are collected on the way and repeated at
the very end, so that the last lines of a log say what was run. A ring whose folder does not exist
yet is named as such. Every step runs, also after a failed one, except that nothing runs after a
failed build. Exit status 1 when any step failed; pytest itself fails a folder without tests.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools import own_network
from tools.lint import PROCESSES

CARGO_TEST = ("cargo", "test", "--release", "--locked")
WORKSPACE = ("--workspace", "--exclude", "pureflash-py")  # the extension has no tests of its own
MUTANTS = (
    *("--package", "pureflash-lane"),
    *("--package", "pureflash-shard"),
    *("--package", "pureflash-sim"),
    *("--features", "mutants", "--tests"),
)
# With the seeded bugs compiled in, what matters is that each is caught; the rest ran before. The
# tables that the tests print (crash explorer, machines, worlds) belong into the log.
SEEDED_BUGS = ("every_seeded", "--", "--nocapture")


TWO = ("-n", str(PROCESSES))
ONE = ("-n", "0")
TWO_WITH_OWN_NETWORKS = (
    "--tx",
    f"{PROCESSES}*popen//python={shlex.join(own_network.command(sys.executable))}",
)
"""A cluster that is stopped gives its ports back, and one that another test starts meanwhile would
take them, so each process has its own loopback."""


def pytest(folder: str, *options: str, by: tuple[str, ...] = TWO) -> tuple[str, ...]:
    """Make the command that runs the tests below a folder, by the processes of these options.

    A process without tests takes over half of what another one still has, because tests are of very
    different cost.
    """
    return (
        *(sys.executable, "-m", "pytest", "--color=no", *by),
        *("--dist", "worksteal", "--durations=12", *options, folder),
    )


_CARGO_SUMMARY = re.compile(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored")
_PYTEST_SUMMARY = re.compile(r"=* ?((?:\d+ \w+(?:, )?)+ in [\d.]+s.*?) ?=*")


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the summary; `folder` is what the step tests, None when it always runs."""

    name: str
    budget_minutes: int
    commands: tuple[tuple[str, ...], ...]
    folder: Path | None = None
    stops_on_failure: bool = False


def steps(*, has_networks: bool) -> tuple[Step, ...]:
    """List the steps; without networks of their own tests of clusters run one after another."""
    by = TWO_WITH_OWN_NETWORKS if has_networks else ONE
    return (
        Step(
            "build",
            4,
            ((*CARGO_TEST, *WORKSPACE, "--no-run"), (*CARGO_TEST, *MUTANTS, "--no-run")),
            stops_on_failure=True,
        ),
        Step("lint", 1, ((sys.executable, "tools/lint.py"),)),
        Step(
            "ring 0: cargo", 2, ((*CARGO_TEST, *WORKSPACE), (*CARGO_TEST, *MUTANTS, *SEEDED_BUGS))
        ),
        _of_pytest("ring 0: python", 2, "tests/unit"),
        _of_pytest("ring 0: API", 1, "tests/api"),
        _of_pytest("ring 1: simulated", 2, "tests/scenario"),
        _of_pytest("ring 2: processes", 10, "tests/cluster", by),
        _of_pytest("ring 3: foreign", 3, "tests/conformance", by),
    )


def _of_pytest(name: str, minutes: int, folder: str, by: tuple[str, ...] = TWO) -> Step:
    return Step(name, minutes, (pytest(folder, by=by),), Path(folder))


@dataclass(slots=True)
class Tally:
    """What the runners said about themselves."""

    cargo_passed: int = 0
    cargo_failed: int = 0
    cargo_ignored: int = 0
    pytest_lines: list[str] = field(default_factory=list)

    def read(self, line: str) -> None:
        """Take one line of output into account; most lines say nothing."""
        if match := _CARGO_SUMMARY.search(line):
            self.cargo_passed += int(match[1])
            self.cargo_failed += int(match[2])
            self.cargo_ignored += int(match[3])
        elif match := _PYTEST_SUMMARY.fullmatch(line.rstrip()):
            self.pytest_lines.append(match[1])


def run_step(step: Step, tally: Tally) -> bool:
    """Run the commands of one step, passing their output on; True when all succeeded."""
    print(f"\n=== {step.name} ===", flush=True)
    succeeded = True
    for command in step.commands:
        print(f"$ {' '.join(command)}", flush=True)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None, "asked for above"
            for line in process.stdout:
                print(line, end="", flush=True)
                tally.read(line)
        succeeded = succeeded and process.returncode == 0
    return succeeded


def summary(rows: Sequence[tuple[str, str, float | None, int]], tally: Tally) -> str:
    """Lay out the closing table; a row is (step, verdict, seconds, budget in minutes)."""
    lines = ["", f"{'step':<18} {'verdict':<12} {'time':>8} {'budget':>8}"]
    for name, verdict, seconds, budget in rows:
        shown = "-" if seconds is None else f"{seconds:.1f} s"
        lines.append(f"{name:<18} {verdict:<12} {shown:>8} {budget * 60:>6} s")
    total = sum(seconds for _, _, seconds, _ in rows if seconds is not None)
    lines.append(f"{'all':<18} {'':<12} {total:>6.1f} s")
    lines.append("")
    lines.append(
        f"cargo: {tally.cargo_passed} passed, {tally.cargo_failed} failed,"
        f" {tally.cargo_ignored} ignored"
    )
    lines.extend(tally.pytest_lines)
    return "\n".join(lines)


def main() -> int:
    """Run the suite; see the module's head."""
    parser = argparse.ArgumentParser(description="Run the steps of make test after setup.")
    parser.add_argument("--setup-seconds", type=float, required=True)
    setup_seconds: float = parser.parse_args().setup_seconds

    rows: list[tuple[str, str, float | None, int]] = [("setup", "ok", setup_seconds, 3)]
    tally = Tally()
    has_networks = own_network.is_possible()
    if not has_networks:
        print("no network namespaces here: tests of whole clusters run one after another")
    for step in steps(has_networks=has_networks):
        if step.folder is not None and not step.folder.is_dir():
            rows.append((step.name, "not written", None, step.budget_minutes))
            continue
        started = time.monotonic()
        succeeded = run_step(step, tally)
        seconds = time.monotonic() - started
        rows.append((step.name, "ok" if succeeded else "FAILED", seconds, step.budget_minutes))
        if step.stops_on_failure and not succeeded:
            break
    print(summary(rows, tally), flush=True)
    return 1 if any(verdict == "FAILED" for _, verdict, _, _ in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
