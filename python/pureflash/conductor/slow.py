"""Slow disks: which ones are, and what is done about them. Pure.

Theory of operation. A disk that fails is taken out at once; one that answers late is worse, because
every write of its shards waits for it and nothing ever fails. No figure says by itself that a disk
is at fault: an old disk is slow, and so is a busy one. So each disk is compared with the others
(`judge`): far above the median of its peers, in the mean and in the 99th percentile, and above a
floor that no disk that works exceeds for long. The difference has to last before a disk counts as
slow, and its absence before the disk counts as even again. When all disks are slow, none counts as
slow.

| Stage | Enters by | What is done |
|---|---|---|
| EVEN | near its peers for `EVEN_MS`, or not measured late for `FORGET_MS` | nothing |
| SLOW | far above its peers for `SLOW_MS` | other disks lead its shards (T5), `plan_moves` |
| DEMOTED | SLOW, and `DEMOTE_MS` without a shard that others could lead | T1, `demoted` |

While a disk is not EVEN, nothing is made equal on it either (`is_held_out`). The members on such a
disk are demoted (T1) or held out only where enough others are in sync (`is_spare`): a slow copy is
better than a single one. One disk of the whole cluster is demoted in `DEMOTE_PAUSE_MS`, and a new
conductor waits as long before its first demotion: its predecessor may just have demoted a disk, and
that is forgotten.

A demoted disk serves nothing and so cannot be measured. It is forgotten after a while and gets its
copies back; making them equal measures it. Each time that it is found slow again the wait doubles.
A disk that is filled for another reason is busy, not slow, and is not judged anew meanwhile.

Everything here is the conductor's memory (`Pace`) and lost with it. Then a slow disk is found
again; nothing depends on it but speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pureflash.conductor.pace import Pace, Stage
from pureflash.conductor.standing import is_good, report_of
from pureflash.conductor.tell import Tell
from pureflash.conductor.view import ShardKey, View
from pureflash.model.domain import Member, ShardConf, VolumeIntent
from pureflash.model.messages import TransferPrimary

FAR: Final = 4
"""Times the median of the peers from which on a disk is far above them."""
NEAR: Final = 2
"""Times the median up to which it is near them; in between nothing changes."""
OPERATIONS_MIN: Final = 5
"""In the few seconds that a report covers; a disk that takes a second for each has as many."""
DISKS_MIN: Final = 3
"""Disks measured at a time: of two that differ nobody can say which one is slow."""
SLOW_MS: Final = 10_000
"""How long a disk is far above its peers before it is slow: twice what a report covers."""
EVEN_MS: Final = 30_000
"""How long it is near them before it is even again; doubles with each strike."""
GAP_MS: Final = 5_000
"""Longest pause of measurements over which a turn goes on."""
DEMOTE_MS: Final = 60_000
"""How long a slow disk leads nothing that others could lead before it is demoted."""
DEMOTE_PAUSE_MS: Final = 300_000
"""Between two demotions in the cluster."""
FORGET_MS: Final = 300_000
"""Without a measurement, after which a disk counts as even; doubles with each strike."""
DOUBLINGS_MAX: Final = 4
STRIKES_KEPT_MS: Final = 3_600_000
"""How long an even disk's strikes are remembered."""
PAUSE_MS: Final = 1_000
"""Between two rounds of requests to hand over."""
MOVES_MAX: Final = 8
"""Requests of one round."""
OTHERS_MIN: Final = 2
"""In-sync copies that stay where a slow one is left out; the core insists on it."""


KINDS: Final = ("writes", "reads")


@dataclass(frozen=True, slots=True)
class _Figures:
    """What operations of one kind take, in microseconds."""

    ewma_us: int
    p99_us: int

    def __str__(self) -> str:
        mean_ms, tail_ms = self.ewma_us / 1000, self.p99_us / 1000
        return f"{mean_ms:.1f} ms on average and 99 % of them up to {tail_ms:.1f} ms"

    def is_above(self, peers: _Figures, *, times: int, floor_us: int) -> bool:
        """Whether both are more than `times` the peers' and more than the floor."""
        mean_us = max(times * peers.ewma_us, floor_us)
        tail_us = max(times * peers.p99_us, floor_us)
        return self.ewma_us > mean_us and self.p99_us > tail_us


@dataclass(frozen=True, slots=True)
class _Compared:
    """One disk beside the median of its peers."""

    kind: str
    own: _Figures
    peers: _Figures


# Judging.


def judge(paces: Mapping[str, Pace], view: View, *, floor_us: int) -> dict[str, Pace]:
    """Give how every known disk keeps pace now, by its uuid; nothing is judged with floor 0."""
    if floor_us <= 0:
        return {}
    compared: dict[str, list[_Compared]] = {}
    for kind in KINDS:
        for uuid, one in _compare(_measured(view, kind), kind):
            compared.setdefault(uuid, []).append(one)
    filled = {
        place_of(view, key, conf.member(copy))
        for key, conf in _present(view)
        for copy in conf.learners
    }
    now: dict[str, Pace] = {}
    for disk in (disk for store in view.stores.values() for disk in store.disks):
        uuid = disk.disk_uuid
        pace = paces.get(uuid, Pace(since_ms=view.now_ms, judged_ms=view.now_ms))
        is_excused = uuid in filled and pace.strikes == 0
        found = [] if is_excused else compared.get(uuid, [])
        now[uuid] = _forget(_turn(pace, view.now_ms, found, floor_us), view.now_ms)
    return _demote(view, _idle(view, now))


def _measured(view: View, kind: str) -> dict[str, _Figures]:
    """Give the figures of disks that work and had enough operations of this kind."""
    found: dict[str, _Figures] = {}
    for store in view.stores.values():
        reports = view.observation(store.id).disks if view.is_online(store.id) else {}
        for disk in store.disks:
            report = reports.get(disk.index)
            if report is None or report.latency is None or report.state == "failed":
                continue
            lately = report.latency
            if kind == "reads":
                count, figures = lately.reads, _Figures(lately.read_ewma_us, lately.read_p99_us)
            else:
                count, figures = lately.writes, _Figures(lately.write_ewma_us, lately.write_p99_us)
            if count >= OPERATIONS_MIN:
                found[disk.disk_uuid] = figures
    return found


def _compare(measured: Mapping[str, _Figures], kind: str) -> Iterator[tuple[str, _Compared]]:
    if len(measured) < DISKS_MIN:
        return
    means = _medians_of_others({uuid: own.ewma_us for uuid, own in measured.items()})
    tails = _medians_of_others({uuid: own.p99_us for uuid, own in measured.items()})
    for uuid, own in measured.items():
        yield uuid, _Compared(kind, own, _Figures(means[uuid], tails[uuid]))


def _medians_of_others(figures: Mapping[str, int]) -> dict[str, int]:
    """Give the median of all others for each; of two in the middle the higher one."""
    names = sorted(figures, key=lambda name: (figures[name], name))
    middle = (len(names) - 1) // 2
    return {
        name: figures[names[middle if middle < rank else middle + 1]]
        for rank, name in enumerate(names)
    }


def _turn(pace: Pace, now_ms: int, compared: Sequence[_Compared], floor_us: int) -> Pace:
    """Take in what was measured of one disk."""
    if pace.is_slow:
        # A slow disk is compared by the kind of operation that made it slow: nobody reads from it.
        compared = [one for one in compared if one.kind == pace.kind]
        floor_us //= 2
    times = NEAR if pace.is_slow else FAR
    above = [one for one in compared if one.own.is_above(one.peers, times=times, floor_us=floor_us)]
    if not compared:
        return pace
    is_turning = bool(above) != pace.is_slow
    goes_on = pace.turning_ms is not None and now_ms <= pace.judged_ms + GAP_MS
    turning_ms = (pace.turning_ms if goes_on else now_ms) if is_turning else None
    after = replace(pace, judged_ms=now_ms, turning_ms=turning_ms)
    if above:
        one = above[0]
        cause = f"{one.kind} take {one.own}; those of other disks {one.peers}"
        after = replace(after, late_ms=now_ms, kind=one.kind, cause=cause)
    if turning_ms is None:
        return after
    if pace.is_slow:
        lasts = now_ms >= turning_ms + (EVEN_MS << _doublings(pace))
        return _even(after, now_ms) if lasts else after
    if now_ms < turning_ms + SLOW_MS:
        return after
    return replace(
        after, stage=Stage.SLOW, since_ms=now_ms, turning_ms=None, strikes=pace.strikes + 1
    )


def _even(pace: Pace, now_ms: int) -> Pace:
    return replace(pace, stage=Stage.EVEN, since_ms=now_ms, turning_ms=None, idle_ms=None, cause="")


def _doublings(pace: Pace) -> int:
    return min(max(pace.strikes - 1, 0), DOUBLINGS_MAX)


def _forget(pace: Pace, now_ms: int) -> Pace:
    """End what was not seen for long: a slow disk's stage, an even one's strikes."""
    if pace.is_slow and now_ms >= forgotten_at_ms(pace):
        return _even(pace, now_ms)
    if pace.strikes and not pace.is_slow and now_ms >= pace.since_ms + STRIKES_KEPT_MS:
        return replace(pace, strikes=0)
    return pace


def _idle(view: View, paces: Mapping[str, Pace]) -> dict[str, Pace]:
    """Take note of the slow disks that lead nothing that another disk could lead."""
    slow = {uuid for uuid, pace in paces.items() if pace.stage is Stage.SLOW}
    leading: set[str] = set()
    for key, conf in _present(view) if slow else ():
        place = place_of(view, key, conf.member(conf.primary))
        if place in slow and _heirs(view, paces, key, conf):
            leading.add(place)
    found = dict(paces)
    for uuid in slow:
        since_ms = paces[uuid].idle_ms
        since_ms = view.now_ms if since_ms is None else since_ms
        found[uuid] = replace(paces[uuid], idle_ms=None if uuid in leading else since_ms)
    return found


def _demote(view: View, paces: dict[str, Pace]) -> dict[str, Pace]:
    """Choose at most one disk to be demoted: that which is slow for longest and still is."""
    demoted_at = [pace.demoted_ms for pace in paces.values() if pace.demoted_ms is not None]
    last_ms = max([view.started_ms, *demoted_at])
    if view.now_ms < last_ms + DEMOTE_PAUSE_MS:
        return paces
    due = [
        (pace.since_ms, uuid)
        for uuid, pace in paces.items()
        if pace.stage is Stage.SLOW
        and pace.idle_ms is not None
        and view.now_ms >= pace.idle_ms + DEMOTE_MS
        and pace.turning_ms is None
        and view.now_ms <= pace.judged_ms + GAP_MS
    ]
    for _, uuid in sorted(due):
        if any(_spared(view, uuid, key, conf) for key, conf in _present(view)):
            demoted = replace(paces[uuid], stage=Stage.DEMOTED, demoted_ms=view.now_ms)
            return paces | {uuid: demoted}
    return paces


# What follows from it.


def forgotten_at_ms(pace: Pace) -> int:
    """Give when a slow disk is tried again that is not measured to be late any more.

    Counted from the last late measurement: a good measurement now and then, which does not last,
    must not put the new try off.
    """
    return pace.late_ms + (FORGET_MS << _doublings(pace))


def trial(view: View, uuid: str) -> str:
    """Say when a slow disk is tried again if nothing is measured of it until then."""
    left_ms = forgotten_at_ms(view.paces[uuid]) - view.now_ms
    return f"while it is idle it is tried again in {max(0, -(-left_ms // 1000))} s"


def is_slow(view: View, key: ShardKey, member: Member) -> bool:
    """Whether a member's replica is on a slow disk."""
    pace = view.paces.get(place_of(view, key, member))
    return pace is not None and pace.is_slow


def is_held_out(view: View, key: ShardKey, conf: ShardConf, member: Member) -> bool:
    """Whether a member outside the ISR is not made equal because its disk is slow."""
    return is_slow(view, key, member) and is_spare(view, key, conf, member)


def demoted(view: View, key: ShardKey, conf: ShardConf) -> Iterator[Member]:
    """Give the members of an ISR that are left out because their disks are slow."""
    for uuid, pace in view.paces.items():
        if pace.stage is Stage.DEMOTED and (member := _spared(view, uuid, key, conf)):
            yield member


def is_spare(view: View, key: ShardKey, conf: ShardConf, member: Member) -> bool:
    """Whether enough others are in sync and there to do without a member."""
    others = [conf.member(copy) for copy in conf.isr if copy != member.copy]
    there = sum(is_good(view, key, other) for other in others)
    return there >= max(OTHERS_MIN, conf.min_write)


def plan_moves(view: View) -> Iterator[Tell]:
    """Ask primaries on slow disks to hand over to the ones that lead least."""
    last_ms = view.transferred_ms
    is_any = any(pace.is_slow for pace in view.paces.values())
    if not is_any or (last_ms is not None and view.now_ms < last_ms + PAUSE_MS):
        return
    present = list(_present(view))
    leads = Counter(conf.member(conf.primary).store for _, conf in present)
    asked = 0
    for key, conf in present:
        primary = conf.member(conf.primary)
        heirs = _heirs(view, view.paces, key, conf) if is_slow(view, key, primary) else []
        report = report_of(view, key, primary)
        is_serving = report is not None and report.role == "active" and report.verifying is None
        if not heirs or not is_serving or not is_good(view, key, primary):
            continue
        heir = min(heirs, key=lambda member: (leads[member.store], member.copy))
        volume_id, index = key
        command = TransferPrimary(id=0, term=0, volume_id=volume_id, index=index, to=heir.copy)
        tell = Tell(primary.store, command, "its disk is slow")
        if tell.key in view.in_flight:
            continue
        leads[primary.store] -= 1
        leads[heir.store] += 1
        asked += 1
        yield tell
        if asked == MOVES_MAX:
            return


def place_of(view: View, key: ShardKey, member: Member) -> str:
    """Give the uuid of the disk that holds a member's replica."""
    report, store = report_of(view, key, member), view.stores.get(member.store)
    if report is None or store is None:
        return member.disk
    # A disk that was replaced: the configuration still names the one before.
    here = (disk.disk_uuid for disk in store.disks if disk.index == report.disk)
    return next(here, member.disk)


def _present(view: View) -> Iterator[tuple[ShardKey, ShardConf]]:
    for key, conf in view.shards.items():
        volume = view.volumes.get(key[0])
        if volume is not None and volume.intent is VolumeIntent.PRESENT:
            yield key, conf


def _heirs(view: View, paces: Mapping[str, Pace], key: ShardKey, conf: ShardConf) -> list[Member]:
    """Give the secondaries that could lead a shard from a disk that is not slow."""
    others = [conf.member(copy) for copy in conf.isr if copy != conf.primary]
    return [
        member
        for member in others
        if is_good(view, key, member)
        and not ((pace := paces.get(place_of(view, key, member))) and pace.is_slow)
    ]


def _spared(view: View, uuid: str, key: ShardKey, conf: ShardConf) -> Member | None:
    """Give the secondary on a disk that its shard can do without."""
    for copy in conf.isr:
        member = conf.member(copy)
        if copy != conf.primary and place_of(view, key, member) == uuid:
            return member if is_spare(view, key, conf, member) else None
    return None
