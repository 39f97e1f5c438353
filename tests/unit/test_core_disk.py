"""Disks of `_core`: what is refused, with which code, and that refusing changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pureflash import _core
from pureflash.errors import Code, PureFlashError

CLUSTER = bytes(range(16))
SIZE = 96 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk0.img"
    _core.format_disk(path, size_bytes=SIZE, cluster_id=CLUSTER)
    return path


def test_a_formatted_disk_says_what_it_is(disk: Path) -> None:
    facts = _core.inspect_disk(disk)
    assert facts["cluster_id"] == CLUSTER.hex()
    assert facts["size_bytes"] == SIZE
    assert [lane["journal_bytes"] for lane in facts["lanes"]] == [16 << 20]
    assert facts["durability"] in {"plp", "volatile"}


def test_a_block_is_read_back_after_a_clean_close(disk: Path) -> None:
    lane = _core.Lane(disk, cluster_id=CLUSTER)
    shard_ix = lane.create(1, 1024)
    lane.write(shard_ix, 3, b"x" * 8192, seq=1, commit=0)
    lane.discard(shard_ix, 4, 1, seq=2, commit=1)
    lane.close()
    lane.close()
    lane = _core.Lane(disk, cluster_id=CLUSTER)
    assert lane.read(shard_ix, 2, 3) == bytes(4096) + b"x" * 4096 + bytes(4096)
    assert lane.facts()["verified_blocks"] == 0, "nothing is in doubt after a clean close"
    lane.close()
    with pytest.raises(PureFlashError) as caught:
        lane.read(shard_ix, 0, 1)
    assert caught.value.code is Code.UNAVAILABLE


def refusal(path: Path, cluster: bytes = CLUSTER) -> PureFlashError:
    with pytest.raises(PureFlashError) as caught:
        _core.Lane(path, cluster_id=cluster)
    return caught.value


def test_a_disk_of_another_cluster_is_refused_untouched(disk: Path) -> None:
    before = disk.read_bytes()[: 4 << 20]
    problem = refusal(disk, bytes(16))
    assert problem.code is Code.WRONG_CLUSTER
    assert CLUSTER.hex() in problem.message
    assert disk.read_bytes()[: 4 << 20] == before


def test_a_truncated_disk_is_refused_with_both_sizes(disk: Path) -> None:
    with disk.open("r+b") as stream:
        stream.truncate(SIZE // 2)
    problem = refusal(disk)
    assert problem.code is Code.DISK_FAILED
    assert str(SIZE) in problem.message
    assert str(SIZE // 2) in problem.message


def test_a_zeroed_disk_is_refused_as_never_formatted(disk: Path) -> None:
    with disk.open("r+b") as stream:
        stream.truncate(0)
        stream.truncate(SIZE)
    problem = refusal(disk)
    assert problem.code is Code.INVALID
    assert "never formatted" in problem.message


def test_a_header_from_the_future_is_refused_by_name(disk: Path) -> None:
    with disk.open("r+b") as stream:
        for place in (0, 1 << 20, SIZE - 16384):
            stream.seek(place)
            header = bytearray(stream.read(16384))
            header[24] ^= 0x40
            header[8:12] = bytes(4)
            header[8:12] = _crc32c(bytes(header)).to_bytes(4, "little")
            stream.seek(place)
            stream.write(header)
    problem = refusal(disk)
    assert 'made by "pureflash' in problem.message
    assert "pf down --purge" in problem.message


def test_formatting_twice_is_refused(disk: Path) -> None:
    with pytest.raises(PureFlashError) as caught:
        _core.format_disk(disk, size_bytes=SIZE, cluster_id=CLUSTER)
    assert caught.value.code is Code.ALREADY_EXISTS


@pytest.mark.parametrize("size", [0, 4096, 12 << 20, (96 << 20) + 1])
def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "small.img"
    with pytest.raises(PureFlashError) as caught:
        _core.format_disk(path, size_bytes=size, cluster_id=CLUSTER)
    assert caught.value.code is Code.INVALID
    assert not path.exists(), "a refusal leaves nothing behind"


def test_the_wheel_has_no_seeded_bugs() -> None:
    assert "mutants" not in _core.build_info().features


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
