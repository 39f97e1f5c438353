"""The common entry of the processes: arguments, settings, the event loop, and how a start fails."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from pureflash.errors import PureFlashError
from pureflash.model.settings import SCHEMAS, Settings, load_settings
from pureflash.process.lifecycle import die_with_parent, raise_descriptor_limit
from pureflash.process.logs import JsonLog


def run_process(
    kind: str, run: Callable[[Settings], Awaitable[None]], arguments: Sequence[str]
) -> int:
    """Run a process of `kind` until it stops; 0 after an ordered stop, 1 when it failed.

    A failure is said on standard error and in the log, in one line that tells what to do.
    """
    parser = argparse.ArgumentParser(prog=f"pf {kind} run")
    parser.add_argument("--config", type=Path, required=True, help="settings file (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--parent-pid", type=int, help="stop when this process ends")
    options = parser.parse_args(arguments)
    if options.parent_pid is not None:
        die_with_parent(options.parent_pid)
    raise_descriptor_limit()
    log_file: Path | None = None
    name = kind
    try:
        flags = dict(text.split("=", 1) for text in options.set)
        settings = load_settings(
            SCHEMAS[kind],
            text=options.config.read_text(),
            source=str(options.config),
            environment=os.environ,
            flags=flags,
        )
        log_file, name = settings.path("log.file"), settings.text("node.id")
        asyncio.run(_as_coroutine(run, settings))
    except (PureFlashError, OSError, UnicodeDecodeError) as problem:
        text = str(problem)
        print(f"pf {kind} run: {text}", file=sys.stderr)  # noqa: T201 - the user sees this
        if log_file is not None:
            log = JsonLog(name, log_file)
            log.error("process.failed", text)
            log.close()
        return 1
    return 0


async def _as_coroutine(run: Callable[[Settings], Awaitable[None]], settings: Settings) -> None:
    await run(settings)
