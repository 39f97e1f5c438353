"""Disk files stop growing before their host is full, and grow again when there is room."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tests.support.world import ListLog

from pureflash.store.host_space import LEAST_BYTES, HostSpace, must_hold

GIB = 1 << 30


def test_five_percent_or_one_gib_are_left() -> None:
    assert must_hold((LEAST_BYTES - 1, 2 * GIB), is_held=False)
    assert not must_hold((LEAST_BYTES, 20 * GIB), is_held=False)
    assert must_hold((5 * GIB - 1, 100 * GIB), is_held=False)
    assert not must_hold((5 * GIB, 100 * GIB), is_held=False)


@given(free=st.integers(0, 1 << 45), total=st.integers(1, 1 << 45))
def test_it_does_not_flutter(free: int, total: int) -> None:
    room = (min(free, total), total)
    if must_hold(room, is_held=False):
        assert must_hold(room, is_held=True), "what begins a hold keeps it"


def test_each_change_is_told_once_and_the_reason_is_shown(tmp_path: Path) -> None:
    disk = tmp_path / "disk0.img"
    disk.touch()
    rooms = {disk: (50 * GIB, 100 * GIB)}
    told: list[tuple[int, bool]] = []
    log = ListLog()
    host = HostSpace(
        {0: disk, 1: Path("/dev/null")},
        hold=lambda index, is_held: told.append((index, is_held)),
        log=log,
        room=lambda path: rooms[path],
    )
    host.look()
    assert not told
    rooms[disk] = (3 * GIB, 100 * GIB)
    host.look()
    host.look()
    assert told == [(0, True)]
    assert host.held == {0: "the host's file system has 3 GiB of 100 GiB left"}
    rooms[disk] = (6 * GIB, 100 * GIB)
    host.look()
    assert told == [(0, True)], "a little more is not enough"
    rooms[disk] = (7 * GIB, 100 * GIB)
    host.look()
    assert told == [(0, True), (0, False)]
    assert not host.held
    assert [event for _, event, _ in log.lines] == ["disk.host_full", "disk.host_has_room"]
