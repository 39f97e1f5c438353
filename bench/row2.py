"""Row 2: the native client over loopback TCP, one replica, 4 KiB random reads QD32, against fio.

fio reads the very file that the store keeps the volume in, on the checkout's file system and all of
it written before, through io_uring and with O_DIRECT.
"""

from __future__ import annotations

from typing import Final

from bench import common, rig
from bench.common import Goal
from bench.row1 import fio_reads

GOAL: Final = Goal(
    row="2",
    title="native client over loopback TCP, one replica, 4k randread QD32, against fio io_uring",
    must=0.65,
    is_least=True,
)
SPAN: Final = 1 << 30


def main() -> None:
    """Measure."""
    assert __doc__ is not None
    choice = rig.choose(__doc__)
    rig.require("fio")
    with rig.cluster(stores=1, disk_bytes=2 << 30, is_device=True) as cluster:
        cluster.volume("v", SPAN, replicas=1)
        path = cluster.layout.store_data("s1") / "disk0.img"
        work = rig.work(span_bytes=SPAN, seconds=choice.seconds)
        baseline, measured, strangers = rig.pairs(
            choice, lambda: fio_reads(path, choice.seconds), lambda: cluster.load("v", work)
        )
    figure = common.ratios([r.iops for r in measured], [r.iops for r in baseline])
    cpu = [common.spread([r.cpu_per_million for r in side]) for side in (baseline, measured)]
    named = common.cpu_by_name(measured)
    rig.save(
        choice,
        GOAL,
        figure=figure,
        detail=f"CPU-s per million: fio {cpu[0].median:.1f}, ours {cpu[1].median:.1f}"
        f" (client {named['client']:.1f}, store {named['s1']:.1f});"
        f" {common.spread([r.iops for r in measured]).median:.0f} IOPS",
        rules=rig.rules_text("none needed (reads)", "none needed (reads)", measured),
        strangers=strangers,
        runs={"fio": baseline, "ours": measured},
    )


if __name__ == "__main__":
    main()
