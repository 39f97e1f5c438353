"""Ring 2: the store's data side, spoken to by the independent Python model of PFW.

The client here shares no line with the Rust codec, so what passes is what docs/reference/pfw.md
says.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.support.pfw import Connection, Session, status

from pureflash import _core
from pureflash.errors import Code, PureFlashError
from pureflash.model.ticket import Rights, Ticket, make_ticket
from pureflash.store.latency import Meters
from pureflash.testing.model import wire
from pureflash.testing.model.wire import Message, Opcode

CLUSTER = bytes(range(16))
KEY = b"k" * 32
VOLUME = 7
SHARD_BYTES = 8 << 20
FAR_FUTURE = 1 << 40

Starter = Callable[[], Any]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Start the store on its one disk; the last one started is closed at the end."""
    disk = tmp_path / "disk0.img"
    _core.format_disk(disk, size_bytes=256 << 20, cluster_id=CLUSTER)
    running: list[_core.StoreNode] = []

    def starter() -> _core.StoreNode:
        for node in running:
            node.close()
        node = _core.StoreNode(
            store_id=1,
            incarnation=len(running) + 1,
            cluster_id=CLUSTER,
            cluster_key=KEY,
            listen="127.0.0.1:0",
            disks=[{"path": str(disk), "engine": "auto"}],
        )
        running.append(node)
        return node

    yield starter
    for node in running:
        node.close()


def disk_of(node: _core.StoreNode) -> str:
    uuid: str = node.stats()["disks"][0]["disk_uuid"]
    return uuid


def conf(
    node: _core.StoreNode, epoch: int = 1, attach_epoch: int = 1, incarnation: int = 1
) -> bytes:
    """Give the configuration of the one replica, as a configuration's bytes."""
    disk = disk_of(node)
    member = {
        "copy": 0,
        "store": 1,
        "incarnation": incarnation,
        "disk": disk,
        "format_uuid": disk,
    }
    encoded: bytes = _core.conf_encode(
        {
            "volume_id": VOLUME,
            "index": 0,
            "epoch": epoch,
            "rf": 1,
            "min_write": 1,
            "primary": 0,
            "isr": [0],
            "learners": [],
            "members": [member],
            "history_id": VOLUME,
            "attach_epoch": attach_epoch,
        }
    )
    return encoded


def wait_events(node: _core.StoreNode, count: int = 1) -> list[tuple[Any, ...]]:
    """Wait for answers; what a replica asks the conductor for is none."""
    events: list[tuple[Any, ...]] = []
    while len(events) < count:
        readable, _, _ = select.select([node.fileno()], [], [], 30)
        assert readable, f"no event within 30 s after {events}"
        events += [event for event in node.drain() if event[0] in ("done", "failed")]
    return events


def with_shard(node: _core.StoreNode) -> _core.StoreNode:
    node.create_replica(11, VOLUME, 0, 0, SHARD_BYTES, disk_of(node), conf(node))
    assert wait_events(node) == [("done", 11, None)]
    return node


def with_shard_again(node: _core.StoreNode) -> _core.StoreNode:
    """Let the second life of the store serve: its shard is opened again (T6)."""
    node.set_conf(12, VOLUME, 0, conf(node, epoch=2, incarnation=2))
    assert wait_events(node) == [("done", 12, None)]
    return node


@pytest.fixture(autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    while Client.opened:
        Client.opened.pop().close()


class Client(Session):
    """One connection with a ticket that is right but for `ticket`; closed after the test."""

    opened: ClassVar[list[Client]] = []

    def __init__(
        self,
        node: _core.StoreNode,
        *,
        slot: int = 0,
        key: bytes = KEY,
        cluster_id: bytes = CLUSTER,
        **ticket: Any,
    ) -> None:
        usual = {
            "volume_id": VOLUME,
            "attach_epoch": 1,
            "session": 5,
            "expires": FAR_FUTURE,
            "rights": Rights.READ_WRITE,
        }
        signed = make_ticket(key, Ticket(**(usual | ticket)))
        super().__init__(node.address, cluster_id, signed, epoch=1, path_slot=slot)
        Client.opened.append(self)


def test_what_is_written_is_read_also_after_a_restart(start: Starter) -> None:
    node = with_shard(start())
    client = Client(node)
    assert status(client.hello) is Code.OK
    assert status(client.write(8192, b"a" * 8192)) is Code.OK
    assert status(client.write(512, b"b" * 1024)) is Code.OK, "sectors are merged into blocks"
    assert status(client.call(client.request(Opcode.DISCARD, 12288, 4096))) is Code.OK
    expected = bytes(512) + b"b" * 1024 + bytes(8192 - 1536) + b"a" * 4096 + bytes(4096)
    assert client.read(0, 16384).data == expected
    assert client.read(1024, 1024).data == b"b" * 512 + bytes(512)

    client = Client(with_shard_again(start()))
    assert client.read(0, 16384, epoch=2).data == expected, "opened again, nothing lost"


def test_a_write_past_the_end_has_no_effect(start: Starter) -> None:
    client = Client(with_shard(start()))
    assert status(client.write(SHARD_BYTES - 512, b"x" * 1024)) is Code.OUT_OF_RANGE
    assert client.read(SHARD_BYTES - 4096, 4096).data == bytes(4096)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"epoch": 2}, Code.STALE_EPOCH),
        ({"epoch": 0}, Code.STALE_EPOCH),
        ({"position": 0}, Code.FENCED),
        ({"shard_index": 3}, Code.NOT_PRIMARY),
    ],
)
def test_a_request_of_another_reign_is_refused(
    start: Starter, fields: dict[str, int], expected: Code
) -> None:
    client = Client(with_shard(start()))
    assert status(client.write(0, bytes(4096), **fields)) is expected


def test_a_newer_configuration_fences_older_writers(start: Starter) -> None:
    node = with_shard(start())
    client = Client(node)
    node.set_conf(12, VOLUME, 0, conf(node, epoch=2, attach_epoch=2))
    assert wait_events(node) == [("done", 12, None)]
    assert status(client.write(0, b"o" * 4096)) is Code.FENCED, "it may never hear of epoch 2"
    assert status(client.read(0, 4096)) is Code.STALE_EPOCH, "a reader waits for the news"
    assert status(client.write(0, b"o" * 4096, epoch=2)) is Code.FENCED
    assert status(client.write(0, b"o" * 4096, epoch=2, position=2)) is Code.DENIED, "unsigned"
    newer = Client(node, session=6, attach_epoch=2)
    assert status(newer.write(0, b"n" * 4096, epoch=2)) is Code.OK


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"key": b"x" * 32}, Code.UNAUTHENTICATED),
        ({"expires": 1}, Code.UNAUTHENTICATED),
        ({"cluster_id": bytes(16)}, Code.WRONG_CLUSTER),
    ],
)
def test_who_cannot_prove_it_is_not_let_in(
    start: Starter, changes: dict[str, Any], expected: Code
) -> None:
    client = Client(with_shard(start()), **changes)
    assert status(client.hello) is expected
    with pytest.raises((EOFError, ConnectionError)):
        client.receive()


def test_rights_bind_a_session_to_its_volume_and_to_reading(start: Starter) -> None:
    node = with_shard(start())
    reader = Client(node, rights=Rights.READ)
    assert status(reader.read(0, 4096)) is Code.OK
    assert status(reader.write(0, bytes(4096))) is Code.READ_ONLY
    stranger = Client(node, volume_id=VOLUME + 1)
    assert status(stranger.read(0, 4096, volume_id=VOLUME)) is Code.DENIED


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b" " * 64,
        bytes(64),
        b"\xff" * 200,
        wire.encode(Message(Opcode.FLUSH, command_id=1)),
    ],
)
def test_garbage_closes_its_connection_and_nothing_else(start: Starter, garbage: bytes) -> None:
    node = with_shard(start())
    client = Client(node)
    with Connection(node.address) as stranger:
        stranger.send_raw(garbage)
        assert stranger.is_closed()
    assert status(client.write(0, b"x" * 4096)) is Code.OK


def test_damaged_data_are_refused_and_the_connection_goes_on(start: Starter) -> None:
    client = Client(with_shard(start()))
    frame = bytearray(wire.encode(client.request(Opcode.WRITE, 0, 4096, data=b"d" * 4096)))
    frame[-1] ^= 1
    client.send_raw(bytes(frame))
    assert status(client.receive()) is Code.BAD_CHECKSUM
    assert client.read(0, 4096).data == bytes(4096), "a refused write has no effect"


def test_many_requests_in_flight_each_get_one_reply(start: Starter) -> None:
    client = Client(with_shard(start()))
    requests = [
        client.request(Opcode.WRITE, block * 4096, 4096, data=bytes([block]) * 4096)
        for block in range(200)
    ]
    for request in requests:
        client.send(request)
    replies = [client.receive() for _ in requests]
    assert {reply.command_id for reply in replies} == {each.command_id for each in requests}
    assert all(status(reply) is Code.OK for reply in replies)
    assert client.read(199 * 4096, 4096).data == bytes([199]) * 4096


def test_fencing_a_slot_closes_it_and_tells_what_it_had_done(start: Starter) -> None:
    node = with_shard(start())
    old, new = Client(node, slot=0), Client(node, slot=1)
    assert status(old.write(0, b"1" * 4096)) is Code.OK
    fence = Message(
        Opcode.FENCE_PATH, command_id=99, volume_id=VOLUME, extension={"generation": 1, "slot": 0}
    )
    reply = new.call(fence)
    assert status(reply) is Code.OK
    assert wire.records(reply) == (), "everything of the slot was answered before"
    with pytest.raises((EOFError, ConnectionError)):
        old.write(0, b"2" * 4096)
    assert new.read(0, 4096).data == b"1" * 4096


def test_replicas_grow_and_go_and_their_space_comes_back(start: Starter) -> None:
    node = with_shard(start())
    client = Client(node)
    assert status(client.write(0, b"x" * (1 << 20))) is Code.OK
    free = node.stats()["disks"][0]["bytes_free"]
    node.resize_replica(13, VOLUME, 0, 2 * SHARD_BYTES)
    assert wait_events(node) == [("done", 13, None)]
    node.create_replica(14, VOLUME, 0, 0, 2 * SHARD_BYTES, disk_of(node), conf(node))
    assert wait_events(node) == [("done", 14, None)], "what exists need not be created"
    assert status(client.write(2 * SHARD_BYTES - 4096, b"y" * 4096)) is Code.OK
    node.delete_replica(15, VOLUME, 0)
    node.delete_replica(16, VOLUME, 0)
    assert sorted(wait_events(node, 2)) == [("done", 15, None), ("done", 16, None)]
    assert node.replicas() == []
    assert node.stats()["disks"][0]["bytes_free"] >= free + (1 << 20)
    assert status(client.read(0, 4096)) is Code.NOT_PRIMARY
    node.set_conf(17, VOLUME, 0, conf(node))
    (event,) = wait_events(node)
    assert event[:3] == ("failed", 17, int(Code.NOT_FOUND))


def test_what_a_disk_takes_for_its_operations_is_measured(start: Starter) -> None:
    node, meters = with_shard(start()), Meters()
    client = Client(node)
    meters.look(node.stats()["disks"])
    for place in range(20):
        assert status(client.write(place * 4096, b"x" * 4096)) is Code.OK
        assert client.read(place * 4096, 4096).data == b"x" * 4096
    seen = meters.look(node.stats()["disks"])[0]
    assert seen.writes >= 20, "each is in the journal at least"
    assert seen.reads >= 20
    figures = (seen.write_ewma_us, seen.write_p99_us, seen.read_ewma_us, seen.read_p99_us)
    assert all(0 < one < 60_000_000 for one in figures), "in microseconds"


def test_a_disk_that_may_not_grow_takes_overwrites_only(start: Starter) -> None:
    node = with_shard(start())
    node.resize_replica(13, VOLUME, 0, 200 << 20)
    assert wait_events(node) == [("done", 13, None)]
    client = Client(node)
    node.hold_growth(0, True)
    block, taken = b"x" * (1 << 20), 0
    while (verdict := status(client.write(taken << 20, block))) is Code.OK:
        taken += 1
        assert taken < 199, "what was written of the disk file is less than the shard"
    assert verdict is Code.NO_SPACE
    assert node.stats()["disks"][0]["bytes_free"] < len(block)
    assert status(client.write(0, b"y" * 8192)) is Code.OK, "its room is taken already"
    assert status(client.call(client.request(Opcode.DISCARD, 0, 1 << 20))) is Code.OK
    assert status(client.write(taken << 20, block)) is Code.OK, "what was given back is used again"
    node.hold_growth(0, False)
    assert status(client.write((taken + 1) << 20, block)) is Code.OK
    assert client.read(taken << 20, 4096).data == b"x" * 4096


def test_space_of_a_deleted_volume_reads_as_zeros_in_the_next(start: Starter) -> None:
    node = with_shard(start())
    client = Client(node)
    for offset in range(0, SHARD_BYTES, 1 << 20):
        assert status(client.write(offset, b"secret!!" * (1 << 17))) is Code.OK
    node.delete_replica(15, VOLUME, 0)
    wait_events(node)
    node.create_replica(16, VOLUME, 0, 0, SHARD_BYTES, disk_of(node), conf(node))
    wait_events(node)
    client = Client(node, session=6)
    assert status(client.write(4096, b"n" * 512)) is Code.OK
    found = client.read(0, 65536).data
    assert found == bytes(4096) + b"n" * 512 + bytes(65536 - 4608)


def test_a_port_that_is_taken_is_named(start: Starter, tmp_path: Path) -> None:
    node = start()
    other = tmp_path / "disk1.img"
    _core.format_disk(other, size_bytes=256 << 20, cluster_id=CLUSTER)
    with pytest.raises(PureFlashError) as caught:
        _core.StoreNode(
            store_id=2,
            incarnation=1,
            cluster_id=CLUSTER,
            cluster_key=KEY,
            listen=node.address,
            disks=[{"path": str(other)}],
        )
    assert caught.value.code is Code.IN_USE
    assert node.address in caught.value.message


def test_a_store_tells_others_which_conductor_it_follows(start: Starter, tmp_path: Path) -> None:
    """Which is heard where is shown by the Rust tests; this is the way there from Python."""
    node, other = start(), tmp_path / "disk1.img"
    _core.format_disk(other, size_bytes=256 << 20, cluster_id=CLUSTER)
    second = _core.StoreNode(
        store_id=2,
        incarnation=1,
        cluster_id=CLUSTER,
        cluster_key=KEY,
        listen="127.0.0.1:0",
        disks=[{"path": str(other)}],
    )
    try:
        assert second.heard_conductor() == (0, 0, 0)
        node.set_conductor(2**63 + 3, 2**64 - 1, 40)
        for each in (node, second):
            each.set_peers([(1, 1, node.address), (2, 1, second.address)])
        pair = _core.conf_encode(
            _core.conf_decode(conf(node))
            | {
                "rf": 2,
                "isr": [0, 1],
                "members": [
                    {
                        "copy": copy,
                        "store": copy + 1,
                        "incarnation": 1,
                        "disk": disk_of(each),
                        "format_uuid": disk_of(each),
                    }
                    for copy, each in enumerate((node, second))
                ],
            }
        )
        for copy, each in enumerate((node, second)):
            each.create_replica(11, VOLUME, 0, copy, SHARD_BYTES, disk_of(each), pair)
        wait_events(node)
        # A read waits for the lease, and that for the answer to a heartbeat.
        assert status(Client(node).read(0, 4096)) is Code.OK
        assert second.heard_conductor() == (2**63 + 3, 2**64 - 1, 40)
        with pytest.raises(OverflowError):
            second.set_conductor(-1, 0, 0)
    finally:
        second.close()
