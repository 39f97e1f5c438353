"""The conductor process: metastore, conductor, API on one socket.

Granian runs embedded, in our event loop, because the conductor's state lives there; it is given a
socket that we bound, so that "port taken" is an error of ours with the holder's name and port 0
works (its own listener would set SO_REUSEPORT and let two conductors share a port in silence).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any, Final

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from pureflash.api.app import create_app
from pureflash.conductor.service import Conductor
from pureflash.conductor.specs import Identity
from pureflash.metastore.records import Records
from pureflash.metastore.sqlite import SqliteMetastore
from pureflash.model.domain import ID_MAX
from pureflash.model.layout import store_name
from pureflash.model.settings import Settings
from pureflash.process.lifecycle import announce, stop_event
from pureflash.process.logs import JsonLog
from pureflash.process.net import bind_tcp
from pureflash.process.secrets import read_key, read_token

BACKLOG: Final = 128
CONNECTIONS_MAX: Final = 4_096
"""Open at once, agents included. Granian's own default is the backlog: 128 idle connections, or
agents, would keep everybody else out."""
HEADER_MS: Final = 10_000
"""For the head of a request; Granian's default is 30 s. It also ends idle connections, and HTTP
clients keep those for about 5 s: whoever is sooner must be the client."""
STOP_TIMEOUT_S: Final = 5.0


class SystemClock:
    """The clocks of the machine."""

    def now_ms(self) -> int:
        """Give monotonic milliseconds."""
        return time.monotonic_ns() // 1_000_000

    def wall_ms(self) -> int:
        """Give milliseconds since 1970."""
        return time.time_ns() // 1_000_000


class SocketServer(Server):
    """Granian's embedded server on a socket that is bound already."""

    def __init__(self, app: Any, listener: socket.socket) -> None:
        """Serve the ASGI application `app` on `listener`."""
        host, port = listener.getsockname()[:2]
        super().__init__(
            app,
            address=host,
            port=port,
            interface=Interfaces.ASGI,
            log_enabled=False,
            websockets=True,
            # HTTP/2 has limits of its own and nobody here speaks it.
            http=HTTPModes.http1,
            backpressure=CONNECTIONS_MAX,
            http1_settings=HTTP1Settings(header_read_timeout=HEADER_MS),
        )
        self._listener = listener

    def _init_shared_socket(self) -> None:
        # Granian's stub of this class has no constructor; the argument order is (fd, uds, backlog).
        # The holder owns its descriptor; ours stays open until the server has stopped.
        holder: Any = importlib.import_module("granian._granian").SocketHolder
        self._shd = holder(os.dup(self._listener.fileno()), False, BACKLOG)
        self._ssp = None


async def run_conductor(settings: Settings) -> None:
    """Run a conductor until TERM; errors of the start are raised, later ones are logged."""
    import pureflash

    name = settings.text("node.id")
    log = JsonLog(name, settings.path("log.file"), level=settings.text("log.level"))
    data = Path(settings.text("node.data"))
    stop = stop_event()
    listener = await bind_tcp(settings.text("node.listen"), name="the conductor")
    metastore = SqliteMetastore.open(data / "meta.sqlite", new_lineage=secrets.token_hex(16))
    identity = Identity(
        cluster_id=settings.text("cluster.id"),
        cluster_key=read_key(Path(settings.text("node.key_file"))),
        owner=name,
        overcommit_ratio=settings.ratio("limits.overcommit_ratio"),
        balance_after_ms=round(settings.ratio("limits.balance_after_s") * 1000),
        slow_disk_us=settings.number("limits.slow_disk_us"),
        stores={n: store_name(n) for n in range(1, settings.number("node.stores") + 1)},
        gateways=tuple(filter(None, [settings.text("node.gateway")])),
        draw=lambda: secrets.randbelow(ID_MAX) + 1,
    )
    conductor = Conductor(Records(metastore), identity=identity, clock=SystemClock(), log=log)
    try:
        await conductor.start()
        token = read_token(Path(settings.text("node.token_file")))
        app = create_app(conductor, token=token, version=pureflash.__version__, log=log)
        host, port = listener.getsockname()[:2]
        await _serve(conductor, SocketServer(app, listener), stop, settings, f"{host}:{port}")
    finally:
        await metastore.close()
        listener.close()
        log.info("conductor.stopped", "stopped")
        log.close()


async def _serve(
    conductor: Conductor,
    server: SocketServer,
    stop: asyncio.Event,
    settings: Settings,
    address: str,
) -> None:
    tasks = [
        asyncio.create_task(conductor.run()),
        asyncio.create_task(server.serve()),
        asyncio.create_task(stop.wait()),
    ]
    announce(settings.path("node.ready"), incarnation=conductor.term, address=address)
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    conductor.close_sessions()
    server.stop()  # type: ignore[no-untyped-call]  # granian has no annotation here
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(tasks[1]), STOP_TIMEOUT_S)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
