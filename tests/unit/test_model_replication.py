"""The judge of traces: a whole good story is accepted, and each rule refuses its bad one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from pureflash.testing.model.replication import RefinementError, Specification
from pureflash.testing.model.trace import read

Json = dict[str, Any]


def member(store: int, life: int = 1, disk: str = "") -> Json:
    return {
        "copy": store - 1,
        "store": store,
        "incarnation": store * 10 + life,
        "disk": disk or f"{store:032x}",
        "format_uuid": "f" * 32,
    }


class Story:
    """A world of one shard on stores 1, 2 and 3, told line by line."""

    def __init__(self) -> None:
        self.spec = Specification()
        self.time = 0
        self.conf: Json = {
            "volume_id": 7,
            "index": 0,
            "epoch": 1,
            "rf": 3,
            "min_write": 2,
            "primary": 0,
            "isr": [0, 1, 2],
            "learners": [],
            "members": [member(1), member(2), member(3)],
            "history_id": 1,
            "attach_epoch": 1,
        }

    def tell(self, k: str, **fields: Any) -> Story:
        self.time += 1
        self.spec.feed(json.dumps({"t": self.time, "k": k, **fields}))
        return self

    def replica(self, k: str, store: int, life: int = 1, **fields: Any) -> Story:
        return self.tell(k, shard=0, store=store, inc=store * 10 + life, **fields)

    def boot(self, store: int, life: int = 1) -> Story:
        return self.tell("boot", store=store, inc=store * 10 + life)

    def crash(self, store: int, life: int = 1) -> Story:
        return self.tell("crash", store=store, inc=store * 10 + life)

    def store_conf(self, transition: str, by: int = 0, **changes: Any) -> Story:
        """Store the next configuration, and keep it if it was accepted."""
        epoch = self.conf["epoch"] + (transition != "first")
        conf = {**self.conf, "epoch": epoch, **changes}
        self.tell("conf", shard=0, conf=conf, transition=transition, by=by)
        self.conf = conf
        return self

    def promise(self, store: int, epoch: int, life: int = 1) -> Story:
        return self.replica("promised", store, life, epoch=epoch)

    def role(self, store: int, role: str, epoch: int, life: int = 1) -> Story:
        return self.replica("role", store, life, epoch=epoch, role=role)

    def assign(
        self,
        seq: int,
        first: int = 0,
        *,
        store: int = 1,
        epoch: int = 1,
        count: int = 1,
        settle: bool = False,
        heal: bool = False,
    ) -> Story:
        place = {"epoch": epoch, "seq": seq, "first": first, "count": count}
        return self.replica("assigned", store, **place, settle=settle, heal=heal)

    def durable(self, seq: int, *stores: int, epoch: int = 1) -> Story:
        for store in stores:
            self.replica("durable", store, epoch=epoch, seq=seq)
        return self

    def commit(self, seq: int, *acked: int, store: int = 1, epoch: int = 1) -> Story:
        return self.replica("committed", store, epoch=epoch, seq=seq, acked=list(acked))

    def whole(self, seq: int, first: int = 0, **place: Any) -> Story:
        return self.assign(seq, first, **place).durable(seq, 1, 2, 3).commit(seq, 1, 2, 3)

    def start(self) -> Story:
        """All three are up, and store 1 is primary of epoch 1."""
        self.store_conf("first")
        for store in (1, 2, 3):
            self.boot(store).promise(store, 1)
        self.role(2, "secondary", 1).role(3, "secondary", 1)
        return self.role(1, "settling", 1).role(1, "active", 1)

    def fail_over(self) -> Story:
        """Store 2 is promoted, has both promises, and has not settled."""
        self.store_conf("T2", by=2, primary=1, isr=[1, 2])
        return self.promise(2, 2).promise(3, 2).role(2, "settling", 2).role(3, "secondary", 2)

    def learn(self) -> Story:
        """Store 3 crashed, was removed and is a learner in its second life, in epoch 3."""
        self.crash(3).store_conf("T1", by=1, isr=[0, 1]).promise(1, 2).promise(2, 2).boot(3, 2)
        members = [member(1), member(2), member(3, 2)]
        self.store_conf("T3", learners=[2], members=members)
        self.promise(1, 3).promise(2, 3)
        return self.promise(3, 3, life=2).role(3, "learner", 3, life=2)


def test_a_whole_story_is_accepted() -> None:
    story = Story().start().whole(1).assign(2, 4, count=3).durable(2, 1, 2).crash(1)
    story.fail_over().assign(3, 4, store=2, epoch=2, count=3, settle=True)
    story.durable(3, 2, 3, epoch=2).commit(3, 2, 3, store=2, epoch=2).role(2, "active", 2)
    story.boot(1, 2).store_conf("T3", learners=[0], members=[member(1, 2), member(2), member(3)])
    for store in (2, 3):
        story.promise(store, 3)
    story.promise(1, 3, life=2).role(1, "learner", 3, life=2)
    story.replica("copied", 2, to=1, region=0).replica("caught_up", 2, to=1, regions=1)
    story.store_conf("T4", by=2, isr=[0, 1, 2], learners=[])
    story.promise(2, 4).promise(3, 4).promise(1, 4, life=2).role(1, "secondary", 4, life=2)
    story.assign(4, 9, store=2, epoch=2).durable(4, 2, 3, epoch=2)
    story.replica("durable", 1, 2, epoch=2, seq=4).commit(4, 1, 2, 3, store=2, epoch=2)
    story.tell("invoke", client=1, id=1, op="write", first=9, count=1, values=[77])
    story.tell("reply", client=1, id=1, status=0, values=[])
    story.tell("invoke", client=1, id=2, op="read", first=9, count=1, values=[])
    story.tell("reply", client=1, id=2, status=0, values=[77])
    story.spec.finish()
    assert story.spec.line_count == story.time


def test_a_refused_primary_goes_on_in_a_newer_epoch_of_its_tenure() -> None:
    story = Story().start().assign(1).role(1, "suspended", 1).store_conf("T1", by=0, isr=[0, 1])
    story.promise(1, 2).assign(2, 5).role(1, "active", 2).durable(1, 1).promise(2, 2)
    story.durable(1, 2).commit(1, 1, 2).replica("copied", 1, to=3, region=0)


def test_a_deposed_primary_may_commit_what_was_durable_in_time() -> None:
    story = Story().start().assign(1).durable(1, 1, 2, 3)
    story.fail_over().assign(2, store=2, epoch=2, settle=True).commit(1, 1, 2, 3)


def test_a_primary_that_slept_gives_lsns_of_a_reign_that_is_over() -> None:
    story = Story().start().assign(1).durable(1, 1, 2, 3).fail_over()
    story.store_conf("T2", by=3, primary=2, isr=[2]).promise(3, 3).role(3, "settling", 3)
    story.assign(2, store=3, epoch=3, settle=True).durable(2, 3, epoch=3)
    story.commit(2, 3, store=3, epoch=3).role(3, "active", 3)
    story.assign(2, store=2, epoch=2, settle=True)
    with pytest.raises(RefinementError, match="I9"):
        story.durable(2, 2, epoch=2).commit(2, 2, store=2, epoch=2)


def test_a_damaged_block_is_written_again_below_min_write() -> None:
    story = Story().start().store_conf("T1", by=1, isr=[0, 1]).promise(1, 2)
    story.store_conf("T1", by=1, isr=[0]).promise(1, 3)
    story.assign(1, 5, heal=True).durable(1, 1).commit(1, 1)
    with pytest.raises(RefinementError, match="min_write"):
        story.assign(2, 6).durable(2, 1).commit(2, 1)


def test_a_single_member_gives_up_what_its_disk_refused() -> None:
    story = Story().start().store_conf("T1", by=1, isr=[0, 1]).promise(1, 2)
    story.store_conf("T1", by=1, isr=[0]).promise(1, 3).assign(1, 5).assign(2, 5)
    with pytest.raises(RefinementError, match="I13"):
        story.durable(2, 1).assign(3, 5)


Act = Callable[[Story], object]
NOT_FIRST: list[tuple[str, str, Act]] = [
    ("an epoch skipped", "I7", lambda s: s.store_conf("T1", by=1, isr=[0, 1], epoch=3)),
    ("two in one", "I7", lambda s: s.store_conf("T1", by=1, isr=[0, 1], min_write=1)),
    ("another name", "that is T1", lambda s: s.store_conf("T2", by=1, isr=[0, 1])),
    ("an empty ISR", "no sound", lambda s: s.store_conf("T1", by=1, isr=[])),
    ("of a secondary", "may not be proposed", lambda s: s.store_conf("T1", by=2, isr=[0, 1])),
    ("T9 of the primary", "may not", lambda s: s.store_conf("T9", by=1, attach_epoch=2)),
    ("first again", "I7", lambda s: s.store_conf("first", epoch=1)),
    (
        "a life that never was",
        "I8",
        lambda s: s.store_conf("T1", by=1, isr=[0, 1]).store_conf(
            "T3", learners=[2], members=[member(1), member(2), member(3, 5)]
        ),
    ),
    ("of another shard", "another shard", lambda s: s.store_conf("T1", by=1, isr=[0, 1], index=1)),
    (
        "a role without any",
        "without a configuration",
        lambda s: s.crash(2).boot(2, 2).role(2, "secondary", 0, life=2),
    ),
    ("an unknown role", "no role is called", lambda s: s.role(2, "king", 1)),
    ("an unstored conf", "I21", lambda s: s.role(2, "secondary", 2)),
    ("primary by itself", "does not give it", lambda s: s.role(2, "settling", 1)),
    ("a learner by itself", "does not give it", lambda s: s.role(2, "learner", 1)),
    (
        "a role of an earlier life",
        "does not name",
        lambda s: s.crash(2).boot(2, 2).role(2, "secondary", 1, life=2),
    ),
    (
        "an older configuration",
        "goes back",
        lambda s: s.fail_over().role(2, "fenced", 1),
    ),
    (
        "active without settling",
        "active after secondary",
        lambda s: s.store_conf("T5", by=1, primary=1).role(2, "active", 2),
    ),
    ("settling after active", "settling after active", lambda s: s.role(1, "settling", 1)),
    (
        "active without promises",
        "before every ISR member has promised",
        lambda s: (
            s.store_conf("T2", by=2, primary=1, isr=[1, 2])
            .promise(2, 2)
            .role(2, "settling", 2)
            .role(2, "active", 2)
        ),
    ),
    (
        "active with open settling",
        "uncommitted",
        lambda s: s.fail_over().assign(1, store=2, epoch=2, settle=True).role(2, "active", 2),
    ),
    (
        "active below its promise",
        "below its own promise",
        lambda s: (
            s.fail_over()
            .store_conf("T2", by=3, primary=2, isr=[2])
            .promise(2, 3)
            .role(2, "active", 2)
        ),
    ),
    (
        "going on in the same epoch",
        "refused goes on",
        lambda s: s.role(1, "suspended", 1).role(1, "active", 1),
    ),
    (
        "going on after another primary",
        "after another one was primary",
        lambda s: (
            s.role(1, "suspended", 1)
            .store_conf("T5", by=1, primary=1)
            .store_conf("T5", by=2, primary=0)
            .promise(1, 3)
            .role(1, "active", 3)
        ),
    ),
    (
        "serving after settling was interrupted",
        "it was settling before",
        lambda s: (
            s.fail_over()
            .role(2, "suspended", 2)
            .store_conf("T1", by=2, isr=[1])
            .promise(2, 3)
            .role(2, "active", 3)
        ),
    ),
    (
        "an lsn while suspended",
        "while suspended",
        lambda s: s.role(1, "suspended", 1).assign(1),
    ),
    ("suspended secondary", "does not give it", lambda s: s.role(2, "suspended", 1)),
    ("suspended twice", "after suspended", lambda s: [s.role(1, "suspended", 1) for _ in "12"]),
    (
        "a promise taken back",
        "I6",
        lambda s: s.fail_over().crash(2).boot(2, 2).promise(2, 1, life=2),
    ),
    ("a promise of nothing", "I21", lambda s: s.promise(2, 2)),
    ("an lsn of a secondary", "while secondary", lambda s: s.assign(1, store=2)),
    (
        "an lsn while settling",
        "while settling",
        lambda s: s.fail_over().assign(1, store=2, epoch=2),
    ),
    ("settling while active", "while active", lambda s: s.assign(1, settle=True)),
    ("an lsn of another reign", "began in epoch 1", lambda s: s.assign(1, epoch=2)),
    (
        "an lsn after its own promise",
        "ended its reign",
        lambda s: s.store_conf("T2", by=2, primary=1, isr=[1, 2]).promise(1, 2).assign(1),
    ),
    ("a gap", "2 is next", lambda s: s.assign(1).assign(3, 1)),
    ("a seq twice", "2 is next", lambda s: s.assign(1).assign(1, 1)),
    (
        "a committed seq again",
        "seq 1 was committed before",
        lambda s: s.whole(1).fail_over().assign(1, store=2, epoch=2, settle=True),
    ),
    ("the window", "is the watermark", lambda s: [s.assign(seq, seq) for seq in range(1, 1026)]),
    ("a busy block", "I13", lambda s: s.assign(1, 3, count=4).assign(2, 6)),
    ("durable from nowhere", "never given", lambda s: s.durable(1, 2)),
    (
        "durable after a promise",
        "its promise is 2",
        lambda s: s.assign(1).durable(1, 1).fail_over().durable(1, 3),
    ),
    ("commit of a secondary", "while secondary", lambda s: s.assign(1).commit(1, 2, store=2)),
    ("commit of nothing", "not of this reign", lambda s: s.commit(1, 1)),
    ("committed twice", "before", lambda s: s.whole(1).commit(1, 1, 2, 3)),
    (
        "commit while suspended",
        "while suspended",
        lambda s: s.assign(1).durable(1, 1, 2, 3).role(1, "suspended", 1).commit(1, 1, 2, 3),
    ),
    (
        "commit after its own promise",
        "ended its reign",
        lambda s: (
            s.assign(1)
            .durable(1, 1, 2, 3)
            .store_conf("T2", by=2, primary=1, isr=[1, 2])
            .promise(1, 2)
            .commit(1, 1, 2, 3)
        ),
    ),
    ("commit alone", "I9.*store 2", lambda s: s.assign(1).durable(1, 1).commit(1, 1)),
    ("an ack left out", "I9.*store 3", lambda s: s.assign(1).durable(1, 1, 2, 3).commit(1, 1, 2)),
    ("commit without one", "I9.*store 3", lambda s: s.assign(1).durable(1, 1, 2).commit(1, 1, 2)),
    (
        "an ack that nobody gave",
        "durable only on",
        lambda s: (
            s.store_conf("T1", by=1, isr=[0, 1]).assign(1).durable(1, 1, 2).commit(1, 1, 2, 3)
        ),
    ),
    (
        "below min_write",
        "min_write",
        lambda s: (
            s.store_conf("T1", by=1, isr=[0, 1])
            .store_conf("T1", by=1, isr=[0])
            .promise(1, 3)
            .assign(1)
            .durable(1, 1)
            .commit(1, 1)
        ),
    ),
    (
        "two reigns with one seq",
        "I2",
        lambda s: (
            s.assign(1)
            .durable(1, 1, 2, 3)
            .fail_over()
            .assign(1, 9, store=2, epoch=2, settle=True)
            .commit(1, 1, 2, 3)
        ),
    ),
    (
        "admitted with a hole",
        "I1: store 3 lacks",
        lambda s: (
            s.learn()
            .replica("copied", 1, to=3, region=0)
            .assign(1, 300)
            .durable(1, 1, 2)
            .commit(1, 1, 2)
            .store_conf("T4", by=1, isr=[0, 1, 2], learners=[])
        ),
    ),
    (
        "a write after the copy",
        "I1: store 3 lacks",
        lambda s: (
            s.learn()
            .assign(1)
            .durable(1, 1, 2)
            .replica("copied", 1, to=3, region=0)
            .commit(1, 1, 2)
            .store_conf("T4", by=1, isr=[0, 1, 2], learners=[])
        ),
    ),
    (
        "an admission pending and not waited for",
        "I9.*store 3",
        lambda s: (
            s.learn()
            .assign(1)
            .durable(1, 1, 2)
            .store_conf("T4", by=1, isr=[0, 1, 2], learners=[])
            .commit(1, 1, 2)
        ),
    ),
    (
        "another disk",
        "I1: store 3 lacks",
        lambda s: (
            s.whole(1)
            .crash(3)
            .store_conf("T1", by=1, isr=[0, 1])
            .boot(3, 2)
            .store_conf("T3", learners=[2], members=[member(1), member(2), member(3, 2, "e" * 32)])
            .store_conf("T4", by=1, isr=[0, 1, 2], learners=[])
        ),
    ),
    ("copied by a secondary", "to secondary", lambda s: s.replica("copied", 2, to=3, region=0)),
    ("copied to nobody", "no replica", lambda s: s.replica("copied", 1, to=9, region=0)),
    ("no learner", "no learner", lambda s: s.replica("caught_up", 1, to=2, regions=0)),
    ("proposed by another", "proposed by", lambda s: s.replica("caught_up", 2, to=3, regions=0)),
    ("the dead speak", "not alive", lambda s: s.crash(2).role(2, "fenced", 1)),
    ("two lives at once", "one at a time", lambda s: s.boot(2, 2)),
    ("a life again", "lives are new", lambda s: s.crash(2).boot(2)),
    ("dead twice", "not alive", lambda s: s.crash(2).crash(2)),
    ("an answer to nothing", "without being open", lambda s: s.tell("reply", **REPLY)),
]
REPLY: Json = {"client": 1, "id": 1, "status": 0, "values": []}


@pytest.mark.parametrize(("rule", "act"), [case[1:] for case in NOT_FIRST], ids=lambda _: "")
def test_each_rule_refuses_its_bad_story(rule: str, act: Act) -> None:
    story = Story().start()
    with pytest.raises(RefinementError, match=rule):
        act(story)


def test_the_first_configuration_is_the_conductors() -> None:
    for wrong in [{"epoch": 2}, {"by": 1}]:
        with pytest.raises(RefinementError, match="the first configuration"):
            Story().store_conf("first", **wrong)


def test_time_goes_on() -> None:
    spec = Specification()
    spec.feed('{"t":5,"k":"boot","store":1,"inc":1}')
    with pytest.raises(RefinementError, match="line 2: time goes backwards"):
        spec.feed('{"t":4,"k":"boot","store":2,"inc":1}')


def test_what_clients_saw_is_judged_at_the_end() -> None:
    story = Story().start()
    story.tell("invoke", client=1, id=1, op="read", first=3, count=1, values=[])
    story.tell("reply", client=1, id=1, status=0, values=[5])
    with pytest.raises(RefinementError, match="I3: block 3: value 5"):
        story.spec.finish()


@pytest.mark.parametrize(
    "line",
    [
        '{"t":1,"k":"dance","store":1}',
        '{"t":1,"k":"boot","store":1}',
        '{"t":1,"k":"boot","store":1,"inc":1,"more":2}',
        "seed 4: I1",
    ],
)
def test_what_is_no_line_is_refused(line: str) -> None:
    with pytest.raises(msgspec.DecodeError):
        list(read(line))
