"""Row 7c: IOPS of three replicas in memory, 4 KiB random writes and reads QD32, against a figure.

The figure is Vitastor's on such a machine, measured when the goals were set (2 cores, all processes
on them, disks in memory): 8.0k writes and 25.8k reads per second. It is not run here; each run of
ours has the C epoll pair beside it, so that a slow minute shows.
"""

from __future__ import annotations

from typing import Final

from bench import common, rig
from bench.common import Goal
from bench.replicas import COPIES, SPAN

VITASTOR_IOPS: Final = {"write": 8_000.0, "read": 25_800.0}
TITLES: Final = {
    "write": "IOPS, three replicas, 4k randwrite QD32, against Vitastor's 8.0k",
    "read": "IOPS, three replicas, 4k randread QD32, against Vitastor's 25.8k",
}


def measure(choice: rig.Choice, cluster: rig.Cluster, pair: rig.EpollPair, mode: str) -> None:
    """Measure one kind of request."""
    percent = 100 if mode == "read" else 0
    work = rig.work(span_bytes=SPAN, read_percent=percent, seconds=choice.seconds)
    baseline, measured, strangers = rig.pairs(
        choice,
        lambda: pair.run(mode, depth=32, seconds=choice.seconds),
        lambda: cluster.load("v", work),
    )
    raw = common.spread([run.iops for run in baseline]).median
    own = common.spread([run.iops for run in measured]).median
    late = common.spread([run.p99_us for run in measured]).median
    known = [VITASTOR_IOPS[mode]] * choice.pairs
    rig.save(
        choice,
        Goal(row=f"7c-{mode}", title=TITLES[mode], must=2.0, is_least=True),
        figure=common.ratios([run.iops for run in measured], known),
        detail=f"IOPS {own:.0f}, p99 {late:.0f} us; C pair of the same minute {raw:.0f}",
        rules=rig.rules_text("as it was measured", "none needed (plp)", measured),
        strangers=strangers,
        runs={"epoll_pair": baseline, "ours": measured},
    )


def main() -> None:
    """Measure."""
    assert __doc__ is not None
    choice = rig.choose(__doc__)
    with rig.folder() as place, rig.cluster(stores=COPIES, disk_bytes=2 << 30) as cluster:
        pair = rig.EpollPair(place)
        cluster.volume("v", SPAN, replicas=COPIES)
        for mode in VITASTOR_IOPS:
            measure(choice, cluster, pair, mode)


if __name__ == "__main__":
    main()
