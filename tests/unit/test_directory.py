"""The data directory: a cluster is made only in a place of one's own, and only it is deleted."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.making import opened

from pureflash.cli.app import run
from pureflash.cli.outcome import Exit
from pureflash.client import directory
from pureflash.client.directory import Beginning, check_directory, purge, purge_sockets, take_lock
from pureflash.errors import Code, PureFlashError
from pureflash.model.layout import Layout, known_disk_file
from pureflash.process.lifecycle import write_whole
from pureflash.supervisor import server
from pureflash.supervisor.cluster import Wish, write_settings

GIB = 1 << 30
OWN_FILES = (
    "conductor/meta.sqlite",
    "conductor/meta.sqlite-wal",
    "conductor/meta.sqlite.lock",
    "log/c1.jsonl",
    "log/s2.jsonl.3",
    "log/supervisor.jsonl",
    "log/g1.out",
    "gateways/g1/incarnation",
    "gateways/g1/exports.json",
    "gateways/g1/.exports.json.4711",
    "stores/s1/disk0.img",
    "stores/s1/incarnation",
    "stores/s2/conductor.json",
    "stores/s2/damage.json",
    "run/s1.ready",
    "run/supervisor.json",
    ".cluster.toml.1234",
)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Give a cluster that was used: every name that processes make."""
    made = Layout(tmp_path / "data")
    lock = take_lock(made)
    assert lock is not None
    os.close(lock)
    cluster, _ = opened(made, Wish(stores=2, disk_bytes=GIB))
    write_settings(made, cluster, tmp_path / "sockets")
    for name in OWN_FILES:
        (made.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (made.directory / name).write_bytes(b"x")
    known_disk_file(made.store_data("s1"), 0).write_bytes(b"{}")
    return made


def folders_of(layout: Layout) -> Iterator[Path]:
    yield layout.directory
    yield from (path for path in layout.directory.rglob("*") if path.is_dir())


def test_a_purge_removes_all_that_a_cluster_makes(layout: Layout) -> None:
    check_directory(layout)
    assert purge(layout, is_foreign=lambda _: False).left == []
    assert not layout.directory.exists()


def test_a_disk_that_may_be_another_clusters_stays(layout: Layout) -> None:
    aside = layout.store_data("s1") / "disk0.img.aside-20261130T120000Z"
    aside.touch()
    foreign = layout.disk("s2")
    foreign.touch()
    done = purge(layout, is_foreign=lambda disk: disk == foreign)
    assert set(done.left) == {f"stores/s1/{aside.name}", "stores/s2/disk0.img"}
    assert {path for path in layout.directory.rglob("*") if path.is_file()} == {aside, foreign}


def test_a_file_of_the_user_survives_in_every_folder(layout: Layout) -> None:
    kept = [folder / "holiday.jpg" for folder in folders_of(layout)]
    for photo in kept:
        photo.write_bytes(b"a photo")
    nested = layout.directory / "album/2026"
    nested.mkdir(parents=True)
    (nested / "cluster.toml").write_bytes(b"named alike, elsewhere")
    done = purge(layout, is_foreign=lambda _: False)
    left = {path for path in layout.directory.rglob("*") if not path.is_dir()}
    assert left == {*kept, nested / "cluster.toml"}
    assert {photo.read_bytes() for photo in kept} == {b"a photo"}
    expected = {str(photo.relative_to(layout.directory)) for photo in kept} | {"album"}
    assert set(done.left) == expected
    assert "not made by PureFlash" in directory.left_line(layout.directory, done)


@pytest.mark.parametrize(
    "name", ["stores", "stores/s1", "stores/s1/disk0.img", "log", "run", "secret/admin.token"]
)
def test_a_purge_follows_no_link(layout: Layout, tmp_path: Path, name: str) -> None:
    """A disk may be a link to another file system, or a folder may have been moved there."""
    place = layout.directory / name
    elsewhere = tmp_path / "elsewhere"
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    before = {path: path.is_dir() or path.read_bytes() for path in elsewhere.rglob("*")}
    if elsewhere.is_file():
        before[elsewhere] = elsewhere.read_bytes()
    purge(layout, is_foreign=lambda _: False)
    assert {path: path.is_dir() or path.read_bytes() for path in before} == before
    if not elsewhere.is_dir():
        assert not place.is_symlink(), "the link itself is the cluster's"
        assert not layout.directory.exists()


def test_sockets_go_and_what_else_lies_there_stays(tmp_path: Path) -> None:
    folder = tmp_path / "pureflash/abcd1234"
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "g1.nbd"))
    (folder / "notes").write_text("mine")
    assert purge_sockets(folder).left == [str(folder / "notes")]
    assert [entry.name for entry in folder.iterdir()] == ["notes"]
    (folder / "notes").unlink()
    assert purge_sockets(folder).left == []
    assert not folder.parent.exists()


def refusal(layout: Layout) -> PureFlashError:
    with pytest.raises(PureFlashError) as caught:
        check_directory(layout)
    assert caught.value.next_step
    return caught.value


def test_a_folder_with_files_is_no_place_for_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"a photo")
    layout = Layout(tmp_path)
    problem = refusal(layout)
    assert (problem.code, "photos" in problem.message) == (Code.UNSAFE, True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.jpg", "photos"]


@given(st.lists(st.sampled_from([".hidden", "stores/a", "secret/key", "run/x", "s1"]), min_size=1))
def test_one_foreign_name_anywhere_is_enough(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    layout = Layout(tmp_path_factory.mktemp("data"))
    for name in names:
        (layout.directory / name).parent.mkdir(exist_ok=True)
        (layout.directory / name).touch()
    assert refusal(layout).code is Code.UNSAFE


def test_what_a_first_start_left_is_taken_up(tmp_path: Path) -> None:
    """It ended between the folders and `cluster.toml`, which is written last."""
    layout = Layout(tmp_path / "data")
    check_directory(layout)
    opened(layout, Wish(stores=1, disk_bytes=GIB))
    layout.cluster_file.rename(layout.directory / ".cluster.toml.77")
    check_directory(layout)
    layout.store_data("s1").mkdir()
    layout.disk("s1").touch()
    problem = refusal(layout)
    assert "its cluster.toml is gone" in problem.message
    assert "restore cluster.toml" in problem.next_step


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
@pytest.mark.parametrize("name", ["", "secret", "run", "stores"])
def test_a_folder_that_others_can_write_to_is_refused(layout: Layout, mode: int, name: str) -> None:
    (layout.directory / name).chmod(mode)
    problem = refusal(layout)
    assert problem.code is Code.UNSAFE
    assert "can be written by other users" in problem.message


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("name", ["", "secret", "conductor"])
def test_a_folder_of_somebody_else_is_refused(layout: Layout, name: str) -> None:
    os.chown(layout.directory / name, 65_534, 65_534)
    problem = refusal(layout)
    assert problem.code is Code.UNSAFE
    assert "belongs to another user (uid 65534" in problem.message


@pytest.mark.parametrize("is_made", [False, True])
def test_a_place_that_others_can_exchange_is_refused(tmp_path: Path, is_made: bool) -> None:
    """Whoever may write to the folder above can put a prepared one there meanwhile."""
    shared = tmp_path / "shared"
    shared.mkdir()
    layout = Layout(shared / "deep" / "data")
    if is_made:
        layout.directory.mkdir(parents=True)
    shared.chmod(0o777)
    assert "could put another folder in its place" in refusal(layout).message
    shared.chmod(0o1777)
    check_directory(layout)


def test_a_link_in_place_of_a_folder_of_secrets_is_refused(layout: Layout, tmp_path: Path) -> None:
    (layout.directory / "secret").rename(tmp_path / "elsewhere")
    (layout.directory / "secret").symlink_to(tmp_path / "elsewhere")
    assert refusal(layout).code is Code.INVALID


def test_a_secret_is_written_to_no_file_that_somebody_has_put_there(tmp_path: Path) -> None:
    target = tmp_path / "admin.token"
    bait = tmp_path / "bait"
    bait.write_text("old")
    (tmp_path / f".admin.token.{os.getpid()}").symlink_to(bait)
    write_whole(target, b"secret")
    assert (target.read_bytes(), bait.read_text()) == (b"secret", "old")
    assert target.stat().st_mode & 0o777 == 0o600
    assert not target.is_symlink()


def test_up_and_purge_leave_a_folder_of_photos_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"a photo")
    assert run(["up", "--detach", "--data", str(photos)]) == Exit.UNSAFE
    assert "is not empty and holds no cluster: a.jpg" in capsys.readouterr().err
    assert run(["down", "--purge", "--yes", "--data", str(photos)]) == Exit.UNSAFE
    assert [entry.name for entry in photos.iterdir()] == ["a.jpg"]


AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
OTHER = 65_534


@AS_ROOT
@pytest.mark.parametrize("name", ["secret", "conductor", "gateways/g1"])
def test_a_folder_that_another_user_planted_is_refused_before_there_is_a_cluster(
    tmp_path: Path, name: str
) -> None:
    """It was open to all once; the owner of `secret` could exchange the token made there."""
    planted = tmp_path / name
    planted.mkdir(parents=True)
    os.chown(planted, OTHER, OTHER)
    problem = refusal(Layout(tmp_path))
    assert (problem.code, str(planted) in problem.message) == (Code.UNSAFE, True)


@AS_ROOT
@pytest.mark.parametrize("below", ["", "deep/data"])
def test_a_link_of_another_user_is_no_way_to_a_directory(tmp_path: Path, below: str) -> None:
    """Its owner can let it lead elsewhere at any moment; a link of one's own is fine."""
    (tmp_path / "real" / below).mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    own = tmp_path / "own"
    own.symlink_to(link / below)
    check_directory(Layout(link / below))
    check_directory(Layout(own))
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    for way in (link / below, own):
        problem = refusal(Layout(way))
        assert (problem.code, str(link) in problem.message) == (Code.UNSAFE, True)


def test_a_cluster_behind_a_link_is_purged_and_the_link_stays(
    layout: Layout, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(layout.directory)
    assert purge(Layout(link), is_foreign=lambda _: False).left == []
    assert not layout.directory.exists()
    assert link.is_symlink(), "the user made it"


def test_a_folder_with_the_name_of_a_file_of_ours_stays(layout: Layout) -> None:
    (layout.directory / "cluster.toml").rename(layout.directory / ".cluster.toml.9")
    folders = {"cluster.toml", "run/c1.ready", "stores/s1/damage.json"}
    for name in folders:
        (layout.directory / name).mkdir()
    assert set(purge(layout, is_foreign=lambda _: False).left) == folders
    assert not (layout.directory / "secret").exists(), "the rest went"


def test_a_name_that_is_left_cannot_speak_to_the_terminal(layout: Layout) -> None:
    (layout.directory / "log/\x1b[31m\nred").touch()
    line = directory.left_line(layout.directory, purge(layout, is_foreign=lambda _: False))
    assert line.endswith(r"'log/\x1b[31m\nred'")


@AS_ROOT
@pytest.mark.parametrize("planted", ["above", "folder", "link"])
def test_sockets_of_another_user_are_not_touched(tmp_path: Path, planted: str) -> None:
    """/tmp/pureflash-UID can be made by anybody while no cluster of its user runs."""
    folder = tmp_path / "real/abcd1234"
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "precious"))
    above = folder.parent
    if planted == "link":
        above = tmp_path / "link"
        above.symlink_to(folder.parent)
    else:
        os.chown({"above": above, "folder": folder}[planted], OTHER, OTHER)
    assert purge_sockets(above / "abcd1234").left == []
    assert (folder / "precious").is_socket()


@AS_ROOT
def test_no_process_is_ended_because_another_users_file_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its writer would choose whom `pf down` kills."""
    layout = Layout(tmp_path / "data")
    lock = take_lock(layout)
    assert lock is not None
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as victim:
        layout.lock.write_text(str(victim.pid))
        os.chown(layout.lock, OTHER, OTHER)
        found = run(["down", "--data", str(layout.directory)])
        is_alive = victim.poll() is None
        assert (found, is_alive) == (Exit.UNSAFE, True)
    os.close(lock)
    said = capsys.readouterr().err
    assert f"belongs to another user (uid {OTHER}" in said
    assert "what to do" in said


@AS_ROOT
def test_a_cluster_of_another_user_is_not_purged(layout: Layout) -> None:
    """He could exchange its folders, while they are emptied, for links to others of mine."""
    os.chown(layout.directory, OTHER, OTHER)
    before = sorted(layout.directory.rglob("*"))
    found = run(["down", "--purge", "--yes", "--data", str(layout.directory)])
    assert (found, sorted(layout.directory.rglob("*"))) == (Exit.UNSAFE, before)


@AS_ROOT
def test_a_folder_that_appears_after_the_look_is_looked_at_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below /tmp anybody can make it between the look and the lock."""

    def planting(layout: Layout) -> int | None:
        layout.directory.mkdir()
        os.chown(layout.directory, OTHER, OTHER)
        return take_lock(layout)

    monkeypatch.setattr(server, "take_lock", planting)
    assert server.main(["--data", str(tmp_path / "data")]) == Exit.UNSAFE
    assert not (tmp_path / "data/secret").exists()


def test_what_a_refused_start_made_is_taken_back_and_nothing_else(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "deep/data")
    beginning = Beginning(layout)
    lock = take_lock(layout)
    assert lock is not None
    beginning.look()
    opened(layout, Wish(stores=1, disk_bytes=GIB))
    (layout.directory / "log/mine.txt").write_text("a note")
    beginning.take_back()
    os.close(lock)
    left = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))]
    assert left == ["deep", "deep/data", "deep/data/log", "deep/data/log/mine.txt"]


def test_a_cluster_that_another_command_made_meanwhile_is_not_taken_back(layout: Layout) -> None:
    """It came and went between our look and our lock."""
    late = Layout(layout.directory.with_name("late"))
    beginning = Beginning(late)
    layout.directory.rename(late.directory)
    names = set(late.directory.rglob("*"))
    lock = take_lock(late)
    assert lock is not None
    beginning.look()
    beginning.take_back()
    os.close(lock)
    assert names - set(late.directory.rglob("*")) == {late.lock}, "which is made anew when needed"


def test_a_lock_that_was_deleted_as_it_was_taken_is_none(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder took back a start; who has a lock without a name would exclude nobody."""
    flock, times = fcntl.flock, iter([True])

    def deleting(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        if next(times, False):
            layout.lock.unlink()

    monkeypatch.setattr(fcntl, "flock", deleting)
    lock = take_lock(layout)
    assert lock is not None
    assert os.fstat(lock).st_ino == layout.lock.stat().st_ino
    os.close(lock)


def test_a_link_that_leads_to_itself_is_an_error_with_a_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    check_directory(Layout(tmp_path / "loop"))
    assert server.main(["--data", str(tmp_path / "loop/data")]) == Exit.USAGE
    assert "cannot" in capsys.readouterr().err


def test_a_lock_without_a_pid_is_said_and_nothing_is_ended(
    layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its supervisor has taken it, and writes its pid next."""
    lock = take_lock(layout)
    assert lock is not None
    os.ftruncate(lock, 0)
    assert run(["down", "--data", str(layout.directory)]) == Exit.UNAVAILABLE
    assert "does not say by which process" in capsys.readouterr().err
    os.close(lock)
