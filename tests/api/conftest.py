"""A server in a thread of its own, with one store and a gateway, and the document of its API."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import schemathesis
from tests.support.server import Served, serving
from tests.support.world import CLUSTER

from pureflash.conductor.agents import Session
from pureflash.model.messages import RegisterGateway

GATEWAY = RegisterGateway(id=1, term=0, cluster_id=CLUSTER, gateway="g1", incarnation=1)
Operation = Any  # schemathesis has types of its own for each kind of document


@dataclass(frozen=True, slots=True)
class Running:
    """A server in a thread of its own, and its document."""

    url: str
    schema: Any
    served: Served

    def operations(self) -> dict[str, Operation]:
        found = [result.ok() for result in self.schema.get_all_operations()]
        return {operation.label: operation for operation in found}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Serve a conductor with one store and the volume v1."""
    started, stop, served = threading.Event(), asyncio.Event(), list[Served]()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        folder = tmp_path_factory.mktemp("served")
        async with serving(folder, settle_timeout_s=1) as server, server.store(1):
            await server.conductor.receive(Session(), GATEWAY)
            served.append(server)
            started.set()
            await stop.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            loop.close()
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(30)
    assert served, "the server did not start; its thread says why"
    url = f"http://{served[0].address}"
    try:
        document = requests.get(f"{url}/docs/openapi.json", timeout=30).json()
        # Without it: made-up tokens would all be refused alike, before anything was looked at.
        document["security"] = []
        yield Running(url, schemathesis.openapi.from_dict(document), served[0])
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()


def check_problem(answer: Any) -> str:
    """Check an error for what every one must say; gives its code."""
    problem: dict[str, Any] = answer.json()
    assert problem["code"] == problem["title"] != "INTERNAL", problem
    assert problem["status"] == answer.status_code
    assert [problem["request_id"]] == list(answer.headers["x-request-id"]), problem
    assert problem["detail"]
    assert problem["next_step"]
    return str(problem["code"])
