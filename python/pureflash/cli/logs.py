"""Show logs: the last lines of each file merged by time, then what is appended."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import typer

POLL_S: Final = 0.2


def human_line(line: str) -> tuple[str, str]:
    """Give (time stamp, text) of a log line; a line that is not ours is shown as it is."""
    try:
        entry = json.loads(line)
        head = f"{entry['ts']} {entry['level']:<7} {entry['process']:<10} "
        return entry["ts"], f"{head}{entry['event']}: {entry['msg']}"
    except (ValueError, KeyError, TypeError):
        return "", line


def print_logs(paths: Sequence[Path], count: int) -> dict[Path, int]:
    """Print the last `count` lines of each log by time; gives the position behind each."""
    shown: list[tuple[str, str]] = []
    positions: dict[Path, int] = {}
    for path in paths:
        data = path.read_bytes()
        positions[path] = len(data)
        lines = data.decode(errors="replace").splitlines()
        shown += [human_line(line) for line in lines[max(0, len(lines) - count) :]]
    for _, text in sorted(shown, key=lambda pair: pair[0]):
        typer.echo(text)
    return positions


def follow_logs(positions: dict[Path, int]) -> None:
    """Print what is appended, until interrupted; a rotated file is read from its start."""
    pause = threading.Event()  # never set: its wait is a pause that Ctrl-C ends at once
    while True:
        for path, position in positions.items():
            size = path.stat().st_size if path.exists() else 0
            start = position if size >= position else 0
            if size == start:
                continue
            with path.open("rb") as stream:
                stream.seek(start)
                data = stream.read(size - start)
            whole = data.rfind(b"\n") + 1
            positions[path] = start + whole
            for line in data[:whole].decode(errors="replace").splitlines():
                typer.echo(human_line(line)[1])
        pause.wait(POLL_S)
