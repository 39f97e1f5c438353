"""`python -m pureflash.gateway --config FILE`: the gateway process (`pf gateway run`)."""

from __future__ import annotations

import sys

from pureflash.process.entry import run_process


def main() -> int:
    """Run until TERM; gives the exit status."""
    from pureflash.gateway.server import run_gateway

    return run_process("gateway", run_gateway, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
