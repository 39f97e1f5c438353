"""Sessions of agents: what a connected store or gateway is owed and has answered.

`Sessions` has the connected ones by name and stamps what goes down: a number that pairs it with its
answer, the term, and the metastore's revision, which stores remember.

No I/O of its own: the WebSocket handler takes frames from `outbox` and gives messages to the
service. The outbox is bounded; an agent that does not read is disconnected, because a command that
waits is planned again anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import msgspec

from pureflash.conductor.planner import ExportPlan
from pureflash.conductor.tell import Tell
from pureflash.model.messages import Message, encode

OUTBOX_MAX: Final = 4_096
"""Frames that wait for a slow agent: a first batch of 1,000 replicas fits four times."""


@dataclass(slots=True)
class Session:
    """One connection. `peer` is a store id or a gateway's name once it has registered."""

    outbox: asyncio.Queue[str | None] = field(
        default_factory=lambda: asyncio.Queue(maxsize=OUTBOX_MAX)
    )
    store: int | None = None
    gateway: str | None = None
    incarnation: int = 0
    in_flight: dict[int, Tell] = field(default_factory=dict)
    offered: tuple[tuple[ExportPlan, ...], int] | None = None
    offer_id: int = 0
    """The number of the last message of that list, with which the gateway answers it."""
    is_closed: bool = False

    def send(self, message: Message) -> None:
        """Queue a message; a full queue closes the session instead."""
        if self.is_closed:
            return
        try:
            self.outbox.put_nowait(encode(message))
        except asyncio.QueueFull:
            self.close()

    def lacks(self, export_id: int, answered: int) -> bool:
        """Whether the gateway, whose newest answer has this number, has a list without an export.

        That it does not tell of the export is no proof: it may not have told of it yet.
        """
        if self.offered is None or answered < self.offer_id:
            return False
        return all(plan.export.id != export_id for plan in self.offered[0])

    def close(self) -> None:
        """Let the handler end the connection after what is queued; the rest is planned again."""
        if not self.is_closed:
            self.is_closed = True
            if self.outbox.full():
                self.outbox.get_nowait()
            self.outbox.put_nowait(None)


class Sessions:
    """The agents that have registered, one session each: by store id, or by a gateway's name."""

    def __init__(self, stamp: Callable[[], tuple[int, int]]) -> None:
        """`stamp` gives the present term and revision."""
        self._stamp = stamp
        self._sessions: dict[int | str, Session] = {}
        self._next_message = 1

    def __iter__(self) -> Iterator[Session]:
        """Give all of them."""
        return iter(list(self._sessions.values()))

    def of(self, peer: int | str) -> Session | None:
        """Give the session of a store or gateway that is connected."""
        return self._sessions.get(peer)

    def enter(self, peer: int | str, session: Session) -> None:
        """Make `session` the one of `peer`; an older one of it is closed."""
        if (older := self._sessions.get(peer)) is not None and older is not session:
            older.close()
        self._sessions[peer] = session

    def leave(self, session: Session) -> bool:
        """Forget a session that has ended; whether it was its agent's present one."""
        session.close()
        peer = session.store if session.store is not None else session.gateway
        if peer is None or self._sessions.get(peer) is not session:
            return False
        del self._sessions[peer]
        return True

    def end(self, peer: int | str) -> None:
        """End the connection of an agent, which then has to register again."""
        if session := self._sessions.pop(peer, None):
            session.close()

    def send(self, session: Session, message: Message) -> int:
        """Send a message with the next number, which is given, and today's stamp."""
        self._next_message += 1
        term, revision = self._stamp()
        number = self._next_message
        session.send(msgspec.structs.replace(message, id=number, term=term, revision=revision))
        return number

    def to_stores(self, message: Message) -> None:
        """Send a message to every store."""
        for session in self:
            if session.store is not None:
                self.send(session, message)
