"""Whom an agent obeys, over restarts, and what it answers a conductor that lost its memory."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from tests.support.fake_core import FakeStoreNode
from tests.support.world import CLUSTER, ListLog

from pureflash.errors import ClusterError, Code, MediaError
from pureflash.model.conf import encode, first
from pureflash.model.domain import Member
from pureflash.model.messages import (
    Message,
    Recall,
    Recalled,
    Registered,
    RegisterStore,
    SetPeers,
)
from pureflash.process.allegiance import Allegiance, Known
from pureflash.store.agent import StoreAgent, StoreFacts

OURS = "ab" * 16
OTHERS = "cd" * 16


def led(term: int, revision: int, lineage: str = OURS, *before: str) -> Registered:
    return Registered(id=1, term=term, revision=revision, lineage=lineage, predecessors=before)


def test_what_was_told_outlasts_the_process(tmp_path: Path) -> None:
    path = tmp_path / "conductor.json"
    first_life = Allegiance(path)
    assert first_life.note(led(7, 30))
    assert first_life.note(SetPeers(id=2, term=7, revision=31, peers=()))
    assert not first_life.note(SetPeers(id=3, term=7, revision=31, peers=()))
    assert first_life.heard(8, Known(lineage=OURS).lineage_number, 40)
    second_life = Allegiance(path)
    assert second_life.known == Known(
        lineage=OURS, term=7, revision=31, heard_term=8, heard_revision=40
    )
    assert second_life.least_term == 8


def test_nothing_goes_back(tmp_path: Path) -> None:
    allegiance = Allegiance(tmp_path / "conductor.json")
    allegiance.note(led(7, 30))
    allegiance.note(led(9, 12))
    assert (allegiance.known.term, allegiance.known.revision) == (9, 30)


def test_another_lineage_leads_only_as_a_successor() -> None:
    allegiance = Allegiance()
    allegiance.check(led(1, 1, OTHERS))  # it has never been led
    allegiance.note(led(7, 30))
    allegiance.heard(8, Known(lineage=OURS).lineage_number, 40)
    with pytest.raises(ClusterError, match="cdcdcdcd") as caught:
        allegiance.check(led(9, 50, OTHERS))
    assert caught.value.code is Code.WRONG_CLUSTER
    successor = led(9, 50, OTHERS, OURS)
    allegiance.check(successor)
    allegiance.note(successor)
    assert allegiance.known == Known(lineage=OTHERS, term=9, revision=50)


@pytest.mark.parametrize("content", [b"", b"{", b'{"term": "x"}', b"\xff\x00" * 100])
def test_a_damaged_record_is_not_taken_for_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "conductor.json"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"conductor\.json") as caught:
        Allegiance(path)
    assert caught.value.next_step


def test_a_full_host_is_no_reason_to_stop_following(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "conductor.json"
    allegiance = Allegiance(path)

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path), len(data))

    monkeypatch.setattr("pureflash.process.allegiance.write_whole", full)
    assert allegiance.note(led(7, 30))
    assert "No space" in allegiance.unsaved
    monkeypatch.undo()
    allegiance.note(led(7, 30))
    assert not allegiance.unsaved
    assert Allegiance(path).known.revision == 30, "it was written as soon as it could be"


def store_agent(path: Path) -> tuple[StoreAgent, FakeStoreNode]:
    disk = path / "disk0.img"
    disk.write_text(f'{{"disk_uuid": "{"1" * 32}", "replicas": {{}}, "size_bytes": 4096}}')
    node = FakeStoreNode(
        store_id=1,
        incarnation=1,
        cluster_id=bytes(16),
        cluster_key=bytes(32),
        listen="127.0.0.1:1",
        disks=[{"path": str(disk)}],
    )
    facts = StoreFacts(
        cluster_id=CLUSTER, store=1, name="s1", incarnation=1, address="127.0.0.1:1", disks=()
    )
    allegiance = Allegiance(path / "conductor.json")
    return StoreAgent(node, facts=facts, log=ListLog(), allegiance=allegiance), node


def test_a_store_tells_a_conductor_without_memory_all_that_it_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, node = store_agent(tmp_path)
    member = Member(copy=1, store=1, incarnation=1, disk="1" * 32, format_uuid="2" * 32)
    confs = [
        first(
            volume_id=9,
            index=index,
            rf=1,
            min_write=1,
            primary=1,
            members=(member,),
            history_id=1,
            attach_epoch=1,
        )
        for index in range(5)
    ]
    monkeypatch.setattr(node, "confs", lambda: [encode(conf) for conf in confs])
    monkeypatch.setattr("pureflash.store.agent.BATCH_MAX", 2)
    sent: list[Message] = []
    agent.handle(Recall(id=4, term=0), sent.append)
    parts = [message for message in sent if isinstance(message, Recalled)]
    assert [len(part.confs) for part in parts] == [2, 2, 1]
    assert [part.is_last for part in parts] == [False, False, True]
    assert [conf for part in parts for conf in part.confs] == confs
    node.close()


def test_a_registration_says_what_was_told_and_what_was_heard(tmp_path: Path) -> None:
    agent, node = store_agent(tmp_path)
    allegiance = agent._allegiance
    allegiance.note(led(7, 30))
    agent.led(allegiance.known)
    assert node.told == (7, int(OURS[:16], 16), 30), "so PINGs say it to other stores"
    node.heard = (8, int(OURS[:16], 16), 44)
    message = agent.registration()
    assert isinstance(message, RegisterStore)
    assert (message.lineage, message.term, message.revision) == (OURS, 7, 30)
    assert (message.heard_term, message.heard_revision) == (8, 44)
    node.close()
