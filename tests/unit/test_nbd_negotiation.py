"""The NBD handshake, seen from a client that does right, and from many that do not.

Clauses are from the NBD protocol document, by section title.
"""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pureflash.gateway import nbd
from pureflash.gateway.nbd import (
    Adopt,
    Closed,
    Export,
    Info,
    Negotiation,
    Option,
    Reply,
    State,
    Table,
)
from pureflash.gateway.nbd import TransmissionFlag as Flag

GREETING = b"NBDMAGICIHAVEOPT" + b"\0\3"
FIXED = struct.pack(">I", 3)
DISK = Export("disk", 5 << 30, description="the first one")
FROZEN = Export("frozen", 1 << 30, is_read_only=True)
EXPORTS = Table([DISK, FROZEN])
GIB = 1 << 30
REQUEST = struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 0, 512)
WRITABLE = (
    Flag.HAS_FLAGS
    | Flag.SEND_FLUSH
    | Flag.SEND_FUA
    | Flag.SEND_TRIM
    | Flag.SEND_WRITE_ZEROES
    | Flag.CAN_MULTI_CONN
)


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data


def info(name: bytes, *wanted: int) -> bytes:
    return struct.pack(f">I{len(name)}sH{len(wanted)}H", len(name), name, len(wanted), *wanted)


def sent(machine: Negotiation) -> bytes:
    """Take everything that the machine wants to send."""
    return b"".join(iter(machine.data_to_send, b""))


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """Cut option replies: (option, reply type, data)."""
    out = []
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9
        assert len(data) >= 20 + length
        out.append((number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return out


def started(flags: bytes = FIXED, *, default: str | None = None) -> Negotiation:
    machine = Negotiation(EXPORTS, default=default)
    assert sent(machine) == GREETING
    assert machine.receive_data(flags) == []
    return machine


def ask(machine: Negotiation, number: int, data: bytes = b"") -> list[tuple[int, int]]:
    """Send an option that does not end the handshake; give back (option, reply type)s."""
    assert machine.receive_data(option(number, data)) == []
    return [(number, kind) for number, kind, _ in replies(sent(machine))]


def closed(machine: Negotiation, data: bytes) -> str:
    (event,) = machine.receive_data(data)
    assert isinstance(event, Closed)
    assert not event.is_clean
    assert machine.state is State.CLOSED
    return event.reason


def test_export_name_ends_the_handshake_without_a_reply_header() -> None:
    machine = started()
    (event,) = machine.receive_data(option(Option.EXPORT_NAME, b"disk") + REQUEST)
    # "Newstyle negotiation": size and flags; no zeroes, because C_NO_ZEROES was set.
    assert sent(machine) == struct.pack(">QH", 5 << 30, WRITABLE)
    assert event == Adopt(
        export=DISK,
        leftover=REQUEST,
        is_structured=False,
        flags=WRITABLE,
        request_bytes_max=32 << 20,
    )


@pytest.mark.parametrize(("flags", "zeroes"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_the_124_zeroes_are_sent_unless_the_client_declined(flags: int, zeroes: int) -> None:
    machine = started(struct.pack(">I", flags))
    machine.receive_data(option(Option.EXPORT_NAME, b"frozen"))
    expected = Flag.HAS_FLAGS | Flag.READ_ONLY | Flag.SEND_FLUSH | Flag.SEND_FUA
    expected |= Flag.CAN_MULTI_CONN
    assert sent(machine) == struct.pack(">QH", 1 << 30, expected) + bytes(zeroes)


def test_go_tells_everything_that_was_asked_for_and_adopts() -> None:
    machine = started()
    assert ask(machine, Option.STRUCTURED_REPLY) == [(8, Reply.ACK)]
    wanted = (Info.BLOCK_SIZE, Info.NAME, Info.DESCRIPTION, 999)
    (event,) = machine.receive_data(option(Option.GO, info(b"disk", *wanted)) + REQUEST)
    assert replies(sent(machine)) == [
        (7, Reply.INFO, struct.pack(">HQH", 0, 5 << 30, WRITABLE | Flag.SEND_DF)),
        (7, Reply.INFO, struct.pack(">H", 1) + b"disk"),
        (7, Reply.INFO, struct.pack(">H", 2) + b"the first one"),
        (7, Reply.INFO, struct.pack(">HIII", 3, 512, 4096, 1 << 20)),
        (7, Reply.ACK, b""),
    ]
    assert isinstance(event, Adopt)
    assert event.is_structured
    assert event.leftover == REQUEST
    # It asked, so it knows the limit.
    assert event.request_bytes_max == 1 << 20


def test_info_answers_as_go_does_and_the_handshake_goes_on() -> None:
    data = info(b"disk", Info.BLOCK_SIZE)
    machine = started()
    assert machine.receive_data(option(Option.INFO, data)) == []
    asked = [(kind, text) for _, kind, text in replies(sent(machine))]
    assert machine.state is State.OPTION
    assert isinstance(machine.receive_data(option(Option.GO, data))[0], Adopt)
    assert [(kind, text) for _, kind, text in replies(sent(machine))] == asked


def test_go_without_block_sizes_is_served_with_the_default_limit() -> None:
    machine = started()
    (event,) = machine.receive_data(option(Option.GO, info(b"disk")))
    assert isinstance(event, Adopt)
    assert event.request_bytes_max == 32 << 20
    assert event.leftover == b""
    assert not event.flags & Flag.SEND_DF


def test_list_names_every_export() -> None:
    machine = started()
    assert machine.receive_data(option(Option.LIST)) == []
    assert replies(sent(machine)) == [
        (3, Reply.SERVER, b"\0\0\0\4disk"),
        (3, Reply.SERVER, b"\0\0\0\6frozen"),
        (3, Reply.ACK, b""),
    ]


def test_abort_is_acknowledged_and_clean() -> None:
    machine = started()
    (event,) = machine.receive_data(option(Option.ABORT))
    assert replies(sent(machine)) == [(2, Reply.ACK, b"")]
    assert event == Closed("the client aborted the handshake", is_clean=True)


@pytest.mark.parametrize(
    ("number", "data", "reply"),
    [
        (Option.STARTTLS, b"", Reply.ERR_UNSUP),
        (9, info(b"disk"), Reply.ERR_UNSUP),
        (10, b"x" * 1000, Reply.ERR_UNSUP),
        (0xFFFFFFFF, b"", Reply.ERR_UNSUP),
        (Option.LIST, b"x", Reply.ERR_INVALID),
        (Option.STRUCTURED_REPLY, b"x", Reply.ERR_INVALID),
        (Option.GO, b"", Reply.ERR_INVALID),
        (Option.GO, b"\0\0\0\4disk", Reply.ERR_INVALID),
        (Option.GO, b"\xff\xff\xff\xffdisk\0\0", Reply.ERR_INVALID),
        (Option.GO, info(b"disk") + b"x", Reply.ERR_INVALID),
        (Option.GO, info(b"disk", 3)[:-1], Reply.ERR_INVALID),
        (Option.GO, info(b"di\xffsk"), Reply.ERR_INVALID),
        (Option.GO, info(b"di\0sk"), Reply.ERR_INVALID),
        (Option.GO, info(b"x" * 4097), Reply.ERR_TOO_BIG),
        (Option.GO, info(b"x" * 4096), Reply.ERR_UNKNOWN),
        (Option.GO, info(b"nothing"), Reply.ERR_UNKNOWN),
        (Option.INFO, info(b""), Reply.ERR_UNKNOWN),
    ],
)
def test_a_refused_option_gets_its_error_and_the_next_one_is_understood(
    number: int, data: bytes, reply: Reply
) -> None:
    machine = started()
    assert ask(machine, number, data) == [(number, reply)]
    # "Baseline": "MUST NOT fail to parse the next message received".
    assert isinstance(machine.receive_data(option(Option.GO, info(b"disk")))[0], Adopt)


def test_the_empty_name_is_the_default_export() -> None:
    for request in (option(Option.EXPORT_NAME), option(Option.GO, info(b""))):
        (event,) = started(default="frozen").receive_data(request)
        assert isinstance(event, Adopt)
        assert event.export is FROZEN


@pytest.mark.parametrize("name", [b"nothing", b"", b"\xff", b"di\0sk", b"x" * 4097])
def test_export_name_cannot_fail_politely_so_the_connection_ends(name: bytes) -> None:
    machine = started()
    assert closed(machine, option(Option.EXPORT_NAME, name))
    assert sent(machine) == b""


@pytest.mark.parametrize("flags", [4, 1 << 31, 7])
def test_unknown_client_flags_end_the_connection(flags: int) -> None:
    assert "client flags" in closed(Negotiation(EXPORTS), struct.pack(">I", flags))


def test_a_client_without_fixed_newstyle_may_only_name_its_export() -> None:
    reason = closed(started(struct.pack(">I", 2)), option(Option.LIST))
    assert "without fixed newstyle" in reason


def test_a_wrong_magic_ends_the_connection_as_soon_as_it_is_seen() -> None:
    assert "magic" in closed(started(), b"GET / HT")


def test_a_long_option_ends_the_connection_before_its_data_arrive() -> None:
    machine = started()
    header = struct.pack(">8sII", b"IHAVEOPT", Option.GO, 64 * 1024 + 1)
    assert "65537" in closed(machine, header)
    header = struct.pack(">8sII", b"IHAVEOPT", 77, 0xFFFFFFFF)
    assert "longer than" in closed(started(), header)


def test_options_are_bounded_by_their_bytes_and_those_of_their_answers() -> None:
    machine = started()
    for _ in range(17):
        assert ask(machine, 77, b"x" * 4000) == [(77, Reply.ERR_UNSUP)]
    assert "longer than" in closed(machine, option(77, b"x" * 4000))
    # Options that are short, and whose answers are longer than themselves, come to an end as well.
    machine = started()
    answer, asked = b"", 0
    while not (events := machine.receive_data(option(Option.LIST))):
        answer = sent(machine)
        asked += 1
    assert events == [
        Closed(f"the handshake would be longer than {EXPORTS.handshake_bytes_max} bytes", False)
    ]
    assert asked == EXPORTS.handshake_bytes_max // (len(option(Option.LIST)) + len(answer))


MANY = 10_000
CROWD = Table(Export(f"{number:096}", GIB) for number in range(MANY))
"""Ten thousand exports with the longest names that a volume may have."""


@pytest.mark.slow
def test_every_one_of_very_many_exports_is_listed_and_asked_about() -> None:
    machine = Negotiation(CROWD)
    machine.receive_data(FIXED)
    assert sent(machine) == GREETING
    assert ask(machine, Option.STRUCTURED_REPLY) == [(8, Reply.ACK)]
    assert machine.receive_data(option(Option.LIST)) == []
    listed = [data[4:] for _, kind, data in replies(sent(machine)) if kind == Reply.SERVER]
    assert listed == [f"{number:096}".encode() for number in range(MANY)]
    wanted = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
    for name in listed:
        # As nbdinfo and qemu-nbd: the contexts of each export (9 lists, 10 sets), and all of it.
        assert ask(machine, 9, info(name)) == [(9, Reply.ERR_UNSUP)]
        assert ask(machine, 10, info(name)) == [(10, Reply.ERR_UNSUP)]
        assert ask(machine, Option.INFO, info(name, *wanted))[-1] == (6, Reply.ACK)
    assert machine.answered == 2 + 3 * MANY
    assert isinstance(machine.receive_data(option(Option.GO, info(listed[-1])))[0], Adopt)


def test_a_client_that_lists_very_many_exports_for_ever_is_ended() -> None:
    machine = Negotiation(CROWD)
    machine.receive_data(FIXED)
    pieces: list[bytes] = []
    while not (events := machine.receive_data(option(Option.LIST) * 8)):
        pieces += iter(machine.data_to_send, b"")
    (event,) = events
    assert isinstance(event, Closed)
    assert "longer than" in event.reason
    pieces += iter(machine.data_to_send, b"")
    assert sum(map(len, pieces)) <= CROWD.handshake_bytes_max
    assert CROWD.handshake_bytes_max <= 64 * 1024 + MANY * 2048


def test_the_answer_to_list_is_one_object_for_all_handshakes() -> None:
    pieces = []
    for _ in range(3):
        machine = Negotiation(CROWD)
        machine.receive_data(FIXED + option(Option.LIST) + option(77))
        pieces += [piece for piece in iter(machine.data_to_send, b"") if len(piece) > 4096]
    assert len(pieces) == 3
    assert all(piece is CROWD.listing for piece in pieces)


def test_a_slow_half_option_keeps_the_machine_waiting_and_small() -> None:
    machine = started()
    # An unknown option's data are skipped as they come, not collected.
    assert machine.receive_data(struct.pack(">8sII", b"IHAVEOPT", 77, 60_000)) == []
    for _ in range(59):
        assert machine.receive_data(b"x" * 1000) == []
        assert sent(machine) == b""
        assert len(machine._buffer) == 0
    assert machine.receive_data(b"x" * 1000) == []
    assert [kind for _, kind, _ in replies(sent(machine))] == [Reply.ERR_UNSUP]


def test_the_end_of_the_stream_is_said() -> None:
    for machine in (Negotiation(EXPORTS), started()):
        assert machine.receive_eof() == [
            Closed("the client closed the connection during the handshake", is_clean=False)
        ]
        assert machine.state is State.CLOSED


def test_a_gateway_that_stops_refuses_everything_but_abort() -> None:
    machine = started()
    machine.shut_down()
    # "Termination of the session": "SHOULD error further options received (other than an
    # NBD_OPT_ABORT) with NBD_REP_ERR_SHUTDOWN".
    assert ask(machine, Option.GO, info(b"disk")) == [(7, Reply.ERR_SHUTDOWN)]
    assert ask(machine, Option.LIST) == [(3, Reply.ERR_SHUTDOWN)]
    (event,) = machine.receive_data(option(Option.ABORT))
    assert event == Closed("the client aborted the handshake", is_clean=True)
    machine = started()
    machine.shut_down()
    assert "shutting down" in closed(machine, option(Option.EXPORT_NAME, b"disk"))


def test_calling_it_after_the_end_is_our_bug() -> None:
    machine = started()
    machine.receive_data(option(Option.ABORT))
    with pytest.raises(AssertionError, match="has ended"):
        machine.receive_data(b"")


CONVERSATION = (
    FIXED
    + option(Option.STRUCTURED_REPLY)
    + option(Option.LIST)
    + option(77, b"nobody knows this")
    + option(Option.GO, info(b"nothing", 3))
    + option(Option.INFO, info(b"disk", 1))
    + option(Option.GO, info(b"disk", 3, 1))
)


def run(pieces: list[bytes]) -> tuple[list[nbd.Event], bytes, bytes]:
    """Feed pieces; give back events, output, and what came after the final event."""
    machine = Negotiation(EXPORTS)
    events: list[nbd.Event] = []
    rest = b""
    for piece in pieces:
        if events:
            rest += piece
        else:
            events += machine.receive_data(piece)
    return events, sent(machine), rest


def test_byte_by_byte_gives_the_same_as_all_at_once() -> None:
    stream = CONVERSATION + REQUEST
    at_once, sent, _ = run([stream])
    slowly, sent_slowly, rest = run([stream[i : i + 1] for i in range(len(stream))])
    assert sent == sent_slowly
    assert isinstance(at_once[0], Adopt)
    assert isinstance(slowly[0], Adopt)
    assert at_once[0].leftover == REQUEST == slowly[0].leftover + rest


@given(st.lists(st.integers(0, len(CONVERSATION) + len(REQUEST)), max_size=12))
def test_any_cut_of_the_stream_gives_the_same(cuts: list[int]) -> None:
    stream = CONVERSATION + REQUEST
    edges = [0, *sorted(cuts), len(stream)]
    pieces = [stream[a:b] for a, b in itertools.pairwise(edges)]
    events, sent, rest = run(pieces)
    expected, expected_sent, _ = run([stream])
    assert sent == expected_sent
    assert isinstance(events[0], Adopt)
    assert isinstance(expected[0], Adopt)
    assert events[0].leftover + rest == expected[0].leftover


options = st.one_of(
    st.binary(max_size=40),
    st.builds(option, st.integers(0, 12), st.binary(max_size=60)),
    st.builds(
        lambda name, wanted: option(Option.GO, info(name, *wanted)),
        st.sampled_from([b"disk", b"", b"x"]),
        st.lists(st.integers(0, 65535), max_size=5),
    ),
)


@given(st.sampled_from([FIXED, b"\0\0\0\0", b""]), st.lists(options, max_size=8))
def test_garbage_ends_in_one_final_event_or_waits_for_more(
    flags: bytes, parts: list[bytes]
) -> None:
    machine = Negotiation(EXPORTS)
    for part in [flags, *parts]:
        events = machine.receive_data(part)
        assert len(events) <= 1
        assert len(machine._buffer) <= nbd.HANDSHAKE_BYTES_MAX
        if events:
            expected = State.ADOPTED if isinstance(events[0], Adopt) else State.CLOSED
            assert machine.state is expected
            return
    assert machine.state in (State.FLAGS, State.OPTION, State.DATA)
