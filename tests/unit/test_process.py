"""What all processes share: log lines, readiness, incarnations, listening sockets."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pureflash.errors import ClusterError, PureFlashError
from pureflash.process import logs
from pureflash.process.lifecycle import announce, next_incarnation, read_ready, write_whole
from pureflash.process.logs import JsonLog, LineFile, encode_line
from pureflash.process.net import bind_tcp, split_address
from pureflash.process.secrets import read_key, read_token


def test_a_line_has_the_documented_fields(tmp_path: Path) -> None:
    moment = dt.datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=dt.UTC)
    log = JsonLog("s1", tmp_path / "s1.jsonl", clock=lambda: moment)
    log.info("replica.made", "made it", volume=7)
    log.warning("disk.failed", "broken", code="DISK_FAILED", disk=0)
    log.close()
    first, second = (tmp_path / "s1.jsonl").read_text().splitlines()
    assert json.loads(first) == {
        "ts": "2026-01-02T03:04:05.678Z",
        "level": "INFO",
        "process": "s1",
        "event": "replica.made",
        "msg": "made it",
        "volume": 7,
    }
    assert json.loads(second)["code"] == "DISK_FAILED"
    assert json.loads(second)["level"] == "WARNING"
    assert (tmp_path / "s1.jsonl").stat().st_mode & 0o777 == 0o600


def test_lines_below_the_level_are_not_written(tmp_path: Path) -> None:
    log = JsonLog("s1", tmp_path / "s1.jsonl", level="warning")
    log.info("a", "unseen")
    log.warning("b", "seen", code="DISK_FULL")
    log.error("c", "seen")
    log.close()
    events = [
        json.loads(line)["event"] for line in (tmp_path / "s1.jsonl").read_text().splitlines()
    ]
    assert events == ["b", "c"]
    with pytest.raises(PureFlashError, match=r"log\.level is 'loud'"):
        JsonLog("s1", None, level="loud")


@given(st.text(max_size=9_000), st.dictionaries(st.sampled_from(["a", "b"]), st.text()))
def test_any_message_becomes_one_bounded_line(message: str, fields: dict[str, str]) -> None:
    entry = {"level": "info", "event": "e", "msg": message, **fields}
    line = encode_line("now", "p", entry)
    assert len(line) <= logs.LINE_BYTES_MAX
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line)["event"] == "e"


def test_a_full_file_becomes_the_first_of_five(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES_MAX", 10)
    file = LineFile(tmp_path / "x.jsonl")
    for number in range(8):
        file.write(f"line {number}\n".encode())
    file.close()
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {
        "x.jsonl": "line 7\n",
        **{f"x.jsonl.{age}": f"line {7 - age}\n" for age in range(1, 5)},
    }


def test_a_line_that_a_full_disk_cut_short_spoils_no_other(tmp_path: Path) -> None:
    """The limit of a file's size stands in for the end of the space: a write takes what fits."""
    file = LineFile(tmp_path / "x.jsonl")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        for number in (1, 2, 3):
            file.write(f"line {number}\n".encode())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.write(b"line 4\n")
    file.write(b"line 5\n")
    file.close()
    assert (tmp_path / "x.jsonl").read_text() == "line 1\nlin\nline 4\nline 5\n"
    assert file.lost_lines == 2


def test_an_incarnation_grows_when_the_clock_goes_back_and_when_the_file_is_lost(
    tmp_path: Path,
) -> None:
    file = tmp_path / "incarnation"
    first = next_incarnation(file, wall_ms=1_000)
    second = next_incarnation(file, wall_ms=500)
    assert (first, second) == (1_000, 1_001)
    file.unlink()
    assert next_incarnation(file, wall_ms=2_000) > second


@pytest.mark.parametrize(
    "text", [b"", b"xyz\n", b"\xff\xfe", b"-5", b"9" * 30, b"9007199254740992", b"\0" * 13]
)
def test_a_damaged_incarnation_is_drawn_anew_from_the_time(tmp_path: Path, text: bytes) -> None:
    """A store whose host lost power over it starts again."""
    file = tmp_path / "incarnation"
    file.write_bytes(text)
    assert next_incarnation(file, wall_ms=2_000) == 2_000
    assert next_incarnation(file, wall_ms=500) == 2_001


def test_readiness_appears_whole_and_names_this_life(tmp_path: Path) -> None:
    path = tmp_path / "s1.ready"
    assert read_ready(path) is None
    announce(path, incarnation=7, address="127.0.0.1:7162")
    ready = read_ready(path)
    assert ready is not None
    assert (ready.pid, ready.incarnation, ready.address) == (os.getpid(), 7, "127.0.0.1:7162")
    assert [entry.name for entry in tmp_path.iterdir()] == ["s1.ready"]
    write_whole(path, b"other")
    assert path.read_bytes() == b"other"


async def test_a_taken_port_is_refused_with_its_holder() -> None:
    first = await bind_tcp("127.0.0.1:0", name="the first")
    port = first.getsockname()[1]
    with pytest.raises(ClusterError) as caught:
        await bind_tcp(f"127.0.0.1:{port}", name="the second", timeout_s=0)
    assert f"pid {os.getpid()}" in caught.value.message
    waiting = asyncio.create_task(bind_tcp(f"127.0.0.1:{port}", name="the third"))
    await asyncio.sleep(0)
    first.close()
    (await waiting).close()


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:0", "[::]:0", "host.example:0"])
async def test_an_address_that_others_could_reach_is_refused(address: str) -> None:
    with pytest.raises(PureFlashError, match="needs TLS, not in this version"):
        await bind_tcp(address, name="the test")


@pytest.mark.parametrize("address", ["", "7180", "host:", "host:http", "host:99999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(PureFlashError, match="host:port"):
        split_address(address)


@pytest.mark.parametrize("text", ["", "zz", "ab" * 31])
def test_what_is_no_key_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cluster.key"
    path.write_text(text)
    with pytest.raises(PureFlashError, match="key"):
        read_key(path)
    path.write_text("ab" * 32 + "\n")
    assert read_key(path) == b"\xab" * 32


@pytest.mark.parametrize("text", [None, b"", b"two SECRET\nlines", b"\xff"])
def test_what_is_no_secret_is_said_without_it_and_with_a_way_on(
    tmp_path: Path, text: bytes | None
) -> None:
    path = tmp_path / "admin.token"
    for read in (read_token, read_key):
        if text is not None:
            path.write_bytes(text)
        with pytest.raises(PureFlashError) as caught:
            read(path)
        assert str(path) in caught.value.message
        assert "backup" in caught.value.next_step
        assert "SECRET" not in str(caught.value)
    path.write_bytes(b"a-token\n")
    assert read_token(path) == "a-token"


def test_a_child_ends_with_its_parent() -> None:
    # The grandchild asks for PDEATHSIG and waits for ever; the child prints its pid and dies.
    grandchild = (
        "import os, signal, sys; from pureflash.process.lifecycle import die_with_parent;"
        "die_with_parent(int(sys.argv[1])); os.write(1, b'up'); signal.pause()"
    )
    child = (
        "import os, subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1],"
        " str(os.getpid())], stdout=subprocess.PIPE); p.stdout.read(2); print(p.pid, flush=True);"
        " sys.stdin.read(); os.kill(os.getpid(), 9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", child, grandchild],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        pid = int(process.stdout.readline())
        handle = os.pidfd_open(pid)
        process.stdin.close()
        process.wait(30)
        import select

        assert select.select([handle], [], [], 30)[0], "the grandchild lives on"
        os.close(handle)
    assert process.returncode == -signal.SIGKILL


def run_python(program: str, *arguments: str) -> str:
    """Run a program with limits of its own; gives what it printed."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path) -> None:
    """A full disk takes a part of a write first; a limit on the size of files does the same."""
    path = tmp_path / "exports.json"
    write_whole(path, b"old")
    told = run_python(
        "import pathlib, resource, signal, sys\n"
        "from pureflash.process.lifecycle import write_whole\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))\n"
        "try:\n"
        "    write_whole(pathlib.Path(sys.argv[1]), b'longer than four')\n"
        "except OSError as problem:\n"
        "    print(problem.strerror)\n",
        str(path),
    )
    assert told == "File too large\n"
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["exports.json"]


def test_a_process_takes_as_many_descriptors_as_it_may_have() -> None:
    told = run_python(
        "import resource\n"
        "from pureflash.process.lifecycle import raise_descriptor_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))\n"
        "raise_descriptor_limit()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    assert told == "(2048, 2048)\n"
