"""What is known to be wrong with data: damaged copies, lost blocks, copies that differ. Pure.

Theory of operation. A replica knows which of its blocks it could not read, from any read that met
them, and tells them with its store's heartbeat until each was mended or written anew. The primary
knows of which blocks nobody has a good copy. What a verification found to *differ*, although every
copy by itself can be read, is a record, because no later read finds it again. Everything that
people see of the three is put together here, so that all faces say the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pureflash.conductor.standing import store_name
from pureflash.conductor.view import ShardKey, View
from pureflash.model.domain import Differing, Volume
from pureflash.model.messages import ReplicaReport
from pureflash.model.rest import timestamp
from pureflash.units import BLOCK_BYTES

RANGES_SHOWN: Final = 64
"""What `explain` lists of a shard; a store tells no more either."""
BLOCKS_MAX: Final = 1 << 24
"""Above every block of a shard: the largest has 64 GiB."""

Runs = Sequence[tuple[int, int]]
"""First block and number of blocks of each run, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyDamage:
    """Blocks that the copy on a store cannot read; `since_ms` is wall time, 0: not told."""

    store: int
    blocks: int
    since_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What is known to be wrong with a shard's data; `ranges` are (first block, count), lost."""

    copies: tuple[CopyDamage, ...] = ()
    lost_blocks: int = 0
    ranges: tuple[tuple[int, int], ...] = ()
    differing: Differing | None = None

    @property
    def is_none(self) -> bool:
        """Whether nothing is known to be wrong."""
        return not self.copies and not self.lost_blocks and self.differing is None


def damage_of(view: View, key: ShardKey) -> Damage:
    """Put together what is known of one shard.

    A block that is lost is damaged on every copy; it is counted as lost only.
    """
    conf = view.shards.get(key)
    reports = {
        member: report
        for member in (conf.members if conf else ())
        if view.is_online(member.store)
        and (report := view.observation(member.store).replicas.get(key)) is not None
    }
    lost = 0
    ranges: tuple[tuple[int, int], ...] = ()
    for member, report in reports.items():
        if conf is not None and member.copy == conf.primary:
            lost, ranges = report.lost_blocks, report.lost[:RANGES_SHOWN]
    copies = tuple(
        CopyDamage(store=member.store, blocks=blocks, since_ms=report.damaged_since_ms)
        for member, report in reports.items()
        if (blocks := report.damaged_blocks - _lost_of(report, lost, ranges)) > 0
    )
    return Damage(copies=copies, lost_blocks=lost, ranges=ranges, differing=view.differing.get(key))


def _lost_of(report: ReplicaReport, lost_blocks: int, lost: Runs) -> int:
    """Count the damaged blocks of a copy that are lost.

    A store names the first runs only. Up to where both lists reach, that is exact; of what lies
    beyond only the numbers are known, and what is lost there is damaged on this copy too.
    """
    until = min(_reach(report.damaged, report.damaged_blocks), _reach(lost, lost_blocks))
    near: Runs = ((0, until),)
    damaged_beyond = report.damaged_blocks - _shared(report.damaged, near)
    lost_beyond = lost_blocks - _shared(lost, near)
    inside = tuple((first, min(count, until - first)) for first, count in lost if first < until)
    return _shared(report.damaged, inside) + min(damaged_beyond, lost_beyond)


def _reach(runs: Runs, blocks: int) -> int:
    """Say up to which block a list of runs names all of so many blocks."""
    if sum(count for _, count in runs) >= blocks:
        return BLOCKS_MAX
    return sum(runs[-1]) if runs else 0


def _shared(some: Runs, others: Runs) -> int:
    """Count the blocks in both of two lists of (first block, count), each ascending."""
    return sum(
        max(0, min(first + count, start + length) - max(first, start))
        for first, count in some
        for start, length in others
    )


def damaged_shards(view: View) -> Iterator[tuple[ShardKey, Damage]]:
    """Give every shard with whose data something is known to be wrong."""
    for key in view.shards:
        if not (found := damage_of(view, key)).is_none:
            yield key, found


def sentence(view: View, damage: Damage) -> str:
    """Say what is wrong with a shard's data, the worst first; empty when nothing is."""
    parts: list[str] = []
    if damage.lost_blocks:
        parts.append(f"{blocks(damage.lost_blocks)} without any good copy: reading them fails")
    if damage.differing is not None:
        parts.append(differing_text(view, damage.differing))
    parts += [copy_text(view, copy) for copy in damage.copies]
    return "; ".join(parts)


def io_text(damage: Damage) -> str:
    """Say what I/O does; empty when it is as if nothing were wrong."""
    return "reads of lost blocks fail, all else is served" if damage.lost_blocks else ""


def way_out(volume: Volume, damage: Damage) -> str:
    """Say who or what ends it, the worst first."""
    if damage.lost_blocks:
        return f"a write to those blocks, from a backup; `pf volume explain {volume.name}` has them"
    if (found := damage.differing) is not None:
        return (
            "a person, who has the copy that is wrong made anew (`pf up --new-disk STORE`), then"
            f" `pf volume verify {volume.name}`; found by job {found.job}"
        )
    return f"`pf volume verify {volume.name}`, which mends what another copy has"


def copy_text(view: View, copy: CopyDamage) -> str:
    """Say which copy is damaged, how much of it, and since when."""
    since = f", since {timestamp(copy.since_ms)}" if copy.since_ms else ""
    return (
        f"{blocks(copy.blocks)} of the copy on {store_name(view, copy.store)} cannot be read{since}"
    )


def differing_text(view: View, found: Differing) -> str:
    """Say which copies differ, and where first."""
    region, store = found.regions[0]
    return (
        f"copies differ in {found.count} region(s) of 1 MiB, as found at"
        f" {timestamp(found.found_at_ms)}; the first: MiB {region} on {store_name(view, store)}"
    )


def lost_ranges(volume: Volume, index: int, damage: Damage) -> list[str]:
    """List the lost ranges of a shard as bytes of its volume."""
    base = index * volume.shard_size_bytes
    lines = [
        f"bytes {base + first * BLOCK_BYTES} to {base + (first + count) * BLOCK_BYTES - 1}"
        f" of {volume.name} ({blocks(count)})"
        for first, count in damage.ranges
    ]
    left = damage.lost_blocks - sum(count for _, count in damage.ranges)
    if left > 0:
        lines.append(f"and {blocks(left)} more")
    return lines


def blocks(count: int) -> str:
    """Say a number of blocks of 4 KiB."""
    return f"{count} block{'' if count == 1 else 's'}"
