"""Row 7: CPU of all processes per 4 KiB write of three replicas, QD32, against the C epoll pair."""

from __future__ import annotations

from bench import replicas, rig
from bench.common import Goal


def main() -> None:
    """Measure."""
    assert __doc__ is not None
    goal = Goal(row="7", title="CPU per 4k write, three replicas, QD32, against C pair", must=21)
    replicas.cpu_against_pair(rig.choose(__doc__), goal, mode="write")


if __name__ == "__main__":
    main()
