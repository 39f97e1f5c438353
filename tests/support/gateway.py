"""A gateway's listener on a real socket around a fake core, with exports of any number."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.fake_core import FakeGateway
from tests.support.world import GIB, ListLog

from pureflash.gateway.exports import Exports
from pureflash.gateway.listener import NbdListener
from pureflash.gateway.server import bind_unix
from pureflash.model.domain import Transport
from pureflash.model.messages import ExportSpec, ShardRoute, VolumeSpec


def spec(
    export_id: int, name: str, *, address: str = "127.0.0.1:1", transport: str = "unix"
) -> ExportSpec:
    volume = VolumeSpec(
        cluster_id="00" * 16,
        volume_id=export_id + 100,
        size_bytes=GIB,
        shard_size_bytes=GIB,
        attach_epoch=1,
        ticket="ab" * 68,
        shards=(ShardRoute(index=0, epoch=1, address=address),),
    )
    return ExportSpec(
        id=export_id,
        name=name,
        kind="nbd",
        transport=transport,
        is_read_only=False,
        volume=volume,
    )


@dataclass
class Rig:
    gateway: FakeGateway
    exports: Exports
    log: ListLog
    path: Path
    changes: asyncio.Queue[None]


@asynccontextmanager
async def listening(folder: Path) -> AsyncIterator[Rig]:
    gateway, log = FakeGateway(cluster_id=bytes(16)), ListLog()
    exports = Exports(gateway, path=folder / "exports.json", log=log)
    path = folder / "g1.nbd"
    changes: asyncio.Queue[None] = asyncio.Queue()
    with bind_unix(path) as bound:
        server = NbdListener(
            bound,
            transport=Transport.UNIX,
            gateway=gateway,
            exports=exports,
            log=log,
            on_change=lambda: changes.put_nowait(None),
        )
        task = asyncio.create_task(server.run())
        try:
            yield Rig(gateway, exports, log, path, changes)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            gateway.close()
