"""The supervisor: when it starts a child again, and that children stop; with tiny children."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.making import opened
from tests.support.world import ListLog

from pureflash import _core
from pureflash.cli.app import run
from pureflash.client.directory import take_lock
from pureflash.errors import Code, PureFlashError
from pureflash.model.domain import Disk
from pureflash.model.exits import Exit
from pureflash.model.layout import Layout, known_disk_file
from pureflash.model.settings import SCHEMAS, load_settings
from pureflash.process.known_disks import remember
from pureflash.process.lifecycle import Ready
from pureflash.supervisor import server
from pureflash.supervisor.children import Child, ChildSpec
from pureflash.supervisor.cluster import (
    ClusterFile,
    Wish,
    forget_disks,
    make_sockets_folder,
    open_cluster,
    read_cluster,
    write_settings,
)
from pureflash.supervisor.policy import (
    CALM_MS,
    DEATHS_MAX,
    DELAY_LAST_MS,
    WINDOW_MS,
    ChildState,
    History,
    after_death,
)
from pureflash.supervisor.ports import PORT_TRIES, PortClaims
from pureflash.supervisor.server import kind_of, main

GIB = 1 << 30
CHILD = """
import json, os, signal, sys
ready = {ready!r}
signal.signal(signal.SIGTERM, {on_term})
with open(ready + ".new", "w") as file:
    json.dump({{"pid": os.getpid(), "incarnation": 7, "address": "127.0.0.1:1"}}, file)
os.rename(ready + ".new", ready)
{then}
"""


def test_delays_double_up_to_ten_seconds_and_begin_anew_after_a_calm_life() -> None:
    history: History | None = History()
    delays = []
    now = 0
    for _ in range(6):
        assert history is not None
        history = after_death(history, started_ms=now, now_ms=now)
        assert history is not None
        delays.append(history.delay_ms)
        now += history.delay_ms
    assert delays == [1_000, 2_000, 4_000, 8_000, 10_000, 10_000]
    assert history is not None
    calm = after_death(history, started_ms=now, now_ms=now + CALM_MS)
    assert calm is not None
    assert calm.delay_ms == 1_000


@given(st.lists(st.integers(0, 30_000), min_size=1, max_size=40))
def test_a_child_is_given_up_exactly_at_ten_deaths_within_a_minute(lives: list[int]) -> None:
    history = History()
    now = 0
    deaths: list[int] = []
    for life in lives:
        started, now = now, now + life
        deaths.append(now)
        recent = [death for death in deaths if now - death < WINDOW_MS]
        following = after_death(history, started_ms=started, now_ms=now)
        assert (following is None) == (len(recent) >= DEATHS_MAX)
        if following is None:
            return
        assert 1_000 <= following.delay_ms <= DELAY_LAST_MS
        history = following


def make_child(
    folder: Path,
    *,
    then: str,
    on_term: str = "signal.SIG_DFL",
    delay_ms: int = 1,
    on_change: Callable[[], None] = lambda: None,
) -> tuple[Child, list[tuple[str, Ready | None]]]:
    ready = folder / "x.ready"
    script = CHILD.format(ready=str(ready), on_term=on_term, then=then)
    exits: list[tuple[str, Ready | None]] = []

    async def on_exit(name: str, announced: Ready | None) -> None:
        exits.append((name, announced))

    spec = ChildSpec(
        name="x",
        command=(sys.executable, "-c", script),
        ready=ready,
        output=folder / "x.out",
    )
    child = Child(
        spec, restart_delay_ms=delay_ms, log=ListLog(), on_exit=on_exit, on_change=on_change
    )
    return child, exits


async def test_a_killed_child_is_reported_with_its_incarnation_and_started_again(
    tmp_path: Path,
) -> None:
    child, exits = make_child(tmp_path, then="signal.pause()")
    task = asyncio.create_task(child.run())
    await asyncio.wait_for(child.is_ready.wait(), 30)
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    has_changed = asyncio.Event()
    child._on_change = lambda: (
        has_changed.set() if child.is_ready.is_set() and child.pid != first else None
    )
    await asyncio.wait_for(has_changed.wait(), 30)
    assert [(name, ready.incarnation if ready else None) for name, ready in exits] == [("x", 7)]
    assert child.deaths == 1
    assert "SIGKILL" in child.reason
    child.stop()
    await asyncio.wait_for(task, 30)
    assert child.state is ChildState.STOPPED
    assert not child.spec.ready.exists()
    assert len(exits) == 1, "a stop is not a death"


async def test_a_child_that_keeps_dying_is_given_up_with_the_reason(tmp_path: Path) -> None:
    child, exits = make_child(tmp_path, then="sys.exit(3)")
    await asyncio.wait_for(child.run(), 60)
    assert child.state is ChildState.GIVEN_UP
    assert len(exits) == child.deaths == DEATHS_MAX
    assert "with status 3" in child.reason
    assert "not started again" in child.reason


async def test_the_last_words_of_a_child_are_its_reason(tmp_path: Path) -> None:
    said = "print('first', flush=True); print('x' * 5000 + ': the port is taken'); sys.exit(1)"
    child, _ = make_child(tmp_path, then=said)
    await asyncio.wait_for(child.run(), 60)
    assert child.reason.startswith("it ended with status 1: xxx")
    assert ": the port is taken, 10 times" in child.reason
    assert len(child.reason) < 1_200, "one line, not all that it said"


async def test_a_child_that_ignores_term_ends_by_kill(tmp_path: Path) -> None:
    child, _ = make_child(tmp_path, on_term="signal.SIG_IGN", then="while True: signal.pause()")
    task = asyncio.create_task(child.run())
    await asyncio.wait_for(child.is_ready.wait(), 30)
    child.stop()
    child.stop(signal.SIGKILL)
    await asyncio.wait_for(task, 30)
    assert child._process is not None
    assert child._process.returncode == -signal.SIGKILL, "TERM, sent before, did not end it"


def test_a_cluster_is_made_once_and_is_the_same_ever_after(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "data")
    wish = Wish(stores=2, disk_bytes=GIB, journal_bytes=16 << 20)
    cluster, _ = opened(layout, wish)
    assert opened(layout, Wish()) == (cluster, [])
    assert opened(layout, wish) == (cluster, [])
    assert cluster.names == ("c1", "s1", "s2", "g1")
    ports = [cluster.conductor_port, *cluster.store_ports, cluster.nbd_port]
    assert len(set(ports)) == 4
    assert max(ports) < 32_768
    for path in (layout.token, layout.key, layout.cluster_file):
        assert path.stat().st_mode & 0o777 == 0o600
    assert layout.token.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(PureFlashError, match="--stores"):
        opened(layout, Wish(stores=3))
    layout.cluster_file.write_text("[cluster]\n")
    with pytest.raises(PureFlashError, match="damaged"):
        read_cluster(layout)


def ports_of(cluster: ClusterFile) -> set[int]:
    return {cluster.conductor_port, *cluster.store_ports, cluster.nbd_port}


def test_clusters_that_are_made_at_the_same_time_have_ports_of_their_own(tmp_path: Path) -> None:
    """Nobody listens yet: without the claims all of them would choose the same ports."""
    wish = Wish(stores=2, disk_bytes=GIB)
    with PortClaims() as first, PortClaims() as second:
        clusters = [
            opened(Layout(tmp_path / name), wish, ports=ports)[0]
            for name, ports in (("a", first), ("b", second))
        ]
        assert len(ports_of(clusters[0]) | ports_of(clusters[1])) == 8
    with PortClaims() as third:
        stopped, _ = opened(Layout(tmp_path / "b"), Wish(), ports=third)
        assert stopped == clusters[1]
        with PortClaims() as fourth:
            assert not any(fourth.claim(port) for port in ports_of(stopped)), (
                "claimed at each start"
            )


def test_a_claim_ends_with_its_process_and_a_port_in_use_is_passed_over() -> None:
    script = (
        "import sys; from pureflash.supervisor.ports import PortClaims; claims = PortClaims();"
        "print(claims.next_free(int(sys.argv[1])), flush=True); sys.stdin.read()"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken, PortClaims() as claims:
        base = taken.getsockname()[1]
        with subprocess.Popen(
            [sys.executable, "-c", script, str(base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other:
            assert other.stdout is not None
            claimed = int(other.stdout.readline())
            assert base < claimed < base + PORT_TRIES
            assert not claims.claim(claimed)
            other.kill()
            other.wait(30)
            assert claims.claim(claimed)
        assert not claims.claim(claimed), "once is enough"
        assert claims.claim(base), "the one that was passed over is claimed by nobody"
    with PortClaims() as claims:
        for port in range(base, base + PORT_TRIES):
            assert claims.claim(port)
        with pytest.raises(PureFlashError, match=f"no free port from {base}"):
            claims.next_free(base)


async def test_a_report_that_cannot_be_written_is_tried_again_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "REPORT_RETRY_S", 0.01)
    layout = Layout(tmp_path / "data")
    with PortClaims() as claims:
        cluster, _ = await open_cluster(layout, Wish(stores=1, disk_bytes=GIB), ports=claims)
    log = ListLog()
    options = server.Options(layout=layout, wish=Wish(), restart_delay_ms=1)
    supervisor = server.Supervisor(options, cluster, log)
    folder = layout.supervisor_file.parent
    folder.rmdir()  # stands in for a disk without space: the file cannot be made
    for child in supervisor.children.values():
        child._enter(ChildState.WAITING)
    folder.mkdir()
    async with asyncio.timeout(30):
        while not layout.supervisor_file.exists():
            await asyncio.sleep(0)
    report = json.loads(layout.supervisor_file.read_text())
    assert {child["state"] for child in report["children"]} == {ChildState.WAITING}
    assert [event for _, event, _ in log.lines].count("report.unwritten") == 1


def test_the_settings_of_every_process_are_understood_by_it(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "data")
    cluster, _ = opened(layout, Wish(stores=2, disk_bytes=GIB, journal_bytes=16 << 20))
    write_settings(layout, cluster, tmp_path / "sockets")
    for name in cluster.names:
        text = layout.config(name).read_text()
        settings = load_settings(SCHEMAS[kind_of(name)], text=text, source=name, environment={})
        assert settings.text("node.id") == name
        assert settings.text("cluster.id") == cluster.cluster_id
        if kind_of(name) == "store":
            (disk,) = settings.disks
            assert (disk.size_bytes, disk.journal_bytes) == (GIB, 16 << 20)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish(stores=0), "use 1 to 16"),
        (Wish(stores=17), "use 1 to 16"),
        (Wish(disk_bytes=1 << 20), "least is 1 GiB"),
        (Wish(disk_bytes=1 << 60), "% of all disks"),
        (Wish(disk_bytes=GIB, journal_bytes=4096), "use 1M to 64M with disks of 1 GiB"),
        (Wish(disk_bytes=GIB, journal_bytes=GIB), "use 1M to 64M with disks of 1 GiB"),
    ],
)
def test_what_cannot_be_is_refused_and_makes_no_cluster(
    tmp_path: Path, wish: Wish, message: str
) -> None:
    layout = Layout(tmp_path / "data")
    with pytest.raises(PureFlashError, match=message):
        opened(layout, wish)
    assert not layout.directory.exists(), "nothing is left behind"


def test_only_one_supervisor_has_the_lock_and_its_pid_is_in_it(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "data")
    lock = take_lock(layout)
    assert lock is not None
    assert take_lock(layout) is None
    assert layout.lock.read_text() == str(os.getpid())
    os.close(lock)
    again = take_lock(layout)
    assert again is not None
    os.close(again)


def test_a_socket_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pureflash" / "abcd"
    make_sockets_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    make_sockets_folder(folder)
    folder.parent.chmod(0o755)
    with pytest.raises(PureFlashError, match="not a private folder"):
        make_sockets_folder(folder)


def test_socket_paths_are_short_and_differ_between_clusters(tmp_path: Path) -> None:
    one = Layout(Path("/a")).sockets(runtime_directory=None, uid=1000)
    two = Layout(Path("/b")).sockets(runtime_directory=None, uid=1000)
    assert one != two
    assert one.parent == two.parent == Path("/tmp/pureflash-1000")
    runtime = Layout(tmp_path).sockets(runtime_directory="/run/user/1000", uid=1000)
    assert runtime.parent == Path("/run/user/1000/pureflash")
    assert len(runtime.name) == 8
    assert json.loads(json.dumps(str(runtime))) == str(runtime)


@pytest.fixture
def used(tmp_path: Path) -> tuple[Layout, ClusterFile]:
    """Give a cluster of two stores with real disks, known to them."""
    layout = Layout(tmp_path / "data")
    cluster, _ = opened(layout, Wish(stores=2, disk_bytes=GIB))
    for name in ("s1", "s2"):
        layout.store_data(name).mkdir()
        _core.format_disk(
            layout.disk(name), size_bytes=GIB, cluster_id=bytes.fromhex(cluster.cluster_id)
        )
        found = _core.inspect_disk(layout.disk(name))
        disk = Disk(
            index=0,
            path=str(layout.disk(name)),
            disk_uuid=found["disk_uuid"],
            format_uuid=found["format_uuid"],
            size_bytes=GIB,
        )
        remember(layout.store_data(name), disk)
    return layout, cluster


def known(layout: Layout) -> list[bool]:
    return [known_disk_file(layout.store_data(name), 0).exists() for name in ("s1", "s2")]


def test_a_new_disk_is_only_for_a_store_that_lost_its_own(
    used: tuple[Layout, ClusterFile],
) -> None:
    layout, cluster = used
    with pytest.raises(PureFlashError, match="the disk of s1 is there") as there:
        forget_disks(layout, cluster, ["s1"], stamp="1")
    assert there.value.code is Code.UNSAFE
    layout.disk("s1").unlink()
    for wrong in ("s3", "c1", "g1"):
        with pytest.raises(PureFlashError, match=f"there is no store '{wrong}'"):
            forget_disks(layout, cluster, ["s1", wrong], stamp="1")
    assert all(known(layout)), "nothing was changed"
    assert forget_disks(layout, cluster, ["s1"], stamp="1") == []
    assert known(layout) == [False, True]


def of_another_cluster(disk: Path) -> None:
    disk.unlink()
    _core.format_disk(disk, size_bytes=GIB, cluster_id=bytes(16))


def of_another_store(disk: Path) -> None:
    with (disk.parent.parent / "s2/disk0.img").open("rb") as other:
        disk.write_bytes(other.read(64 << 20))
    os.truncate(disk, GIB)


@pytest.mark.parametrize(
    "harm",
    [
        lambda disk: os.truncate(disk, 300 << 20),
        lambda disk: os.truncate(disk, 0),
        lambda disk: disk.write_bytes(b"something else"),
        of_another_cluster,
        of_another_store,
    ],
)
def test_what_lies_where_a_disk_was_is_moved_aside_and_never_deleted(
    used: tuple[Layout, ClusterFile], harm: Callable[[Path], object]
) -> None:
    layout, cluster = used
    disk = layout.disk("s1")
    harm(disk)
    identity = (disk.stat().st_ino, disk.stat().st_size)
    (told,) = forget_disks(layout, cluster, ["s1"], stamp="20261130T220000Z")
    aside = disk.with_name("disk0.img.aside-20261130T220000Z")
    assert str(aside) in told
    assert (aside.stat().st_ino, aside.stat().st_size) == identity
    assert not disk.exists()
    assert known(layout) == [False, True]


def made_at(tmp_path: Path, base: int) -> tuple[Layout, ClusterFile]:
    layout = Layout(tmp_path / "data")
    wish = Wish(
        stores=1,
        disk_bytes=GIB,
        conductor_port=base,
        store_port=base + 1,
        nbd_port=base + 2,
    )
    return layout, opened(layout, wish)[0]


def free_base() -> int:
    """Give a port with free ones behind it, far from the defaults."""
    with PortClaims() as claims:
        for base in range(21_000, 30_000, 40):
            if all(claims.take(base + number) for number in range(10)):
                return base
    raise AssertionError("no ten free ports")


def test_a_port_that_was_taken_meanwhile_is_changed_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pureflash.supervisor.ports.ENDING_S", 0.0)
    base = free_base()
    layout, cluster = made_at(tmp_path, base)
    assert ports_of(cluster) == {base, base + 1, base + 2}
    for port, whose in ((base, "conductor"), (base + 1, "s1"), (base + 2, "gateway")):
        with socket.create_server(("127.0.0.1", port)), PortClaims() as claims:
            again, warnings = opened(layout, Wish(), ports=claims)
            assert port not in ports_of(again)
            assert len(ports_of(again)) == 3
            assert any(whose in text and f"{port} is taken" in text for text in warnings)
            is_nbd = port == base + 2
            assert any("exports over TCP have another URI" in it for it in warnings) == is_nbd
            assert read_cluster(layout) == again, "and it is written down"
    assert opened(layout, Wish()) == (again, []), "where it is from now on"


def test_ports_are_what_a_person_asks_for(tmp_path: Path) -> None:
    base = free_base()
    layout, cluster = made_at(tmp_path, base)
    with socket.create_server(("127.0.0.1", base + 5)):
        with pytest.raises(PureFlashError, match=f"--nbd-port: port {base + 5} is taken") as taken:
            opened(layout, Wish(nbd_port=base + 5))
        assert taken.value.code is Code.IN_USE
        assert f"(pid {os.getpid()})" in taken.value.message
    assert read_cluster(layout) == cluster
    for wrong in (0, 70_000):
        with pytest.raises(PureFlashError, match=f"there is no port {wrong}"):
            opened(layout, Wish(conductor_port=wrong))
    moved, warnings = opened(layout, Wish(nbd_port=base + 5))
    assert moved.nbd_port == base + 5
    assert warnings == ["exports over TCP have another URI now: pf export list"]


def test_a_process_that_is_just_ending_keeps_its_port_for_its_cluster(tmp_path: Path) -> None:
    base = free_base()
    layout, cluster = made_at(tmp_path, base)
    holder = socket.create_server(("127.0.0.1", base))

    async def meanwhile() -> tuple[ClusterFile, list[str]]:
        with PortClaims() as claims:
            asyncio.get_running_loop().call_later(0.3, holder.close)
            return await open_cluster(layout, Wish(), ports=claims)

    assert asyncio.run(meanwhile()) == (cluster, [])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ('id = "zz"', "the id of a cluster"),
        ("id = 7", "the id of a cluster"),
        ('conductor = "x"', "ports.conductor"),
        ("conductor = 99999", "ports.conductor"),
        ("conductor = -1", "ports.conductor"),
        ("conductor = true", "ports.conductor"),
        ("stores = []", "ports.stores"),
        ("stores = 7162", "ports.stores"),
        ('stores = ["a"]', "ports.stores"),
        ("nbd = 1.5", "ports.nbd"),
        ('size_bytes = "1G"', "disk.size_bytes"),
        ("journal_bytes = -1", "disk.journal_bytes"),
        ("\udcff", "utf-8"),
        ("ports = ", ""),
    ],
)
def test_a_damaged_cluster_file_is_said_and_nothing_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str, named: str
) -> None:
    layout = Layout(tmp_path / "data")
    opened(layout, Wish(stores=1, disk_bytes=1 << 30))
    key = wrong.partition(" ")[0] + " = "
    lines = layout.cluster_file.read_text().splitlines()
    kept = [wrong if line.startswith(key) else line for line in lines]
    text = "\n".join(kept if wrong in kept else [wrong, *lines])
    layout.cluster_file.write_bytes(text.encode(errors="surrogateescape"))
    assert main(["--data", str(layout.directory)]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "cluster.toml is damaged" in said
    assert named in said
    assert "restore it from a backup" in said


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", r"the section \[\w+\] is missing"),
        ("cluster = 7\nports = 7", r"\w+ is no section"),
        ("[cluster]\n[ports]", r"(cluster\.id|ports\.\w+) is missing"),
        ("not toml", "Expected"),
    ],
)
def test_every_command_says_the_same_of_a_cluster_file_without_its_entries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: str
) -> None:
    layout = Layout(tmp_path)
    opened(layout, Wish(stores=1, disk_bytes=GIB))
    layout.cluster_file.write_text(text)
    for command in (("up",), ("up", "--detach"), ("status",), ("down", "--purge", "--yes")):
        if command == ("up",):
            assert main(["--data", str(tmp_path)]) == Exit.USAGE
        else:
            assert run([*command, "--data", str(tmp_path)]) == Exit.USAGE
        said = capsys.readouterr().err
        assert re.search(f"cluster.toml is damaged: {named}", said), (command, said)
        assert "what to do: restore it from a backup; the disks name the cluster" in said, command
    assert layout.token.exists(), "nothing was deleted"


@pytest.mark.parametrize("name", ["cluster.toml", "config/c1.toml"])
def test_a_folder_in_place_of_a_file_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    layout = Layout(tmp_path / "data")
    opened(layout, Wish(stores=1, disk_bytes=1 << 30))
    (layout.directory / name).unlink(missing_ok=True)
    (layout.directory / name).mkdir()
    assert main(["--data", str(layout.directory)]) == Exit.USAGE
    said = capsys.readouterr().err
    assert name in said
    assert "Is a directory" in said
