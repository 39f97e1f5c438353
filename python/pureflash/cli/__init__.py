"""The `pf` command: an edge that knows the client and the model, and no server.

`main` is the console script. It imports the command tree only when it runs, and that tree imports
neither `_core` nor a server: `pf --help` answers within 0.4 s, and a broken extension cannot stop
`pf doctor` from saying so.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run `pf` with the process's arguments and exit with its status (`outcome.Exit`)."""
    import sys

    from pureflash.cli.app import run
    from pureflash.cli.outcome import catch_term

    catch_term()
    sys.exit(run(sys.argv[1:]))
