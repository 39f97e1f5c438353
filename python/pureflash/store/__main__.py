"""`python -m pureflash.store --config FILE`: the store process (`pf store run`)."""

from __future__ import annotations

import sys

from pureflash.process.entry import run_process


def main() -> int:
    """Run until TERM; gives the exit status."""
    from pureflash.store.server import run_store

    return run_process("store", run_store, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
