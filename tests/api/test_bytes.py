"""The running server and any bytes: as body, path, query, headers, and as frames of an agent.

schemathesis (`test_schema.py`) makes requests of what JSON and HTTP can say. Here the bytes are
below that: no UTF-8, half a percent-encoding, numbers of thousands of digits, JSON that is cut,
doubled or nested, bodies of another length than stated. For every operation of the document: no
answer is a bug of ours, and each error is a whole problem. What is no HTTP at all the server
refuses itself, with a bare 400, and our code does not see it. `PF_API_SEED` and `PF_API_EXAMPLES`
as there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tests.api.conftest import Operation, Running
from tests.support.server import TOKEN

from pureflash.model.rest import CreateExport, CreateVolume

SEED: Final = int(os.environ.get("PF_API_SEED", "2026"))
EXAMPLES: Final = int(os.environ.get("PF_API_EXAMPLES", "25"))
"""Of each operation."""
FIXED: Final = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
BODIES: Final[dict[str, dict[str, Any]]] = {
    "POST /v1/volumes": {"name": "v2", "size_bytes": 4096, "replicas": 1, "dry_run": True},
    "PATCH /v1/volumes/{reference}": {"size_bytes": 8192},
    "POST /v1/volumes/{reference}/force-accept": {
        "index": 0, "replica": 0, "reason": "x", "person": "y", "dry_run": True,
    },
    "POST /v1/conductor/recover-config": {"person": "y", "reason": "x", "dry_run": True},
    "POST /v1/volumes/{reference}/attach": {"is_read_only": True},
    "POST /v1/volumes/{reference}/renew": {"ticket": "00" * 68},
    "POST /v1/stores/{reference}/exited": {"incarnation": 1},
    "POST /v1/exports": {"kind": "nbd", "volume": "v1", "transport": "unix", "read_only": True},
}  # fmt: skip
"""What each operation takes, or nearly: the bytes that are then mutated."""
FOR_A_WISH: Final = {"UNAVAILABLE", "NO_SPACE", "TIMED_OUT"}
"""Codes of 5xx that a request in good form may get, from a cluster of one store."""
HEADERS: Final = (
    b"Idempotency-Key", b"If-Match", b"Last-Event-ID", b"Authorization", b"Host", b"Content-Type",
    b"Accept", b"Cookie", b"X-Request-ID", b"Content-Encoding", b"Origin", b"Expect",
)  # fmt: skip
VALUES: Final = (
    b"NaN", b"-Infinity", b"1e400", b"-0", b"9" * 5000, b"0." + b"1" * 5000, b"9007199254740993",
    b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\\u0000"',
    b'"%s"' % (b"x" * 5000),
    b"[" * 9_000, b'{"a":' * 5_000, b"true", b"null", b"", b"[]", b"{}", b'"', b"\x00", b"0x10",
)  # fmt: skip
"""What may stand for a value in a body: hardly any of it is one."""
URL: Final = re.compile(rb"[A-Za-z0-9._~%/?&=-]*")
"""Characters that the server lets through for certain; it has its own mind about the others."""
OBSOLETE: Final = bytes(byte | 0x80 if byte < 0x20 or byte == 0x7F else byte for byte in range(256))
"""Control characters, which the server refuses in a header, as bytes that it lets through."""
TEXT: Final = st.one_of(
    st.sampled_from([b"v1", b"s1", b"1", b"2", b"v2"]),
    st.binary(max_size=12),
    st.sampled_from([b"%ff", b"%", b"%zz", b"%00", b"%2f", b"..", b"%ed%a0%80", b"1_0", b"%D9%A1"]),
)


def as_it_is(data: bytes) -> bytes:
    """Leave also what a URL cannot hold."""
    return data


def percent(data: bytes) -> bytes:
    """Encode what a URL cannot hold, and no percent sign: half an encoding stays one."""
    return re.sub(rb"[^A-Za-z0-9._~%-]", lambda match: b"%%%02x" % match[0][0], data)


@st.composite
def bodies(draw: st.DrawFn, valid: dict[str, Any]) -> bytes:
    """Make a body: mutated valid JSON, or any bytes."""
    whole = json.dumps(valid).encode()
    kind = draw(st.sampled_from(["value", "value", "insert", "cut", "double", "code", "any"]))
    if kind == "value":
        spots = list(re.finditer(rb'(?<=: )("[^"]*"|\d+|true|false|{})', whole))
        spot = draw(st.sampled_from(spots))
        return whole[: spot.start()] + draw(st.sampled_from(VALUES)) + whole[spot.end() :]
    if kind == "insert":
        at = draw(st.integers(0, len(whole)))
        return whole[:at] + draw(st.binary(min_size=1, max_size=4)) + whole[at:]
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole)))]
    if kind == "double":
        return draw(st.sampled_from([whole * 2, whole + b"\xff", whole[:-1] + b"," + whole[1:]]))
    if kind == "code":
        name = draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32", "utf-7"]))
        return whole.decode().encode(name)
    return draw(st.binary(max_size=64))


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as bytes; `is_whole`: as many bytes of body as it states, in good HTTP."""

    data: bytes
    is_whole: bool


@st.composite
def requests_of(draw: st.DrawFn, operation: Operation) -> Sent:
    """Make a request about an operation."""
    target = re.sub(
        rb"\{\w+\}",
        lambda _: draw(st.sampled_from([percent] * 5 + [as_it_is]))(draw(TEXT)) or b"v1",
        operation.path.encode(),
    )
    for name in draw(st.lists(st.sampled_from([b"limit", b"cursor", b"%ff"]), max_size=2)):
        target += b"&" if b"?" in target else b"?"
        target += name + b"=" + draw(st.sampled_from([percent] * 5 + [as_it_is]))(draw(TEXT))
    headers = {b"Host": b"127.0.0.1", b"Authorization": f"Bearer {TOKEN}".encode()}
    changed = draw(st.dictionaries(st.sampled_from(HEADERS), TEXT, max_size=2))
    without_controls = draw(st.sampled_from([OBSOLETE] * 7 + [None]))
    headers |= {name: value.strip().translate(without_controls) for name, value in changed.items()}
    body, stated = b"", None
    if operation.label in BODIES or draw(st.integers(0, 3)) == 0:
        body = draw(bodies(BODIES.get(operation.label, {"a": 1})))
        stated = len(body)
        if draw(st.integers(0, 7)) == 0:
            stated = draw(st.sampled_from([0, max(0, stated - 1), stated + 1, 1 << 21]))
        headers[b"Content-Length"] = b"%d" % stated
    lines = [b"%s %s HTTP/1.1" % (operation.method.upper().encode(), target), b"Connection: close"]
    lines += [name + b": " + value for name, value in headers.items()]
    is_http = URL.fullmatch(target) is not None and without_controls is not None
    is_whole = is_http and stated in (None, len(body)) and b"Expect" not in changed
    return Sent(b"\r\n".join(lines) + b"\r\n\r\n" + body, is_whole)


def ask(running: Running, sent: Sent) -> tuple[int, dict[str, str], bytes] | None:
    """Send a request; give status, headers and body of its answer, None for no answer.

    Of a stream of events the body is not waited for. A request that is not whole is followed by
    the end of the stream: nothing else would tell the server that no more comes.
    """
    host, port = running.served.address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        with contextlib.suppress(OSError):  # refused and closed before all of it was sent
            client.sendall(sent.data)
            if not sent.is_whole:
                client.shutdown(socket.SHUT_WR)
        with HTTPResponse(client) as response:
            try:
                response.begin()
                headers = {name.lower(): value for name, value in response.getheaders()}
                is_stream = headers.get("content-type", "").startswith("text/event-stream")
                return response.status, headers, b"" if is_stream else response.read()
            except (ConnectionError, HTTPException):
                return None


def check(running: Running, sent: Sent) -> str:
    """Send a request and check the answer; gives its code, status, or who refused it."""
    answer = ask(running, sent)
    if answer is None or "x-request-id" not in answer[1]:
        assert not sent.is_whole, (sent.data[:400], answer)
        assert answer is None or (answer[0] in (400, 413, 417) and not answer[2]), answer
        return "no HTTP"
    status, headers, body = answer
    if status < 400:
        return str(status)
    assert headers["content-type"].startswith("application/problem+json"), (sent, answer)
    problem = json.loads(body)
    assert problem["status"] == status
    assert problem["code"] == problem["title"]
    assert problem["request_id"] == headers["x-request-id"]
    assert problem["detail"], problem
    assert problem["next_step"], problem
    assert len(body) < 4096, "what was sent is not sent back at length"
    assert status < 500 or problem["code"] in FOR_A_WISH, (sent.data[:400], problem)
    return str(problem["code"])


def assert_unharmed(running: Running) -> None:
    """Check that nothing of it was a bug, and that the server goes on."""
    assert [line for line in running.served.log.lines if line[0] == "ERROR"] == []
    with running.served.api() as api:
        api.cluster()


def test_every_operation_with_a_body_has_one_to_mutate(running: Running) -> None:
    with_body = {
        label
        for label, operation in running.operations().items()
        if "requestBody" in operation.definition.raw
    }
    assert with_body == BODIES.keys()


def exercise(running: Running, operation: Operation) -> Counter[str]:
    """Send the requests of one operation; gives how often each outcome came."""
    told: Counter[str] = Counter()

    @seed(SEED)
    @FIXED
    @given(requests_of(operation))
    def send(sent: Sent) -> None:
        told[check(running, sent)] += 1

    send()
    return told


def test_no_bytes_are_a_bug_of_any_operation(running: Running) -> None:
    with running.served.api() as api:
        api.create_volume(CreateVolume(name="v1", size_bytes=4096))
        api.create_export(CreateExport(kind="nbd", volume="v1"))
    outcomes: Counter[str] = Counter()
    # What deletes comes last, so that the others find something.
    operations = sorted(running.operations().items(), key=lambda one: one[0].startswith("DELETE"))
    for label, operation in operations:
        told = exercise(running, operation)
        print(f"{label}: {dict(told)}")
        outcomes += told
    print(f"seed {SEED}, {outcomes.total()} requests: {dict(outcomes)}")
    assert {"200", "INVALID", "NOT_FOUND", "UNAUTHENTICATED", "no HTTP"} <= outcomes.keys()
    assert_unharmed(running)


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_no_value_is_a_bug_where_a_name_or_a_number_belongs(running: Running, value: bytes) -> None:
    for label, valid in BODIES.items():
        method, _, path = label.partition(" ")
        for field in valid:
            rest = {name: one for name, one in valid.items() if name != field}
            body = json.dumps(rest).encode()[:-1]
            body += b"%s%s: %s}" % (b", " if rest else b"", json.dumps(field).encode(), value)
            head = (
                f"{method} {path.replace('{reference}', 'v9')} HTTP/1.1\r\nConnection: close\r\n"
                f"Host: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            check(running, Sent(head.encode() + body, is_whole=True))
    assert_unharmed(running)


# -------------------------------------------------------------------------------------- agents --

UPGRADE: Final = (
    "GET /v1/agent HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    f"Authorization: Bearer {TOKEN}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
).encode()
REGISTER: Final = {
    "type": "register_gateway", "v": 1, "id": 1, "term": 0, "cluster_id": "00" * 16,
    "gateway": "g9", "incarnation": 1,
}  # fmt: skip
TEXT_FRAME, BINARY_FRAME, CLOSE_FRAME = 1, 2, 8


def frame(kind: int, data: bytes, *, is_last: bool = True) -> bytes:
    """Write a frame of a client. RFC 6455, 5.2; the mask is zero, which is one as well."""
    if len(data) < 126:
        size = bytes([0x80 | len(data)])
    elif len(data) <= 0xFFFF:
        size = struct.pack(">BH", 0xFE, len(data))
    else:
        size = struct.pack(">BQ", 0xFF, len(data))
    return bytes([0x80 * is_last | kind]) + size + bytes(4) + data


frames = st.builds(
    frame,
    st.sampled_from([TEXT_FRAME, TEXT_FRAME, TEXT_FRAME, BINARY_FRAME, 0, 3, CLOSE_FRAME, 9, 10]),
    st.one_of(bodies(REGISTER), bodies({**REGISTER, "type": "heartbeat", "counters": {}})),
    is_last=st.sampled_from([True, True, True, False]),
)


def converse(running: Running, data: bytes) -> bytes:
    """Send frames and then no more; give what the conductor said until it closed."""
    host, port = running.served.address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(UPGRADE)
        with client.makefile("rb") as stream:
            head = iter(stream.readline, b"\r\n")
            assert next(head).startswith(b"HTTP/1.1 101")
            assert all(head)
            said = b""
            with contextlib.suppress(OSError):  # it closes at once what is no frame
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                said = stream.read()
            return said


def test_no_frame_of_an_agent_is_a_bug(running: Running) -> None:
    told: Counter[str] = Counter()

    @seed(SEED)
    @settings(FIXED, max_examples=8 * EXAMPLES)
    @given(st.lists(frames, min_size=1, max_size=3))
    def send(sent: list[bytes]) -> None:
        said = converse(running, b"".join(sent))
        start = said.find(b'{"type":"refused"')
        if start >= 0:
            refused = json.JSONDecoder().raw_decode(said[start:].decode(errors="replace"))[0]
            assert refused["code"] != 99, refused
            assert refused["next_step"], refused
        told["refused" if start >= 0 else "closed"] += 1

    send()
    print(f"seed {SEED}: {dict(told)}")
    assert told.keys() == {"refused", "closed"}
    assert_unharmed(running)


@pytest.mark.parametrize("kind", [TEXT_FRAME, BINARY_FRAME])
def test_a_frame_that_is_no_utf8_ends_its_connection_only(running: Running, kind: int) -> None:
    whole = json.dumps(REGISTER).encode()
    for data in (b"\xff\xfe", whole.replace(b"g9", b"\xff"), whole.replace(b'"v"', b'"\xff"')):
        said = converse(running, frame(kind, data))
        if kind == BINARY_FRAME:
            assert b"binary frame" in said
        assert bytes([0x80 | CLOSE_FRAME]) in said
    assert_unharmed(running)
