"""Whom an agent obeys: the lineage, term and revision that its conductor has shown it.

Theory of operation. A command of a lower term than the highest known comes from a conductor that
was replaced. A registration under another lineage comes from a metastore that is not the one whose
configurations this store follows, unless it says that it was recovered from that one. Neither is
obeyed. A store keeps what it knows in `conductor.json`, durably and before it obeys, over restarts
of everything: that record finds out a metastore that was restored from a copy or made anew
(docs/internals/replication.md, section 6). What other stores say in their PINGs is kept as well,
but apart: it must not take the place of what was told here, which may be of another history.

A host without space for those few bytes is no reason to stop following: the write is tried again
with the next news (`unsaved` says why it failed).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from pureflash.errors import ClusterError, Code, MediaError
from pureflash.model.messages import Message, Registered
from pureflash.model.outside import UNREADABLE
from pureflash.process.lifecycle import write_whole

LINEAGE_DIGITS: Final = 16
"""Hexadecimal digits of a lineage that fit a PING: 64 bits."""


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of `conductor.json`; `lineage` is empty before the first registration.

    `heard_term` and `heard_revision` are what other stores of this lineage say that they were told.
    """

    lineage: str = ""
    term: int = 0
    revision: int = 0
    heard_term: int = 0
    heard_revision: int = 0

    @property
    def lineage_number(self) -> int:
        """Give the first 64 bits of the lineage, as PINGs carry them."""
        return int(self.lineage[:LINEAGE_DIGITS] or "0", 16)


class Allegiance:
    """See the module's head. Without a path it lasts as long as the process."""

    def __init__(self, path: Path | None = None) -> None:
        """Read what is known.

        Errors: MediaError DISK_FAILED for a file that cannot be read: forgetting is not safe.
        """
        self._path = path
        self.unsaved = ""
        self.known = Known() if path is None else _read(path)

    def check(self, registered: Registered) -> None:
        """Refuse a conductor that may not lead here. Errors: ClusterError WRONG_CLUSTER."""
        ours = self.known.lineage
        if ours not in ("", registered.lineage, *registered.predecessors):
            raise ClusterError(
                Code.WRONG_CLUSTER,
                f"the conductor has metastore {registered.lineage[:8]}, and what this store holds"
                f" was configured by {ours[:8]}",
                next_step="start the conductor on the metastore of this cluster; if that is lost:"
                " `pf conductor recover-config`",
            )

    def note(self, message: Message) -> bool:
        """Remember the term and revision of a message that is obeyed; whether they are news."""
        known = self.known
        lineage = message.lineage if isinstance(message, Registered) else known.lineage
        if lineage != known.lineage:
            known = Known(lineage=lineage)  # what was heard is of the history before
        term, revision = max(message.term, known.term), max(message.revision, known.revision)
        return self._keep(msgspec.structs.replace(known, term=term, revision=revision))

    def heard(self, term: int, lineage: int, revision: int) -> bool:
        """Take in what another store's PING carried; whether it is news.

        A PING of another lineage is passed over: its store tells its conductor itself.
        """
        known = self.known
        is_ours = known.lineage != "" and known.lineage_number == lineage
        if not is_ours or (term, revision) <= (known.heard_term, known.heard_revision):
            return False
        return self._keep(msgspec.structs.replace(known, heard_term=term, heard_revision=revision))

    @property
    def least_term(self) -> int:
        """The term below which nothing is obeyed."""
        return max(self.known.term, self.known.heard_term)

    def _keep(self, after: Known) -> bool:
        known = self.known
        if after == known and not self.unsaved:
            return False
        self.known = after
        if self._path is not None:
            try:
                write_whole(self._path, msgspec.json.encode(after))
                self.unsaved = ""
            except OSError as cause:
                self.unsaved = str(cause)
        return after != known


def _read(path: Path) -> Known:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Known)
    except FileNotFoundError:
        return Known()
    except (OSError, *UNREADABLE) as cause:
        raise MediaError(
            Code.DISK_FAILED,
            f"{path} cannot be read: {cause}",
            next_step="it says which conductor this store may obey; restore it, or remove it when"
            " the conductor is known to be the newest",
        ) from cause
