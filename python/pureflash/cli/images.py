"""`pf image import|export`: raw images in and out of volumes, over the data path.

Holes stay holes: an import skips what the file system says is a hole and what reads as zeros, after
the range was discarded; an export seeks over zeros, so that the file is sparse. One request is
`CHUNK_BYTES`, and four of them are under way.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pureflash.cli.options import (
    DataOption,
    ServerOption,
    VolumeArgument,
    YesOption,
    confirm,
    connected,
)
from pureflash.cli.outcome import CommandProblem, Exit, unreadable

if TYPE_CHECKING:
    from pureflash.client.device import Device

app = typer.Typer(help="Raw images: bring in, take out.", no_args_is_help=True)
CHUNK_BYTES: Final = 1 << 20
UNDER_WAY: Final = 4
SECTOR_BYTES: Final = 512


@app.command("import")
def import_image(
    file: Annotated[Path, typer.Argument(help="A raw image.")],
    volume: VolumeArgument,
    yes: YesOption = False,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Write a raw image onto a volume from its start; what was there is lost."""
    from pureflash.client.device import open_device
    from pureflash.units import format_size

    size = _file_size(file)
    with connected(server, data) as api:
        found = api.volume(volume)
        if size > found.size_bytes:
            raise CommandProblem(
                f"{file} has {format_size(size)}, {found.name} only"
                f" {format_size(found.size_bytes)}",
                exit_status=Exit.USAGE,
                next_step=f"pf volume resize {found.name} ...",
            )
        if found.used_bytes != 0:
            confirm(f"overwrite volume {found.name} with {file}", found.name, is_agreed=yes)
        with open_device(api, str(found.id)) as device:
            written = copy_in(file, device, size)
            device.flush()
    typer.echo(f"{file}: {format_size(size)}, {format_size(written)} of it data, on {found.name}")


@app.command("export")
def export_image(
    volume: VolumeArgument,
    file: Annotated[Path, typer.Argument(help="The raw image to make; it must not exist.")],
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Write a volume into a raw image, sparse where it reads as zeros."""
    from pureflash.client.device import open_device
    from pureflash.units import format_size

    if file.exists():
        raise CommandProblem(
            f"{file} exists",
            exit_status=Exit.IN_THE_WAY,
            next_step="name another file, or remove it",
        )
    if not os.access(file.parent, os.W_OK):
        is_there = file.parent.is_dir()
        why = "is not writable" if is_there else "is not there"
        raise CommandProblem(
            f"cannot make {file}: {file.parent} {why}",
            exit_status=Exit.FAILED if is_there else Exit.NOT_FOUND,
            next_step="name a file in a directory that you may write to",
        )
    partial = file.with_name(f".{file.name}.part")
    try:
        with (
            connected(server, data) as api,
            open_device(api, volume, is_read_only=True) as device,
        ):
            size_bytes = device.size_bytes  # what it grows by meanwhile is not part of the image
            written = copy_out(device, partial, size_bytes)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    size = format_size(size_bytes)
    typer.echo(f"{volume}: {size}, {format_size(written)} of it data, in {file}")


def copy_in(file: Path, device: Device, size: int) -> int:
    """Copy a file of `size` bytes onto a device; gives the bytes that were not zeros."""
    from pureflash.cli.progress import Progress

    written = 0
    # Discard first: a hole of the image must read as zeros, whatever was on the volume.
    whole = -(-size // SECTOR_BYTES) * SECTOR_BYTES
    for offset in range(0, whole, 1 << 30):
        device.discard(offset, min(1 << 30, whole - offset))
    with (
        file.open("rb") as source,
        ThreadPoolExecutor(UNDER_WAY) as workers,
        Progress(f"import {file.name}", total=size, unit="bytes") as progress,
    ):
        under_way: list[Future[None]] = []
        for offset, length in data_chunks(source.fileno(), size):
            data = os.pread(source.fileno(), length, offset)
            if data.count(0) != len(data):
                padded = data + bytes(-len(data) % SECTOR_BYTES)
                under_way.append(workers.submit(device.pwrite, padded, offset=offset))
                written += len(data)
            if len(under_way) >= UNDER_WAY:
                under_way.pop(0).result()
            progress.update(offset + length)
        for future in under_way:
            future.result()
        progress.update(size)
    return written


def copy_out(device: Device, file: Path, size: int) -> int:
    """Copy the first `size` bytes of a device into a new file; gives those that were not zeros."""
    from pureflash.cli.progress import Progress

    written = 0
    with (
        file.open("xb") as target,
        ThreadPoolExecutor(UNDER_WAY) as workers,
        Progress(f"export {file.name}", total=size, unit="bytes") as progress,
    ):
        under_way: list[tuple[int, Future[bytes]]] = []

        def store_oldest() -> int:
            offset, future = under_way.pop(0)
            data = future.result()
            progress.update(offset + len(data))
            if data.count(0) == len(data):
                return 0
            target.seek(offset)
            target.write(data)
            return len(data)

        for offset in range(0, size, CHUNK_BYTES):
            length = min(CHUNK_BYTES, size - offset)
            under_way.append((offset, workers.submit(device.pread, offset, length)))
            if len(under_way) >= UNDER_WAY:
                written += store_oldest()
        while under_way:
            written += store_oldest()
        target.truncate(size)
        target.flush()
        os.fsync(target.fileno())
    return written


def data_chunks(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Give (offset, length) of the parts of a file that are not holes, at most a chunk each.

    Offsets are multiples of `CHUNK_BYTES`, so that no two writes share a sector.
    """
    offset = 0
    while offset < size:
        try:
            found = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError as problem:
            if problem.errno == errno.ENXIO:
                return  # only a hole is left
            raise
        offset = found - found % CHUNK_BYTES
        end = os.lseek(descriptor, found, os.SEEK_HOLE)
        while offset < end:
            yield offset, min(CHUNK_BYTES, size - offset)
            offset += CHUNK_BYTES


def _file_size(file: Path) -> int:
    try:
        with file.open("rb") as stream:
            return stream.seek(0, os.SEEK_END)
    except OSError as cause:
        raise unreadable(file, cause, next_step="name a raw image that you may read") from cause
