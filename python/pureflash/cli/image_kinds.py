"""What a file is, by its first and last bytes: a raw image, or one of the formats that are not.

Theory of operation. `look` reads a few pieces of a file through a function and gives an `Image`.
Everything here is pure and bounded: a piece is at most `PIECE_BYTES`, there are at most
`PIECES_MAX` of them, and any bytes give an answer. What is not recognised is raw, as a disk may
hold anything; a format's mark is therefore compared as a whole, with what must stand beside it.

Safety. The file is foreign. A format that can name other files (a backing file, an external data
file, extents, a parent) would make a converter open any file of this host, so such an image is
refused by what its own header says, before a converter sees it.

Sources: qemu docs/interop/qcow2.txt, the VMware "Virtual Disk Format 5.0", the VHD specification
1.0, [MS-VHDX], VirtualBox's VDICore.h, RFC 1952 (gzip), the xz, zstd, LZ4, bzip2 and LUKS formats.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

PIECE_BYTES: Final = 64 << 10
PIECES_MAX: Final = 2
EXTENSIONS_MAX: Final = 64
"""Header extensions of a qcow2 that are looked at; qemu writes three."""
SECTOR_BYTES: Final = 512
VMDK_SECTORS: Final = 20
"""What qemu reads of a description."""

ReadAt = Callable[[int, int], bytes]
"""(offset, length) -> at most `length` bytes of the file."""
Checks = Iterator[tuple[bool, str]]
"""Why an image is not converted; what follows a check that is true may rely on it being false."""


class Way(StrEnum):
    """What has to be done to get at the raw bytes."""

    RAW = "raw"  # nothing
    UNPACK = "unpack"  # decompress the stream, and look again
    CONVERT = "convert"  # qemu-img can
    REFUSE = "refuse"  # `reason` says why


@dataclass(frozen=True, slots=True)
class Image:
    """What a file is. `kind` is qemu's or the compressor's name of the format.

    `reason` is for `REFUSE`. `is_container`: the file is a disk image that a converter could make
    raw, if its user trusts what it names.
    """

    kind: str
    way: Way
    reason: str = ""
    is_container: bool = False


RAW: Final = Image("raw", Way.RAW)

_PACKED: Final = (
    ("gzip", re.compile(rb"\x1f\x8b\x08[\x00-\x1f]", re.DOTALL)),
    ("xz", re.compile(rb"\xfd7zXZ\x00")),
    ("bzip2", re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")),
    ("zstd", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)),
)
_OTHER_PACKED: Final = (
    ("lz4", b"\x04\x22\x4d\x18"),
    ("lzip", b"LZIP\x01"),
    ("7z", b"7z\xbc\xaf\x27\x1c"),
    ("zip", b"PK\x03\x04"),
    ("rar", b"Rar!\x1a\x07"),
)
_CUT: Final = "ends within its header"
_DATA_ELSEWHERE: Final = "keeps its data in another file"
_DIFFERENCE: Final = "holds only the difference to another file"
_ELSEWHERE: Final = "only describes a disk whose data are in other files"
_ONE_OF_SEVERAL: Final = "is one of several files of a disk"


def look(read_at: ReadAt, size_bytes: int) -> Image:
    """Say what a file of this size is; 0: nobody knows its size, or where it ends.

    Errors: those of `read_at`.
    """
    head = read_at(0, PIECE_BYTES)[:PIECE_BYTES]
    packed = next((kind for kind, form in _PACKED if form.match(head)), None)
    if packed is not None:
        return Image(packed, Way.UNPACK)
    other = next((kind for kind, mark in _OTHER_PACKED if head.startswith(mark)), None)
    if other is None and head[257:262] == b"ustar":
        other = "tar"
    if other is not None:
        reason = "is an archive or is compressed in a way that is not unpacked here"
        return _refused(other, reason, is_disk=False)
    return _container(head, read_at, size_bytes) or RAW


def _container(head: bytes, read_at: ReadAt, size_bytes: int) -> Image | None:
    for kind, offset, mark, check in _MARKS:
        if head.startswith(mark, offset):
            return _judged(kind, check(head, size_bytes))
    if head[:4096].lstrip().startswith(b"# Disk DescriptorFile"):
        return _judged("vmdk", iter([(True, _ELSEWHERE)]))
    return _by_the_end(head, read_at, size_bytes)


def _by_the_end(head: bytes, read_at: ReadAt, size_bytes: int) -> Image | None:
    """Recognise what is marked by its last sector; a fixed VHD has nothing else."""
    if size_bytes < SECTOR_BYTES:
        return None
    tail = read_at(size_bytes - SECTOR_BYTES, SECTOR_BYTES)[:SECTOR_BYTES]
    if tail.startswith(b"koly"):
        return _judged("dmg", _unknown(tail, size_bytes))
    if b"conectix" in (head[:8], tail[:8]):
        return _judged("vpc", _vpc(tail))
    return None


def _judged(kind: str, checks: Checks) -> Image:
    """Let it be converted, unless a check is true: the first one is the reason."""
    reason = next((text for is_so, text in checks if is_so), None)
    if reason is not None:
        return _refused(kind, reason, is_disk=kind != "luks")
    return Image(kind, Way.CONVERT, is_container=True)


def _qcow(head: bytes, _size_bytes: int) -> Checks:
    yield len(head) < 104, _CUT
    version, backing_offset, backing_bytes = struct.unpack_from(">IQI", head, 4)
    yield version not in (2, 3), f"is of version {version}, which is not known"
    yield bool(backing_offset or backing_bytes), "is based on another file, its backing file"
    yield struct.unpack_from(">I", head, 32)[0] != 0, "is encrypted"
    if version == 3:
        incompatible = struct.unpack_from(">Q", head, 72)[0]
        yield bool(incompatible & 4), _DATA_ELSEWHERE
        yield from _extensions(head)
        yield bool(incompatible & 2), "is marked as corrupt"


def _extensions(head: bytes) -> Checks:
    """Judge the header extensions of a qcow2 of version 3: one names an external data file."""
    offset = struct.unpack_from(">I", head, 100)[0]
    for _ in range(EXTENSIONS_MAX):
        if offset + 8 > len(head):
            yield True, _CUT  # or it is longer than any that was made
        kind, length = struct.unpack_from(">II", head, offset)
        if kind == 0:
            return
        yield kind == 0x44415441, _DATA_ELSEWHERE
        offset += 8 + -(-length // 8) * 8
    yield True, "has too many extensions of its header"


def _vmdk(head: bytes, _size_bytes: int) -> Checks:
    """Judge a sparse extent: only one that describes itself is a whole disk.

    qemu looks for the parent in the 20 sectors after the header whatever the header says, and
    finds a name anywhere in them. So the description has to be there, and all of it is searched.
    """
    yield len(head) < 2 * SECTOR_BYTES, _CUT
    capacity, _, start, length = struct.unpack_from("<QQQQ", head, 12)
    yield not start or not length, _ONE_OF_SEVERAL
    yield not capacity, _ELSEWHERE
    is_usual = start == 1 and length < PIECE_BYTES // SECTOR_BYTES
    yield not is_usual, "has its description in an unusual place"
    text = head[SECTOR_BYTES : SECTOR_BYTES * (1 + max(length, VMDK_SECTORS))].lower()
    is_there = text.lstrip().startswith(b"# disk descriptorfile")
    yield not is_there, "has no description where its header says"
    lines = [line.strip(b" \t\0") for line in re.split(rb"[\r\n]+", text)]
    parents = [re.sub(rb"\s", b"", line) for line in lines if line.startswith(b"parentcid")]
    has_parent = any(line != b"parentcid=ffffffff" for line in parents)
    yield has_parent or b"parentfilenamehint" in text, _DIFFERENCE
    extents = [line for line in lines if re.match(rb"(?:rw|rdonly|noaccess)\s", line)]
    is_whole = len(extents) == 1 and re.match(rb"\w+\s+\d+\s+sparse\s", extents[0])
    yield not is_whole, _ONE_OF_SEVERAL


def _vdi(head: bytes, size_bytes: int) -> Checks:
    yield len(head) < SECTOR_BYTES, _CUT
    # "Image type": 1 dynamic, 2 fixed, 3 undo, 4 differencing. A parent is named by its UUID.
    is_alone = struct.unpack_from("<I", head, 0x4C)[0] in (1, 2) and not any(head[0x1A8:0x1C8])
    yield not is_alone, _DIFFERENCE
    # qemu reads zeros where the file has ended.
    start = struct.unpack_from("<I", head, 0x158)[0]
    block_bytes, extra_bytes, _, blocks = struct.unpack_from("<IIII", head, 0x178)
    needed = start + blocks * (block_bytes + extra_bytes)
    yield bool(size_bytes) and size_bytes < needed, "ends before its last block"


def _vpc(footer: bytes) -> Checks:
    # The first sector of a dynamic one is a copy of its last, for when that one is lost.
    is_there = footer.startswith(b"conectix") and len(footer) == SECTOR_BYTES
    yield not is_there, "ends before its last sector"
    # "Disk Type": 2 fixed, 3 dynamic, 4 differencing.
    yield struct.unpack_from(">I", footer, 60)[0] not in (2, 3), _DIFFERENCE


def _vhdx(_head: bytes, _size_bytes: int) -> Checks:
    # One with a parent is not opened by qemu, which looks at "HasParent" itself.
    yield False, _DIFFERENCE


def _luks(_head: bytes, _size_bytes: int) -> Checks:
    yield True, "is an encrypted disk, which may be what the volume is to hold, or may not"


def _unknown(_head: bytes, _size_bytes: int) -> Checks:
    yield True, "is a format that is not converted here"


def _refused(kind: str, reason: str, *, is_disk: bool) -> Image:
    return Image(kind, Way.REFUSE, reason, is_disk)


_MARKS: Final[Sequence[tuple[str, int, bytes, Callable[[bytes, int], Checks]]]] = (
    ("qcow", 0, b"QFI\xfb\0\0\0\1", _unknown),
    ("qcow2", 0, b"QFI\xfb", _qcow),
    ("vmdk", 0, b"KDMV", _vmdk),
    ("vmdk", 0, b"COWD", _unknown),
    ("vhdx", 0, b"vhdxfile", _vhdx),
    ("vdi", 64, b"\x7f\x10\xda\xbe", _vdi),
    ("luks", 0, b"LUKS\xba\xbe", _luks),
    ("qed", 0, b"QED\0", _unknown),
    ("parallels", 0, b"WithoutFreeSpace", _unknown),
    ("parallels", 0, b"WithouFreSpacExt", _unknown),
    ("bochs", 0, b"Bochs Virtual HD Image", _unknown),
)
