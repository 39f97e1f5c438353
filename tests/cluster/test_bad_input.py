"""Ring 2: wrong bytes on every listening port of a running cluster harm nobody but their sender.

One cluster for all tables. After each case the honest client beside it does I/O as before; at the
end every process is the one that was started, no log has a warning, and neither memory nor open
descriptors have grown.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.nbd import REQUEST_MAGIC, Command, NbdClient, open_socket
from tests.support.pfw import (
    CLIENT,
    HEARTBEAT,
    PEER,
    Cluster,
    Connection,
    Session,
    hello,
    patched,
    status,
    ticket_fields,
)
from tests.support.target import MIB, RSS_BYTES_MAX, VOLUME_BYTES, Target, rss_bytes, running_target
from tests.support.wrong_nbd import (
    EINVAL,
    ENOSPC,
    EPERM,
    FIXED,
    HANDSHAKES,
    OPTIONS,
    REQUESTS,
    option,
)

from pureflash.errors import Code
from pureflash.testing.model import wire
from pureflash.testing.model.wire import Message, Opcode

SLOW_CLIENTS = 150
SLOW_S = 20.0
DEAF_REQUESTS = 96
"""Of 1 MiB each: more than any queue of replies holds, and as requests fit into a socket."""
DEAF_BYTES_MAX = 64 * MIB
"""Of answers that one client does not take: what may be in flight, and one request more."""
DESCRIPTORS_MAX = 100
"""Of a process without clients but the honest one; each slow client would be one more."""


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    """Give the one cluster of this module; it is judged at the end."""
    with running_target() as made:
        yield made


# ------------------------------------------------------------------------- stores: before HELLO --

GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b" " * 64,
    "tls": bytes.fromhex("16030100c8010000c40303") + b"r" * 200,
    "zeros": bytes(64),
    "ones": b"\xff" * 200,
    "a right request": wire.encode(Message(Opcode.FLUSH, command_id=1)),
    "a long body": patched(wire.encode(hello(CLIENT, bytes(16))), 56, b"\xff\xff\xff\xff"),
    "a long write": patched(
        wire.encode(Message(Opcode.WRITE, command_id=1, length=MIB, data=b"")),
        56,
        (MIB + 1024).to_bytes(4, "little"),
    ),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_store_hangs_up_on_what_is_not_a_hello(target: Target, what: str) -> None:
    before = rss_bytes(target.pids["s1"])
    with Connection(target.primary) as stranger:
        stranger.send_raw(GARBAGE[what])
        assert stranger.is_closed()
    assert rss_bytes(target.pids["s1"]) - before < MIB, "nothing was allocated"
    target.is_unharmed()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version_min": 2, "version_max": 9}, Code.UNSUPPORTED),
        ({"version_min": 9, "version_max": 2}, Code.INVALID),
        ({"cluster_id": bytes(16)}, Code.WRONG_CLUSTER),
        ({"ticket_mac": bytes(32)}, Code.UNAUTHENTICATED),
        ({"expires": 1}, Code.UNAUTHENTICATED),
        ({"volume": 3}, Code.UNAUTHENTICATED),
        ({"volume": (1 << 64) - 1}, Code.INVALID),
        ({"rights": 7}, Code.INVALID),
        ({"kind": 0}, Code.INVALID),
        ({"kind": 9}, Code.INVALID),
        ({"kind": PEER}, Code.INVALID),
        ({"store": 1}, Code.INVALID),
        ({"payload_bytes_max": 0}, Code.INVALID),
        ({"requests_max": 0}, Code.INVALID),
        ({"inflight_bytes_max": 1}, Code.INVALID),
    ],
)
def test_a_hello_that_is_wrong_is_told_why_and_ended(
    target: Target, changes: dict[str, Any], expected: Code
) -> None:
    with target.session(**changes) as client:
        assert status(client.hello) is expected
        assert client.is_closed()
    target.is_unharmed()


def test_a_hello_with_a_damaged_body_is_told_so_and_ended(target: Target) -> None:
    fields = ticket_fields(bytes.fromhex(target.spec.ticket))
    frame = bytearray(wire.encode(hello(CLIENT, target.known.cluster_id, **fields)))
    frame[-1] ^= 1
    with Connection(target.primary) as stranger:
        stranger.send_raw(bytes(frame))
        assert status(stranger.receive()) is Code.BAD_CHECKSUM
        assert stranger.is_closed()
    target.is_unharmed()


def test_hellos_that_come_together_are_judged_one_by_one(target: Target) -> None:
    fields = ticket_fields(bytes.fromhex(target.spec.ticket))
    good = wire.encode(hello(CLIENT, target.known.cluster_id, **fields))
    bad = wire.encode(hello(CLIENT, bytes(16), **fields))
    for first, second, expected in ((good, good, Code.OK), (bad, good, Code.WRONG_CLUSTER)):
        with Connection(target.primary) as stranger:
            stranger.send_raw(first + second)
            assert status(stranger.receive()) is expected
            assert stranger.is_closed(), "a connection says HELLO once"
        target.is_unharmed()


# -------------------------------------------------------------------------- stores: as a client --

Broken = Callable[[Session], bytes]


def flush(client: Session) -> bytes:
    return wire.encode(client.request(Opcode.FLUSH, 0, 0))


def write(client: Session, **fields: Any) -> bytes:
    return wire.encode(client.request(Opcode.WRITE, 0, 4096, data=b"w" * 4096, **fields))


def read(client: Session, **fields: Any) -> bytes:
    return wire.encode(client.request(Opcode.READ, **({"offset": 0, "length": 4096} | fields)))


ENDED: dict[str, Broken] = {
    "magic": lambda client: patched(flush(client), 0, b"PFW2"),
    "version 0": lambda client: patched(flush(client), 4, b"\x00"),
    "version 2": lambda client: patched(flush(client), 4, b"\x02"),
    "header CRC": lambda client: patched(flush(client), 60, bytes(4), is_signed=False),
    "opcode 0x7f": lambda client: patched(flush(client), 5, b"\x7f"),
    "opcode 0": lambda client: patched(flush(client), 5, b"\x00"),
    "flags": lambda client: patched(flush(client), 6, b"\x00\x80"),
    "FUA of a flush": lambda client: patched(flush(client), 6, b"\x02\x00"),
    "a reply": lambda client: patched(flush(client), 6, b"\x01\x00"),
    "body of a flush": lambda client: patched(flush(client), 56, b"\x10"),
    "body of 4 GiB": lambda client: patched(write(client), 56, b"\xff\xff\xff\xff"),
    "body too short": lambda client: patched(write(client), 56, b"\x01\x00\x00\x00"),
    "length of 2 MiB": lambda client: patched(read(client), 28, (2 * MIB).to_bytes(4, "little")),
    "length of 4 GiB": lambda client: patched(write(client), 28, b"\xff\xff\xff\xff"),
    "discard of 65 MiB": lambda client: wire.encode(client.request(Opcode.DISCARD, 0, 65 * MIB)),
    "a second HELLO": lambda _: wire.encode(hello(CLIENT, bytes(16))),
}


@pytest.mark.parametrize("what", ENDED)
def test_a_frame_that_cannot_be_followed_ends_its_connection(target: Target, what: str) -> None:
    before = rss_bytes(target.pids["s1"])
    with target.session() as client, target.session() as other:
        client.send_raw(ENDED[what](client))
        assert client.is_closed()
        assert status(other.write(0, b"o" * 4096)) is Code.OK, "another session goes on"
    assert rss_bytes(target.pids["s1"]) - before < 2 * MIB, "nothing was allocated"
    target.is_unharmed()


def damaged(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


ANSWERED: dict[str, tuple[Broken, Code]] = {
    "data CRC": (lambda client: damaged(write(client)), Code.BAD_CHECKSUM),
    "extension CRC": (lambda client: damaged(read(client)), Code.BAD_CHECKSUM),
    "offset": (lambda client: read(client, place=511), Code.MISALIGNED),
    "length": (lambda client: read(client, length=513), Code.MISALIGNED),
    "no length": (lambda client: read(client, length=0), Code.OUT_OF_RANGE),
    "beyond the shard": (lambda client: read(client, place=VOLUME_BYTES), Code.OUT_OF_RANGE),
    "across its end": (lambda client: write(client, place=VOLUME_BYTES - 512), Code.OUT_OF_RANGE),
    "wrapping": (lambda client: read(client, place=(1 << 64) - 512), Code.OUT_OF_RANGE),
    "a later epoch": (lambda client: write(client, epoch=1 << 40), Code.STALE_EPOCH),
    "epoch 0": (lambda client: write(client, epoch=0), Code.STALE_EPOCH),
    "attach epoch 0": (lambda client: write(client, position=0), Code.FENCED),
    "an unsigned attach epoch": (lambda client: write(client, position=1 << 40), Code.DENIED),
    "another shard": (lambda client: write(client, shard_index=77), Code.NOT_PRIMARY),
    "another volume": (lambda client: write(client, volume_id=77), Code.DENIED),
    "no volume id": (lambda client: write(client, volume_id=1 << 60), Code.INVALID),
    "a snapshot": (lambda client: read(client, extension={"snap_seq": 3}), Code.UNSUPPORTED),
    "options": (
        lambda client: wire.encode(
            client.request(Opcode.WRITE_ZEROES, 0, 4096, extension={"options": 64})
        ),
        Code.INVALID,
    ),
    "compare and write": (
        lambda client: wire.encode(
            client.request(
                Opcode.COMPARE_AND_WRITE, 0, 512, extension={"acked_upto": 0}, data=bytes(1024)
            )
        ),
        Code.UNSUPPORTED,
    ),
    "a peer's request": (
        lambda client: wire.encode(
            client.request(Opcode.TAILS, 0, 0, extension=peer_fields(Opcode.TAILS))
        ),
        Code.UNSUPPORTED,
    ),
}


def peer_fields(opcode: Opcode, **fields: int) -> dict[str, int]:
    """Fill the extension of a request between replicas with ones."""
    return dict.fromkeys((name for name, _ in wire.EXTENSIONS[opcode, False]), 1) | fields


@pytest.mark.parametrize("what", ANSWERED)
def test_a_request_that_is_wrong_is_told_why_and_its_connection_goes_on(
    target: Target, what: str
) -> None:
    make, expected = ANSWERED[what]
    with target.session() as client:
        assert status(client.hello) is Code.OK
        before = client.read(0, 4096).data
        client.send_raw(make(client))
        assert client.receive_status() is expected
        assert client.read(0, 4096).data == before, "a refused request has no effect"
    target.is_unharmed()


# --------------------------------------------------------------- stores: as a peer and heartbeat --


@pytest.mark.parametrize("kind", [PEER, HEARTBEAT])
def test_a_store_that_cannot_prove_it_is_not_let_in(target: Target, kind: int) -> None:
    forger = Cluster(cluster_id=target.known.cluster_id, key=b"k" * 32)
    with Connection(target.primary) as stranger:
        refused = stranger.prove(kind, forger, store=99, incarnation=1)
        assert status(refused) is Code.UNAUTHENTICATED
        assert stranger.is_closed()
    with Connection(target.primary) as stranger:
        same = hello(kind, target.known.cluster_id, store=99, nonce=b"n" * 32)
        assert status(stranger.call(same)) is Code.OK
        assert status(stranger.call(same)) is Code.UNAUTHENTICATED, "a proof of zeros is none"
        assert stranger.is_closed()
    with target.cluster.api() as api:
        (own,) = (store.id for store in api.stores() if store.address == target.primary)
    with Connection(target.primary) as stranger:
        mirror = stranger.prove(kind, target.known, store=own, incarnation=1)
        assert status(mirror) is Code.INVALID, "nobody else is this store"
        assert stranger.is_closed()
    target.is_unharmed()


NOT_BUILT = (Opcode.SNAP, Opcode.ATTACH)
RANGED = (Opcode.PREPARE, Opcode.SETTLE, Opcode.COPY)
REPLICA_FIELDS: dict[Opcode, dict[str, int]] = {
    Opcode.PREPARE: {"op": 0x13, "options": 0, "session": 0, "session_command": 0, "acked_upto": 0},
    Opcode.SETTLE: {"state": 2},
    Opcode.TAILS: {},
    Opcode.COPY: {"state": 2},
    Opcode.DIGEST: {},
    Opcode.SNAP: {},
    Opcode.ATTACH: {"client": 0, "session": 0, "until": 0},
}


@pytest.mark.parametrize("opcode", REPLICA_FIELDS, ids=lambda opcode: opcode.name)
def test_a_store_that_is_no_member_changes_nothing(target: Target, opcode: Opcode) -> None:
    """Each request of an epoch that is over, that is now, and that nobody has heard of.

    The last one waits for a configuration that never comes: the answer to what follows it shows
    that it was taken.
    """
    volume, epoch = target.spec.volume_id, target.spec.shards[0].epoch
    asked: dict[str, Any] = {
        "opcode": opcode,
        "extension": peer_fields(opcode, **REPLICA_FIELDS[opcode]),
    }
    length = 4096 if opcode in RANGED else 0
    need: dict[str, Any] = {"opcode": Opcode.NEED_CONF, "extension": peer_fields(Opcode.NEED_CONF)}
    with target.session() as client:
        before = client.read(0, 64 * 1024).data
    with Connection(target.primary) as peer:
        assert status(peer.prove(PEER, target.known, store=99, incarnation=1)) is Code.OK
        for number, (volume_id, said, expected) in enumerate(
            (
                (volume, 0, Code.STALE_EPOCH),
                (volume, epoch, Code.UNSUPPORTED if opcode in NOT_BUILT else Code.FENCED),
                (volume + 1000, epoch, Code.NOT_FOUND),
            )
        ):
            request = Message(
                **asked, command_id=number, volume_id=volume_id, length=length, epoch=said
            )
            assert status(peer.call(request)) is expected
        peer.send(Message(**asked, command_id=8, volume_id=volume, length=length, epoch=epoch + 9))
        told = peer.call(Message(**need, command_id=9, volume_id=volume, epoch=epoch))
        assert (told.command_id, status(told)) == (9, Code.NOT_FOUND), "there is no newer one"
    with target.session() as client:
        assert client.read(0, 64 * 1024).data == before
    target.is_unharmed()


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        (Opcode.READ, Code.NOT_PRIMARY),
        (Opcode.WRITE, Code.UNSUPPORTED),
        (Opcode.FLUSH, Code.UNSUPPORTED),
        (Opcode.DISCARD, Code.UNSUPPORTED),
        (Opcode.PING, Code.UNSUPPORTED),
    ],
)
def test_a_client_request_on_a_peer_connection_is_refused(
    target: Target, opcode: Opcode, expected: Code
) -> None:
    with target.session() as client, Connection(target.primary) as peer:
        assert status(peer.prove(PEER, target.known, store=99, incarnation=1)) is Code.OK
        length = 4096 if opcode in (Opcode.READ, Opcode.WRITE, Opcode.DISCARD) else 0
        fields: dict[str, Any] = {"data": bytes(4096)} if opcode is Opcode.WRITE else {}
        if opcode is Opcode.PING:
            fields = {"extension": peer_fields(Opcode.PING)}
        assert status(peer.call(client.request(opcode, 0, length, **fields))) is expected
    target.is_unharmed()


@pytest.mark.parametrize("store", [98, 99])
def test_a_heartbeat_connection_takes_heartbeats_of_its_store_only(
    target: Target, store: int
) -> None:
    ping = Message(Opcode.PING, command_id=1, extension=peer_fields(Opcode.PING, store=98))
    request = Message(Opcode.READ, command_id=1, length=4096, extension={"snap_seq": (1 << 64) - 1})
    with Connection(target.primary) as peer:
        assert status(peer.prove(HEARTBEAT, target.known, store=99, incarnation=1)) is Code.OK
        peer.send(ping if store == 98 else request)
        assert status(peer.receive()) is Code.INVALID
        assert peer.is_closed()
    target.is_unharmed()


# -------------------------------------------------------------------------------- gateway: NBD --


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("what", HANDSHAKES)
def test_a_handshake_that_cannot_go_on_is_ended(target: Target, what: str, transport: str) -> None:
    client, _ = open_socket(target.uris[transport])
    with client:
        client.sendall(HANDSHAKES[what])
        with contextlib.suppress(ConnectionResetError):
            while client.recv(65536):
                pass  # the greeting, and answers to options before the last
    target.is_unharmed()


@pytest.mark.parametrize("what", OPTIONS)
def test_an_option_that_is_wrong_is_told_why_and_the_handshake_goes_on(
    target: Target, what: str
) -> None:
    sent, expected, said = OPTIONS[what]
    client, _ = open_socket(target.uris["tcp"])
    with client, client.makefile("rb") as stream:
        stream.read(18)
        client.sendall(FIXED + sent)
        *_, reply, length = struct.unpack(">QIII", stream.read(20))
        assert reply == expected
        assert said in stream.read(length)
        client.sendall(option(2, b""))
        assert struct.unpack(">QIII", stream.read(20))[1:3] == (2, 1), "ABORT is acknowledged"
    target.is_unharmed()


@pytest.mark.parametrize("is_structured", [True, False], ids=["structured", "simple"])
@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_that_is_wrong_gets_an_errno_and_its_connection_goes_on(
    target: Target, what: str, is_structured: bool
) -> None:
    command, flags, offset, length, expected = REQUESTS[what]
    with NbdClient(target.uris["unix"], is_structured=is_structured) as client:
        answer = client.call(command, offset, length, flags=flags)
        assert answer.error == expected
        assert bool(answer.text) == is_structured, "structured replies say why"
        assert client.call(Command.READ, 0, 4096).error == 0
    target.is_unharmed()


def test_writes_that_are_wrong_have_no_effect(target: Target) -> None:
    with NbdClient(target.uris["unix"]) as client:
        last = VOLUME_BYTES - 512
        assert client.call(Command.WRITE, last, data=b"x" * 1024).error == ENOSPC
        assert client.call(Command.WRITE, 511, data=b"x" * 512).error == EINVAL
        assert client.call(Command.READ, last, 512).data == bytes(512)
        assert client.call(Command.READ, 0, 4096).data == bytes(4096)
    with NbdClient(target.uris["ro"]) as client:
        for command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES):
            data = b"x" * 512 if command is Command.WRITE else b""
            assert client.call(command, 0, 512, data=data).error == EPERM
        assert client.call(Command.READ, 0, 512).data == bytes(512)
    target.is_unharmed()


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack(">IHHQQI", 0x12345678, 0, 0, 1, 0, 512),
        struct.pack(">IHHQQI", REQUEST_MAGIC, 0, Command.WRITE, 1, 0, 0xFFFFFE00),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["magic", "a write of 4 GiB", "http"],
)
def test_a_request_that_cannot_be_followed_ends_its_connection(
    target: Target, frame: bytes
) -> None:
    before = rss_bytes(target.pids["g1"])
    with NbdClient(target.uris["unix"]) as client:
        client.send_raw(frame)
        with pytest.raises((EOFError, ConnectionError)):
            client.exactly(1)
    assert rss_bytes(target.pids["g1"]) - before < 2 * MIB, "nothing was allocated"
    target.is_unharmed()


# --------------------------------------------------------------------------- conductor: HTTP --

TOKEN = "Authorization"
WRONG_CALLS: dict[str, tuple[dict[str, str], int, str]] = {
    "no token": ({TOKEN: ""}, 401, "admin.token"),
    "a wrong token": ({TOKEN: "Bearer wrong"}, 401, "admin.token"),
    "a token of another kind": ({TOKEN: "Basic dXNlcjpwYXNz"}, 401, "admin.token"),
    "a long token": ({TOKEN: "Bearer " + "x" * 8000}, 401, "admin.token"),
    "a foreign Host": ({"Host": "evil.example"}, 400, "127.0.0.1"),
    "a Host that only begins right": ({"Host": "127.0.0.1.evil.example"}, 400, "127.0.0.1"),
    "an empty Host": ({"Host": ""}, 400, "127.0.0.1"),
}


def call(
    target: Target, headers: dict[str, str], *, method: str = "GET", body: str | None = None
) -> tuple[int, str]:
    """Ask the conductor for its volumes; gives status and body."""
    with target.cluster.api() as api:
        host, _, port = api.address.partition(":")
    token = target.cluster.layout.token.read_text().strip()
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    with contextlib.closing(connection):
        usual = {TOKEN: f"Bearer {token}", "Content-Type": "application/json"}
        # A body that is too long is answered, and hung up on, before it was sent to its end.
        with contextlib.suppress(BrokenPipeError):
            connection.request(method, "/v1/volumes", body=body, headers=usual | headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@pytest.mark.parametrize("what", WRONG_CALLS)
def test_who_may_not_call_is_told_what_to_do(target: Target, what: str) -> None:
    headers, expected, step = WRONG_CALLS[what]
    code, text = call(target, headers)
    assert (code, step in text) == (expected, True), text
    assert "next_step" in text
    assert call(target, {})[0] == 200


@pytest.mark.parametrize(
    ("body", "expected", "said"),
    [
        ('{"name":"unix","size_bytes":4096}', 409, "a volume named unix exists"),
        ('{"name":"big","size_bytes":1099511627776}', 507, "overcommit_ratio"),
        ('{"name":"x","size_bytes":4096,"shard_size_bytes":3221225472}', 400, "3 GiB (3221225472"),
        ('{"name":"x","size_bytes":4096,"replicas":4}', 400, "1 to 3"),
        ('{"colour":' + "[" * 100_000, 400, "nested"),
        ('{"name":"' + "x" * MIB, 413, "LIMIT"),
    ],
)
def test_a_volume_that_cannot_be_is_refused(
    target: Target, body: str, expected: int, said: str
) -> None:
    code, text = call(target, {}, method="POST", body=body)
    assert (code, said in text) == (expected, True), text
    target.is_unharmed()


# ----------------------------------------------------------------------- all ports: slow clients --


def test_clients_that_never_finish_keep_nobody_out(target: Target) -> None:
    """Many half-open connections on every port at once; honest clients come and go meanwhile.

    A connection without a handshake is ended by stores and gateway after 5 s; the conductor gives
    the head of a request 10 s, for which nobody waits here (tests/unit/test_api.py).
    """
    cluster = target.cluster
    with cluster.api() as api:
        conductor = api.address
    host, _, port = conductor.partition(":")
    slow: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for number in range(SLOW_CLIENTS):
            for made, half in (
                (Connection(target.primary).socket, b"PFW1" * (number % 3)),
                (open_socket(target.uris["unix"])[0], FIXED[: number % 4]),
                (open_socket(target.uris["tcp"])[0], FIXED + option(7, b"", length=9)),
                (
                    socket.create_connection((host, int(port)), timeout=30),
                    b"POST /v1/volumes HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                    + b"X: y\r\n" * (number % 5),
                ),
            ):
                stack.enter_context(made)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    made.sendall(half)  # the oldest handshakes are ended by newer ones
                # The last one of each round is the conductor's.
                slow.append(made)
        started = time.monotonic()
        target.is_unharmed()
        for name in ("unix", "tcp", "ro"):
            with NbdClient(target.uris[name]) as client:
                assert client.call(Command.READ, 0, 4096).error == 0
        with target.session() as client:
            assert status(client.write(0, b"s" * 4096)) is Code.OK
        assert call(target, {})[0] == 200
        assert "unix" in cluster.pf("volume", "list")
        assert time.monotonic() - started < SLOW_S
        for client_socket in (made for number, made in enumerate(slow) if number % 4 != 3):
            client_socket.settimeout(SLOW_S)
            with contextlib.suppress(ConnectionResetError):
                while client_socket.recv(4096):
                    pass  # the greeting
        target.is_unharmed()


def test_clients_that_read_no_answers_hold_little_and_keep_nobody_out(target: Target) -> None:
    """Each asks for 96 MiB and takes nothing for a while.

    The gateway reads no further requests of an NBD client, which may do so and loses nothing; a PFW
    client breaks the limits that HELLO agreed on, and the store ends its connection.
    """
    before = {name: rss_bytes(pid) for name, pid in target.pids.items()}
    with contextlib.ExitStack() as stack:
        deaf = [stack.enter_context(NbdClient(target.uris["unix"])) for _ in range(2)]
        rude = stack.enter_context(target.session(path_slot=1))
        for _ in range(DEAF_REQUESTS):
            for client in deaf:
                client.send(Command.READ, 0, MIB)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                rude.send(rude.request(Opcode.READ, 0, MIB))
        for _ in range(32):
            target.is_unharmed()
        for name, pid in target.pids.items():
            grown = rss_bytes(pid) - before[name]
            print(f"{name}: {grown / MIB:.1f} MiB more")
            assert grown < len(deaf) * DEAF_BYTES_MAX + RSS_BYTES_MAX, name
        for client in deaf:
            answers = [client.receive() for _ in range(DEAF_REQUESTS)]
            assert {(answer.error, len(answer.data)) for answer in answers} == {(0, MIB)}
    target.is_unharmed()


def test_nothing_is_left_open_behind_those_who_went(target: Target) -> None:
    """All of the above has closed its connections: the processes have too."""

    def counts() -> dict[str, int]:
        return {
            name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in target.pids.items()
        }

    target.cluster.wait(
        "descriptors are given back",
        lambda: all(count < DESCRIPTORS_MAX for count in counts().values()),
        seconds=SLOW_S,
    )
    print(counts())
