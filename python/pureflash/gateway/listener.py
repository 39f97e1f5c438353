"""Accept NBD clients: run the handshake with a deadline, then hand the socket to Rust.

One task per client that has not finished its handshake, at most `HANDSHAKES_MAX`; 5 s and 64 KiB
per handshake (the machine counts the bytes). One client more ends the oldest handshake, not its
own: an honest one takes milliseconds, so whoever holds many open cannot keep others out. Without a
free descriptor the listener waits for one. After `Adopt` Python has no part in the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Final

from pureflash.errors import PureFlashError
from pureflash.gateway.core import Gateway
from pureflash.gateway.exports import Exports
from pureflash.gateway.nbd import Adopt, Closed, Negotiation
from pureflash.model.domain import Transport
from pureflash.process.logs import Log

HANDSHAKE_S: Final = 5.0
HANDSHAKES_MAX: Final = 128
RECEIVE_BYTES: Final = 4_096
ACCEPT_PAUSE_S: Final = 0.1
"""Before another try when a client could not be accepted: mostly for want of a descriptor."""


class NbdListener:
    """Clients of one listening socket; `on_change` is called when connections come or go."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        transport: Transport,
        gateway: Gateway,
        exports: Exports,
        log: Log,
        on_change: Callable[[], None],
    ) -> None:
        """Serve `listener`, which listens and does not block."""
        self._listener = listener
        self._transport = transport
        self._gateway = gateway
        self._exports = exports
        self._log = log
        self._on_change = on_change
        self._handshakes: dict[asyncio.Task[None], None] = {}  # the oldest first

    async def run(self) -> None:
        """Accept until cancelled; handshakes that are under way are dropped then."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                client = await self._accept(loop)
                if len(self._handshakes) >= HANDSHAKES_MAX:
                    oldest = next(iter(self._handshakes))
                    self._handshakes.pop(oldest)
                    oldest.cancel()
                    self._log.info("nbd.busy", f"{HANDSHAKES_MAX} handshakes are under way")
                task = asyncio.create_task(self._serve(client))
                self._handshakes[task] = None
                task.add_done_callback(lambda task: self._handshakes.pop(task, None))
                # Accepting does not wait while more clients are there. The task has to begin, to
                # own its socket, before it can be ended; and others must have a turn in a storm.
                await asyncio.sleep(0)
        finally:
            left = list(self._handshakes)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _accept(self, loop: asyncio.AbstractEventLoop) -> socket.socket:
        """Take the next client; one that cannot be had must not end the listener."""
        while True:
            try:
                client, _ = await loop.sock_accept(self._listener)
            except OSError as problem:
                self._log.info("nbd.accept", f"no client accepted: {problem}")
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            client.setblocking(False)
            return client

    async def _serve(self, client: socket.socket) -> None:
        """Shake hands and hand over; the socket is closed here in every other outcome."""
        with client:
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    outcome = await self._shake_hands(client)
            except TimeoutError:
                self._log.info("nbd.slow", f"no export chosen in {HANDSHAKE_S:g} s")
                return
            except OSError as problem:
                self._log.info("nbd.lost", f"the client left: {problem}")
                return
            if isinstance(outcome, Closed):
                self._log.info("nbd.closed", outcome.reason)
                return
            self._adopt(client, outcome)

    async def _shake_hands(self, client: socket.socket) -> Adopt | Closed:
        loop = asyncio.get_running_loop()
        machine = Negotiation(self._exports.named(self._transport))
        while True:
            await loop.sock_sendall(client, machine.data_to_send())
            data = await loop.sock_recv(client, RECEIVE_BYTES)
            events = machine.receive_data(data) if data else machine.receive_eof()
            if events:
                with contextlib.suppress(ConnectionError):
                    await loop.sock_sendall(client, machine.data_to_send())
                return events[-1]

    def _adopt(self, client: socket.socket, outcome: Adopt) -> None:
        handle = self._exports.handle_of(outcome.export.name)
        if handle is None:
            self._log.info("nbd.closed", f"{outcome.export.name} was taken away in the handshake")
            return
        try:
            connection = self._gateway.adopt_nbd(
                client.fileno(),
                outcome.leftover,
                handle,
                outcome.is_structured,
                outcome.export.is_read_only,
            )
        except PureFlashError as problem:
            self._log.error("nbd.refused", str(problem), export=handle)
            return
        self._exports.connections[connection] = handle
        self._log.info("nbd.connected", outcome.export.name, export=handle, connection=connection)
        self._on_change()
