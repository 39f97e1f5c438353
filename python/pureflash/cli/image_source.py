"""An image of the user's as raw bytes with a known size, before anything is written to a volume.

Theory of operation. A raw file, or a device, is read where it is. Everything else is first made
into a temporary raw file: what comes through a pipe is copied, a compressed stream is unpacked,
another format is converted by qemu-img; at most one of each, in that order. So a stream that is
damaged, too large or of a kind that cannot be imported is found out while the volume is still as it
was, and memory stays bounded whatever comes.

The temporary file has no name (O_TMPFILE, or unlinked at once; 0600), so nothing is left of it
however the command ends. It is sparse, lies in $TMPDIR, else /var/tmp, and leaves `SPARE_BYTES`
free there: stores of this machine stop allocating when their host is full.

qemu-img gets the image and the temporary file as open descriptors and the format by name: it
guesses nothing, and no name in a foreign image leads it anywhere (`image_kinds`, and `_inspect`,
which asks qemu-img itself once more).
"""

from __future__ import annotations

import io
import json
import os
import resource
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self, cast

from pureflash.cli.image_kinds import PIECE_BYTES, Image, Way, look
from pureflash.cli.outcome import CommandProblem, Exit, unreadable
from pureflash.cli.progress import Progress
from pureflash.cli.unpacking import unpacked
from pureflash.units import format_size, format_sizes

COPY_BYTES: Final = 1 << 20
HOLE_BYTES: Final = 64 << 10
"""Zeros of this length and alignment become holes of the temporary file."""
SPARE_BYTES: Final = 1 << 30
SPACE_EVERY_BYTES: Final = 64 << 20
"""How much is written between two looks at the free space."""
INFO_BYTES_MAX: Final = 1 << 20
CONVERTER_BYTES_MAX: Final = 2 << 30
"""Address space of qemu-img: a foreign image must not make it take the machine's memory."""
ERROR_BYTES_MAX: Final = 4096
CHECKED_WELL: Final = (0, 3, 63)
"""Of qemu-img check: without an error, with space that is lost, no check for this format."""
STANDARD_INPUT: Final = Path("-")


@dataclass(frozen=True, slots=True)
class Target:
    """The volume that the image is for."""

    name: str
    size_bytes: int


class Source:
    """An opened image; a context manager. `image` is what it is, by its first bytes.

    It is opened before a cluster is asked; `fit` then says what it is for, and `make_raw` follows.
    """

    def __init__(self, file: Path, volume: str, *, is_raw: bool) -> None:
        """Prepare to read `file`, or standard input for `-`; `is_raw`: take it as it is.

        `volume` is what the caller calls the volume, for errors.
        """
        self.file = file
        self._target = Target(volume, 0)
        self._is_raw = is_raw
        self._held = ExitStack()
        self._head = b""
        """What was read of a stream that cannot be read twice."""

    def __enter__(self) -> Self:
        """Open it and look. Errors: CommandProblem for what cannot be imported, or not read."""
        try:
            self._stream = self._open()
            self._is_seekable = _is_seekable(self._stream)
            if not self._is_seekable:
                self._head = _read_full(self._stream, PIECE_BYTES)
            self.image = self._look(None if not self._is_seekable else self._stream)
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def fit(self, target: Target) -> None:
        """Say what it is for. Errors: CommandProblem when it is seen already not to fit."""
        self._target = target
        if self.image.way is Way.RAW and self._is_seekable:
            self._check_size(_size_of(self._stream))

    def make_raw(self) -> tuple[BinaryIO, int]:
        """Give raw bytes that can be read at any offset, and their number, which the volume has.

        Errors: CommandProblem when the image is damaged, too large, empty, or there is no room.
        """
        stream, image = self._stream, self.image
        if image.way is Way.UNPACK or not self._is_seekable:
            stream = self._spool()
            packed, image = image, self._look(stream)
            if image.way is Way.UNPACK and packed.way is Way.UNPACK:
                raise self._refusal(f"is {image.kind} in {packed.kind}: compressed twice")
        if image.way is Way.CONVERT:
            stream = self._convert(stream, image)
        size_bytes = _size_of(stream)
        self._check_size(size_bytes)
        return stream, size_bytes

    def _open(self) -> BinaryIO:
        if self.file == STANDARD_INPUT:
            if sys.stdin.isatty():
                raise CommandProblem(
                    "standard input is a terminal",
                    exit_status=Exit.USAGE,
                    next_step=f"pipe an image into it: ... | pf image import - {self._target.name}",
                )
            return self._held.enter_context(os.fdopen(os.dup(sys.stdin.fileno()), "rb", 0))
        try:
            return self._held.enter_context(self.file.open("rb", 0))
        except OSError as cause:
            step = "name an image that you may read"
            raise unreadable(self.file, cause, next_step=step) from cause

    def _look(self, stream: BinaryIO | None) -> Image:
        """Say what a file is; None: the pipe, whose end nobody can look at.

        Errors: CommandProblem for what is refused.
        """
        if self._is_raw:
            return Image("raw", Way.RAW)
        if stream is None:
            image = look(lambda offset, length: self._head[offset : offset + length], 0)
        else:
            descriptor = stream.fileno()
            image = look(
                lambda offset, length: os.pread(descriptor, length, offset), _size_of(stream)
            )
        if image.way is Way.REFUSE:
            raise self._refusal(f"is {image.kind} and {image.reason}", image)
        return image

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes == 0:
            raise CommandProblem(
                f"{self.name} is empty",
                exit_status=Exit.USAGE,
                next_step="look at what was to make it; `pf volume show` says what is on a volume",
            )
        if size_bytes > self._target.size_bytes:
            theirs, ours = format_sizes(size_bytes, self._target.size_bytes)
            raise CommandProblem(
                f"{self.name} has {theirs}, {self._target.name} only {ours}",
                exit_status=Exit.USAGE,
                next_step=f"pf volume resize {self._target.name} {-(-size_bytes // 4096) * 4}K",
            )

    def _too_large(self) -> CommandProblem:
        """Say that a stream goes on behind the volume's end; how far, nobody has looked."""
        volume = self._target.name
        if self.image.way is Way.UNPACK:
            step = "unpack it into a file and import that, or grow the volume to the unpacked size"
        else:
            step = "put it into a file and import that, or grow the volume to its size"
        return CommandProblem(
            f"{self.name} has more than {format_size(self._target.size_bytes)}, which is what"
            f" {volume} has; {volume} was not touched",
            exit_status=Exit.USAGE,
            next_step=f"{step}: pf volume resize {volume} SIZE",
        )

    @property
    def name(self) -> str:
        """What people call it."""
        return "standard input" if self.file == STANDARD_INPUT else str(self.file)

    def _spool(self) -> BinaryIO:
        """Copy or unpack the stream into a temporary file."""
        room = _Room(_temporary_folder(), self._target.name)
        spooled = self._held.enter_context(room.make_file())
        is_packed = self.image.way is Way.UNPACK
        total = _size_of(self._stream) if self._is_seekable else None
        if total is not None:
            room.check(total)
        joined = _Joined(self._head, self._stream)
        title = f"unpack {self.name}" if is_packed else f"read {self.name}"
        with Progress(title, total=total, unit="bytes") as progress:
            chunks = (
                unpacked(self.image.kind, joined, name=self.name, volume=self._target.name)
                if is_packed
                else iter(lambda: joined.read(COPY_BYTES), b"")
            )
            written = 0
            for chunk in chunks:
                if written == 0 and self._is_raw_head(chunk):
                    room.limit_bytes = self._target.size_bytes
                _write_sparse(spooled, chunk)
                written += len(chunk)
                if room.limit_bytes is not None and written > room.limit_bytes:
                    raise self._too_large()
                room.watch(written)
                progress.update(self._stream.tell() if total is not None else written)
            spooled.truncate(written)
        return spooled

    def _is_raw_head(self, head: bytes) -> bool:
        """Whether what begins so is raw: then its length is bounded by the volume."""
        return self._is_raw or look(lambda o, n: head[o : o + n], 0).way is Way.RAW

    def _convert(self, stream: BinaryIO, image: Image) -> BinaryIO:
        """Let qemu-img make a temporary raw file. Errors: CommandProblem."""
        program = shutil.which("qemu-img")
        if program is None:
            raise self._refusal(f"is {image.kind}, and qemu-img is not on PATH", image)
        source = f"/proc/self/fd/{stream.fileno()}"
        size_bytes = self._inspect(program, source, image, stream)
        self._check_size(size_bytes)
        self._check_whole(program, source, image, stream)
        room = _Room(_temporary_folder(), self._target.name)
        room.check(os.fstat(stream.fileno()).st_blocks * 512)
        raw = self._held.enter_context(room.make_file())
        command = [program, "convert", "-p", "-f", image.kind, "-O", "raw", source]
        command.append(f"/proc/self/fd/{raw.fileno()}")
        last = b""
        with (
            _running(command, stream, raw) as converter,
            Progress(f"convert {self.name}", total=size_bytes, unit="bytes") as progress,
        ):
            assert converter.stdout is not None
            while part := os.read(converter.stdout.fileno(), 4096):
                last = (last + part)[-ERROR_BYTES_MAX:]
                room.check(0)
                progress.update(size_bytes * _percent(last) // 100)
            status = converter.wait()
        if status != 0 or _size_of(raw) != size_bytes:
            raise self._damaged(image, last)
        return raw

    def _inspect(self, program: str, source: str, image: Image, stream: BinaryIO) -> int:
        """Give the size of the disk in an image. Errors: CommandProblem when it names files."""
        command = [program, "info", "-f", image.kind, "--output=json", source]
        with _running(command, stream) as asked:
            assert asked.stdout is not None
            found = asked.stdout.read(INFO_BYTES_MAX)
            if len(found) == INFO_BYTES_MAX:
                raise self._damaged(image, b"what qemu-img says about it does not end")
        try:
            facts = json.loads(found[found.find(b"{") :])  # after warnings
            size_bytes = int(facts["virtual-size"])
            details = facts.get("format-specific", {}).get("data", {})
            extents = [extent["filename"] for extent in details.get("extents", [])]
        except (ValueError, KeyError, TypeError, AttributeError) as cause:
            raise self._damaged(image, found) from cause
        others = [name for name in extents if name != source]
        if "backing-filename" in facts or "data-file" in details or others:
            raise self._refusal(f"is {image.kind} and names other files", image)
        return size_bytes

    def _check_whole(self, program: str, source: str, image: Image, stream: BinaryIO) -> None:
        """Refuse what refers to places behind its end: qemu-img would read zeros there."""
        with _running([program, "check", "-f", image.kind, source], stream) as asked:
            assert asked.stdout is not None
            last = b""
            while part := asked.stdout.read1(4096):  # type: ignore[attr-defined]  # buffered
                last = (last + part)[-ERROR_BYTES_MAX:]
            status = asked.wait()
        if status not in CHECKED_WELL:
            raise self._damaged(image, last)

    def _damaged(self, image: Image, said: bytes) -> CommandProblem:
        lines = said[-ERROR_BYTES_MAX:].decode(errors="replace").replace("\r", "\n").splitlines()
        text = next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
        return CommandProblem(
            f"{self.name} is {image.kind} and cannot be converted: {text[:300]}",
            exit_status=Exit.FAILED,
            next_step=f"check it: qemu-img check -f {image.kind} {shlex.quote(str(self.file))}",
        )

    def _refusal(self, what: str, image: Image | None = None) -> CommandProblem:
        """Say that an image is not imported, and with which command it could be."""
        file, volume = shlex.quote(str(self.file)), self._target.name
        if self.file == STANDARD_INPUT:
            step = "put it into a file, make that raw, and import it"
        elif image is not None and image.is_container:
            step = (
                f"make it raw, if you trust it: qemu-img convert -f {image.kind} -O raw {file}"
                f" {file}.raw, then pf image import {file}.raw {volume}"
            )
        else:
            step = "make it raw, and import that"
        return CommandProblem(
            f"{self.name} {what}; {volume} was not touched",
            exit_status=Exit.USAGE,
            next_step=f"{step}; --raw takes its bytes as they are",
        )


class _Joined(io.RawIOBase):
    """What was read of a stream already, and then the rest of it, which is not closed with this."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        """Give a descriptor for a program that reads by itself."""
        if self._head:
            raise io.UnsupportedOperation("a part has been read")
        return self._rest.fileno()

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]  # a writable buffer, as io says
        if not self._head:
            count: int = self._rest.readinto(view)  # type: ignore[attr-defined]  # unbuffered
            return count
        part, self._head = self._head[: len(view)], self._head[len(view) :]
        view[: len(part)] = part
        return len(part)


class _Room:
    """The folder of temporary files, and how full it may become."""

    def __init__(self, folder: Path, volume: str) -> None:
        self._folder = folder
        self._volume = volume
        self._next_look = 0
        self.limit_bytes: int | None = None

    def make_file(self) -> BinaryIO:
        """Make a file without a name."""
        try:
            return cast("BinaryIO", tempfile.TemporaryFile(dir=self._folder))
        except OSError as cause:
            raise CommandProblem(
                f"cannot make a temporary file in {self._folder}: {cause.strerror}; {self._volume}"
                " was not touched",
                exit_status=Exit.FAILED,
                next_step="let TMPDIR name a folder that you may write to",
            ) from cause

    def watch(self, written: int) -> None:
        """Look at the free space now and then."""
        if written >= self._next_look:
            self.check(0)
            self._next_look = written + SPACE_EVERY_BYTES

    def check(self, more_bytes: int) -> None:
        """Insist on room for so much. Errors: CommandProblem."""
        free = shutil.disk_usage(self._folder).free
        if free < SPARE_BYTES + more_bytes:
            raise CommandProblem(
                f"{self._folder} has {format_size(free)} free: too little for the raw image on its"
                f" way to {self._volume}, which was not touched",
                exit_status=Exit.FAILED,
                next_step="let TMPDIR name a folder with more room, or free space there",
            )


@contextmanager
def _running(command: list[str], *files: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that has some of our files; it has ended at the end."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[file.fileno() for file in files],
    ) as process:
        try:
            _, most = resource.prlimit(process.pid, resource.RLIMIT_AS)
            is_open = most == resource.RLIM_INFINITY or most > CONVERTER_BYTES_MAX
            limit = CONVERTER_BYTES_MAX if is_open else most
            resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
            yield process
        except BaseException:
            process.kill()
            raise


def _temporary_folder() -> Path:
    """Choose where temporary images lie: /tmp is often in memory, /var/tmp is for large files."""
    named = os.environ.get("TMPDIR")
    if named:
        return Path(named)
    large = Path("/var/tmp")  # noqa: S108 - nameless files in it
    return large if os.access(large, os.W_OK) else Path(tempfile.gettempdir())


def _write_sparse(target: BinaryIO, data: bytes) -> None:
    """Write at the end; zeros become holes."""
    view = memoryview(data)
    for start in range(0, len(data), HOLE_BYTES):
        part = view[start : start + HOLE_BYTES]
        if any(part):
            target.write(part)
        else:
            target.seek(len(part), os.SEEK_CUR)


def _is_seekable(stream: BinaryIO) -> bool:
    """Tell a file or a block device from what can be read only once, from where it is."""
    mode = os.fstat(stream.fileno()).st_mode
    return (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) and stream.tell() == 0


def _read_full(stream: BinaryIO, count: int) -> bytes:
    """Read so many bytes of a pipe, less only at its end."""
    parts: list[bytes] = []
    while count and (part := stream.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _size_of(stream: BinaryIO) -> int:
    """Give the size of a file or device; the position stays."""
    descriptor = stream.fileno()
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)


def _percent(output: bytes) -> int:
    """Read the newest `(12.34/100%)` of qemu-img; 0 while there is none."""
    number = output.rpartition(b"(")[2].strip().partition(b".")[0]
    return min(int(number), 100) if number.isdigit() and len(number) <= 3 else 0
