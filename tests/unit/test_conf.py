"""The typed face of the transitions: values cross into Rust and back unchanged, refusals arrive.

Each guard has its test in crates/shard/src/conf/tests.rs, and test_model_conf.py compares all of
them with an independent specification; here is what only the crossing could get wrong.
"""

from dataclasses import replace

import pytest

from pureflash import _core
from pureflash.errors import CallerError, Code, RouteError
from pureflash.model import conf as steps
from pureflash.model.domain import Member, ShardConf


def member(copy: int, life: int = 1) -> Member:
    store = copy + 1
    return Member(
        copy=copy,
        store=store,
        incarnation=store * 10 + life,
        disk=f"{store:032x}",
        format_uuid=f"{store << 64 | 0xABCDEF:032x}",
    )


def three() -> ShardConf:
    return steps.first(
        volume_id=2**53 - 1,
        index=2**32 - 1,
        rf=3,
        min_write=2,
        primary=1,
        members=[member(2), member(0), member(1)],
        history_id=9,
        attach_epoch=4,
    )


def facts(by: steps.Proposer, *, life: int = 1) -> steps.Facts:
    return steps.Facts(
        proposer=by,
        registered={
            found.store: steps.Registration(
                incarnation=found.incarnation, is_reachable=True, has_good_journal=True
            )
            for found in (member(copy, life) for copy in range(4))
        },
        complete={0: (5, 3), 1: (5, 2), 2: (5, 3)},
    )


CONDUCTOR = steps.ByConductor()
PRIMARY = steps.ByReplica(copy=1, incarnation=21)


def test_the_first_configuration_has_every_field() -> None:
    assert three() == ShardConf(
        volume_id=2**53 - 1,
        index=2**32 - 1,
        epoch=1,
        rf=3,
        min_write=2,
        primary=1,
        isr=(0, 1, 2),
        learners=(),
        members=(member(0), member(1), member(2)),
        history_id=9,
        attach_epoch=4,
    )


def test_bytes_are_read_back_and_damage_is_refused() -> None:
    encoded = steps.encode(three())
    assert steps.decode(encoded) == three()
    with pytest.raises(CallerError, match="damaged configuration") as caught:
        steps.decode(encoded[:-1] + bytes([encoded[-1] ^ 1]))
    assert caught.value.code is Code.INVALID


REOPEN = steps.Reopen(primary=0, present=tuple(member(copy, 2) for copy in range(3)))
LEARNING = replace(three(), isr=(1,), learners=(0,))
CASES: list[tuple[ShardConf, steps.Transition, steps.Facts, ShardConf]] = [
    (three(), steps.Remove(copy=2), facts(PRIMARY), replace(three(), isr=(0, 1))),
    (three(), steps.Promote(copy=0), facts(CONDUCTOR), replace(three(), primary=0, isr=(0, 2))),
    (
        three(),
        steps.AddLearner(member=member(3)),
        facts(CONDUCTOR),
        replace(three(), learners=(3,), members=(*three().members, member(3))),
    ),
    (
        LEARNING,
        steps.Admit(copy=0, incarnation=11),
        facts(PRIMARY),
        replace(three(), isr=(0, 1)),
    ),
    (three(), steps.Transfer(copy=2), facts(PRIMARY), replace(three(), primary=2)),
    (
        three(),
        REOPEN,
        facts(CONDUCTOR, life=2),
        replace(three(), primary=0, members=REOPEN.present),
    ),
    (
        LEARNING,
        steps.ForceAccept(member=member(2), history_id=steps.next_history(9)),
        steps.Facts(
            proposer=steps.ByHuman(),
            registered={3: facts(CONDUCTOR).registered[3]},
            ended={2: 21},
        ),
        replace(three(), primary=2, isr=(2,), history_id=9 + 2**44, attach_epoch=5),
    ),
    (LEARNING, steps.Cancel(copy=0), facts(CONDUCTOR), replace(LEARNING, learners=())),
    (
        three(),
        steps.Attach(attach_epoch=2**53 - 1),
        facts(CONDUCTOR),
        replace(three(), attach_epoch=2**53 - 1),
    ),
    (
        three(),
        steps.Properties(rf=2, min_write=1),
        facts(CONDUCTOR),
        replace(three(), rf=2, min_write=1),
    ),
]


@pytest.mark.parametrize(
    ("conf", "transition", "known", "expected"), CASES, ids=lambda case: type(case).__name__
)
def test_each_transition_crosses(
    conf: ShardConf, transition: steps.Transition, known: steps.Facts, expected: ShardConf
) -> None:
    assert steps.apply(conf, 1, transition, known) == replace(expected, epoch=2)


def test_refusals_say_which_guard() -> None:
    with pytest.raises(RouteError, match="proposed for epoch 3, the shard is at epoch 1") as stale:
        steps.apply(three(), 3, steps.Remove(copy=2), facts(PRIMARY))
    assert stale.value.code is Code.STALE_EPOCH
    with pytest.raises(CallerError, match="T1 may not be proposed by a person") as refused:
        steps.apply(three(), 1, steps.Remove(copy=2), facts(steps.ByHuman()))
    assert refused.value.code is Code.INVALID


def test_what_is_no_configuration_is_refused_not_applied() -> None:
    for conf, rule in [
        (replace(three(), isr=()), "the ISR is empty"),
        (replace(three(), isr=(0, 1, 300)), "isr holds 300, which is no copy"),
        (replace(three(), members=(replace(member(0), disk="00"),)), "not 32 hex digits"),
        (replace(three(), members=(replace(member(0), disk="g" * 32),)), "not 32 hex digits"),
    ]:
        with pytest.raises(CallerError, match=rule):
            steps.apply(conf, 1, steps.Remove(copy=2), facts(PRIMARY))
        with pytest.raises(CallerError, match=rule):
            steps.encode(conf)


def test_dictionaries_with_unknown_words_are_refused() -> None:
    conf: dict[str, object] = {}
    with pytest.raises(CallerError, match='there is no "volume_id"'):
        _core.conf_encode(conf)
    good = _core.conf_decode(steps.encode(three()))
    known = {"proposer": {"kind": "conductor"}, "registered": {}, "complete": {}}
    with pytest.raises(CallerError, match='"explode" is no transition'):
        _core.conf_apply(good, 1, {"kind": "explode"}, known)
    with pytest.raises(CallerError, match='"god" is no proposer'):
        _core.conf_apply(
            good, 1, {"kind": "cancel", "copy": 0}, {**known, "proposer": {"kind": "god"}}
        )
