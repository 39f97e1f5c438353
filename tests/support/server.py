"""A conductor with its API on a real socket, in this process, on port 0."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fake_core import FakeCore, FakeStoreNode
from tests.support.world import CLUSTER, GIB, ListLog

from pureflash.api.app import create_app
from pureflash.api.server import SocketServer, SystemClock
from pureflash.client.api import Api
from pureflash.conductor.service import Conductor
from pureflash.conductor.specs import Identity
from pureflash.conductor.states import volume_state
from pureflash.conductor.view import View
from pureflash.metastore.memory import MemoryMetastore
from pureflash.metastore.records import Records
from pureflash.model.domain import Disk, HealthState
from pureflash.process.lifecycle import next_incarnation
from pureflash.process.link import AgentLink
from pureflash.process.net import bind_tcp
from pureflash.store.agent import StoreAgent, StoreFacts

TOKEN = "token-of-the-test"


@dataclass
class Served:
    """A running server. `call` runs a blocking client method beside the server's loop."""

    address: str
    conductor: Conductor
    log: ListLog
    folder: Path
    core: FakeCore

    def api(self, token: str = TOKEN) -> Api:
        return Api(self.address, token, source="the test")

    async def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        def ask() -> Any:
            with self.api() as api:
                return getattr(api, method)(*arguments, **named)

        return await asyncio.to_thread(ask)

    def make_store(self, number: int) -> tuple[FakeStoreNode, AgentLink]:
        """Make a store with a fake node and its link; `run` the link to let it join."""
        path = self.folder / f"disk{number}.img"
        if not path.exists():
            self.core.format_disk(
                str(path),
                size_bytes=10 * GIB,
                cluster_id=bytes.fromhex(CLUSTER),
                journal_bytes=None,
            )
        found = self.core.inspect_disk(str(path))
        incarnation = next_incarnation(self.folder / f"incarnation{number}", wall_ms=1)
        address = f"127.0.0.1:{7161 + number}"
        node = self.core.StoreNode(
            store_id=number,
            incarnation=incarnation,
            cluster_id=bytes.fromhex(CLUSTER),
            cluster_key=bytes(32),
            listen=address,
            disks=[{"path": str(path)}],
        )
        disk = Disk(
            index=0,
            path=str(path),
            disk_uuid=found["disk_uuid"],
            format_uuid=found["format_uuid"],
            size_bytes=found["size_bytes"],
        )
        facts = StoreFacts(
            cluster_id=CLUSTER,
            store=number,
            name=f"s{number}",
            incarnation=incarnation,
            address=address,
            disks=(disk,),
        )
        agent = StoreAgent(node, facts=facts, log=self.log)
        asyncio.get_running_loop().add_reader(node.fileno(), agent.drain)
        return node, AgentLink(address=self.address, token=TOKEN, owner=agent, log=self.log)

    @asynccontextmanager
    async def store(self, number: int) -> AsyncIterator[FakeStoreNode]:
        """Run a store until the block ends; it has registered when the block begins."""
        node, link = self.make_store(number)
        task = asyncio.create_task(link.run())
        try:
            await asyncio.wait_for(link.registered.wait(), 10)
            yield node
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            asyncio.get_running_loop().remove_reader(node.fileno())
            node.close()


def is_healthy(view: View) -> bool:
    """Whether all volumes are served from all their copies."""
    volumes = view.volumes.values()
    return all(volume_state(view, one)[0] is HealthState.HEALTHY for one in volumes)


@asynccontextmanager
async def serving(folder: Path, *, settle_timeout_s: float = 10) -> AsyncIterator[Served]:
    """Serve a fresh conductor over a metastore in memory."""
    log = ListLog()
    conductor = Conductor(
        Records(MemoryMetastore()),
        identity=Identity(
            cluster_id=CLUSTER,
            cluster_key=bytes(32),
            owner="c1",
            overcommit_ratio=1.0,
            draw=lambda: 7,
        ),
        clock=SystemClock(),
        log=log,
        settle_timeout_s=settle_timeout_s,
    )
    await conductor.start()
    listener = await bind_tcp("127.0.0.1:0", name="the test")
    server = SocketServer(create_app(conductor, token=TOKEN, version="0", log=log), listener)
    tasks = [asyncio.create_task(conductor.run()), asyncio.create_task(server.serve())]
    host, port = listener.getsockname()
    try:
        yield Served(f"{host}:{port}", conductor, log, folder, FakeCore())
    finally:
        conductor.close_sessions()
        server.stop()  # type: ignore[no-untyped-call]  # granian has no annotation here
        await asyncio.wait_for(tasks[1], 10)
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        listener.close()
