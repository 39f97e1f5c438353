"""Watches how disks keep pace with one another, and tells of changes. The rules are `slow`'s."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pureflash.conductor import slow
from pureflash.conductor.events import EventLog
from pureflash.conductor.observations import Observations
from pureflash.conductor.pace import Pace, Stage
from pureflash.conductor.view import View
from pureflash.process.logs import Log


@dataclass(frozen=True, slots=True)
class Change:
    """A disk has another stage than before."""

    store: int
    subject: str
    pace: Pace

    @property
    def text(self) -> str:
        """Say it in a sentence."""
        if self.pace.stage is Stage.DEMOTED:
            return f"it is left out of what has enough other copies: {self.pace.cause}"
        if self.pace.stage is Stage.SLOW:
            return f"other disks lead what it led: {self.pace.cause}"
        return "it counts as even with the others again"


class DiskWatch:
    """Judges all disks and keeps the outcome among the observations."""

    def __init__(
        self, observations: Observations, events: EventLog, *, log: Log, floor_us: int
    ) -> None:
        """Judge no disk slow below `floor_us` microseconds; 0: none at all."""
        self._observations = observations
        self._events = events
        self._log = log
        self._floor_us = floor_us

    def look(self, view: View) -> None:
        """Judge, and tell what has changed."""
        after = slow.judge(view.paces, view, floor_us=self._floor_us)
        for change in changes(view, after):
            stage = change.pace.stage
            self._events.add(view.wall_ms, f"disk.{stage}", change.subject, change.text)
            if change.pace.is_slow:
                text = f"{change.subject}: {change.text}"
                self._log.warning(f"disk.{stage}", text, code="DISK_SLOW", store=change.store)
            else:
                text = f"{change.subject}: {change.text}"
                self._log.info(f"disk.{stage}", text, store=change.store)
        self._observations.paces = after


def changes(view: View, after: Mapping[str, Pace]) -> Iterator[Change]:
    """Give the disks that have another stage than in the view."""
    for store in view.stores.values():
        for disk in store.disks:
            now = after.get(disk.disk_uuid)
            before = view.paces.get(disk.disk_uuid)
            stage = before.stage if before else Stage.EVEN
            if now is not None and now.stage is not stage:
                yield Change(store.id, f"{store.name} disk {disk.index}", now)
