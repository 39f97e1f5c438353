"""Measure whether files, functions and lines are as short as CONTRIBUTING.md says (point 4).

Files: Python 600 lines, Rust 1,000 without tests. Functions: Python 50 lines from `def` to the end,
Rust 70 from `fn` to the closing brace; comments, docstrings and empty lines count, because a screen
shows them. Lines: 100 columns.

What was longer when this was written stands in tools/tidy_allowed.toml with its size, and may only
shrink: an entry that is larger than the truth, or about nothing, is a finding as well.
`python -m tools.tidy --shrink` brings the list down to the truth, and never up.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tools.rust_text import blank, functions, lines_without_tests

COLUMNS_MAX = 100
FILE_LINES_MAX = {".py": 600, ".rs": 1_000}
FUNCTION_LINES_MAX = {".py": 50, ".rs": 70}
ALLOWED = Path("tools/tidy_allowed.toml")
SHRINK = "run `python -m tools.tidy --shrink`"


@dataclass(frozen=True, slots=True)
class Offender:
    """What is longer than it may be: `rule` is a table of the list, `name` a key in it."""

    rule: str
    name: str
    size: int
    limit: int


def offenders(name: str, text: str) -> Iterator[Offender]:
    """Measure one tracked file; other languages than Python and Rust have no limits."""
    suffix = PurePosixPath(name).suffix
    if suffix not in FILE_LINES_MAX:
        return
    if (lines := file_lines(name, text)) > FILE_LINES_MAX[suffix]:
        yield Offender("file_lines", name, lines, FILE_LINES_MAX[suffix])
    if wide := sum(len(line) > COLUMNS_MAX for line in text.splitlines()):
        yield Offender("wide_lines", name, wide, 0)
    sizes: dict[str, int] = {}
    for function, size in function_lines(suffix, text):
        # Of several with one name the longest stands for all of them.
        sizes[function] = max(size, sizes.get(function, 0))
    for function, size in sizes.items():
        if size > FUNCTION_LINES_MAX[suffix]:
            yield Offender(
                "function_lines", f"{name}::{function}", size, FUNCTION_LINES_MAX[suffix]
            )


def file_lines(name: str, text: str) -> int:
    """Count the lines of a file; in Rust none of its tests, and none of a file of tests."""
    path = PurePosixPath(name)
    if path.suffix != ".rs":
        return text.count("\n")
    if "tests" in path.parts or path.stem == "tests" or path.stem.endswith("_tests"):
        return 0
    return lines_without_tests(blank(text))


def function_lines(suffix: str, text: str) -> Iterator[tuple[str, int]]:
    """Give the name and the lines of each function; one inside another counts in both."""
    if suffix == ".rs":
        yield from ((found.name, found.lines) for found in functions(blank(text)))
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None, "the parser sets it"
            yield node.name, node.end_lineno - node.lineno + 1


def judge(found: Iterable[Offender], allowed: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Say what is longer than it may be, or than the list says, and which entries are too large."""
    left = {(rule, name): size for rule, names in allowed.items() for name, size in names.items()}
    for one in found:
        entry = left.pop((one.rule, one.name), None)
        what = one.rule.replace("_", " ")
        if entry is None:
            yield f"{one.name}: {one.size} {what}, at most {one.limit}; see CONTRIBUTING.md"
        elif one.size > entry:
            yield f"{one.name}: {one.size} {what}, and {ALLOWED} allows {entry}; it may only shrink"
        elif one.size < entry:
            yield f"{one.name}: {one.size} {what} are less than {ALLOWED} says; {SHRINK}"
    for rule, name in left:
        yield f"{name}: there is nothing to allow in {rule} of {ALLOWED}; {SHRINK}"


def shrink(
    found: Iterable[Offender], allowed: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """Give the list brought down to the truth: nothing is added, and nothing grows."""
    shrunk: dict[str, dict[str, int]] = {rule: {} for rule in sorted(allowed)}
    for one in sorted(found, key=lambda one: one.name):
        if (entry := allowed.get(one.rule, {}).get(one.name)) is not None:
            shrunk[one.rule][one.name] = min(entry, one.size)
    return shrunk


def write_allowed(allowed: Mapping[str, Mapping[str, int]]) -> str:
    """Write the list as TOML."""
    parts = [
        "# What is longer than it may be, and how long (tools/sizes.py). It may only shrink.\n"
    ]
    for rule, names in allowed.items():
        entries = "".join(f'"{name}" = {size}\n' for name, size in names.items())
        parts.append(f"\n[{rule}]\n{entries}")
    return "".join(parts)


def read_allowed(path: Path) -> Mapping[str, Mapping[str, int]]:
    """Read the list of what is longer today."""
    allowed: Mapping[str, Mapping[str, int]] = tomllib.loads(path.read_text())
    return allowed
