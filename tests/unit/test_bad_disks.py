"""Disks that are not what they were, given to a store and to `pf disk inspect`, without a cluster.

Each is refused with its path, the cause and what to do, and not a byte of it changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.world import ListLog
from tests.unit.test_core_disk import _crc32c

from pureflash import _core
from pureflash.cli.app import run
from pureflash.cli.outcome import Exit
from pureflash.model.settings import STORE, load_settings
from pureflash.store.core import load_core
from pureflash.store.disks import Fault, Probe, prepare_disks

CLUSTER = bytes(range(16))
SIZE = 96 << 20
HEADER_BYTES = 16_384
HEADER_PLACES = (0, 1 << 20, SIZE - HEADER_BYTES)


def truncate(disk: Path, size: int = SIZE // 2) -> None:
    with disk.open("r+b") as stream:
        stream.truncate(size)


def zero(disk: Path) -> None:
    truncate(disk, 0)
    truncate(disk, SIZE)


def zero_headers(disk: Path) -> None:
    with disk.open("r+b") as stream:
        for place in HEADER_PLACES:
            stream.seek(place)
            stream.write(bytes(HEADER_BYTES))


def replace_cluster(disk: Path) -> None:
    disk.unlink()
    _core.format_disk(disk, size_bytes=SIZE, cluster_id=bytes(16))


def from_the_future(disk: Path) -> None:
    with disk.open("r+b") as stream:
        for place in HEADER_PLACES:
            stream.seek(place)
            header = bytearray(stream.read(HEADER_BYTES))
            header[24] ^= 0x40
            header[8:12] = bytes(4)
            header[8:12] = _crc32c(bytes(header)).to_bytes(4, "little")
            stream.seek(place)
            stream.write(header)


def overwrite(disk: Path) -> None:
    disk.write_bytes(b"LVM2 001" * (SIZE // 8))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "it was truncated or replaced"),
    "a few bytes": (lambda disk: truncate(disk, 100), "the disk ends before what was asked for"),
    "empty": (lambda disk: truncate(disk, 0), "the disk ends before what was asked for"),
    "zeroed": (zero, "never formatted by PureFlash, or it was overwritten"),
    "headers gone": (zero_headers, "never formatted by PureFlash, or it was overwritten"),
    "another program's": (
        overwrite,
        "never formatted by PureFlash, or it was overwritten",
    ),
    "of the future": (from_the_future, 'made by "pureflash'),
}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk0.img"
    _core.format_disk(path, size_bytes=SIZE, cluster_id=CLUSTER)
    return path


def hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault_of(disk: Path) -> Fault:
    """Let a store begin on a disk, which it must not serve; gives what it says of it."""
    text = (
        f'[cluster]\nid = "{CLUSTER.hex()}"\n[node]\nid = "s1"\nnumber = 1\n'
        f'data = "{disk.parent}"\nkey_file = "key"\ntoken_file = "token"\n'
        f'[[disk]]\npath = "{disk}"\nsize = "{SIZE}B"\n'
    )
    settings = load_settings(STORE, text=text, source="s1.toml", environment={})
    log = ListLog()
    probe = Probe(load_core(), CLUSTER.hex(), disk.parent, "s1")
    (prepared,) = prepare_disks(probe, settings, log)
    assert prepared.fault is not None
    assert [(level, event) for level, event, _ in log.lines] == [("WARNING", "disk.failed")]
    assert prepared.fault.reason in log.lines[0][2], "the log and the report say the same"
    node = _core.StoreNode(
        store_id=1,
        incarnation=1,
        cluster_id=CLUSTER,
        cluster_key=bytes(32),
        listen="127.0.0.1:0",
        disks=[prepared.for_core, {"path": str(disk)}],
    )
    try:
        told, tried = node.stats()["disks"]
    finally:
        node.close()
    assert (told["state"], told["reason"]) == ("failed", prepared.fault.reason)
    assert tried["state"] == "failed", "the core by itself does not serve it either"
    return prepared.fault


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGES)
def test_a_disk_that_is_damaged_is_refused_untouched(
    disk: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    damage, cause = DAMAGES[what]
    damage(disk)
    before = hash_of(disk)
    fault = fault_of(disk)
    assert str(disk) in fault.reason
    assert cause in fault.reason
    assert "nothing was written to it" in fault.next_step
    assert run(["disk", "inspect", str(disk)]) in (Exit.FAILED, Exit.USAGE)
    shown = capsys.readouterr().err
    assert cause in shown
    assert "what to do: it was only read" in shown
    assert hash_of(disk) == before


def test_a_disk_of_another_cluster_is_refused_by_name_and_inspected(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_cluster(disk)
    before = hash_of(disk)
    fault = fault_of(disk)
    assert f"{disk} belongs to cluster {bytes(16).hex()}" in fault.reason
    assert "give it back to its own" in fault.next_step
    assert run(["disk", "inspect", str(disk), "-o", "json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["cluster_id"] == bytes(16).hex()
    assert hash_of(disk) == before


def test_one_damaged_header_of_several_is_no_loss(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with disk.open("r+b") as stream:
        stream.seek(100)
        stream.write(b"XXXX")
    assert run(["disk", "inspect", str(disk), "-o", "json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["cluster_id"] == CLUSTER.hex()


def test_what_is_no_disk_at_all_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, status, cause in (
        (tmp_path / "none.img", Exit.NOT_FOUND, "there is no"),
        (tmp_path, Exit.USAGE, "neither a regular"),
    ):
        assert run(["disk", "inspect", str(path)]) == status
        shown = capsys.readouterr().err
        assert str(path) in shown
        assert cause in shown
