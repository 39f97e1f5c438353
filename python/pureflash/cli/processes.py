"""`pf conductor|store|gateway run` and `pf config show`.

`run` replaces this process by the server's: the pid stays, and what the CLI loaded does not.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from pureflash.cli.options import (
    DataOption,
    DryRunOption,
    NoHeaderOption,
    Output,
    OutputOption,
    ServerOption,
    YesOption,
    confirm,
    connected,
)
from pureflash.cli.outcome import CommandProblem, Exit, unreadable
from pureflash.cli.stores import store_app

conductor_app = typer.Typer(help="The control plane's process.", no_args_is_help=True)
gateway_app = typer.Typer(help="The front ends' process.", no_args_is_help=True)
config_app = typer.Typer(help="Settings of the processes.", no_args_is_help=True)

KINDS: Final = {"c": "conductor", "s": "store", "g": "gateway"}
"""What the names begin with that `pf up` gives to processes."""

ConfigOption = Annotated[Path, typer.Option("--config", help="Settings file (TOML).")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="NAME=VALUE over file and environment.")
]


@conductor_app.command("run")
def run_conductor(config: ConfigOption, overrides: SetOption = None) -> None:
    """Run a conductor in the foreground."""
    _become("pureflash.api", config, overrides)


@conductor_app.command("recover-config")
def recover_config(
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without",
            help="Store that is lost for good, with its disks, or one disk of it as in s1/0; may be"
            " given more than once.",
        ),
    ] = None,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Rebuild the records of a conductor that lost its memory from what the stores hold."""
    from msgspec import structs

    from pureflash.cli.forcing import caller_name
    from pureflash.cli.recovering import WORD, plan_lines, print_recovered
    from pureflash.model.rest import RecoverConfig

    wish = RecoverConfig(by=caller_name(), without=without or [], dry_run=True)
    with connected(server, data) as api:
        plan = api.recover_config(wish)
        if not dry_run:
            confirm("\n".join(plan_lines(plan)), WORD, is_agreed=yes, output=output)
            plan = api.recover_config(structs.replace(wish, dry_run=False))
    print_recovered(plan, output)


@store_app.command("run")
def run_store(config: ConfigOption, overrides: SetOption = None) -> None:
    """Run a store in the foreground."""
    _become("pureflash.store", config, overrides)


@gateway_app.command("run")
def run_gateway(config: ConfigOption, overrides: SetOption = None) -> None:
    """Run a gateway in the foreground."""
    _become("pureflash.gateway", config, overrides)


@config_app.command("show")
def show(
    name: Annotated[
        str | None, typer.Argument(help="Process of the cluster of this machine: c1, s1 .., g1.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings file (TOML), instead of a name.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="conductor, store or gateway; if not given, as the first letter of the name says."
        ),
    ] = None,
    output: OutputOption = Output.TABLE,
    bare: NoHeaderOption = False,
    data: DataOption = None,
) -> None:
    """Show every setting of a process with its source: environment, file or default.

    The environment is that of this command, not that in which the process was started.
    """
    from pureflash.cli.render import print_data, print_rows
    from pureflash.model.settings import SCHEMAS, load_settings

    config = _settings_file(name, data) if config is None else config
    if kind is None:
        kind = KINDS.get(config.stem[:1], "store")
    if kind not in SCHEMAS:
        raise CommandProblem(
            f"no process of kind {kind!r}",
            exit_status=Exit.USAGE,
            next_step=f"use one of {', '.join(SCHEMAS)}",
        )
    try:
        text = config.read_text()
    except (OSError, UnicodeDecodeError) as cause:
        raise unreadable(
            config, cause, next_step="name a settings file that you may read"
        ) from cause
    settings = load_settings(SCHEMAS[kind], text=text, source=str(config), environment=os.environ)
    if output is Output.NAME:
        typer.echo("\n".join(settings.values))
        return
    if output in (Output.JSON, Output.YAML):
        shown = {
            name: {"value": chosen.value, "source": chosen.source}
            for name, chosen in settings.values.items()
        }
        print_data(shown, output)
        return
    rows = [[name, str(chosen.value), chosen.source] for name, chosen in settings.values.items()]
    rows += [[f"disk[{i}]", str(disk.path), str(config)] for i, disk in enumerate(settings.disks)]
    print_rows(["SETTING", "VALUE", "SOURCE"], rows, is_bare=bare)


def _settings_file(name: str | None, data: Path | None) -> Path:
    """Find the settings of a process of the cluster of this machine by its name."""
    from pureflash.client.context import resolve_data
    from pureflash.model.layout import Layout

    place = resolve_data(data)
    layout = Layout(place.directory)
    known = sorted(path.stem for path in layout.config("x").parent.glob("*.toml"))
    if name in known:
        return layout.config(name)
    missing = "no process was named" if name is None else f"there is no process {name[:32]!r}"
    raise CommandProblem(
        f"{missing}; the cluster is in {place.directory} (from {place.source})",
        exit_status=Exit.USAGE if name is None else Exit.NOT_FOUND,
        next_step=f"use one of {', '.join(known)}"
        if known
        else "start a cluster with `pf up`, or name a file with --config",
    )


def _become(package: str, config: Path, overrides: list[str] | None) -> NoReturn:
    command = [sys.executable, "-m", package, "--config", str(config)]
    for text in overrides or []:
        command += ["--set", text]
    os.execv(sys.executable, command)  # noqa: S606 - our own interpreter with our own module
