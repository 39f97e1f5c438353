"""A small blocking NBD client, written from the protocol document alone.

It shares no line with the gateway, keeps many requests in flight, and can say every wrong thing:
`send_raw` puts any bytes on the wire. Integers are big-endian.
"""

from __future__ import annotations

import enum
import socket
import struct
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import parse_qs, urlparse

TIMEOUT_S: Final = 60.0
OPTION_MAGIC: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF
FUA: Final = 1
NO_HOLE: Final = 2


class Command(enum.IntEnum):
    """Requests of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply. `error` is an errno, 0 for success; `text` what the server says about it."""

    cookie: int
    error: int
    text: str
    data: bytes


def open_socket(uri: str) -> tuple[socket.socket, str]:
    """Connect to an `nbd:` or `nbd+unix:` URI; gives the socket and the name of the export."""
    parts = urlparse(uri)
    name = parts.path.removeprefix("/")
    if parts.scheme == "nbd+unix":
        client = socket.socket(socket.AF_UNIX)
        try:
            # Without a timeout yet: that would make a full backlog an error instead of a wait.
            client.connect(parse_qs(parts.query)["socket"][0])
        except OSError:
            client.close()
            raise
        client.settimeout(TIMEOUT_S)
    else:
        assert parts.hostname is not None
        assert parts.port is not None
        client = socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S)
    return client, name


class NbdClient:
    """One connection to an export."""

    def __init__(self, uri: str, *, is_structured: bool = True) -> None:
        """Connect and choose the export."""
        self.socket, name = open_socket(uri)
        self._next_cookie = 1
        self._reads: dict[int, int] = {}
        self.is_structured = is_structured
        magic, option_magic, _ = struct.unpack(">8sQH", self.exactly(18))
        assert (magic, option_magic) == (b"NBDMAGIC", OPTION_MAGIC)
        self.send_raw(struct.pack(">I", 3))  # fixed newstyle, no zeroes
        if is_structured:
            assert self.option(8, b"") == []
        wanted = struct.pack(">I", len(name)) + name.encode() + struct.pack(">HH", 1, 3)
        for info in self.option(7, wanted):
            if info[:2] == b"\0\0":
                self.size_bytes: int
                self.flags: int
                self.size_bytes, self.flags = struct.unpack(">QH", info[2:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave as the protocol says."""
        try:
            self.send(Command.DISC)
        except OSError:
            pass  # the server was first
        finally:
            self.socket.close()

    def option(self, number: int, data: bytes) -> list[bytes]:
        """Send one option; gives what came before its ACK."""
        self.send_raw(struct.pack(">QII", OPTION_MAGIC, number, len(data)) + data)
        said: list[bytes] = []
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self.exactly(20))
            assert (magic, option) == (OPTION_REPLY_MAGIC, number)
            body = self.exactly(length)
            assert kind < 1 << 31, f"option {number} is refused: {body.decode()}"
            if kind == 1:
                return said
            said.append(body)

    def send_raw(self, data: bytes) -> None:
        """Put bytes on the wire as they are."""
        self.socket.sendall(data)

    def send(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        data: bytes = b"",
        flags: int = 0,
    ) -> int:
        """Send a request without waiting; gives its cookie."""
        cookie = self._next_cookie
        self._next_cookie += 1
        if command == Command.READ:
            self._reads[cookie] = length
        length = len(data) or length
        head = struct.pack(">IHHQQI", REQUEST_MAGIC, flags, command, cookie, offset, length)
        self.send_raw(head + data)
        return cookie

    def receive(self) -> Answer:
        """Take the next reply, of whichever request."""
        (magic,) = struct.unpack(">I", self.exactly(4))
        if magic == SIMPLE_REPLY_MAGIC:
            error, cookie = struct.unpack(">IQ", self.exactly(12))
            length = self._reads.pop(cookie, 0)
            return Answer(cookie, error, "", b"" if error else self.exactly(length))
        assert magic == CHUNK_MAGIC, f"reply magic {magic:#x}"
        is_last, kind, cookie, length = struct.unpack(">HHQI", self.exactly(16))
        body = self.exactly(length)
        assert is_last == 1, "each reply of this server is one chunk"
        self._reads.pop(cookie, None)
        if kind == (1 << 15) + 1:
            error, text_length = struct.unpack(">IH", body[:6])
            return Answer(cookie, error, body[6 : 6 + text_length].decode(), b"")
        return Answer(cookie, 0, "", body[8:] if kind == 1 else b"")

    def call(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        data: bytes = b"",
        flags: int = 0,
    ) -> Answer:
        """Send a request and wait for its reply; nothing else may be under way."""
        cookie = self.send(command, offset, length, data=data, flags=flags)
        answer = self.receive()
        assert answer.cookie == cookie
        return answer

    def exactly(self, count: int) -> bytes:
        """Receive `count` bytes. Errors: EOFError when the server has closed."""
        data = bytearray()
        while len(data) < count:
            piece = self.socket.recv(min(count - len(data), 1 << 20))
            if not piece:
                raise EOFError(f"the server closed after {len(data)} of {count} bytes")
            data += piece
        return bytes(data)
