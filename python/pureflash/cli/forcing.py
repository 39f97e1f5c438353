"""What `pf volume force-accept` shows before a person decides, and afterwards."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING

from pureflash.cli.options import Output

if TYPE_CHECKING:
    from pureflash.model.rest import ForceAcceptView, ForcedCopy

TITLES = ("COPY ON", "STORE IS", "ROLE", "COMPLETE UP TO", "NOTE")


def caller_name() -> str:
    """Give the name of the user who runs the command, for the record of the decision."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "a user without a name"  # a container may run under a number alone


def plan_lines(plan: ForceAcceptView) -> list[str]:
    """Say everything that a person has to know before deciding."""
    rows = [TITLES, *(_row(copy, plan.store) for copy in plan.copies)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(TITLES))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines = [f"volume {plan.volume}, shard {plan.shard}, epoch {plan.epoch}:", *table]
    lines.append(f"The copy on {plan.store} would count, and the others would be copied from it.")
    lines.append(f"What is lost: {plan.loss}.")
    if plan.revoked:
        names = ", ".join(plan.revoked)
        lines.append(f"You vouch that the present process of {names} is off for good.")
    lines.append("This cannot be undone.")
    return lines


def print_forced(plan: ForceAcceptView, output: Output) -> None:
    """Print the plan of a dry run, or the record of what was done."""
    from pureflash.cli.jobs import print_job
    from pureflash.cli.render import print_object

    if output not in (Output.TABLE, Output.WIDE):
        print_object(plan, [], name=plan.volume, output=output)
    elif plan.job is None:
        print_lines([*plan_lines(plan), "nothing was changed"])
    else:
        print_job(plan.job, output)


def print_lines(lines: list[str]) -> None:
    """Print lines to a person."""
    import typer

    for line in lines:
        typer.echo(line)


def _row(copy: ForcedCopy, chosen: str) -> tuple[str, ...]:
    from pureflash.model.conf import operation_text

    last = "unknown" if copy.last_seq is None else f"operation {operation_text(copy.last_seq)}"
    mark = " *" if copy.name == chosen else ""
    return (f"{copy.name}{mark}", copy.state, copy.role, last, copy.note)
