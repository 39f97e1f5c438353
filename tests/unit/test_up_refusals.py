"""`pf up` where it cannot be: a clear error with the documented status, and nothing left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from tests.support.making import opened

from pureflash.cli.outcome import Exit
from pureflash.client.directory import take_lock
from pureflash.model.layout import Layout
from pureflash.supervisor import server
from pureflash.supervisor.cluster import Wish
from pureflash.supervisor.server import main

GIB = 1 << 30
PF = str(Path(sys.executable).with_name("pf"))


def up(data: Path, home: Path, *flags: str, **variables: str) -> tuple[int, str]:
    """Run `pf up` with `variables` beside HOME; gives its exit status and what it said."""
    result = subprocess.run(
        [PF, "up", "--data", str(data), *flags],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin", **variables},
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("variable", "failed", "more"),
    [
        ("XDG_CONFIG_HOME", "home/.config/pureflash/context.toml", ()),
        ("XDG_CONFIG_HOME", "home/.config/pureflash/context.toml", ("--detach",)),
        ("XDG_RUNTIME_DIR", "sockets/pureflash/", ()),
    ],
)
def test_a_place_beside_the_data_that_cannot_be_written_is_named_with_what_moves_it(
    tmp_path: Path, variable: str, failed: str, more: tuple[str, ...]
) -> None:
    for name in ("home", "sockets"):  # no folder can be made below a file, not by root either
        (tmp_path / name).write_text("not a folder")
    sockets = {"XDG_RUNTIME_DIR": str(tmp_path / "sockets")} if variable.endswith("DIR") else {}
    flags = ("--disk", "1G", *more)
    found, said = up(tmp_path / "data", tmp_path / "home", *flags, **sockets)
    assert found == Exit.USAGE
    assert str(tmp_path / failed) in said
    assert f"  what to do: let {variable} name a folder" in said
    left = sorted(str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*"))
    assert left == ["home", "sockets"], "nothing is at --data"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "more", "status", "cause", "step"),
    [
        ("file/data", (), Exit.USAGE, "cannot write", "--data"),
        ("file/data", ("--detach",), Exit.USAGE, "cannot write", "--data"),
        ("new", ("--disk", "500T"), Exit.FAILED, "10 % of all disks", "a smaller --disk"),
        ("new", ("--disk", "500T", "--detach"), Exit.FAILED, "% of all disks", "smaller --disk"),
        ("new", ("--disk", "4G", "--journal", "3G"), Exit.USAGE, "a journal of", "use 1M to 256M"),
        ("new", ("--disk", "10"), Exit.USAGE, "10G for GiB", "10GB for decimal"),
        ("new", ("--stores", "17"), Exit.USAGE, "17 stores", "use 1 to 16"),
        ("deep/new", ("--stores", "0"), Exit.USAGE, "0 stores", "1 to 16"),
        ("new", ("--disk", "1M"), Exit.USAGE, "a disk of 1 MiB", "1 GiB"),
        ("new", ("--conductor-port", "99999"), Exit.USAGE, "no port 99999", "1 to 65535"),
        ("new", ("--store-port", "65535", "--detach"), Exit.USAGE, "no port 65536", "1 to 65535"),
        ("new", ("--nbd-port", "TAKEN"), Exit.IN_THE_WAY, "is taken", "another port"),
        ("damaged", (), Exit.USAGE, "cluster.toml is damaged", "restore it"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(
    tmp_path: Path, place: str, more: tuple[str, ...], status: Exit, cause: str, step: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/cluster.toml").write_text("[cluster]\n")
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        flags = (port if flag == "TAKEN" else flag for flag in more)
        found, said = up(tmp_path / place, tmp_path / "home", *flags)
    assert (found, cause in said, step in said) == (status, True, True), said
    assert "Traceback" not in said
    left = {str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")}
    there = {"file", "damaged", "damaged/cluster.toml"}
    assert left == there, "no part of a cluster, and no context that names one"


@contextmanager
def running(directory: Path) -> Iterator[None]:
    """Let a cluster of three stores seem to run: the lock is held, and its record says so."""
    layout = Layout(directory)
    lock = take_lock(layout)
    assert lock is not None
    opened(layout, Wish(stores=3, disk_bytes=GIB))
    report = server.SupervisorReport(pid=os.getpid(), children=[])
    layout.supervisor_file.write_bytes(msgspec.json.encode(report))
    yield
    os.close(lock)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--stores", "5"), "already running with 3 stores; --stores 5 is not applied"),
        (("--stores", "0"), "already running with 3 stores; --stores 0 is not applied"),
        (("--stores", "-1"), "already running with 3 stores; --stores -1 is not applied"),
        (
            ("--disk-bytes", str(2 * GIB), "--journal-bytes", str(1 << 20)),
            "journals that the stores chose; --disk 2 GiB, --journal 1 MiB are not applied",
        ),
        (("--nbd-port", "9"), "; --nbd-port 9 is not applied"),
    ],
)
def test_a_wish_that_differs_from_the_cluster_that_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    with running(tmp_path):
        assert main(["--data", str(tmp_path), *flags]) == Exit.USAGE
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("pf: ")
    assert lines[0].endswith(f"{said} (INVALID)")
    assert lines[1].startswith(f"  what to do: leave {flags[0].removesuffix('-bytes')}")


def test_a_wish_that_the_cluster_that_runs_has_already_is_fine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path):
        assert main(["--data", str(tmp_path)]) == Exit.OK
        assert main(["--data", str(tmp_path), "--stores", "3", "--disk-bytes", str(GIB)]) == 0
    assert capsys.readouterr().out == f"already running in {tmp_path}\n" * 2


def test_a_refusal_in_the_foreground_has_the_form_of_every_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(tmp_path / "data"), "--stores", "0"]) == Exit.USAGE
    assert capsys.readouterr().err == (
        "pf: --stores: 0 stores cannot be on one machine (INVALID)\n  what to do: use 1 to 16\n"
    )
