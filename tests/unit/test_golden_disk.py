"""The golden image of disk format 1, as the Python side sees it: unpacked, inspected, computed.

What is in its blocks is read by crates/node/tests/golden.rs; here the header is, which
`pf disk inspect` shows without a cluster, and the computation that the expected digest comes from.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tools import make_golden

from pureflash.cli.app import run


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk0.img"
    make_golden.unpack(make_golden.TARGET.with_suffix(".img").read_bytes(), path)
    return path


def test_pf_disk_inspect_says_what_it_said_when_the_image_was_made(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = disk.read_bytes()
    assert run(["disk", "inspect", str(disk), "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = json.loads(make_golden.TARGET.with_suffix(".json").read_text())
    assert {name: found[name] for name in expected} == expected
    assert disk.read_bytes() == before, "looking changes nothing"


def test_packing_is_lossless_and_damage_is_named(disk: Path, tmp_path: Path) -> None:
    packed = make_golden.TARGET.with_suffix(".img").read_bytes()
    assert len(packed) <= make_golden.IMAGE_BYTES_MAX
    assert make_golden.pack(disk) == packed
    for damaged in (packed[:-1], b"X" + packed[1:], b""):
        with pytest.raises(ValueError, match="not a packed disk image"):
            make_golden.unpack(damaged, tmp_path / "other.img")
    behind = packed[:16] + (1 << 40).to_bytes(8, "little") + bytes(make_golden.BLOCK_BYTES)
    with pytest.raises(ValueError, match="lies behind the end"):
        make_golden.unpack(behind, tmp_path / "other.img")


def test_the_expected_content_is_what_the_operations_leave() -> None:
    lines = make_golden.TARGET.with_suffix(".txt").read_text().splitlines()
    facts = dict(line.split(" ", 1) for line in lines)
    content = make_golden.expected()
    assert facts["sha256"] == hashlib.sha256(content).hexdigest()
    assert len(content) == int(facts["blocks"]) * make_golden.BLOCK_BYTES
    discarded = content[: make_golden.BLOCK_BYTES]
    assert discarded == bytes(make_golden.BLOCK_BYTES), "block 0 was written twice, then discarded"
