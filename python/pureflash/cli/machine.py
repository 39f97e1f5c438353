"""What this machine is: the facts that `pf doctor` judges, each one really tried.

Only observation lives here (system calls, files, sockets); `diagnosis` decides what a fact means.
Every probe gives a value also when the thing is missing, so that one odd machine cannot hide the
other findings, and every probe cleans up: no file, socket or descriptor stays. Costs a few ms.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pureflash.model.layout import Layout

PORTS = (("store", 7162), ("conductor", 7180), ("NBD", 10809))
PORT_TRIES = 20
"""`pf up` takes the next free one of this many ports."""

OPTIONAL_TOOLS = ("qemu-img", "fio", "nbdcopy")
DIRECT_BYTES = 4096

_SYS_IO_URING_SETUP = 425  # the same number on every architecture (generic system call table)
_SYS_IO_SETUP = {"x86_64": (206, 207), "aarch64": (0, 1)}  # io_setup and io_destroy
_IO_URING_PARAMS_BYTES = 120  # sizeof(struct io_uring_params), linux/io_uring.h


@dataclass(frozen=True, slots=True)
class Port:
    """One default port on loopback; `next_free` is None when all `PORT_TRIES` are taken.

    `own_process` names the process of the data directory's own cluster that listens there.
    """

    name: str
    number: int
    next_free: int | None
    own_process: str | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts. Units: `_bytes` bytes; limits are soft limits, None means unlimited.

    `io_uring_error`, `aio_error`, `direct_io_error`, `core_error`: None if it worked, else why not.
    `directory` is the data directory or its nearest existing ancestor, on which the rest was
    tried.
    """

    kernel: str
    python: str
    core_error: str | None
    io_uring_error: str | None
    aio_error: str | None
    core_count: int
    memory_available_bytes: int
    directory: Path
    directory_writable: bool
    free_bytes: int
    file_system: str
    direct_io_error: str | None
    open_files_limit: int | None
    locked_memory_limit_bytes: int | None
    ports: tuple[Port, ...]
    clock_source: str
    boot_clock_works: bool
    socket_folder: str
    missing_tools: tuple[str, ...]


def examine(data: Path) -> Machine:
    """Observe this machine, with `data` as the place where a cluster would be."""
    directory = nearest_existing(data)
    writable = os.access(directory, os.W_OK | os.X_OK)
    own = own_listeners(data)
    return Machine(
        kernel=platform.release(),
        python=platform.python_version(),
        core_error=_core_error(),
        io_uring_error=_io_uring_error(),
        aio_error=_aio_error(),
        core_count=len(os.sched_getaffinity(0)),
        memory_available_bytes=_memory_available_bytes(),
        directory=directory,
        directory_writable=writable,
        free_bytes=shutil.disk_usage(directory).free,
        file_system=file_system_of(directory, Path("/proc/self/mountinfo").read_text()),
        direct_io_error=_direct_io_error(directory) if writable else "the directory is read-only",
        open_files_limit=_soft_limit(resource.RLIMIT_NOFILE),
        locked_memory_limit_bytes=_soft_limit(resource.RLIMIT_MEMLOCK),
        ports=tuple(_examine_port(name, number, own) for name, number in PORTS),
        clock_source=_clock_source(),
        boot_clock_works=_boot_clock_works(),
        socket_folder=socket_folder(os.environ.get("XDG_RUNTIME_DIR"), os.getuid()),
        missing_tools=tuple(tool for tool in OPTIONAL_TOOLS if shutil.which(tool) is None),
    )


def nearest_existing(path: Path) -> Path:
    """Find the directory that `path` is, or would be created in."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def file_system_of(directory: Path, mountinfo: str) -> str:
    """Name the type of the file system that holds `directory`, from /proc/self/mountinfo.

    The longest mount point above the directory wins; of equal ones the last, which covers the
    others. Source: proc(5), mountinfo fields (5) and the type after the separator.
    """
    resolved = directory.resolve()
    best_length, best_type = -1, "unknown"
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        # Spaces and the like are octal escapes in that file.
        mount_point = Path(fields[4].encode().decode("unicode_escape"))
        if resolved.is_relative_to(mount_point) and len(str(mount_point)) >= best_length:
            best_length, best_type = len(str(mount_point)), after.split(" ")[0]
    return best_type


def socket_folder(runtime_directory: str | None, uid: int) -> str:
    """Give the folder of a cluster's unix sockets; its last part is always 8 characters."""
    above = f"{runtime_directory}/pureflash" if runtime_directory else f"/tmp/pureflash-{uid}"  # noqa: S108 - documented place, made 0700 with its owner checked
    return f"{above}/{'0' * 8}"


def own_listeners(data: Path) -> Mapping[int, str]:
    """Give the ports on which the running cluster of a data directory listens, with who does.

    The supervisor's record may be older than the processes that have its numbers now: one counts
    only if its command line names a file of this directory.
    """
    import psutil

    layout = Layout(data.absolute())
    try:
        children = json.loads(layout.supervisor_file.read_text())["children"]
        pids = {int(child["pid"]): str(child["name"]) for child in children if child["pid"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # there is no cluster here, or none that can be asked
    found: dict[int, str] = {}
    for pid, name in pids.items():
        try:
            process = psutil.Process(pid)
            if any(str(layout.directory) in word for word in process.cmdline()):
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr:
                        found[connection.laddr.port] = name
        except psutil.Error:
            continue  # it has ended, or belongs to another user
    return found


def _core_error() -> str | None:
    try:
        from pureflash import _core
    except ImportError as problem:
        return str(problem)
    return None if _core.version() else "it has no version"


def _io_uring_error() -> str | None:
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(_IO_URING_PARAMS_BYTES)
    descriptor: int = libc.syscall(_SYS_IO_URING_SETUP, 4, parameters)
    if descriptor < 0:
        return errno.errorcode.get(ctypes.get_errno(), str(ctypes.get_errno()))
    os.close(descriptor)
    return None


def _aio_error() -> str | None:
    if platform.machine() not in _SYS_IO_SETUP:
        return "not tried on this architecture"
    setup, destroy = _SYS_IO_SETUP[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    context = ctypes.c_ulong(0)
    if libc.syscall(setup, 4, ctypes.byref(context)) < 0:
        return errno.errorcode.get(ctypes.get_errno(), str(ctypes.get_errno()))
    libc.syscall(destroy, context)
    return None


def _memory_available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _direct_io_error(directory: Path) -> str | None:
    """Write and read one aligned block past the page cache; the file is gone afterwards."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=".pf-doctor-", dir=directory)
    except OSError as problem:
        return problem.strerror or str(problem)
    os.close(descriptor)
    try:
        return _direct_round_trip(name)
    except OSError as problem:
        return problem.strerror or str(problem)
    finally:
        Path(name).unlink(missing_ok=True)


def _direct_round_trip(name: str) -> str | None:
    descriptor = os.open(name, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, DIRECT_BYTES) as block:  # anonymous maps are page-aligned
            block.write(b"\xa5" * DIRECT_BYTES)
            written = os.pwritev(descriptor, [block], 0)
            block.seek(0)
            block.write(bytes(DIRECT_BYTES))
            read = os.preadv(descriptor, [block], 0)
            same = block[:] == b"\xa5" * DIRECT_BYTES
    finally:
        os.close(descriptor)
    return None if (written, read, same) == (DIRECT_BYTES, DIRECT_BYTES, True) else "short transfer"


def _soft_limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _examine_port(name: str, number: int, own: Mapping[int, str]) -> Port:
    free = (port for port in range(number, number + PORT_TRIES) if _is_port_free(port))
    return Port(name, number, next(free, None), own.get(number))


def _is_port_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # As the servers bind: a connection in TIME_WAIT does not hold a port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen(1)
        except OSError:
            return False
    return True


def _clock_source() -> str:
    try:
        text = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource").read_text()
    except OSError:
        return "unknown"
    return text.strip()


def _boot_clock_works() -> bool:
    if sys.platform != "linux":
        return False
    try:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) > 0
    except OSError:
        return False
