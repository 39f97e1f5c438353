"""Run every linter; print one line each, and the output of those that found something.

All of them run even after one has failed: a list of everything to mend is worth more than the
first item. The cheap ones come first. Exit status 1 when any failed.
"""

from __future__ import annotations

import subprocess
import sys
import time

PYTHON = sys.executable
CHECKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ruff check", ("ruff", "check", "--quiet", ".")),
    ("ruff format", ("ruff", "format", "--check", "--quiet", ".")),
    ("rustfmt", ("cargo", "fmt", "--all", "--check")),
    ("tidy", (PYTHON, "tools/tidy.py")),
    ("crate arrows", (PYTHON, "tools/arrows.py")),
    ("import-linter", ("lint-imports", "--no-cache")),
    ("mypy", ("mypy",)),
    ("stubtest", (PYTHON, "-m", "mypy.stubtest", "pureflash._core")),
    (
        "clippy",
        (
            *("cargo", "clippy", "--quiet", "--release", "--locked", "--workspace"),
            *("--all-targets", "--", "-D", "warnings"),
        ),
    ),
)
GENERATORS = (
    ("generated errors", (PYTHON, "tools/gen_errors.py", "--check")),
    ("generated cli page", (PYTHON, "tools/gen_cli.py", "--check")),
)


def run_check(name: str, command: tuple[str, ...]) -> bool:
    """Run one linter from the root of the checkout; True when it found nothing."""
    started = time.monotonic()
    try:
        result = subprocess.run(
            command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except FileNotFoundError:
        print(f"lint: {name:<18} FAILED: {command[0]} is not installed; run tools/setup")
        return False
    verdict = "ok" if result.returncode == 0 else "FAILED"
    print(f"lint: {name:<18} {verdict:<6} {time.monotonic() - started:5.1f} s", flush=True)
    if result.returncode != 0:
        print(result.stdout, flush=True)
    return result.returncode == 0


def main() -> int:
    """Run them all."""
    # All of them, also after a failure.
    verdicts = [run_check(name, command) for name, command in (*CHECKS, *GENERATORS)]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
