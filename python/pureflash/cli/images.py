"""`pf image import|export`: images in and out of volumes, over the data path.

Holes stay holes: an import skips what the file system says is a hole and what reads as zeros, after
the range was discarded; an export seeks over zeros, so that the file is sparse. One request is
`CHUNK_BYTES`, and four of them are under way.

An import begins to write only when there are raw bytes that fit (`image_source`); whatever cannot
be imported leaves the volume as it was. An export writes under another name, and takes the one that
was asked for when it is whole (`newfile`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final, TypeVar

import typer

from pureflash.cli.options import (
    DataOption,
    ServerOption,
    VolumeArgument,
    YesOption,
    confirm,
    connected,
)
from pureflash.cli.outcome import CommandProblem, Exit

if TYPE_CHECKING:
    from pureflash.cli.image_source import Source
    from pureflash.client.api import Api
    from pureflash.client.device import Device
    from pureflash.model.rest import VolumeView

app = typer.Typer(help="Images: bring in, take out.", no_args_is_help=True)
CHUNK_BYTES: Final = 1 << 20
UNDER_WAY: Final = 4
SECTOR_BYTES: Final = 512
SIGNALS_EVERY_S: Final = 0.5
_R = TypeVar("_R")


@app.command("import")
def import_image(
    file: Annotated[Path, typer.Argument(help="An image; - for one that comes through a pipe.")],
    volume: VolumeArgument,
    raw: Annotated[
        bool, typer.Option("--raw", help="Take its bytes as they are, whatever they look like.")
    ] = False,
    yes: YesOption = False,
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Write an image onto a volume from its start; what was there is lost.

    gzip, xz, bzip2 and zstd are unpacked; qcow2, vmdk, vhdx, vdi and vpc are made raw by qemu-img,
    if they name no other file. Both need room in $TMPDIR, else /var/tmp. The import takes the
    volume over: a program that has it open for writing gets FENCED. A volume that is exported for
    writing is refused.
    """
    from pureflash.cli.image_source import Source, Target
    from pureflash.client.device import open_device
    from pureflash.units import format_size

    with Source(file, volume, is_raw=raw) as source, connected(server, data) as api:
        found = api.volume(volume)
        source.fit(Target(found.name, found.size_bytes))
        _check_exports(api, found)
        _agree(source, found, is_agreed=yes)
        image, size = source.make_raw()
        with open_device(api, str(found.id)) as device, _partly(source, found):
            written = copy_in(image, device, size, title=f"import {source.name}")
            device.flush()
    text = f"{source.name}: {format_size(size)}, {format_size(written)} of it data"
    typer.echo(f"{text}, on {found.name}")


@app.command("export")
def export_image(
    volume: VolumeArgument,
    file: Annotated[Path, typer.Argument(help="The raw image to make; it must not exist.")],
    server: ServerOption = None,
    data: DataOption = None,
) -> None:
    """Write a volume into a raw image, sparse where it reads as zeros; only you may read it."""
    from pureflash.cli.newfile import NewFile
    from pureflash.client.device import open_device
    from pureflash.units import format_size

    if not os.access(file.parent, os.W_OK):
        is_there = file.parent.is_dir()
        why = "is not writable" if is_there else "is not there"
        raise CommandProblem(
            f"cannot make {file}: {file.parent} {why}",
            exit_status=Exit.FAILED if is_there else Exit.NOT_FOUND,
            next_step="name a file in a directory that you may write to",
        )
    with NewFile(file) as new:
        for remains in new.removed:
            typer.echo(f"notice: removed {remains}, left by an export that was killed", err=True)
        with (
            connected(server, data) as api,
            open_device(api, volume, is_read_only=True) as device,
        ):
            size_bytes = device.size_bytes  # what it grows by meanwhile is not part of the image
            written = copy_out(device, new.stream, size_bytes, title=f"export {file.name}")
        new.publish()
    size = format_size(size_bytes)
    typer.echo(f"{volume}: {size}, {format_size(written)} of it data, in {file}")


def copy_in(source: BinaryIO, device: Device, size: int, *, title: str) -> int:
    """Copy a file of `size` bytes onto a device; gives the bytes that were not zeros."""
    from pureflash.cli.progress import Progress

    written = 0
    # Discard first: a hole of the image must read as zeros, whatever was on the volume.
    whole = -(-size // SECTOR_BYTES) * SECTOR_BYTES
    for offset in range(0, whole, 1 << 30):
        device.discard(offset, min(1 << 30, whole - offset))
    with (
        ThreadPoolExecutor(UNDER_WAY) as workers,
        _cancelling(device),
        Progress(title, total=size, unit="bytes") as progress,
    ):
        under_way: list[Future[None]] = []
        for offset, length in data_chunks(source.fileno(), size):
            data = os.pread(source.fileno(), length, offset)
            if data.count(0) != len(data):
                padded = data + bytes(-len(data) % SECTOR_BYTES)
                under_way.append(workers.submit(device.pwrite, padded, offset=offset))
                written += len(data)
            if len(under_way) >= UNDER_WAY:
                _result_of(under_way.pop(0))
            progress.update(offset + length)
        for future in under_way:
            _result_of(future)
        progress.update(size)
    return written


def copy_out(device: Device, target: BinaryIO, size: int, *, title: str) -> int:
    """Copy the first `size` bytes of a device into an empty file; gives those not zero."""
    from pureflash.cli.progress import Progress

    written = 0
    with (
        ThreadPoolExecutor(UNDER_WAY) as workers,
        _cancelling(device),
        Progress(title, total=size, unit="bytes") as progress,
    ):
        under_way: list[tuple[int, Future[bytes]]] = []

        def store_oldest() -> int:
            offset, future = under_way.pop(0)
            data = _result_of(future)
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
    return written


def _result_of(future: Future[_R]) -> _R:
    """Wait for a worker. In pieces: a signal that comes just before a wait does not end it."""
    while not future.done():
        wait([future], timeout=SIGNALS_EVERY_S)
    return future.result()


@contextmanager
def _cancelling(device: Device) -> Iterator[None]:
    """End the requests under way when the copy fails or is interrupted.

    The workers are waited for, and a request waits as long as its store is away.
    """
    try:
        yield
    except BaseException:
        device.close()
        raise


@contextmanager
def _partly(source: Source, volume: VolumeView) -> Iterator[None]:
    """Say what an import that did not come to its end has left."""
    try:
        yield
    except BaseException:
        typer.echo(
            f"warning: {volume.name} now holds a part of {source.name}, and nothing of what was"
            " there before counts: import it again",
            err=True,
        )
        raise


def _check_exports(api: Api, volume: VolumeView) -> None:
    """Refuse before anything is read what the attach would refuse in the end."""
    for export in api.exports():
        if export.volume == volume.name and not export.read_only:
            raise CommandProblem(
                f"{volume.name} is exported for writing by {export.kind}: its clients would see"
                " errors",
                exit_status=Exit.IN_THE_WAY,
                next_step=f"import through the export, or `pf export delete {volume.name}` first",
            )


def _agree(source: Source, volume: VolumeView, *, is_agreed: bool) -> None:
    """Print what will happen; ask when there is something to lose."""
    kind = "" if source.image.kind == "raw" else f" ({source.image.kind})"
    plan = (
        f"import {source.name}{kind} onto volume {volume.name}; it takes the volume over: a program"
        " that has it open for writing gets FENCED"
    )
    if volume.used_bytes == 0:
        typer.echo(plan)
        return
    confirm(f"{plan}; what is on it is overwritten", volume.name, is_agreed=is_agreed)


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
