"""A command on its way to a store."""

from __future__ import annotations

from dataclasses import dataclass

from pureflash.model.messages import ReplicaCommand


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a command to a store; `id` and `term` are filled in by the sender."""

    store: int
    command: ReplicaCommand
    reason: str

    @property
    def key(self) -> tuple[int, str, int, int]:
        """Name the command for "in flight": one of a kind per replica at a time."""
        kind = type(self.command).__name__
        return (self.store, kind, self.command.volume_id, self.command.index)
