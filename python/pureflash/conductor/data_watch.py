"""Tells of findings about data when they come and when they are over, each once: events and log."""

from __future__ import annotations

from pureflash.conductor import health
from pureflash.conductor.events import EventLog
from pureflash.conductor.view import View
from pureflash.process.logs import Log


class DataWatch:
    """What was told last; a conductor that starts tells again what is found then."""

    def __init__(self, events: EventLog, *, log: Log) -> None:
        """Tell `events` and `log`."""
        self._events = events
        self._log = log
        self._told: set[tuple[str, str]] = set()

    def look(self, view: View) -> None:
        """Compare with what was told."""
        found = {(one.code, one.subject): one.cause for one in health.data_findings(view)}
        for (code, subject), cause in found.items():
            if (code, subject) not in self._told:
                self._events.add(view.wall_ms, "data.found", subject, f"{code}: {cause}")
                self._log.warning("data.found", f"{subject}: {cause}", code=code)
        for code, subject in sorted(self._told - found.keys()):
            self._events.add(view.wall_ms, "data.over", subject, code)
            self._log.info("data.over", f"{subject}: {code} is over")
        self._told = set(found)
