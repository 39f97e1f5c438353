"""Row 6: three replicas on one machine, 4 KiB random writes QD32, against a third of raw writes.

fio writes a file in the same memory through io_uring, with O_DIRECT and without flushes; three
copies of everything cannot be more than a third of that.
"""

from __future__ import annotations

from typing import Final

from bench import common, rig
from bench.common import Goal, Run

GOAL: Final = Goal(
    row="6",
    title="three replicas on one machine, 4k randwrite QD32, against raw randwrite / 3",
    must=0.4,
    is_least=True,
)
SPAN: Final = 1 << 30
COPIES: Final = 3


def main() -> None:
    """Measure."""
    assert __doc__ is not None
    choice = rig.choose(__doc__)
    rig.require("fio")
    with rig.folder() as place, rig.cluster(stores=COPIES, disk_bytes=2 << 30) as cluster:
        cluster.volume("v", SPAN, replicas=COPIES)
        raw = place / "raw.img"
        words = [f"--filename={raw}", f"--size={SPAN}", "--bs=4k", "--iodepth=32", "--direct=1"]
        words += ["--ioengine=io_uring", "--rw=randwrite"]
        fill = ["fio", "--name=f", "--output-format=json", f"--filename={raw}", "--rw=write"]
        rig.run_json([*fill, f"--size={SPAN}", "--bs=1m"], seconds=60)
        work = rig.work(span_bytes=SPAN, read_percent=0, seconds=choice.seconds)

        def writes() -> Run:
            return rig.fio(words, seconds=choice.seconds, servers={})

        baseline, measured, strangers = rig.pairs(choice, writes, lambda: cluster.load("v", work))
    figure = common.ratios([r.iops for r in measured], [r.iops / COPIES for r in baseline])
    cpu = [common.spread([r.cpu_per_million for r in side]) for side in (baseline, measured)]
    rig.save(
        choice,
        GOAL,
        figure=figure,
        detail=f"IOPS: raw / 3 {common.spread([r.iops / COPIES for r in baseline]).median:.0f},"
        f" ours {common.spread([r.iops for r in measured]).median:.0f}; CPU-s per million: fio"
        f" {cpu[0].median:.1f}, ours {cpu[1].median:.1f}",
        rules=rig.rules_text("none needed (memory)", "none needed (plp)", measured),
        strangers=strangers,
        runs={"fio": baseline, "ours": measured},
    )


if __name__ == "__main__":
    main()
