"""The linearizability check against a slow oracle, and by hand."""

from collections.abc import Callable
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import event, given, settings

from pureflash.testing.model.linear import History, NotLinearizableError

TIME_MAX = 12


class Op(NamedTuple):
    """One operation on one block; `replied` None: never answered."""

    kind: str
    value: int
    called: int
    replied: int | None


State = tuple[int, frozenset[int], frozenset[int]]
"""Value of the block; reads that have happened; writes that took effect at least once."""


def closure(states: set[State], ops: list[Op], is_open: set[int]) -> set[State]:
    """Everything that can happen at one time: open writes take effect, again and again."""
    found = set(states)
    todo = list(states)
    while todo:
        value, read, done = todo.pop()
        for number in is_open:
            op = ops[number]
            if op.kind == "write":
                new = (op.value, read, done | {number})
            elif op.value == value:
                new = (value, read | {number}, done)
            else:
                continue
            if new not in found:
                found.add(new)
                todo.append(new)
    return found


def is_linearizable(ops: list[Op]) -> bool:
    """Walk through time with the set of all states that the block can be in."""
    states: set[State] = {(0, frozenset(), frozenset())}
    is_open: set[int] = set()
    for now in range(TIME_MAX + 1):
        is_open |= {number for number, op in enumerate(ops) if op.called == now}
        states = closure(states, ops, is_open)
        for number, op in enumerate(ops):
            if op.replied == now:
                is_read = op.kind == "read"
                states = {
                    (value, read, done)
                    for value, read, done in states
                    if number in (read if is_read else done)
                }
                is_open.discard(number)
    return bool(states)


def judge(ops: list[Op]) -> str | None:
    """Give the complaint of the check, or None."""
    calls: list[tuple[int, int, int, Callable[[History], None]]] = []
    for number, op in enumerate(ops):
        kind = "zero" if op.kind == "write" and op.value == 0 else op.kind

        def call(history: History, number: int = number, op: Op = op, kind: str = kind) -> None:
            written = [op.value] if kind == "write" else []
            history.invoke(op.called, (1, number), kind, 5, 1, written)

        calls.append((op.called, 0, number, call))
        if op.replied is not None:

            def reply(history: History, number: int = number, op: Op = op) -> None:
                assert op.replied is not None
                read = [op.value] if op.kind == "read" else []
                history.reply(op.replied, (1, number), 0, read)

            calls.append((op.replied, 1, number, reply))
    history = History()
    for _, _, _, act in sorted(calls, key=lambda call: call[:3]):
        act(history)
    try:
        history.check()
    except NotLinearizableError as cause:
        return str(cause)
    return None


times = st.integers(0, TIME_MAX - 1)


@st.composite
def histories(draw: st.DrawFn) -> list[Op]:
    count = draw(st.integers(1, 4))
    ops = []
    for value in range(1, count + 1):
        called = draw(times)
        replied = draw(st.one_of(st.none(), st.integers(called, min(called + 5, TIME_MAX))))
        is_zero = draw(st.integers(0, 3)) == 0
        ops.append(Op("write", 0 if is_zero else value, called, replied))
    for _ in range(draw(st.integers(0, 4))):
        called = draw(times)
        replied = draw(st.integers(called, min(called + 5, TIME_MAX)))
        ops.append(Op("read", draw(st.integers(0, count)), called, replied))
    return ops


@pytest.mark.slow
@settings(max_examples=800, deadline=None, derandomize=True)
@given(histories())
def test_the_check_and_the_oracle_agree(ops: list[Op]) -> None:
    expected = is_linearizable(ops)
    event(f"linearizable: {expected}")
    complaint = judge(ops)
    assert (complaint is None) == expected, (complaint, ops)


def write(value: int, called: int, replied: int | None) -> Op:
    return Op("write", value, called, replied)


def read(value: int, called: int, replied: int) -> Op:
    return Op("read", value, called, replied)


@pytest.mark.parametrize(
    ("ops", "complaint"),
    [
        ([read(0, 1, 2)], None),
        ([read(7, 1, 2)], "never written"),
        ([write(1, 1, 2), read(0, 3, 4)], "write of value 1"),
        ([write(1, 1, 2), read(1, 3, 4)], None),
        ([write(1, 1, 2), write(2, 3, 4), read(1, 5, 6)], "write of value 2"),
        ([write(1, 1, 2), write(2, 3, 4), read(2, 5, 6), read(1, 7, 8)], "stood from"),
        ([write(1, 1, 4), write(2, 1, 4), read(1, 5, 6)], None),
        ([write(1, 1, 4), write(2, 1, 4), read(1, 5, 6), read(2, 7, 8)], "stood from"),
        ([write(1, 1, None), read(1, 3, 4), read(0, 5, 6)], "read of value 1"),
        ([write(1, 5, 6), read(1, 1, 2)], "was called at 5"),
        ([write(1, 1, 2), write(0, 3, 4), read(1, 5, 6)], "zeroing"),
        # Sent again: it took effect, was overwritten, and took effect once more before the reply.
        ([write(1, 1, 9), write(2, 3, 4), read(1, 2, 2), read(2, 5, 5), read(1, 6, 6)], None),
        # After its acknowledgement it may not come back.
        ([write(1, 1, 2), write(2, 3, 4), read(2, 5, 5), read(1, 6, 6)], "stood from"),
        # An unanswered write may come back at any time.
        ([write(1, 1, None), write(2, 3, 4), read(2, 5, 5), read(1, 6, 6)], None),
    ],
)
def test_by_hand(ops: list[Op], complaint: str | None) -> None:
    found = judge(ops)
    assert is_linearizable(ops) == (complaint is None), "the table itself"
    assert (found is None) == (complaint is None), found
    if found is not None and complaint is not None:
        assert complaint in found
        assert found.startswith("block 5: ")


def test_a_failed_write_is_open_ended_and_a_failed_read_says_nothing() -> None:
    history = History()
    history.invoke(1, (1, 1), "write", 0, 2, [11, 12])
    history.reply(2, (1, 1), 60, [])
    history.invoke(3, (1, 2), "read", 0, 2, [])
    history.reply(4, (1, 2), 0, [0, 12])
    history.invoke(5, (1, 3), "read", 0, 1, [])
    history.reply(6, (1, 3), 60, [])
    history.invoke(7, (1, 4), "flush", 0, 0, [])
    assert history.open_count == 1
    history.check()
    assert history.open_count == 0


def test_every_request_has_one_reply() -> None:
    history = History()
    history.invoke(1, (1, 1), "read", 0, 1, [])
    with pytest.raises(NotLinearizableError, match="called twice"):
        history.invoke(2, (1, 1), "read", 0, 1, [])
    history.reply(3, (1, 1), 0, [0])
    for who in [(1, 1), (2, 1)]:
        with pytest.raises(NotLinearizableError, match="without being open"):
            history.reply(4, who, 0, [0])
    with pytest.raises(NotLinearizableError, match="called twice"):
        history.invoke(5, (1, 1), "read", 0, 1, [])
    history.invoke(6, (1, 2), "read", 0, 2, [])
    with pytest.raises(NotLinearizableError, match="read 1 of 2 blocks"):
        history.reply(7, (1, 2), 0, [0])


def test_values_of_writes_are_unique() -> None:
    for values in [[0], [4], [5, 6]]:
        history = History()
        history.invoke(1, (1, 1), "write", 0, 1, [4])
        with pytest.raises(NotLinearizableError, match="unique"):
            history.invoke(2, (1, 2), "write", 0, 1, values)


@pytest.mark.slow
def test_a_hundred_thousand_operations_are_judged_at_once() -> None:
    history = History()
    for number in range(1, 100_001):
        if number % 2:
            history.invoke(number * 2, (1, number), "write", number % 7, 1, [number])
        else:
            history.invoke(number * 2, (1, number), "read", (number - 1) % 7, 1, [])
        history.reply(number * 2 + 1, (1, number), 0, [] if number % 2 else [number - 1])
    history.check()
