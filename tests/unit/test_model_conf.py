"""The Rust transitions and the executable specification say the same of random proposals."""

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any, Final

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from pureflash.errors import PureFlashError
from pureflash.model import conf as steps
from pureflash.model.domain import Member, ShardConf
from pureflash.testing.model import conf as spec

WALKS: Final = 600
WALK_STEPS: Final = 30


def member(copy: int, store: int, life: int = 1) -> Member:
    return Member(
        copy=copy,
        store=store,
        incarnation=store * 100 + life,
        disk=f"{store:032x}",
        format_uuid=f"{store + 1:032x}",
    )


def start() -> ShardConf:
    return ShardConf(
        volume_id=7,
        index=1,
        epoch=1,
        rf=3,
        min_write=2,
        primary=0,
        isr=(0, 1, 2),
        learners=(),
        members=(member(0, 1), member(1, 2), member(2, 3)),
        history_id=7,
        attach_epoch=1,
    )


class Walk:
    """A shard whose stores restart, and whose proposals are mostly sensible."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.conf = start()
        self.lives = dict.fromkeys(range(1, 7), 1)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def crash_some(self) -> None:
        everybody = self.chance(0.04)
        for store in self.lives:
            self.lives[store] += everybody or self.chance(0.02)

    def now(self, copy: int) -> Member:
        """Give the member as its store is now, but for a few of another life or place."""
        members = {found.copy: found for found in self.conf.members}
        store = members[copy].store if copy in members else self.random.randrange(1, 7)
        life = self.lives.get(store, 1) + self.chance(0.03) - self.chance(0.03)
        found = member(copy, store, life)
        return replace(found, disk="f" * 32) if self.chance(0.03) else found

    def proposer(self, proposal: steps.Transition) -> steps.Proposer:
        """Mostly the one that the table names."""
        conf = self.conf
        others: list[steps.Proposer] = [steps.ByConductor(), steps.ByHuman()]
        for found in conf.members:
            life = found.incarnation + self.chance(0.2)
            others.append(steps.ByReplica(copy=found.copy, incarnation=life))
        if self.chance(0.2):
            return self.random.choice(others)
        if isinstance(proposal, steps.ForceAccept):
            return steps.ByHuman()
        is_of_primary = isinstance(proposal, steps.Remove | steps.Admit | steps.Transfer)
        if is_of_primary and self.chance(0.9):
            primary = conf.member(conf.primary)
            return steps.ByReplica(copy=primary.copy, incarnation=primary.incarnation)
        return steps.ByConductor()

    def facts(self) -> steps.Facts:
        return steps.Facts(
            proposer=steps.ByConductor(),
            registered={
                store: steps.Registration(
                    incarnation=store * 100 + life,
                    is_reachable=not self.chance(0.15),
                    has_good_journal=not self.chance(0.1),
                )
                for store, life in self.lives.items()
                if not self.chance(0.03)
            },
            complete={
                copy: (self.random.randrange(1, 3), self.random.randrange(3))
                for copy in range(6)
                if not self.chance(0.03)
            },
            ended={
                store: store * 100 + life - self.random.randrange(2)
                for store, life in self.lives.items()
                if self.chance(0.2)
            },
        )

    def with_lost_isr(self, facts: steps.Facts) -> steps.Facts:
        """Let the ISR be gone for certain: that is when a person comes."""
        lost = [self.conf.member(copy) for copy in self.conf.isr]
        gone = {
            one.store: msgspec.structs.replace(facts.registered[one.store], is_reachable=False)
            for one in lost
            if one.store in facts.registered
        }
        ended = {one.store: one.incarnation for one in lost}
        return msgspec.structs.replace(
            facts,
            registered={**facts.registered, **gone},
            ended={**facts.ended, **ended},
        )

    def proposal(self, facts: steps.Facts) -> steps.Transition:
        conf, pick = self.conf, self.random.choice
        copy = self.random.randrange(6)
        member_of_isr = pick(conf.isr) if self.chance(0.8) else copy
        learner = pick(conf.learners) if conf.learners and self.chance(0.8) else copy
        found = [self.now(known.copy) for known in conf.members if self.chance(0.95)]
        is_good = {
            store: one.is_reachable and one.has_good_journal
            for store, one in facts.registered.items()
        }
        present = [one for one in found if is_good.get(one.store, False) or self.chance(0.03)]
        outside = [known.copy for known in conf.members if known.copy not in conf.isr]
        chosen = pick(outside) if outside and self.chance(0.9) else copy
        history_id = conf.history_id + pick([0, 1, *[1 << 44] * 6])
        force = steps.ForceAccept(member=self.now(chosen), history_id=history_id)
        choices: list[steps.Transition] = [
            steps.Remove(copy=member_of_isr),
            steps.Promote(copy=member_of_isr),
            steps.AddLearner(member=self.now(copy)),
            steps.AddLearner(member=self.now(copy)),
            steps.Admit(copy=learner, incarnation=self.now(learner).incarnation),
            steps.Admit(copy=learner, incarnation=self.now(learner).incarnation),
            steps.Transfer(copy=member_of_isr),
            steps.Reopen(primary=member_of_isr, present=tuple(present)),
            steps.Reopen(primary=member_of_isr, present=tuple(present)),
            force,
            steps.Cancel(copy=learner),
            steps.Attach(attach_epoch=conf.attach_epoch + self.random.randrange(-1, 3)),
            steps.Properties(rf=self.random.randrange(10), min_write=self.random.randrange(4)),
        ]
        return pick(choices)

    def step(self) -> str | None:
        """Ask both; they must agree. Give the transition's name if it was applied."""
        self.crash_some()
        facts = self.facts()
        proposal = self.proposal(facts)
        facts = msgspec.structs.replace(facts, proposer=self.proposer(proposal))
        if isinstance(facts.proposer, steps.ByHuman) and self.chance(0.9):
            facts = self.with_lost_isr(facts)
        epoch = self.conf.epoch + self.chance(0.02)
        made = by_rust(self.conf, epoch, proposal, facts)
        assert made == by_specification(self.conf, epoch, proposal, facts), (proposal, facts)
        if made is None:
            return None
        name = spec.step_name(self.conf, made)
        assert name == spec.NAMES[type(proposal)], f"{proposal} looks like {name}"
        self.conf = made
        return name


def by_rust(
    conf: ShardConf, epoch: int, proposal: steps.Transition, facts: steps.Facts
) -> ShardConf | None:
    try:
        return steps.apply(conf, epoch, proposal, facts)
    except PureFlashError:
        return None


def by_specification(
    conf: ShardConf, epoch: int, proposal: steps.Transition, facts: steps.Facts
) -> ShardConf | None:
    try:
        return spec.successor(conf, epoch, proposal, facts)
    except spec.Refused:
        return None


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(min_value=1 << 32, max_value=1 << 48))
def test_both_agree_on_random_walks(seed: int) -> None:
    walk = Walk(seed)
    for _ in range(WALK_STEPS):
        walk.step()


@pytest.mark.slow
def test_both_agree_and_every_transition_is_taken() -> None:
    taken: Counter[str] = Counter()
    for seed in range(WALKS):
        walk = Walk(seed)
        taken.update(name for name in (walk.step() for _ in range(WALK_STEPS)) if name)
    assert min(taken[name] for name in set(spec.NAMES.values())) >= 100, taken


copies = st.integers(min_value=0, max_value=4)
numbers = st.sampled_from([0, 1, 2, 2**53 - 1, 2**53])


@st.composite
def any_conf(draw: st.DrawFn) -> ShardConf:
    """Give a sound one with one thing changed, which may leave it sound or not."""
    members = tuple(member(copy, copy + 1) for copy in range(4))
    base = replace(start(), isr=(0, 1), learners=(2,), members=members)
    some = tuple(draw(st.lists(copies, max_size=3)))
    number = draw(numbers)
    place = draw(st.integers(0, 3))
    changed = list(members)
    changed[place] = draw(
        st.sampled_from(
            [
                replace(members[place], store=number),
                replace(members[place], incarnation=number),
                replace(members[place], copy=draw(copies)),
                members[(place + 1) % 4],
            ]
        )
    )
    many = tuple(member(copy, copy + 1) for copy in range(draw(st.integers(6, 10))))
    return draw(
        st.sampled_from(
            [
                base,
                replace(base, isr=some),
                replace(base, learners=some),
                replace(base, learners=(draw(st.integers(2, 4)),)),
                replace(base, members=tuple(changed)),
                replace(base, members=many),
                replace(base, primary=draw(copies)),
                replace(base, rf=draw(st.integers(0, 9))),
                replace(base, min_write=draw(st.integers(0, 4))),
                replace(base, epoch=number),
                replace(base, volume_id=number),
                replace(base, history_id=number),
                replace(base, attach_epoch=number),
            ]
        )
    )


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True)
@given(any_conf())
def test_both_agree_on_what_a_configuration_is(conf: ShardConf) -> None:
    try:
        spec.check_sound(conf)
    except spec.Refused:
        with pytest.raises(PureFlashError):
            steps.encode(conf)
    else:
        assert steps.decode(steps.encode(conf)) == conf


def test_steps_that_nothing_makes_have_no_name() -> None:
    old = replace(start(), isr=(0, 1), learners=(2,), members=(*start().members, member(3, 4)))
    new = replace(old, epoch=2)
    assert spec.step_name(old, replace(new, isr=(0,))) == "T1"
    for wrong in [
        new,
        replace(new, isr=(0,), epoch=3),
        replace(new, isr=(0,), rf=2),
        replace(new, isr=(0, 1, 3)),
        replace(new, isr=(0, 1, 2)),
        replace(new, primary=2, isr=(2,)),
        replace(new, history_id=8),
        replace(new, attach_epoch=0),
        replace(new, members=old.members[:3]),
        replace(new, members=(member(0, 1, 2), *old.members[1:])),
        replace(new, learners=(), members=(member(0, 1, 2), *old.members[1:])),
    ]:
        assert spec.step_name(old, wrong) is None, wrong


@pytest.mark.parametrize(
    "change",
    [
        {"isr": (1, 0)},
        {"learners": (3, 2)},
        {"learners": (2, 2)},
        {"learners": (1,)},
        {"learners": (7,)},
        {"isr": ()},
        {"isr": (1,)},
        {"members": (member(0, 1), member(1, 2), member(2, 2), member(3, 4))},
        {"members": tuple(member(copy, copy + 1) for copy in range(9))},
        {"members": (member(0, 1), member(1, 2), member(2, 0), member(3, 4))},
        {"rf": 9},
        {"min_write": 0},
        {"min_write": 4},
        {"epoch": 0},
        {"epoch": 2**53},
        {"history_id": 2**53},
        {"attach_epoch": 2**53},
    ],
    ids=str,
)
def test_both_refuse_each_unsound_configuration(change: dict[str, Any]) -> None:
    members = tuple(member(copy, copy + 1) for copy in range(4))
    base = replace(start(), isr=(0, 1), learners=(2,), members=members)
    spec.check_sound(base)
    assert steps.decode(steps.encode(base)) == base
    with pytest.raises(spec.Refused):
        spec.check_sound(replace(base, **change))
    with pytest.raises(PureFlashError):
        steps.encode(replace(base, **change))
