"""Changes whose answer does not come: what the caller is told, what a repetition does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from tests.support.server import TOKEN, serving
from tests.support.world import GIB
from tests.unit.test_api import BEARER, ask, check_problem
from tests.unit.test_commands import pf

from pureflash.api.idempotency import KEYS_KEPT, SHARDS_KEPT_MAX, Idempotency
from pureflash.cli.jobs import wait_for_job
from pureflash.cli.outcome import CommandProblem, Exit
from pureflash.client import api as api_module
from pureflash.client.api import TIMEOUT_S, Api
from pureflash.errors import CallerError, ClusterError, Code, PureFlashError
from pureflash.model.rest import (
    CreateExport,
    CreateVolume,
    ForceAccept,
    JobView,
    RecoverConfig,
)

Call = Callable[[Api], object]
CHANGES: list[tuple[Call, str]] = [
    (lambda a: a.create_volume(CreateVolume(name="v1", size_bytes=4096)), "pf volume list"),
    (lambda a: a.resize_volume("v1", size_bytes=8192), "pf volume show v1"),
    (lambda a: a.delete_volume("v1"), "pf job list"),
    (lambda a: a.verify_volume("v1"), "pf job list"),
    (lambda a: a.force_accept("v1", ForceAccept(shard=0, store="s1", by="me")), "pf job list"),
    (lambda a: a.recover_config(RecoverConfig(by="me")), "pf status"),
    (lambda a: a.attach_volume("v1"), "pf volume show v1"),
    (lambda a: a.create_export(CreateExport(kind="nbd", volume="v1")), "pf export list"),
    (lambda a: a.delete_export("v1"), "pf export list"),
    (lambda a: a.store_exited("s1", incarnation=1), "pf store list"),
]
QUESTIONS: list[Call] = [
    lambda a: a.cluster(),
    lambda a: a.volumes(),
    lambda a: a.volume("v1"),
    lambda a: a.explain_volume("v1"),
    lambda a: a.jobs(),
    lambda a: a.create_volume(CreateVolume(name="v1", size_bytes=4096, dry_run=True)),
    lambda a: a.force_accept("v1", ForceAccept(shard=0, store="s1", by="me", dry_run=True)),
    lambda a: a.recover_config(RecoverConfig(by="me", dry_run=True)),
    lambda a: a.attach_volume("v1", is_read_only=True),
    lambda a: a.renew_attach("v1", "00", timeout_s=1),
]
Kinds = list[type[httpx2.TransportError]]
NOT_SENT: Kinds = [httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout]
LATE: Kinds = [httpx2.ReadTimeout, httpx2.WriteTimeout]
BROKEN: Kinds = [httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError, httpx2.CloseError]


class Wire:
    """A transport that does what it is told, one deed per request, the last for ever after."""

    def __init__(self, *deeds: type[httpx2.TransportError] | httpx2.Response) -> None:
        self.deeds = list(deeds)
        self.seen: list[httpx2.Request] = []
        self.waits: list[float] = []
        self.now_s = 0.0
        self.takes_s = 0.0

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.seen.append(request)
        self.waits.append(request.extensions["timeout"]["read"])
        self.now_s += self.takes_s
        deed = self.deeds.pop(0) if len(self.deeds) > 1 else self.deeds[0]
        if isinstance(deed, httpx2.Response):
            return deed
        raise deed("broken")

    @property
    def keys(self) -> list[str | None]:
        return [request.headers.get("Idempotency-Key") for request in self.seen]

    def api(self) -> Api:
        transport = httpx2.MockTransport(self)
        return Api("fake:1", "token", transport=transport, clock=lambda: self.now_s)


def problem(code: str, status: int) -> httpx2.Response:
    fields = {"type": "about:blank", "title": code, "status": status, "code": code}
    fields |= {"detail": "a volume named v1 exists", "request_id": "r", "next_step": "x"}
    return httpx2.Response(status, content=json.dumps(fields))


def fails(wire: Wire, call: Call) -> ClusterError:
    with wire.api() as api, pytest.raises(ClusterError) as caught:
        call(api)
    return caught.value


@pytest.mark.parametrize(("change", "look"), CHANGES)
def test_a_change_that_was_sent_and_not_answered_has_an_unknown_outcome(
    change: Call, look: str
) -> None:
    for kind in LATE:
        wire = Wire(kind)
        found = fails(wire, change)
        assert found.code is Code.TIMED_OUT
        assert "may have been carried out" in found.message
        assert found.next_step is not None
        assert look in found.next_step
        assert "again is safe" in found.next_step
        assert len(wire.seen) == 1, "its time is used up"
        assert wire.keys[0]
    for kind in BROKEN:
        wire = Wire(kind)
        assert fails(wire, change).code is Code.TIMED_OUT
        assert len(wire.seen) == 2
        assert wire.keys[0] == wire.keys[1] is not None


@pytest.mark.parametrize(("change", "look"), CHANGES)
def test_a_change_that_cannot_have_been_sent_is_not_done(change: Call, look: str) -> None:
    for kind in NOT_SENT:
        wire = Wire(kind)
        found = fails(wire, change)
        assert found.code is Code.UNAVAILABLE
        assert look not in (found.next_step or "")
        assert len(wire.seen) == 1


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_changes_nothing_is_never_unknown(question: Call) -> None:
    for kind in [*NOT_SENT, *LATE, *BROKEN]:
        wire = Wire(kind)
        assert fails(wire, question).code is Code.UNAVAILABLE
        assert wire.keys == [None]


def test_a_second_sending_that_is_answered_is_the_answer() -> None:
    wire = Wire(httpx2.ReadError, httpx2.Response(204))
    with wire.api() as api:
        api.delete_export("v1")
    assert len(wire.seen) == 2
    assert wire.keys[0] == wire.keys[1]


def test_a_second_sending_that_is_refused_leaves_the_first_unknown() -> None:
    """A conductor that was started again in between knows the volume, not the key."""
    wire = Wire(httpx2.ReadError, problem("ALREADY_EXISTS", 409))
    found = fails(wire, CHANGES[0][0])
    assert found.code is Code.TIMED_OUT
    assert "a volume named v1 exists (ALREADY_EXISTS)" in str(found.next_step)


def test_both_sendings_share_one_time() -> None:
    wire = Wire(httpx2.ReadError)
    wire.takes_s = TIMEOUT_S - 4
    assert fails(wire, CHANGES[0][0]).code is Code.TIMED_OUT
    assert wire.waits == [TIMEOUT_S, 4]
    wire = Wire(httpx2.ReadError)
    wire.takes_s = TIMEOUT_S
    assert fails(wire, CHANGES[0][0]).code is Code.TIMED_OUT
    assert len(wire.seen) == 1


async def test_a_change_that_is_done_later_is_not_called_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The conductor waits for a store that has not come; the command's patience ends before."""
    async with serving(tmp_path, settle_timeout_s=30) as served:
        monkeypatch.setenv("PF_SERVER", served.address)
        monkeypatch.setenv("PF_TOKEN", TOKEN)
        monkeypatch.setattr(api_module, "TIMEOUT_S", 0.5)
        async with served.store(1) as node:
            node.create_replica = lambda *_: None  # type: ignore[method-assign]
            status = await asyncio.to_thread(pf, "volume", "create", "v1", "1G")
            assert status == Exit.UNAVAILABLE
            error = capsys.readouterr().err
            assert "(TIMED_OUT)" in error
            assert "`pf volume list` shows whether there is a v1" in error
            assert [volume.name for volume in served.conductor.view().volumes.values()] == ["v1"]


def test_a_job_whose_conductor_goes_away_is_said_to_go_on() -> None:
    fields = {"id": 7, "kind": "volume.delete", "target": "v1", "state": "running", "done": 0}
    fields |= {"total": 1, "unit": "shards", "reason": "", "created_at": "", "finished_at": None}
    job = msgspec.convert(fields, JobView)
    with Wire(httpx2.ConnectError).api() as api, pytest.raises(CommandProblem) as caught:
        wait_for_job(api, job)
    assert caught.value.exit_status is Exit.UNAVAILABLE
    assert "was begun as job 7 and goes on" in caught.value.message
    assert "pf job show 7" in str(caught.value.next_step)


REQUESTS: list[tuple[str, str, dict[str, Any] | None, int]] = [
    ("PATCH", "/v1/volumes/v1", {"size_bytes": 2 * GIB}, 200),
    ("POST", "/v1/volumes/v1/attach", {}, 200),
    ("POST", "/v1/volumes/v1/verify", None, 202),
    ("DELETE", "/v1/volumes/v1", None, 202),
    ("POST", "/v1/stores/s1/exited", {"incarnation": 1}, 204),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), REQUESTS)
async def test_every_change_is_carried_out_once_for_its_key(
    tmp_path: Path, method: str, path: str, body: dict[str, Any] | None, status: int
) -> None:
    async with serving(tmp_path) as served, served.store(1):
        await served.call("create_volume", CreateVolume(name="v1", size_bytes=GIB))
        headers = {**BEARER, "Idempotency-Key": "k1"}
        first = await ask(served, method, path, headers=headers, json=body)
        assert first.status_code == status, first.text
        again = await ask(served, method, path, headers=headers, json=body)
        assert (again.status_code, again.content) == (status, first.content)
        epochs = [volume.attach_epoch for volume in served.conductor.view().volumes.values()]
        assert max(epochs, default=0) <= 2, "one attach, not two"
        other = await ask(served, "POST", "/v1/volumes/v2/verify", headers=headers)
        check_problem(other, 400, "INVALID")


async def test_every_change_documents_its_key(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        schema = (await ask(served, "GET", "/docs/openapi.json", headers={})).json()
    without = {
        (method, path)
        for path, methods in schema["paths"].items()
        for method, facts in methods.items()
        if method != "get"
        and "Idempotency-Key" not in [one["name"] for one in facts.get("parameters", [])]
    }
    assert without == {("post", "/v1/volumes/{reference}/renew")}, "which changes nothing"


@asynccontextmanager
async def losing_answers(address: str, *, count: int) -> AsyncIterator[str]:
    """Stand before a server and drop the connection instead of its first `count` answers."""
    host, _, port = address.rpartition(":")
    left = [count]

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(1 << 16):
            writer.write(part)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        asking = asyncio.create_task(forward(reader, back))
        answer = await there.read(1 << 16)
        if left[0]:
            left[0] -= 1
        else:
            writer.write(answer)
            await writer.drain()
        asking.cancel()
        back.close()
        writer.close()

    server = await asyncio.start_server(pump, "127.0.0.1", 0)
    async with server:
        yield "{}:{}".format(*server.sockets[0].getsockname())


@pytest.mark.parametrize(("lost", "code"), [(0, None), (1, None), (2, Code.TIMED_OUT)])
async def test_a_volume_whose_answer_is_lost_is_made_once(
    tmp_path: Path, lost: int, code: Code | None
) -> None:
    wish = CreateVolume(name="v1", size_bytes=GIB)
    async with (
        serving(tmp_path) as served,
        served.store(1),
        losing_answers(served.address, count=lost) as address,
    ):

        def make() -> Code | None:
            with Api(address, TOKEN) as api:
                try:
                    api.create_volume(wish)
                except PureFlashError as problem:
                    return problem.code
            return None

        assert await asyncio.to_thread(make) is code
        assert [one.name for one in served.conductor.view().volumes.values()] == ["v1"]


async def test_a_deletion_with_its_key_is_done_once_even_if_the_name_is_taken_again(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as served, served.store(1):
        wish = CreateVolume(name="v1", size_bytes=GIB)
        await served.call("create_volume", wish)
        headers = {**BEARER, "Idempotency-Key": "k1"}
        first = await ask(served, "DELETE", "/v1/volumes/v1", headers=headers)
        assert await served.conductor.wait_for(lambda view: not view.volumes, timeout_s=10)
        await served.call("create_volume", wish)
        again = await ask(served, "DELETE", "/v1/volumes/v1", headers=headers)
        assert again.json() == first.json()
        assert len(served.conductor.view().volumes) == 1, "the new one is not deleted"


async def test_a_key_belongs_to_method_version_and_body() -> None:
    kept = Idempotency()

    async def make() -> int:
        return 1

    assert await kept.once("k", request=("DELETE", "/v1/a"), make=make) == 1
    for request in (("POST", "/v1/a"), ("DELETE", "/v1/b"), ("DELETE", "/v1/a", "3")):
        with pytest.raises(CallerError):
            await kept.once("k", request=request, make=make)


async def test_answers_are_kept_within_bounds_and_running_ones_always() -> None:
    kept = Idempotency()
    gate = asyncio.Event()
    made: list[str] = []

    async def slow() -> str:
        await gate.wait()
        made.append("slow")
        return "slow"

    async def quick() -> str:
        return "quick"

    running = asyncio.create_task(kept.once("slow", request=("POST", "/"), make=slow))
    for number in range(KEYS_KEPT + 10):
        await kept.once(f"k{number}", request=("POST", "/"), make=quick)
    assert len(kept) == KEYS_KEPT
    again = asyncio.create_task(kept.once("slow", request=("POST", "/"), make=slow))
    gate.set()
    assert await running == await again == "slow"
    assert made == ["slow"]

    class Large:
        shards = (None,) * (SHARDS_KEPT_MAX // 3)

    async def large() -> Large:
        return Large()

    for number in range(10):
        await kept.once(f"l{number}", request=("POST", "/"), make=large)
    assert len(kept) <= 4, "the newest of them, with nothing beside"


async def test_what_failed_is_tried_anew() -> None:
    kept = Idempotency()
    fails_left = [1]

    async def make() -> str:
        if fails_left:
            fails_left.pop()
            raise PureFlashError(Code.BUSY, "full")
        return "done"

    with pytest.raises(PureFlashError):
        await kept.once("k", request=("POST", "/"), make=make)
    assert await kept.once("k", request=("POST", "/"), make=make) == "done"
