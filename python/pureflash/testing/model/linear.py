"""Check that each block of a volume behaved like one register, from what its clients saw.

Theory of operation. Every block that is written carries a value of its own, 0 stands for zeros, so
a read names its write and each block is judged alone. What may happen is what the documents
promise: an acknowledged write took effect at least once between its call and its reply; a session
may send it again until then, so it may take effect *several times* in that interval; a write that
failed or was never answered may take effect at any time after its call, or never.

That makes judging simple, O(n log n) per block. Values that were seen *after* their write was
acknowledged must have stood all the time between: a *reign* of the value, from the reply of the
write to the call of the last such read. Reigns of different values must not overlap. All else needs
only one moment: a read while its write is open (the write takes effect then and there), and an
acknowledged write that nobody read afterwards. Such a moment has to exist outside all reigns of
other values. Zeros have no single write: such a read takes any open zeroing whose moment exists,
else the reign begins at the newest zeroing, or the start of all, that was over before the read.

Calls and replies at the same time are concurrent. Times are integers of any unit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

NEVER: Final = 1 << 63
"""Later than every time: the reply of a write that was not acknowledged."""
BEGIN: Final = -1
"""Before every time: when the volume was all zeros."""


class NotLinearizableError(Exception):
    """No order of the operations explains what clients saw; the text names block and times."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Time from a call to its reply."""

    called: int
    replied: int


@dataclass(slots=True)
class Block:
    """Everything that happened to one block. `writes` is by value and has no 0."""

    writes: dict[int, Interval] = field(default_factory=dict)
    reads: dict[int, list[Interval]] = field(default_factory=lambda: defaultdict(list))
    zeros: list[Interval] = field(default_factory=list)


class Reigns:
    """Times in which a block certainly held one value; disjoint, in order."""

    def __init__(self, found: Iterable[tuple[int, int, int]]) -> None:
        """Take (start, end, value) of each; raises when two values would overlap."""
        self._found: list[tuple[int, int, int]] = []
        for reign in sorted(found):
            self._found.append(self._merged(reign))
        self._starts = [start for start, _, _ in self._found]

    def _merged(self, reign: tuple[int, int, int]) -> tuple[int, int, int]:
        """Give it, or its union with the one before it when both overlap and are of one value."""
        start, end, value = reign
        if not self._found or start >= self._found[-1][1]:
            return reign
        other_start, other_end, other = self._found.pop()
        if value != other:
            raise NotLinearizableError(
                f"value {value} stood from {start} to {end}, "
                f"{other} from {other_start} to {other_end}"
            )
        return other_start, max(end, other_end), value

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return iter(self._found)

    def around(self, moment: Interval, value: int) -> tuple[int, int, int] | None:
        """Give the reign of another value that `moment` lies in, if there is one."""
        place = bisect_left(self._starts, moment.called) - 1
        if place < 0:
            return None
        start, end, other = self._found[place]
        assert start < moment.called, "the last one that began before"
        return (start, end, other) if moment.replied < end and other != value else None

    def check(self, moment: Interval, value: int, what: str) -> None:
        """Raise when `moment` lies within the reign of another value."""
        if (found := self.around(moment, value)) is not None:
            start, end, other = found
            raise NotLinearizableError(
                f"{what} of value {value} between {moment.called} and {moment.replied}, "
                f"while {other} stood from {start} to {end}"
            )


def check_block(block: Block) -> None:
    """Raise `NotLinearizableError` when no order explains what was read from this block."""
    reigns = Reigns(_reigns_of_values(block))
    late: list[tuple[int, int, int]] = []
    zeros = sorted(block.zeros, key=lambda zero: zero.replied)
    ends = [zero.replied for zero in zeros]
    for read in block.reads.get(0, ()):
        if not _has_open_zero(zeros, ends, read, reigns):
            newest = bisect_left(ends, read.called) - 1
            start = ends[newest] if newest >= 0 else BEGIN
            late.append((start, read.called, 0))
    # Reigns of zeros overlap one another freely: they are one value.
    reigns = Reigns([*reigns, *late])
    for value, write in block.writes.items():
        _check_moments(block, value, write, reigns)
    for zero in zeros:
        if zero.replied != NEVER:
            reigns.check(zero, 0, "zeroing")


def _reigns_of_values(block: Block) -> Iterator[tuple[int, int, int]]:
    for value, reads in block.reads.items():
        if value == 0:
            continue
        if (write := block.writes.get(value)) is None:
            first = reads[0]
            raise NotLinearizableError(
                f"value {value}, read between {first.called} and {first.replied}, "
                "was never written to this block"
            )
        late = max((read.called for read in reads), default=BEGIN)
        if late > write.replied:
            yield write.replied, late, value


def _has_open_zero(zeros: list[Interval], ends: list[int], read: Interval, reigns: Reigns) -> bool:
    """Whether a zeroing that was open during the read could take effect in it.

    Looks at all zeroings that end after the call; a history has few of them open at once.
    """
    for place in range(bisect_left(ends, read.called), len(zeros)):
        zero = zeros[place]
        moment = Interval(max(zero.called, read.called), min(zero.replied, read.replied))
        if moment.called <= moment.replied and reigns.around(moment, 0) is None:
            return True
    return False


def _check_moments(block: Block, value: int, write: Interval, reigns: Reigns) -> None:
    """Check what needs only one moment: early reads, and a write that nobody read afterwards."""
    reads = block.reads.get(value, [])
    has_late = any(read.called > write.replied for read in reads)
    if write.replied != NEVER and not has_late:
        reigns.check(write, value, "write")
    for read in reads:
        if read.replied < write.called:
            raise NotLinearizableError(
                f"value {value} was read between {read.called} and {read.replied}, "
                f"its write was called at {write.called}"
            )
        if read.called > write.replied or (has_late and read.replied >= write.replied):
            continue  # in the reign of the value, or at its very start
        moment = Interval(max(read.called, write.called), min(read.replied, write.replied))
        reigns.check(moment, value, "read")


@dataclass(slots=True)
class _Call:
    op: str
    first: int
    count: int
    values: list[int]
    called: int


class History:
    """Calls and replies of the clients of one volume, in the order in which they happened."""

    def __init__(self) -> None:
        self.blocks: defaultdict[int, Block] = defaultdict(Block)
        self._open: dict[tuple[int, int], _Call] = {}
        self._answered: set[tuple[int, int]] = set()
        self._writers: set[int] = set()

    def invoke(
        self,
        at: int,
        who: tuple[int, int],
        op: str,
        first: int,
        count: int,
        values: list[int],
    ) -> None:
        """Take the call of `who` = (client, id); `values` are those of a write, one per block."""
        if who in self._open or who in self._answered:
            raise NotLinearizableError(f"operation {who} was called twice")
        if op == "write":
            if len(values) != count or 0 in values or self._writers.intersection(values):
                raise NotLinearizableError(f"operation {who}: values of writes are unique")
            self._writers.update(values)
        self._open[who] = _Call(op, first, count, values, at)

    def reply(self, at: int, who: tuple[int, int], status: int, values: list[int]) -> None:
        """Take the reply; `values` are those of a read, one per block."""
        if (call := self._open.pop(who, None)) is None:
            raise NotLinearizableError(f"operation {who} was answered without being open")
        self._answered.add(who)
        is_read = call.op == "read"
        if is_read and status == 0 and len(values) != call.count:
            raise NotLinearizableError(f"operation {who} read {len(values)} of {call.count} blocks")
        if is_read and status == 0:
            interval = Interval(call.called, at)
            for block, value in enumerate(values, call.first):
                self.blocks[block].reads[value].append(interval)
        elif not is_read:
            self._keep(call, at if status == 0 else NEVER)

    def _keep(self, call: _Call, replied: int) -> None:
        interval = Interval(call.called, replied)
        for place in range(call.count if call.op in {"write", "zero"} else 0):
            block = self.blocks[call.first + place]
            if call.op == "zero":
                block.zeros.append(interval)
            else:
                block.writes[call.values[place]] = interval

    @property
    def open_count(self) -> int:
        """Number of calls without a reply."""
        return len(self._open)

    def check(self) -> None:
        """Judge every block; calls without a reply count as failed. The history is over then."""
        for call in self._open.values():
            self._keep(call, NEVER)
        self._open.clear()
        for number, block in sorted(self.blocks.items()):
            try:
                check_block(block)
            except NotLinearizableError as cause:
                raise NotLinearizableError(f"block {number}: {cause}") from None
