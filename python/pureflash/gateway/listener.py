"""Accept NBD clients: run the handshake with a deadline, then hand the socket to Rust.

One task per client that has not finished its handshake, at most `HANDSHAKES_MAX`. An option and its
answer have 5 s, and so has a whole handshake, with 10 ms more for each export that is offered: a
client that lists them asks about each (the machine counts the bytes). One client more ends the
oldest handshake, not its own: one that chooses an export takes milliseconds, so whoever holds many
open cannot keep others out. Without a free descriptor the listener waits for one. After `Adopt`
Python has no part in the connection.
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
"""For one option and its answer, and for a handshake with a gateway that offers nothing."""
EXPORT_S: Final = 0.01
"""More for a handshake, for each export: two or three options, far more than they take."""
HANDSHAKES_MAX: Final = 128
RECEIVE_BYTES: Final = 4_096
ACCEPT_PAUSE_S: Final = 0.1
"""Before another try when a client could not be accepted: mostly for want of a descriptor."""


def patience(*, now_s: float, began_s: float, exports: int) -> float:
    """Give the time until which a client that just had an answer may take for its next option.

    Times are in seconds of one clock; `exports` is how many the handshake may ask about.
    """
    return min(now_s + HANDSHAKE_S, began_s + HANDSHAKE_S + EXPORT_S * exports)


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
                async with asyncio.timeout(HANDSHAKE_S) as deadline:
                    outcome = await self._shake_hands(client, deadline)
            except TimeoutError:
                self._log.info(
                    "nbd.slow",
                    f"no option in {HANDSHAKE_S:g} s, or no export chosen in {EXPORT_S:g} s more"
                    " for each that is offered",
                )
                return
            except OSError as problem:
                self._log.info("nbd.lost", f"the client left: {problem}")
                return
            if isinstance(outcome, Closed):
                self._log.info("nbd.closed", outcome.reason)
                return
            self._adopt(client, outcome)

    async def _shake_hands(
        self, client: socket.socket, deadline: asyncio.Timeout
    ) -> Adopt | Closed:
        """Drive the machine; `deadline` moves with each answered option, up to the whole's end."""
        loop = asyncio.get_running_loop()
        table = self._exports.table(self._transport)
        machine = Negotiation(table)
        began_s, answered = loop.time(), 0
        while True:
            await self._send_all(client, machine)
            if machine.answered > answered:
                answered = machine.answered
                exports = len(table.by_name)
                deadline.reschedule(patience(now_s=loop.time(), began_s=began_s, exports=exports))
            data = await loop.sock_recv(client, RECEIVE_BYTES)
            events = machine.receive_data(data) if data else machine.receive_eof()
            if events:
                with contextlib.suppress(ConnectionError):
                    await self._send_all(client, machine)
                return events[-1]

    async def _send_all(self, client: socket.socket, machine: Negotiation) -> None:
        while piece := machine.data_to_send():
            await asyncio.get_running_loop().sock_sendall(client, piece)

    def _adopt(self, client: socket.socket, outcome: Adopt) -> None:
        handle = self._exports.handle_of(outcome.export.name, self._transport)
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
