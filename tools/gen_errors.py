#!/usr/bin/env python3
"""Generate the Rust enum, the Python exceptions and the reference page from errors.toml.

Theory of operation. One list, three generated files, all committed so that neither a build nor a
reader needs this tool. The list is validated first (unique names and numbers, each number in its
band, lines short enough), because a wrong number here would be a wrong number on the wire.
`--check` compares instead of writing and exits 1 naming each stale file. Output is already in the
shape that rustfmt and ruff produce, so the tool needs neither.

Usage: tools/gen_errors.py [--check]
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "errors.toml"
RUST = ROOT / "crates/proto/src/status.rs"
PYTHON = ROOT / "python/pureflash/errors.py"
PAGE = ROOT / "docs/reference/errors.md"
TEXT_CHARS_MAX = 66
"""Longest meaning or next step; keeps every generated line within 100 columns."""


class ListError(Exception):
    """errors.toml contradicts itself."""


@dataclass(frozen=True, slots=True)
class Band:
    """A range of numbers with one way to react."""

    name: str
    first: int
    last: int
    meaning: str
    exception: str | None

    @property
    def variant(self) -> str:
        """Name in Rust."""
        return self.name.capitalize()


@dataclass(frozen=True, slots=True)
class Code:
    """One error code."""

    name: str
    number: int
    http: int
    meaning: str
    next_step: str
    band: Band

    @property
    def variant(self) -> str:
        """Name in Rust."""
        return "".join(part.capitalize() for part in self.name.split("_"))


def read_list(text: str) -> tuple[tuple[Band, ...], tuple[Code, ...]]:
    """Parse and validate the list; `ListError` names the first contradiction."""
    raw = tomllib.loads(text)
    bands = tuple(
        Band(
            name=band["name"],
            first=band["first"],
            last=band["last"],
            meaning=band["meaning"],
            exception=band.get("exception"),
        )
        for band in raw["band"]
    )
    codes = tuple(
        Code(
            name=code["name"],
            number=code["number"],
            http=code["http"],
            meaning=code["meaning"],
            next_step=code["next_step"],
            band=band_of(bands, code["number"]),
        )
        for code in raw["code"]
    )
    if len({code.name for code in codes}) != len(codes):
        raise ListError("two codes have one name")
    if [code.number for code in codes] != sorted({code.number for code in codes}):
        raise ListError("numbers are not unique and ascending")
    for code in codes:
        for line in (code.meaning, code.next_step):
            if len(line) > TEXT_CHARS_MAX or '"' in line or "\\" in line or line.endswith("."):
                raise ListError(
                    f"{code.name}: {line!r} is too long, quoted or ends with a full stop"
                )
        if not 200 <= code.http <= 599:
            raise ListError(f"{code.name}: HTTP status {code.http}")
    return bands, codes


def band_of(bands: tuple[Band, ...], number: int) -> Band:
    """Find the one band that holds `number`."""
    found = [band for band in bands if band.first <= number <= band.last]
    if len(found) != 1:
        raise ListError(f"number {number} lies in {len(found)} bands")
    return found[0]


def filled(shape: str, code: Code) -> str:
    """Put the fields of a code into a template."""
    return shape.format(
        name=code.name,
        http=code.http,
        meaning=code.meaning,
        next_step=code.next_step,
        band=code.band,
    )


def rust(bands: tuple[Band, ...], codes: tuple[Code, ...]) -> str:
    """Make crates/proto/src/status.rs."""
    out = [
        "//! Status codes of replies, in bands that say how to react.",
        "//!",
        "//! Generated from errors.toml by tools/gen_errors.py; edit the list, not this file.",
        "",
        "use std::fmt;",
        "",
        "/// How to react to a code without knowing it.",
        "#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]",
        "pub enum Band {",
    ]
    for band in bands:
        out += [f"    /// {band.meaning}.", f"    {band.variant},"]
    out += [
        "}",
        "",
        "/// What became of a request. The number is what travels.",
        "#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]",
        "#[repr(u32)]",
        "pub enum Status {",
    ]
    for code in codes:
        out += [f"    /// {code.meaning}.", f"    {code.variant} = {code.number},"]
    out += [
        "}",
        "",
        "/// A number that is no status of this version.",
        "#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]",
        '#[error("unknown status {0}")]',
        "pub struct UnknownStatus(pub u32);",
        "",
        "impl Status {",
        "    /// Every status, by ascending number.",
        f"    pub const ALL: [Status; {len(codes)}] = [",
        *(f"        Status::{code.variant}," for code in codes),
        "    ];",
        "",
        "    /// The number that travels.",
        "    #[must_use]",
        "    pub fn number(self) -> u32 {",
        "        self as u32",
        "    }",
        "",
    ]
    for doc, name, kind, shape in (
        ("How to react.", "band", "Band", "Band::{band.variant}"),
        ("Stable name, as in REST and logs.", "name", "&'static str", '"{name}"'),
        ("What is true.", "meaning", "&'static str", '"{meaning}"'),
        ("What to do now.", "next_step", "&'static str", '"{next_step}"'),
    ):
        out += [f"    /// {doc}", "    #[must_use]", f"    pub fn {name}(self) -> {kind} {{"]
        out += ["        match self {"]
        out += [f"            Status::{code.variant} => {filled(shape, code)}," for code in codes]
        out += ["        }", "    }", ""]
    out[-1] = "}"
    out += [
        "",
        "impl TryFrom<u32> for Status {",
        "    type Error = UnknownStatus;",
        "",
        "    fn try_from(number: u32) -> Result<Status, UnknownStatus> {",
        "        match number {",
        *(f"            {code.number} => Ok(Status::{code.variant})," for code in codes),
        "            unknown => Err(UnknownStatus(unknown)),",
        "        }",
        "    }",
        "}",
        "",
        "impl fmt::Display for Status {",
        "    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {",
        '        write!(f, "{}: {}", self.name(), self.meaning())',
        "    }",
        "}",
        "",
        "#[cfg(test)]",
        "mod tests {",
        "    use super::*;",
        "",
        "    #[test]",
        "    fn numbers_round_trip_and_nothing_else_is_a_status() {",
        "        let known: Vec<u32> = Status::ALL.iter().map(|status| status.number()).collect();",
        "        for number in 0..200 {",
        "            match Status::try_from(number) {",
        "                Ok(status) => assert_eq!(status.number(), number),",
        "                Err(unknown) => {",
        '                    assert!(!known.contains(&number), "{number} was refused");',
        "                    assert_eq!(unknown, UnknownStatus(number));",
        "                }",
        "            }",
        "        }",
        "    }",
        "",
        "    #[test]",
        "    fn only_ok_is_in_the_band_of_success() {",
        "        for status in Status::ALL {",
        '            assert_eq!(status.band() == Band::Ok, status == Status::Ok, "{status}");',
        "        }",
        "    }",
        "}",
    ]
    return "\n".join(out) + "\n"


PYTHON_HEAD = '''"""Errors of PureFlash: one exception class per band of codes.

Generated from errors.toml by tools/gen_errors.py; edit the list, not this file.

Catch the band to react (`RouteError`: try again; `CallerError`: fix the request), read `code` to
be exact, and show `next_step` to people.
"""

from __future__ import annotations

import enum


class Code(enum.IntEnum):
    """Stable numbers, the same on the wire, in REST and in logs."""

'''

PYTHON_BASE = '''

class PureFlashError(Exception):
    """Anything PureFlash refuses or fails to do.

    `code` says what happened, `message` the particulars, `next_step` what the reader can do, and
    `request_id` finds the request in the logs (None outside a request).
    """

    def __init__(
        self,
        code: Code,
        message: str | None = None,
        *,
        next_step: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(code, message, next_step, request_id)
        self.code = code
        self.message = MEANING[code] if message is None else message
        self.next_step = NEXT_STEP[code] if next_step is None else next_step
        self.request_id = request_id

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by code, so that an error keeps its class across processes."""
        return (_rebuild, (int(self.code), self.message, self.next_step, self.request_id))

    def __str__(self) -> str:
        tail = "" if self.request_id is None else f" (request {self.request_id})"
        return f"{self.code.name}: {self.message}. {self.next_step}.{tail}"

    @property
    def http_status(self) -> int:
        """Give the HTTP status that carries this code."""
        return HTTP_STATUS[self.code]

'''

PYTHON_TAIL = '''

def from_code(
    number: int,
    message: str | None = None,
    *,
    next_step: str | None = None,
    request_id: str | None = None,
) -> PureFlashError:
    """Make the error of the right class from a number off the wire.

    Errors: a number that this version does not know becomes INTERNAL and is named in the message,
    because a newer peer may answer with it; 0 (OK) is no error and raises ValueError.
    """
    if number == Code.OK:
        raise ValueError("OK is not an error")
    try:
        code = Code(number)
    except ValueError:
        prefix = f"unknown code {number}"
        message = prefix if message is None else f"{prefix}: {message}"
        code = Code.INTERNAL
    return _CLASS[code](code, message, next_step=next_step, request_id=request_id)


def _rebuild(number: int, message: str, next_step: str, request_id: str | None) -> PureFlashError:
    return from_code(number, message, next_step=next_step, request_id=request_id)
'''


def python(bands: tuple[Band, ...], codes: tuple[Code, ...]) -> str:
    """Make python/pureflash/errors.py."""
    out = PYTHON_HEAD
    out += "".join(f"    {code.name} = {code.number}\n" for code in codes)
    tables = (
        ("MEANING", "str", '"{meaning}"'),
        ("NEXT_STEP", "str", '"{next_step}"'),
        ("HTTP_STATUS", "int", "{http}"),
    )
    out += "\n"
    for name, kind, shape in tables:
        out += f"\n{name}: dict[Code, {kind}] = {{\n"
        out += "".join(f"    Code.{code.name}: {filled(shape, code)},\n" for code in codes)
        out += "}\n"
    out += PYTHON_BASE
    for band in bands:
        if band.exception is not None:
            out += f'\nclass {band.exception}(PureFlashError):\n    """{band.meaning}."""\n\n'
    out += "\n_CLASS: dict[Code, type[PureFlashError]] = {\n"
    out += "".join(
        f"    Code.{code.name}: {code.band.exception},\n"
        for code in codes
        if code.band.exception is not None
    )
    return out + "}\n" + PYTHON_TAIL


def page(bands: tuple[Band, ...], codes: tuple[Code, ...]) -> str:
    """Make docs/reference/errors.md."""
    out = [
        "# Errors",
        "",
        "Generated from `errors.toml` by `tools/gen_errors.py`; edit the list, not this page.",
        "",
        "The same numbers travel on the wire (PFW), in REST (`code`) and in logs. A volume that",
        "waits for replicas is *parked*: that is a state, never one of these codes.",
    ]
    for band in bands:
        numbers = f"{band.first}" if band.first == band.last else f"{band.first}-{band.last}"
        raised = "" if band.exception is None else f", Python `{band.exception}`"
        out += ["", f"## {numbers}: {band.name}{raised}", "", f"{band.meaning}.", ""]
        out += ["| Code | Name | HTTP | Meaning | Next step |", "|---|---|---|---|---|"]
        out += [
            f"| {code.number} | {code.name} | {code.http} | {code.meaning} | {code.next_step} |"
            for code in codes
            if code.band == band
        ]
    return "\n".join(out) + "\n"


def main() -> int:
    """Write or compare the three files; exit 1 when `--check` finds a stale one."""
    parser = argparse.ArgumentParser(description="generate files from errors.toml")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    bands, codes = read_list(LIST.read_text())
    stale = 0
    for path, make in ((RUST, rust), (PYTHON, python), (PAGE, page)):
        text = make(bands, codes)
        if arguments.check:
            if not path.exists() or path.read_text() != text:
                print(f"{path.relative_to(ROOT)} is stale: run tools/gen_errors.py")
                stale += 1
        else:
            path.write_text(text)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
