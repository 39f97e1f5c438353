"""Compressed streams, unpacked piece by piece with bounded memory.

gzip, xz and bzip2 by Python itself; zstd by the program of that name. Checksums are verified by
each, so a damaged or cut stream is an error and never a shorter image. A format that asks for a
large window says how much memory unpacking takes: more than `MEMORY_BYTES_MAX` is refused.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import subprocess
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, BinaryIO, Final

from pureflash.cli.outcome import CommandProblem, Exit

PIECE_BYTES: Final = 1 << 20
MEMORY_BYTES_MAX: Final = 256 << 20
ERROR_BYTES_MAX: Final = 4096

Readable = BinaryIO | io.RawIOBase


def unpacked(kind: str, stream: Readable, *, name: str, volume: str) -> Iterator[bytes]:
    """Give the content of a compressed stream, in pieces of at most `PIECE_BYTES`.

    `kind` is gzip, xz, bzip2 or zstd; `name` and `volume` are for errors: CommandProblem when it
    is damaged or needs too much memory, or when a program is missing.
    """
    pieces = {"gzip": _gzip, "xz": _xz, "bzip2": _bzip2, "zstd": _zstd}[kind](stream)
    try:
        yield from pieces
    except FileNotFoundError as cause:
        raise CommandProblem(
            f"{name} is {kind}, and no program {kind} is on PATH; {volume} was not touched",
            exit_status=Exit.USAGE,
            next_step=f"install it, or where it is: {kind} -dc IMAGE | pf image import - {volume}",
        ) from cause
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as cause:
        raise CommandProblem(
            f"{name} is {kind} and cannot be unpacked: {cause}; {volume} was not touched",
            exit_status=Exit.FAILED,
            next_step=f"get it anew, or unpack it yourself: {kind} -dc IMAGE | pf image import -"
            f" {volume}",
        ) from cause


def _gzip(stream: Readable) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=_buffered(stream), mode="rb") as content:
        while piece := content.read(PIECE_BYTES):
            yield piece


def _bzip2(stream: Readable) -> Iterator[bytes]:
    with bz2.BZ2File(_buffered(stream)) as content:
        while piece := content.read(PIECE_BYTES):
            yield piece


def _xz(stream: Readable) -> Iterator[bytes]:
    """Unpack streams one after the other; LZMAFile would, but without a bound of its memory."""
    read = _buffered(stream).read
    data = read(PIECE_BYTES)
    while data:
        machine = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY_BYTES_MAX)
        while not machine.eof:
            piece = machine.decompress(data, max_length=PIECE_BYTES)
            data = b""
            if piece:
                yield piece
            if machine.needs_input and not machine.eof:
                data = read(PIECE_BYTES)
                if not data:
                    raise EOFError("it ends in the middle")
        # Between streams there may be zeros, four at a time; no stream begins with one.
        data = machine.unused_data or read(PIECE_BYTES)
        while data and not (data := data.lstrip(b"\0")):
            data = read(PIECE_BYTES)


def _zstd(stream: Readable) -> Iterator[bytes]:
    program = shutil.which("zstd")
    if program is None:
        raise FileNotFoundError("zstd")
    limit = f"--memory={MEMORY_BYTES_MAX >> 20}MB"
    try:
        direct: int | None = stream.fileno()
    except io.UnsupportedOperation:
        direct = None
    with subprocess.Popen(
        [program, "-dcq", limit],
        stdin=subprocess.PIPE if direct is None else direct,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            if process.stdin is not None:
                feed = (stream, process.stdin)
                threading.Thread(target=_feed, args=feed, name="pf-feeder", daemon=True).start()
            while piece := process.stdout.read(PIECE_BYTES):
                yield piece
            said = process.stderr.read(ERROR_BYTES_MAX).decode(errors="replace").strip()
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise ValueError(said or f"zstd ended with status {process.returncode}")


def _feed(stream: Readable, program: IO[bytes]) -> None:
    """Give a program all of a stream; ends when the program does."""
    # Closed by whoever started the program, if that gives up: then nobody wants the rest.
    with suppress(OSError, ValueError), program:
        while piece := stream.read(PIECE_BYTES):
            rest = memoryview(piece)
            while rest:
                rest = rest[program.write(rest) :]


def _buffered(stream: Readable) -> io.BufferedReader:
    return io.BufferedReader(stream, PIECE_BYTES)  # type: ignore[arg-type]  # raw or unbuffered
