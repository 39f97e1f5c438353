"""One child process: started, awaited, started again, stopped.

The child gets PDEATHSIG through `--parent-pid`; what it prints goes to a file, because its log is
the place for everything that it means to say. Readiness is NAME.ready with the pid of this life.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pureflash.process.lifecycle import Ready, read_ready
from pureflash.process.logs import Log
from pureflash.supervisor.policy import ChildState, History, after_death

READY_POLL_S: Final = 0.05
"""How often NAME.ready is looked for; it appears once per life."""

WORDS_BYTES_MAX: Final = 1_024
"""Of what a child said last: one line with a cause and a next step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """How to run a child. `command` is complete but for `--parent-pid`."""

    name: str
    command: tuple[str, ...]
    ready: Path
    output: Path


class Child:
    """A child that is kept running until `stop`."""

    def __init__(
        self,
        spec: ChildSpec,
        *,
        restart_delay_ms: int,
        log: Log,
        on_exit: Callable[[str, Ready | None], Awaitable[None]],
        on_change: Callable[[], None],
    ) -> None:
        """Prepare; `on_exit` is told each death with what the child had announced."""
        self.spec = spec
        self.state = ChildState.STOPPED
        self.reason = ""
        self.deaths = 0
        self.pid: int | None = None
        self.is_ready = asyncio.Event()
        self._restart_delay_ms = restart_delay_ms
        self._log = log
        self._on_exit = on_exit
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._is_stopping = asyncio.Event()

    async def run(self) -> None:
        """Keep the child running until it is stopped or given up."""
        history = History()
        while not self._is_stopping.is_set():
            started_ms = time.monotonic_ns() // 1_000_000
            ready, status = await self._live()
            if self._is_stopping.is_set():
                break
            self.deaths += 1
            self.reason = f"it ended {_describe(status)}{self._last_words(status)}"
            await self._on_exit(self.spec.name, ready)
            following = after_death(
                history,
                started_ms=started_ms,
                now_ms=time.monotonic_ns() // 1_000_000,
                first_ms=self._restart_delay_ms,
            )
            if following is None:
                self.reason += f", {self.deaths} times; it is not started again"
                self._enter(ChildState.GIVEN_UP)
                return
            history = following
            self._enter(ChildState.WAITING)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(history.delay_ms / 1000):
                    await self._is_stopping.wait()
        self._enter(ChildState.STOPPED)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask the child to end, and never start it again."""
        self._is_stopping.set()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _last_words(self, status: int) -> str:
        """Give what the child said when it refused to run; one that was killed says nothing."""
        if status <= 0:
            return ""
        with self.spec.output.open("rb") as file:
            file.seek(max(0, self.spec.output.stat().st_size - WORDS_BYTES_MAX))
            lines = file.read().decode(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "")
        return f": {said}" if said else ""

    async def _live(self) -> tuple[Ready | None, int]:
        """Run one life; gives what it announced and its exit status."""
        self.spec.ready.unlink(missing_ok=True)
        self.is_ready.clear()
        descriptor = os.open(
            self.spec.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
        )
        try:
            process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                "--parent-pid",
                str(os.getpid()),
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
            )
        finally:
            os.close(descriptor)
        self._process, self.pid = process, process.pid
        self._enter(ChildState.STARTING)
        if self._is_stopping.is_set():
            self.stop()
        watcher = asyncio.create_task(self._await_ready(process.pid))
        status = await process.wait()
        watcher.cancel()
        (ready,) = await asyncio.gather(watcher, return_exceptions=True)
        announced = read_ready(self.spec.ready) if not isinstance(ready, Ready) else ready
        is_of_this_life = announced is not None and announced.pid == process.pid
        self.spec.ready.unlink(missing_ok=True)
        self.is_ready.clear()
        self.pid = None
        return (announced if is_of_this_life else None), status

    async def _await_ready(self, pid: int) -> Ready:
        while True:
            ready = read_ready(self.spec.ready)
            if ready is not None and ready.pid == pid:
                self.is_ready.set()
                self._enter(ChildState.RUNNING)
                return ready
            await asyncio.sleep(READY_POLL_S)

    def _enter(self, state: ChildState) -> None:
        self.state = state
        if state is ChildState.GIVEN_UP:
            self._log.warning(
                "child.degraded",
                f"{self.spec.name}: {self.reason}",
                code="PROCESS_GIVEN_UP",
                child=self.spec.name,
            )
        else:
            text = f"{self.spec.name} {state}" + (f" (pid {self.pid})" if self.pid else "")
            tail = f": {self.reason}" if state is ChildState.WAITING else ""
            self._log.info(f"child.{state}", text + tail, child=self.spec.name)
        self._on_change()


PYTHON_CANNOT_FLUSH: Final = 120
"""Exit status of an interpreter whose last output could not be written."""


def process_command(kind: str, config: Path) -> tuple[str, ...]:
    """Give the command of a child: our own interpreter, without the CLI around it."""
    package = {"conductor": "pureflash.api"}.get(kind, f"pureflash.{kind}")
    return (sys.executable, "-m", package, "--config", str(config))


def _describe(status: int) -> str:
    if status < 0:
        return f"by {signal.Signals(-status).name}"
    if status == PYTHON_CANNOT_FLUSH:
        return f"with status {status}: it could not write its output; is the file system full?"
    return f"with status {status}"
