"""The gateway process: exports by the conductor's list, NBD listeners, `_core.Gateway`."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pureflash.errors import CallerError, Code
from pureflash.gateway.core import Gateway, GatewayCore, load_core, totals
from pureflash.gateway.exports import Exports
from pureflash.gateway.listener import NbdListener
from pureflash.model.domain import Transport
from pureflash.model.messages import (
    Down,
    ExportsApplied,
    ExportSpec,
    Heartbeat,
    Message,
    RegisterGateway,
    SetExports,
)
from pureflash.model.settings import Settings
from pureflash.process.allegiance import Known
from pureflash.process.lifecycle import announce, next_incarnation, stop_event
from pureflash.process.link import AgentLink
from pureflash.process.logs import JsonLog, Log
from pureflash.process.net import BACKLOG, bind_tcp
from pureflash.process.secrets import read_token

SOCKET_PATH_BYTES_MAX: Final = 107
TELL_S: Final = 0.1
"""From a connection that came or went to the report of it, which is about all exports: whoever
connects to ten thousand in a row must not make as many reports of ten thousand."""


class GatewayAgent:
    """An `AgentOwner` for one gateway."""

    def __init__(
        self, gateway: Gateway, *, name: str, cluster_id: str, incarnation: int, log: Log
    ) -> None:
        """Speak for `gateway`; `uris` and `link` are set once they exist."""
        self._gateway = gateway
        self._name = name
        self._cluster_id = cluster_id
        self.incarnation = incarnation
        self._log = log
        self.exports: Exports
        self.uris: dict[Transport, str] = {}
        self.link: AgentLink | None = None
        self._telling: asyncio.TimerHandle | None = None
        self._coming: list[ExportSpec] = []

    def registration(self) -> Message:
        """Introduce the gateway."""
        return RegisterGateway(
            id=0,
            term=self.link.term if self.link else 0,
            cluster_id=self._cluster_id,
            gateway=self._name,
            incarnation=self.incarnation,
        )

    def heartbeat(self, term: int) -> Message:
        """Tell the totals."""
        return Heartbeat(
            id=0,
            term=term,
            counters=totals(self._gateway.stats()["volumes"]),
            connections=len(self.exports.connections),
        )

    def led(self, known: Known) -> None:
        """Nothing of a gateway depends on who leads."""

    def handle(self, command: Down, send: Callable[[Message], None]) -> None:
        """Offer the exports of a list, once all of it is there, and answer how they are."""
        if not isinstance(command, SetExports):
            self._log.error("agent.misled", f"a gateway was sent {type(command).__name__}")
            return
        if command.is_first:
            # What came of a list whose connection broke is said anew.
            self._coming.clear()
        self._coming += command.exports
        if not command.is_last:
            return
        self.exports.apply(tuple(self._coming))
        self._coming.clear()
        reports = self.exports.reports(self.uris)
        send(ExportsApplied(id=command.id, term=command.term, reports=reports))

    def tell(self) -> None:
        """Send the reports again in `TELL_S`: a connection came or went."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_S, self._tell_now)

    def _tell_now(self) -> None:
        self._telling = None
        if self.link is not None:
            reports = self.exports.reports(self.uris)
            self.link.send(ExportsApplied(id=0, term=self.link.term, reports=reports))

    def drain(self) -> None:
        """Take the events of `_core`; called when its eventfd is readable."""
        for event in self._gateway.drain():
            match event:
                case ("closed", int(connection), str(reason)):
                    handle = self.exports.connections.pop(connection, None)
                    self._log.info("nbd.closed", reason, connection=connection, export=handle)
                case ("conf_needed", int(handle), int(index)):
                    # The conductor pushes a new list whenever a route changes; asking is enough of
                    # a sign to say that clients of this shard are waiting.
                    self._log.info("export.waiting", "no route", export=handle, shard=index)
                case _:
                    raise AssertionError(f"the gateway has no event {event!r}")
        self.tell()


async def run_gateway(settings: Settings) -> None:
    """Run a gateway until TERM; errors of the start are raised."""
    await run_gateway_on(load_core(), settings)


async def run_gateway_on(core: GatewayCore, settings: Settings) -> None:
    """Run a gateway on a core: the real one, or a fake that tests give."""
    name = settings.text("node.id")
    log = JsonLog(name, settings.path("log.file"), level=settings.text("log.level"))
    stop = stop_event()
    data = Path(settings.text("node.data"))
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    incarnation = next_incarnation(data / "incarnation", wall_ms=time.time_ns() // 1_000_000)
    cluster_id = settings.text("cluster.id")
    gateway = core.Gateway(cluster_id=bytes.fromhex(cluster_id))
    agent = GatewayAgent(
        gateway, name=name, cluster_id=cluster_id, incarnation=incarnation, log=log
    )
    agent.exports = Exports(gateway, path=data / "exports.json", log=log)
    socket_path = Path(settings.text("nbd.socket"))
    try:
        local = bind_unix(socket_path)
        remote = await bind_tcp(settings.text("nbd.listen"), name="the gateway")
        host, port = remote.getsockname()[:2]
        agent.uris = {
            Transport.UNIX: f"nbd+unix:///{{name}}?socket={socket_path}",
            Transport.TCP: f"nbd://{host}:{port}/{{name}}",
        }
        agent.exports.restore()
        log.info("gateway.started", f"NBD on {socket_path} and {host}:{port}")
        with local, remote:
            await _serve(
                agent, gateway, {Transport.UNIX: local, Transport.TCP: remote}, settings, stop, log
            )
    finally:
        gateway.close()
        socket_path.unlink(missing_ok=True)
        log.info("gateway.stopped", "stopped")
        log.close()


async def _serve(
    agent: GatewayAgent,
    gateway: Gateway,
    listeners: dict[Transport, socket.socket],
    settings: Settings,
    stop: asyncio.Event,
    log: Log,
) -> None:
    token = read_token(Path(settings.text("node.token_file")))
    link = AgentLink(
        address=settings.text("node.conductors"),
        token=token,
        owner=agent,
        log=log,
        cluster_id=settings.text("cluster.id"),
    )
    agent.link = link
    loop = asyncio.get_running_loop()
    loop.add_reader(gateway.fileno(), agent.drain)
    servers = [
        NbdListener(
            listener,
            transport=transport,
            gateway=gateway,
            exports=agent.exports,
            log=log,
            on_change=agent.tell,
        )
        for transport, listener in listeners.items()
    ]
    jobs = [link.run(), stop.wait(), *(server.run() for server in servers)]
    tasks: list[asyncio.Task[object]] = [asyncio.ensure_future(job) for job in jobs]
    try:
        announce(
            settings.path("node.ready"),
            incarnation=agent.incarnation,
            address=agent.uris[Transport.TCP].partition("//")[2].partition("/")[0],
        )
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        loop.remove_reader(gateway.fileno())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def bind_unix(path: Path) -> socket.socket:
    """Listen on a unix socket of mode 0600 in a folder that is ours.

    Errors: CallerError LIMIT for a path that is too long; OSError. A socket that a killed gateway
    left is replaced: the supervisor's lock keeps two gateways of one cluster apart.
    """
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise CallerError(
            Code.LIMIT,
            f"{path} has more than {SOCKET_PATH_BYTES_MAX} bytes",
            next_step="set XDG_RUNTIME_DIR to a shorter directory",
        )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    # The mode is set before the name appears: there is no moment in which others could connect.
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(previous)
    listener.listen(BACKLOG)
    return listener
