"""`make check`: the linters and the unit tests, two processes at a time.

Unit tests that take long are marked `slow` and left out; `--all` (`make check-all`) runs them as
well. Exit status 1 when anything failed.
"""

from __future__ import annotations

import argparse
import sys

from tools.lint import CHECKS, Job, run_jobs
from tools.suite import pytest


def unit_tests(*, with_slow: bool) -> Job:
    """Make the job of the unit tests; it takes longest, so the linters run beside it."""
    chosen = () if with_slow else ("-m", "not slow")
    return Job("unit tests", pytest("tests/unit", "-q", *chosen))


def main() -> int:
    """Run them; see the module's head."""
    parser = argparse.ArgumentParser(description="Run linters and unit tests.")
    parser.add_argument("--all", action="store_true", help="the slow unit tests as well")
    with_slow: bool = parser.parse_args().all
    return 0 if run_jobs("check", [unit_tests(with_slow=with_slow), *CHECKS]) else 1


if __name__ == "__main__":
    sys.exit(main())
