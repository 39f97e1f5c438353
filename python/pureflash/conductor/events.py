"""Events for `/v1/events`: a ring of the newest, with numbers that a reader resumes from."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from pureflash.model.rest import EventView, timestamp

EVENTS_KEPT: Final = 1_000
"""A reader that was away for longer sees a gap in the ids and lists again."""


class EventLog:
    """The newest events; ids grow by one and start anew with the process."""

    def __init__(self) -> None:
        self._events: deque[EventView] = deque(maxlen=EVENTS_KEPT)
        self._next_id = 1
        self._news: set[asyncio.Event] = set()

    @property
    def newest_id(self) -> int:
        """Id of the newest event; 0 before the first."""
        return self._next_id - 1

    def add(self, wall_ms: int, kind: str, subject: str, detail: str) -> None:
        """Add an event and wake the readers."""
        event = EventView(
            id=self._next_id, at=timestamp(wall_ms), kind=kind, subject=subject, detail=detail
        )
        self._next_id += 1
        self._events.append(event)
        for reader in self._news:
            reader.set()

    async def follow(self, after: int) -> AsyncIterator[EventView]:
        """Give events with an id above `after`, for ever; an id of the future means all new."""
        seen = min(after, self._next_id - 1)
        wake = asyncio.Event()
        self._news.add(wake)
        try:
            while True:
                for event in [event for event in self._events if event.id > seen]:
                    seen = event.id
                    yield event
                await wake.wait()
                wake.clear()
        finally:
            self._news.discard(wake)
