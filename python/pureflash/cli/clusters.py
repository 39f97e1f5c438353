"""`pf up`, `pf down`, `pf status`, `pf logs`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from pureflash.cli.options import (
    DataOption,
    Output,
    OutputOption,
    ServerOption,
    YesOption,
    confirm,
    connected,
    read_size,
)
from pureflash.cli.outcome import CommandProblem, Exit, unreadable

if TYPE_CHECKING:
    from pureflash.model.layout import Layout
    from pureflash.model.rest import ClusterView

UP_TIMEOUT_S: Final = 200.0
"""The supervisor waits 60 s each for the conductor and for the rest, and up to 45 s for another
one to stop; then volumes have 25 s to be served."""
DOWN_TIMEOUT_S: Final = 45.0
TAIL_LINES: Final = 20
CHILD_FIELDS: Final = frozenset({"name", "state", "pid", "reason"})
"""What is shown of a process of `supervisor.json`."""
OWNER_STEP: Final = "name a directory of your own with --data; a cluster is run by its owner"


def up(
    stores: Annotated[int | None, typer.Option(help="Number of stores; default 3.")] = None,
    disk: Annotated[str | None, typer.Option(help="Disk of each store; default 10G.")] = None,
    journal: Annotated[str | None, typer.Option(help="Journal of each lane.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when it is up.")] = False,
    restart_delay: Annotated[
        str, typer.Option("--restart-delay", help="Wait before a dead process is started again.")
    ] = "1s",
    new_disk: Annotated[
        list[str] | None,
        typer.Option(
            "--new-disk", help="Store that lost its disk for good, and begins with an empty one."
        ),
    ] = None,
    conductor_port: Annotated[
        int | None, typer.Option(help="Port of the API; default: the next free one from 7180.")
    ] = None,
    store_port: Annotated[
        int | None, typer.Option(help="Port of the first store; the others have the next ones.")
    ] = None,
    nbd_port: Annotated[int | None, typer.Option(help="Port for exports over TCP.")] = None,
    data: DataOption = None,
) -> None:
    """Run a cluster on this machine: conductor, stores on sparse files, gateway. No root.

    A cluster starts with what it has: what is missing is said, and the exit status is 0. It is 7
    when it is up and no volume can be served.
    """
    from pureflash.client.context import resolve_data
    from pureflash.units import parse_duration_ms

    place = resolve_data(data)
    try:
        delay_ms = parse_duration_ms(restart_delay)
    except ValueError as cause:
        raise CommandProblem(f"--restart-delay: {cause}", exit_status=Exit.USAGE) from cause
    command = [sys.executable, "-m", "pureflash.supervisor", "--data", str(place.directory)]
    command += ["--restart-delay-ms", str(delay_ms)]
    command += _wishes(stores=stores, disk=disk, journal=journal, new_disks=new_disk or [])
    command += _port_words(conductor=conductor_port, store=store_port, nbd=nbd_port)
    if not detach:
        os.execv(sys.executable, command)  # noqa: S606 - our own interpreter and module
    _tell_outcome(_start_detached(command), place.directory)
    seen = _show_status(Output.TABLE, None, place.directory)
    wanted = seen.volumes_by_state.keys() - {"deleting"}
    is_any_there = any(store.state == "online" for store in seen.stores)
    is_any_served = not wanted.isdisjoint({"healthy", "degraded", "single_copy"})
    if not is_any_there or (wanted and not is_any_served):
        raise typer.Exit(Exit.OK if seen.state == "amnesia" else Exit.NOT_SERVED)


def down(
    purge: Annotated[bool, typer.Option("--purge", help="Also delete all data.")] = False,
    yes: YesOption = False,
    data: DataOption = None,
) -> None:
    """Stop the cluster of this machine; with --purge delete it."""
    from pureflash.client.context import resolve_data
    from pureflash.client.directory import check_directory
    from pureflash.model.layout import Layout

    place = resolve_data(data)
    layout = Layout(place.directory)
    if not purge:
        _stop(layout)
        return
    if not layout.directory.exists():
        _purge(layout)  # its sockets lie elsewhere
        typer.echo(f"there is nothing in {layout.directory} (from {place.source})")
        return
    if not layout.cluster_file.exists():
        raise CommandProblem(
            f"{layout.directory} (from {place.source}) holds no cluster",
            exit_status=Exit.UNSAFE,
            next_step="name the directory of a cluster with --data",
        )
    check_directory(layout)
    plan = f"delete the cluster in {layout.directory} with all volumes and data on it"
    confirm(plan, layout.directory.name, is_agreed=yes)
    _stop(layout)
    _purge(layout)
    typer.echo(f"deleted the cluster in {layout.directory}")


def status(
    output: OutputOption = Output.TABLE, server: ServerOption = None, data: DataOption = None
) -> None:
    """Show the cluster on one screen."""
    if _show_status(output, server, data).state == "offline":
        raise typer.Exit(Exit.FAILED)


def _show_status(output: Output, server: str | None, data: Path | None) -> ClusterView:
    from pureflash.cli.render import print_object
    from pureflash.cli.status import status_lines
    from pureflash.client.context import resolve_data, resolve_server
    from pureflash.model.layout import Layout

    with connected(server, data) as api:
        seen = api.cluster()
        address = api.address
    if output in (Output.TABLE, Output.WIDE):
        children: list[dict[str, Any]] = []
        if resolve_server(server, data).is_of_directory:
            children = children_of(Layout(resolve_data(data).directory))
        typer.echo("\n".join(status_lines(seen, address, children)))
    else:
        print_object(seen, [], name=seen.state, output=output)
    return seen


def logs(
    name: Annotated[str | None, typer.Argument(help="c1, s1 .., g1, supervisor.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as lines come.")] = False,
    lines: Annotated[
        int, typer.Option("-n", min=0, help="Lines of each log to begin with.")
    ] = TAIL_LINES,
    data: DataOption = None,
) -> None:
    """Show the logs of the processes, one or all."""
    from pureflash.cli.logs import follow_logs, print_logs
    from pureflash.client.context import resolve_data
    from pureflash.model.layout import Layout

    place = resolve_data(data)
    layout = Layout(place.directory)
    found = sorted(layout.log("x").parent.glob("*.jsonl"))
    paths = [path for path in found if name is None or path.stem == name]
    if not paths:
        raise CommandProblem(
            f"no log of {name or 'any process'} in {place.directory} (from {place.source})",
            exit_status=Exit.NOT_FOUND,
            next_step=f"logs there are: {', '.join(path.stem for path in found)}"
            if found
            else "start a cluster with `pf up`, or name the directory of one with --data",
        )
    positions = print_logs(paths, lines)
    if follow:
        follow_logs(positions)


def _tell_outcome(outcome: dict[str, Any], directory: Path) -> None:
    """Print what the supervisor said when it came up. Errors: PureFlashError when it did not."""
    from pureflash.errors import from_code

    for warning in outcome["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    if outcome["error"]:
        for line in outcome["log_tail"]:
            typer.echo(line, err=True)
        raise from_code(outcome["code"], outcome["error"], next_step=outcome["next_step"])
    if outcome["is_running"]:
        typer.echo(f"already running in {directory}")


def _port_words(**ports: int | None) -> list[str]:
    return [f"--{whose}-port={port}" for whose, port in ports.items() if port is not None]


def _wishes(
    *, stores: int | None, disk: str | None, journal: str | None, new_disks: list[str]
) -> list[str]:
    """Give what was asked for in the words of the supervisor."""
    words: list[str] = []
    if stores is not None:
        words += ["--stores", str(stores)]
    if disk is not None:
        words += ["--disk-bytes", str(read_size(disk, flag="--disk"))]
    if journal is not None:
        words += ["--journal-bytes", str(read_size(journal, flag="--journal"))]
    for name in new_disks:
        words += ["--new-disk", name]
    return words


def _start_detached(command: list[str]) -> dict[str, Any]:
    """Start the supervisor in its own session and wait for its outcome."""
    import json
    import select

    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    with subprocess.Popen(
        [*command, "--ready-fd", str(writer)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=(writer,),
    ) as process:
        os.close(writer)
        try:
            is_told, _, _ = select.select([reader], [], [], UP_TIMEOUT_S)
        except BaseException:
            process.returncode = 0  # it lives on by itself
            typer.echo("the cluster goes on starting; `pf down` stops it", err=True)
            raise
        line = os.read(reader, 1 << 16) if is_told else b""
        os.close(reader)
        if line:
            process.returncode = 0  # it lives on by itself: leaving the block must not wait for it
            outcome: dict[str, Any] = json.loads(line)
            return outcome
        process.kill()
    raise CommandProblem(
        "the supervisor ended without a word",
        exit_status=Exit.FAILED,
        next_step="run `pf up` without --detach to see why",
    )


def _stop(layout: Layout) -> None:
    """Ask the supervisor to stop and wait for its end; no supervisor is fine."""
    import select

    pid = _supervisor_pid(layout)
    if pid is None:
        typer.echo(f"not running in {layout.directory}")
        return
    _warn_of_clients(layout)
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        has_ended, _, _ = select.select([handle], [], [], DOWN_TIMEOUT_S)
    finally:
        os.close(handle)
    if not has_ended:
        raise CommandProblem(
            f"the supervisor (pid {pid}) has not stopped within {DOWN_TIMEOUT_S:g} s",
            exit_status=Exit.UNAVAILABLE,
            next_step="see `pf logs supervisor`",
        )
    typer.echo("stopped")


def _supervisor_pid(layout: Layout) -> int | None:
    """Give the pid of the process that holds the lock; None when nobody does.

    Errors: CommandProblem for another user's file, who would choose the process that is ended.
    """
    import fcntl

    try:
        lock = os.open(layout.lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as cause:
        raise unreadable(layout.lock, cause, next_step=OWNER_STEP) from cause
    try:
        owner = os.fstat(lock).st_uid
        if owner != os.getuid():
            raise CommandProblem(
                f"{layout.lock} belongs to another user (uid {owner}, you are {os.getuid()})",
                exit_status=Exit.UNSAFE,
                next_step=OWNER_STEP,
            )
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid_in(layout, os.read(lock, 32))
    finally:
        os.close(lock)
    return None


def _pid_in(layout: Layout, text: bytes) -> int:
    if not text.isdigit():
        raise CommandProblem(
            f"{layout.lock} is held, and does not say by which process",
            exit_status=Exit.UNAVAILABLE,
            next_step="a supervisor that has just begun writes it in a moment: give the command"
            " again, or see `pf logs supervisor`",
        )
    return int(text)


def _warn_of_clients(layout: Layout) -> None:
    from pureflash.errors import PureFlashError

    try:
        with connected(None, layout.directory) as api:
            clients = sum(export.connections for export in api.exports())
    except PureFlashError:
        return  # a cluster that does not answer is stopped all the same
    if clients:
        typer.echo(f"warning: {clients} client connection(s) are open", err=True)


def _purge(layout: Layout) -> None:
    """Delete what the cluster made, and say what else is there; the context forgets it."""
    from pureflash.client.context import forget
    from pureflash.client.directory import left_line, purge, purge_sockets, take_lock

    if layout.directory.exists():
        lock = take_lock(layout)
        if lock is None:
            raise CommandProblem(
                f"the cluster in {layout.directory} was started again meanwhile",
                exit_status=Exit.IN_THE_WAY,
                next_step="repeat the command if it is to be deleted",
            )
        try:
            left = left_line(layout.directory, purge(layout, is_foreign=_foreign_to(layout)))
        finally:
            os.close(lock)
        if left:
            typer.echo(left, err=True)
    sockets = layout.sockets(runtime_directory=os.environ.get("XDG_RUNTIME_DIR"), uid=os.getuid())
    if left := left_line(sockets, purge_sockets(sockets)):
        typer.echo(left, err=True)
    forget(layout.directory, os.environ)


def _foreign_to(layout: Layout) -> Callable[[Path], bool]:
    """Tell disks of other clusters by their headers; what has none is a disk of ours, damaged."""
    from pureflash.cli.core import load_core
    from pureflash.client.context import cluster_id_in
    from pureflash.errors import PureFlashError

    own = cluster_id_in(layout)
    core = load_core()

    def is_foreign(disk: Path) -> bool:
        try:
            return not disk.is_symlink() and bool(core.inspect_disk(str(disk))["cluster_id"] != own)
        except PureFlashError:
            return False

    return is_foreign


def children_of(layout: Layout) -> list[dict[str, Any]]:
    """Give what the supervisor of a local cluster knows; nothing for a remote one.

    Nothing, too, for a record that is damaged: the supervisor writes it anew with its next news.
    """
    import json

    try:
        report = json.loads(layout.supervisor_file.read_bytes())
        children: list[dict[str, Any]] = report["children"]
        is_whole = all(child.keys() >= CHILD_FIELDS for child in children)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return children if is_whole else []
