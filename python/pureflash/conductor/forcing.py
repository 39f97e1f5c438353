"""Carrying out what a person decides about a shard whose in-sync copies are lost (T7).

Theory of operation. The plan is made from the view twice: once to answer what would happen, and
again under the lock when it is to happen. Between the two, lives of stores that the person vouches
to be over are recorded as ended and told to the other stores, as a supervisor's report is; that
stands even if nothing follows. The record of the decision (a job that stays as long as its volume)
and the configuration go to the metastore in one batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from pureflash.conductor import requests, states
from pureflash.conductor.force import ForcePlan, judge_force, writes_of
from pureflash.conductor.view import View
from pureflash.conductor.writer import Writer
from pureflash.errors import CallerError, Code
from pureflash.model.domain import Job
from pureflash.model.names import check_person
from pureflash.model.rest import ForceAccept, ForceAcceptView

CHANGED_STEP: Final = "look at it again with --dry-run"


class EndStore(Protocol):
    """Record that a life of a store is over, and tell the other stores."""

    async def __call__(self, store_id: int, *, incarnation: int, reason: str) -> None:
        """End it; an older life than the known one is no news."""


class Forcing:
    """See the module's head."""

    def __init__(
        self,
        *,
        view: Callable[[], View],
        lock: asyncio.Lock,
        writer: Writer,
        end_store: EndStore,
        kick: Callable[[], None],
    ) -> None:
        """Take what belongs to the conductor."""
        self._view = view
        self._lock = lock
        self._writer = writer
        self._end_store = end_store
        self._kick = kick

    async def force_accept(self, reference: str, wish: ForceAccept) -> ForceAcceptView:
        """Let a copy count, or say what that would do; errors as `force.judge_force`.

        The same again, after it was done, changes nothing and gives the first record.
        """
        by = check_person(wish.by)
        plan = self._judge(reference, wish)
        if wish.dry_run or plan.done is not None:
            return _shown(plan, plan.done)
        for store in plan.revoke:
            reason = f"{by} vouches that its process is off for good"
            await self._end_store(store.id, incarnation=store.incarnation, reason=reason)
        async with self._lock:
            again = self._judge(reference, wish)
            if again.done is not None:
                return _shown(again, again.done)
            if again.conf.epoch != plan.conf.epoch or again.revoke:
                raise CallerError(
                    Code.UNSAFE,
                    f"{plan.volume.name}/{plan.conf.index} or its stores have changed meanwhile",
                    next_step=CHANGED_STEP,
                )
            job, writes = writes_of(self._view(), again, by=by)
            await self._writer.take_id()
            await self._writer.write_all(writes)
        self._kick()
        return _shown(plan, job)

    def _judge(self, reference: str, wish: ForceAccept) -> ForcePlan:
        view = self._view()
        volume = requests.find_volume(view, reference)
        return judge_force(
            view, volume, index=wish.shard, reference=wish.store, may_revoke=wish.revoke
        )


def _shown(plan: ForcePlan, job: Job | None) -> ForceAcceptView:
    return ForceAcceptView(
        volume=plan.volume.name,
        shard=plan.conf.index,
        store=plan.store.name,
        epoch=plan.conf.epoch,
        copies=list(plan.copies),
        loss=plan.loss,
        revoked=[store.name for store in plan.revoke],
        job=None if job is None else states.job_view(job),
    )
