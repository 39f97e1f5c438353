"""Which disks a store has had: so that a missing or an exchanged file is not taken for its disk.

Theory of operation. A store formats a disk that does not exist, which is right for the first start
and wrong ever after: the empty disk would take the place of a disk that may only not be mounted. So
the identity of each disk is kept in `diskN.json` beside the store's other files, written after the
disk was read. When that file is there and the disk is not, or another disk is in its place, the
disk counts as failed. Only a person who knows that the disk is lost for good removes that file:
`pf up --new-disk` does, after it moved aside whatever lies where the disk was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from pureflash.model.domain import Disk
from pureflash.model.layout import known_disk_file
from pureflash.model.outside import UNREADABLE
from pureflash.process.lifecycle import write_whole


class KnownDisk(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of `diskN.json`; `size_bytes` is 0 in one that an earlier version wrote."""

    path: str
    disk_uuid: str
    format_uuid: str
    size_bytes: int = 0


UNKNOWN: Final = KnownDisk(path="", disk_uuid="", format_uuid="")
"""What is known of a disk whose record is there and cannot be read: that there was one."""


def recall(data: Path, index: int) -> KnownDisk | None:
    """Give what disk `index` was; None when there was none, `UNKNOWN` with a damaged record."""
    try:
        return msgspec.json.decode(known_disk_file(data, index).read_bytes(), type=KnownDisk)
    except FileNotFoundError:
        return None
    except UNREADABLE:
        return UNKNOWN


def is_another(known: KnownDisk | None, *, disk_uuid: str, format_uuid: str) -> bool:
    """Whether a disk is certainly not the one that was there; without a record it may be."""
    if known is None or known is UNKNOWN:
        return False
    return (known.disk_uuid, known.format_uuid) != (disk_uuid, format_uuid)


def remember(data: Path, disk: Disk) -> None:
    """Keep what a disk is, durably; writes only what has changed."""
    known = KnownDisk(
        path=disk.path,
        disk_uuid=disk.disk_uuid,
        format_uuid=disk.format_uuid,
        size_bytes=disk.size_bytes,
    )
    text = msgspec.json.encode(known)
    record = known_disk_file(data, disk.index)
    if not record.exists() or record.read_bytes() != text:
        write_whole(record, text)
