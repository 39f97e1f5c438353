"""Bytes from outside that are no UTF-8, or nested without end, wherever we decode JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from tests.support.fake_core import FakeGateway
from tests.support.world import ListLog

from pureflash.client.api import Api, _error_of
from pureflash.errors import CallerError, Code, MediaError, PureFlashError, SoftwareError
from pureflash.gateway.exports import Exports
from pureflash.model.layout import known_disk_file
from pureflash.model.messages import decode_down, decode_up
from pureflash.process.allegiance import Allegiance
from pureflash.process.known_disks import UNKNOWN, recall

REGISTER = b'{"type":"register_gateway","v":1,"id":1,"term":0,"cluster_id":%s}'
REGISTERED = b'{"type":"registered","v":1,"id":1,"term":0,"lineage":%s}'
VALUES = [
    b'"\xff\xfe"',
    b'"\xed\xa0\x80"',
    b'"\\ud800"',
    b"[" * 9_000,
    b'{"a":' * 9_000,
    b"NaN",
    b"",
]
IDS = ["no UTF-8", "a surrogate as UTF-8", "half a pair", "lists", "objects", "NaN", "nothing"]


@pytest.mark.parametrize("value", VALUES, ids=IDS)
@pytest.mark.parametrize(
    ("decode", "form"), [(decode_up, REGISTER), (decode_down, REGISTERED)], ids=["up", "down"]
)
def test_a_message_that_cannot_be_read_is_invalid(
    decode: Callable[[bytes], object], form: bytes, value: bytes
) -> None:
    with pytest.raises(CallerError, match="not an agent message") as caught:
        decode(form % value)
    assert caught.value.code is Code.INVALID
    assert len(caught.value.message) < 1024


@pytest.mark.parametrize("value", VALUES, ids=IDS)
def test_kept_exports_that_cannot_be_read_are_said_and_none_is_offered(
    tmp_path: Path, value: bytes
) -> None:
    path, log = tmp_path / "exports.json", ListLog()
    path.write_bytes(b'[{"id":1,"name":%s}]' % value)
    gateway = FakeGateway(cluster_id=bytes(16))
    Exports(gateway, path=path, log=log).restore()
    assert gateway.volumes == {}
    assert [line[:2] for line in log.lines] == [("ERROR", "exports.unreadable")]
    gateway.close()


@pytest.mark.parametrize("value", VALUES, ids=IDS)
def test_records_of_a_store_that_cannot_be_read_are_refused_and_not_ignored(
    tmp_path: Path, value: bytes
) -> None:
    followed = tmp_path / "conductor.json"
    followed.write_bytes(b'{"lineage":%s}' % value)
    with pytest.raises(MediaError, match="cannot be read"):
        Allegiance(followed)
    known_disk_file(tmp_path, 0).write_bytes(b'{"path":%s}' % value)
    assert recall(tmp_path, 0) is UNKNOWN


@pytest.mark.parametrize("value", VALUES, ids=IDS)
def test_an_answer_that_cannot_be_read_is_named_as_such(value: bytes) -> None:
    body = b'{"items":%s}' % value
    problem = _error_of(httpx2.Response(500, content=body))
    assert isinstance(problem, PureFlashError)
    assert "without an explanation" in problem.message
    with Api("127.0.0.1:1", "t", source="the test") as api:
        api._http = httpx2.Client(
            base_url="http://127.0.0.1:1",
            transport=httpx2.MockTransport(lambda _: httpx2.Response(200, content=body)),
        )
        with pytest.raises(SoftwareError, match="this version cannot read"):
            api.volumes()
