"""Write docs/reference/cli.md from the command tree of `pf`; `--check` compares instead.

What `pf --help` says is the source: a command, its words, its arguments and options, in the order
in which help shows them. Hidden aliases are left out. tools/lint.py holds the page to it.

Usage: tools/gen_cli.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Final

import typer

from pureflash.cli.app import app
from pureflash.model.exits import Exit

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs/reference/cli.md"

HEAD: Final = """# The `pf` command

Generated from `pf --help` by `tools/gen_cli.py`; edit the commands, not this page.

A name or an id names a volume. `vol` is short for `volume`, `ls` for `list`. Every command has
`-h` and `--help`; `pf completion SHELL` prints completions. With `PF_DEBUG=1` an error comes with
its trace."""

STATUS_MEANINGS: Final = {
    Exit.OK: "ok",
    Exit.FAILED: "failed",
    Exit.USAGE: "usage: the line or a value in it is wrong",
    Exit.NOT_FOUND: "not found",
    Exit.IN_THE_WAY: "exists already, or is in use",
    Exit.UNAVAILABLE: "unavailable now",
    Exit.UNSAFE: "refused as unsafe",
    Exit.NOT_SERVED: "of `pf up`: the cluster is up, and no volume can be served",
    Exit.INTERRUPTED: "interrupted",
    Exit.TERMINATED: "ended by TERM, after taking back what was begun",
}


def commands(group: Any, path: tuple[str, ...] = ("pf",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Walk the visible commands, each with the words that name it.

    A noun that does something without a verb, such as `pf bench`, is a command itself.
    """
    if len(path) > 1 and group.invoke_without_command:
        yield path, group
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def is_argument(parameter: Any) -> bool:
    """Tell an argument from an option."""
    return bool(parameter.param_type_name == "argument")


def metavar(parameter: Any) -> str:
    """Name an argument in capitals, in brackets when it may be left out."""
    name = parameter.name.upper().replace("_", "-")
    return name if parameter.required else f"[{name}]"


def default_text(parameter: Any) -> str:
    """Say what an option is when it is not given, where that is a number or a word."""
    value = parameter.default
    is_plain = isinstance(value, (int, float, str)) and not isinstance(value, (bool, Enum))
    return f" Default {value}." if is_plain and value != "" else ""


def option_rows(command: Any) -> list[str]:
    """Give a row for each argument and option; help itself is left out."""
    rows = []
    for parameter in command.params:
        if is_argument(parameter):
            label = metavar(parameter)
        else:
            label = ", ".join([*parameter.opts, *parameter.secondary_opts])
        meaning = (parameter.help or "").replace("|", "\\|") + default_text(parameter)
        rows.append(f"| `{label}` | {meaning} |")
    return rows


def section(words: tuple[str, ...], command: Any) -> list[str]:
    """Describe one command."""
    arguments = [metavar(one) for one in command.params if is_argument(one)]
    lines = ["", f"### `{' '.join([*words, *arguments])}`", "", (command.help or "").strip()]
    rows = option_rows(command)
    if rows:
        lines += ["", "| | |", "|---|---|", *rows]
    return lines


def page() -> str:
    """Make the whole page."""
    out = [HEAD, "", "## Exit statuses", "", "| Status | Means |", "|---|---|"]
    assert set(STATUS_MEANINGS) == set(Exit), "a meaning for each status"
    out += [f"| {status.value} | {meaning} |" for status, meaning in STATUS_MEANINGS.items()]
    noun = ""
    for words, command in sorted(
        commands(typer.main.get_command(app)),
        key=lambda one: (len(one[0]) > 2, one[0]),
    ):
        head = f"`pf {words[1]}`" if len(words) > 2 else "The cluster and this machine"
        if head != noun:
            noun = head
            out += ["", f"## {noun}"]
        out += section(words, command)
    return "\n".join(out) + "\n"


def main() -> int:
    """Write or compare the page; exit 1 when `--check` finds it stale."""
    parser = argparse.ArgumentParser(description="generate docs/reference/cli.md from pf --help")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    text = page()
    if parser.parse_args().check:
        if not PAGE.exists() or PAGE.read_text() != text:
            print(f"{PAGE.relative_to(ROOT)} is stale: run tools/gen_cli.py")
            return 1
    else:
        PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
