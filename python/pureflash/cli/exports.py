"""`pf export ...`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pureflash.cli.listing import Listing, lists
from pureflash.cli.options import (
    DataOption,
    Output,
    OutputOption,
    ServerOption,
    VolumeArgument,
    connected,
)
from pureflash.cli.outcome import CommandProblem, Exit

if TYPE_CHECKING:
    from pureflash.model.rest import ExportView

app = typer.Typer(help="Exports: offer volumes to foreign clients.", no_args_is_help=True)


@app.command()
def nbd(
    volume: VolumeArgument,
    tcp: Annotated[bool, typer.Option("--tcp", help="TCP on loopback, not a socket.")] = False,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse writes.")] = False,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Export a volume over NBD; it is offered again after every restart until it is deleted."""
    from pureflash.cli.render import print_object
    from pureflash.model.rest import CreateExport

    if tcp:
        text = "warning: every user of this machine can connect to NBD over TCP; it has no password"
        typer.echo(text, err=True)
    wish = CreateExport(
        kind="nbd", volume=volume, transport="tcp" if tcp else "unix", read_only=read_only
    )
    with connected(server, data) as api:
        export = api.create_export(wish)
    if export.state != "ready":
        raise CommandProblem(
            f"the export of {export.volume} is {export.state}: {export.reason}",
            exit_status=Exit.UNAVAILABLE,
            next_step="it is kept and will be offered as soon as it can be; see `pf export list`",
        )
    lines = [
        ("volume", export.volume),
        ("uri", export.uri),
        ("try", f"qemu-img info '{export.uri}'"),
    ]
    print_object(export, lines, name=export.uri, output=output)


@app.command("list")
@lists
def list_all(
    listing: Listing,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """List exports. Alias: ls."""
    from pureflash.cli.render import Column, print_list

    with connected(server, data) as api:
        exports = api.exports()
    columns: list[Column[ExportView]] = [
        Column("VOLUME", lambda e: e.volume),
        Column("KIND", lambda e: e.kind),
        Column("STATE", lambda e: e.state),
        Column("CLIENTS", lambda e: str(e.connections), key=lambda e: e.connections),
        Column("URI", lambda e: e.uri or "-"),
        Column("ID", lambda e: str(e.id), is_wide=True, key=lambda e: e.id),
        Column("GATEWAY", lambda e: e.gateway, is_wide=True),
        Column("READ-ONLY", lambda e: "yes" if e.read_only else "no", is_wide=True),
        Column("REASON", lambda e: e.reason, is_wide=True),
    ]
    print_list(exports, columns, name=lambda e: e.volume, listing=listing)


app.command("ls", hidden=True)(list_all)


@app.command()
def delete(
    volume: Annotated[str, typer.Argument(help="Name of the volume, or id of the export.")],
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Take an export away; its clients are disconnected, the data stays."""
    with connected(server, data) as api:
        api.delete_export(volume)
    typer.echo(f"{volume} is not exported any more")
