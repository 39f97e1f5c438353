"""Read and write PFW messages the slow and obvious way, from docs/reference/pfw.md alone.

Theory of operation. The Rust codec is what runs; this is the second opinion. It shares no code and
no generated table with it, down to its own CRC32C, so an error in one shows as a difference. The
page's tables are the tables `EXTENSIONS`, `BODIES` and `RECORDS` below; `decode` walks them, checks
everything about lengths, places and CRCs, and leaves the meaning of single extension fields to its
caller; `encode` is its inverse. Nothing here is fast, nothing does
I/O; tests of the codec, traces of the simulator and people with a packet capture call it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

HEADER_BYTES: Final = 64
BLOCK_BYTES: Final = 4096
SECTOR_BYTES: Final = 512
MIB: Final = 1 << 20
ID_LIMIT: Final = 1 << 53
MAGIC: Final = b"PFW1"
VERSION: Final = 1
REPLY: Final = 1
FUA: Final = 2
ERROR: Final = 4

Value = int | bytes
"""A field: an integer of at most 8 bytes, or the bytes of a longer one."""


class MalformedError(Exception):
    """The bytes are no message; the text names the first rule they break."""


class Opcode(enum.IntEnum):
    """What a message asks for or answers."""

    HELLO = 0x01
    FENCE_PATH = 0x02
    PING = 0x03
    READ = 0x10
    WRITE = 0x11
    FLUSH = 0x12
    DISCARD = 0x13
    WRITE_ZEROES = 0x14
    COMPARE_AND_WRITE = 0x15
    PREPARE = 0x20
    SETTLE = 0x21
    TAILS = 0x22
    COPY = 0x23
    DIGEST = 0x24
    SNAP = 0x25
    ATTACH = 0x26
    NEED_CONF = 0x27


class Body(enum.Enum):
    """What follows the extension."""

    NONE = "nothing, length 0"
    RANGE = "nothing, length is a range"
    DATA = "the data of the range"
    DATA_OR_NOTHING = "the data of the range, or nothing"
    DATA_TWICE = "expected data, then new data"
    RECORDS = "records"


Layout = tuple[tuple[str, int], ...]


def _layout(text: str) -> Layout:
    """Read `name size` pairs as they stand in the page."""
    pairs = [pair.split() for pair in text.split(",")]
    return tuple((name, int(size)) for name, size in pairs)


_TICKET = "volume 8, attach_epoch 8, session 8, expires 8, rights 4, ticket_mac 32"
_LIMITS = "payload_bytes_max 4, requests_max 4, inflight_bytes_max 4"
_STORE = "store 8, incarnation 8, nonce 32, proof 32"
_PEER = "seq 8, commit_epoch 8, commit_seq 8, snap_seq 8, incarnation 8, lsn_epoch 8, history_id 8"
_ACK = "incarnation 8, history_id 8, lsn_epoch 8, resync_id 8, credit 8"
_PING = (
    "sequence 8, base_sequence 8, store 8, incarnation 8, peer_incarnation 8, term 8, "
    "lineage 8, revision 8"
)

EXTENSIONS: Final[Mapping[tuple[Opcode, bool], Layout]] = {
    (Opcode.HELLO, False): _layout(
        "version_min 1, version_max 1, kind 1, path_slot 1, lane 4, path_generation 8, "
        f"features 8, {_LIMITS}, cluster_id 16, {_TICKET}, {_STORE}"
    ),
    (Opcode.HELLO, True): _layout(
        f"version 1, reserved 1, lanes 2, features 8, {_LIMITS}, {_STORE}"
    ),
    (Opcode.FENCE_PATH, False): _layout("generation 8, slot 4"),
    (Opcode.PING, False): _layout(_PING),
    (Opcode.PING, True): _layout(_PING),
    (Opcode.READ, False): _layout("snap_seq 8"),
    (Opcode.WRITE_ZEROES, False): _layout("options 4"),
    (Opcode.COMPARE_AND_WRITE, False): _layout("acked_upto 8"),
    (Opcode.COMPARE_AND_WRITE, True): _layout("outcome 4, first_difference 4"),
    (Opcode.PREPARE, False): _layout(
        f"{_PEER}, session 8, session_command 8, acked_upto 8, op 4, options 4"
    ),
    (Opcode.PREPARE, True): _layout(_ACK),
    (Opcode.SETTLE, False): _layout(f"{_PEER}, layer_snap_seq 8, state 4"),
    (Opcode.SETTLE, True): _layout(_ACK),
    (Opcode.TAILS, False): _layout(_PEER),
    (Opcode.TAILS, True): _layout(
        f"{_ACK}, complete_epoch 8, complete_seq 8, snap_seq 8, record_count 4, result_count 4"
    ),
    (Opcode.COPY, False): _layout(f"{_PEER}, resync_id 8, layer_snap_seq 8, state 4, options 4"),
    (Opcode.COPY, True): _layout(_ACK),
    (Opcode.DIGEST, False): _layout(
        f"{_PEER}, resync_id 8, layer_snap_seq 8, first_region 4, region_count 4"
    ),
    (Opcode.DIGEST, True): _layout(_ACK),
    (Opcode.SNAP, False): _layout(f"{_PEER}, cut_id 8, target_snap_seq 8, action 4"),
    (Opcode.SNAP, True): _layout(_ACK),
    (Opcode.ATTACH, False): _layout(
        f"{_PEER}, attach_epoch 8, client 8, session 8, until 8, action 4"
    ),
    (Opcode.ATTACH, True): _layout(_ACK),
    (Opcode.NEED_CONF, False): _layout(_PEER),
    (Opcode.NEED_CONF, True): _layout(_ACK),
}

BODIES: Final[Mapping[tuple[Opcode, bool], tuple[Body, int]]] = {
    (Opcode.FENCE_PATH, True): (Body.RECORDS, MIB),
    (Opcode.PING, False): (Body.RECORDS, MIB),
    (Opcode.PING, True): (Body.RECORDS, MIB),
    (Opcode.READ, False): (Body.RANGE, MIB),
    (Opcode.READ, True): (Body.DATA, MIB),
    (Opcode.WRITE, False): (Body.DATA, MIB),
    (Opcode.DISCARD, False): (Body.RANGE, 64 * MIB),
    (Opcode.WRITE_ZEROES, False): (Body.RANGE, 64 * MIB),
    (Opcode.COMPARE_AND_WRITE, False): (Body.DATA_TWICE, BLOCK_BYTES),
    (Opcode.PREPARE, False): (Body.DATA_OR_NOTHING, MIB),
    (Opcode.SETTLE, False): (Body.DATA_OR_NOTHING, MIB),
    (Opcode.TAILS, True): (Body.RECORDS, MIB),
    (Opcode.COPY, False): (Body.DATA_OR_NOTHING, MIB),
    (Opcode.DIGEST, True): (Body.RECORDS, MIB),
    (Opcode.NEED_CONF, True): (Body.RECORDS, 4096),
}
"""Everything else has `Body.NONE`. An error reply has neither extension nor body."""

RECORDS: Final[Mapping[tuple[Opcode, bool], Layout]] = {
    (Opcode.FENCE_PATH, True): _layout("command_id 8, epoch 8, seq 8, status 4, detail 4"),
    (Opcode.PING, False): _layout("volume 8, epoch 8, shard_index 4, kind 4"),
    (Opcode.PING, True): _layout("volume 8, epoch 8, shard_index 4, kind 4"),
    (Opcode.TAILS, True): _layout("epoch 8, seq 8, offset 8, snap_seq 8, length 4, op 4, state 4"),
    (Opcode.DIGEST, True): _layout("digest 16"),
}
TAIL_RESULT: Final = _layout(
    "session 8, session_command 8, epoch 8, seq 8, outcome 4, first_difference 4"
)
"""Follows the records of a TAILS reply."""

FUA_OPCODES: Final = frozenset(
    {Opcode.WRITE, Opcode.DISCARD, Opcode.WRITE_ZEROES, Opcode.COMPARE_AND_WRITE}
)
WHOLE_BLOCK_OPCODES: Final = frozenset({Opcode.PREPARE, Opcode.SETTLE, Opcode.COPY})


@dataclass(frozen=True, slots=True)
class Message:
    """One PFW message; `data` is the range's bytes, both halves, or the records."""

    opcode: Opcode
    is_reply: bool = False
    is_fua: bool = False
    is_error: bool = False
    command_id: int = 0
    volume_id: int = 0
    shard_index: int = 0
    length: int = 0
    place: int = 0
    """Request: offset. Reply: status, and detail << 32."""
    epoch: int = 0
    position: int = 0
    """Request: attach epoch. Reply: lsn.seq."""
    extension: Mapping[str, Value] = field(default_factory=dict)
    data: bytes = b""

    @property
    def shape(self) -> tuple[Opcode, bool]:
        """Key of the tables."""
        return self.opcode, self.is_reply

    @property
    def start_in_block(self) -> int:
        """Give the place of the first data byte in its block; records start at 0."""
        if body_of(self)[0] is Body.RECORDS:
            return 0
        return (self.place >> 32 if self.is_reply else self.place) % BLOCK_BYTES


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_CRC_TABLE: Final = _crc_table()


def crc32c(data: bytes) -> int:
    """Compute CRC32C (Castagnoli, reflected, RFC 3720 appendix B.4), one byte at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def blocks(data: bytes, start_in_block: int) -> list[bytes]:
    """Cut data at the 4 KiB edges of the shard; the first and last piece may be fragments."""
    pieces, at, end = [], 0, BLOCK_BYTES - start_in_block
    while at < len(data):
        pieces.append(data[at:end])
        at, end = end, end + BLOCK_BYTES
    return pieces


def body_of(message: Message) -> tuple[Body, int]:
    """Look up what follows the extension, and the limit of `length`."""
    if message.is_error:
        return Body.NONE, 0
    return BODIES.get(message.shape, (Body.NONE, 0))


def pack(layout: Layout, values: Mapping[str, Value]) -> bytes:
    """Write fields in order, little-endian."""
    out = b""
    for name, size in layout:
        value = values[name]
        out += value.to_bytes(size, "little") if isinstance(value, int) else value
    return out


def unpack(layout: Layout, data: bytes) -> dict[str, Value]:
    """Read fields in order; those of more than 8 bytes stay bytes."""
    values: dict[str, Value] = {}
    for name, size in layout:
        part, data = data[:size], data[size:]
        values[name] = part if size > 8 else int.from_bytes(part, "little")
    return values


def encode(message: Message) -> bytes:
    """Make the bytes of a message; the inverse of `decode` for every message it accepts."""
    layout = () if message.is_error else EXTENSIONS.get(message.shape, ())
    body = pack(layout, message.extension)
    if layout:
        body += crc32c(body).to_bytes(4, "little")
    for part in _data_parts(message, message.data):
        for piece in blocks(part, message.start_in_block):
            body += crc32c(piece).to_bytes(4, "little")
    body += message.data
    flags = REPLY * message.is_reply | FUA * message.is_fua | ERROR * message.is_error
    head = (
        MAGIC
        + bytes((VERSION, message.opcode))
        + flags.to_bytes(2, "little")
        + message.command_id.to_bytes(8, "little")
        + message.volume_id.to_bytes(8, "little")
        + message.shard_index.to_bytes(4, "little")
        + message.length.to_bytes(4, "little")
        + message.place.to_bytes(8, "little")
        + message.epoch.to_bytes(8, "little")
        + message.position.to_bytes(8, "little")
        + len(body).to_bytes(4, "little")
    )
    return head + crc32c(head).to_bytes(4, "little") + body


def decode(data: bytes) -> Message:
    """Read one message that is exactly `data`.

    Errors: `MalformedError` with the first broken rule; nothing else for any bytes.
    """
    message = decode_header(data[:HEADER_BYTES])
    body_length = int.from_bytes(data[56:60], "little")
    body = data[HEADER_BYTES:]
    _require(len(body) == body_length, "the body is truncated")
    layout = () if message.is_error else EXTENSIONS.get(message.shape, ())
    size = sum(size for _, size in layout)
    extension = unpack(layout, body[:size])
    if layout:
        stated = int.from_bytes(body[size : size + 4], "little")
        _require(crc32c(body[:size]) == stated, "extension CRC")
        body = body[size + 4 :]
    content = body[len(body) - _data_length(message, len(body)) :]
    crcs = body[: len(body) - len(content)]
    found = b""
    for part in _data_parts(message, content):
        for piece in blocks(part, message.start_in_block):
            found += crc32c(piece).to_bytes(4, "little")
    _require(found == crcs, "data CRC")
    whole = Message(
        opcode=message.opcode,
        is_reply=message.is_reply,
        is_fua=message.is_fua,
        is_error=message.is_error,
        command_id=message.command_id,
        volume_id=message.volume_id,
        shard_index=message.shard_index,
        length=message.length,
        place=message.place,
        epoch=message.epoch,
        position=message.position,
        extension=extension,
        data=content,
    )
    _check_range(whole)
    _check_status(whole)
    return whole


def decode_header(head: bytes) -> Message:
    """Check a header in the order of the page; the message has no extension and no data yet."""
    _require(len(head) == HEADER_BYTES, "the header is truncated")
    _require(head[:4] == MAGIC, "magic")
    _require(head[4] == VERSION, "version")
    _require(crc32c(head[:60]) == int.from_bytes(head[60:], "little"), "header CRC")
    _require(head[5] in set(Opcode), "opcode")
    opcode = Opcode(head[5])
    flags = int.from_bytes(head[6:8], "little")
    _require(flags <= REPLY | FUA | ERROR, "unknown flag")
    _require(not flags & ERROR or bool(flags & REPLY), "an error that is no reply")
    _require(
        not flags & FUA or (not flags & REPLY and opcode in FUA_OPCODES), "FUA on something else"
    )
    number = {
        name: int.from_bytes(head[at : at + size], "little")
        for name, at, size in (
            ("command_id", 8, 8),
            ("volume_id", 16, 8),
            ("shard_index", 24, 4),
            ("length", 28, 4),
            ("place", 32, 8),
            ("epoch", 40, 8),
            ("position", 48, 8),
            ("body_length", 56, 4),
        )
    }
    body_length = number.pop("body_length")
    message = Message(
        opcode=opcode,
        is_reply=bool(flags & REPLY),
        is_fua=bool(flags & FUA),
        is_error=bool(flags & ERROR),
        **number,  # type: ignore[arg-type]  # every value is an int, every name a field
    )
    _check_lengths(message, body_length)
    return message


def records(message: Message) -> tuple[dict[str, Value], ...]:
    """Cut the data of a message with records into them; results of TAILS come last."""
    layout = RECORDS[message.shape]
    size = sum(size for _, size in layout)
    count, rest = divmod(len(message.data), size)
    layouts = [layout] * count
    if message.opcode is Opcode.TAILS:
        counts = message.extension["record_count"], message.extension["result_count"]
        assert isinstance(counts[0], int)
        assert isinstance(counts[1], int)
        layouts = [layout] * counts[0] + [TAIL_RESULT] * counts[1]
        rest = len(message.data) - sum(size for each in layouts for _, size in each)
    _require(rest == 0, "a record is cut")
    out, data = [], message.data
    for each in layouts:
        out.append(unpack(each, data))
        data = data[sum(size for _, size in each) :]
    return tuple(out)


def _check_lengths(message: Message, body_length: int) -> None:
    body, limit = body_of(message)
    layout = () if message.is_error else EXTENSIONS.get(message.shape, ())
    extension = sum(size for _, size in layout) + 4 * bool(layout)
    if body is Body.DATA_OR_NOTHING and body_length == extension:
        body, limit = Body.RANGE, 64 * MIB
    _require(message.length <= limit, "length above the limit")
    carried = message.length if body not in (Body.NONE, Body.RANGE) else 0
    crcs = 4 * -(-(message.start_in_block + carried) // BLOCK_BYTES) if carried else 0
    times = 2 if body is Body.DATA_TWICE else 1
    _require(body_length == extension + times * (crcs + carried), "body_length")


def _data_length(message: Message, after_extension: int) -> int:
    body, _ = body_of(message)
    if body in (Body.NONE, Body.RANGE) or after_extension == 0:
        return 0
    return message.length * (2 if body is Body.DATA_TWICE else 1)


def _data_parts(message: Message, data: bytes) -> list[bytes]:
    if body_of(message)[0] is Body.DATA_TWICE:
        return [data[: len(data) // 2], data[len(data) // 2 :]]
    return [data]


def _check_range(message: Message) -> None:
    _require(message.volume_id < ID_LIMIT, "volume_id")
    body, _ = body_of(message)
    has_range = body not in (Body.NONE, Body.RECORDS)
    if message.is_reply:
        if has_range:
            start = message.place >> 32
            _require(start < BLOCK_BYTES and start % SECTOR_BYTES == 0, "detail of READ")
            _require(message.length > 0 and message.length % SECTOR_BYTES == 0, "length of READ")
        return
    if not has_range:
        _require(message.place == 0, "offset without a range")
        return
    unit = BLOCK_BYTES if message.opcode in WHOLE_BLOCK_OPCODES else SECTOR_BYTES
    _require(message.length > 0 and message.place + message.length < 1 << 64, "range")
    _require(message.place % unit == 0 and message.length % unit == 0, "alignment")
    if body is Body.DATA_TWICE:
        _require(message.start_in_block + message.length <= BLOCK_BYTES, "more than one block")


def _check_status(message: Message) -> None:
    if not message.is_reply:
        return
    status, detail = message.place & 0xFFFFFFFF, message.place >> 32
    _require((status != 0) == message.is_error, "status")
    _require(
        message.is_error or message.opcode is Opcode.READ or detail == 0, "detail without error"
    )


def _require(is_so: bool, rule: str) -> None:
    if not is_so:
        raise MalformedError(rule)
