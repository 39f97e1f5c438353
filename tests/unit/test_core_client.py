"""`_core.Gateway` and `_core.Volume` against a small store in Python that speaks the wire model.

What the data path does under faults is tested in Rust; here is what Python sees of it: values,
exceptions, descriptors, threads and signals.
"""

from __future__ import annotations

import _thread
import array
import select
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pureflash import _core
from pureflash.errors import CallerError, Code, MediaError, PureFlashError, RouteError
from pureflash.testing.model import wire
from pureflash.testing.model.wire import Message, Opcode, Value

if TYPE_CHECKING:
    from pureflash._core import VolumeSpec

CLUSTER = b"cluster-of-pytest"[:16]
VOLUME_ID = 12
SHARD_BYTES = 64 << 10
SIZE_BYTES = 2 * SHARD_BYTES
PATIENCE_S = 60
STORE_FIELDS: Mapping[str, Value] = {
    "store": 1,
    "incarnation": 1,
    "nonce": bytes(32),
    "proof": bytes(32),
}
LIMITS: Mapping[str, Value] = {
    "payload_bytes_max": 1 << 20,
    "requests_max": 128,
    "inflight_bytes_max": 32 << 20,
}


class Store(socketserver.ThreadingTCPServer):
    """Serves one volume from memory; shard 1 has a full disk."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Session)
        self.content = bytearray(SIZE_BYTES)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def answer(self, request: Message) -> Message:
        reply = Message(
            request.opcode,
            is_reply=True,
            command_id=request.command_id,
            volume_id=request.volume_id,
            shard_index=request.shard_index,
            epoch=request.epoch,
        )
        start = request.shard_index * SHARD_BYTES + request.place
        place = slice(start, start + request.length)
        match request.opcode:
            case Opcode.HELLO:
                assert request.extension["cluster_id"] == CLUSTER
                fields: Mapping[str, Value] = {
                    "version": 1,
                    "reserved": 0,
                    "lanes": 1,
                    "features": 0,
                }
                return replace(reply, extension={**fields, **LIMITS, **STORE_FIELDS})
            case Opcode.READ:
                data = bytes(self.content[place])
                return replace(reply, length=len(data), data=data, place=request.place % 4096 << 32)
            case Opcode.WRITE if request.shard_index == 1:
                return replace(reply, is_error=True, place=int(Code.NO_SPACE))
            case Opcode.WRITE:
                self.content[place] = request.data
            case Opcode.DISCARD | Opcode.WRITE_ZEROES:
                self.content[place] = bytes(request.length)
            case _:
                raise AssertionError(request.opcode)
        return reply


class Session(socketserver.StreamRequestHandler):
    """One connection."""

    def handle(self) -> None:
        assert isinstance(self.server, Store)
        while len(head := self.rfile.read(wire.HEADER_BYTES)) == wire.HEADER_BYTES:
            body = self.rfile.read(int.from_bytes(head[56:60], "little"))
            request = wire.decode(head + body)
            self.wfile.write(wire.encode(self.server.answer(request)))


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def nowhere() -> Iterator[str]:
    """Give an address where connections are taken and nobody ever says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def make_spec(address: str, *, epoch: int = 1) -> VolumeSpec:
    ticket = struct.pack("<QQQQI", VOLUME_ID, 1, 3, 2**40, 3) + bytes(32)
    return {
        "volume_id": VOLUME_ID,
        "size_bytes": SIZE_BYTES,
        "shard_size_bytes": SHARD_BYTES,
        "attach_epoch": 1,
        "ticket": ticket,
        "shards": [{"index": n, "epoch": epoch, "address": address} for n in range(2)],
    }


def test_what_is_written_is_read_from_every_kind_of_buffer(store: Store) -> None:
    with _core.Volume(make_spec(store.address), cluster_id=CLUSTER) as volume:
        assert volume.size == SIZE_BYTES
        assert volume.pread(0, 1024) == bytes(1024)
        volume.pwrite(512, b"a" * 512)
        volume.pwrite(4096, bytearray(b"b" * 8192))
        volume.pwrite(16384, memoryview(b"xx" + b"c" * 1024)[2:])
        volume.pwrite(20480, array.array("B", b"d" * 512))
        volume.flush()
        assert volume.pread(512, 512) == b"a" * 512
        assert bytes(store.content[4096:12288]) == b"b" * 8192
        assert volume.pread(16384, 1024) == b"c" * 1024
        assert volume.pread(20480, 512) == b"d" * 512
        volume.discard(4096, 4096)
        volume.write_zeroes(8192, 512)
        assert volume.pread(4096, 8192) == bytes(4608) + b"b" * 3584
        assert volume.pread(0, 0) == b""
        with pytest.raises(BufferError):
            volume.pwrite(0, memoryview(bytes(2048))[::2])
        stats = volume.stats()
        assert stats["errors"] == 0
        assert stats["written_bytes"] == 512 + 8192 + 1024 + 512


def test_failures_are_exceptions_of_their_band(store: Store) -> None:
    with _core.Volume(make_spec(store.address), cluster_id=CLUSTER) as volume:
        for call, code in (
            (lambda: volume.pread(SIZE_BYTES, 512), Code.OUT_OF_RANGE),
            (lambda: volume.pread(1, 512), Code.MISALIGNED),
            (lambda: volume.pwrite(0, b"odd"), Code.MISALIGNED),
        ):
            with pytest.raises(CallerError) as caught:
                call()
            assert caught.value.code is code
        with pytest.raises(MediaError) as full:
            volume.pwrite(SHARD_BYTES, bytes(512))
        assert full.value.code is Code.NO_SPACE
    with pytest.raises(RouteError) as closed:
        volume.flush()
    assert closed.value.code is Code.CANCELLED


def test_threads_share_a_volume(store: Store) -> None:
    with _core.Volume(make_spec(store.address), cluster_id=CLUSTER) as volume:

        def work(number: int) -> None:
            for turn in range(20):
                data = bytes((number * 20 + turn,)) * 512
                volume.pwrite(number * 4096, data)
                assert volume.pread(number * 4096, 512) == data

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number in range(4):
            assert store.content[number * 4096] == number * 20 + 19


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"ticket": b"short"}, Code.INVALID),
        ({"size_bytes": 0}, Code.INVALID),
        ({"shard_size_bytes": 1000}, Code.INVALID),
        ({"attach_epoch": 2}, Code.INVALID),
        ({"shards": [{"index": 0, "epoch": 1, "address": "no port"}]}, Code.INVALID),
        ({"shards": [{"index": 0, "epoch": 1}]}, Code.INVALID),
        ({"shards": [{"index": 7, "epoch": 1, "address": "[::1]:1"}]}, Code.INVALID),
    ],
)
def test_a_wrong_description_is_refused(change: dict[str, object], code: Code) -> None:
    spec = make_spec("127.0.0.1:1")
    spec.update(change)  # type: ignore[typeddict-item]  # wrong on purpose
    with pytest.raises(CallerError) as caught:
        _core.Volume(spec, cluster_id=CLUSTER)
    assert caught.value.code is code
    with pytest.raises(CallerError):
        _core.Volume(make_spec("127.0.0.1:1"), cluster_id=b"short")


def test_a_time_limit_and_an_interrupt_end_a_wait(nowhere: str) -> None:
    spec = make_spec(nowhere)
    with _core.Volume(spec, cluster_id=CLUSTER, io_timeout_ms=50) as volume:
        with pytest.raises(PureFlashError) as caught:
            volume.pread(0, 512)
        assert caught.value.code is Code.TIMED_OUT
    with _core.Volume(spec, cluster_id=CLUSTER) as volume:
        asked = threading.Event()

        def interrupt() -> None:
            asked.wait()
            _thread.interrupt_main()

        thread = threading.Thread(target=interrupt)
        thread.start()

        def ask() -> None:
            # The interrupt finds this thread in its wait, or on the way there.
            asked.set()
            volume.pread(0, 512)

        with pytest.raises(KeyboardInterrupt):
            ask()
        thread.join()


def read_exactly(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = client.recv(count - len(data))
        assert part, "the gateway has closed the connection"
        data += part
    return data


def test_the_gateway_serves_an_adopted_socket(store: Store) -> None:
    gateway = _core.Gateway(cluster_id=CLUSTER)
    gateway.open_volume(5, make_spec(store.address))
    with pytest.raises(PureFlashError) as twice:
        gateway.open_volume(5, make_spec(store.address))
    assert twice.value.code is Code.IN_USE
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE_S)
    write = struct.pack(">IHHQQI", 0x25609513, 0, 1, 77, 512, 512) + b"n" * 512
    with theirs:
        # Half of the first request was read along with the handshake.
        conn = gateway.adopt_nbd(theirs.fileno(), write[:300], 5, False, False)
    with ours:
        ours.sendall(write[300:])
        assert read_exactly(ours, 16) == struct.pack(">IIQ", 0x67446698, 0, 77)
        assert bytes(store.content[512:1024]) == b"n" * 512
        stats = gateway.stats()["volumes"][5]
        assert (stats["connections"], stats["requests"]) == (1, 1)
        gateway.update_volume(5, make_spec(store.address, epoch=2))
    ready, _, _ = select.select([gateway.fileno()], [], [], PATIENCE_S)
    assert ready
    assert gateway.drain() == [("closed", conn, "closed by the peer")]
    assert gateway.drain() == []
    assert not select.select([gateway.fileno()], [], [], 0)[0]
    gateway.close_volume(5)
    with pytest.raises(CallerError) as gone:
        gateway.close_volume(5)
    assert gone.value.code is Code.NOT_FOUND
    gateway.close()
    gateway.close()


def test_what_is_no_socket_is_refused(store: Store) -> None:
    gateway = _core.Gateway(cluster_id=CLUSTER)
    gateway.open_volume(1, make_spec(store.address))
    with Path(__file__).open("rb") as file:
        for fd in (-1, 1 << 20, file.fileno()):
            with pytest.raises(CallerError) as caught:
                gateway.adopt_nbd(fd, b"", 1, False, False)
            assert caught.value.code is Code.INVALID
        assert file.read(3) == b'"""', "the caller's descriptor is its own"
    with pytest.raises(CallerError) as long:
        gateway.adopt_nbd(0, bytes(65537), 1, False, False)
    assert long.value.code is Code.LIMIT
    gateway.close()


def test_a_gateway_asks_for_news_of_a_store_that_is_away() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    gateway = _core.Gateway(cluster_id=CLUSTER)
    gateway.open_volume(3, make_spec(address))
    ours, theirs = socket.socketpair()
    with theirs:
        gateway.adopt_nbd(theirs.fileno(), b"", 3, True, False)
    with ours:
        ours.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, SHARD_BYTES, 512))
        ready, _, _ = select.select([gateway.fileno()], [], [], PATIENCE_S)
        assert ready
        assert gateway.drain() == [("conf_needed", 3, 1)]
    del gateway  # ends without grace: nobody has called close()


def test_a_client_of_before_a_growth_reaches_the_new_space(store: Store) -> None:
    """NBD has no word for a new size; who learned it elsewhere is served."""
    gateway = _core.Gateway(cluster_id=CLUSTER)
    small = make_spec(store.address)
    small.update({"size_bytes": 16 << 10, "shards": small["shards"][:1]})
    gateway.open_volume(1, small)
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE_S)
    with theirs:
        gateway.adopt_nbd(theirs.fileno(), b"", 1, False, False)

    def read(cookie: int, offset: int) -> int:
        ours.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, cookie, offset, 512))
        _, error, answered = struct.unpack(">IIQ", read_exactly(ours, 16))
        assert answered == cookie
        if error == 0:
            read_exactly(ours, 512)
        return int(error)

    with ours:
        assert read(1, 16 << 10) == 22, "EINVAL: beyond the export"
        gateway.update_volume(1, make_spec(store.address))
        assert read(2, 16 << 10) == 0
        assert read(3, SIZE_BYTES) == 22
    gateway.close()
