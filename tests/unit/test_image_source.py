"""Images that are not raw: recognised, refused by name, or made raw before a volume is touched."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pureflash.cli import image_source
from pureflash.cli.image_kinds import EXTENSIONS_MAX, PIECE_BYTES, PIECES_MAX, Image, Way, look
from pureflash.cli.image_source import Source, Target
from pureflash.cli.outcome import CommandProblem, Exit
from pureflash.cli.unpacking import unpacked

MIB = 1 << 20
DISK_BYTES = 8 * MIB
TARGET = Target("v1", DISK_BYTES)
SECRET = b"a file of the host that no image may name"


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a raw disk with holes and data, some of it at the end."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    chance = random.Random(5)
    with path.open("wb") as file:
        for offset in (0, 3 * MIB + 512, DISK_BYTES - 512):
            file.seek(offset)
            file.write(chance.randbytes(200_000 if offset < 4 * MIB else 512))
    assert path.stat().st_size == DISK_BYTES
    return path


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def look_at(data: bytes) -> Image:
    return look(lambda offset, length: data[offset : offset + length], len(data))


def raw_bytes(file: Path, *, is_raw: bool = False, target: Target = TARGET) -> bytes:
    with Source(file, target.name, is_raw=is_raw) as source:
        source.fit(target)
        stream, size = source.make_raw()
        return os.pread(stream.fileno(), size, 0)


def refusal(file: Path, *, target: Target = TARGET) -> CommandProblem:
    with pytest.raises(CommandProblem) as caught:
        raw_bytes(file, target=target)
    return caught.value


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=data, stdout=subprocess.PIPE, check=True).stdout


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zstd": zstd,
}
FORMATS = [
    ("qcow2", "qcow2", ()),
    ("qcow2", "qcow2", ("-c",)),
    ("qcow2", "qcow2", ("-o", "compat=0.10")),
    ("vmdk", "vmdk", ()),
    ("vmdk", "vmdk", ("-o", "subformat=streamOptimized")),
    ("vhdx", "vhdx", ()),
    ("vdi", "vdi", ()),
    ("vpc", "vpc", ("-o", "force_size=on")),
    ("vpc", "vpc", ("-o", "subformat=fixed,force_size=on")),
]


@pytest.mark.parametrize(("kind", "form", "options"), FORMATS)
def test_an_image_of_another_format_is_made_raw(
    tmp_path: Path, disk: Path, kind: str, form: str, options: tuple[str, ...]
) -> None:
    image = tmp_path / "odd name, with=signs"
    qemu_img("convert", "-f", "raw", "-O", form, *options, disk, image)
    with Source(image, "v1", is_raw=False) as source:
        source.fit(TARGET)
        assert (source.image.kind, source.image.way) == (kind, Way.CONVERT)
        stream, size = source.make_raw()
        found = os.fstat(stream.fileno())
        assert (found.st_nlink, found.st_mode & 0o777) == (0, 0o600), "it has no name"
        assert found.st_blocks * 512 < DISK_BYTES // 2, "holes stay holes"
        assert os.pread(stream.fileno(), size, 0) == disk.read_bytes()
    assert raw_bytes(image, is_raw=True, target=Target("v1", 1 << 40)) == image.read_bytes()


@pytest.mark.parametrize("kind", PACK)
def test_a_compressed_image_is_unpacked_also_when_it_is_not_raw(
    tmp_path: Path, disk: Path, kind: str
) -> None:
    packed = tmp_path / "disk.packed"
    packed.write_bytes(PACK[kind](disk.read_bytes()))
    assert raw_bytes(packed) == disk.read_bytes()
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, tmp_path / "disk.qcow2")
    packed.write_bytes(PACK[kind]((tmp_path / "disk.qcow2").read_bytes()))
    assert raw_bytes(packed) == disk.read_bytes()
    packed.write_bytes(PACK[kind](gzip.compress(disk.read_bytes())))
    assert "compressed twice" in refusal(packed).message


@contextmanager
def piped(data: bytes, path: Path) -> Iterator[Path]:
    """Let a named pipe give these bytes to whoever reads it, as long as somebody does."""
    os.mkfifo(path)

    def feed() -> None:
        with path.open("wb") as pipe:
            try:
                pipe.write(data)
                pipe.flush()
            except BrokenPipeError:
                os.set_inheritable(pipe.fileno(), False)  # the reader has seen enough

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        yield path
    finally:
        feeder.join()


@pytest.mark.parametrize("kind", [*PACK, "raw", "qcow2"])
def test_an_image_comes_through_a_pipe(tmp_path: Path, disk: Path, kind: str) -> None:
    data = disk.read_bytes()
    if kind == "qcow2":
        qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, tmp_path / "disk.qcow2")
        data = (tmp_path / "disk.qcow2").read_bytes()
    elif kind != "raw":
        data = PACK[kind](data)
    with piped(data, tmp_path / "pipe") as pipe:
        assert raw_bytes(pipe) == disk.read_bytes()


def test_standard_input_is_a_pipe_or_a_file(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with piped(disk.read_bytes(), tmp_path / "pipe") as pipe, pipe.open("rb") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert raw_bytes(Path("-")) == disk.read_bytes()
    with disk.open("rb", 0) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert raw_bytes(Path("-")) == disk.read_bytes()
        stream.seek(4096)
        assert raw_bytes(Path("-")) == disk.read_bytes()[4096:], "from where it is"
    ours, theirs = os.openpty()
    with os.fdopen(ours, "rb", 0), os.fdopen(theirs, "rb", 0) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert "is a terminal" in refusal(Path("-")).message


@pytest.mark.parametrize("data", [bytes(DISK_BYTES + 1), b"x" * (DISK_BYTES + 1)])
@pytest.mark.parametrize("way", ["file", "pipe", "gzip", "qcow2"])
def test_what_is_larger_than_the_volume_is_refused_whichever_way_it_comes(
    tmp_path: Path, data: bytes, way: str
) -> None:
    image = tmp_path / "large"
    context: Callable[[], object] = nullcontext
    if way == "pipe":
        context = lambda: piped(data, image)  # noqa: E731 - one of two contexts
    elif way == "qcow2":
        (tmp_path / "large.raw").write_bytes(data + bytes(511))
        qemu_img("convert", "-f", "raw", "-O", "qcow2", tmp_path / "large.raw", image)
    else:
        image.write_bytes(gzip.compress(data) if way == "gzip" else data)
    with context():  # type: ignore[attr-defined]  # of whichever
        problem = refusal(image)
    assert problem.exit_status is Exit.USAGE
    if way in ("pipe", "gzip"):
        assert "has more than 8 MiB, which is what v1 has" in problem.message
        assert "pf volume resize v1 SIZE" in str(problem.next_step)
        return
    assert "v1 only 8 MiB (8,388,608 bytes)" in problem.message
    assert "8,388,609 bytes" in problem.message or "8,389,120 bytes" in problem.message
    assert str(problem.next_step).startswith("pf volume resize v1 819")


def test_a_bomb_ends_at_the_size_of_the_volume(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(MIB))
    problem = refusal(bomb)
    assert problem.exit_status is Exit.USAGE
    assert f"{bomb} has more than 8 MiB" in problem.message
    assert str(problem.next_step) == (
        "unpack it into a file and import that, or grow the volume to the unpacked size:"
        " pf volume resize v1 SIZE"
    )
    assert not re.search(r"9 MiB|[0-9]K", f"{problem.message} {problem.next_step}"), (
        "no size is made up"
    )


@pytest.mark.parametrize("way", ["file", "pipe", "gzip"])
def test_an_empty_image_is_a_mistake(tmp_path: Path, way: str) -> None:
    image = tmp_path / "empty"
    if way == "pipe":
        with piped(b"", image):
            assert "is empty" in refusal(image).message
    else:
        image.write_bytes(gzip.compress(b"") if way == "gzip" else b"")
        assert "is empty" in refusal(image).message


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").exit_status is Exit.NOT_FOUND
    assert "Is a directory" in refusal(tmp_path).message


def test_an_image_that_names_other_files_is_refused_before_a_converter_sees_it(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET.ljust(MIB))
    qemu_img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", tmp_path / "backing")
    qemu_img(
        "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/d", tmp_path / "data", "4M"
    )
    qemu_img("convert", "-f", "raw", "-O", "vmdk", disk, tmp_path / "whole")
    qemu_img("create", "-q", "-f", "vmdk", "-b", tmp_path / "whole", "-F", "vmdk", tmp_path / "up")
    split = ("-o", "subformat=twoGbMaxExtentSparse")
    qemu_img("convert", "-f", "raw", "-O", "vmdk", *split, disk, tmp_path / "split.vmdk")
    lines = ["# Disk DescriptorFile", "version=1", "CID=1", "parentCID=ffffffff"]
    lines += ['createType="monolithicFlat"', f'RW 8 FLAT "{secret}" 0']
    (tmp_path / "flat").write_text("\n".join(lines))
    monkeypatch.setenv("PATH", "/nowhere")  # no converter is asked
    for name, said in (
        ("backing", "is qcow2 and is based on another file"),
        ("data", "is qcow2 and keeps its data in another file"),
        ("up", "is vmdk and holds only the difference"),
        ("split.vmdk", "is vmdk and only describes a disk"),
        ("split-s001.vmdk", "is vmdk and"),
        ("flat", "is vmdk and only describes a disk"),
    ):
        problem = refusal(tmp_path / name)
        assert said in problem.message, name
        assert "v1 was not touched" in problem.message
        assert "if you trust it: qemu-img convert -f" in str(problem.next_step)
        assert problem.exit_status is Exit.USAGE
    problem = refusal(tmp_path / "whole")
    assert "qemu-img is not on PATH" in problem.message
    command = f"qemu-img convert -f vmdk -O raw {tmp_path}/whole {tmp_path}/whole.raw"
    assert command in str(problem.next_step)


def test_a_parent_that_only_the_converter_would_find_is_found(tmp_path: Path, disk: Path) -> None:
    """A description is read at 0x200 whatever the header says, and searched as one text."""
    qemu_img("convert", "-f", "raw", "-O", "vmdk", disk, tmp_path / "whole")
    good = bytearray((tmp_path / "whole").read_bytes())
    hidden = bytearray(good)
    hidden[0x200 + 9 * 512 : 0x200 + 9 * 512 + 40] = b'\0parentFileNameHint="/etc/passwd"\n'.ljust(
        40
    )
    assert look_at(bytes(hidden)).way is Way.REFUSE
    moved = bytearray(good)
    struct.pack_into("<Q", moved, 28, 40)
    moved[40 * 512 : 60 * 512] = good[512 : 21 * 512]
    assert look_at(bytes(moved)).way is Way.REFUSE
    assert look_at(bytes(good)).way is Way.CONVERT


@pytest.mark.parametrize(
    ("head", "kind", "step"),
    [
        (b"QFI\xfb\0\0\0\1", "qcow", "qemu-img convert -f qcow"),
        (b"LUKS\xba\xbe\0\2", "luks", "--raw takes its bytes"),
        (b"PK\x03\x04", "zip", "make it raw"),
        (b"7z\xbc\xaf\x27\x1c", "7z", "make it raw"),
        (b"\x04\x22\x4d\x18", "lz4", "make it raw"),
        (bytes(257) + b"ustar\0", "tar", "make it raw"),
        (b"QED\0", "qed", "qemu-img convert -f qed"),
        (b"COWD", "vmdk", "qemu-img convert -f vmdk"),
        (b"conectix" + bytes(52) + b"\0\0\0\4", "vpc", "qemu-img convert -f vpc"),
    ],
)
def test_what_is_neither_raw_nor_convertible_is_refused_by_name(
    tmp_path: Path, head: bytes, kind: str, step: str
) -> None:
    image = tmp_path / "image"
    image.write_bytes(head.ljust(MIB, b"\0"))
    problem = refusal(image)
    assert f"is {kind} and" in problem.message
    assert step in str(problem.next_step)
    assert raw_bytes(image, is_raw=True) == image.read_bytes()


@pytest.mark.parametrize("kind", PACK)
def test_a_stream_that_is_cut_or_damaged_is_not_a_shorter_image(
    tmp_path: Path, disk: Path, kind: str
) -> None:
    packed, whole = tmp_path / "packed", PACK[kind](disk.read_bytes())
    for cut in (16, len(whole) // 2, len(whole) - 1):
        packed.write_bytes(whole[:cut])
        problem = refusal(packed)
        assert "cannot be unpacked" in problem.message
        assert "v1 was not touched" in problem.message
    middle = len(whole) // 2
    packed.write_bytes(whole[:middle] + bytes((whole[middle] ^ 255,)) + whole[middle + 1 :])
    assert "cannot be unpacked" in refusal(packed).message


@pytest.mark.parametrize(("kind", "form", "options"), FORMATS)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_an_image_that_was_not_loaded_to_its_end_is_refused(
    tmp_path: Path, disk: Path, kind: str, form: str, options: tuple[str, ...], *, part: float
) -> None:
    """The converter itself gives zeros for what lies behind the end of a file."""
    image = tmp_path / "cut"
    qemu_img("convert", "-f", "raw", "-O", form, *options, disk, image)
    os.truncate(image, int(image.stat().st_size * part))
    if "subformat=fixed,force_size=on" in options:
        with Source(image, "v1", is_raw=False) as source:
            assert source.image.kind == "raw", "its only mark was the last sector"
        return
    try:
        found = raw_bytes(image)
    except CommandProblem as problem:
        found = None
        said = problem.message
    if found is None:
        assert f"is {kind} and" in said
    else:
        assert found == disk.read_bytes(), "only padding was cut off"


def test_an_image_that_qemu_cannot_read_says_why(tmp_path: Path, disk: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, tmp_path / "bad")
    whole = bytearray((tmp_path / "bad").read_bytes())
    struct.pack_into(">Q", whole, 40, (1 << 60) + 1)  # where the first table is
    (tmp_path / "bad").write_bytes(whole)
    problem = refusal(tmp_path / "bad")
    assert "is qcow2 and cannot be converted: " in problem.message
    assert problem.exit_status is Exit.FAILED
    assert "qemu-img check -f qcow2" in str(problem.next_step)


def test_a_stream_that_wants_the_whole_memory_is_refused() -> None:
    stream = bytearray(lzma.compress(bytes(MIB)))
    size = (stream[12] + 1) * 4
    place = stream.index(b"\x21\x01", 12)  # the filter LZMA2 with its one byte, the window
    stream[place + 2] = 40  # 4 GiB less one byte
    struct.pack_into("<I", stream, 12 + size - 4, zlib.crc32(stream[12 : 12 + size - 4]))
    with pytest.raises(CommandProblem, match="Memory usage limit"):
        list(unpacked("xz", io.BytesIO(bytes(stream)), name="x", volume="v1"))


def test_without_the_program_zstd_the_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image.zst").write_bytes(zstd(b"x" * 4096))
    monkeypatch.setenv("PATH", "/nowhere")
    problem = refusal(tmp_path / "image.zst")
    assert "no program zstd is on PATH; v1 was not touched" in problem.message
    assert "zstd -dc IMAGE | pf image import - v1" in str(problem.next_step)


def test_a_host_that_is_nearly_full_stays_as_it_is(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(image_source, "SPARE_BYTES", shutil.disk_usage(tmp_path).total)
    packed, converted = tmp_path / "packed", tmp_path / "converted"
    packed.write_bytes(gzip.compress(disk.read_bytes()))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, converted)
    for image in (packed, converted):
        problem = refusal(image)
        assert f"{tmp_path} has" in problem.message
        assert "TMPDIR" in str(problem.next_step)
    with piped(disk.read_bytes(), tmp_path / "pipe") as pipe:
        assert f"{tmp_path} has" in refusal(pipe).message
    assert raw_bytes(disk) == disk.read_bytes(), "a raw file needs no room"
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setattr(image_source, "SPARE_BYTES", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "packed", "pipe"]


HEADS = st.sampled_from(
    [
        b"",
        b"QFI\xfb\0\0\0\3",
        b"QFI\xfb\0\0\0\1",
        b"KDMV",
        b"conectix",
        b"vhdxfile",
        b"LUKS\xba\xbe",
        bytes(64) + b"\x7f\x10\xda\xbe",
        b"# Disk DescriptorFile\n",
        b"\x1f\x8b\x08",
        b"BZh9",
    ]
)


@given(HEADS, st.binary(max_size=2048), st.binary(max_size=600), st.integers(0, 1 << 64))
def test_any_bytes_are_something_and_little_of_them_is_read(
    head: bytes, rest: bytes, tail: bytes, size: int
) -> None:
    data = head + rest
    asked: list[int] = []

    def read_at(offset: int, length: int) -> bytes:
        asked.append(length)
        found = data[offset : offset + length] if offset == 0 else tail[:length]
        assert len(found) <= length
        return found

    image = look(read_at, size)
    assert image.way in Way
    assert len(asked) <= PIECES_MAX
    assert max(asked) <= PIECE_BYTES
    assert bool(image.reason) == (image.way is Way.REFUSE)


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=80))
def test_extensions_of_a_qcow2_are_followed_within_bounds(found: list[tuple[int, int]]) -> None:
    head = bytearray(b"QFI\xfb\0\0\0\3".ljust(104, b"\0"))
    struct.pack_into(">I", head, 100, 104)
    for kind, length in found:
        head += struct.pack(">II", kind, length % 32) + bytes(length % 32 + -length % 8)
    image = look_at(bytes(head.ljust(4096, b"\0")))
    kinds = [kind for kind, _ in found]
    ends = kinds.index(0) if 0 in kinds else len(kinds)
    is_named = 0x44415441 in kinds[:ends]
    is_long = ends >= EXTENSIONS_MAX
    if len(head) < 4000:
        assert (image.way is Way.REFUSE) == (is_named or is_long)


@given(
    st.sampled_from(["gzip", "xz", "bzip2"]),
    st.lists(st.binary(max_size=3000), min_size=1, max_size=4),
)
def test_streams_one_after_the_other_are_one_content(kind: str, parts: list[bytes]) -> None:
    packed = b"".join(PACK[kind](part) for part in parts)
    pieces = unpacked(kind, io.BytesIO(packed), name="x", volume="v1")
    assert b"".join(pieces) == b"".join(parts)


@given(
    st.sampled_from(["gzip", "xz", "bzip2"]),
    st.binary(min_size=1, max_size=300),
    st.integers(0, 1 << 16),
    st.binary(min_size=1, max_size=8),
)
def test_a_changed_stream_is_unpacked_as_it_was_or_refused(
    kind: str, data: bytes, place: int, change: bytes
) -> None:
    packed = PACK[kind](data)
    place %= len(packed)
    changed = packed[:place] + change + packed[place + len(change) :]
    try:
        found = b"".join(unpacked(kind, io.BytesIO(changed), name="x", volume="v1"))
    except CommandProblem:
        return
    assert found == data, "only what no checksum covers was changed: a name, a time"
