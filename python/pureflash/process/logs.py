"""Log lines: one JSON object per line, appended whole, to a file that Rust appends to as well.

Fields: `ts` (RFC 3339 UTC), `level`, `process`, `event` (a stable identifier), `msg`, then ids of
objects. A line is at most 4 KiB and is written by one `write` on an O_APPEND descriptor, so lines
of two writers never mix. A WARN names a health code in `code`. Rotation: when a file has reached
16 MiB it becomes `.1`, and at most five files are kept.
"""

from __future__ import annotations

import datetime as dt
import os
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import structlog

from pureflash.errors import CallerError, Code

LINE_BYTES_MAX: Final = 4_096
FILE_BYTES_MAX: Final = 16 << 20
FILES_KEPT: Final = 5

LEVELS: Final = ("info", "warning", "error")
"""Levels from the least to the most urgent."""


class Log(Protocol):
    """What code that logs is given. `event` is stable; fields are ids and counts, JSON values."""

    def info(self, event: str, msg: str, **fields: object) -> None:
        """Note what happened."""

    def warning(self, event: str, msg: str, *, code: str, **fields: object) -> None:
        """Note what somebody should look at; `code` is a health code."""

    def error(self, event: str, msg: str, **fields: object) -> None:
        """Note what failed."""


class LineFile:
    """A log file that rotates itself; `write` never raises (a full disk must not stop a server)."""

    def __init__(self, path: Path) -> None:
        """Open or create `path` (0600) for appending; errors as `os.open`."""
        self._path = path
        self._descriptor = _open(path)
        self._is_torn = False
        self.lost_lines = 0

    def write(self, line: bytes) -> None:
        """Append one line, rotating first when the file is full."""
        try:
            if os.fstat(self._descriptor).st_size + len(line) > FILE_BYTES_MAX:
                self._rotate()
            # A line that a full disk took a part of is ended here, so that it spoils no other line.
            said = b"\n" + line if self._is_torn else line
            written = os.write(self._descriptor, said)
        except OSError:
            self.lost_lines += 1
            return
        if written == len(said):
            self._is_torn = False
        elif written:
            self._is_torn = True
            self.lost_lines += 1

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _rotate(self) -> None:
        for number in range(FILES_KEPT - 1, 0, -1):
            newer = self._path if number == 1 else Path(f"{self._path}.{number - 1}")
            if newer.exists():
                newer.replace(f"{self._path}.{number}")
        descriptor = _open(self._path)
        os.close(self._descriptor)
        self._descriptor = descriptor


class JsonLog:
    """A `Log` over structlog that writes to a `LineFile` or, without one, to standard error."""

    def __init__(
        self,
        process: str,
        path: Path | None,
        *,
        level: str = "info",
        clock: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        """Log as `process` what is at least `level`; `clock` gives the time of a line.

        Errors: CallerError INVALID for an unknown level.
        """
        if level not in LEVELS:
            raise CallerError(
                Code.INVALID,
                f"log.level is {level[:32]!r}",
                next_step=f"use one of {', '.join(LEVELS)}",
            )
        self._least = LEVELS.index(level)
        self._process = process
        self._clock = clock
        self._file = None if path is None else LineFile(path)
        self._logger: Any = structlog.wrap_logger(
            structlog.ReturnLogger(),
            processors=[structlog.stdlib.add_log_level, self._finish],
            wrapper_class=structlog.BoundLogger,
            cache_logger_on_first_use=False,
        )

    def info(self, event: str, msg: str, **fields: object) -> None:
        """Note what happened."""
        if self._least > LEVELS.index("info"):
            return
        self._logger.info(event, msg=msg, **fields)

    def warning(self, event: str, msg: str, *, code: str, **fields: object) -> None:
        """Note what somebody should look at."""
        if self._least > LEVELS.index("warning"):
            return
        self._logger.warning(event, msg=msg, code=code, **fields)

    def error(self, event: str, msg: str, **fields: object) -> None:
        """Note what failed."""
        self._logger.error(event, msg=msg, **fields)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _finish(self, _: Any, __: str, entry: MutableMapping[str, Any]) -> str:
        now = self._clock().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = encode_line(now, self._process, dict(entry))
        if self._file is not None:
            self._file.write(line)
        else:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
        return ""


def encode_line(now: str, process: str, entry: dict[str, Any]) -> bytes:
    """Make one line of at most `LINE_BYTES_MAX` bytes; a longer `msg` is cut and says so."""
    head = {"ts": now, "level": str(entry.pop("level")).upper(), "process": process}
    head["event"], head["msg"] = str(entry.pop("event")), str(entry.pop("msg"))
    line = msgspec.json.encode(head | entry, enc_hook=str)
    if len(line) >= LINE_BYTES_MAX:
        # Fields first: they may be what is long. JSON escapes can take six bytes for a character.
        head["msg"] = head["msg"][: LINE_BYTES_MAX // 8] + " [cut]"
        line = msgspec.json.encode(head)
    return line + b"\n"


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
