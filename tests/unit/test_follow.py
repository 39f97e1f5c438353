"""Open devices follow their volume: a fake conductor, the real core, stores that come and go."""

from __future__ import annotations

import gc
import importlib
import json
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx2
import msgspec
import pytest
from tests.unit.test_core_client import (
    CLUSTER,
    PATIENCE_S,
    SHARD_BYTES,
    SIZE_BYTES,
    VOLUME_ID,
    Store,
    nowhere,
    store,
)

from pureflash.cli.measure import fill_work
from pureflash.client import follow
from pureflash.client.api import Api
from pureflash.client.cluster import Cluster
from pureflash.client.device import Device
from pureflash.client.follow import NEWS_S, PAUSE_S, Pace
from pureflash.errors import CallerError, Code
from pureflash.model.core import core_spec
from pureflash.model.messages import ShardRoute, VolumeSpec
from pureflash.model.rest import VolumeView

__all__ = ["nowhere", "store"]
core: Any = importlib.import_module("pureflash._core")
THREAD = "pureflash-follower"


def ticket(number: int) -> str:
    """Give a ticket that says how many were given before it."""
    return (struct.pack("<QQQQI", VOLUME_ID, 1, 3, 2**40 + number, 3) + bytes(32)).hex()


@dataclass
class Conductor:
    """Answers about one volume; what it said can be waited for."""

    address: str
    epoch: int = 1
    size_bytes: int = SIZE_BYTES
    is_away: bool = False
    is_deleted: bool = False
    shown: list[str] = field(default_factory=list)
    """Tickets that were shown to renew, in order."""
    renewed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def spec(self, number: int) -> VolumeSpec:
        routes = [ShardRoute(index=n, epoch=self.epoch, address=self.address) for n in range(2)]
        return VolumeSpec(
            cluster_id=CLUSTER.hex(),
            volume_id=VOLUME_ID,
            size_bytes=self.size_bytes,
            shard_size_bytes=SHARD_BYTES,
            attach_epoch=1,
            ticket=ticket(number),
            shards=tuple(routes),
        )

    def view(self) -> VolumeView:
        return VolumeView(
            id=VOLUME_ID,
            name="v1",
            size_bytes=self.size_bytes,
            replicas=1,
            shard_size_bytes=SHARD_BYTES,
            state="healthy",
            reason="",
            version=1,
            created_at="2026-01-01T00:00:00Z",
            used_bytes=0,
            attach_epoch=1,
            shards=[],
        )

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path.removeprefix("/v1/volumes/")
        answer: Any
        if path == "v1":
            answer = self.view()
        elif path == f"{VOLUME_ID}/attach":
            answer = self.spec(0)
        else:
            assert path == f"{VOLUME_ID}/renew"
            if self.is_away:
                self.renewed.release()
                raise httpx2.ConnectError("nobody listens")
            if self.is_deleted:
                self.renewed.release()
                status, title, detail = 404, "NOT_FOUND", f"there is no volume '{VOLUME_ID}'"
                problem = {"type": "about:blank", "title": title, "status": status}
                problem |= {"detail": detail, "code": title, "request_id": "r", "next_step": ""}
                return httpx2.Response(status, content=json.dumps(problem))
            self.shown.append(json.loads(request.content)["ticket"])
            answer = self.spec(len(self.shown))
            self.renewed.release()
        return httpx2.Response(200, content=msgspec.json.encode(answer))

    def wait_renewed(self) -> None:
        """Wait until it was asked for news once more."""
        assert self.renewed.acquire(timeout=PATIENCE_S)

    def connect(self) -> Cluster:
        return Cluster(Api("fake:1", "token", transport=httpx2.MockTransport(self)))


def followers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make pauses short; no thread may be left."""
    monkeypatch.setattr(follow, "PAUSE_S", 0.02)
    monkeypatch.setattr(follow, "NEWS_S", 0.06)
    assert not followers()
    yield
    assert not followers()


def test_news_are_asked_for_seldom_and_often_while_requests_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    pace = Pace(100.0)
    assert not pace.is_due(100.0 + NEWS_S - 0.01)
    assert pace.is_due(100.0 + NEWS_S)
    pace.want()
    assert not pace.is_due(100.0 + PAUSE_S - 0.01)
    assert pace.is_due(100.0 + PAUSE_S)
    pace.asked(101.0)
    assert not pace.is_due(101.0 + PAUSE_S), "asked once for what was wanted then"
    pace.count(requests=5, replies=4)
    assert not pace.is_due(101.0 + PAUSE_S), "replies come"
    pace.count(requests=9, replies=8)
    assert not pace.is_due(101.0 + PAUSE_S)
    pace.count(requests=9, replies=9)
    pace.count(requests=9, replies=9)
    assert not pace.is_due(101.0 + PAUSE_S), "nothing is open"
    pace.count(requests=10, replies=9)
    assert pace.is_due(101.0 + PAUSE_S), "open, and not one was answered"


def test_a_request_without_a_store_reaches_the_one_that_serves_later(store: Store) -> None:
    gone = Conductor("127.0.0.1:9")
    with gone.connect() as cluster, cluster.volumes.get("v1").open() as device:
        with ThreadPoolExecutor(2) as workers:
            written = workers.submit(device.pwrite, b"w" * 512, offset=512)
            read = workers.submit(device.pread, 512, 512)
            gone.wait_renewed()
            assert not written.done()
            assert not read.done()
            gone.address, gone.epoch = store.address, 2
            written.result(timeout=PATIENCE_S)
            assert read.result(timeout=PATIENCE_S) in (bytes(512), b"w" * 512)
        assert device.pread(512, 512) == b"w" * 512
    assert gone.shown[:2] == [ticket(0), ticket(1)], "each ticket is shown for the next one"


def test_a_store_that_says_nothing_is_left_for_the_one_that_serves(
    store: Store, nowhere: str
) -> None:
    conductor = Conductor(nowhere)
    with (
        conductor.connect() as cluster,
        cluster.volumes.get("v1").open() as device,
        ThreadPoolExecutor(1) as workers,
    ):
        read = workers.submit(device.pread, 0, 512)
        conductor.wait_renewed()
        conductor.address, conductor.epoch = store.address, 2
        assert read.result(timeout=PATIENCE_S) == bytes(512)


def test_a_conductor_that_is_away_is_not_missed(store: Store) -> None:
    conductor = Conductor(store.address)
    with conductor.connect() as cluster, cluster.volumes.get("v1").open() as device:
        conductor.wait_renewed()
        conductor.is_away = True
        for round_number in range(20):
            device.pwrite(bytes([round_number]) * 512, offset=0)
            assert device.pread(0, 512) == bytes([round_number]) * 512
        # The next two questions have begun and ended without an answer.
        seen = len(conductor.shown)
        while len(conductor.shown) == seen and device.news_problem is None:
            conductor.wait_renewed()
        problem = device.news_problem
        assert problem is not None
        assert problem.code is Code.UNAVAILABLE
        conductor.is_away = False
        while device.news_problem is not None:
            conductor.wait_renewed()


def test_growth_is_seen_at_once_by_who_needs_it_and_soon_by_others(store: Store) -> None:
    conductor = Conductor(store.address)
    store.content.extend(bytes(SHARD_BYTES))
    with (
        conductor.connect() as cluster,
        cluster.volumes.get("v1").open(is_read_only=True) as device,
    ):
        assert device.size_bytes == SIZE_BYTES
        conductor.size_bytes += 4096
        while device.size_bytes == SIZE_BYTES:
            conductor.wait_renewed()
        assert device.size_bytes == SIZE_BYTES + 4096
        conductor.size_bytes += 4096
        with pytest.raises(CallerError) as caught:
            device.pread(SIZE_BYTES + 4096, 8192)
        assert caught.value.code is Code.OUT_OF_RANGE
        assert device.size_bytes == SIZE_BYTES + 8192, "it has looked before it refused"


def test_whoever_ends_a_device_ends_its_thread(store: Store) -> None:
    conductor = Conductor(store.address)
    cluster = conductor.connect()
    closed = cluster.volumes.get("v1").open()
    assert len(followers()) == 1
    closed.close()
    closed.close()
    assert not followers(), "closed"

    dropped: Device | None = cluster.volumes.get("v1").open()
    assert len(followers()) == 1
    assert dropped is not None
    dropped = None
    gc.collect()
    assert not followers(), "collected"

    kept = [cluster.volumes.get("v1").open() for _ in range(2)]
    assert len(followers()) == 2
    cluster.close()
    assert not followers(), "the cluster's connection was closed"
    for device in kept:
        device.pwrite(b"k" * 512, offset=0)
        with pytest.raises(CallerError):
            device.pread(SIZE_BYTES, 512)
        device.close()


def test_a_device_that_is_closed_while_it_waits_lets_go(nowhere: str) -> None:
    conductor = Conductor(nowhere)
    with conductor.connect() as cluster:
        device = cluster.volumes.get("v1").open()
        with ThreadPoolExecutor(1) as workers:
            read = workers.submit(device.pread, 0, 512)
            conductor.wait_renewed()
            device.close()
            failed = read.exception(timeout=PATIENCE_S)
    assert getattr(failed, "code", None) is Code.CANCELLED


def test_requests_of_a_volume_that_was_deleted_end(nowhere: str) -> None:
    conductor = Conductor(nowhere)
    with conductor.connect() as cluster, cluster.volumes.get("v1").open() as device:
        with ThreadPoolExecutor(1) as workers:
            read = workers.submit(device.pread, 0, 512)
            conductor.wait_renewed()
            conductor.is_deleted = True
            failed = read.exception(timeout=PATIENCE_S)
        assert isinstance(failed, CallerError)
        assert failed.code is Code.NOT_FOUND
        with pytest.raises(CallerError, match="there is no volume"):
            device.flush()


def test_a_load_on_a_volume_follows_what_its_caller_finds(store: Store) -> None:
    conductor = Conductor("127.0.0.1:9")
    looks: list[int] = []

    def look() -> dict[str, Any] | None:
        looks.append(len(looks))
        if len(looks) == 1:
            return None  # nothing was found out: it is looked again
        conductor.address, conductor.epoch = store.address, 2
        return core_spec(conductor.spec(1))

    work = fill_work(SHARD_BYTES) | {"block_bytes": 4096, "operations": 16}
    given = core_spec(conductor.spec(0))
    report = core.load_volume(given, work, cluster_id=CLUSTER, look=look)
    assert report["operations"] == 16
    assert len(looks) == 2


def test_the_description_for_the_core_leaves_out_what_nobody_serves() -> None:
    spec = Conductor("127.0.0.1:9").spec(0)
    away = replace_route(spec, 1)
    assert [shard["index"] for shard in core_spec(away)["shards"]] == [0]


def replace_route(spec: VolumeSpec, index: int) -> VolumeSpec:
    """Give the same without an address for one shard."""
    routes = [
        ShardRoute(index=route.index, epoch=route.epoch, address="")
        if route.index == index
        else route
        for route in spec.shards
    ]
    return msgspec.structs.replace(spec, shards=tuple(routes))
