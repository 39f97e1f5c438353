"""Results as people and programs want them: aligned tables, JSON, YAML, names.

A table is plain text in aligned columns; only a terminal gets bold headers. `-H` is for scripts: no
header, columns separated by one tab. `-o json` prints the REST object as it came.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
import typer

from pureflash.cli.listing import Listing
from pureflash.cli.options import Output
from pureflash.cli.outcome import CommandProblem, Exit

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Column(Generic[_T]):
    """A column: its title and the text of a cell.

    `is_wide`: only with `-o wide` or when it is asked for. `key`: what to sort by where that is not
    the text, such as bytes.
    """

    title: str
    cell: Callable[[_T], str]
    is_wide: bool = False
    key: Callable[[_T], int] | None = None


def print_list(
    items: Sequence[_T],
    columns: Sequence[Column[_T]],
    *,
    name: Callable[[_T], str],
    listing: Listing,
) -> None:
    """Print a list of objects. Errors: CommandProblem (usage) for a column that there is not."""
    shown = choose_columns(columns, listing)
    items = sorted_by(items, columns, listing)
    if listing.output is Output.NAME:
        for item in items:
            typer.echo(name(item))
    elif listing.output in (Output.JSON, Output.YAML):
        print_data({"items": [msgspec.to_builtins(item) for item in items]}, listing.output)
    else:
        rows = [[column.cell(item) for column in shown] for item in items]
        print_rows([column.title for column in shown], rows, is_bare=listing.is_bare)


def choose_columns(columns: Sequence[Column[_T]], listing: Listing) -> list[Column[_T]]:
    """Give the columns that are asked for, in that order, else the usual ones."""
    if not listing.columns:
        return [one for one in columns if listing.output is Output.WIDE or not one.is_wide]
    if listing.output not in (Output.TABLE, Output.WIDE):
        raise CommandProblem(
            f"--columns is for tables, not for -o {listing.output}", exit_status=Exit.USAGE
        )
    return [_column(columns, title) for title in listing.columns]


def sorted_by(items: Sequence[_T], columns: Sequence[Column[_T]], listing: Listing) -> Sequence[_T]:
    """Sort by a column: numbers by size, texts by letters; equal ones stay as they came."""
    if not listing.sort:
        return items
    column = _column(columns, listing.sort)
    key: Callable[[_T], Any] = column.cell if column.key is None else column.key
    return sorted(items, key=key, reverse=listing.is_falling)


def _column(columns: Sequence[Column[_T]], title: str) -> Column[_T]:
    for column in columns:
        if column.title.lower() == title:
            return column
    known = ", ".join(column.title.lower() for column in columns)
    raise CommandProblem(
        f"there is no column {title[:32]!r}", exit_status=Exit.USAGE, next_step=f"use {known}"
    )


def print_object(
    item: msgspec.Struct, lines: Sequence[tuple[str, str]], *, name: str, output: Output
) -> None:
    """Print one object: `lines` are (label, text) for people."""
    if output is Output.NAME:
        typer.echo(name)
    elif output in (Output.JSON, Output.YAML):
        print_data(msgspec.to_builtins(item), output)
    else:
        width = max(len(label) for label, _ in lines)
        for label, text in lines:
            typer.echo(f"{label:<{width}}  {text}".rstrip())


def print_rows(titles: Sequence[str], rows: Sequence[Sequence[str]], *, is_bare: bool) -> None:
    """Print rows in aligned columns."""
    if is_bare:
        for row in rows:
            typer.echo("\t".join(row))
        return
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    head = "  ".join(f"{title:<{width}}" for title, width in zip(titles, widths, strict=True))
    typer.echo(typer.style(head.rstrip(), bold=True) if sys.stdout.isatty() else head.rstrip())
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def local_time(text: str) -> str:
    """Show an RFC 3339 time with the local offset and its age."""
    moment = dt.datetime.fromisoformat(text)
    seconds = max(0, int((dt.datetime.now(dt.UTC) - moment).total_seconds()))
    from pureflash.units import format_duration

    age = format_duration(seconds * 1000)
    return f"{moment.astimezone().isoformat(sep=' ', timespec='seconds')} ({age} ago)"


def moment_key(text: str | None) -> int:
    """Give what an RFC 3339 time is sorted by; no time comes first."""
    return 0 if not text else int(dt.datetime.fromisoformat(text).timestamp() * 1000)


def to_yaml(data: Any) -> str:
    """Write plain data as YAML, keys in their order."""
    import msgspec.yaml

    return msgspec.yaml.encode(data).decode()


def print_data(data: Any, output: Output) -> None:
    """Print plain data as JSON, or as YAML."""
    if output is Output.JSON:
        typer.echo(json.dumps(data, indent=2))
    else:
        typer.echo(to_yaml(data), nl=False)
