"""The agent's side of the WebSocket to the conductor, for stores and gateways.

Theory of operation. `AgentLink.run` connects, registers, and then sends a heartbeat every
`HEARTBEAT_MS` while it hands each command to the owner; when the connection ends it begins again,
with a delay that doubles from 0.25 s to 5 s. Nothing waits for the conductor: with it gone the data
path goes on, and the owner's state is told again in the next registration. Which conductor is
obeyed is decided by `allegiance`. A conductor in amnesia sends `Recall` instead of accepting: then
heartbeats and reports go up, and no command that is obeyed comes down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

import websockets
from websockets.asyncio.client import ClientConnection, connect

from pureflash.errors import PureFlashError
from pureflash.model.messages import (
    FRAME_BYTES_MAX,
    HEARTBEAT_MS,
    Down,
    Message,
    Recall,
    Refused,
    Registered,
    decode_down,
    encode,
)
from pureflash.process.allegiance import Allegiance, Known
from pureflash.process.logs import Log
from pureflash.process.net import cluster_at

RETRY_FIRST_S: Final = 0.25
RETRY_LAST_S: Final = 5.0
OPEN_TIMEOUT_S: Final = 5.0


class AgentOwner(Protocol):
    """The process that the link belongs to. Nothing here may block."""

    def registration(self) -> Message:
        """Introduce the process; called after each connect."""

    def heartbeat(self, term: int) -> Message:
        """Say that the process lives, with its counters."""

    def led(self, known: Known) -> None:
        """Take note of who leads, and how far its metastore is."""

    def handle(self, command: Down, send: Callable[[Message], None]) -> None:
        """Start a command; its answer may be sent at once or later, also not at all."""


class AgentLink:
    """A connection to the conductor that is always wanted."""

    def __init__(
        self,
        *,
        address: str,
        token: str,
        owner: AgentOwner,
        log: Log,
        allegiance: Allegiance | None = None,
        cluster_id: str = "",
    ) -> None:
        """Prepare to connect to `address` (host:port) with a bearer token.

        With `cluster_id` it is shown only to a conductor of that cluster.
        """
        self._address = address
        self._cluster_id = cluster_id
        self._url = f"ws://{address}/v1/agent"
        self._token = token
        self._owner = owner
        self._log = log
        self._outbox: asyncio.Queue[Message] = asyncio.Queue()
        self._allegiance = allegiance or Allegiance()
        self.registered = asyncio.Event()
        self._is_lost = False

    @property
    def term(self) -> int:
        """The highest term known; commands of a lower one are not obeyed."""
        return self._allegiance.least_term

    async def run(self) -> None:
        """Keep connected until cancelled."""
        delay_s = RETRY_FIRST_S
        while True:
            try:
                await self._greet()
                async with connect(
                    self._url,
                    additional_headers={"Authorization": f"Bearer {self._token}"},
                    open_timeout=OPEN_TIMEOUT_S,
                    close_timeout=1,
                    max_size=FRAME_BYTES_MAX,
                    compression=None,
                    proxy=None,
                ) as socket:
                    await self._converse(socket)
                    delay_s = RETRY_FIRST_S
            except (OSError, websockets.WebSocketException, TimeoutError) as problem:
                if self.registered.is_set():
                    delay_s = RETRY_FIRST_S
                if not self._is_lost:
                    # Once per absence: a conductor that is away for a day must not fill the log.
                    self._is_lost = True
                    self._log.info("agent.lost", f"no conductor: {problem}")
            except PureFlashError as problem:
                self._log.error("agent.refused", str(problem))
            self.registered.clear()
            await asyncio.sleep(delay_s)
            delay_s = min(RETRY_LAST_S, delay_s * 2)

    async def _greet(self) -> None:
        """Look whose conductor has the address. Errors: OSError when it is not ours."""
        if not self._cluster_id:
            return
        found = await cluster_at(self._address)
        if found != self._cluster_id:
            what = f"cluster {found[:32]!r}" if found else "another program"
            raise OSError(f"at {self._address} is {what}, not the conductor of this cluster")

    def send(self, message: Message) -> None:
        """Queue a message for the conductor of this connection."""
        if self.registered.is_set():
            self._outbox.put_nowait(message)

    async def _converse(self, socket: ClientConnection) -> None:
        self._outbox = asyncio.Queue()
        await socket.send(encode(self._owner.registration()))
        sender = asyncio.create_task(self._send_all(socket))
        try:
            async for frame in socket:
                self._receive(decode_down(frame))
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send_all(self, socket: ClientConnection) -> None:
        loop = asyncio.get_running_loop()
        next_beat = loop.time()
        await self.registered.wait()
        while True:
            now = loop.time()
            if now >= next_beat:
                await socket.send(encode(self._owner.heartbeat(self.term)))
                next_beat = now + HEARTBEAT_MS / 1000
            try:
                # Not `wait_for`, which can lose a cancellation that meets a message.
                async with asyncio.timeout(next_beat - now):
                    message = await self._outbox.get()
            except TimeoutError:
                continue
            await socket.send(encode(message))

    def _receive(self, command: Down) -> None:
        if isinstance(command, Refused):
            self._log.error("agent.refused", f"{command.message}. {command.next_step}.")
        elif isinstance(command, Recall):
            self.registered.set()
            self._is_lost = False
            self._log.info("agent.recalled", "the conductor lost its memory and leads nobody")
            self._owner.handle(command, self.send)
        elif command.term < self.term:
            self._log.info("agent.old_term", f"dropped a command of term {command.term}")
        elif isinstance(command, Registered):
            self._allegiance.check(command)
            self._obey(command)
            self.registered.set()
            self._is_lost = False
            self._log.info("agent.registered", f"the conductor leads term {command.term}")
        else:
            self._obey(command)
            self._owner.handle(command, self.send)

    def _obey(self, command: Down) -> None:
        """Remember whose command it is, durably, before it has any effect."""
        if self._allegiance.note(command):
            self._owner.led(self._allegiance.known)
            if why := self._allegiance.unsaved:
                self._log.info("agent.unsaved", f"who leads could not be written down: {why}")
