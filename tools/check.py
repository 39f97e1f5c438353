"""`make check`: the linters and the unit tests, two processes at a time.

Unit tests that take long are marked `slow` and left out; `--all` (`make check-all`) runs them as
well. The tests are dealt into parts, test by test, since whole files are of very different cost.
Exit status 1 when anything failed.
"""

from __future__ import annotations

import argparse
import sys

from tools.lint import CHECKS, PROCESSES, Job, run_jobs

PARTS = PROCESSES
"""More would even out better, and each costs the collection of all tests once more: the linters
come after them and fill the core that is free first."""


def unit_tests(*, with_slow: bool) -> list[Job]:
    """Make the jobs of the unit tests; each part keeps its result out of the others' cache."""
    chosen = () if with_slow else ("-m", "not slow")
    return [
        Job(
            f"unit tests {part}/{PARTS}",
            (
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen),
                *("--part", f"{part}/{PARTS}", "tests/unit"),
            ),
        )
        for part in range(1, PARTS + 1)
    ]


def main() -> int:
    """Run them; see the module's head."""
    parser = argparse.ArgumentParser(description="Run linters and unit tests.")
    parser.add_argument("--all", action="store_true", help="the slow unit tests as well")
    with_slow: bool = parser.parse_args().all
    return 0 if run_jobs("check", [*unit_tests(with_slow=with_slow), *CHECKS]) else 1


if __name__ == "__main__":
    sys.exit(main())
