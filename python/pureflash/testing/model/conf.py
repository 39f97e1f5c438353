"""T1 to T9 once more, from the table in docs/internals/replication.md section 2 alone.

Theory of operation. `crates/shard` is what runs; this is the second opinion on it, written with
sets and without looking there. `successor` gives the configuration that a proposal makes or raises
`Refused` with the words of the guard that forbids it; `step_name` says which transition leads from
one stored configuration to the next by trying all, with whatever facts would allow each.
Slow, obvious, pure. Proposals and facts are the records of `pureflash.model.conf`, which hold no
rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pureflash.model.conf import (
    MEMBERS_MAX,
    AddLearner,
    Admit,
    Attach,
    ByConductor,
    ByHuman,
    ByReplica,
    Cancel,
    Facts,
    ForceAccept,
    Promote,
    Properties,
    Registration,
    Remove,
    Reopen,
    Transfer,
    Transition,
)
from pureflash.model.domain import ID_MAX, Member, ShardConf

NAMES: dict[type, str] = {
    Remove: "T1",
    Promote: "T2",
    AddLearner: "T3",
    Admit: "T4",
    Transfer: "T5",
    Reopen: "T6",
    ForceAccept: "T7",
    Cancel: "T8",
    Attach: "T9",
    Properties: "T9",
}


class Refused(Exception):
    """A guard is not met; the text is the guard."""


def _require(is_met: bool, guard: str) -> None:
    if not is_met:
        raise Refused(guard)


def check_sound(conf: ShardConf) -> None:
    """Say whether this can be a configuration at all; raises `Refused`."""
    isr, learners = set(conf.isr), set(conf.learners)
    copies = [member.copy for member in conf.members]
    stores = [member.store for member in conf.members]
    lives = [member.incarnation for member in conf.members]
    for numbers in (conf.isr, conf.learners, copies):
        _require(list(numbers) == sorted(set(numbers)), "lists ascend, nobody is there twice")
    _require(len(set(stores)) == len(stores), "one member per store")
    _require(len(copies) <= MEMBERS_MAX, "eight members at most")
    _require(isr | learners <= set(copies), "whoever is named is a member")
    _require(not isr & learners, "nobody is a learner and in the ISR")
    _require(conf.primary in isr, "the primary is in the ISR, which therefore is not empty")
    _require(1 <= conf.min_write <= conf.rf <= MEMBERS_MAX, "1 <= min_write <= rf <= 8")
    named = [conf.epoch, *stores, *lives]
    _require(all(1 <= number <= ID_MAX for number in named), "what is named has a number")
    rest = [conf.volume_id, conf.history_id, conf.attach_epoch]
    _require(all(0 <= number <= ID_MAX for number in rest), "numbers fit into JSON")


def successor(conf: ShardConf, epoch: int, proposal: Transition, facts: Facts) -> ShardConf:
    """Give the configuration that `proposal` makes of `conf`; raises `Refused`."""
    _require(epoch == conf.epoch, "proposals are for the stored epoch")
    _check_proposer(conf, proposal, facts)
    made = replace(_changed(conf, proposal, facts), epoch=conf.epoch + 1)
    check_sound(made)
    return made


def _life_is_registered(member: Member, facts: Facts) -> bool:
    found = facts.registered.get(member.store)
    return found is not None and found.incarnation == member.incarnation


def _is_reachable(member: Member, facts: Facts) -> bool:
    return _life_is_registered(member, facts) and facts.registered[member.store].is_reachable


def _is_good(member: Member, facts: Facts) -> bool:
    return _is_reachable(member, facts) and facts.registered[member.store].has_good_journal


def _check_proposer(conf: ShardConf, proposal: Transition, facts: Facts) -> None:
    """Check the column "Proposer"."""
    match facts.proposer:
        case ByHuman():
            _require(isinstance(proposal, ForceAccept), "people only force a history")
        case ByConductor():
            is_mine = not isinstance(proposal, ForceAccept | Admit | Transfer)
            _require(is_mine, "the conductor neither admits, nor transfers, nor forces")
        case ByReplica(copy=copy, incarnation=incarnation):
            me = {member.copy: member for member in conf.members}.get(copy)
            _require(me is not None and me.incarnation == incarnation, "the life in the conf")
            assert me is not None
            _require(_life_is_registered(me, facts), "the life in the registry")
            of_primary = isinstance(proposal, Remove | Promote | Admit | Transfer | Cancel)
            of_named = isinstance(proposal, Promote) and proposal.copy == copy
            _require(of_named or (of_primary and copy == conf.primary), "not this replica's")


def _changed(conf: ShardConf, proposal: Transition, facts: Facts) -> ShardConf:
    """Check the column "guard" and do the column "Result", but for the epoch."""
    match proposal:
        case Remove(copy=copy):
            return _removed(conf, copy, facts)
        case Promote(copy=copy):
            _check_secondary(conf, copy)
            _require(_is_good(conf.member(copy), facts), "registered, good journal, reachable now")
            return _with(conf, primary=copy, isr=set(conf.isr) - {conf.primary})
        case Transfer(copy=copy):
            _check_secondary(conf, copy)
            _require(_life_is_registered(conf.member(copy), facts), "S is in its registered life")
            made = _with(conf, primary=copy)
        case AddLearner() | Admit() | Cancel():
            made = _learners_changed(conf, proposal, facts)
        case Reopen():
            made = _reopened(conf, proposal, facts)
        case ForceAccept():
            made = _forced(conf, proposal, facts)
        case Attach(attach_epoch=attach_epoch):
            _require(attach_epoch > conf.attach_epoch, "attach epochs grow")
            made = replace(conf, attach_epoch=attach_epoch)
        case Properties(rf=rf, min_write=min_write):
            _require((rf, min_write) != (conf.rf, conf.min_write), "something changes")
            made = replace(conf, rf=rf, min_write=min_write)
    return made


def _check_secondary(conf: ShardConf, copy: int) -> None:
    _require(copy in set(conf.isr) - {conf.primary}, "S is in the ISR and not primary")


def _removed(conf: ShardConf, copy: int, facts: Facts) -> ShardConf:
    _check_secondary(conf, copy)
    rest = set(conf.isr) - {copy}
    if isinstance(facts.proposer, ByConductor):
        _require(conf.member(copy).store in facts.registered, "S has registered")
        there = sum(_is_reachable(conf.member(other), facts) for other in rest)
        if _life_is_registered(conf.member(copy), facts):
            _require(
                there >= max(2, conf.min_write), "S has a new life, or enough others are there"
            )
        _require(there > 0, "the last one that can serve is never removed automatically")
    return _with(conf, isr=rest)


def _learners_changed(
    conf: ShardConf, proposal: AddLearner | Admit | Cancel, facts: Facts
) -> ShardConf:
    members = {member.copy: member for member in conf.members}
    isr, learners = set(conf.isr), set(conf.learners)
    match proposal:
        case AddLearner(member=member):
            _require(member.copy not in isr, "R is not in the ISR")
            is_same = member.copy in learners and members[member.copy] == member
            _require(not is_same, "R is not a learner in this life already")
            _require(_life_is_registered(member, facts), "R is meant in its registered life")
            members[member.copy] = member
            return _with(conf, learners=learners | {member.copy}, members=members)
        case Admit(copy=copy, incarnation=incarnation):
            _require(copy in learners, "R is a learner")
            _require(incarnation == members[copy].incarnation, "equal in request and conf")
            _require(_life_is_registered(members[copy], facts), "equal in conf and registry")
            return _with(conf, isr=isr | {copy}, learners=learners - {copy})
        case Cancel(copy=copy):
            _require(copy in learners, "R is a learner")
            return _with(conf, learners=learners - {copy})


def _forced(conf: ShardConf, proposal: ForceAccept, facts: Facts) -> ShardConf:
    members = {member.copy: member for member in conf.members}
    member = proposal.member
    _require(member.copy in members, "R is a replica of the shard")
    _require(member.copy not in conf.isr, "what is in sync is opened without loss")
    _require(_is_good(member, facts), "R is meant in its registered life, there, and readable")
    for copy in conf.isr:
        lost = members[copy]
        found = facts.registered.get(lost.store)
        is_over = found is not None and found.incarnation != lost.incarnation
        is_over = is_over or facts.ended.get(lost.store, 0) >= lost.incarnation
        _require(is_over, "proof that nobody of the ISR serves in the life of the conf")
        is_back = found is not None and found.is_reachable and found.has_good_journal
        _require(not is_back, "nobody of the ISR is back with everything")
    forced_before, forced_now = conf.history_id >> 44, proposal.history_id >> 44
    _require(forced_now > forced_before, "a history that was forced once more")
    attach_epoch = conf.attach_epoch + 1
    forced = replace(conf, history_id=proposal.history_id, attach_epoch=attach_epoch)
    members[member.copy] = member
    return _with(forced, primary=member.copy, isr={member.copy}, learners=set(), members=members)


def _reopened(conf: ShardConf, proposal: Reopen, facts: Facts) -> ShardConf:
    members = {member.copy: member for member in conf.members}
    lost = {copy for copy in conf.isr if not _is_reachable(members[copy], facts)}
    _require(lost == set(conf.isr), "no ISR member is reachable in its registered life")
    present = {member.copy: member for member in proposal.present}
    _require(len(present) == len(proposal.present), "nobody is present twice")
    for copy, member in present.items():
        _require(copy in members, "whoever is present is a member")
        before = replace(members[copy], incarnation=member.incarnation)
        _require(before == member, "where the conf has it, in a new life")
        _require(_is_good(member, facts), "registered, good journal, reachable now")
    isr = set(conf.isr) & set(present)
    _require(proposal.primary in isr, "the candidate is of the last ISR, and present")
    for copy in conf.isr:
        found = facts.registered.get(members[copy].store)
        is_back = found is not None and found.is_reachable and found.has_good_journal
        _require(copy in isr or not is_back, "every good member of the last ISR is taken")
    _require(isr <= set(facts.complete), "every candidate has told its complete_lsn")
    highest = max(tuple(facts.complete[copy]) for copy in isr)
    _require(tuple(facts.complete[proposal.primary]) == highest, "highest complete_lsn")
    return _with(conf, primary=proposal.primary, isr=isr, learners=set(), members=members | present)


def _with(
    conf: ShardConf,
    *,
    primary: int | None = None,
    isr: set[int] | None = None,
    learners: set[int] | None = None,
    members: dict[int, Member] | None = None,
) -> ShardConf:
    return replace(
        conf,
        primary=conf.primary if primary is None else primary,
        isr=conf.isr if isr is None else tuple(sorted(isr)),
        learners=conf.learners if learners is None else tuple(sorted(learners)),
        members=(
            conf.members
            if members is None
            else tuple(member for _, member in sorted(members.items()))
        ),
    )


def step_name(old: ShardConf, new: ShardConf) -> str | None:
    """Name the transition that leads from `old` to `new`, if facts exist that allow one (I7)."""
    for proposal, facts in _attempts(old, new):
        try:
            made = successor(old, old.epoch, proposal, facts)
        except Refused:
            continue
        if made == new:
            return NAMES[type(proposal)]
    return None


def _attempts(old: ShardConf, new: ShardConf) -> Iterator[tuple[Transition, Facts]]:
    """Every proposal that could have made `new`, each with the friendliest facts."""
    lives = {member.store: member for member in (*old.members, *new.members)}
    registered = {store: _registered(member) for store, member in lives.items()}
    primary = old.member(old.primary)
    # For what the old primary asks, its own life counts, whatever the new configuration says.
    registered_then = registered | {primary.store: _registered(primary)}
    asks = ByReplica(copy=primary.copy, incarnation=primary.incarnation)
    by_primary = Facts(proposer=asks, registered=registered_then)
    by_conductor = Facts(proposer=ByConductor(), registered=registered)
    for copy in old.isr:
        yield Remove(copy=copy), by_primary
        yield Promote(copy=copy), by_conductor
        yield Transfer(copy=copy), by_primary
    for copy in old.learners:
        yield Cancel(copy=copy), by_conductor
        yield Admit(copy=copy, incarnation=old.member(copy).incarnation), by_primary
    for member in new.members:
        yield AddLearner(member=member), by_conductor
        forced = ForceAccept(member=member, history_id=new.history_id)
        ended = {lost.store: lost.incarnation for lost in old.members}
        is_there = {member.store: _registered(member)}
        yield forced, Facts(proposer=ByHuman(), registered=is_there, ended=ended)
    yield Attach(attach_epoch=new.attach_epoch), by_conductor
    yield Properties(rf=new.rf, min_write=new.min_write), by_conductor
    present = tuple(member for member in new.members if member not in old.members)
    back = Facts(
        proposer=ByConductor(),
        registered={member.store: _registered(member) for member in present},
        complete=dict.fromkeys(new.isr, (0, 0)),
    )
    yield Reopen(primary=new.primary, present=present), back


def _registered(member: Member) -> Registration:
    return Registration(incarnation=member.incarnation, is_reachable=True, has_good_journal=True)
