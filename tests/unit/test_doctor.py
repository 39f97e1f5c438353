"""`pf doctor`: each verdict from facts alone, then the whole command on this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pureflash.cli import machine as machine_module
from pureflash.cli.app import run
from pureflash.cli.diagnosis import Finding, State, diagnose, worst_state
from pureflash.cli.machine import (
    PORT_TRIES,
    Machine,
    Port,
    examine,
    file_system_of,
    nearest_existing,
    socket_folder,
)
from pureflash.cli.outcome import Exit
from pureflash.model.layout import Layout

GIB = 1024**3
GOOD = Machine(
    kernel="6.1.0-18-amd64",
    python="3.11.2",
    core_error=None,
    io_uring_error=None,
    aio_error=None,
    core_count=4,
    memory_available_bytes=8 * GIB,
    directory=Path("/data"),
    directory_writable=True,
    free_bytes=100 * GIB,
    file_system="ext4",
    direct_io_error=None,
    open_files_limit=65536,
    locked_memory_limit_bytes=None,
    ports=(Port("store", 7162, 7162),),
    clock_source="tsc",
    boot_clock_works=True,
    socket_folder="/run/user/1000/pureflash/00000000",
    missing_tools=(),
)


def finding(name: str, **changes: object) -> Finding:
    """Judge the good machine with some facts changed; the finding of one check."""
    changed = dataclasses.replace(GOOD, **changes)  # type: ignore[arg-type]
    (found,) = [each for each in diagnose(changed) if each.name == name]
    return found


def test_a_good_machine_has_nothing_to_do() -> None:
    findings = diagnose(GOOD)
    assert worst_state(findings) is State.OK
    assert all(each.next_step is None for each in findings)


@pytest.mark.parametrize(
    ("name", "changes", "state"),
    [
        ("core", {"core_error": "no such file"}, State.FAIL),
        ("kernel", {"kernel": "5.10.0-28-amd64"}, State.WARN),
        ("kernel", {"kernel": "strange"}, State.WARN),
        ("io_uring", {"io_uring_error": "EPERM"}, State.WARN),
        ("aio", {"io_uring_error": "EPERM", "aio_error": "EAGAIN"}, State.WARN),
        ("processors", {"core_count": 1}, State.WARN),
        ("memory", {"memory_available_bytes": 1 * GIB}, State.WARN),
        ("memory", {"memory_available_bytes": GIB // 2}, State.FAIL),
        ("directory", {"directory_writable": False}, State.FAIL),
        ("free_space", {"free_bytes": 29 * GIB}, State.WARN),
        ("free_space", {"free_bytes": 3 * GIB - 1}, State.FAIL),
        ("file_system", {"file_system": "overlay"}, State.WARN),
        ("direct_io", {"direct_io_error": "Invalid argument"}, State.WARN),
        ("open_files", {"open_files_limit": 1024}, State.WARN),
        ("locked_memory", {"locked_memory_limit_bytes": 8 * 1024**2}, State.WARN),
        ("port_7162", {"ports": (Port("store", 7162, 7165),)}, State.WARN),
        ("port_7162", {"ports": (Port("store", 7162, None),)}, State.FAIL),
        ("clock", {"clock_source": "acpi_pm"}, State.WARN),
        ("clock", {"boot_clock_works": False}, State.FAIL),
        ("sockets", {"socket_folder": "/" + "x" * 90}, State.FAIL),
        ("tools", {"missing_tools": ("fio",)}, State.WARN),
    ],
)
def test_each_shortcoming_has_its_state_and_a_next_step(
    name: str, changes: dict[str, object], state: State
) -> None:
    found = finding(name, **changes)
    assert found.state is state
    assert found.next_step


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("kernel", {"kernel": "6.18.44"}),
        ("aio", {"aio_error": "ENOSYS"}),
        ("free_space", {"free_bytes": 30 * GIB}),
        ("open_files", {"open_files_limit": None}),
        ("locked_memory", {"locked_memory_limit_bytes": 64 * 1024**2}),
        ("sockets", {"socket_folder": "/" + "x" * 82}),
    ],
)
def test_just_enough_is_ok(name: str, changes: dict[str, object]) -> None:
    assert finding(name, **changes).state is State.OK


@pytest.mark.parametrize(("aio_error", "engine"), [(None, "aio"), ("EPERM", "threads")])
def test_without_io_uring_the_doctor_names_the_engine_instead(
    aio_error: str | None, engine: str
) -> None:
    assert engine in finding("io_uring", io_uring_error="EPERM", aio_error=aio_error).detail


def test_the_command_shows_every_check_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(["doctor", "--data", str(tmp_path / "not" / "yet"), "-o", "json"])
    document = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in document["checks"]}
    assert set(checks) == {
        *("core", "kernel", "io_uring", "aio", "processors", "memory", "directory"),
        "free_space",
        *("file_system", "direct_io", "open_files", "locked_memory", "port_7162", "port_7180"),
        *("port_10809", "clock", "sockets", "tools"),
    }
    assert checks["core"]["state"] == checks["directory"]["state"] == "ok"
    assert document["data_source"] == "--data"
    assert (status == Exit.FAILED) == (document["state"] == "fail")
    assert list(tmp_path.iterdir()) == [], "the doctor leaves nothing behind"


def test_a_failed_check_makes_the_command_fail_and_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = dataclasses.replace(GOOD, directory=tmp_path, directory_writable=False)
    monkeypatch.setattr(machine_module, "examine", lambda _: bad)
    assert run(["doctor", "--data", str(tmp_path)]) == Exit.FAILED
    shown = capsys.readouterr().out
    assert "is not writable" in shown
    assert "what to do: choose another place" in shown
    assert "cannot run PureFlash yet: 1 of" in shown


@pytest.mark.parametrize("next_free", [7165, None])
def test_a_port_of_the_own_cluster_is_well(next_free: int | None) -> None:
    found = finding("port_7162", ports=(Port("store", 7162, next_free, "s1"),))
    assert (found.state, found.detail) == (State.OK, "taken by s1 of this cluster (store)")
    assert found.next_step is None


LISTEN = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("is_own", [True, False])
def test_the_listeners_of_the_own_cluster_are_told_from_those_of_others(
    tmp_path: Path, *, is_own: bool
) -> None:
    layout = Layout(tmp_path)
    layout.supervisor_file.parent.mkdir()
    # A record that is old may name a process of somebody else.
    folder = tmp_path if is_own else Path("/elsewhere")
    command = [sys.executable, "-c", LISTEN, str(folder / "config/c1.toml")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        children = [{"name": "c1", "pid": process.pid}, {"name": "s1", "pid": None}]
        layout.supervisor_file.write_text(json.dumps({"pid": 1, "children": children}))
        found = machine_module.own_listeners(tmp_path)
        assert dict(found) == ({port: "c1"} if is_own else {})
        seen = machine_module._examine_port("test", port, found)
        assert seen.own_process == ("c1" if is_own else None)


@pytest.mark.parametrize("report", [None, "", "{}", "[]", '{"children": [{"pid": "x"}]}'])
def test_a_directory_without_a_cluster_listens_nowhere(tmp_path: Path, report: str | None) -> None:
    if report is not None:
        Layout(tmp_path).supervisor_file.parent.mkdir()
        Layout(tmp_path).supervisor_file.write_text(report)
    assert dict(machine_module.own_listeners(tmp_path)) == {}


def test_a_taken_port_is_noticed_and_the_next_one_named(tmp_path: Path) -> None:
    taken = examine(tmp_path).ports
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        found = machine_module._examine_port("test", number, {})
    assert found.next_free is None or number < found.next_free < number + PORT_TRIES
    assert [port.number for port in taken] == [7162, 7180, 10809]


def test_direct_io_is_really_tried(tmp_path: Path) -> None:
    assert machine_module._direct_io_error(tmp_path / "missing") == "No such file or directory"


def test_limits_are_those_of_this_process(tmp_path: Path) -> None:
    facts = examine(tmp_path)
    assert facts.core_count == len(os.sched_getaffinity(0))
    assert facts.free_bytes > 0
    assert facts.memory_available_bytes > 0
    assert facts.boot_clock_works


def test_a_directory_that_is_not_there_yet_is_judged_by_its_ancestor(tmp_path: Path) -> None:
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path


MOUNTINFO = """\
22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:25 / /srv rw shared:5 - tmpfs tmpfs rw
31 30 8:2 / /srv/my\\040data rw shared:6 - xfs /dev/sdb rw
32 30 8:3 / /srv/my\\040data rw shared:7 - btrfs /dev/sdc rw
"""


@pytest.mark.parametrize(
    ("directory", "expected"),
    [
        ("/var", "ext4"),
        ("/srv/x", "tmpfs"),
        ("/srv/my data/x", "btrfs"),
        ("/srvx", "ext4"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(directory: str, expected: str) -> None:
    assert file_system_of(Path(directory), MOUNTINFO) == expected


def test_sockets_live_in_the_runtime_directory_if_there_is_one() -> None:
    assert socket_folder("/run/user/7", 7) == "/run/user/7/pureflash/00000000"
    assert socket_folder(None, 7) == "/tmp/pureflash-7/00000000"
