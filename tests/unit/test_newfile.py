"""A new file of the user's: whole or not there, and never in the place of another one."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from tests.unit.test_commands import FakeVolume

from pureflash.cli.images import UNDER_WAY, copy_in, copy_out
from pureflash.cli.newfile import NewFile
from pureflash.cli.outcome import CommandProblem, Exit, Terminated, describe, exit_status_of
from pureflash.client.device import Device

PATIENCE_S = 60


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(file: Path) -> CommandProblem:
    with pytest.raises(CommandProblem) as caught, NewFile(file):
        pass
    assert caught.value.exit_status is Exit.IN_THE_WAY
    return caught.value


def test_a_file_is_there_when_it_is_whole_and_for_its_user_alone(tmp_path: Path) -> None:
    file = tmp_path / "disk.img"
    before = os.umask(0)
    try:
        with NewFile(file) as new:
            new.stream.write(b"whole")
            partial, lock = names(tmp_path)
            assert not file.exists()
            assert partial.startswith(".disk.img.")
            assert partial.endswith(".part")
            assert lock == ".disk.img.lock"
            assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
            new.publish()
    finally:
        os.umask(before)
    assert names(tmp_path) == ["disk.img"]
    assert file.read_bytes() == b"whole"
    assert file.stat().st_mode & 0o777 == 0o600


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with NewFile(tmp_path / "disk.img") as new:
            new.stream.write(b"half")
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert names(tmp_path) == []


def test_two_makers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "disk.img"
    with NewFile(file) as first:
        first.stream.write(b"of the first")
        there = names(tmp_path)
        assert "is being made by another command" in refused(file).message
        assert names(tmp_path) == there, "the later one has taken nothing away"
        with NewFile(tmp_path / "other.img") as other:
            other.publish()
        first.publish()
    assert file.read_bytes() == b"of the first"
    assert f"{file} exists" in refused(file).message


def test_of_many_at_once_one_begins(tmp_path: Path) -> None:
    all_tried, count = threading.Barrier(8), threading.Semaphore(0)

    def make(number: int) -> str:
        all_tried.wait(PATIENCE_S)
        try:
            with NewFile(tmp_path / "disk.img") as new:
                for _ in range(7):
                    assert count.acquire(timeout=PATIENCE_S), "the others have been refused"
                new.stream.write(b"%d" % number)
                new.publish()
        except CommandProblem as problem:
            count.release()
            return problem.message
        return str(number)

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(make, range(8)))
    (winner,) = [one for one in said if one.isdigit()]
    assert (tmp_path / "disk.img").read_text() == winner
    assert names(tmp_path) == ["disk.img"]


@pytest.mark.parametrize("kind", ["file", "link to nothing", "folder"])
def test_what_somebody_made_meanwhile_is_not_replaced(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "disk.img"
    with NewFile(file) as new:
        new.stream.write(b"ours")
        if kind == "file":
            file.write_bytes(b"theirs")
        elif kind == "folder":
            file.mkdir()
        else:
            file.symlink_to(tmp_path / "nothing")
        with pytest.raises(CommandProblem, match="exists"):
            new.publish()
    assert names(tmp_path) == ["disk.img"]
    assert kind != "file" or file.read_bytes() == b"theirs"
    assert f"{file} exists" in refused(file).message


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_file_system_without_hard_links_is_served_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_taken: bool
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    file = tmp_path / "disk.img"
    with NewFile(file) as new:
        new.stream.write(b"ours")
        if is_taken:
            file.write_bytes(b"theirs")
            with pytest.raises(CommandProblem, match="exists"):
                new.publish()
        else:
            new.publish()
    assert file.read_bytes() == (b"theirs" if is_taken else b"ours")
    assert names(tmp_path) == ["disk.img"]


def test_remains_of_the_dead_are_removed_and_nothing_else(tmp_path: Path) -> None:
    file, token = tmp_path / "disk.img", "0123456789abcdef"
    dead = tmp_path / f".disk.img.{token}.part"
    alive = tmp_path / f".disk.img.{token[::-1]}.part"
    link = tmp_path / f".disk.img.{token[8:]}{token[8:]}.part"
    others = [".disk.img.part", f".disk.img.{token}.part~", f".other.img.{token}.part", "disk.im"]
    link.symlink_to(tmp_path / "disk.im")
    for path in (dead, alive, *(tmp_path / name for name in others)):
        path.write_bytes(b"x")
    (tmp_path / ".disk.img.lock").touch()  # of the dead as well
    with alive.open("r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with NewFile(file) as new:
            assert new.removed == [dead]
            new.publish()
    assert names(tmp_path) == sorted([alive.name, link.name, *others, "disk.img"])


def test_a_file_of_the_users_with_the_name_of_a_lock_stays(tmp_path: Path) -> None:
    lock = tmp_path / ".disk.img.lock"
    lock.write_bytes(b"mine")
    assert "is not a lock of ours" in refused(tmp_path / "disk.img").message
    assert lock.read_bytes() == b"mine"
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    assert "is not a lock of ours" in refused(tmp_path / "disk.img").message
    assert names(tmp_path) == [".disk.img.lock"], "nothing is made where a link leads"


HOLD = """
import signal, sys
from pathlib import Path
from pureflash.cli import app, outcome
from pureflash.cli.newfile import NewFile

def hold():
    with NewFile(Path(sys.argv[1])) as new:
        print("holds", flush=True)
        while True:
            signal.pause()

outcome.catch_term()
app.app.command("hold")(hold)
sys.exit(app.run(["hold"]))
"""


@contextmanager
def holding(file: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a command of `pf` that is making a file."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "holds\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGTERM, Exit.TERMINATED, "pf: ended by TERM"),
        (signal.SIGINT, Exit.INTERRUPTED, ""),
    ],
)
def test_a_command_that_is_ended_takes_back_what_it_began(
    tmp_path: Path, number: signal.Signals, status: Exit, said: str
) -> None:
    with holding(tmp_path / "disk.img") as process:
        assert len(names(tmp_path)) == 2
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status
    assert said in errors
    assert "Traceback" not in errors
    assert names(tmp_path) == []


def test_a_command_that_was_killed_is_cleaned_up_after_by_the_next(tmp_path: Path) -> None:
    with holding(tmp_path / "disk.img") as process:
        assert "is being made" in refused(tmp_path / "disk.img").message
        process.kill()
        process.wait(PATIENCE_S)
    assert len(names(tmp_path)) == 2
    with NewFile(tmp_path / "disk.img") as new:
        assert len(new.removed) == 1
        new.publish()
    assert names(tmp_path) == ["disk.img"]


def test_term_is_an_end_of_its_own() -> None:
    assert exit_status_of(Terminated()) == 143
    assert describe(Terminated()) == "pf: ended by TERM"


class Away(FakeVolume):
    """A volume whose store is away: a request waits until the volume is closed."""

    def __init__(self) -> None:
        super().__init__(64 << 20)
        self.asked = threading.Semaphore(0)
        self.is_closed = threading.Event()

    def pread(self, offset: int, length: int) -> bytes:
        self.asked.release()
        assert self.is_closed.wait(PATIENCE_S)
        raise LookupError(f"closed: {length} bytes at {offset}")

    def pwrite(self, offset: int, data: bytes) -> None:
        self.pread(offset, len(data))

    def close(self) -> None:
        self.is_closed.set()


@pytest.mark.parametrize("is_export", [True, False])
def test_a_copy_that_waits_for_a_store_ends_when_it_is_interrupted(
    tmp_path: Path, *, is_export: bool
) -> None:
    volume, file = Away(), tmp_path / "image"
    file.write_bytes(b"x" * (8 << 20))

    def interrupt() -> None:
        for _ in range(UNDER_WAY):
            volume.asked.acquire(timeout=PATIENCE_S)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with file.open("r+b") as stream:
        out = partial(copy_out, Device(volume), stream, volume.size, title="export")
        into = partial(copy_in, stream, Device(volume), 8 << 20, title="import")
        with pytest.raises(KeyboardInterrupt):
            (out if is_export else into)()
    thread.join()


@pytest.mark.parametrize(
    "kind",
    [
        "link",
        "folder",
        "fifo",
        pytest.param(
            "other's", marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can chown")
        ),
    ],
)
def test_what_somebody_planted_as_the_lock_is_named_before_anything_is_made(
    tmp_path: Path, kind: str
) -> None:
    """In /tmp another user's lock could be taken, but not removed once the file was made."""
    file, lock = tmp_path / "disk.img", tmp_path / ".disk.img.lock"
    if kind == "link":
        lock.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        lock.mkdir()
    elif kind == "fifo":
        os.mkfifo(lock)
    else:
        lock.touch()
        os.chown(lock, 65_534, 65_534)
    problem = refused(file)
    assert "is not a lock of ours" in problem.message
    assert problem.next_step
    assert names(tmp_path) == [".disk.img.lock"]
