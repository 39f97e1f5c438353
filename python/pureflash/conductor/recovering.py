"""The conductor's memory: whether to believe its records, and how to rebuild them.

Theory of operation. Every registration is compared with the reigns that the metastore knows
(`amnesia.why_foreign`). The first registration that remembers more is written down as the `amnesia`
record, so that no later start forgets it; from then on `Writer` refuses, the planner plans nothing,
and stores are asked for what they hold (`Recall`) instead of being led.

`recover` writes what `amnesia.plan_recovery` found, then gives the metastore a new lineage, then a
term above all that stores remember, and only then removes the `amnesia` record: stopped at any
point, it is begun again. In the end all agents have to register anew; stores go over to the new
lineage because its predecessors are named to them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from pureflash.conductor import states
from pureflash.conductor.agents import Sessions
from pureflash.conductor.amnesia import Held, RecoveryPlan, plan_recovery, why_foreign
from pureflash.conductor.view import View
from pureflash.conductor.writer import Writer
from pureflash.errors import ClusterError, Code
from pureflash.metastore import keys
from pureflash.metastore.lease import Reign, Term, raise_term
from pureflash.metastore.records import Records, Write
from pureflash.model.domain import Amnesia, ShardConf
from pureflash.model.messages import Heartbeat, Recall, Recalled, RegisterStore
from pureflash.model.names import check_person
from pureflash.model.rest import RecoverConfig, RecoveryView


class WaitFor(Protocol):
    """Reconcile, and wait until the view satisfies a condition, with the conductor's bound."""

    def __call__(self, is_so: Callable[[View], bool], /) -> Awaitable[None]:
        """Wait."""


class Recovering:
    """See the module's head. `told` is what each store said when it registered last."""

    def __init__(
        self,
        *,
        view: Callable[[], View],
        lock: asyncio.Lock,
        writer: Writer,
        records: Records,
        sessions: Sessions,
        expected: Mapping[int, str],
        wait_for: WaitFor,
        begin: Callable[[Term], None],
    ) -> None:
        """Take what belongs to the conductor; `begin` lets it lead another term.

        `expected` are names by id of stores that there are, whatever the records know of them.
        """
        self._expected = expected
        self.told: dict[int, RegisterStore] = {}
        self._recalled: dict[int, tuple[ShardConf, ...]] = {}
        self._parts: dict[int, tuple[int, list[ShardConf]]] = {}
        """By store: the number of the newest question, and the parts of its answer so far."""
        self._view = view
        self._lock = lock
        self._writer = writer
        self._records = records
        self._sessions = sessions
        self._wait_for = wait_for
        self._begin = begin

    async def is_amnesia(self, reigns: Sequence[Reign], message: RegisterStore) -> bool:
        """Compare what a store remembers with the records; whoever calls has the lock."""
        self._recalled.pop(message.store, None)
        if self._records.amnesia is None:
            reason = why_foreign(
                reigns,
                lineage=self._records.metastore.lineage,
                predecessors=self._view().cluster.predecessors,
                revision=self._records.revision,
                told=message,
            )
            if not reason:
                return False
            found = Amnesia(reason=reason, since_ms=self._view().wall_ms)
            write = Write(keys.AMNESIA, found, reason)
            await self._writer.write_all([write], is_recovery=True)
        return True

    async def hear(self, reigns: Sequence[Reign], store: int, message: Heartbeat) -> None:
        """Compare what a store has heard from others since it registered."""
        told = self.told[store]
        heard = (message.heard_term, message.heard_revision)
        if self._amnesia or heard == (told.heard_term, told.heard_revision):
            return
        async with self._lock:
            self.told[store] = msgspec.structs.replace(
                told, heard_term=message.heard_term, heard_revision=message.heard_revision
            )
            if await self.is_amnesia(reigns, self.told[store]):
                self.ask()

    def ask(self) -> None:
        """Let every connected store that has not done so tell what it holds."""
        for session in self._sessions:
            if session.store is not None and session.store not in self._recalled:
                number = self._sessions.send(session, Recall(id=0, term=0))
                self._parts[session.store] = (number, [])

    def recalled(self, store: int, message: Recalled) -> None:
        """Take in a part of what a store holds; a part that answers an earlier question is dropped.

        Mixed with the newest answer, the last part of an earlier one would make a list look whole
        that is not.
        """
        number, parts = self._parts.get(store, (0, []))
        if message.id != number:
            return
        parts.extend(message.confs)
        if message.is_last:
            self._recalled[store] = tuple(parts)
            del self._parts[store]

    async def recover(self, wish: RecoverConfig) -> RecoveryView:
        """Rebuild the records, or say what that would do; errors as `amnesia.plan_recovery`.

        UNAVAILABLE also when a connected store has not told in time what it holds.
        """
        by = check_person(wish.by)
        if not self._amnesia:
            self._recalled.clear()  # stores are led: what they follow has changed since
        self.ask()
        await self._wait_for(lambda _: not self._silent())
        async with self._lock:
            if silent := self._silent():
                raise ClusterError(
                    Code.UNAVAILABLE,
                    f"{', '.join(silent)} has not told what it holds",
                    next_step="look at its log with `pf logs`, and try again",
                )
            lineage = self._records.metastore.lineage
            plan = plan_recovery(
                self._view(),
                self._held(),
                expected=self._expected,
                lineage=lineage,
                without=wish.without,
                by=by,
            )
            if wish.dry_run:
                return self._shown(plan, is_done=False)
            await self._carry_out(plan)
        for session in self._sessions:
            session.close()  # all register again, with the new lineage
        return self._shown(plan, is_done=True)

    @property
    def _amnesia(self) -> bool:
        return self._records.amnesia is not None

    def _connected(self) -> list[int]:
        return [session.store for session in self._sessions if session.store is not None]

    def _silent(self) -> list[str]:
        names = (store for store in self._connected() if store not in self._recalled)
        return [self.told[store].name for store in names]

    def _held(self) -> dict[int, Held]:
        """Put together what connected stores registered, hold now, and follow."""
        held: dict[int, Held] = {}
        for store in self._connected():
            replicas = tuple(self._view().observation(store).replicas.values())
            told = msgspec.structs.replace(self.told[store], replicas=replicas)
            held[store] = Held(registration=told, confs=self._recalled[store])
        return held

    async def _carry_out(self, plan: RecoveryPlan) -> None:
        metastore = self._records.metastore
        await self._writer.write_all(list(plan.writes), is_recovery=True)
        await metastore.begin_lineage(secrets.token_hex(16))
        reign = await raise_term(
            metastore,
            now_ms=self._view().wall_ms,
            since=await metastore.revision(),
            above=plan.above,
            is_anew=True,
        )
        if reign is None:
            raise ClusterError(Code.UNAVAILABLE, "another conductor took the lead")
        self._begin(reign)
        if self._amnesia:
            write = Write(keys.AMNESIA, None, plan.job.reason)
            await self._writer.write_all([write], is_recovery=True)

    def _shown(self, plan: RecoveryPlan, *, is_done: bool) -> RecoveryView:
        amnesia = self._records.amnesia
        return RecoveryView(
            reason=amnesia.reason if amnesia else "",
            changes=list(plan.found),
            given_up=list(plan.given_up),
            job=states.job_view(plan.job) if is_done else None,
        )
