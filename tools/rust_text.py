"""Read the shape of Rust source without a compiler: which lines are functions, and which are tests.

`blank` replaces what is inside comments, strings and characters by spaces and keeps every newline,
so that braces and words that are left are code; functions and test modules are then found by
counting braces. It knows nested comments, raw strings of any number of #, byte and C strings, and
that 'a is a lifetime and 'a' a character. What a macro makes of its input it does not know.

Clippy's too_many_lines was not taken: it leaves comments and empty lines out of its count, and a
screen does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""
      (?P<line>//[^\n]*)
    | (?P<block>/\*)
    | (?P<raw>\b(?:b|c)?r(?P<marks>\#*)")
    | (?P<string>"(?:\\.|[^"\\])*(?:"|\Z))
    | (?P<char>'(?:\\(?:u\{[^}]*\}|x..|.)|[^\\'\n])')
    """,
    re.VERBOSE | re.DOTALL,
)
_FUNCTION = re.compile(r"\bfn\s+(\w+)")
_TESTS = re.compile(
    r"#\[cfg\((?:all\()?test\b[^\]]*\]\s*(?:#\[[^\]]*\]\s*)*(?:pub\s+)?mod\s+\w+\s*\{"
)


@dataclass(frozen=True, slots=True)
class Function:
    """A function with a body; `lines` counts from its `fn` to its closing brace, both included."""

    name: str
    line: int
    lines: int


def blank(text: str) -> str:
    """Give source of the same length and lines, with spaces for all that is not code."""
    out: list[str] = []
    at = 0
    while (found := _TOKEN.search(text, at)) is not None:
        end = found.end()
        if found["block"]:
            end = _comment_end(text, end)
        elif found["raw"]:
            close = text.find('"' + found["marks"], end)
            end = len(text) if close < 0 else close + 1 + len(found["marks"])
        out += [text[at : found.start()], re.sub(r"[^\n]", " ", text[found.start() : end])]
        at = end
    return "".join((*out, text[at:]))


def functions(code: str) -> Iterator[Function]:
    """Give the functions of blanked source, also those inside others; declarations have no body."""
    for found in _FUNCTION.finditer(code):
        start = _body_start(code, found.end())
        if start is not None:
            end = _brace_end(code, start)
            line = code.count("\n", 0, found.start()) + 1
            yield Function(found[1], line, code.count("\n", found.start(), end) + 1)


def lines_without_tests(code: str) -> int:
    """Count the lines of blanked source that are in no `#[cfg(test)] mod`."""
    lines = code.count("\n")
    for found in _TESTS.finditer(code):
        lines -= code.count("\n", found.start(), _brace_end(code, found.end() - 1)) + 1
    return lines


def _comment_end(text: str, at: int) -> int:
    """Give the end of a block comment whose opening ends at `at`; they nest."""
    depth = 1
    for mark in re.compile(r"/\*|\*/").finditer(text, at):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0:
            return mark.end()
    return len(text)


def _body_start(code: str, at: int) -> int | None:
    """Give where the body of a function opens; None for a declaration, which ends with `;`."""
    depth = 0
    for mark in re.compile(r"[()\[\]{};]").finditer(code, at):
        if mark[0] in "([":
            depth += 1
        elif mark[0] in ")]":
            depth -= 1
        elif depth == 0:
            return mark.start() if mark[0] == "{" else None
    return None


def _brace_end(code: str, start: int) -> int:
    """Give the end of the braces that open at `start`."""
    depth = 0
    for mark in re.compile(r"[{}]").finditer(code, start):
        depth += 1 if mark[0] == "{" else -1
        if depth == 0:
            return mark.end()
    return len(code)
