"""What a store tells of damaged blocks, and what it knows of them after a restart."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_core import UNDAMAGED, FakeStoreNode
from tests.support.world import CLUSTER, ListLog

from pureflash.model.messages import Heartbeat
from pureflash.store import damage as module
from pureflash.store.agent import StoreAgent, StoreFacts
from pureflash.store.damage import CHECK_S, FILE_NAME, SAVE_EVERY_S, WARN_EVERY_S, Damage

Runs = list[tuple[int, int]]


@dataclass
class Scene:
    """A store's knowledge of damage by clocks that stand still."""

    folder: Path
    log: ListLog = field(default_factory=ListLog)
    now_s: float = 100.0
    wall_ms: int = 1_000

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start the process, again."""
        self.damage = Damage(
            self.folder,
            log=self.log,
            wall_ms=lambda: self.wall_ms,
            monotonic_s=lambda: self.now_s,
        )

    def look(self, *replicas: dict[str, Any]) -> None:
        """Look at replicas a second later."""
        self.now_s += 1
        self.wall_ms += 1_000
        self.damage.look(replicas)

    def events(self) -> list[str]:
        """Take the events that were logged."""
        events = [event for _, event, _ in self.log.lines]
        self.log.lines.clear()
        return events

    def file(self) -> str:
        """Read what a restart would know."""
        return (self.folder / FILE_NAME).read_text()


def replica(
    damaged: Runs | None = None, *, found: int = 0, lost: Runs | None = None, volume: int = 7
) -> dict[str, Any]:
    """Make what the node tells of a replica."""
    runs, none = damaged or [], lost or []
    return (
        {"volume_id": volume, "index": 2}
        | UNDAMAGED
        | {
            "damaged": runs,
            "damaged_blocks": sum(count for _, count in runs),
            "damage_found": found or sum(count for _, count in runs),
            "lost": none,
            "lost_blocks": sum(count for _, count in none),
        }
    )


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Nothing is damaged."""
    return Scene(tmp_path)


def test_damage_is_told_once_and_its_end_too(scene: Scene) -> None:
    scene.look(replica())
    assert scene.events() == []
    scene.look(replica([(3, 2), (9, 1)]))
    ((level, event, text),) = scene.log.lines
    assert (level, event) == ("WARNING", "replica.damaged")
    assert "shard 2 of volume 7: 3 blocks were found damaged" in text
    assert "the first at block 3" in text
    assert "DATA_DAMAGED" in text
    scene.log.lines.clear()
    for _ in range(5):
        scene.look(replica([(3, 2), (9, 1)]))
    assert scene.events() == []
    scene.look(replica(found=3))
    assert scene.events() == ["replica.readable"]
    scene.look(replica(found=3))
    assert scene.events() == []


def test_damage_that_was_mended_between_two_looks_is_told(scene: Scene) -> None:
    scene.look(replica(found=4))
    assert scene.events() == ["replica.damaged", "replica.readable"]


def test_a_dying_disk_does_not_fill_the_log(scene: Scene) -> None:
    for blocks in range(1, int(WARN_EVERY_S) + 1):
        scene.look(replica([(0, blocks)]))
    assert scene.events() == ["replica.damaged"]
    scene.look(replica([(0, 500)]))
    assert scene.events() == ["replica.damaged"], "what came meanwhile is told together"
    scene.look(replica([(0, 500)]), replica([(1, 1)], volume=8))
    assert scene.events() == ["replica.damaged"], "another replica has warnings of its own"


def test_what_is_lost_has_a_warning_of_its_own(scene: Scene) -> None:
    scene.look(replica([(3, 1)], lost=[(3, 1)]))
    ((_, event, text),) = scene.log.lines
    assert event == "replica.lost"
    assert "1 blocks have no copy that can be read, the first at block 3" in text
    assert "DATA_LOST" in text
    scene.look(replica(found=1))
    assert scene.events() == ["replica.lost", "replica.readable"]


def test_what_is_lost_again_is_told_again(scene: Scene) -> None:
    scene.look(replica([(3, 1)], lost=[(3, 1)]))
    assert scene.events() == ["replica.lost"]
    scene.look(replica(found=1))
    assert scene.events() == ["replica.readable"]
    scene.now_s += WARN_EVERY_S
    scene.look(replica([(3, 1)], found=2, lost=[(3, 1)]))
    assert scene.events() == ["replica.lost"]


def test_the_end_of_damage_is_not_told_before_all_of_it_was(scene: Scene) -> None:
    scene.look(replica([(3, 1)]))
    assert scene.events() == ["replica.damaged"]
    scene.look(replica(found=4))
    assert scene.events() == [], "three more blocks were mended already, and no warning is due"
    scene.now_s += WARN_EVERY_S
    scene.look(replica(found=4))
    assert scene.events() == ["replica.damaged", "replica.readable"]


def test_since_when_outlives_a_restart_and_ends_with_the_damage(scene: Scene) -> None:
    scene.look(replica([(3, 2)]))
    since = scene.damage.since_ms(7, 2)
    assert since == 2_000
    scene.look(replica([(3, 2), (50, 1)]))
    assert scene.damage.since_ms(7, 2) == since
    scene.now_s += SAVE_EVERY_S
    scene.look(replica([(3, 2), (50, 1)]))
    scene.start()
    assert scene.damage.to_check() == [(7, 2, [(3, 2), (50, 1)])]
    scene.look(replica())
    assert scene.damage.since_ms(7, 2) == 0, "it is not known again yet"
    scene.now_s += SAVE_EVERY_S
    scene.look(replica([(3, 1)]))
    assert scene.damage.since_ms(7, 2) == since
    assert "[50,1]" in scene.file(), "a crash in the middle of the check forgets nothing"
    scene.now_s += CHECK_S
    scene.look(replica([(3, 1)]))
    assert scene.damage.since_ms(7, 2) == since
    assert "[50,1]" not in scene.file()
    scene.now_s += SAVE_EVERY_S
    scene.look(replica())
    assert scene.damage.since_ms(7, 2) == 0
    assert scene.file() == '{"replicas":[]}'


def test_blocks_that_are_fine_after_the_restart_are_forgotten(scene: Scene) -> None:
    scene.look(replica([(3, 2)]))
    scene.start()
    scene.look(replica())
    assert "[3,2]" in scene.file()
    scene.now_s += CHECK_S
    scene.look(replica())
    assert scene.file() == '{"replicas":[]}'


def test_a_replica_that_was_deleted_leaves_nothing(scene: Scene) -> None:
    scene.look(replica([(3, 2)]))
    scene.now_s += SAVE_EVERY_S
    scene.look()
    assert scene.file() == '{"replicas":[]}'


def test_the_file_is_written_when_something_has_changed_and_not_more_often(scene: Scene) -> None:
    scene.look(replica())
    assert not (scene.folder / FILE_NAME).exists()
    scene.look(replica([(3, 1)]))
    assert "[3,1]" in scene.file()
    scene.look(replica([(3, 2)]))
    assert "[3,1]" in scene.file(), "a moment later"
    scene.now_s += SAVE_EVERY_S
    scene.look(replica([(3, 2)]))
    assert "[3,2]" in scene.file()
    (scene.folder / FILE_NAME).unlink()
    scene.now_s += SAVE_EVERY_S
    scene.look(replica([(3, 2)]))
    assert not (scene.folder / FILE_NAME).exists(), "nothing has changed"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"replicas": [{"volume_id": 7}]}',
        '{"replicas": [{"volume_id": 7, "index": 2, "since_ms": 5, "runs": [[3, 0]]}]}',
        '{"replicas": [{"volume_id": 7, "index": 2, "since_ms": 5, "runs": [[-1, 1]]}]}',
        '{"replicas": [], "more": 1}',
    ],
)
def test_a_file_that_is_none_is_logged_and_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    scene = Scene(tmp_path)
    assert scene.events() == ["damage.unread"]
    assert scene.damage.to_check() == []
    scene.look(replica([(3, 1)]))
    assert "[3,1]" in scene.file(), "it is written anew"


def test_a_host_that_is_full_is_told_once_and_tried_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_whole", full)
    scene.look(replica([(3, 1)]))
    scene.now_s += SAVE_EVERY_S
    scene.look(replica([(3, 1)]))
    assert scene.events() == ["replica.damaged", "damage.unsaved"]
    monkeypatch.undo()
    scene.now_s += SAVE_EVERY_S
    scene.look(replica([(3, 1)]))
    assert "[3,1]" in scene.file()


def test_the_agent_reports_damage_and_lets_the_node_read_it_again(scene: Scene) -> None:
    scene.look(replica([(3, 2)]))
    scene.start()
    node = store_node(scene.folder)
    facts = StoreFacts(
        cluster_id=CLUSTER, store=1, name="s1", incarnation=1, address="127.0.0.1:1", disks=()
    )
    agent = StoreAgent(node, facts=facts, log=scene.log, damage=scene.damage)
    agent.check_kept_damage()
    assert node.checked == [(7, 2, [(3, 2)])]
    node.reported = [replica([(3, 2)], lost=[(4, 1)])]
    heartbeat = agent.heartbeat(1)
    assert isinstance(heartbeat, Heartbeat)
    assert heartbeat.replicas is not None
    (report,) = heartbeat.replicas
    assert (report.damaged, report.damaged_blocks) == (((3, 2),), 2)
    assert (report.lost, report.lost_blocks, report.damaged_since_ms) == (((4, 1),), 1, 2_000)


class _Node(FakeStoreNode):
    """A node with replicas that a test makes up."""

    reported: list[dict[str, Any]]

    def replicas(self) -> list[dict[str, Any]]:
        rest = dict.fromkeys(("copy", "size_bytes", "epoch", "disk"), 0)
        rest |= dict.fromkeys(("promised", "complete_seq", "applied_seq"), 0)
        return [{**rest, "role": "active", "resyncs": [], **one} for one in self.reported]


def store_node(folder: Path) -> _Node:
    """Make a node on an empty fake disk."""
    disk = folder / "disk0.img"
    disk.write_text(f'{{"disk_uuid": "{"1" * 32}", "replicas": {{}}, "size_bytes": 4096}}')
    node = _Node(
        store_id=1,
        incarnation=1,
        cluster_id=bytes(16),
        cluster_key=bytes(32),
        listen="127.0.0.1:1",
        disks=[{"path": str(disk)}],
    )
    node.reported = []
    return node
