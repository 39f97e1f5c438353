"""What `pf conductor recover-config` shows before a person decides, and afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pureflash.cli.options import Output

if TYPE_CHECKING:
    from pureflash.model.rest import RecoveryView

WORD = "recover"
"""What a person types to agree."""


def plan_lines(plan: RecoveryView) -> list[str]:
    """Say everything that a person has to know before deciding."""
    lines = [f"The conductor lost its memory: {plan.reason}."] if plan.reason else []
    if plan.changes:
        lines.append("Its records would be rebuilt from what the stores hold:")
        width = max(len(change.subject) for change in plan.changes)
        lines += [f"  {change.subject.ljust(width)}  {change.change}" for change in plan.changes]
    else:
        lines.append("Its records are what the stores hold; nothing in them would change.")
    if plan.given_up:
        names = ", ".join(plan.given_up)
        lines.append(f"You vouch that {names} and the disks there are lost for good.")
    return lines


def print_recovered(plan: RecoveryView, output: Output) -> None:
    """Print the plan of a dry run, or the record of what was done."""
    import typer

    from pureflash.cli.jobs import print_job
    from pureflash.cli.render import print_object

    if output not in (Output.TABLE, Output.WIDE):
        print_object(plan, [], name="conductor", output=output)
    elif plan.job is None:
        typer.echo("\n".join([*plan_lines(plan), "nothing was changed"]))
    else:
        print_job(plan.job, output)
