"""`pf conductor|store|gateway run` and `pf config show`.

`run` replaces this process by the server's: the pid stays, and what the CLI loaded does not.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pureflash.cli.options import NoHeaderOption, Output, OutputOption
from pureflash.cli.outcome import CommandProblem, Exit
from pureflash.cli.stores import store_app

conductor_app = typer.Typer(help="The control plane's process.", no_args_is_help=True)
gateway_app = typer.Typer(help="The front ends' process.", no_args_is_help=True)
config_app = typer.Typer(help="Settings of the processes.", no_args_is_help=True)

ConfigOption = Annotated[Path, typer.Option("--config", help="Settings file (TOML).")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="NAME=VALUE over file and environment.")
]


@conductor_app.command("run")
def run_conductor(config: ConfigOption, overrides: SetOption = None) -> None:
    """Run a conductor in the foreground."""
    _become("pureflash.api", config, overrides)


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
    config: ConfigOption,
    kind: Annotated[str, typer.Option(help="conductor, store or gateway.")] = "store",
    output: OutputOption = Output.TABLE,
    bare: NoHeaderOption = False,
) -> None:
    """Show every setting of a process with its source: flag, environment, file or default."""
    import json

    from pureflash.cli.render import print_rows
    from pureflash.model.settings import SCHEMAS, load_settings

    if kind not in SCHEMAS:
        raise CommandProblem(
            f"no process of kind {kind!r}",
            exit_status=Exit.USAGE,
            next_step=f"use one of {', '.join(SCHEMAS)}",
        )
    settings = load_settings(
        SCHEMAS[kind], text=config.read_text(), source=str(config), environment=os.environ
    )
    if output is Output.JSON:
        shown = {
            name: {"value": chosen.value, "source": chosen.source}
            for name, chosen in settings.values.items()
        }
        typer.echo(json.dumps(shown, indent=2))
        return
    rows = [[name, str(chosen.value), chosen.source] for name, chosen in settings.values.items()]
    rows += [[f"disk[{i}]", str(disk.path), str(config)] for i, disk in enumerate(settings.disks)]
    print_rows(["SETTING", "VALUE", "SOURCE"], rows, is_bare=bare)


def _become(package: str, config: Path, overrides: list[str] | None) -> NoReturn:
    command = [sys.executable, "-m", package, "--config", str(config)]
    for text in overrides or []:
        command += ["--set", text]
    os.execv(sys.executable, command)  # noqa: S606 - our own interpreter with our own module
