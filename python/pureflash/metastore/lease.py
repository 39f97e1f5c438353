"""Leadership of the conductor: `lease/conductor` and `term`, on any metastore.

A lease is one record with an owner and an end; it is taken when it is absent, ended, or the
owner's own (a conductor that restarts need not wait for itself: the metastore's own lock, or the
fresh owner name of each process, keeps two apart). Each taking raises the term *before* anyone is
told, so that stores can refuse whoever led before. Time is the caller's, in milliseconds since
1970.

A term is at least the time of its taking, in seconds. Counted by ones, a metastore that was
restored from a copy would give a number again that stores know from the history which was lost; so
every term names one reign for ever. With each is kept the revision at which it began: what a store
was told in a reign is of this history if and only if the reign is in the list and had come as far
(`pureflash.conductor.amnesia`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from pureflash.errors import ClusterError, Code
from pureflash.metastore import keys
from pureflash.metastore.interface import Cas, Metastore

LEASE_MS: Final = 10_000
RENEW_MS: Final = 3_000
REIGNS_KEPT: Final = 256


@dataclass(frozen=True, slots=True)
class Lease:
    """The record; `ends_at_ms` in milliseconds since 1970."""

    owner: str
    ends_at_ms: int


@dataclass(frozen=True, slots=True)
class Reign:
    """A conductor's time: its term, and the revision of the metastore when it began."""

    term: int
    since: int


@dataclass(frozen=True, slots=True)
class Term:
    """The record of the newest term, 0 before the first conductor, and the reigns up to it."""

    term: int
    reigns: tuple[Reign, ...] = ()


async def take_leadership(store: Metastore, *, owner: str, now_ms: int) -> Term | None:
    """Try to lead; gives the new term, or None while another owner's lease runs."""
    since = await store.revision()
    if not await renew_lease(store, owner=owner, now_ms=now_ms):
        return None
    return await raise_term(store, now_ms=now_ms, since=since)


async def raise_term(
    store: Metastore, *, now_ms: int, since: int, above: int = 0, is_anew: bool = False
) -> Term | None:
    """Begin a reign at revision `since`, with a term greater than `above` and all before.

    `is_anew`: the reigns before are of another history. None: somebody else raised it meanwhile.
    """
    entry = await store.get(keys.TERM)
    before = msgspec.json.decode(entry.value, type=Term) if entry else Term(0)
    term = max(before.term + 1, above + 1, now_ms // 1000)
    kept = () if is_anew else before.reigns[1 - REIGNS_KEPT :]
    after = Term(term, (*kept, Reign(term, since)))
    cas = Cas(keys.TERM, entry.revision if entry else 0, msgspec.json.encode(after))
    (result,) = await store.commit([cas])
    return after if result.is_applied else None


async def renew_lease(store: Metastore, *, owner: str, now_ms: int) -> bool:
    """Let the lease run on for `LEASE_MS` from now; False when it is another's."""
    entry = await store.get(keys.LEASE)
    if entry is not None:
        lease = msgspec.json.decode(entry.value, type=Lease)
        if lease.owner != owner and lease.ends_at_ms > now_ms:
            return False
    value = msgspec.json.encode(Lease(owner, now_ms + LEASE_MS))
    (result,) = await store.commit([Cas(keys.LEASE, entry.revision if entry else 0, value)])
    return result.is_applied


class Lead:
    """The lead of one conductor, renewed from time to time; both clocks are the caller's."""

    def __init__(self, store: Metastore, *, owner: str) -> None:
        """Keep the lease of `owner`, who has taken it."""
        self._store = store
        self._owner = owner
        self._renew_at_ms = 0

    async def keep(self, *, now_ms: int, wall_ms: int) -> None:
        """Renew the lease if it is time. `now_ms` monotonic, `wall_ms` since 1970.

        Errors: ClusterError UNAVAILABLE when another conductor leads.
        """
        if now_ms < self._renew_at_ms:
            return
        if not await renew_lease(self._store, owner=self._owner, now_ms=wall_ms):
            raise ClusterError(Code.UNAVAILABLE, "another conductor took the lead")
        self._renew_at_ms = now_ms + RENEW_MS
