"""Make the golden image of the disk format: a disk as a killed store leaves it, fit for git.

    python tools/make_golden.py      # writes crates/lane/testdata/disk-format-1.*

An image is made once per released disk format and then only read: `crates/node/tests/golden.rs`
mounts it and compares the content, `tests/unit/test_golden_disk.py` inspects it. If one of them
fails after a change, the change has altered the format without saying so. Making the image again
is the answer only before the format is released, or beside the old one for a new version.

The writer goes through what version 1 does on disk: first touches of one block, of a slot and
across extents, overwrites short and long, discards, a checkpoint, a clean close, a second life
with the same again, and an end by SIGKILL with records that only the journal holds. What the
content must be is computed beside it, on a plain array.

Three files: `.img`, the blocks that are not zero (see `pack`); `.txt`, what is in it, one
`name value` per line; `.json`, what `pf disk inspect` says of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pureflash import _core
from pureflash.testing.lane_kill import content

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "crates/lane/testdata/disk-format-1"

BLOCK_BYTES = 4096
DISK_BYTES = 64 << 20
JOURNAL_BYTES = 512 << 10
CLUSTER_ID = bytes(range(16))
VOLUME_ID = 7
SHARD_BLOCKS = 2048
"""8 MiB: two extents."""
IMAGE_BYTES_MAX = 1 << 20

MAGIC = b"PFSPARSE"
"""Before the size (u64), then records: number of the block (u64) and its 4 KiB. Little-endian."""

FIRST_LIFE = (
    ("write", 0, 1),
    ("write", 16, 16),
    ("write", 1010, 30),  # from the first extent into the second
    ("write", 0, 1),
    ("write", 18, 2),
    ("write", 1012, 16),  # long enough for an INTENT
    ("discard", 20, 4),
    ("discard", 1020, 8),
    ("checkpoint", 0, 0),
    ("write", 22, 1),
)
SECOND_LIFE = (
    ("write", 1, 1),
    ("write", 2000, 8),
    ("checkpoint", 0, 0),
    ("write", 16, 2),
    ("write", 1024, 12),
    ("discard", 0, 1),
    ("write", 2040, 8),
    ("write", 2041, 1),
    ("discard", 2001, 2),
)


def pack(image: Path) -> bytes:
    """Give the blocks of a disk file that are not zero."""
    parts = [MAGIC, struct.pack("<Q", image.stat().st_size)]
    zero = bytes(BLOCK_BYTES)
    with image.open("rb") as file:
        number = 0
        while block := file.read(BLOCK_BYTES):
            if block != zero:
                parts += [struct.pack("<Q", number), block]
            number += 1
    return b"".join(parts)


def unpack(packed: bytes, image: Path) -> None:
    """Make the disk file again, sparse.

    Errors: ValueError when the bytes are not what `pack` makes.
    """
    if packed[:8] != MAGIC or (len(packed) - 16) % (8 + BLOCK_BYTES):
        raise ValueError("not a packed disk image")
    (size,) = struct.unpack_from("<Q", packed, 8)
    with image.open("wb") as file:
        file.truncate(size)
        for at in range(16, len(packed), 8 + BLOCK_BYTES):
            (number,) = struct.unpack_from("<Q", packed, at)
            if (number + 1) * BLOCK_BYTES > size:
                raise ValueError(f"block {number} lies behind the end of {size} bytes")
            file.seek(number * BLOCK_BYTES)
            file.write(packed[at + 8 : at + 8 + BLOCK_BYTES])


def expected() -> bytes:
    """Give the content of the shard after both lives, on a plain array."""
    blocks = [bytes(BLOCK_BYTES)] * SHARD_BLOCKS
    for seq, kind, first, count in operations(1):
        for block in range(first, first + count):
            blocks[block] = content(block, seq) if kind == "write" else bytes(BLOCK_BYTES)
    return b"".join(blocks)


def operations(life: int) -> Iterator[tuple[int, str, int, int]]:
    """Give (seq, kind, first block, count) from a life on; seq goes on over the lives."""
    lives = (FIRST_LIFE, SECOND_LIFE)
    seq = sum(kind != "checkpoint" for done in lives[: life - 1] for kind, _, _ in done)
    for operation in lives[life - 1 :]:
        for kind, first, count in operation:
            seq += kind != "checkpoint"
            yield seq, kind, first, count


def live(disk: Path, life: int) -> None:
    """Be one life of the writer: the first closes cleanly, the second is killed."""
    lane = _core.Lane(disk, cluster_id=CLUSTER_ID)
    shard_ix = lane.create(VOLUME_ID, SHARD_BLOCKS) if life == 1 else 0
    steps = (FIRST_LIFE, SECOND_LIFE)[life - 1]
    for (seq, kind, first, count), _ in zip(operations(life), steps, strict=False):
        if kind == "checkpoint":
            lane.checkpoint()
        elif kind == "discard":
            lane.discard(shard_ix, first, count, seq=seq, commit=seq - 1)
        else:
            data = b"".join(content(block, seq) for block in range(first, first + count))
            lane.write(shard_ix, first, data, seq=seq, commit=seq - 1)
    if life == 1:
        lane.close()
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def make(folder: Path) -> tuple[bytes, str, dict[str, Any]]:
    """Make image, description and what inspection says, in `folder`."""
    disk = folder / "disk0.img"
    _core.format_disk(
        disk,
        size_bytes=DISK_BYTES,
        cluster_id=CLUSTER_ID,
        journal_bytes=JOURNAL_BYTES,
        durability="plp",  # else every overwrite here would be short enough for a REDO
    )
    for life, status in ((1, 0), (2, -signal.SIGKILL)):
        command = [sys.executable, str(Path(__file__)), "--life", str(life), "--disk", str(disk)]
        ended = subprocess.run(command, check=False).returncode
        if ended != status:
            raise RuntimeError(f"life {life} ended with {ended}")
    packed = pack(disk)
    if len(packed) > IMAGE_BYTES_MAX:
        raise RuntimeError(f"{len(packed)} bytes, at most {IMAGE_BYTES_MAX}")
    inspected = dict(_core.inspect_disk(disk))
    inspected.pop("path", None)
    facts = {
        "cluster_id": CLUSTER_ID.hex(),
        "volume_id": VOLUME_ID,
        "blocks": SHARD_BLOCKS,
        "last_seq": max(seq for seq, _, _, _ in operations(1)),
        "sha256": hashlib.sha256(expected()).hexdigest(),
    }
    return packed, "".join(f"{name} {value}\n" for name, value in facts.items()), inspected


def main() -> int:
    """Write the three files; refuses to replace an image that is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replace", action="store_true", help="replace an image that is there")
    parser.add_argument("--life", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--disk", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.life is not None:
        live(arguments.disk, arguments.life)
        return 0
    if TARGET.with_suffix(".img").exists() and not arguments.replace:
        print(f"{TARGET}.img is there: a released format has one image", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="pureflash-golden-") as folder:
        packed, described, inspected = make(Path(folder))
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.with_suffix(".img").write_bytes(packed)
    TARGET.with_suffix(".txt").write_text(described)
    TARGET.with_suffix(".json").write_text(json.dumps(inspected, indent=2) + "\n")
    print(
        f"{TARGET.with_suffix('.img').relative_to(ROOT)}: {len(packed)} bytes\n{described}", end=""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
