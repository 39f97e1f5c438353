"""Row 8: latency of one 4 KiB write at depth 1 with three replicas, against one replica.

Both volumes are on the same three stores; the median latencies of each pair are compared.
"""

from __future__ import annotations

from typing import Final

from bench import common, rig
from bench.common import Goal

GOAL: Final = Goal(row="8", title="QD1 write latency, three replicas against one", must=2.2)
SPAN: Final = 256 << 20


def main() -> None:
    """Measure."""
    assert __doc__ is not None
    choice = rig.choose(__doc__)
    with rig.cluster(stores=3, disk_bytes=2 << 30) as cluster:
        cluster.volume("one", SPAN, replicas=1)
        cluster.volume("three", SPAN, replicas=3)
        work = rig.work(span_bytes=SPAN, read_percent=0, depth=1, seconds=choice.seconds)
        baseline, measured, strangers = rig.pairs(
            choice, lambda: cluster.load("one", work), lambda: cluster.load("three", work)
        )
    one = common.spread([run.p50_us for run in baseline])
    three = common.spread([run.p50_us for run in measured])
    rig.save(
        choice,
        GOAL,
        figure=common.ratios([r.p50_us for r in measured], [r.p50_us for r in baseline]),
        detail=f"p50: one {one.text(0)} us, three {three.text(0)} us",
        rules=rig.rules_text("none needed (plp)", "none needed (plp)", [*baseline, *measured]),
        strangers=strangers,
        runs={"one": baseline, "three": measured},
    )


if __name__ == "__main__":
    main()
