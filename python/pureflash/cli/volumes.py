"""`pf volume ...`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pureflash.cli.listing import Listing, lists
from pureflash.cli.options import (
    DataOption,
    DryRunOption,
    Output,
    OutputOption,
    ServerOption,
    VolumeArgument,
    YesOption,
    confirm,
    connected,
    read_size,
)

if TYPE_CHECKING:
    from pureflash.model.rest import ExportView, MemberView, ShardView, VolumeView

SHARDS_SHOWN: Final = 16
"""More would leave the screen; `-o wide` has them all."""

app = typer.Typer(help="Volumes: create, look at, resize, delete.", no_args_is_help=True)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name: a-z 0-9 . _ -")],
    size: Annotated[str, typer.Argument(help="Size with a unit, such as 5G.")],
    replicas: Annotated[
        int | None,
        typer.Option(help="Copies of the data; if not given, as many as stores, at most 3."),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", help="1G to 64G, a power of two; default 16G.")
    ] = None,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Create a volume."""
    from pureflash.model.rest import CreateVolume

    wish = CreateVolume(
        name=name,
        size_bytes=read_size(size, flag="SIZE"),
        replicas=replicas,
        shard_size_bytes=None if shard_size is None else read_size(shard_size, flag="--shard-size"),
        dry_run=dry_run,
    )
    with connected(server, data) as api:
        volume = api.create_volume(wish)
    if dry_run and output is Output.TABLE:
        typer.echo(f"would create {name} with {len(volume.shards)} shard(s); nothing was changed")
        return
    _print_volume(volume, output)


@app.command("list")
@lists
def list_all(
    listing: Listing,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """List volumes. Alias: ls."""
    from pureflash.cli.render import Column, local_time, moment_key, print_list
    from pureflash.units import format_size

    with connected(server, data) as api:
        volumes = api.volumes()
    columns: list[Column[VolumeView]] = [
        Column("NAME", lambda v: v.name),
        Column("SIZE", lambda v: format_size(v.size_bytes), key=lambda v: v.size_bytes),
        Column(
            "USED",
            lambda v: "-" if v.used_bytes is None else format_size(v.used_bytes),
            key=lambda v: v.used_bytes or 0,
        ),
        Column("REPLICAS", lambda v: str(v.replicas), key=lambda v: v.replicas),
        Column("STATE", lambda v: v.state),
        Column("ID", lambda v: str(v.id), is_wide=True, key=lambda v: v.id),
        Column("SHARDS", lambda v: str(len(v.shards)), is_wide=True, key=lambda v: len(v.shards)),
        Column(
            "CREATED",
            lambda v: local_time(v.created_at),
            is_wide=True,
            key=lambda v: moment_key(v.created_at),
        ),
        Column("REASON", lambda v: v.reason, is_wide=True),
    ]
    print_list(volumes, columns, name=lambda v: v.name, listing=listing)


app.command("ls", hidden=True)(list_all)


@app.command()
def show(
    volume: VolumeArgument,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Show a volume with its shards."""
    with connected(server, data) as api:
        found = api.volume(volume)
    _print_volume(found, output)


@app.command()
def resize(
    volume: VolumeArgument,
    size: Annotated[str, typer.Argument(help="New size with a unit; a volume only grows.")],
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Let a volume grow; NBD clients that are connected see it when they connect again."""
    with connected(server, data) as api:
        before = api.volume(volume)
        grown = api.resize_volume(volume, size_bytes=read_size(size, flag="SIZE"))
        exports = api.exports() if grown.size_bytes != before.size_bytes else []
    if (notice := growth_notice(exports, grown.name)) is not None:
        typer.echo(notice, err=True)
    _print_volume(grown, output)


@app.command()
def delete(
    volume: VolumeArgument,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    wait: Annotated[bool, typer.Option(help="Wait until its space is free.")] = True,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Delete a volume and all data on it."""
    from pureflash.cli.jobs import print_job, wait_for_job
    from pureflash.cli.render import print_object
    from pureflash.units import format_size

    with connected(server, data) as api:
        found = api.volume(volume)
        used = "unknown" if found.used_bytes is None else format_size(found.used_bytes)
        plan = (
            f"delete volume {found.name}: {format_size(found.size_bytes)}, {used} used,"
            f" {len(found.shards)} shard(s) x {found.replicas} replica(s); this cannot be undone"
        )
        if dry_run:
            if output.is_for_people:
                typer.echo(f"would {plan}")
            else:
                print_object(found, [], name=found.name, output=output)
            return
        confirm(plan, found.name, is_agreed=yes, output=output)
        job = api.delete_volume(str(found.id), if_version=found.version)
        if wait:
            job = wait_for_job(api, job, is_enough=lambda now: bool(now.reason))
    print_job(job, output)
    if wait and job.reason:  # a store is away, perhaps for days: the rest needs nobody
        text = f"{found.name} is deleted and its name is free; space: {job.reason}"
        typer.echo(text, err=not output.is_for_people)


@app.command()
def verify(
    volume: VolumeArgument,
    wait: Annotated[bool, typer.Option(help="Wait until everything was compared.")] = True,
    repair: Annotated[
        bool,
        typer.Option(help="Mend what one copy cannot read and another one has; else only look."),
    ] = True,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Read every in-sync copy of a volume, compare and mend them, while it is in use."""
    from pureflash.cli.jobs import print_job, wait_for_job

    with connected(server, data) as api:
        job = api.verify_volume(volume, is_repairing=repair)
        if wait:
            job = wait_for_job(api, job)
    print_job(job, output)


@app.command("force-accept")
def force_accept(
    volume: VolumeArgument,
    shard: Annotated[int, typer.Option(help="Shard that no in-sync copy is left of.")],
    copy: Annotated[str, typer.Option(help="Store whose copy counts from now on.")],
    revoke: Annotated[
        bool,
        typer.Option(
            "--revoke",
            help="Vouch that stores which nobody has seen end are off for good; the process that"
            " each of them ran can never register again.",
        ),
    ] = False,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Give up what only lost copies held: go on with a copy that is not in sync."""
    from msgspec import structs

    from pureflash.cli.forcing import caller_name, plan_lines, print_forced
    from pureflash.model.rest import ForceAccept

    wish = ForceAccept(shard=shard, store=copy, by=caller_name(), revoke=revoke, dry_run=True)
    with connected(server, data) as api:
        plan = api.force_accept(volume, wish)
        if plan.job is None and not dry_run:
            confirm("\n".join(plan_lines(plan)), plan.volume, is_agreed=yes, output=output)
            plan = api.force_accept(volume, structs.replace(wish, dry_run=False))
    print_forced(plan, output)


@app.command()
@lists
def explain(
    volume: VolumeArgument,
    listing: Listing,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Say why a volume is in its state, shard by shard."""
    from pureflash.cli.render import Column, print_list

    with connected(server, data) as api:
        lines = api.explain_volume(volume)
    print_list(
        lines,
        [
            Column("SUBJECT", lambda line: line.subject),
            Column("STATE", lambda line: line.state),
            Column("REASON", lambda line: line.reason),
        ],
        name=lambda line: line.subject,
        listing=listing,
    )


def growth_notice(exports: Sequence[ExportView], name: str) -> str | None:
    """Say what the clients of a volume that has grown have to do; None when there are none."""
    count = sum(export.connections for export in exports if export.volume == name)
    if not count:
        return None
    # The gateway serves the new space to them, but NBD has no message for a new size.
    return (
        f"notice: {count} NBD connection(s) keep the size of before: a client sees the new one when"
        " it connects again"
    )


def _print_volume(volume: VolumeView, output: Output) -> None:
    from pureflash.cli.render import local_time, print_object, print_rows
    from pureflash.units import format_size

    used = "-" if volume.used_bytes is None else format_size(volume.used_bytes)
    lines = [
        ("name", volume.name),
        ("id", str(volume.id)),
        ("state", f"{volume.state}{': ' + volume.reason if volume.reason else ''}"),
        ("I/O", volume.io),
        *([("leaves by", volume.leaves_by)] if volume.leaves_by else []),
        ("size", format_size(volume.size_bytes)),
        ("used", used),
        ("replicas", str(volume.replicas)),
        ("shard size", format_size(volume.shard_size_bytes)),
        ("created", local_time(volume.created_at)),
        ("version", str(volume.version)),
    ]
    print_object(volume, lines, name=volume.name, output=output)
    is_table = output is Output.TABLE and volume.replicas > 1
    if not is_table and output is not Output.WIDE:
        return
    shown = volume.shards if output is Output.WIDE else volume.shards[:SHARDS_SHOWN]
    typer.echo("")
    titles = ["SHARD", "EPOCH", "STATE", "PRIMARY", "IN-SYNC", "LEARNERS", "OUT", "REASON"]
    print_rows(titles, [_shard_row(shard) for shard in shown], is_bare=False)
    if len(shown) < len(volume.shards):
        typer.echo(f"and {len(volume.shards) - len(shown)} more: -o wide")


def _shard_row(shard: ShardView) -> list[str]:
    def named(*roles: str) -> str:
        return " ".join(_member_text(one) for one in shard.members if one.role in roles) or "-"

    return [
        str(shard.index),
        str(shard.epoch),
        shard.state,
        named("primary"),
        named("primary", "secondary"),
        named("learner"),
        named("out"),
        shard.reason,
    ]


def _member_text(member: MemberView) -> str:
    """Name the store of a copy; of a learner also how much of it has been copied."""
    if member.regions_left is None or member.regions_copied is None:
        return member.name
    total = member.regions_copied + member.regions_left
    return f"{member.name}:{100 * member.regions_copied // total if total else 100}%"
