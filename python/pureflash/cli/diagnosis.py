"""What the facts about a machine mean for PureFlash: `pf doctor`'s verdicts.

Pure: a `Machine` in, findings out, so each verdict is tested without the machine that earns it.
Three states. `fail`: PureFlash cannot run here. `warn`: it runs, with less speed, room or safety
margin than it should. `ok`. Each finding that is not ok says what to do. The names of the checks
are stable identifiers that scripts may use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from pureflash.cli.machine import PORT_TRIES, Machine, Port
from pureflash.client.context import Place
from pureflash.units import format_size

_GIB = 1024**3

KERNEL_TESTED_MIN = (6, 1)
"""Debian 12's kernel, the oldest that the tests run on; also the first with DEFER_TASKRUN."""

MEMORY_BYTES_MIN = 600 * 1024**2
"""What an idle `pf up` of three stores may use: below it, it cannot start."""

MEMORY_BYTES_GOOD = 2 * _GIB
DISKS_BYTES = 30 * _GIB
"""Three stores with the default disk of 10 GiB each; `pf up` needs a tenth of it free."""

OPEN_FILES_GOOD = 4096
"""128 connections per lane, disks, logs, and room."""

LOCKED_MEMORY_BYTES_GOOD = 64 * 1024**2
SOCKET_PATH_BYTES_MAX = 107
"""sun_path of unix(7) holds 108 bytes with its zero."""

SOCKET_NAME_BYTES = 24
"""Room that is kept for the name of a socket below its folder, with the slash."""

SAFE_FILE_SYSTEMS = frozenset({"ext4", "xfs"})
FAST_CLOCKS = frozenset({"tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page"})


class State(StrEnum):
    """How good a finding is, best first."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `pf doctor`; `next_step` is None only when the state is ok."""

    name: str
    state: State
    detail: str
    next_step: str | None = None


def diagnose(machine: Machine) -> tuple[Finding, ...]:
    """Judge a machine; one finding per check, always the same checks in the same order."""
    return (
        _core(machine),
        _kernel(machine),
        _io_uring(machine),
        _aio(machine),
        _processors(machine),
        _memory(machine),
        _directory(machine),
        _free_space(machine),
        _file_system(machine),
        _direct_io(machine),
        _open_files(machine),
        _locked_memory(machine),
        *(_port(port) for port in machine.ports),
        _clock(machine),
        _sockets(machine),
        _tools(machine),
    )


def worst_state(findings: Sequence[Finding]) -> State:
    """Give the worst state among the findings."""
    order = list(State)
    return max((finding.state for finding in findings), key=order.index, default=State.OK)


def as_document(findings: Sequence[Finding], place: Place) -> dict[str, object]:
    """Put the findings into the form of `pf doctor -o json`."""
    return {
        "state": worst_state(findings),
        "data": str(place.directory),
        "data_source": place.source,
        "checks": [asdict(finding) for finding in findings],
    }


def print_table(findings: Sequence[Finding], place: Place) -> None:
    """Print the findings for a person, and one sentence that sums them up."""
    from rich.console import Console
    from rich.text import Text

    colours = {State.OK: "green", State.WARN: "yellow", State.FAIL: "red"}
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"data directory {place.directory} (from {place.source})"))
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        line = Text.assemble(
            (f"{finding.state.value:<4}", colours[finding.state]),
            f"  {finding.name:<{width}}  {finding.detail}",
        )
        console.print(line)
        if finding.next_step:
            console.print(Text(f"{'':{width + 8}}what to do: {finding.next_step}"))
    console.print(Text(_summary(findings)))


def _summary(findings: Sequence[Finding]) -> str:
    failed = sum(finding.state is State.FAIL for finding in findings)
    warned = sum(finding.state is State.WARN for finding in findings)
    if failed:
        return f"This machine cannot run PureFlash yet: {failed} of {len(findings)} checks failed."
    if warned:
        return f"This machine can run PureFlash; {warned} of {len(findings)} checks want a look."
    return "This machine can run PureFlash."


def _core(machine: Machine) -> Finding:
    if machine.core_error is not None:
        step = "install the package again: pip install --force-reinstall pureflash"
        return Finding("core", State.FAIL, f"cannot be loaded: {machine.core_error}", step)
    return Finding("core", State.OK, f"loaded by Python {machine.python}")


def _kernel(machine: Machine) -> Finding:
    if _kernel_version(machine.kernel) < KERNEL_TESTED_MIN:
        step = "use Linux 6.1 or newer; nothing older is tested"
        return Finding("kernel", State.WARN, machine.kernel, step)
    return Finding("kernel", State.OK, machine.kernel)


def _kernel_version(release: str) -> tuple[int, int]:
    numbers = release.partition("-")[0].split(".")
    try:
        return int(numbers[0]), int(numbers[1])
    except (IndexError, ValueError):
        return (0, 0)  # an unreadable release is an untested one


def _io_uring(machine: Machine) -> Finding:
    if machine.io_uring_error is None:
        return Finding("io_uring", State.OK, "usable")
    step = "sysctl kernel.io_uring_disabled=0, or allow io_uring in the container's seccomp profile"
    instead = "aio" if machine.aio_error is None else "threads"
    detail = f"not usable ({machine.io_uring_error}); disks use the slower engine {instead}"
    return Finding("io_uring", State.WARN, detail, step)


def _aio(machine: Machine) -> Finding:
    """Judge the second choice: it is missed only where the first does not work either."""
    if machine.aio_error is None:
        return Finding("aio", State.OK, "usable")
    detail = f"not usable ({machine.aio_error})"
    if machine.io_uring_error is None:
        return Finding("aio", State.OK, f"{detail}, and not needed: disks use io_uring")
    step = "raise the sysctl fs.aio-max-nr (EAGAIN), or allow io_setup in the seccomp profile"
    return Finding("aio", State.WARN, f"{detail}; disks use the engine threads", step)


def _processors(machine: Machine) -> Finding:
    detail = f"{machine.core_count} usable"
    if machine.core_count < 2:
        return Finding("processors", State.WARN, detail, "give the machine two cores or more")
    return Finding("processors", State.OK, detail)


def _memory(machine: Machine) -> Finding:
    available = machine.memory_available_bytes
    detail = f"{format_size(available)} available"
    if available < MEMORY_BYTES_MIN:
        step = f"free memory: {format_size(MEMORY_BYTES_MIN)} is the least for three stores"
        return Finding("memory", State.FAIL, detail, step)
    if available < MEMORY_BYTES_GOOD:
        step = f"free memory, or run one store: {format_size(MEMORY_BYTES_GOOD)} is comfortable"
        return Finding("memory", State.WARN, detail, step)
    return Finding("memory", State.OK, detail)


def _directory(machine: Machine) -> Finding:
    if not machine.directory_writable:
        step = "choose another place with --data or PF_DATA"
        return Finding("directory", State.FAIL, f"{machine.directory} is not writable", step)
    return Finding("directory", State.OK, f"{machine.directory} is writable")


def _free_space(machine: Machine) -> Finding:
    detail = f"{format_size(machine.free_bytes)} free"
    if machine.free_bytes < DISKS_BYTES // 10:
        step = f"free {format_size(DISKS_BYTES // 10)}, or start smaller: pf up --disk 2G"
        return Finding("free_space", State.FAIL, detail, step)
    if machine.free_bytes < DISKS_BYTES:
        step = f"three default disks may grow to {format_size(DISKS_BYTES)}; use a smaller --disk"
        return Finding("free_space", State.WARN, detail, step)
    return Finding("free_space", State.OK, detail)


def _file_system(machine: Machine) -> Finding:
    if machine.file_system in SAFE_FILE_SYSTEMS:
        return Finding("file_system", State.OK, machine.file_system)
    step = "put the data on ext4 or xfs; elsewhere each write is flushed, as on a volatile cache"
    return Finding("file_system", State.WARN, machine.file_system, step)


def _direct_io(machine: Machine) -> Finding:
    if machine.direct_io_error is None:
        return Finding("direct_io", State.OK, "O_DIRECT works in the data directory")
    step = "put the data on a file system with O_DIRECT, such as ext4 or xfs"
    detail = f"no O_DIRECT in the data directory: {machine.direct_io_error}"
    return Finding("direct_io", State.WARN, detail, step)


def _open_files(machine: Machine) -> Finding:
    limit = machine.open_files_limit
    if limit is not None and limit < OPEN_FILES_GOOD:
        step = f"raise it: ulimit -n {OPEN_FILES_GOOD}"
        return Finding("open_files", State.WARN, f"at most {limit:,}", step)
    return Finding("open_files", State.OK, "unlimited" if limit is None else f"at most {limit:,}")


def _locked_memory(machine: Machine) -> Finding:
    limit = machine.locked_memory_limit_bytes
    if limit is None:
        return Finding("locked_memory", State.OK, "unlimited")
    detail = f"at most {limit // 1024:,} KiB"
    if limit < LOCKED_MEMORY_BYTES_GOOD:
        step = "raise it for io_uring's registered buffers: ulimit -l 65536"
        return Finding("locked_memory", State.WARN, detail, step)
    return Finding("locked_memory", State.OK, detail)


def _port(port: Port) -> Finding:
    name = f"port_{port.number}"
    if port.next_free == port.number:
        return Finding(name, State.OK, f"free ({port.name})")
    if port.own_process is not None:
        detail = f"taken by {port.own_process} of this cluster ({port.name})"
        return Finding(name, State.OK, detail)
    if port.next_free is not None:
        step = f"nothing: a new cluster takes {port.next_free} and keeps it"
        return Finding(name, State.WARN, f"taken ({port.name})", step)
    step = f"free one of the ports {port.number} to {port.number + PORT_TRIES - 1}"
    return Finding(name, State.FAIL, f"taken, and the next too ({port.name})", step)


def _clock(machine: Machine) -> Finding:
    if not machine.boot_clock_works:
        step = "use Linux with CLOCK_BOOTTIME: leases between stores are measured with it"
        return Finding("clock", State.FAIL, "CLOCK_BOOTTIME cannot be read", step)
    if machine.clock_source not in FAST_CLOCKS:
        step = "use the clock source tsc if the machine has it: reading this one costs microseconds"
        return Finding("clock", State.WARN, machine.clock_source, step)
    return Finding("clock", State.OK, machine.clock_source)


def _sockets(machine: Machine) -> Finding:
    room = SOCKET_PATH_BYTES_MAX - len(machine.socket_folder.encode())
    if room < SOCKET_NAME_BYTES:
        step = "set XDG_RUNTIME_DIR to a shorter path, or unset it"
        detail = f"only {max(room, 0)} bytes left for a name below {machine.socket_folder}"
        return Finding("sockets", State.FAIL, detail, step)
    return Finding("sockets", State.OK, f"{room} bytes left for a name below their folder")


def _tools(machine: Machine) -> Finding:
    if machine.missing_tools:
        step = "optional, for the demo and tests: apt-get install qemu-utils fio libnbd-bin"
        return Finding("tools", State.WARN, f"missing: {', '.join(machine.missing_tools)}", step)
    return Finding("tools", State.OK, "qemu-img, fio and nbdcopy found")
