"""The drawing above a table of transitions says what the table says.

That of a replica's roles is tested beside it, in crates/shard/src/replica/role.rs.
"""

from __future__ import annotations

import inspect

import pytest

from pureflash.model import domain
from pureflash.model.domain import (
    JOB_TRANSITIONS,
    STORE_TRANSITIONS,
    JobState,
    StoreEvent,
    StoreState,
    next_job_state,
    next_store_state,
)


def drawing_above(name: str) -> list[list[str]]:
    """Give the rows of the drawing above a table, as words; the first has the columns' names."""
    lines = inspect.getsource(domain).splitlines()
    end = next(at for at, line in enumerate(lines) if line.startswith(f"{name}:"))
    rows: list[list[str]] = []
    for line in reversed(lines[:end]):
        if line == "#":
            return rows[::-1]
        rows.append(line.removeprefix("#").split())
    raise AssertionError(f"no drawing above {name}")


def test_the_drawing_of_a_job_is_its_table() -> None:
    columns, *rows = drawing_above("JOB_TRANSITIONS")
    assert columns == [row[0] for row in rows] == list(JobState)
    drawn = {row[0]: dict(zip(columns, row[1:], strict=True)) for row in rows}
    for was, becomes in JOB_TRANSITIONS.items():
        assert drawn[was] == {state: "x" if state in becomes else "." for state in JobState}


def test_the_drawing_of_a_store_is_its_table() -> None:
    columns, *rows = drawing_above("STORE_TRANSITIONS")
    assert columns == list(StoreEvent)
    assert [row[0] for row in rows] == list(StoreState)
    drawn = {
        (StoreState(row[0]), StoreEvent(event)): cell
        for row in rows
        for event, cell in zip(columns, row[1:], strict=True)
        if cell != "."
    }
    assert drawn == STORE_TRANSITIONS


def test_a_step_that_is_not_drawn_crashes() -> None:
    for was in JobState:
        for wanted in JobState:
            if wanted is was or wanted in JOB_TRANSITIONS[was]:
                assert next_job_state(was, wanted) is wanted
            else:
                with pytest.raises(AssertionError, match="job: "):
                    next_job_state(was, wanted)
    for state in StoreState:
        for event in StoreEvent:
            if (state, event) in STORE_TRANSITIONS:
                assert next_store_state(state, event) is STORE_TRANSITIONS[state, event]
            else:
                with pytest.raises(AssertionError, match="store: "):
                    next_store_state(state, event)
