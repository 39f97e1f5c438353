"""What every command that lists things has: its form, columns, order and header.

`@lists` gives a command the four options and hands its function one `Listing`. The options are
written once here, so that a new list cannot lack one of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer

from pureflash.cli.options import NoHeaderOption, Output, OutputOption


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """How a list is printed. `columns` and `sort` are titles in small letters.

    `columns` empty: the usual ones. `sort` empty: as it came; `is_falling`: the largest first.
    """

    output: Output = Output.TABLE
    columns: tuple[str, ...] = ()
    sort: str = ""
    is_falling: bool = False
    is_bare: bool = False


_OPTIONS: Final = (
    ("output", OutputOption, Output.TABLE),
    (
        "columns",
        Annotated[str, typer.Option(help="Titles of the columns to show, with commas between.")],
        "",
    ),
    (
        "sort",
        Annotated[str, typer.Option(help="Title of a column to sort by; -TITLE: largest first.")],
        "",
    ),
    ("bare", NoHeaderOption, False),
)


def listing_of(*, output: Output, columns: str, sort: str, bare: bool) -> Listing:
    """Read the four options."""
    wanted = tuple(title.strip().lower() for title in columns.split(",") if title.strip())
    return Listing(
        output=output,
        columns=wanted,
        sort=sort.removeprefix("-").lower(),
        is_falling=sort.startswith("-"),
        is_bare=bare,
    )


def lists(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a list; its function has one parameter `listing` for them."""
    signature = inspect.signature(command, eval_str=True)
    assert "listing" in signature.parameters, "the function takes what the options say"

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        options = {name: arguments.pop(name) for name, _, _ in _OPTIONS}
        command(listing=listing_of(**options), **arguments)

    shown: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name != "listing":
            shown.append(parameter)
            continue
        shown += [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
            for name, annotation, default in _OPTIONS
        ]
    by_kind = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in shown]
    # The command line is made from these; `wraps` alone would show the function's own.
    run.__signature__ = signature.replace(parameters=by_kind)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in by_kind}
    del run.__wrapped__
    return run
