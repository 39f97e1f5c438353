"""T7: a person decides which copy of a shard counts, when no in-sync copy is left. Pure.

Theory of operation. `judge_force` looks at one shard and a wish and gives the plan that the person
reads before deciding: every copy with what is last known of it, what would be lost, and which
lives of stores the person has to answer for (`revoke`). It raises what stands against it. The
configuration itself is made and judged once more by the core (`pureflash.model.conf.apply`); the
checks here say the same in words that name stores and next steps.

Two things must be certain before a copy that lacks acknowledged writes may count, or nothing is
done and the answer is UNSAFE: no in-sync copy is there to be opened without any loss, and no life
that the configuration names can go on serving clients that still reach it. The second is proven by
a newer registration of the store, by its supervisor's report that the process ended, or by a person
who vouches for it: that life is then recorded as ended, and may never register again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from pureflash.conductor import states
from pureflash.conductor.failover import facts_of
from pureflash.conductor.standing import store_name
from pureflash.conductor.view import View
from pureflash.errors import CallerError, ClusterError, Code, PureFlashError
from pureflash.metastore import keys
from pureflash.metastore.records import Write
from pureflash.model.conf import ByHuman, Facts, ForceAccept, apply, next_history, operation_text
from pureflash.model.domain import (
    Job,
    JobState,
    Member,
    ShardConf,
    Store,
    StoreState,
    Volume,
    VolumeIntent,
)
from pureflash.model.names import check_person
from pureflash.model.rest import ForcedCopy

FORCE_JOB: Final = "volume.force_accept"
WINDOW: Final = 1_024
"""Operations that a copy can have beyond what it knows to be committed
(docs/internals/replication.md, section 1); one that has more was being made equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcePlan:
    """What would be done to one shard, as a person has to know it before deciding.

    `revoke` are stores whose registered life is to be recorded as ended first. `done` is the job of
    an equal request that was carried out before; then nothing is left to do.
    """

    volume: Volume
    conf: ShardConf
    store: Store
    copies: tuple[ForcedCopy, ...]
    loss: str
    revoke: tuple[Store, ...] = ()
    done: Job | None = None


def judge_force(
    view: View, volume: Volume, *, index: int, reference: str, may_revoke: bool
) -> ForcePlan:
    """Say what forcing the copy on store `reference` would do to shard `index`, or why not.

    Errors: NOT_FOUND for shard, store or copy; IN_USE while clients may write through an export;
    UNAVAILABLE while the copy is not there; UNSAFE for what is not proven, with what would do so.
    """
    conf = _conf(view, volume, index)
    store = _store(view, reference)
    member = _member(view, volume, conf, store)
    copies = tuple(_copy(view, conf, one) for one in conf.members)
    loss = _loss(view, conf, member)
    plan = ForcePlan(volume=volume, conf=conf, store=store, copies=copies, loss=loss)
    if done := _done_before(view, conf, store):
        return replace(plan, done=done)
    _check_writers(view, volume)
    _check_chosen(view, plan, member)
    return replace(plan, revoke=_unproven(view, plan, may_revoke=may_revoke))


def writes_of(view: View, plan: ForcePlan, *, by: str) -> tuple[Job, list[Write]]:
    """Give the record of the decision, and what to store: both in one batch.

    `plan.revoke` must have been recorded as ended before. Errors: UNSAFE with the core's guard.
    """
    by = check_person(by)
    conf, volume = plan.conf, plan.volume
    member = next(one for one in conf.members if one.store == plan.store.id)
    again = Member(
        copy=member.copy,
        store=member.store,
        incarnation=plan.store.incarnation,
        disk=member.disk,
        format_uuid=member.format_uuid,
    )
    history_id = next_history(conf.history_id)
    wish = ForceAccept(member=again, history_id=history_id)
    after = _applied(conf, wish, facts_of(view, (conf.volume_id, conf.index), conf, ByHuman()))
    reason = (
        f"{by} decided that the copy on {plan.store.name} counts, from epoch {after.epoch} on;"
        f" lost: {plan.loss}"
    )
    job = Job(
        id=view.cluster.next_id,
        kind=FORCE_JOB,
        target=f"{volume.name}/{conf.index}",
        volume_id=volume.id,
        state=JobState.SUCCEEDED,
        done=1,
        total=1,
        unit="shards",
        reason=reason,
        created_at_ms=view.wall_ms,
        finished_at_ms=view.wall_ms,
        index=conf.index,
        store=plan.store.id,
        history_id=history_id,
    )
    key = keys.shard(conf.volume_id, conf.index)
    return job, [Write(keys.job(job.id), job, reason), Write(key, after, reason)]


def _applied(conf: ShardConf, wish: ForceAccept, facts: Facts) -> ShardConf:
    try:
        return apply(conf, conf.epoch, wish, facts)
    except PureFlashError as refusal:
        raise CallerError(
            Code.UNSAFE,
            f"the rules of the shard do not allow it: {refusal.message}",
            next_step="see `pf volume explain`",
        ) from refusal


def _conf(view: View, volume: Volume, index: int) -> ShardConf:
    if volume.intent is not VolumeIntent.PRESENT:
        raise CallerError(Code.NOT_FOUND, f"{volume.name} is being deleted")
    conf = view.shards.get((volume.id, index))
    if conf is None or index >= volume.shard_count:
        raise CallerError(
            Code.NOT_FOUND,
            f"{volume.name} has no shard {index}",
            next_step=f"its shards are 0 to {volume.shard_count - 1}: `pf volume explain`",
        )
    return conf


def _store(view: View, reference: str) -> Store:
    store = view.find_store(reference)
    if store is None:
        raise CallerError(
            Code.NOT_FOUND, f"there is no store {reference[:96]!r}", next_step="see `pf store list`"
        )
    return store


def _member(view: View, volume: Volume, conf: ShardConf, store: Store) -> Member:
    found = next((one for one in conf.members if one.store == store.id), None)
    if found is None:
        names = ", ".join(store_name(view, one.store) for one in conf.members)
        raise CallerError(
            Code.NOT_FOUND,
            f"{store.name} has no copy of {volume.name}/{conf.index}",
            next_step=f"its copies are on {names}",
        )
    return found


def _done_before(view: View, conf: ShardConf, store: Store) -> Job | None:
    """Give the job that made the present history, if it chose this store."""
    for job in view.jobs.values():
        is_of_shard = (job.kind, job.volume_id, job.index) == (
            FORCE_JOB,
            conf.volume_id,
            conf.index,
        )
        if is_of_shard and (job.store, job.history_id) == (store.id, conf.history_id):
            return job
    return None


def _check_writers(view: View, volume: Volume) -> None:
    """Refuse while an export may write: its clients' caches are of the content that is lost."""
    writers = [export for export in view.exports_of(volume.id) if not export.is_read_only]
    if writers:
        raise CallerError(
            Code.IN_USE,
            f"{volume.name} is exported for writing by {writers[0].kind}, and what its clients hold"
            " in memory belongs to the content that would be lost",
            next_step=f"`pf export delete {volume.name}` first, and export it again afterwards",
        )


def _check_chosen(view: View, plan: ForcePlan, member: Member) -> None:
    """Refuse a copy that needs no force, or is not there."""
    where = f"{plan.volume.name}/{plan.conf.index}"
    if member.copy in plan.conf.isr:
        raise CallerError(
            Code.UNSAFE,
            f"the copy of {where} on {plan.store.name} is in sync: it is opened by itself, without"
            " loss",
            next_step=f"start {plan.store.name}, or see `pf volume explain {plan.volume.name}`",
        )
    seen = view.observation(plan.store.id)
    registered = facts_of(view, (plan.conf.volume_id, plan.conf.index), plan.conf, ByHuman())
    if seen.state is not StoreState.ONLINE:
        raise ClusterError(
            Code.UNAVAILABLE,
            f"{plan.store.name} is {seen.state}: {seen.cause}",
            next_step=f"start {plan.store.name} first",
        )
    if not registered.registered[plan.store.id].has_good_journal:
        raise ClusterError(
            Code.UNAVAILABLE,
            f"{plan.store.name} has no usable copy of {where}",
            next_step="see `pf disk list`, or choose another copy",
        )


def _unproven(view: View, plan: ForcePlan, *, may_revoke: bool) -> tuple[Store, ...]:
    """Give the stores whose life a person vouches to be over; the others are proven to be."""
    facts = facts_of(view, (plan.conf.volume_id, plan.conf.index), plan.conf, ByHuman())
    where = f"{plan.volume.name}/{plan.conf.index}"
    revoke: list[Store] = []
    for copy in plan.conf.isr:
        member = plan.conf.member(copy)
        name = store_name(view, member.store)
        known = facts.registered.get(member.store)
        if known is not None and known.is_reachable and known.has_good_journal:
            raise CallerError(
                Code.UNSAFE,
                f"the copy of {where} on {name} is in sync and there; nothing has to be lost",
                next_step="wait until it is opened, 10 s at most: `pf volume explain`",
            )
        if proof_of(view, member):
            continue
        if view.observation(member.store).state is StoreState.ONLINE:
            raise CallerError(
                Code.UNSAFE,
                f"{name} runs, and may still serve {where}",
                next_step=f"stop {name}, so that the end of its process is known",
            )
        store = view.stores.get(member.store)
        if not may_revoke or store is None:
            raise CallerError(
                Code.UNSAFE,
                f"{name} may still serve {where}: nobody has seen the end of its process",
                next_step=f"start {name} again; or, if its process or machine is off for good, say"
                " so with --revoke: that life can then never register again",
            )
        revoke.append(store)
    return tuple(revoke)


def proof_of(view: View, member: Member) -> str:
    """Say how it is known that a member's life in the configuration is over; empty: it is not."""
    store = view.stores.get(member.store)
    if store is None:
        return ""
    if store.incarnation != member.incarnation:
        return f"{store.name} has restarted since"
    return f"the end of {store.name} was reported" if store.exited >= member.incarnation else ""


def _copy(view: View, conf: ShardConf, member: Member) -> ForcedCopy:
    """Describe one copy, as far as anything is known of it."""
    report = view.observation(member.store).replicas.get((conf.volume_id, conf.index))
    role = states.role_in(conf, member)
    ahead = 0 if report is None else max(0, report.applied_seq - report.complete_seq)
    is_whole = report is not None and role != "learner" and ahead <= WINDOW
    if member.copy in conf.isr:
        note = f"in sync; {proof_of(view, member) or 'it is not known to have ended'}"
        is_whole = report is not None
    elif report is None:
        note = "nothing is known of it"
    elif not is_whole:
        upto = operation_text(report.applied_seq)
        note = f"no consistent point: it was being made equal, parts are newer, up to {upto}"
    else:
        more = f", and some of the next {ahead}" if ahead else ""
        note = f"everything up to there{more}"
    return ForcedCopy(
        copy=member.copy,
        store=member.store,
        name=store_name(view, member.store),
        state=view.observation(member.store).state,
        role=role,
        last_seq=None if report is None else report.complete_seq,
        is_consistent=is_whole,
        note=note,
    )


def _loss(view: View, conf: ShardConf, member: Member) -> str:
    """Say in one sentence what is lost when this copy counts."""
    key = (conf.volume_id, conf.index)
    name = store_name(view, member.store)
    mine = view.observation(member.store).replicas.get(key)
    if mine is None:
        return f"what {name} holds is not known"
    reports = [view.observation(conf.member(copy).store).replicas.get(key) for copy in conf.isr]
    known = [report.complete_seq for report in reports if report is not None]
    upto = f"every write acknowledged after operation {operation_text(mine.complete_seq)}"
    if not known:
        more = "how many is not known"
    elif max(known) > mine.complete_seq:
        more = f"at least {max(known) - mine.complete_seq} by the last report of a copy in sync"
    else:
        more = "none by the last report of a copy in sync, perhaps some after it"
    if not _copy(view, conf, member).is_consistent:
        more += f"; the copy on {name} has no consistent point, so what is on it may be damaged"
    return f"{upto}, {more}"
