"""Row 1: the engine and one lane in one process, 4 KiB random reads at depth 32, against fio.

Both read one file of the checkout's file system, all of it written before, through io_uring and
with O_DIRECT, one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bench import common, rig
from bench.common import Goal, Run

from pureflash import _core

GOAL: Final = Goal(
    row="1",
    title="engine in process, one replica, 4k randread QD32, against fio io_uring",
    must=0.9,
    is_least=True,
)
SPAN: Final = 1 << 30
CLUSTER: Final = bytes(range(16))


def make_disk(place: Path) -> Path:
    """Make a disk whose every byte was written, and fill the span of the load on it."""
    path = place / "disk.img"
    rig.write_whole_file(path, SPAN + (512 << 20))
    _core.format_disk(path, size_bytes=None, cluster_id=CLUSTER, durability="plp")
    rig.client("lane", describe(path, rig.fill_work(SPAN)))
    return path


def describe(path: Path, work: dict[str, object]) -> dict[str, object]:
    """Describe a load on the lane of a disk."""
    return {"path": str(path), "cluster_id": CLUSTER.hex(), "work": work}


def fio_reads(path: Path, seconds: float) -> Run:
    """Read the file with fio."""
    words = [f"--filename={path}", "--rw=randread", "--bs=4k", "--iodepth=32", "--direct=1"]
    return rig.fio([*words, "--ioengine=io_uring"], seconds=seconds, servers={})


def main() -> None:
    """Measure."""
    assert __doc__ is not None
    choice = rig.choose(__doc__)
    rig.require("fio")
    with rig.folder(is_device=True) as place:
        path = make_disk(place)
        work = rig.work(span_bytes=SPAN, seconds=choice.seconds)

        def ours() -> Run:
            report, cpu = rig.client("lane", describe(path, work))
            return common.parse_load(report, cpu_s={"lane": cpu})

        def engine() -> Run:
            report, cpu = rig.client("disk", {"path": str(path), "work": work})
            return common.parse_load(report, cpu_s={"engine": cpu})

        bare, _, _ = rig.pairs(choice, engine, engine)
        baseline, measured, strangers = rig.pairs(
            choice, lambda: fio_reads(path, choice.seconds), ours
        )
    figure = common.ratios([r.iops for r in measured], [r.iops for r in baseline])
    cpu = [common.spread([r.cpu_per_million for r in side]) for side in (baseline, bare, measured)]
    rig.save(
        choice,
        GOAL,
        figure=figure,
        detail=f"CPU-s per million: fio {cpu[0].median:.1f}, our engine alone {cpu[1].median:.1f},"
        f" engine and lane {cpu[2].median:.1f}",
        rules=rig.rules_text("none needed (reads)", "none needed (reads)", measured),
        strangers=strangers,
        runs={"fio": baseline, "engine": bare, "lane": measured},
    )


if __name__ == "__main__":
    main()
