"""The command tree of `pf`: nouns, verbs, flags, and nothing that decides.

Each command imports what it needs when it runs; this module may import only the standard library
and typer at the top (a test holds it to that, and to 0.4 s for `pf --help`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from pureflash.cli import bench, clusters, exports, images, jobs, processes, stores, volumes
from pureflash.cli.options import DataOption, Output, OutputOption
from pureflash.cli.outcome import CommandProblem, Exit, Terminated, flush_output, present

app = typer.Typer(
    name="pf",
    help="PureFlash: shared, replicated block storage from the NVMe drives of ordinary servers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("up")(clusters.up)
app.command("down")(clusters.down)
app.command("status")(clusters.status)
app.command("logs")(clusters.logs)
app.add_typer(volumes.app, name="volume")
app.add_typer(volumes.app, name="vol", hidden=True)
app.add_typer(exports.app, name="export")
app.add_typer(images.app, name="image")
app.add_typer(stores.store_app, name="store")
app.add_typer(stores.disk_app, name="disk")
app.add_typer(jobs.app, name="job")
app.add_typer(bench.app, name="bench")
app.add_typer(processes.config_app, name="config")
app.add_typer(processes.conductor_app, name="conductor")
app.add_typer(processes.gateway_app, name="gateway")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(_version_line())
        raise typer.Exit


def _version_line() -> str:
    import pureflash

    return f"pureflash {pureflash.__version__}"


@app.callback()
def pf(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Show the version of the package; `pf version` shows more.",
        ),
    ] = False,
) -> None:
    """Take the options that stand before any command."""


@app.command()
def version(output: OutputOption = Output.TABLE) -> None:
    """Show the version of the package and of its Rust core."""
    import platform

    import pureflash
    from pureflash.cli.render import print_data

    core = _core_facts()
    facts = {
        "version": pureflash.__version__,
        "core": core,
        "python": platform.python_version(),
    }
    if output in (Output.JSON, Output.YAML):
        print_data(facts, output)
        return
    if output is Output.NAME:
        typer.echo(pureflash.__version__)
        return
    typer.echo(_version_line())
    typer.echo(
        f"core      {core['version']} ({core['profile']}, opt-level {core['opt_level']},"
        f" {core['target']})"
    )
    typer.echo(f"python    {facts['python']}")


@app.command()
def doctor(data: DataOption = None, output: OutputOption = Output.TABLE) -> None:
    """Check whether this machine can run PureFlash; says what to do about each finding."""
    from pureflash.cli import diagnosis, machine
    from pureflash.cli.render import print_data
    from pureflash.client import context

    place = context.resolve_data(data)
    findings = diagnosis.diagnose(machine.examine(place.directory))
    if output in (Output.JSON, Output.YAML):
        print_data(diagnosis.as_document(findings, place), output)
    elif output is Output.NAME:
        typer.echo(diagnosis.worst_state(findings))
    else:
        diagnosis.print_table(findings, place)
    if diagnosis.worst_state(findings) is diagnosis.State.FAIL:
        raise typer.Exit(Exit.FAILED)


@app.command()
def completion(
    shell: Annotated[str, typer.Argument(help="bash, zsh or fish.")],
) -> None:
    """Print the completion script of a shell; `pf --install-completion` installs it."""
    # What typer's own --show-completion prints; its module lists no exports at all.
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    shells = ("bash", "zsh", "fish")
    if shell not in shells:
        raise CommandProblem(
            f"no completion for the shell {shell!r}",
            exit_status=Exit.USAGE,
            next_step=f"use one of {', '.join(shells)}",
        )
    typer.echo(get_completion_script(prog_name="pf", complete_var="_PF_COMPLETE", shell=shell))


def run(arguments: Sequence[str]) -> int:
    """Run one `pf` command line and give its exit status; prints results and errors."""
    command = typer.main.get_command(app)
    status: int = Exit.OK
    problem: BaseException | None = None
    try:
        command.main(args=list(arguments), prog_name="pf")
    except SystemExit as exit_request:  # typer's own end: help, usage errors, typer.Exit
        status = exit_request.code if isinstance(exit_request.code, int) else Exit.FAILED
    except (Exception, KeyboardInterrupt, Terminated) as found:  # the edge: no trace reaches a user
        problem = found
    else:
        raise AssertionError("typer's standalone mode always ends with SystemExit")
    unwritten = flush_output()
    if unwritten is not None and (isinstance(problem, OSError) or not (problem or status)):
        problem = unwritten
    return int(status if problem is None else present(problem))


def _core_facts() -> dict[str, object]:
    from pureflash.cli.core import load_core

    info = load_core().build_info()
    return {
        "version": info.version,
        "profile": info.profile,
        "opt_level": info.opt_level,
        "target": info.target,
        "features": info.features,
    }
