"""Run every linter, two at a time; print one line each, and the output of those that fail.

All of them run even after one has failed: a list of everything to mend is worth more than the first
item. They do not need one another, and the costly ones come first, so that none of them is left
over for the end. A line has the wall time of its job, which the other one makes longer. Exit status
1 when any found something. tools/check.py runs the unit tests beside them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

PROCESSES = 2
"""As many as the smallest machine that this is developed on has cores."""


@dataclass(frozen=True, slots=True)
class Job:
    """A command of the checkout's root, and the name that its line has."""

    name: str
    command: tuple[str, ...]


PYTHON = sys.executable
CHECKS = (
    Job(
        "clippy",
        (
            *("cargo", "clippy", "--quiet", "--release", "--locked", "--workspace"),
            *("--all-targets", "--", "-D", "warnings"),
        ),
    ),
    Job(
        "stubtest",
        (
            *(PYTHON, "-m", "mypy.stubtest", "--mypy-config-file", "tools/stubtest.toml"),
            "pureflash._core",
        ),
    ),
    Job("mypy", ("mypy",)),
    Job("rustfmt", ("cargo", "fmt", "--all", "--check")),
    Job("tidy", (PYTHON, "-m", "tools.tidy")),
    Job("ruff check", ("ruff", "check", "--quiet", ".")),
    Job("ruff format", ("ruff", "format", "--check", "--quiet", ".")),
    Job("crate arrows", (PYTHON, "tools/arrows.py")),
    Job("import-linter", ("lint-imports", "--no-cache")),
    Job("generated errors", (PYTHON, "tools/gen_errors.py", "--check")),
    Job("generated cli page", (PYTHON, "tools/gen_cli.py", "--check")),
)


def run_job(label: str, job: Job) -> bool:
    """Run one job; True when it succeeded. Errors: none, a missing program fails its job."""
    started = time.monotonic()
    try:
        result = subprocess.run(
            job.command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except FileNotFoundError:
        print(f"{label}: {job.name:<18} FAILED: {job.command[0]} is not installed; run tools/setup")
        return False
    verdict = "ok" if result.returncode == 0 else "FAILED"
    line = f"{label}: {job.name:<18} {verdict:<6} {time.monotonic() - started:5.1f} s"
    print(line if result.returncode == 0 else f"{line}\n{result.stdout}", flush=True)
    return result.returncode == 0


def run_jobs(label: str, jobs: Sequence[Job]) -> bool:
    """Run all jobs, in their order, and print how long it took; True when all succeeded."""
    started = time.monotonic()
    with ThreadPoolExecutor(PROCESSES) as pool:
        verdicts = list(pool.map(lambda job: run_job(label, job), jobs))
    seconds = time.monotonic() - started
    failed = verdicts.count(False)
    told = "all ok" if not failed else f"{failed} of {len(verdicts)} FAILED"
    print(f"{label}: {told} in {seconds:.1f} s", flush=True)
    return not failed


if __name__ == "__main__":
    sys.exit(0 if run_jobs("lint", CHECKS) else 1)
