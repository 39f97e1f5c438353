"""`pf bench`: where the time of a request goes, and how fast this machine is with us on it.

It makes a volume of its own, fills it, measures, and deletes it again; nothing else is touched.
What is printed holds for this machine at this moment: for figures to compare, `make bench` has
baselines beside each of ours.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from pureflash.cli.options import (
    DataOption,
    Output,
    OutputOption,
    ServerOption,
    connected,
    read_size,
)
from pureflash.cli.outcome import CommandProblem, Exit

app = typer.Typer(invoke_without_command=True)


class Compare(StrEnum):
    """What the volume is compared with."""

    LOCAL = "local"


@app.callback()
def run(
    context: typer.Context,
    compare: Annotated[
        Compare | None,
        typer.Option(help="Also measure the engine and one lane in this process."),
    ] = None,
    size: Annotated[str, typer.Option(help="Size of the volume that is made for it.")] = "256M",
    replicas: Annotated[
        int | None, typer.Option(help="Copies; if not given, as every volume.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.2, max=600, help="Of each load.")] = 3.0,
    depth: Annotated[int, typer.Option(min=1, max=256, help="Requests outstanding.")] = 32,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Show where the time of a 4 KiB write and read goes, and measure a load of each.

    A volume is made for it and deleted afterwards. Other load on the cluster shows in the figures.
    """
    if context.invoked_subcommand is not None:
        return
    from pureflash.cli import measure
    from pureflash.cli.core import load_core

    size_bytes = read_size(size, flag="--size")
    if size_bytes < measure.FILL_BYTES or size_bytes % measure.FILL_BYTES:
        raise CommandProblem(
            f"--size {size}: whole MiB, at least 1", exit_status=Exit.USAGE, next_step="try 256M"
        )
    core = load_core("load_volume", "load_lane", "load_disk")
    with connected(server, data) as api:
        report = measure.measure_cluster(
            core, api, size_bytes=size_bytes, replicas=replicas, seconds=seconds, depth=depth
        )
    if compare is Compare.LOCAL:
        place = measure.place_of(data)
        report.loads.extend(measure.compare_local(core, place, size_bytes, seconds, depth))
    measure.print_report(report, output, depth)


@app.command()
def sim(
    seconds: Annotated[float, typer.Option(min=0.2, max=3600, help="CPU time to use.")] = 10.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Measure the simulator: simulated seconds per second of one core.

    The worlds of seeds 1, 2, .. with 20 client operations per simulated second, faults as each seed
    chooses them.
    """
    from pureflash.cli import measure
    from pureflash.cli.core import load_core
    from pureflash.cli.render import print_object

    core = load_core("World")
    report = measure.simulate(core, seconds)
    lines = [
        ("worlds", str(report.worlds)),
        (
            "simulated",
            f"{report.simulated_s:.0f} s, {report.operations_per_simulated_s:.0f} requests/s",
        ),
        ("CPU", f"{report.cpu_s:.1f} s"),
        ("speed", f"{report.simulated_per_cpu:.0f} simulated seconds per CPU second"),
    ]
    print_object(report, lines, name=f"{report.simulated_per_cpu:.0f}", output=output)
