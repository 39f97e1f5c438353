"""Which disks a store has had: so that a missing file is not taken for a new disk.

Theory of operation. A store formats a disk that does not exist, which is right for the first start
and wrong ever after: the empty disk would take the place of one that may only not be mounted. So
what each disk was is kept in `diskN.json` beside the store's other files, written after the disk
was read. With it there and the disk not, the start is refused. Only a person who knows that the
disk is lost for good removes that file, by `pf up --new-disk` or by hand.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from pureflash.errors import Code, MediaError
from pureflash.model.domain import Disk
from pureflash.model.layout import known_disk_file
from pureflash.model.outside import UNREADABLE
from pureflash.process.lifecycle import write_whole


class KnownDisk(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of `diskN.json`."""

    path: str
    disk_uuid: str
    format_uuid: str


def check_new(data: Path, *, index: int, path: Path, name: str) -> None:
    """Refuse to make disk `index` of store `name` anew at `path` when there was one.

    Errors: MediaError DISK_FAILED, which says how to go on.
    """
    record = known_disk_file(data, index)
    try:
        known = msgspec.json.decode(record.read_bytes(), type=KnownDisk)
        was = f"disk {known.disk_uuid[:8]}, last seen at {known.path}"
    except FileNotFoundError:
        return
    except UNREADABLE:
        was = f"which one, {record} does not say any more"
    raise MediaError(
        Code.DISK_FAILED,
        f"{path} is not there, and {name} had a disk {index}: {was}",
        next_step="mount it or put it back; if it is lost for good, let the store begin with an"
        f" empty one: `pf up --new-disk {name}`, or remove {record} and start it",
    )


def remember(data: Path, disk: Disk) -> None:
    """Keep what a disk is, durably; writes only what has changed."""
    known = KnownDisk(path=disk.path, disk_uuid=disk.disk_uuid, format_uuid=disk.format_uuid)
    text = msgspec.json.encode(known)
    record = known_disk_file(data, disk.index)
    if not record.exists() or record.read_bytes() != text:
        write_whole(record, text)
