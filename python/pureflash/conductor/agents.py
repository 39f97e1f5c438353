"""Sessions of agents: what a connected store or gateway is owed and has answered.

No I/O of its own: the WebSocket handler takes frames from `outbox` and gives messages to the
service. The outbox is bounded; an agent that does not read is disconnected, because a command that
waits is planned again anyway.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

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
    is_closed: bool = False

    def send(self, message: Message) -> None:
        """Queue a message; a full queue closes the session instead."""
        if self.is_closed:
            return
        try:
            self.outbox.put_nowait(encode(message))
        except asyncio.QueueFull:
            self.close()

    def close(self) -> None:
        """Let the handler end the connection after what is queued; the rest is planned again."""
        if not self.is_closed:
            self.is_closed = True
            if self.outbox.full():
                self.outbox.get_nowait()
            self.outbox.put_nowait(None)
