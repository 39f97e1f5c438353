"""Where a command's data directory comes from: flag, environment, context file or default.

`pf up` writes the context file; every other command reads it, so that nothing has to be repeated.
An answer carries its source, because an error about a directory must name what chose it.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pureflash.errors import CallerError, Code

CONTEXT_BYTES_MAX = 64 * 1024
"""Largest context file that is read; ours has two lines."""


@dataclass(frozen=True, slots=True)
class Place:
    """A data directory and what named it: `--data`, `PF_DATA`, the context file or `default`."""

    directory: Path
    source: str


def resolve_data(flag: Path | None, environment: Mapping[str, str] | None = None) -> Place:
    """Choose the data directory; it need not exist.

    Errors: CallerError INVALID for a context file that is not what `pf up` writes.
    """
    variables = os.environ if environment is None else environment
    if flag is not None:
        return Place(flag.absolute(), "--data")
    if named := variables.get("PF_DATA"):
        return Place(Path(named).absolute(), "PF_DATA")
    file = context_file(variables)
    if (remembered := _read_context(file)) is not None:
        return Place(remembered, str(file))
    return Place(_folder(variables, "XDG_STATE_HOME", ".local/state") / "pureflash", "default")


def _folder(variables: Mapping[str, str], name: str, below_home: str) -> Path:
    # The XDG specification: a relative path in these variables is to be ignored.
    value = variables.get(name, "")
    if value.startswith("/"):
        return Path(value)
    return Path(variables.get("HOME") or Path.home()) / below_home


def _read_context(file: Path) -> Path | None:
    try:
        with file.open("rb") as stream:
            text = stream.read(CONTEXT_BYTES_MAX)
    except FileNotFoundError:
        return None
    try:
        data = tomllib.loads(text.decode()).get("data")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
        raise _bad_context(file, f"it is not TOML ({cause})") from cause
    if data is None:
        return None
    if not isinstance(data, str) or not data.startswith("/"):
        raise _bad_context(file, "`data` is not an absolute path")
    return Path(data)


def _bad_context(file: Path, reason: str) -> CallerError:
    return CallerError(
        Code.INVALID,
        f"cannot use the context file {file}: {reason}",
        next_step=f"name the directory with --data or PF_DATA, or delete {file}",
    )


def context_file(variables: Mapping[str, str]) -> Path:
    """Give the path of the context file."""
    return _folder(variables, "XDG_CONFIG_HOME", ".config") / "pureflash/context.toml"
