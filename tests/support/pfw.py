"""A small blocking PFW client by the Python model of the protocol: as client, peer or heartbeat.

It shares no line with the Rust codec. What it sends is right unless a test changes it: `send_raw`
takes any bytes, and every field of a HELLO can be given another value.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
from dataclasses import dataclass
from typing import Any, Final, Self

from pureflash.errors import Code
from pureflash.testing.model import wire
from pureflash.testing.model.wire import Message, Opcode

TIMEOUT_S: Final = 30.0
CLIENT: Final = 1
PEER: Final = 2
HEARTBEAT: Final = 3
NO_SNAP: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What has to be known of a cluster to speak to one of its stores."""

    cluster_id: bytes
    key: bytes


def status(reply: Message) -> Code:
    """Read the outcome of a reply."""
    return Code(reply.place & 0xFFFFFFFF)


def hello(kind: int, cluster_id: bytes, **changes: Any) -> Message:
    """Make a HELLO without ticket and proof."""
    extension: dict[str, Any] = {
        "version_min": 1,
        "version_max": 1,
        "kind": kind,
        "path_slot": 0,
        "lane": 0,
        "path_generation": 1 if kind == CLIENT else 0,
        "features": 0,
        "payload_bytes_max": 1 << 20,
        "requests_max": 128,
        "inflight_bytes_max": 32 << 20,
        "cluster_id": cluster_id,
        "volume": 0,
        "attach_epoch": 0,
        "session": 0,
        "expires": 0,
        "rights": 0,
        "ticket_mac": bytes(32),
        "store": 0,
        "incarnation": 0,
        "nonce": bytes(32),
        "proof": bytes(32),
    }
    assert set(changes) <= set(extension), "a field of HELLO"
    return Message(Opcode.HELLO, extension=extension | changes)


def ticket_fields(ticket: bytes) -> dict[str, Any]:
    """Take a signed ticket apart into the fields of HELLO."""
    places = (("volume", 8), ("attach_epoch", 8), ("session", 8), ("expires", 8), ("rights", 4))
    fields: dict[str, Any] = {}
    for name, size in places:
        fields[name], ticket = int.from_bytes(ticket[:size], "little"), ticket[size:]
    return fields | {"ticket_mac": ticket}


class Connection:
    """One connection to a store's port; nothing is said at first."""

    def __init__(self, address: str) -> None:
        """Connect to host:port."""
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self.socket.close()

    def send_raw(self, data: bytes) -> None:
        """Put bytes on the wire as they are."""
        self.socket.sendall(data)

    def send(self, message: Message) -> None:
        """Put a message on the wire."""
        self.send_raw(wire.encode(message))

    def receive(self) -> Message:
        """Take the next message. Errors: EOFError, ConnectionError when the store has closed."""
        head = self._exactly(wire.HEADER_BYTES)
        return wire.decode(head + self._exactly(int.from_bytes(head[56:60], "little")))

    def call(self, message: Message) -> Message:
        """Send a message and take the next one."""
        self.send(message)
        return self.receive()

    def receive_status(self) -> Code:
        """Take an error reply, also one to a message that the model would not read.

        A reply repeats the ids of its request, whatever they were.
        """
        head = self._exactly(wire.HEADER_BYTES)
        assert (head[:4], head[6]) == (wire.MAGIC, wire.REPLY | wire.ERROR)
        assert head[28:32] == head[56:60] == bytes(4), "an error reply carries nothing"
        return Code(int.from_bytes(head[32:36], "little"))

    def is_closed(self) -> bool:
        """Read on until the store closes; False when it says something first."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True  # closed with bytes of ours unread

    def prove(self, kind: int, cluster: Cluster, *, store: int, incarnation: int) -> Message:
        """Shake hands as a store; gives the reply to the second HELLO.

        The proof is the one of docs/reference/pfw.md, by both sides.
        """
        own: dict[str, Any] = {"store": store, "incarnation": incarnation, "nonce": b"n" * 32}
        first = self.call(hello(kind, cluster.cluster_id, **own))
        if first.is_error:
            return first
        called: dict[str, Any] = dict(first.extension)
        text = b"pureflash peer" + cluster.cluster_id + bytes((kind, 1))
        for side in (own, called):
            text += side["store"].to_bytes(8, "little")
            text += side["incarnation"].to_bytes(8, "little") + side["nonce"]
        proof = hmac.digest(cluster.key, text, hashlib.sha256)
        return self.call(hello(kind, cluster.cluster_id, **own, proof=proof))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError(f"the store closed after {len(data)} of {count} bytes")
            data += piece
        return data


class Session(Connection):
    """A client's connection with a ticket; requests carry its volume and epochs."""

    def __init__(
        self, address: str, cluster: bytes, ticket: bytes, *, epoch: int, **changes: Any
    ) -> None:
        """Connect and say HELLO; `hello` is the reply."""
        super().__init__(address)
        self._fields = ticket_fields(ticket)
        self._epoch = epoch
        self._next_id = 1
        said = hello(CLIENT, cluster, **self._fields)
        self.hello = self.call(Message(Opcode.HELLO, extension={**said.extension, **changes}))

    def request(self, opcode: Opcode, offset: int, length: int, **fields: Any) -> Message:
        """Make a request that is right but for `fields`."""
        self._next_id += 1
        usual: dict[str, Any] = {
            "command_id": self._next_id,
            "volume_id": self._fields["volume"],
            "place": offset,
            "length": length,
            "epoch": self._epoch,
            "position": self._fields["attach_epoch"],
        }
        if opcode is Opcode.READ:
            usual["extension"] = {"snap_seq": NO_SNAP}
        if opcode is Opcode.WRITE_ZEROES:
            usual["extension"] = {"options": 0}
        return Message(opcode, **(usual | fields))

    def write(self, offset: int, data: bytes, **fields: Any) -> Message:
        """Write and wait."""
        return self.call(self.request(Opcode.WRITE, offset, len(data), data=data, **fields))

    def read(self, offset: int, length: int, **fields: Any) -> Message:
        """Read and wait."""
        return self.call(self.request(Opcode.READ, offset, length, **fields))


def patched(frame: bytes, at: int, value: bytes, *, is_signed: bool = True) -> bytes:
    """Change bytes of a frame's header; its CRC is made right again unless `is_signed` is false."""
    head = bytearray(frame[: wire.HEADER_BYTES])
    head[at : at + len(value)] = value
    if is_signed:
        head[60:64] = wire.crc32c(bytes(head[:60])).to_bytes(4, "little")
    return bytes(head) + frame[wire.HEADER_BYTES :]
