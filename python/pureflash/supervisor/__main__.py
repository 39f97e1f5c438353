"""`python -m pureflash.supervisor`: the process behind `pf up`."""

from __future__ import annotations

import sys

from pureflash.supervisor.server import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
