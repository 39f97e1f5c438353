"""The gateway around a fake core: exports, the NBD handshake on real sockets, and its deadline."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.support.fake_core import FakeGateway
from tests.support.gateway import listening, spec
from tests.support.world import ListLog

from pureflash.errors import CallerError, ClusterError, Code
from pureflash.gateway import listener as listener_module
from pureflash.gateway.exports import Exports
from pureflash.gateway.listener import patience
from pureflash.gateway.server import GatewayAgent, bind_unix
from pureflash.model.core import core_spec
from pureflash.model.domain import SHARDS_PER_VOLUME_MAX, Transport
from pureflash.model.messages import (
    FRAME_BYTES_MAX,
    ExportsApplied,
    Message,
    ShardRoute,
    encode,
    set_exports,
)
from pureflash.process.link import AgentLink

URIS = {Transport.UNIX: "nbd+unix:///{name}?socket=/x", Transport.TCP: "nbd://h:1/{name}"}


def go_option(name: str) -> bytes:
    # "NBD_OPT_GO": u32 length of the name, name, u16 number of information requests.
    data = struct.pack(">I", len(name)) + name.encode() + struct.pack(">H", 0)
    return struct.pack(">QII", 0x49484156454F5054, 7, len(data)) + data


async def test_a_client_is_handed_over_with_what_it_sent_too_early(tmp_path: Path) -> None:
    async with listening(tmp_path) as rig:
        rig.exports.apply((spec(5, "v1"),))
        reader, writer = await asyncio.open_unix_connection(rig.path)
        assert (await reader.readexactly(18)).startswith(b"NBDMAGICIHAVEOPT")
        writer.write(struct.pack(">I", 3) + go_option("v1") + b"early")
        await asyncio.wait_for(rig.changes.get(), 10)
        (adopted,) = rig.gateway.adopted.values()
        descriptor, leftover, handle, structured, read_only = adopted
        assert (leftover, handle, structured, read_only) == (b"early", 5, False, False)
        os.write(descriptor, b"from rust")
        assert (await reader.readuntil(b"from rust")).endswith(b"from rust")
        (report,) = rig.exports.reports(URIS)
        assert (report.is_ready, report.connections) == (True, 1)
        rig.exports.apply(())
        assert await reader.read() == b""
        assert rig.gateway.volumes == {}
        writer.close()
        await writer.wait_closed()


async def test_an_unknown_name_is_answered_and_the_other_transport_is_not_offered(
    tmp_path: Path,
) -> None:
    async with listening(tmp_path) as rig:
        rig.exports.apply((spec(5, "v1", transport="tcp"),))
        reader, writer = await asyncio.open_unix_connection(rig.path)
        writer.write(struct.pack(">I", 3) + go_option("v1"))
        await reader.readexactly(18)
        magic, option, reply, _ = struct.unpack(">QIII", await reader.readexactly(20))
        assert (magic, option, reply) == (0x0003E889045565A9, 7, 2**31 + 6)
        writer.close()
        await writer.wait_closed()
        assert rig.gateway.adopted == {}


async def test_a_client_that_says_nothing_is_disconnected_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_S", 0.05)
    async with listening(tmp_path) as rig:
        reader, writer = await asyncio.open_unix_connection(rig.path)
        assert len(await asyncio.wait_for(reader.read(), 10)) == 18
        assert [event for _, event, _ in rig.log.lines] == ["nbd.slow"]
        writer.close()
        await writer.wait_closed()


def test_a_handshake_may_last_as_long_as_its_client_gets_on_up_to_an_end() -> None:
    # 5 s for each option; 5 s and 10 ms for each export in all.
    assert [patience(now_s=now, began_s=100, exports=0) for now in (100, 103, 104)] == [105] * 3
    assert patience(now_s=100, began_s=100, exports=10_000) == 105
    assert patience(now_s=150, began_s=100, exports=10_000) == 155
    assert patience(now_s=204, began_s=100, exports=10_000) == 205


async def test_a_client_that_asks_for_ever_is_disconnected_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_S", 0.2)
    monkeypatch.setattr(listener_module, "EXPORT_S", 0.0)
    async with listening(tmp_path) as rig:
        # So many that bytes do not end it: each option and its answer have less than 100.
        rig.exports.apply(tuple(spec(1 + number, f"v{number}") for number in range(2_000)))
        reader, writer = await asyncio.open_unix_connection(rig.path)
        writer.write(struct.pack(">I", 3))
        await reader.readexactly(18)
        async with asyncio.timeout(30):
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    writer.write(struct.pack(">QII", 0x49484156454F5054, 99, 0))
                    _, _, _, length = struct.unpack(">QIII", await reader.readexactly(20))
                    await reader.readexactly(length)
        assert rig.log.lines[-1][1] == "nbd.slow"
        writer.close()


def test_what_a_handshake_looks_at_is_made_once_per_list(tmp_path: Path) -> None:
    gateway = FakeGateway(cluster_id=bytes(16))
    exports = Exports(gateway, path=tmp_path / "e", log=ListLog())
    exports.apply((spec(1, "a"), spec(2, "a", transport="tcp")))
    table = exports.table(Transport.UNIX)
    assert exports.table(Transport.UNIX) is table
    assert table.by_name.keys() == {"a"}
    # One volume may be offered twice; each transport's clients use their own export.
    assert [exports.handle_of("a", one) for one in (Transport.UNIX, Transport.TCP)] == [1, 2]
    exports.apply((spec(2, "a", transport="tcp"), spec(3, "b")))
    assert exports.table(Transport.UNIX).by_name.keys() == {"b"}
    assert exports.handle_of("a", Transport.UNIX) is None
    assert table.by_name.keys() == {"a"}, "a handshake that is under way keeps what it saw"
    gateway.close()


async def test_a_client_beyond_the_limit_of_handshakes_ends_the_oldest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKES_MAX", 2)
    async with listening(tmp_path) as rig:
        clients = []
        for _ in range(3):
            reader, writer = await asyncio.open_unix_connection(rig.path)
            await reader.readexactly(18)
            clients.append((reader, writer))
        assert await asyncio.wait_for(clients[0][0].read(), 10) == b"", "the oldest is ended"
        for reader, writer in clients[1:]:
            writer.write(struct.pack(">I", 3) + go_option("none"))
            assert len(await asyncio.wait_for(reader.readexactly(20), 10)) == 20
        for _, writer in clients:
            writer.close()
            await writer.wait_closed()


async def test_a_storm_of_clients_is_ended_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKES_MAX", 8)
    monkeypatch.setattr(listener_module, "HANDSHAKE_S", 0.05)
    async with listening(tmp_path) as rig:
        # All of them wait in the backlog before the listener has its first turn.
        clients = [socket.socket(socket.AF_UNIX) for _ in range(40)]
        for client in clients:
            client.connect(str(rig.path))
            client.setblocking(False)
        loop = asyncio.get_running_loop()
        for client in clients:
            while await asyncio.wait_for(loop.sock_recv(client, 4096), 10):
                pass  # the greeting
            client.close()
        assert sum(event == "nbd.busy" for _, event, _ in rig.log.lines) >= 1


async def test_a_listener_without_a_descriptor_waits_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "ACCEPT_PAUSE_S", 0.01)
    refusals = [errno.EMFILE, errno.ECONNABORTED]
    accept = socket.socket.accept

    def refuse_at_first(listener: socket.socket) -> tuple[socket.socket, object]:
        if refusals:
            raise OSError(refusals.pop(), "as the kernel says")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", refuse_at_first)
    async with listening(tmp_path) as rig:
        reader, writer = await asyncio.open_unix_connection(rig.path)
        assert (await asyncio.wait_for(reader.readexactly(18), 10)).startswith(b"NBDMAGIC")
        assert refusals == []
        assert [event for _, event, _ in rig.log.lines] == ["nbd.accept"] * 2
        writer.close()
        await writer.wait_closed()


def test_exports_follow_the_list_and_survive_a_restart(tmp_path: Path) -> None:
    path, log = tmp_path / "exports.json", ListLog()
    gateway = FakeGateway(cluster_id=bytes(16))
    exports = Exports(gateway, path=path, log=log)
    exports.apply((spec(1, "a"), spec(2, "b")))
    exports.apply((spec(2, "b", address="127.0.0.1:9"), spec(3, "c")))
    assert sorted(gateway.volumes) == [2, 3]
    assert gateway.volumes[2]["shards"][0]["address"] == "127.0.0.1:9"
    gateway.close()

    restarted = FakeGateway(cluster_id=bytes(16))
    again = Exports(restarted, path=path, log=log)
    again.restore()
    assert restarted.volumes == {
        2: core_spec(spec(2, "b", address="127.0.0.1:9").volume),
        3: core_spec(spec(3, "c").volume),
    }
    restarted.close()
    path.write_text("damaged")
    third = Exports(FakeGateway(cluster_id=bytes(16)), path=path, log=log)
    third.restore()
    assert third.specs == {}
    assert log.lines[-1][:2] == ("ERROR", "exports.unreadable")


def test_an_export_that_cannot_be_opened_says_why_and_is_tried_again(tmp_path: Path) -> None:
    class Refusing(FakeGateway):
        is_refusing = True

        def open_volume(self, handle: int, spec: dict[str, object]) -> None:
            if self.is_refusing:
                raise ClusterError(Code.UNAVAILABLE, "no route")
            super().open_volume(handle, spec)

    gateway = Refusing(cluster_id=bytes(16))
    exports = Exports(gateway, path=tmp_path / "e", log=ListLog())
    exports.apply((spec(1, "a"),))
    (report,) = exports.reports(URIS)
    assert (report.is_ready, report.reason, report.uri) == (False, "no route", "")
    assert exports.table(Transport.UNIX).by_name == {}
    gateway.is_refusing = False
    exports.apply((spec(1, "a", address="127.0.0.1:2"),))
    (report,) = exports.reports(URIS)
    assert (report.is_ready, report.uri) == (True, "nbd+unix:///a?socket=/x")
    gateway.close()


async def test_connections_that_come_and_go_together_make_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pureflash.gateway.server.TELL_S", 0)
    gateway, log = FakeGateway(cluster_id=bytes(16)), ListLog()
    agent = GatewayAgent(gateway, name="g1", cluster_id="00" * 16, incarnation=1, log=log)
    agent.exports = Exports(gateway, path=tmp_path / "e", log=log)
    agent.exports.apply((spec(1, "a"), spec(2, "b")))
    agent.uris = URIS
    agent.link = AgentLink(address="127.0.0.1:1", token="t", owner=agent, log=log)
    agent.link.registered.set()
    for number in range(100):
        agent.exports.connections[number] = 1
        agent.tell()
    for connections in (100, 0):
        told = await asyncio.wait_for(agent.link._outbox.get(), 10)
        assert isinstance(told, ExportsApplied)
        assert [report.connections for report in told.reports] == [connections, 0]
        assert agent.link._outbox.empty()
        agent.exports.connections.clear()
        agent.tell()
    gateway.close()


def test_a_list_of_ten_thousand_exports_comes_in_frames_that_fit(tmp_path: Path) -> None:
    specs = tuple(spec(1 + number, f"v{number}") for number in range(10_000))
    parts = set_exports(specs)
    assert sum((part.exports for part in parts), ()) == specs
    assert len(parts) > 1
    assert max(len(encode(part)) for part in parts) < FRAME_BYTES_MAX
    assert [part.is_first for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    (nothing,) = set_exports(())
    assert (nothing.exports, nothing.is_first, nothing.is_last) == ((), True, True)

    gateway, log = FakeGateway(cluster_id=bytes(16)), ListLog()
    agent = GatewayAgent(gateway, name="g1", cluster_id="00" * 16, incarnation=1, log=log)
    agent.exports = Exports(gateway, path=tmp_path / "e", log=log)
    answers: list[Message] = []
    # The connection breaks in the middle, and the list is said anew.
    for part in (*parts[:2], *parts):
        assert not gateway.volumes, "half a list would take the other half away"
        agent.handle(part, answers.append)
    assert sorted(gateway.volumes) == [one.id for one in specs]
    (answer,) = answers
    assert isinstance(answer, ExportsApplied)
    assert len(answer.reports) == len(specs)
    gateway.close()


def test_the_largest_volume_fits_into_a_frame_behind_a_full_part() -> None:
    shards = tuple(
        ShardRoute(index=index, epoch=2**53 - 1, address="255.255.255.255:65535")
        for index in range(SHARDS_PER_VOLUME_MAX)
    )
    small = spec(1, "v")
    large = replace(small, id=2, volume=replace(small.volume, shards=shards))
    for part in set_exports((small,) * 1_500 + (large,) * 3):
        assert len(encode(part)) < FRAME_BYTES_MAX


def test_the_socket_is_private_and_replaces_one_that_was_left(tmp_path: Path) -> None:
    path = tmp_path / "g1.nbd"
    with bind_unix(path):
        assert path.stat().st_mode & 0o777 == 0o600
    with bind_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    with pytest.raises(CallerError, match="107 bytes"):
        bind_unix(tmp_path / ("x" * 120))
