"""The HTTP API and the agents' WebSocket, over a real socket."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.support.server import TOKEN, Served, is_healthy, serving
from tests.support.world import CLUSTER, GIB

from pureflash.client.api import NO_TLS
from pureflash.errors import CallerError, Code, PureFlashError, SecurityError
from pureflash.model.messages import VolumeSpec
from pureflash.model.rest import CreateExport, CreateVolume
from pureflash.model.ticket import Rights, Ticket, verify_ticket

STRANGER = json.dumps(
    {
        "type": "register_gateway",
        "v": 1,
        "id": 1,
        "term": 0,
        "cluster_id": "00" * 16,
        "gateway": "g1",
        "incarnation": 1,
    }
)
BEARER = {"Authorization": f"Bearer {TOKEN}"}


async def ask(
    served: Served, method: str, path: str, headers: dict[str, str] | None = None, **more: Any
) -> httpx2.Response:
    async with httpx2.AsyncClient(trust_env=False, timeout=30, verify=NO_TLS) as client:
        return await client.request(
            method,
            f"http://{served.address}{path}",
            headers=BEARER if headers is None else headers,
            **more,
        )


def check_problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/problem+json")
    problem: dict[str, Any] = answer.json()
    assert problem["code"] == problem["title"] == code
    assert problem["status"] == status
    assert problem["next_step"]
    assert problem["request_id"] == answer.headers["x-request-id"]
    return problem


@pytest.mark.slow
async def test_a_volume_lives_from_creation_to_deletion(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.store(1) as node:
        wish = CreateVolume(name="v1", size_bytes=3 * GIB, shard_size_bytes=2 * GIB)
        made = await served.call("create_volume", wish)
        assert (made.name, made.state, made.version, made.used_bytes) == ("v1", "healthy", 1, 0)
        assert [(s.index, s.primary, s.isr, s.epoch) for s in made.shards] == [
            (0, 1, [1], 1),
            (1, 1, [1], 1),
        ]
        assert [r["size_bytes"] for r in node.replicas()] == [2 * GIB, GIB]
        confs = [node.conf(made.id, index) for index in range(2)]
        assert [(conf.epoch, conf.isr, conf.index) for conf in confs] == [
            (1, (0,), 0),
            (1, (0,), 1),
        ]
        grown = await served.call("resize_volume", "v1", size_bytes=5 * GIB, if_version=1)
        assert (grown.state, grown.version, len(grown.shards)) == ("healthy", 2, 3)
        assert [r["size_bytes"] for r in node.replicas()] == [2 * GIB, 2 * GIB, GIB]
        with pytest.raises(CallerError) as caught:
            await served.call("resize_volume", "v1", size_bytes=6 * GIB, if_version=1)
        assert caught.value.code is Code.IN_USE
        assert caught.value.request_id is not None
        assert [volume.id for volume in await served.call("volumes")] == [made.id]
        job = await served.call("delete_volume", "v1")
        assert await served.conductor.wait_for(lambda view: not view.volumes, timeout_s=10)
        assert node.replicas() == []
        assert (await served.call("job", job.id)).total == 3
        with pytest.raises(CallerError) as caught:
            await served.call("volume", "v1")
        assert caught.value.code is Code.NOT_FOUND


async def test_a_store_that_comes_back_serves_what_it_had(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        async with served.store(1):
            await served.call("create_volume", CreateVolume(name="v1", size_bytes=GIB))
            first = (await served.call("stores"))[0].incarnation
            await served.call("store_exited", "s1", incarnation=first)
            assert (await served.call("volume", "v1")).state == "offline"
        async with served.store(1) as node:
            assert await served.conductor.wait_for(is_healthy, timeout_s=10)
            shard = (await served.call("volume", "v1")).shards[0]
            assert (shard.epoch, shard.isr) == (2, [1]), "opened again in its new life"
            assert (await served.call("stores"))[0].incarnation == first + 1
            assert len(node.replicas()) == 1
            spec = await served.call("attach_volume", "v1")
            assert [shard.address for shard in spec.shards] == ["127.0.0.1:7162"]


@pytest.mark.slow
async def test_an_attach_is_renewed_for_its_own_session(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.store(1):
        for name in ("v1", "v2"):
            await served.call("create_volume", CreateVolume(name=name, size_bytes=GIB))
        reader = await served.call("attach_volume", "v1", is_read_only=True)
        first = await served.call("attach_volume", "v1")
        other = await served.call("attach_volume", "v2")

        async def renew(held: VolumeSpec) -> tuple[VolumeSpec, Ticket]:
            spec = await served.call("renew_attach", "v1", held.ticket, timeout_s=30)
            ticket = verify_ticket(bytes(32), bytes.fromhex(spec.ticket), now=0)
            assert ticket.attach_epoch == spec.attach_epoch
            return spec, ticket

        session = verify_ticket(bytes(32), bytes.fromhex(first.ticket), now=0).session
        spec, ticket = await renew(first)
        assert (spec.attach_epoch, spec.shards) == (first.attach_epoch, first.shards)
        assert (ticket.session, ticket.rights) == (session, Rights.READ_WRITE)
        await served.call("resize_volume", "v1", size_bytes=2 * GIB)
        second = await served.call("attach_volume", "v1")
        assert second.attach_epoch == first.attach_epoch + 1
        # Who was taken over learns where the shards are now, and no newer attach epoch.
        spec, _ = await renew(first)
        assert (spec.attach_epoch, spec.size_bytes) == (first.attach_epoch, 2 * GIB)
        assert [s.epoch for s in spec.shards] == [s.epoch for s in second.shards]
        spec, ticket = await renew(reader)
        assert (spec.attach_epoch, ticket.rights) == (second.attach_epoch, Rights.READ)
        for held, code in (
            (other.ticket, Code.DENIED),
            ("zz", Code.INVALID),
            ("00" * 68, Code.UNAUTHENTICATED),
            ("00", Code.UNAUTHENTICATED),
        ):
            with pytest.raises(PureFlashError) as caught:
                await served.call("renew_attach", "v1", held, timeout_s=30)
            assert caught.value.code is code
        with pytest.raises(CallerError):
            await served.call("renew_attach", "v9", first.ticket, timeout_s=30)


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "UNAUTHENTICATED"),
        ({"Authorization": "Bearer wrong"}, 401, "UNAUTHENTICATED"),
        ({"Authorization": f"Basic {TOKEN}"}, 401, "UNAUTHENTICATED"),
        ({**BEARER, "Host": "evil.example"}, 400, "INVALID"),
        ({**BEARER, "Host": "127.0.0.1.evil.example:7180"}, 400, "INVALID"),
    ],
)
async def test_who_may_not_call_is_told_what_to_do(
    tmp_path: Path, headers: dict[str, str], status: int, code: str
) -> None:
    async with serving(tmp_path) as served:
        check_problem(await ask(served, "GET", "/v1/volumes", headers=headers), status, code)
        open_answer = await ask(served, "GET", "/healthz", headers={})
        assert open_answer.json() == {"status": "alive", "cluster_id": CLUSTER}


async def test_open_pages_need_no_token_and_fetch_nothing_from_elsewhere(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        page = await ask(served, "GET", "/docs/", headers={})
        assert page.status_code == 200
        assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.text)
        assert "/v1/volumes/{reference}" in page.text
        schema = (await ask(served, "GET", "/docs/openapi.json", headers={})).json()
        assert schema["openapi"].startswith("3.1")
        assert {"get", "post"} <= set(schema["paths"]["/v1/volumes"])
        ready = await ask(served, "GET", "/readyz", headers={})
        assert ready.json()["status"] == "ready"
        metrics = await ask(served, "GET", "/metrics", headers={})
        assert 'pureflash_volumes{state="healthy"} 0.0' in metrics.text
        assert metrics.headers["content-type"].count("charset") == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/nothing", None, 404, "NOT_FOUND"),
        ("GET", "/v1/volumes/none", None, 404, "NOT_FOUND"),
        ("GET", "/v1/volumes/" + "9" * 400, None, 404, "NOT_FOUND"),
        # Python itself refuses to read a number of more than 4,300 digits.
        ("GET", "/v1/volumes/" + "9" * 5000, None, 404, "NOT_FOUND"),
        ("GET", "/v1/stores/" + "9" * 5000, None, 404, "NOT_FOUND"),
        ("GET", "/v1/exports/" + "9" * 5000, None, 404, "NOT_FOUND"),
        ("GET", "/v1/jobs/" + "9" * 5000, None, 404, "NOT_FOUND"),
        ("GET", "/v1/volumes/%D9%A1", None, 404, "NOT_FOUND"),  # an Arabic digit is no id
        ("GET", "/v1/volumes/%00", None, 404, "NOT_FOUND"),
        ("GET", "/v1/volumes/%FF%FE", None, 400, "INVALID"),
        ("GET", "/v1/volumes/%ED%A0%80", None, 400, "INVALID"),  # half a surrogate pair
        ("GET", "/v1/volumes/%zz", None, 400, "INVALID"),
        ("GET", "/v1/volumes/v1%", None, 400, "INVALID"),
        ("GET", "/v1/jobs/%D9%A1", None, 404, "NOT_FOUND"),
        ("GET", "/v1/jobs/1_0", None, 404, "NOT_FOUND"),
        ("GET", "/docs/none", None, 404, "NOT_FOUND"),
        ("GET", "/v1/volumes?%FF=1", None, 400, "INVALID"),
        ("GET", "/v1/volumes?limit=%F", None, 400, "INVALID"),
        ("GET", "/v1/volumes?limit=1&limit=2", None, 400, "INVALID"),
        ("GET", "/v1/volumes?cursor=" + "9" * 5000, None, 400, "INVALID"),
        ("GET", "/v1/volumes?limit=1001", None, 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":' + "9" * 5000 + "}", 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":1e400}', 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":true}', 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":' + "[" * 100_000, 400, "INVALID"),
        ("POST", "/v1/volumes", '{"colour":' + "[" * 100_000, 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"\\ud800","size_bytes":4096}', 400, "INVALID"),
        ("POST", "/v1/volumes", "\xff\xfe", 400, "INVALID"),
        ("POST", "/v1/volumes", b"\xff\xfe", 400, "INVALID"),
        ("POST", "/v1/volumes", b'{"name":"\xff","size_bytes":4096}', 400, "INVALID"),
        ("POST", "/v1/volumes", b'{"na\xffme":"v1","size_bytes":4096}', 400, "INVALID"),
        ("POST", "/v1/volumes", b'{"name":"\xed\xa0\x80","size_bytes":4096}', 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":4096}'.encode("utf-16"), 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":NaN}', 400, "INVALID"),
        ("POST", "/v1/volumes", b"", 400, "INVALID"),
        ("POST", "/v1/volumes/v1/verify", b"\xff", 400, "INVALID"),
        ("POST", "/v1/exports", '{"kind":"nfs","volume":"v1"}', 404, "NOT_FOUND"),
        ("POST", "/v1/stores/none/exited", '{"incarnation":1}', 404, "NOT_FOUND"),
        ("GET", "/v1/jobs/99", None, 404, "NOT_FOUND"),
        ("GET", "/v1/stores/none", None, 404, "NOT_FOUND"),
        ("DELETE", "/v1/exports/none", None, 404, "NOT_FOUND"),
        ("PUT", "/v1/volumes", "{}", 405, "UNSUPPORTED"),
        ("POST", "/v1/volumes", "{", 400, "INVALID"),
        ("POST", "/v1/volumes", "[]", 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"v1"}', 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":"5G"}', 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":4096,"colour":1}', 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":0}', 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":-4096}', 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":4097}', 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"V 1","size_bytes":4096}', 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"17","size_bytes":4096}', 400, "INVALID"),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":9007199254740992}', 413, "LIMIT"),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":4096,"replicas":3}', 503, "UNAVAILABLE"),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":4096,"replicas":0}', 400, "INVALID"),
        (
            "POST",
            "/v1/volumes",
            '{"name":"v1","size_bytes":4096,"shard_size_bytes":3221225472}',
            400,
            "INVALID",
        ),
        ("POST", "/v1/volumes", '{"name":"v1","size_bytes":1099511627776}', 503, "UNAVAILABLE"),
        ("POST", "/v1/volumes", " " * (1 << 20) + "{}", 413, "LIMIT"),
        ("GET", "/v1/volumes?limit=0", None, 400, "INVALID"),
        ("GET", "/v1/volumes?cursor=x", None, 400, "INVALID"),
    ],
)
async def test_bad_input_is_answered_with_a_problem(
    tmp_path: Path, method: str, path: str, body: str | bytes | None, status: int, code: str
) -> None:
    async with serving(tmp_path) as served:
        headers = {**BEARER, "Content-Type": "application/json"}
        answer = await ask(served, method, path, headers=headers, content=body)
        check_problem(answer, status, code)
        assert len(answer.content) < 4096, "what was sent is not sent back at length"
        assert (await ask(served, "GET", "/v1/volumes")).json() == {"items": [], "next": None}
        assert not [line for line in served.log.lines if line[0] == "ERROR"]


@pytest.mark.parametrize(
    ("method", "path", "header", "value"),
    [
        ("POST", "/v1/volumes", "Idempotency-Key", b"k\xff"),
        ("POST", "/v1/volumes", "Idempotency-Key", b"two words"),
        ("POST", "/v1/volumes", "Idempotency-Key", b""),
        ("POST", "/v1/volumes", "Idempotency-Key", b"k" * 129),
        ("PATCH", "/v1/volumes/v1", "If-Match", b"\xff"),
        ("PATCH", "/v1/volumes/v1", "If-Match", b'"3'),
        ("PATCH", "/v1/volumes/v1", "If-Match", b'""3""'),
        ("PATCH", "/v1/volumes/v1", "If-Match", b'W/"3"'),
        ("GET", "/v1/events", "Last-Event-ID", b"\xff"),
        ("GET", "/v1/events", "Last-Event-ID", b"-1"),
        ("GET", "/v1/events", "Last-Event-ID", b"9" * 5000),
        ("GET", "/v1/volumes", "Host", b"localhost:\xb2"),  # a digit, says Python
        ("GET", "/v1/volumes", "Host", b"\xff"),
    ],
)
async def test_a_header_that_is_none_is_answered_with_a_problem(
    tmp_path: Path, method: str, path: str, header: str, value: bytes
) -> None:
    async with serving(tmp_path) as served:
        headers = {b"Authorization": BEARER["Authorization"].encode(), header.encode(): value}
        body = None if method == "GET" else b'{"name":"v1","size_bytes":4096}'
        async with httpx2.AsyncClient(trust_env=False, timeout=30, verify=NO_TLS) as client:
            url = f"http://{served.address}{path}"
            answer = await client.request(method, url, headers=headers, content=body)
        problem = check_problem(answer, 400, "INVALID")
        assert len(problem["detail"]) < 600
        assert (await ask(served, "GET", "/v1/volumes")).json() == {"items": [], "next": None}


async def speak(served: Served, request: bytes) -> bytes:
    """Send bytes to the server; give all that it answers until it closes."""
    host, port = served.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    told = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    await writer.wait_closed()
    return told


@pytest.mark.parametrize("name", ["Host", "Authorization", "Content-Type", "If-Match"])
async def test_a_header_that_is_there_twice_is_answered_with_a_problem(
    tmp_path: Path, name: str
) -> None:
    async with serving(tmp_path) as served:
        headers = {"Host": "127.0.0.1", **BEARER, "Content-Type": "x/y", "If-Match": "1"}
        lines = [f"{one}: {value}" for one, value in (*headers.items(), (name, headers[name]))]
        head = "\r\n".join(["GET /v1/volumes HTTP/1.1", "Connection: close", *lines, "", ""])
        told = await speak(served, head.encode())
        assert told.startswith(b"HTTP/1.1 400 ")
        assert f"the header '{name.lower()}' came 2 times".encode() in told


@pytest.mark.parametrize(
    ("stated", "sent", "said"),
    [
        (b"Content-Length: 100", b'{"name":', b"did not come within 0.05 s"),
        (b"Transfer-Encoding: chunked", b"zz\r\n", b"ended in the middle"),
        (b"Transfer-Encoding: chunked", b"1\r\n{\r\n", b"did not come within 0.05 s"),
    ],
)
async def test_a_body_that_does_not_come_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: bytes, sent: bytes, said: bytes
) -> None:
    monkeypatch.setattr("pureflash.api.bodies.BODY_S", 0.05)
    async with serving(tmp_path) as served:
        head = b"POST /v1/volumes HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        head += f"Authorization: Bearer {TOKEN}\r\n".encode() + stated + b"\r\n\r\n"
        told = await speak(served, head + sent)
        assert told.startswith(b"HTTP/1.1 400 ")
        assert b"application/problem+json" in told
        assert said in told


async def test_a_repeated_request_with_its_key_is_carried_out_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.store(1):
        headers = {**BEARER, "Idempotency-Key": "k1"}
        body = {"name": "v1", "size_bytes": GIB}
        answers = await asyncio.gather(
            *(ask(served, "POST", "/v1/volumes", headers=headers, json=body) for _ in range(3))
        )
        assert [answer.status_code for answer in answers] == [201] * 3
        assert len({answer.json()["id"] for answer in answers}) == 1
        other = {**body, "size_bytes": 2 * GIB}
        refused = await ask(served, "POST", "/v1/volumes", headers=headers, json=other)
        check_problem(refused, 400, "INVALID")
        again = await ask(served, "POST", "/v1/volumes", json=body)
        check_problem(again, 409, "ALREADY_EXISTS")


async def test_a_dry_run_checks_and_changes_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.store(1):
        wish = CreateVolume(name="v1", size_bytes=GIB, dry_run=True)
        assert (await served.call("create_volume", wish)).name == "v1"
        assert await served.call("volumes") == []


async def test_lists_are_paged_by_id(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.store(1):
        for number in range(5):
            wish = CreateVolume(name=f"v{number}", size_bytes=4096)
            await served.call("create_volume", wish)
        seen: list[str] = []
        path = "/v1/volumes?limit=2"
        for _ in range(3):
            page = (await ask(served, "GET", path)).json()
            seen += [volume["name"] for volume in page["items"]]
            path = f"/v1/volumes?limit=2&cursor={page['next']}"
        assert page["next"] is None
        assert seen == [f"v{number}" for number in range(5)]


async def test_events_tell_what_changed_and_can_be_resumed(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.store(1):
        await served.call("create_volume", CreateVolume(name="v1", size_bytes=4096))

        def read(after: int, count: int) -> list[Any]:
            with served.api() as api:
                stream = api.events(after=after)
                return [next(stream) for _ in range(count)]

        first = await asyncio.to_thread(read, 0, 3)
        assert ("volume.changed", "v1") in [(event.kind, event.subject) for event in first]
        ids = [event.id for event in first]
        assert ids == sorted(ids)
        rest = await asyncio.to_thread(read, ids[0], 2)
        assert rest == first[1:]


async def test_an_agent_without_the_token_or_of_another_cluster_is_refused(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as served:
        node, link = served.make_store(1)
        link._token = "wrong"
        # The link's log says when it has been refused: nothing else tells of a try that failed.
        refused = asyncio.Event()
        served.log.on_line = lambda _, event: refused.set() if event == "agent.lost" else None
        task = asyncio.create_task(link.run())
        await asyncio.wait_for(refused.wait(), 10)
        assert not link.registered.is_set()
        assert not served.conductor.view().stores
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        asyncio.get_running_loop().remove_reader(node.fileno())
        node.close()
        with served.api("wrong") as api, pytest.raises(SecurityError):
            await asyncio.to_thread(api.cluster)


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("not json", Code.INVALID),
        ("{}", Code.INVALID),
        (b"\xff\xfe", Code.INVALID),
        (STRANGER.encode(), Code.INVALID),  # the right words in a binary frame
        ('{"type":"overthrow","v":1,"id":1,"term":0}', Code.INVALID),
        ('{"type":"heartbeat","v":1,"id":1,"term":0}', Code.UNAUTHENTICATED),
        ('{"type":"heartbeat","v":2,"id":1,"term":0}', Code.UNSUPPORTED),
        ('{"type":"heartbeat","v":1,"id":1,"term":0,"new":' + "[" * 100_000, Code.INVALID),
        ('{"type":"heartbeat","v":1,"id":1,"term":0,"new":"' + " " * (5 << 20), Code.LIMIT),
        (STRANGER, Code.WRONG_CLUSTER),
    ],
)
async def test_an_agent_that_talks_nonsense_is_answered_and_disconnected(
    tmp_path: Path, frame: str | bytes, code: Code
) -> None:
    from websockets.asyncio.client import connect

    async with serving(tmp_path) as served:
        url = f"ws://{served.address}/v1/agent"
        async with connect(url, additional_headers=BEARER, proxy=None) as socket:
            await socket.send(frame)
            answer = json.loads(await asyncio.wait_for(socket.recv(), 10))
            assert answer["type"] == "refused"
            assert Code(answer["code"]) is code, answer
            assert answer["next_step"]
            assert len(answer["message"]) < 1024, "what was sent is not sent back at length"
            await asyncio.wait_for(socket.wait_closed(), 10)
        assert not [line for line in served.log.lines if line[0] == "ERROR"]
        assert not served.conductor.view().gateways


async def test_an_agent_that_says_nothing_is_disconnected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from websockets.asyncio.client import connect

    monkeypatch.setattr("pureflash.api.agent_socket.REGISTER_S", 0.05)
    async with serving(tmp_path) as served:
        url = f"ws://{served.address}/v1/agent"
        async with connect(url, additional_headers=BEARER, proxy=None) as socket:
            answer = json.loads(await asyncio.wait_for(socket.recv(), 10))
            assert Code(answer["code"]) is Code.TIMED_OUT
            await asyncio.wait_for(socket.wait_closed(), 10)


async def test_half_a_head_of_a_request_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pureflash.api.server.HEADER_MS", 200)
    async with serving(tmp_path) as served:
        host, port = served.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /v1/volumes HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        told = await asyncio.wait_for(reader.read(), 10)
        assert told.split(b"\r\n")[0] in (b"", b"HTTP/1.1 408 Request Timeout")
        writer.close()
        await writer.wait_closed()


async def test_more_idle_connections_than_a_backlog_keep_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pureflash.api.server.HEADER_MS", 600_000)
    async with serving(tmp_path) as served:
        host, port = served.address.split(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
        try:
            answer = await asyncio.wait_for(ask(served, "GET", "/v1/volumes"), 25)
            assert answer.status_code == 200
        finally:
            for _, writer in idle:
                writer.close()
            await asyncio.gather(*(writer.wait_closed() for _, writer in idle))


async def test_an_export_without_a_gateway_is_refused_and_the_cluster_view_is_whole(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as served, served.store(1):
        await served.call("create_volume", CreateVolume(name="v1", size_bytes=GIB))
        with pytest.raises(PureFlashError) as caught:
            await served.call("create_export", CreateExport(kind="nbd", volume="v1"))
        assert caught.value.code is Code.UNAVAILABLE
        seen = await served.call("cluster")
        assert seen.state == "healthy"
        assert seen.volumes_by_state == {"healthy": 1}
        assert seen.capacity.promised_bytes == GIB
        assert seen.capacity.usable_bytes == 10 * GIB * 95 // 100
        assert [disk.state for disk in await served.call("disks")] == ["ok"]
        lines = await served.call("explain_volume", "v1")
        assert lines[1].subject == "v1/0"
        assert "primary on s1" in lines[1].reason


async def test_a_server_that_is_not_there_is_named_with_its_source() -> None:
    from pureflash.client.api import Api

    with Api("127.0.0.1:1", "t", source="--server") as api, pytest.raises(PureFlashError) as caught:
        await asyncio.to_thread(api.cluster)
    assert caught.value.code is Code.UNAVAILABLE
    assert "127.0.0.1:1 (from --server)" in caught.value.message
    assert "pf up" in caught.value.next_step
