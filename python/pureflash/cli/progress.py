"""Progress of long work: a bar on a terminal, else one line per 10 s, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO

from pureflash.units import format_size

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_EVERY_S: Final = 10.0


class Progress:
    """A context manager; `update` takes the absolute amount, in `unit` ("bytes" or a count).

    `total` is None when nobody knows it, as of a pipe.
    """

    def __init__(
        self,
        title: str,
        *,
        total: int | None,
        unit: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; `stream` and `clock` are for tests."""
        self._title = title
        self._total = total
        self._unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._next_line = clock() + LINE_EVERY_S
        self._bar: tuple[RichProgress, TaskID] | None = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bars

            is_bytes = self._unit == "bytes"
            amounts = (
                [DownloadColumn(binary_units=True), TransferSpeedColumn()]
                if is_bytes
                else [MofNCompleteColumn(), TextColumn(self._unit)]
            )
            bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                *amounts,
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                transient=True,
            )
            bars.start()
            self._bar = bars, bars.add_task(self._title, total=self._total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar[0].stop()

    def update(self, done: int) -> None:
        """Show that `done` of the total is done."""
        if self._bar is not None:
            bars, task = self._bar
            bars.update(task, completed=done)
        elif self._clock() >= self._next_line:
            self._next_line = self._clock() + LINE_EVERY_S
            print(f"{self._title}: {self._amount(done)}", file=self._stream, flush=True)

    def _amount(self, done: int) -> str:
        if self._total is None:
            return format_size(done) if self._unit == "bytes" else f"{done} {self._unit}"
        percent = 100 * done // self._total if self._total else 100
        if self._unit == "bytes":
            return f"{format_size(done)} of {format_size(self._total)} ({percent} %)"
        return f"{done} of {self._total} {self._unit} ({percent} %)"
