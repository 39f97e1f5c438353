"""`pf job ...`, and waiting for a job."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Final

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
    from pureflash.client.api import Api
    from pureflash.model.rest import JobView

app = typer.Typer(help="Long work of the conductor.", no_args_is_help=True)
POLL_S: Final = 0.25
FINISHED: Final = frozenset({"succeeded", "failed", "cancelled"})


@app.command("list")
@lists
def list_all(
    listing: Listing,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """List jobs. Alias: ls."""
    from pureflash.cli.render import Column, local_time, moment_key, print_list

    with connected(server, data) as api:
        jobs = api.jobs()
    columns: list[Column[JobView]] = [
        Column("ID", lambda j: str(j.id), key=lambda j: j.id),
        Column("KIND", lambda j: j.kind),
        Column("TARGET", lambda j: j.target),
        Column("STATE", lambda j: j.state),
        Column("DONE", lambda j: f"{j.done} of {j.total} {j.unit}", key=lambda j: j.done),
        Column("REASON", lambda j: j.reason),
        Column(
            "CREATED",
            lambda j: local_time(j.created_at),
            is_wide=True,
            key=lambda j: moment_key(j.created_at),
        ),
        Column(
            "FINISHED",
            lambda j: local_time(j.finished_at) if j.finished_at else "-",
            is_wide=True,
            key=lambda j: moment_key(j.finished_at),
        ),
    ]
    print_list(jobs, columns, name=lambda j: str(j.id), listing=listing)


app.command("ls", hidden=True)(list_all)


@app.command()
def show(
    job: Annotated[int, typer.Argument(help="Id of the job.")],
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Show a job."""
    with connected(server, data) as api:
        found = api.job(job)
    print_job(found, output)


def wait_for_job(
    api: Api, job: JobView, *, is_enough: Callable[[JobView], bool] = lambda _: False
) -> JobView:
    """Wait until a job has finished, or is enough, with progress.

    Errors: CommandProblem when it failed.
    """
    from pureflash.cli.progress import Progress

    pause = threading.Event()  # never set: its wait is a pause that Ctrl-C ends at once
    with Progress(f"{job.kind} {job.target}", total=job.total, unit=job.unit) as progress:
        while job.state not in FINISHED and not is_enough(job):
            progress.update(job.done)
            pause.wait(POLL_S)
            job = _look_again(api, job)
        progress.update(job.done)
    if job.state in FINISHED and job.state != "succeeded":
        raise CommandProblem(
            f"job {job.id} {job.state}: {job.reason}",
            exit_status=Exit.FAILED,
            next_step=f"pf job show {job.id}",
        )
    return job


def _look_again(api: Api, job: JobView) -> JobView:
    """Ask how a job is. The conductor may be away meanwhile: the job is stored, and goes on."""
    from pureflash.errors import ClusterError

    try:
        return api.job(job.id)
    except ClusterError as problem:
        raise CommandProblem(
            f"{problem.message}; {job.kind} of {job.target} was begun as job {job.id} and goes on",
            exit_status=Exit.UNAVAILABLE,
            next_step=f"`pf job show {job.id}` as soon as it answers; do not begin it again",
        ) from problem


def print_job(job: JobView, output: Output) -> None:
    """Print one job."""
    from pureflash.cli.render import local_time, print_object

    lines = [
        ("job", str(job.id)),
        ("kind", job.kind),
        ("target", job.target),
        ("state", f"{job.state}{': ' + job.reason if job.reason else ''}"),
        ("done", f"{job.done} of {job.total} {job.unit}"),
        ("created", local_time(job.created_at)),
    ]
    print_object(job, lines, name=str(job.id), output=output)
