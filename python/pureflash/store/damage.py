"""What a store knows of damaged blocks: told once, and kept over its restarts.

Theory of operation. The node counts the blocks of each replica that cannot be read; this module
looks at those figures with each heartbeat, and each second without a conductor. More damage than
was told before is one warning per replica and health code, at most one in `WARN_EVERY_S`; its end
is one line more. Damage that was found and mended between two looks is told too, because the node
counts what it found.

The node's knowledge ends with its process, and a block that nobody reads stays damaged. So the runs
are kept in `damage.json`, written whole when they have changed and at most every `SAVE_EVERY_S`.
After a start the node reads those blocks again: what is damaged still is known again, and what is
not has gone. The file is a help and no part of the data: one that cannot be read is logged and
ignored, one that cannot be written is tried again. It is bounded: the node names at most 64 runs of
a replica, and replicas beyond `REPLICAS_MAX` are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from pureflash.process.lifecycle import write_whole
from pureflash.process.logs import Log

FILE_NAME: Final = "damage.json"
"""Beside the store's other records, in its data folder."""
LOOK_S: Final = 1.0
"""Seconds between two looks while no conductor asks for heartbeats."""
SAVE_EVERY_S: Final = 3.0
"""Seconds between two writes of the file, so that a dying disk does not keep its host busy."""
WARN_EVERY_S: Final = 60.0
"""Seconds between two warnings of the same replica."""
CHECK_S: Final = 30.0
"""Seconds that the node has to read kept blocks again; then what it reports is all there is."""
REPLICAS_MAX: Final = 1_024
RUNS_MAX: Final = 64
"""Runs of a replica that the node names."""
BLOCKS_MAX: Final = 1 << 24
"""Blocks of the largest shard, 64 GiB."""

Block = Annotated[int, msgspec.Meta(ge=0, lt=BLOCKS_MAX)]
Count = Annotated[int, msgspec.Meta(gt=0, le=BLOCKS_MAX)]
Key = tuple[int, int]
"""Volume id and shard index."""


class Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Damage of one replica in the file: runs of (first block, blocks)."""

    volume_id: Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
    index: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    since_ms: Annotated[int, msgspec.Meta(gt=0, lt=1 << 53)]
    runs: Annotated[tuple[tuple[Block, Count], ...], msgspec.Meta(max_length=RUNS_MAX)]


class KeptDamage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The contents of `damage.json`."""

    replicas: Annotated[tuple[Kept, ...], msgspec.Meta(max_length=REPLICAS_MAX)] = ()


@dataclass(slots=True)
class _Told:
    """What was said of one replica in this life of the process."""

    found: int = 0
    lost: int = 0
    is_open: bool = False
    """Damage was told and its end was not."""
    warned_at: dict[str, float] = field(default_factory=dict)
    """When, by health code."""

    def may_warn(self, code: str, now: float) -> bool:
        """Say whether it is time for another warning, and take note that it is given."""
        before = self.warned_at.get(code)
        if before is not None and now < before + WARN_EVERY_S:
            return False
        self.warned_at[code] = now
        return True


class Damage:
    """See the module's head. Without a folder it lasts as long as the process."""

    def __init__(
        self,
        folder: Path | None,
        *,
        log: Log,
        wall_ms: Callable[[], int],
        monotonic_s: Callable[[], float],
    ) -> None:
        """Read what was kept; a file that cannot be used is logged and ignored."""
        self._path = None if folder is None else folder / FILE_NAME
        self._log = log
        self._wall_ms = wall_ms
        self._monotonic_s = monotonic_s
        self._checked_by = monotonic_s() + CHECK_S
        self._told: dict[Key, _Told] = {}
        self._saved_at: float | None = None
        self._is_save_failing = False
        self._saved = self._read()
        self._known: dict[Key, Kept] = {}
        self._restored = {(one.volume_id, one.index): one for one in self._saved.replicas}

    def to_check(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Give (volume id, shard index, runs) that the node is to read again after a start."""
        return [(*key, list(kept.runs)) for key, kept in self._restored.items()]

    def since_ms(self, volume_id: int, index: int) -> int:
        """Give the wall clock at which a replica's present damage was first known; 0: none is."""
        kept = self._known.get((volume_id, index))
        return 0 if kept is None else kept.since_ms

    def look(self, replicas: Iterable[Mapping[str, Any]]) -> None:
        """Take in `StoreNode.replicas()`: log what is new, and keep what lasts."""
        found = {(one["volume_id"], one["index"]): one for one in replicas}
        if self._monotonic_s() >= self._checked_by:
            self._restored.clear()
        self._known = {
            key: self._present(key, replica)
            for key, replica in found.items()
            if _is_damaged(replica)
        }
        for key, replica in found.items():
            self._tell(key, replica)
        for key in self._told.keys() - found.keys():
            del self._told[key]
        self._save_if_due()

    def _present(self, key: Key, replica: Mapping[str, Any]) -> Kept:
        before = self._known.get(key) or self._restored.get(key)
        since = self._wall_ms() if before is None else before.since_ms
        runs = tuple((first, count) for first, count in replica["damaged"] or replica["lost"])
        volume_id, index = key
        return Kept(volume_id=volume_id, index=index, since_ms=since, runs=runs[:RUNS_MAX])

    def _to_keep(self) -> KeptDamage:
        """Give what a restart must know; what the node still reads again is kept until then."""
        kept = dict(self._known)
        for key, restored in self._restored.items():
            if key not in kept or len(kept[key].runs) < len(restored.runs):
                kept[key] = restored
        return KeptDamage(replicas=tuple(kept[key] for key in sorted(kept)[:REPLICAS_MAX]))

    def _tell(self, key: Key, replica: Mapping[str, Any]) -> None:
        told = self._told.setdefault(key, _Told())
        found, lost = replica["damage_found"], replica["lost_blocks"]
        told.lost = min(told.lost, lost)
        # What is lost says more than that it is damaged, and does not wait for that.
        if lost > told.lost and told.may_warn("DATA_LOST", self._monotonic_s()):
            told.found, told.lost, told.is_open = found, lost, True
            self._warn_lost(key, replica)
        if found > told.found and told.may_warn("DATA_DAMAGED", self._monotonic_s()):
            self._warn_damaged(key, replica, new=found - told.found)
            told.found, told.is_open = found, True
        if told.is_open and not _is_damaged(replica) and found == told.found:
            told.is_open = False
            volume_id, index = key
            self._log.info(
                "replica.readable",
                f"shard {index} of volume {volume_id}: every block that is known to have been"
                " damaged here can be read again",
                volume=volume_id,
                shard=index,
            )

    def _warn_lost(self, key: Key, replica: Mapping[str, Any]) -> None:
        volume_id, index = key
        self._log.warning(
            "replica.lost",
            f"shard {index} of volume {volume_id}: {replica['lost_blocks']} blocks have no copy"
            f" that can be read{_first(replica['lost'])}; they fail until they are overwritten:"
            " restore them from a backup",
            code="DATA_LOST",
            volume=volume_id,
            shard=index,
            blocks=replica["lost_blocks"],
        )

    def _warn_damaged(self, key: Key, replica: Mapping[str, Any], *, new: int) -> None:
        volume_id, index = key
        left = replica["damaged_blocks"]
        self._log.warning(
            "replica.damaged",
            f"shard {index} of volume {volume_id}: {new} blocks were found damaged on this disk,"
            f" {left} still are{_first(replica['damaged'])}; they are written again from another"
            " copy: `pf volume verify` looks for more",
            code="DATA_DAMAGED",
            volume=volume_id,
            shard=index,
            blocks=left,
        )

    def _read(self) -> KeptDamage:
        if self._path is None:
            return KeptDamage()
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=KeptDamage)
        except FileNotFoundError:
            return KeptDamage()
        except (OSError, msgspec.MsgspecError) as problem:
            self._log.warning(
                "damage.unread",
                f"{self._path} is ignored: {problem}; what was damaged is found when it is read"
                " again: `pf volume verify` reads all of it",
                code="DATA_DAMAGED",
            )
            return KeptDamage()

    def _save_if_due(self) -> None:
        now = self._monotonic_s()
        is_soon = self._saved_at is not None and now < self._saved_at + SAVE_EVERY_S
        damage = self._to_keep()
        if self._path is None or is_soon or damage == self._saved:
            return
        self._saved_at = now
        try:
            write_whole(self._path, msgspec.json.encode(damage))
        except OSError as problem:
            if not self._is_save_failing:
                self._log.warning(
                    "damage.unsaved",
                    f"{self._path} is not written: {problem}; it is tried again, and until then a"
                    " restart forgets which blocks are damaged",
                    code="DATA_DAMAGED",
                )
            self._is_save_failing = True
            return
        self._is_save_failing = False
        self._saved = damage


def damage_in(folder: Path | None, log: Log) -> Damage:
    """Make a `Damage` by the clocks of this machine, kept in a store's data folder."""
    return Damage(
        folder,
        log=log,
        wall_ms=lambda: time.time_ns() // 1_000_000,
        monotonic_s=time.monotonic,
    )


def _first(runs: Sequence[tuple[int, int]]) -> str:
    return f", the first at block {runs[0][0]}" if runs else ""


def _is_damaged(replica: Mapping[str, Any]) -> bool:
    return bool(replica["damaged_blocks"] or replica["lost_blocks"])
