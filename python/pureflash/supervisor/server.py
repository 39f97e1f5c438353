"""The supervisor process: `pf up` in the foreground, or in its own session with `--detach`.

Theory of operation. It takes the lock of the directory, makes or reads the cluster, and starts the
conductor, then the stores and the gateway; it keeps a claim on their ports for as long as it runs.
It is up when the conductor is, every other child is ready or has died once, the conductor has seen
those that are ready, and volumes are served as far as they can be; what is missing then is said
with the outcome, and no reason to stop: a cluster starts with what it has. Only without a conductor
there is none. From then on each child is kept running by itself; a store's death is reported to the
conductor with its incarnation. TERM or INT stops gateway, stores and conductor in that order, 10 s
each at most, then KILL; a second signal kills at once.

With `--ready-fd N` it writes one JSON line there when it is up, or when it cannot come up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from pureflash.client.api import Api
from pureflash.client.context import remember
from pureflash.client.directory import Beginning, check_directory, purge_sockets, take_lock
from pureflash.errors import CallerError, ClusterError, Code, PureFlashError
from pureflash.model.exits import Exit, exit_of_code
from pureflash.model.layout import CONDUCTOR, GATEWAY, Layout
from pureflash.model.outside import UNREADABLE
from pureflash.model.rest import ClusterView
from pureflash.process.lifecycle import Ready, write_whole
from pureflash.process.logs import JsonLog, Log
from pureflash.process.secrets import read_token
from pureflash.supervisor.children import Child, ChildSpec, process_command
from pureflash.supervisor.cluster import (
    ClusterFile,
    Wish,
    check_running,
    forget_disks,
    make_sockets_folder,
    open_cluster,
    write_settings,
)
from pureflash.supervisor.policy import ChildState
from pureflash.supervisor.ports import PortClaims

UP_TIMEOUT_S: Final = 60.0
"""For the conductor to be ready, and then for the others."""
SEEN_S: Final = 10.0
"""How long the conductor may take to see a process that is ready."""
SETTLE_S: Final = 15.0
"""How long volumes may take to be served: copies that were lost at once are gathered for 10 s."""
STOP_TIMEOUT_S: Final = 10.0
LOCK_S: Final = 45.0
"""How long a supervisor that starts or stops is waited for: three groups of 10 s each, to stop."""
LOOK_S: Final = 0.1
REPORT_RETRY_S: Final = 1.0
LOG_LINES_SHOWN: Final = 20


class ChildReport(msgspec.Struct, frozen=True, kw_only=True):
    """A child in `supervisor.json`."""

    name: str
    state: str
    pid: int | None
    deaths: int
    reason: str


class SupervisorReport(msgspec.Struct, frozen=True, kw_only=True):
    """`run/supervisor.json`: what the supervisor knows, for `pf status`."""

    pid: int
    state: str = "running"
    children: list[ChildReport]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The line on `--ready-fd`. `error` empty: up. `is_running`: it was up before."""

    error: str = ""
    next_step: str = ""
    code: int = 0
    is_running: bool = False
    warnings: list[str] = []
    log_tail: list[str] = []


class HumanLog:
    """A `Log` that also prints to a person: time and message."""

    def __init__(self, inner: Log) -> None:
        """Pass everything on to `inner`."""
        self._inner = inner

    def info(self, event: str, msg: str, **fields: object) -> None:
        """Note what happened."""
        self._inner.info(event, msg, **fields)
        self._print(msg)

    def warning(self, event: str, msg: str, *, code: str, **fields: object) -> None:
        """Note what somebody should look at."""
        self._inner.warning(event, msg, code=code, **fields)
        self._print(f"{code}: {msg}")

    def error(self, event: str, msg: str, **fields: object) -> None:
        """Note what failed."""
        self._inner.error(event, msg, **fields)
        self._print(f"error: {msg}")

    def _print(self, text: str) -> None:
        now = dt.datetime.now().astimezone().strftime("%H:%M:%S")
        print(f"{now} {text}", flush=True)  # noqa: T201 - the foreground of `pf up`


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line."""

    layout: Layout
    wish: Wish
    restart_delay_ms: int
    new_disks: tuple[str, ...] = ()


class Stage(StrEnum):
    """What a supervisor does: STARTING, then RUNNING, then STOPPING; or STOPPING at once."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


class Supervisor:
    """The children of one cluster."""

    def __init__(self, options: Options, cluster: ClusterFile, log: Log) -> None:
        """Prepare the children; nothing is started yet."""
        self._layout = options.layout
        self._cluster = cluster
        self._log = log
        self._stage = Stage.STARTING
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._report_later: asyncio.TimerHandle | None = None
        self.children = {
            name: Child(
                ChildSpec(
                    name=name,
                    command=process_command(kind_of(name), options.layout.config(name)),
                    ready=options.layout.ready(name),
                    output=options.layout.output(name),
                ),
                restart_delay_ms=options.restart_delay_ms,
                log=log,
                on_exit=self._report_exit,
                on_change=self._write_report,
            )
            for name in cluster.names
        }

    async def start(self) -> list[str]:
        """Start all; gives what is not as it should be when the cluster is up.

        Errors: ClusterError UNAVAILABLE when the conductor does not start.
        """
        conductor = self.children[CONDUCTOR]
        self._begin(conductor)
        await self._await_conductor(conductor)
        others = [child for name, child in self.children.items() if name != CONDUCTOR]
        for child in others:
            self._begin(child)
        await asyncio.gather(*(_first_word(child) for child in others))
        troubles = [_trouble(child) for child in others if not child.is_ready.is_set()]
        ready = {child.spec.name for child in others if child.is_ready.is_set()}
        if unseen := await self._await_seen(ready):
            names = ", ".join(sorted(unseen))
            troubles.append(f"{names}: running, and the conductor does not see it: pf logs")
        await self._await_served()
        self._stage = Stage.RUNNING
        self._write_report()
        return troubles

    async def stop(self) -> None:
        """Stop in order; whatever is left after `STOP_TIMEOUT_S` is killed."""
        self._stage = Stage.STOPPING
        self._write_report()
        stores = [name for name in self._cluster.names if name not in (CONDUCTOR, GATEWAY)]
        for names in ([GATEWAY], stores, [CONDUCTOR]):
            for name in names:
                self.children[name].stop()
            tasks = [self._tasks[name] for name in names if name in self._tasks]
            if not tasks:
                continue
            _, left = await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)
            if left:
                for name in names:
                    self.children[name].stop(signal.SIGKILL)
                await asyncio.wait(left)
        if self._report_later is not None:
            self._report_later.cancel()
        self._layout.supervisor_file.unlink(missing_ok=True)

    def kill(self) -> None:
        """Kill every child now."""
        for child in self.children.values():
            child.stop(signal.SIGKILL)

    def _begin(self, child: Child) -> None:
        self._tasks[child.spec.name] = asyncio.create_task(child.run())

    async def _await_conductor(self, conductor: Child) -> None:
        """Wait until the conductor is ready. Errors: ClusterError UNAVAILABLE."""
        await _first_word(conductor)
        if not conductor.is_ready.is_set():
            raise ClusterError(
                Code.UNAVAILABLE,
                _trouble(conductor),
                next_step=f"see {self._layout.log(conductor.spec.name)}",
            )

    async def _await_seen(self, names: set[str]) -> set[str]:
        """Wait until the conductor sees these processes; gives those that it does not see."""
        left = set(names)

        def look(seen: ClusterView) -> bool:
            online = {store.name for store in seen.stores if store.state == "online"}
            online |= {gateway.name for gateway in seen.gateways if gateway.state == "online"}
            left.intersection_update(names - online)
            return not left

        await self._look_until(look, seconds=SEEN_S)
        return left

    async def _await_served(self) -> None:
        """Wait until no volume waits for what comes by itself."""
        await self._look_until(lambda seen: "parked" not in seen.volumes_by_state, seconds=SETTLE_S)

    async def _look_until(self, is_so: Callable[[ClusterView], bool], *, seconds: float) -> None:
        """Look at the cluster until it is so, or for so long: an API, not an event of ours."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not is_so(await asyncio.to_thread(self._look)):
                    await asyncio.sleep(LOOK_S)

    def _look(self) -> ClusterView:
        with self._api() as api:
            return api.cluster()

    async def _report_exit(self, name: str, ready: Ready | None) -> None:
        """Tell the conductor that a store is provably dead; it may be away itself."""
        if kind_of(name) != "store" or ready is None:
            return
        try:
            await asyncio.to_thread(self._tell_exit, name, ready.incarnation)
        except PureFlashError as problem:
            self._log.info("exit.untold", f"{name}: {problem.message}", child=name)

    def _tell_exit(self, name: str, incarnation: int) -> None:
        with self._api() as api:
            api.store_exited(name, incarnation=incarnation)

    def _api(self) -> Api:
        token = read_token(self._layout.token)
        cluster = self._cluster
        address = f"127.0.0.1:{cluster.conductor_port}"
        return Api(address, token, source="the supervisor", cluster_id=cluster.cluster_id)

    def _write_report(self) -> None:
        if self._report_later is not None:
            self._report_later.cancel()
        report = SupervisorReport(
            pid=os.getpid(),
            state=self._stage,
            children=[
                ChildReport(
                    name=name,
                    state=child.state,
                    pid=child.pid,
                    deaths=child.deaths,
                    reason=child.reason if child.state is not ChildState.RUNNING else "",
                )
                for name, child in self.children.items()
            ],
        )
        try:
            write_whole(self._layout.supervisor_file, msgspec.json.encode(report))
        except OSError as problem:
            # A full disk must not keep a dead child from being started again.
            if self._report_later is None:
                self._log.info("report.unwritten", f"tried again: {problem.strerror}")
            loop = asyncio.get_running_loop()
            self._report_later = loop.call_later(REPORT_RETRY_S, self._write_report)
        else:
            self._report_later = None


async def _first_word(child: Child) -> None:
    """Wait until a child is ready or has died once, at most `UP_TIMEOUT_S`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(UP_TIMEOUT_S):
            while not child.is_ready.is_set() and not child.deaths:
                await asyncio.sleep(LOOK_S)


def _trouble(child: Child) -> str:
    """Say why a child is not ready."""
    if child.deaths:
        return f"{child.spec.name} did not start: {child.reason}"
    return f"{child.spec.name} is not ready after {UP_TIMEOUT_S:g} s; it is still starting"


def kind_of(name: str) -> str:
    """Tell the kind of a process by its name."""
    return {CONDUCTOR: "conductor", GATEWAY: "gateway"}.get(name, "store")


def log_tail(layout: Layout, message: str) -> list[str]:
    """Give the last lines of the log and output of the process that an error names."""
    name = message.split(" ", 1)[0]
    lines: list[str] = []
    for path in (layout.log(name), layout.output(name)):
        if path.is_file():
            lines += path.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    return lines[-LOG_LINES_SHOWN:]


async def supervise(
    options: Options, environment: Mapping[str, str], ready_fd: int | None, beginning: Beginning
) -> int:
    """Run until a signal; gives the exit status. The lock is held by the caller.

    Until a process is started, an error takes back what was made since `beginning`.
    """
    with PortClaims() as ports:
        layout = options.layout
        runtime = environment.get("XDG_RUNTIME_DIR")
        sockets = layout.sockets(runtime_directory=runtime, uid=os.getuid())
        had_sockets = os.path.lexists(sockets)
        try:
            beginning.look()
            cluster, warnings = await _prepare(options, environment, ports, sockets)
        except BaseException:
            if not had_sockets:
                with contextlib.suppress(OSError):
                    purge_sockets(sockets)
            beginning.take_back()
            raise
        return await _supervise(options, cluster, warnings, ready_fd)


async def _prepare(
    options: Options, environment: Mapping[str, str], ports: PortClaims, sockets: Path
) -> tuple[ClusterFile, list[str]]:
    """Make or read the cluster, and all that its processes need; gives it with warnings."""
    layout = options.layout
    check_directory(layout)  # again: another one may have been made there meanwhile
    cluster, warnings = await open_cluster(layout, options.wish, ports=ports)
    stamp = dt.datetime.now(tz=dt.UTC).strftime("%Y%m%dT%H%M%SZ")
    warnings += forget_disks(layout, cluster, options.new_disks, stamp=stamp)
    make_sockets_folder(sockets)
    write_settings(layout, cluster, sockets)
    remember(layout.directory, environment)
    return cluster, warnings


async def _supervise(
    options: Options, cluster: ClusterFile, warnings: list[str], ready_fd: int | None
) -> int:
    layout = options.layout
    json_log = JsonLog("supervisor", layout.log("supervisor"))
    log: Log = json_log if ready_fd is not None else HumanLog(json_log)
    supervisor = Supervisor(options, cluster, log)
    stop = _signals(supervisor)
    starting = asyncio.create_task(supervisor.start())
    stopping = asyncio.create_task(stop.wait())
    status = Exit.OK
    try:
        done, _ = await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting in done:
            warnings += starting.result()
            for text in warnings:
                log.info("cluster.notice", text)
            log.info("cluster.up", f"up: API http://127.0.0.1:{cluster.conductor_port}/docs")
            tell(ready_fd, Outcome(warnings=warnings))
            await stop.wait()
            log.info("cluster.stopping", "stopping")
        else:
            tell(ready_fd, outcome_of(_stopped_early(), []))
    except PureFlashError as problem:
        log.error("cluster.failed", str(problem))
        tail = log_tail(layout, problem.message)
        tell(ready_fd, outcome_of(problem, tail))
        if ready_fd is None:
            print("\n".join(tail), file=sys.stderr)  # noqa: T201 - the foreground of `pf up`
        status = exit_of_code(problem.code.name)
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
        await supervisor.stop()
        log.info("cluster.down", "down")
        json_log.close()
    return status


def _stopped_early() -> PureFlashError:
    return ClusterError(
        Code.UNAVAILABLE,
        "the cluster was stopped while it started, by `pf down` or a signal",
        next_step="give `pf up` again when it shall run",
    )


def outcome_of(problem: PureFlashError, tail: list[str]) -> Outcome:
    """Describe a failed start."""
    return Outcome(
        error=problem.message,
        next_step=problem.next_step,
        code=int(problem.code),
        log_tail=tail,
    )


def tell(ready_fd: int | None, outcome: Outcome) -> None:
    """Write the outcome for the parent that waits; it may be gone."""
    if ready_fd is None:
        return
    try:
        os.write(ready_fd, msgspec.json.encode(outcome) + b"\n")
        os.close(ready_fd)
    except OSError:
        return


def _signals(supervisor: Supervisor) -> asyncio.Event:
    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    def on_signal() -> None:
        if event.is_set():
            supervisor.kill()
        event.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return event


def _await_lock(layout: Layout) -> int | None:
    """Wait while another supervisor starts or stops; gives the lock once it has stopped.

    None: it runs. A `pf up` that meets a shutdown starts the cluster again after it.
    """
    pause = threading.Event()
    deadline = time.monotonic() + LOCK_S
    while time.monotonic() < deadline:
        try:
            report = msgspec.json.decode(layout.supervisor_file.read_bytes(), type=SupervisorReport)
            if report.state == Stage.RUNNING:
                return None
        except (OSError, *UNREADABLE):
            pass  # it has just begun, or removed its report on its way out
        pause.wait(LOOK_S)
        if (lock := take_lock(layout)) is not None:
            return lock
    return None


def parse(arguments: Sequence[str]) -> tuple[Options, int | None]:
    """Read the command line, which the CLI writes: sizes are bytes, times milliseconds."""
    parser = argparse.ArgumentParser(prog="pf up")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stores", type=int)
    parser.add_argument("--disk-bytes", type=int)
    parser.add_argument("--journal-bytes", type=int)
    for name in ("--conductor-port", "--store-port", "--nbd-port"):
        parser.add_argument(name, type=int)
    parser.add_argument("--restart-delay-ms", type=int, default=1_000)
    parser.add_argument("--new-disk", action="append", default=[])
    parser.add_argument("--ready-fd", type=int)
    found = parser.parse_args(arguments)
    wish = Wish(
        stores=found.stores,
        disk_bytes=found.disk_bytes,
        journal_bytes=found.journal_bytes,
        conductor_port=found.conductor_port,
        store_port=found.store_port,
        nbd_port=found.nbd_port,
    )
    options = Options(
        layout=Layout(found.data.absolute()),
        wish=wish,
        restart_delay_ms=found.restart_delay_ms,
        new_disks=tuple(found.new_disk),
    )
    return options, found.ready_fd


def main(arguments: Sequence[str]) -> int:
    """Run the supervisor; gives the exit status."""
    options, ready_fd = parse(arguments)
    try:
        check_directory(options.layout)
        beginning = Beginning(options.layout)
        try:
            lock = take_lock(options.layout) or _await_lock(options.layout)
        except PureFlashError:
            beginning.take_back()
            raise
        if lock is None:
            if options.new_disks:
                raise CallerError(
                    Code.IN_USE,
                    f"--new-disk: the cluster in {options.layout.directory} runs",
                    next_step="stop it with `pf down` first",
                )
            check_running(options.layout, options.wish)
            tell(ready_fd, Outcome(is_running=True))
            if ready_fd is None:
                print(f"already running in {options.layout.directory}")  # noqa: T201 - for a person
            return 0
        return asyncio.run(supervise(options, os.environ, ready_fd, beginning))
    except (PureFlashError, OSError) as cause:
        problem = _explained(cause, options.layout)
        tell(ready_fd, outcome_of(problem, []))
        if ready_fd is None:
            # As `describe` of the command line has it, which is no server's to import.
            text = f"pf: {problem.message} ({problem.code.name})\n  what to do: {problem.next_step}"
            print(text, file=sys.stderr)  # noqa: T201 - for a person
        return exit_of_code(problem.code.name)


def _explained(cause: PureFlashError | OSError, layout: Layout) -> PureFlashError:
    """Give a failure its way on: the file system's, a full or broken one, comes without."""
    if isinstance(cause, PureFlashError):
        return cause
    where = cause.filename2 or cause.filename or layout.directory  # of a rename: its target
    return CallerError(
        Code.INVALID,
        f"cannot use {where}: {cause.strerror}",
        next_step="mend that, or name another directory with --data; `pf doctor` looks at it",
    )
