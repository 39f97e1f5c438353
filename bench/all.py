"""Run every script of this folder, one after the other; `make bench`.

Options are passed on to each: `--pairs 5 --seconds 3` are theirs by default. Exit status 1 when any
of them failed, which is not the same as a goal that was missed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Final

from bench import rig

SCRIPTS: Final = ("row1", "row2", "row4", "row6", "row7", "row7b", "row7c", "row8", "footprint")


def main() -> int:
    """Run them."""
    failed: list[str] = []
    for name in SCRIPTS:
        started = time.monotonic()
        print(f"--- {name}", flush=True)
        words = [sys.executable, "-m", f"bench.{name}", *sys.argv[1:]]
        if subprocess.run(words, check=False, cwd=rig.ROOT).returncode:
            failed.append(name)
        print(f"    {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        print(f"bench: failed: {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
