"""What rows 7, 7b and 7c share: three stores in memory, one volume of three replicas, depth 32."""

from __future__ import annotations

from typing import Final

from bench import common, rig
from bench.common import Goal, Run

SPAN: Final = 1 << 30
COPIES: Final = 3
STORES: Final = ("s1", "s2", "s3")
CONTROL: Final = ("c1", "g1", "supervisor")


def cpu_against_pair(choice: rig.Choice, goal: Goal, *, mode: str) -> None:
    """Compare CPU per operation with that of the C epoll pair; `mode` is read or write."""
    read_percent = 100 if mode == "read" else 0
    with rig.folder() as place, rig.cluster(stores=COPIES, disk_bytes=2 << 30) as cluster:
        pair = rig.EpollPair(place)
        cluster.volume("v", SPAN, replicas=COPIES)
        work = rig.work(span_bytes=SPAN, read_percent=read_percent, seconds=choice.seconds)
        baseline, measured, strangers = rig.pairs(
            choice,
            lambda: pair.run(mode, depth=32, seconds=choice.seconds),
            lambda: cluster.load("v", work),
        )
    figure = common.ratios(
        [run.cpu_per_million for run in measured], [run.cpu_per_million for run in baseline]
    )
    rig.save(
        choice,
        goal,
        figure=figure,
        detail=detail(baseline, measured),
        rules=rig.rules_text("no storage", "none needed (plp)", measured),
        strangers=strangers,
        runs={"epoll_pair": baseline, "ours": measured},
    )


def detail(baseline: list[Run], measured: list[Run]) -> str:
    """Say the CPU of each process."""
    pair = common.spread([run.cpu_per_million for run in baseline]).median
    own = common.spread([run.cpu_per_million for run in measured]).median
    named = common.cpu_by_name(measured)
    stores = ", ".join(f"{name} {named[name]:.1f}" for name in STORES)
    control = sum(named[name] for name in CONTROL)
    return (
        f"CPU-s per million: pair {pair:.2f}, ours {own:.1f} (client {named['client']:.1f},"
        f" {stores}, conductor, gateway and supervisor {control:.1f})"
    )
