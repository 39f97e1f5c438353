"""Negotiate NBD connections: the fixed newstyle handshake as a machine without I/O.

Theory of operation. One `Negotiation` per connection, driven in h11's style: `receive_data` takes
whatever bytes came and returns events, `data_to_send` gives what to send back. It ends in exactly
one final event: `Adopt`, when the client has chosen an export (the socket and the leftover bytes
then go to a Rust lane, which speaks the transmission phase), or `Closed` with a reason. The machine
owns no socket, clock or export; the gateway gives it a `Table` of exports and enforces the time
limit. Any bytes give events, never an exception; calling it after its final event is our bug.

A client that lists exports asks two or three options about each, so options are not counted. What
is bounded is the bytes of both directions: `HANDSHAKE_BYTES_MAX`, and `EXPORT_BYTES_MAX` more for
each export that is offered. An unknown client costs at most `HANDSHAKE_BYTES_MAX` of memory: a
length is judged before its bytes are kept, what will be refused anyway is skipped, not stored, and
the long answer to LIST is one object that all handshakes share.

Clauses quoted below are from the NBD protocol document (NetworkBlockDevice/nbd, doc/proto.md), by
section title. All integers are big-endian.

```
FLAGS -> OPTION -> DATA -> OPTION ...        each option is answered before the next is looked at
                     |-> ADOPTED             EXPORT_NAME, GO
   any of them ------'-> CLOSED              ABORT, end of stream, a broken rule
```
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

HANDSHAKE_BYTES_MAX: Final = 64 * 1024
"""Bytes of one option; and of a handshake, in both directions together, if nothing is offered."""
EXPORT_BYTES_MAX: Final = 2 * 1024
"""Bytes that a handshake may have more for each export that is offered. To name one of 96 bytes,
and to ask for all that is told of it and for its contexts, takes less than half of that."""
NAME_BYTES_MAX: Final = 4096
""" "Conventions": a string "MUST be no longer than 4096 bytes"."""
BLOCK_BYTES_MIN: Final = 512
BLOCK_BYTES_PREFERRED: Final = 4096
BLOCK_BYTES_MAX: Final = 1 << 20
"""Advertised to clients that ask; one wire message of PFW."""
REQUEST_BYTES_MAX: Final = 32 << 20
""" "Block size constraints": without negotiation "any length less than 2^25" is no attack."""

NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
REPLY_MAGIC: Final = 0x0003E889045565A9
ZEROES: Final = bytes(124)
_OPTION_HEADER: Final = struct.Struct(">QII")


class HandshakeFlag(enum.IntFlag):
    """Offered by the server, and echoed by the client with the same bits."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(enum.IntEnum):
    """Options that this server knows."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8


class Reply(enum.IntEnum):
    """Reply types."""

    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = 2**31 + 1
    ERR_INVALID = 2**31 + 3
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_TOO_BIG = 2**31 + 9


class Info(enum.IntEnum):
    """Information types of INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(enum.IntFlag):
    """What the export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8


@dataclass(frozen=True, slots=True)
class Export:
    """What a client may choose. `name` is at most `NAME_BYTES_MAX` bytes of UTF-8."""

    name: str
    size_bytes: int
    is_read_only: bool = False
    description: str = ""


class Table:
    """The exports of one transport, as they were when a handshake began.

    The gateway makes a table anew when an export changes. All handshakes in between share it, and
    with it the answer to LIST, which is encoded for the first that asks.
    """

    def __init__(self, exports: Iterable[Export]) -> None:
        """Offer `exports`, whose names differ."""
        self.by_name: Mapping[str, Export] = {export.name: export for export in exports}
        self.handshake_bytes_max = HANDSHAKE_BYTES_MAX + EXPORT_BYTES_MAX * len(self.by_name)

    @cached_property
    def listing(self) -> bytes:
        """All replies to one LIST."""
        names = [name.encode() for name in self.by_name]
        replies = [
            encode_reply(Option.LIST, Reply.SERVER, struct.pack(">I", len(name)) + name)
            for name in names
        ]
        return b"".join((*replies, encode_reply(Option.LIST, Reply.ACK)))


@dataclass(frozen=True, slots=True)
class Adopt:
    """The handshake is done; give the socket and these to a lane.

    Units: `request_bytes_max` bytes that one READ or WRITE may have on this connection.
    """

    export: Export
    leftover: bytes
    is_structured: bool
    flags: TransmissionFlag
    request_bytes_max: int


@dataclass(frozen=True, slots=True)
class Closed:
    """Send what is left, then close. `is_clean`: the client ended it as the protocol says."""

    reason: str
    is_clean: bool


Event = Adopt | Closed


class State(enum.Enum):
    """Where the handshake stands."""

    FLAGS = enum.auto()
    OPTION = enum.auto()
    DATA = enum.auto()
    ADOPTED = enum.auto()
    CLOSED = enum.auto()


class _RefusedError(Exception):
    """An option is answered with an error; the handshake goes on."""

    def __init__(self, reply: Reply, message: str) -> None:
        super().__init__(message)
        self.reply = reply
        self.message = message


class _BrokenError(Exception):
    """The connection cannot go on."""


class Negotiation:
    """One connection's handshake; see the module's head."""

    def __init__(self, table: Table, *, default: str | None = None) -> None:
        """Offer `table`; `default` is the name that an empty name stands for.

        `answered` counts the options that are done: the sign that a client gets on.
        """
        self.state = State.FLAGS
        self.answered = 0
        self._table = table
        self._default = default
        self._is_shutting_down = False
        self._buffer = bytearray()
        self._spent = 0
        self._option = 0
        self._left = 0
        self._to_skip = 0
        self._client_flags = HandshakeFlag(0)
        self._is_structured = False
        # "Newstyle negotiation": the server speaks first.
        offered = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._out: deque[bytes | bytearray] = deque()
        self._send(struct.pack(">QQH", NBDMAGIC, IHAVEOPT, offered))

    def data_to_send(self) -> bytes:
        """Take the next piece that is to be sent; empty when there is none.

        The answer to a LIST is a piece of its own: nobody's copy of it waits for a slow client.
        """
        return bytes(self._out.popleft()) if self._out else b""

    def shut_down(self) -> None:
        """Refuse further options with ERR_SHUTDOWN (the gateway stops)."""
        self._is_shutting_down = True

    def receive_eof(self) -> list[Event]:
        """Tell the machine that the client sends no more."""
        self._assert_open()
        self.state = State.CLOSED
        return [Closed("the client closed the connection during the handshake", is_clean=False)]

    def receive_data(self, data: bytes) -> list[Event]:
        """Handle bytes; the last event of a handshake is `Adopt` or `Closed`."""
        self._assert_open()
        self._buffer += data
        steps: Mapping[State, Callable[[], Event | bool]] = {
            State.FLAGS: self._read_flags,
            State.OPTION: self._read_option,
            State.DATA: self._read_data,
        }
        try:
            while True:
                outcome = steps[self.state]()
                if isinstance(outcome, (Adopt, Closed)):
                    return [outcome]
                if not outcome:
                    return []
        except _BrokenError as broken:
            self.state = State.CLOSED
            self._buffer.clear()
            return [Closed(str(broken), is_clean=False)]

    def _assert_open(self) -> None:
        assert self.state not in (State.ADOPTED, State.CLOSED), "the handshake has ended"

    def _take(self, count: int) -> bytes | None:
        """Take `count` bytes if they are there."""
        if len(self._buffer) < count:
            return None
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        self._spend(count)
        return taken

    def _spend(self, count: int) -> None:
        """Count bytes of either direction against what this handshake may have."""
        self._spent += count
        if self._spent > self._table.handshake_bytes_max:
            raise _BrokenError(
                f"the handshake would be longer than {self._table.handshake_bytes_max} bytes"
            )

    def _send(self, data: bytes) -> None:
        """Queue a copy of a short piece."""
        self._spend(len(data))
        if self._out and isinstance(self._out[-1], bytearray):
            self._out[-1] += data
        else:
            self._out.append(bytearray(data))

    def _read_flags(self) -> bool:
        taken = self._take(4)
        if taken is None:
            return False
        (flags,) = struct.unpack(">I", taken)
        # "Client flags": "the server MUST drop the TCP connection if the client sets an unknown
        # flag". The mask is an int, because the complement of an IntFlag drops unknown bits.
        if flags & ~int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES):
            raise _BrokenError(f"unknown client flags {flags:#x}")
        self._client_flags = HandshakeFlag(flags)
        self.state = State.OPTION
        return True

    def _read_option(self) -> bool:
        if len(self._buffer) >= 8:
            (magic,) = struct.unpack_from(">Q", self._buffer)
            if magic != IHAVEOPT:
                raise _BrokenError(f"option magic {magic:#018x} instead of {IHAVEOPT:#018x}")
        taken = self._take(_OPTION_HEADER.size)
        if taken is None:
            return False
        _, self._option, self._left = _OPTION_HEADER.unpack(taken)
        limit = min(HANDSHAKE_BYTES_MAX, self._table.handshake_bytes_max - self._spent)
        if self._left > limit:
            raise _BrokenError(
                f"option {self._option} of {self._left} bytes: it would be longer than the {limit} "
                f"bytes that are left to it"
            )
        is_fixed = HandshakeFlag.FIXED_NEWSTYLE in self._client_flags
        if not is_fixed and self._option != Option.EXPORT_NAME:
            # "NBD_OPT_EXPORT_NAME": "the only valid option in nonfixed newstyle negotiation".
            raise _BrokenError(f"option {self._option} from a client without fixed newstyle")
        # "The presence of the option length in every option allows the server to skip any options
        # presented by the client that it does not understand."
        is_read = self._option in (Option.EXPORT_NAME, Option.INFO, Option.GO)
        self._to_skip = 0 if is_read else self._left
        self.state = State.DATA
        return True

    def _read_data(self) -> Event | bool:
        if self._to_skip:
            skipped = min(self._to_skip, len(self._buffer))
            self._take(skipped)
            self._to_skip -= skipped
            if self._to_skip:
                return False
            data = b""
        else:
            is_skipped = self._option not in (Option.EXPORT_NAME, Option.INFO, Option.GO)
            taken = b"" if is_skipped else self._take(self._left)
            if taken is None:
                return False
            data = taken
        self.state = State.OPTION
        self.answered += 1
        try:
            event = self._handle(data)
        except _RefusedError as refused:
            # "All error replies MAY have some data set": a text for people.
            self._reply(refused.reply, refused.message.encode())
            return True
        if event is None:
            return True
        self.state = State.ADOPTED if isinstance(event, Adopt) else State.CLOSED
        return event

    def _handle(self, data: bytes) -> Event | None:
        """Carry out one complete option."""
        if self._option == Option.ABORT:
            # "The server MUST reply with NBD_REP_ACK."
            self._reply(Reply.ACK)
            return Closed("the client aborted the handshake", is_clean=True)
        if self._is_shutting_down:
            if self._option == Option.EXPORT_NAME:
                raise _BrokenError("the gateway is shutting down")
            raise _RefusedError(Reply.ERR_SHUTDOWN, "the gateway is shutting down")
        if self._option == Option.EXPORT_NAME:
            return self._export_name(data)
        if self._option in (Option.INFO, Option.GO):
            return self._info(data)
        if self._option == Option.LIST:
            self._refuse_data("LIST")
            self._spend(len(self._table.listing))
            self._out.append(self._table.listing)
        elif self._option == Option.STRUCTURED_REPLY:
            self._refuse_data("STRUCTURED_REPLY")
            self._is_structured = True
            self._reply(Reply.ACK)
        elif self._option == Option.STARTTLS:
            # "NOTLS mode": "MUST respond with NBD_REP_ERR_POLICY [...] or NBD_REP_ERR_UNSUP (if it
            # does not support the NBD_OPT_STARTTLS option at all)".
            raise _RefusedError(Reply.ERR_UNSUP, "TLS is not in this version")
        else:
            # "Baseline": "Servers that receive messages which they do not implement MUST reply to
            # them with NBD_REP_ERR_UNSUP".
            raise _RefusedError(Reply.ERR_UNSUP, f"option {self._option} is not supported")
        return None

    def _refuse_data(self, name: str) -> None:
        # "NBD_REP_ERR_INVALID": "the client sent an NBD_OPT_LIST with nonzero data length".
        if self._left:
            raise _RefusedError(Reply.ERR_INVALID, f"{name} takes no data")

    def _export_name(self, data: bytes) -> Event:
        # "If the chosen export does not exist [...] the server MUST terminate the session", as for
        # everything else that is wrong here: this option has no error reply.
        try:
            export = self._find(data)
        except _RefusedError as refused:
            raise _BrokenError(refused.message) from refused
        flags = self._flags(export)
        has_zeroes = HandshakeFlag.NO_ZEROES not in self._client_flags
        self._send(struct.pack(">QH", export.size_bytes, flags) + (ZEROES if has_zeroes else b""))
        return self._adopt(export, flags, has_asked_block_size=False)

    def _info(self, data: bytes) -> Event | None:
        name, wanted = _parse_info(data)
        export = self._find(name)
        flags = self._flags(export)
        # "the server MUST send at least one NBD_REP_INFO, with an NBD_INFO_EXPORT".
        self._reply(Reply.INFO, struct.pack(">HQH", Info.EXPORT, export.size_bytes, flags))
        if Info.NAME in wanted:
            self._reply(Reply.INFO, struct.pack(">H", Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in wanted and export.description:
            text = export.description.encode()[:NAME_BYTES_MAX].decode(errors="ignore")
            self._reply(Reply.INFO, struct.pack(">H", Info.DESCRIPTION) + text.encode())
        if Info.BLOCK_SIZE in wanted:
            sizes = BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, BLOCK_BYTES_MAX
            self._reply(Reply.INFO, struct.pack(">HIII", Info.BLOCK_SIZE, *sizes))
        self._reply(Reply.ACK)
        if self._option == Option.INFO:
            return None
        # A client that did not ask is served as well: those that do not know block sizes (the
        # kernel's) send whole sectors anyway, and anything smaller gets EINVAL, not a wrong answer.
        return self._adopt(export, flags, has_asked_block_size=Info.BLOCK_SIZE in wanted)

    def _find(self, name: bytes) -> Export:
        if len(name) > NAME_BYTES_MAX:
            raise _RefusedError(Reply.ERR_TOO_BIG, f"an export name of {len(name)} bytes")
        try:
            text = name.decode()
        except UnicodeDecodeError as error:
            raise _RefusedError(Reply.ERR_INVALID, "the export name is not UTF-8") from error
        if "\0" in text:
            # "Conventions": a string "MUST NOT contain NUL characters".
            raise _RefusedError(Reply.ERR_INVALID, "the export name contains NUL")
        if not text and self._default is not None:
            # "A special, 'empty', name [...] is reserved for a 'default' export".
            text = self._default
        export = self._table.by_name.get(text)
        if export is None:
            raise _RefusedError(Reply.ERR_UNKNOWN, f"there is no export {text!r}")
        return export

    def _flags(self, export: Export) -> TransmissionFlag:
        # CAN_MULTI_CONN: a write that was acknowledged is on stable media of every replica, so a
        # FLUSH on any connection covers it.
        flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH
        flags |= TransmissionFlag.SEND_FUA | TransmissionFlag.CAN_MULTI_CONN
        if export.is_read_only:
            flags |= TransmissionFlag.READ_ONLY
        else:
            flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES
        if self._is_structured:
            # "MUST leave this flag clear if structured replies have not been negotiated".
            flags |= TransmissionFlag.SEND_DF
        return flags

    def _adopt(
        self, export: Export, flags: TransmissionFlag, *, has_asked_block_size: bool
    ) -> Adopt:
        leftover = bytes(self._buffer)
        self._buffer.clear()
        return Adopt(
            export=export,
            leftover=leftover,
            is_structured=self._is_structured,
            flags=flags,
            request_bytes_max=BLOCK_BYTES_MAX if has_asked_block_size else REQUEST_BYTES_MAX,
        )

    def _reply(self, reply: Reply, data: bytes = b"") -> None:
        self._send(encode_reply(self._option, reply, data))


def encode_reply(option: int, reply: Reply, data: bytes = b"") -> bytes:
    """Write one reply to an option; the layout is of "Option haggling"."""
    return struct.pack(">QIII", REPLY_MAGIC, option, reply, len(data)) + data


def _parse_info(data: bytes) -> tuple[bytes, frozenset[int]]:
    """Split the data of INFO and GO into name and wanted information types.

    Layout: u32 length of the name, name, u16 number of requests, u16 each.
    """
    invalid = _RefusedError(Reply.ERR_INVALID, "lengths inside the option contradict its length")
    if len(data) < 6:
        raise invalid
    (name_length,) = struct.unpack_from(">I", data)
    if name_length > len(data) - 6:
        raise invalid
    name = data[4 : 4 + name_length]
    (count,) = struct.unpack_from(">H", data, 4 + name_length)
    requests = data[6 + name_length :]
    if len(requests) != 2 * count:
        raise invalid
    # "The server MUST ignore any information requests it does not understand."
    return name, frozenset(struct.unpack(f">{count}H", requests))
