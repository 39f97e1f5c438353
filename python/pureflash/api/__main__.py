"""`python -m pureflash.api --config FILE`: the conductor process (`pf conductor run`)."""

from __future__ import annotations

import sys

from pureflash.process.entry import run_process


def main() -> int:
    """Run until TERM; gives the exit status."""
    from pureflash.api.server import run_conductor

    return run_process("conductor", run_conductor, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
