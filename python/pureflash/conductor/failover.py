"""Failover: which transition each shard needs next. Pure; the rules of T1 to T9 are the core's.

Theory of operation. For every shard the planner looks for one transition, the most urgent first,
and lets `pureflash.model.conf.apply` make the configuration or refuse it. A refusal is no outcome
and nobody is told: a transition that is still needed is planned again from the next view, and a
replica that asked repeats itself. So the planner need not be right for safety, only for progress,
with one exception: the configuration that it starts from must be the newest, which the stores have
to confirm after each start of a conductor (`standing.is_proven`).

Order of urgency, docs/internals/replication.md sections 2 and 5:

1. T6 when no ISR member is there in its registered life, after a gather of those that come back;
2. T2 when the primary's life is over, its store is silent, or its disk has failed;
3. T1 of another ISR member whose life is over, while somebody of the ISR is there;
4. T9 when the volume was attached anew: writers of before are fenced;
5. what replicas propose: they see dead links, failed writes and caught-up learners, and answer the
   request to hand over (T5, `balance`);
6. T8 of a learner that is gone, or on a slow disk;
7. T3 of a member that is there and in neither list, one learner per shard at a time, with a pause
   after one that was given up, and none on a slow disk;
8. T1 of a member on a demoted disk (`slow`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pureflash.conductor.slow import demoted, is_held_out, is_slow
from pureflash.conductor.standing import (
    failed_disk,
    has_good_disk,
    is_good,
    is_proven,
    is_reborn,
    report_of,
    store_name,
)
from pureflash.conductor.view import ShardKey, View
from pureflash.errors import CallerError, RouteError
from pureflash.metastore import keys
from pureflash.metastore.records import Write
from pureflash.model.conf import (
    AddLearner,
    Attach,
    ByConductor,
    ByReplica,
    Cancel,
    Facts,
    Promote,
    Proposer,
    Registration,
    Remove,
    Reopen,
    Transition,
    apply,
)
from pureflash.model.domain import Disk, Member, ShardConf, Store, VolumeIntent
from pureflash.model.messages import SILENT_MS, ReplicaReport

GATHER_MS: Final = 10_000
"""How long T6 waits for the other members of an ISR that was lost at once."""
START_MS: Final = 2 * SILENT_MS
"""How long a new conductor waits for a store that it has not heard of yet."""

Wish = tuple[Transition, Proposer, str]
"""A transition, who asks for it, and why."""


def plan_failover(view: View) -> Iterator[Write]:
    """Give the next configuration of every shard that needs one."""
    for key, conf in view.shards.items():
        volume = view.volumes.get(key[0])
        if volume is None or volume.intent is not VolumeIntent.PRESENT:
            continue
        if not is_proven(view, conf):
            continue
        for transition, proposer, reason in _wishes(view, key, conf):
            try:
                after = apply(conf, conf.epoch, transition, facts_of(view, key, conf, proposer))
            except (CallerError, RouteError):
                continue
            yield Write(keys.shard(*key), after, reason)
            break


def _wishes(view: View, key: ShardKey, conf: ShardConf) -> Iterator[Wish]:
    """Give what could be done, the most urgent first."""
    members = {member.copy: member for member in conf.members}
    isr = [members[copy] for copy in conf.isr]
    present = [member for member in isr if is_good(view, key, member)]
    if not present:
        yield from _reopen(view, key, isr)
        yield from _attach(view, key, conf)
        return
    primary = members[conf.primary]
    yield from _replace_lost(view, key, isr, primary)
    yield from _attach(view, key, conf)
    yield from _proposed(view, key, conf)
    for copy in conf.learners:
        learner = members[copy]
        if is_reborn(view, learner) or not view.is_online(learner.store):
            reason = f"{store_name(view, learner.store)} is not there any more"
            yield Cancel(copy=copy), ByConductor(), reason
        elif is_held_out(view, key, conf, learner):
            reason = f"the disk of {store_name(view, learner.store)} is slow"
            yield Cancel(copy=copy), ByConductor(), reason
    if not conf.learners and is_good(view, key, primary):
        yield from _add_learner(view, key, conf)
    for member in demoted(view, key, conf):
        reason = (
            f"the disk of {store_name(view, member.store)} is slow, and enough other copies are not"
        )
        yield Remove(copy=member.copy), ByConductor(), reason


def _replace_lost(view: View, key: ShardKey, isr: list[Member], primary: Member) -> Iterator[Wish]:
    """T2 and T1: members of the ISR that are lost, while somebody of it is there."""
    if why := _why_lost(view, key, primary):
        others = [member for member in isr if member is not primary and is_good(view, key, member)]
        # All of the ISR have what was acknowledged, so the best is a disk that keeps up.
        order = {one.copy: (is_slow(view, key, one), -_complete(view, key, one)) for one in others}
        for member in sorted(others, key=lambda member: order[member.copy]):
            reason = f"the primary on {store_name(view, primary.store)} is lost: {why}"
            yield Promote(copy=member.copy), ByConductor(), reason
    for member in isr:
        if member is not primary and is_reborn(view, member):
            reason = f"{store_name(view, member.store)} has restarted"
            yield Remove(copy=member.copy), ByConductor(), reason


def _attach(view: View, key: ShardKey, conf: ShardConf) -> Iterator[Wish]:
    """T9: the shard learns that its volume was attached anew."""
    attach_epoch = view.volumes[key[0]].attach_epoch
    if conf.attach_epoch < attach_epoch:
        yield Attach(attach_epoch=attach_epoch), ByConductor(), "its volume was attached anew"


def _proposed(view: View, key: ShardKey, conf: ShardConf) -> Iterator[Wish]:
    """Give what replicas of this configuration ask for, in the life that it names."""
    asking = {(member.store, member.incarnation): member.copy for member in conf.members}
    for proposal in view.proposals:
        copy = asking.get((proposal.store, proposal.incarnation))
        is_of_this = (proposal.volume_id, proposal.index, proposal.epoch) == (*key, conf.epoch)
        if copy is None or not is_of_this:
            continue
        kind = type(proposal.transition).__name__.lower()
        who = ByReplica(copy=copy, incarnation=proposal.incarnation)
        about = f"to {kind} copy {proposal.transition.copy}"
        yield proposal.transition, who, f"{store_name(view, proposal.store)} proposed {about}"


def _reopen(view: View, key: ShardKey, isr: list[Member]) -> Iterator[Wish]:
    """T6: the members of the ISR that are back in new lives, once they had time to come back."""
    back = [
        member
        for member in isr
        if view.is_online(member.store) and is_reborn(view, member) and report_of(view, key, member)
    ]
    if not back:
        return
    since = [view.observation(member.store).registered_at_ms for member in back]
    waited_ms = view.now_ms - min(at for at in since if at is not None)
    # A store that is back without its replica's disk brings no replica, however long T6 waits.
    without = [
        member
        for member in isr
        if member not in back and view.is_online(member.store) and failed_disk(view, key, member)
    ]
    if len(back) + len(without) < len(isr) and waited_ms < GATHER_MS:
        return
    good = [member for member in back if has_good_disk(view, key, member)]
    if not good:
        return
    best = max(good, key=lambda member: (_complete(view, key, member), -member.copy))
    present = tuple(
        Member(
            copy=member.copy,
            store=member.store,
            incarnation=view.stores[member.store].incarnation,
            disk=member.disk,
            format_uuid=member.format_uuid,
        )
        for member in good
    )
    names = ", ".join(store_name(view, member.store) for member in good)
    reason = f"all of its ISR was lost at once; back: {names}"
    yield Reopen(primary=best.copy, present=present), ByConductor(), reason


def _add_learner(view: View, key: ShardKey, conf: ShardConf) -> Iterator[Wish]:
    for member in conf.members:
        store = view.stores.get(member.store)
        if member.copy in conf.isr or store is None or not view.is_online(store.id):
            continue
        retry_at_ms = view.backoffs.get((*key, member.copy), 0)
        if view.now_ms < retry_at_ms or not has_good_disk(view, key, member):
            continue
        if is_held_out(view, key, conf, member):
            continue
        # Where the replica is by its store's report: its disk may have been replaced.
        disk = _disk_of(store, report_of(view, key, member))
        again = Member(
            copy=member.copy,
            store=member.store,
            incarnation=store.incarnation,
            disk=disk.disk_uuid,
            format_uuid=disk.format_uuid,
        )
        yield AddLearner(member=again), ByConductor(), f"{store.name} is back and is made equal"


def facts_of(view: View, key: ShardKey, conf: ShardConf, proposer: Proposer) -> Facts:
    """Give what is known when a transition of this shard is judged."""
    registered = {
        member.store: Registration(
            incarnation=view.stores[member.store].incarnation,
            is_reachable=view.is_online(member.store),
            has_good_journal=has_good_disk(view, key, member),
        )
        for member in conf.members
        if member.store in view.stores
    }
    complete = {
        member.copy: (0, _complete(view, key, member))
        for member in conf.members
        if report_of(view, key, member) is not None
    }
    ended = {
        member.store: view.stores[member.store].exited
        for member in conf.members
        if member.store in view.stores
    }
    return Facts(proposer=proposer, registered=registered, complete=complete, ended=ended)


def _why_lost(view: View, key: ShardKey, primary: Member) -> str:
    """Say why a primary cannot go on; empty when it can, or when it is too early to say."""
    if is_reborn(view, primary):
        return "its process has restarted"
    seen = view.observation(primary.store)
    if seen.heard_at_ms is None and view.now_ms < view.started_ms + START_MS:
        return ""
    if not view.is_online(primary.store):
        return seen.cause
    disk = failed_disk(view, key, primary)
    return f"its disk failed: {disk.reason}" if disk else ""


def _disk_of(store: Store, report: ReplicaReport | None) -> Disk:
    assert report is not None, "its disk was looked at before"
    return next(disk for disk in store.disks if disk.index == report.disk)


def _complete(view: View, key: ShardKey, member: Member) -> int:
    report = report_of(view, key, member)
    return report.complete_seq if report else 0
