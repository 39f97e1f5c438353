"""Spreading primaries over stores: which shard's primary is asked to hand over (T5). Pure.

Theory of operation. A failover moves the primaries of one store to others, and nothing moves them
back: the store that returns serves no reads and others carry its share. So while all is calm, one
primary at a time is asked to give its reign to an in-sync member whose store has at least two
fewer: that makes the two more equal, and nothing is ever moved back and forth. Calm means: every
member of the shard is in sync, there in the life that is meant, and on a disk that works and is not
slow (`slow` moves those itself); its primary serves; and its configuration has not changed for a
while, so that a store that comes and goes is not given anything to lose. The primary drains itself
and proposes; being refused or not answered costs nothing, because the next plan asks again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from pureflash.conductor.slow import is_slow
from pureflash.conductor.standing import is_good
from pureflash.conductor.tell import Tell
from pureflash.conductor.view import ShardKey, View
from pureflash.model.domain import Member, ShardConf, VolumeIntent
from pureflash.model.messages import TransferPrimary

PAUSE_MS: Final = 5_000
"""Between two requests: the configuration that the first leads to is stored long before."""
UNEVEN: Final = 2
"""Difference of two stores' primaries from which moving one makes them more equal."""


def plan_balance(view: View) -> Iterator[Tell]:
    """Ask at most one primary to hand over."""
    last_ms = view.transferred_ms
    if view.balance_after_ms == 0 or (last_ms is not None and view.now_ms < last_ms + PAUSE_MS):
        return
    present = {
        key: conf
        for key, conf in view.shards.items()
        if (volume := view.volumes.get(key[0])) and volume.intent is VolumeIntent.PRESENT
    }
    primaries = Counter(conf.member(conf.primary).store for conf in present.values())
    best: tuple[int, ShardKey, int, Member] | None = None
    for key, conf in present.items():
        if not _is_calm(view, key, conf):
            continue
        source = conf.member(conf.primary).store
        for copy in conf.isr:
            target = conf.member(copy)
            gain = primaries[source] - primaries[target.store]
            if gain >= UNEVEN and (best is None or gain > best[0]):
                best = (gain, key, source, target)
    if best is not None:
        gain, (volume_id, index), source, target = best
        command = TransferPrimary(id=0, term=0, volume_id=volume_id, index=index, to=target.copy)
        name = view.stores[target.store].name
        yield Tell(source, command, f"{name} has {gain} primaries fewer")


def _is_calm(view: View, key: ShardKey, conf: ShardConf) -> bool:
    changed_ms = view.changed_ms.get(key, view.started_ms)
    if view.now_ms < changed_ms + view.balance_after_ms:
        return False
    is_whole = len(conf.isr) == len(conf.members)
    if not is_whole or not all(is_good(view, key, member) for member in conf.members):
        return False
    if any(is_slow(view, key, member) for member in conf.members):
        return False
    report = view.observation(conf.member(conf.primary).store).replicas[key]
    return report.role == "active" and report.verifying is None
