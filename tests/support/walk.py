"""Walks: pages of the documentation that are run as a reader would, and compared with their words.

In a block ```console a line that begins with `$ ` is a command (`> ` continues it), and the lines
below it are what it prints. `...` stands for anything within a line, alone on a line for any lines;
blanks count as one. All commands of a page run in one shell, and each has to succeed. A block that
is not run has `<!-- not run: REASON -->` above it.

`python -m tests.support.walk PAGE...` walks pages with the `pf` of PATH; it needs nothing beyond
the standard library (tools/clean_room.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

BLOCK: Final = re.compile(
    r"(?:<!-- not run: (?P<why>.+?) -->\n)?```console\n(?P<text>.*?)```", re.DOTALL
)
MARK: Final = "\x1e"
"""Before and after what each command prints."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a page, and the lines that it should print."""

    text: str
    expected: tuple[str, ...]


def commands_of(page: str) -> list[Command]:
    """Give the commands of a page that are run, in order."""
    found: list[Command] = []
    for block in BLOCK.finditer(page):
        if block["why"] is not None:
            continue
        text: str | None = None
        expected: list[str] = []
        for line in block["text"].splitlines():
            if line.startswith("$ "):
                if text is not None:
                    found.append(Command(text, tuple(expected)))
                text, expected = line[2:], []
            elif line.startswith("> ") and not expected:
                assert text is not None, "a command begins with $"
                text += "\n" + line[2:]
            else:
                assert text is not None, f"printed before any command: {line}"
                expected.append(line)
        if text is not None:
            found.append(Command(text, tuple(expected)))
    return found


def run(
    commands: Sequence[Command], *, environment: Mapping[str, str], folder: Path, seconds: float
) -> list[tuple[int, list[str]]]:
    """Run commands in one shell; gives the status and the lines of each that was reached."""
    script = ["exec 2>&1"]
    for command in commands:
        script += [command.text, f"printf '{MARK}%d{MARK}' $?"]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=dict(environment),
        timeout=seconds,
    )
    parts = done.stdout.split(MARK)
    return [
        (int(status), printed.splitlines())
        for printed, status in zip(parts[0:-1:2], parts[1::2], strict=True)
    ]


def matches(expected: Sequence[str], printed: Sequence[str]) -> bool:
    """Whether lines are as a page says."""
    reachable = {0}
    for line in expected:
        if line.strip() == "...":
            reachable = set(range(min(reachable, default=len(printed) + 1), len(printed) + 1))
            continue
        pattern = re.compile(
            ".*".join(
                r"\s+".join(re.escape(word) for word in re.split(r"\s+", part))
                for part in line.strip().split("...")
            )
        )
        reachable = {
            at + 1
            for at in reachable
            if at < len(printed) and pattern.fullmatch(printed[at].strip())
        }
    return len(printed) in reachable


def check(page: Path, *, environment: Mapping[str, str], folder: Path, seconds: float = 300) -> int:
    """Walk a page; gives the number of commands. Fails with what differs."""
    commands = commands_of(page.read_text())
    outcomes = run(commands, environment=environment, folder=folder, seconds=seconds)
    for command, (status, printed) in zip(commands, outcomes, strict=False):
        said = "\n".join(printed)
        assert status == 0, f"{page.name}: $ {command.text}\nexits with {status}:\n{said}"
        wanted = "\n".join(command.expected)
        assert matches(command.expected, printed), (
            f"{page.name}: $ {command.text}\nprints\n{said}\nand not\n{wanted}"
        )
    assert len(outcomes) == len(commands), "every command was reached"
    return len(commands)


def main(names: Sequence[str]) -> int:
    """Walk pages, each in an empty folder; exit status 1 when one does not do as it says."""
    failed = False
    for page in map(Path, names):
        started = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                count = check(page, environment=os.environ, folder=Path(folder))
        except AssertionError as problem:
            print(f"{page}: FAILED: {problem}", flush=True)
            failed = True
        else:
            print(f"{page}: {count} commands in {time.monotonic() - started:.1f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
