"""What NBD clients can say wrongly, with the answer that the protocol document asks for."""

from __future__ import annotations

import struct
from typing import Final

from tests.support.nbd import OPTION_MAGIC, Command
from tests.support.target import VOLUME_BYTES

EINVAL: Final = 22
ENOSPC: Final = 28
EPERM: Final = 1


def option(number: int, data: bytes, *, length: int | None = None) -> bytes:
    stated = len(data) if length is None else length
    return struct.pack(">QII", OPTION_MAGIC, number, stated) + data


FIXED = struct.pack(">I", 3)
HANDSHAKES: dict[str, bytes] = {
    "http": b"GET / HTTP/1.1\r\n\r\n" + b" " * 64,
    "unknown client flags": struct.pack(">I", 0x80000003),
    "option magic": FIXED + b"\0" * 64,
    "an option of 4 GiB": FIXED + option(7, b"", length=0xFFFFFFFF),
    "a name of 64 KiB": FIXED + option(1, b"n" * 70_000),
    "EXPORT_NAME of nothing": FIXED + option(1, b"none"),
    "options without end": FIXED + option(99, b"") * 5_000,
    "GO without fixed newstyle": bytes(4) + option(7, b""),
}


OPTIONS: dict[str, tuple[bytes, int, bytes]] = {
    "an unknown option": (option(99, b"x" * 100), 2**31 + 1, b"not supported"),
    "TLS": (option(5, b""), 2**31 + 1, b"TLS"),
    "GO of an unknown export": (
        option(7, struct.pack(">I", 4) + b"none" + bytes(2)), 2**31 + 6, b"no export",
    ),
    "GO of the other transport": (
        option(7, struct.pack(">I", 4) + b"unix" + bytes(2)), 2**31 + 6, b"no export",
    ),
    "GO with a long name length": (
        option(7, struct.pack(">I", 0xFFFFFFFF) + b"tcp" + bytes(2)), 2**31 + 3, b"",
    ),
    "GO with half a name": (option(7, b"\0\0"), 2**31 + 3, b""),
    "LIST with data": (option(3, b"x"), 2**31 + 3, b"no data"),
    "a name that is not UTF-8": (
        option(7, struct.pack(">I", 2) + b"\xff\xfe" + bytes(2)), 2**31 + 3, b"UTF-8",
    ),
}  # fmt: skip


REQUESTS: dict[str, tuple[int, int, int, int, int]] = {
    # command, flags, offset, length -> errno
    "an unknown command": (99, 0, 0, 0, EINVAL),
    "an unknown flag": (Command.READ, 1 << 9, 0, 512, EINVAL),
    "FAST_ZERO, which is not offered": (Command.WRITE_ZEROES, 1 << 4, 0, 4096, EINVAL),
    "an odd offset": (Command.READ, 0, 511, 512, EINVAL),
    "an odd length": (Command.READ, 0, 0, 513, EINVAL),
    "a read beyond the end": (Command.READ, 0, VOLUME_BYTES, 512, EINVAL),
    "a read across the end": (Command.READ, 0, VOLUME_BYTES - 512, 1024, EINVAL),
    "a read that wraps": (Command.READ, 0, (1 << 64) - 512, 1024, EINVAL),
    "a read of 4 GiB": (Command.READ, 0, 0, 0xFFFFFE00, EINVAL),
    "a trim across the end": (Command.TRIM, 0, VOLUME_BYTES - 512, 1024, EINVAL),
    "a trim of 4 GiB": (Command.TRIM, 0, 0, 0xFFFFFE00, EINVAL),
    "zeros across the end": (Command.WRITE_ZEROES, 0, VOLUME_BYTES - 512, 1024, ENOSPC),
    "a flush with a range": (Command.FLUSH, 0, 512, 512, EINVAL),
}
