"""Check what no linter checks: nothing of one person's machine, and nothing longer than it may be.

A path of the machine that wrote a file, or the host of a private package index in a lock, works
for its author and for nobody else. A test that sleeps is slow or wrong. How long files, functions
and lines may be is in tools/sizes.py. Reads every tracked text file once; one sentence per finding;
exit status 1 when there is one.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tools import sizes

_HOME = re.compile(r"(?<![\w.$}~])/(?:home|Users)/[a-z][\w.-]*/|(?<![\w.$}~])/roo[t]/")
_ADDRESS = re.compile(r"[a-z+]+://[^\s\"']+")
_CARGO_REGISTRY = "registry+https://github.com/rust-lang/crates.io-index"


def machine_paths(text: str, checkout: Path) -> Iterator[str]:
    """Give each absolute path of a person's home or of this very checkout that `text` holds."""
    for match in _HOME.finditer(text):
        yield match[0]
    # The checkout and its parent name this machine, unless they are as short as `/` or `/src`
    # and would be found inside ordinary words.
    for folder in (checkout, checkout.parent):
        if len(folder.parts) >= 3 and f"{folder}/" in text:
            yield str(folder)


def lock_addresses(name: str, text: str) -> Iterator[str]:
    """Give each address in a lock file, other than the public crates.io index in Cargo.lock."""
    if name == "Cargo.lock" or name.startswith("requirements/"):
        for match in _ADDRESS.finditer(text):
            if match[0] != _CARGO_REGISTRY:
                yield match[0]


def idle_tests(name: str, text: str) -> Iterator[str]:
    """Give each line of a test that sleeps, but for a turn of others, or that brings in a mock."""
    if not (name.startswith("tests/") and name.endswith(".py")):
        return
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Call(ast.Attribute(ast.Name("time" | "asyncio"), "sleep"), [span]):
                if ast.unparse(span) != "0":
                    yield f"line {node.lineno}: a test waits for an event and does not sleep"
            case ast.Import(names) | ast.ImportFrom(names=names):
                module = getattr(node, "module", None) or ""
                if any("mock" in f"{module}.{one.name}".split(".") for one in names):
                    yield f"line {node.lineno}: a test has a fake that passes the real one's tests"


def findings(name: str, text: str, checkout: Path) -> Iterator[str]:
    """Say what is wrong with one tracked file."""
    for path in machine_paths(text, checkout):
        yield f"{name}: holds the path of a machine: {path}"
    for address in lock_addresses(name, text):
        yield f"{name}: a lock names packages, not where one machine got them: {address}"
    for problem in idle_tests(name, text):
        yield f"{name}: {problem}"


def main() -> int:
    """Check this checkout; print what is wrong."""
    parser = argparse.ArgumentParser(description="Check tracked files.")
    parser.add_argument("--shrink", action="store_true", help=f"bring {sizes.ALLOWED} to the truth")
    is_shrinking: bool = parser.parse_args().shrink
    listing = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True)
    checkout = Path.cwd()
    problems: list[str] = []
    long: list[sizes.Offender] = []
    for name in listing.stdout.decode().split("\0"):
        path = checkout / name
        if not name or not path.is_file():
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # an image or a golden file: bytes, not text
        problems.extend(findings(name, text, checkout))
        long.extend(sizes.offenders(name, text))
    if is_shrinking:
        shrunk = sizes.shrink(long, sizes.read_allowed(sizes.ALLOWED))
        sizes.ALLOWED.write_text(sizes.write_allowed(shrunk))
    problems.extend(sizes.judge(long, sizes.read_allowed(sizes.ALLOWED)))
    for problem in problems:
        print(f"tidy: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
