"""Options that commands share, and the cluster they mean."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pureflash.cli.outcome import CommandProblem, Exit

if TYPE_CHECKING:
    from pureflash.client.api import Api


class Output(StrEnum):
    """The forms in which a command prints its result."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"

    @property
    def is_for_people(self) -> bool:
        """Whether more than the result may be printed; else a program reads it."""
        return self in (Output.TABLE, Output.WIDE)


OutputOption = Annotated[
    Output,
    typer.Option("-o", "--output", help="Form of the result: table, wide, json, yaml or name."),
]
NoHeaderOption = Annotated[bool, typer.Option("-H", help="Without a header; columns by tabs.")]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Data directory; else $PF_DATA, else the current context."),
]
ServerOption = Annotated[
    str | None, typer.Option("--server", help="host:port of the conductor; else $PF_SERVER.")
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show the plan; change nothing.")]
VolumeArgument = Annotated[str, typer.Argument(help="Name or id of the volume.")]


@contextmanager
def connected(server: str | None, data: Path | None) -> Iterator[Api]:
    """Open the API of the cluster that a command means; it is closed at the end."""
    from pureflash.client.api import Api
    from pureflash.client.context import resolve_server

    found = resolve_server(server, data)
    with Api(found.address, found.token, source=found.source, cluster_id=found.cluster_id) as api:
        yield api


def read_size(text: str, *, flag: str) -> int:
    """Read a size from a command line; says it when it was rounded.

    Errors: CommandProblem (usage).
    """
    from pureflash.units import parse_size

    try:
        size = parse_size(text)
    except ValueError as cause:
        raise CommandProblem(f"{flag}: {cause}", exit_status=Exit.USAGE) from cause
    if size.notice:
        typer.echo(f"notice: {size.notice}", err=True)
    return size.size_bytes


def confirm(plan: str, name: str, *, is_agreed: bool, output: Output = Output.TABLE) -> None:
    """Show what will be destroyed and want its name typed, unless `--yes` was given.

    Where the result is for a program, this goes to standard error.
    Errors: CommandProblem (unsafe) without a terminal or with another name.
    """
    is_aside = not output.is_for_people
    typer.echo(plan, err=is_aside)
    if is_agreed:
        return
    if not sys.stdin.isatty():
        raise CommandProblem(
            "this cannot be undone, and there is no terminal to ask on",
            exit_status=Exit.UNSAFE,
            next_step="add --yes",
        )
    question = f"Type {name} to go on"
    if typer.prompt(question, default="", show_default=False, err=is_aside) != name:
        raise CommandProblem("not the name; nothing was changed", exit_status=Exit.UNSAFE)
