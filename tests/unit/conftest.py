"""`--part 2/4`: the second of four parts of the unit tests, dealt test by test (tools/check.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pytest

_T = TypeVar("_T")


def deal(items: Sequence[_T], chosen: str) -> tuple[list[_T], list[_T]]:
    """Give what belongs to the part `K/N`, every Nth from the Kth, and what does not.

    Errors: pytest.UsageError for a part that is none.
    """
    first, _, second = chosen.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise pytest.UsageError(f"--part {chosen}: say 1/2 for the first of two")
    ours = range(int(first) - 1, len(items), int(second))
    return [items[at] for at in ours], [one for at, one in enumerate(items) if at not in ours]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--part", default="1/1", metavar="K/N", help="run the Kth of N parts only")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one part of what the markers have chosen, so that the parts are even."""
    items[:], others = deal(items, config.getoption("--part"))
    config.hook.pytest_deselected(items=others)
