"""`pf store list` and `pf disk ...`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pureflash.cli.listing import Listing, lists
from pureflash.cli.options import (
    DataOption,
    Output,
    OutputOption,
    ServerOption,
    connected,
)
from pureflash.cli.outcome import CommandProblem, Exit

if TYPE_CHECKING:
    from pureflash.model.rest import DiskView, StoreView

store_app = typer.Typer(help="Store nodes.", no_args_is_help=True)
disk_app = typer.Typer(help="Disks of the stores.", no_args_is_help=True)


@store_app.command("list")
@lists
def list_stores(
    listing: Listing,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """List stores. Alias: ls."""
    from pureflash.cli.render import Column, print_list
    from pureflash.units import format_duration

    with connected(server, data) as api:
        stores = api.stores()
    columns: list[Column[StoreView]] = [
        Column("NAME", lambda s: s.name),
        Column("STATE", lambda s: s.state),
        Column("ADDRESS", lambda s: s.address),
        Column("DISKS", lambda s: str(len(s.disks)), key=lambda s: len(s.disks)),
        Column("REPLICAS", lambda s: str(s.replicas), key=lambda s: s.replicas),
        Column("OUT", lambda s: str(s.replicas_out), key=lambda s: s.replicas_out),
        Column(
            "HEARD",
            lambda s: "-" if s.silent_ms is None else f"{format_duration(s.silent_ms)} ago",
            key=lambda s: s.silent_ms or 0,
        ),
        Column("ID", lambda s: str(s.id), is_wide=True, key=lambda s: s.id),
        Column("INCARNATION", lambda s: str(s.incarnation), is_wide=True),
        Column("REASON", lambda s: "; ".join(filter(None, [s.reason, s.out_reason]))),
    ]
    print_list(stores, columns, name=lambda s: s.name, listing=listing)


store_app.command("ls", hidden=True)(list_stores)


@disk_app.command("list")
@lists
def list_disks(
    listing: Listing,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """List disks. Alias: ls."""
    from pureflash.cli.render import Column, print_list

    with connected(server, data) as api:
        disks = api.disks()
    print_list(disks, _disk_columns(Column), name=lambda d: d.id, listing=listing)
    if listing.output in (Output.TABLE, Output.WIDE) and not listing.is_bare:
        for disk in disks:
            if disk.next_step:
                typer.echo(f"\n{disk.store} disk {disk.index}: {disk.reason}")
                typer.echo(f"  what to do: {disk.next_step}")


disk_app.command("ls", hidden=True)(list_disks)


@disk_app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A disk file or device; it is only read.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what is written in the header of a disk that no store has open, without a cluster."""
    from pathlib import Path

    from pureflash.cli.core import load_core
    from pureflash.cli.render import print_data
    from pureflash.errors import Code, PureFlashError, from_code

    if not Path(path).exists():
        raise CommandProblem(
            f"there is no {path}",
            exit_status=Exit.NOT_FOUND,
            next_step="`pf disk list` has the paths of a cluster's disks",
        )
    core = load_core("inspect_disk")
    try:
        found = core.inspect_disk(path)
    except PureFlashError as problem:
        step = "it was only read; give the path of a disk that PureFlash has formatted"
        if problem.code is Code.IN_USE:
            step = "of a disk that serves, `pf disk list -o wide` shows more; or stop its store"
        raise from_code(problem.code, problem.message, next_step=step) from problem
    print_data(found, Output.JSON if output is Output.JSON else Output.YAML)


def _disk_columns(column: type) -> list[Column[DiskView]]:
    from pureflash.units import format_size

    def size(number: int | None) -> str:
        return "-" if number is None else format_size(number)

    def latency(mean_us: int | None, tail_us: int | None) -> str:
        if mean_us is None or tail_us is None:
            return "-"
        return f"{mean_us / 1000:.1f} ms, 99 %: {tail_us / 1000:.1f} ms"

    return [
        column("STORE", lambda d: d.store),
        column("DISK", lambda d: str(d.index)),
        column("STATE", lambda d: d.state),
        column("SIZE", lambda d: format_size(d.size_bytes), key=lambda d: d.size_bytes),
        column("FREE", lambda d: size(d.bytes_free), key=lambda d: d.bytes_free or 0),
        column("BAD SLOTS", lambda d: str(d.bad_slots)),
        column("ENGINE", lambda d: d.engine or "-"),
        column("PATH", lambda d: d.path),
        column("ID", lambda d: d.id, is_wide=True),
        column(
            "WRITES",
            lambda d: latency(d.write_ewma_us, d.write_p99_us),
            is_wide=True,
            key=lambda d: d.write_ewma_us or 0,
        ),
        column(
            "READS",
            lambda d: latency(d.read_ewma_us, d.read_p99_us),
            is_wide=True,
            key=lambda d: d.read_ewma_us or 0,
        ),
        column("ENGINE WHY", lambda d: d.engine_reason or "-", is_wide=True),
        column("REASON", lambda d: d.reason, is_wide=True),
    ]


if TYPE_CHECKING:
    from pureflash.cli.render import Column
