"""How a process starts and stops: parent's death, readiness, signals, its incarnation.

A child of `pf up` gets TERM when the supervisor dies (PDEATHSIG), so nothing is left behind. It is
ready when `NAME.ready` exists, which appears whole by rename: {pid, incarnation, address}. TERM and
INT ask for an ordered stop; the second one ends the process at once.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
from pathlib import Path
from typing import Final

import msgspec

DESCRIPTORS: Final = 65_536
"""Descriptors wanted: several times the most connections of a reactor and of the API."""
_PR_SET_PDEATHSIG: Final = 1
INCARNATION_MAX: Final = 1 << 53
"""Incarnations are below this. A time in milliseconds reaches it in no life of this program."""
INCARNATION_DIGITS_MAX: Final = 16


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of NAME.ready."""

    pid: int
    incarnation: int
    address: str


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for TERM when the parent dies; does so itself if it is dead already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGTERM)


def raise_descriptor_limit() -> None:
    """Allow as many descriptors as the machine lets us, within reason: each client is one.

    A shell's 1,024 would be reached before the limits of docs/reference/limits.md.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def write_whole(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file so that a reader sees the old or the new contents, durably, never a part.

    The new contents are made in a file that nobody else can have opened or put there: secrets are
    written so as well.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # of an earlier process with this pid, which died over it
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:  # all of it, or ENOSPC: a full disk takes a part
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def announce(path: Path | None, *, incarnation: int, address: str) -> None:
    """Write NAME.ready; no path: nobody asked."""
    if path is not None:
        ready = Ready(pid=os.getpid(), incarnation=incarnation, address=address)
        write_whole(path, msgspec.json.encode(ready))


def read_ready(path: Path) -> Ready | None:
    """Read NAME.ready; None while there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Ready)
    except FileNotFoundError:
        return None


def next_incarnation(path: Path, *, wall_ms: int) -> int:
    """Draw a fresh incarnation, greater than every earlier one, and remember it durably.

    The time keeps it growing when the file was lost or damaged; the file when the clock went back.
    """
    last = _last_incarnation(path)
    incarnation = max(last + 1, wall_ms)
    write_whole(path, str(incarnation).encode())
    return incarnation


def _last_incarnation(path: Path) -> int:
    """Read the incarnation of before; 0 for a file that is lost, or does not hold one."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return 0
    is_one = len(text) <= INCARNATION_DIGITS_MAX and text.isdigit()
    return int(text) if is_one and int(text) < INCARNATION_MAX else 0


def stop_event() -> asyncio.Event:
    """Give an event that TERM or INT sets; the second signal ends the process.

    Must be called inside the running loop.
    """
    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    def on_signal(number: int) -> None:
        if event.is_set():
            os._exit(128 + number)
        event.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return event
