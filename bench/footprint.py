"""Memory and idle CPU of `pf up`: three stores of 10 GiB, at rest and after a minute of load.

`--seconds` is the length of the load (60 unless said), half of it that of the rest; `--pairs` means
nothing here. Resident memory is that of /proc, agents and interpreters included.
"""

from __future__ import annotations

import time
from typing import Final

from bench import common, rig
from bench.common import Goal

STORES: Final = 3
SPAN: Final = 2 << 30
REST_SHARE: Final = 0.5
SETTLE_S: Final = 3
"""After the start: imports are over, heartbeats are regular."""
KIB_PER_MIB: Final = 1024

IDLE_MEMORY: Final = Goal(
    row="idle-memory", title="pf up with three stores at rest, all processes", must=600, unit=" MiB"
)
IDLE_CPU: Final = Goal(
    row="idle-cpu", title="pf up with three stores at rest, CPU", must=0.05, unit=" cores"
)
LOADED: Final = Goal(
    row="loaded-memory",
    title="one store of 10 GiB after 4k QD32 writes and reads, its agent included",
    must=150,
    unit=" MiB",
)


def resident(cluster: rig.Cluster) -> dict[str, float]:
    """Give the memory of each process in MiB."""
    return {name: rig.rss_kib(pid) / KIB_PER_MIB for name, pid in cluster.pids().items()}


def listed(values: dict[str, float], digits: int) -> str:
    """Write the value of each process."""
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in sorted(values.items()))


def main() -> None:
    """Measure."""
    assert __doc__ is not None
    choice = rig.choose(__doc__, pairs=1, seconds=60.0)
    with rig.cluster(stores=STORES, disk_bytes=10 << 30) as cluster:
        time.sleep(SETTLE_S)
        pids, rest_s = cluster.pids(), choice.seconds * REST_SHARE
        before, busy, started = cpu(pids), rig.host_busy(), time.monotonic()
        time.sleep(rest_s)
        took = time.monotonic() - started
        used = {name: (after - before[name]) / took for name, after in cpu(pids).items()}
        strangers = max((rig.host_busy() - busy) / took - sum(used.values()), 0.0)
        at_rest = resident(cluster)
        save(choice, IDLE_MEMORY, sum(at_rest.values()), listed(at_rest, 0), strangers)
        save(choice, IDLE_CPU, sum(used.values()), listed(used, 4), strangers)
        cluster.pf("volume", "create", "v", f"{SPAN}B", "--replicas", str(STORES))
        for percent in (0, 100):
            work = rig.work(span_bytes=SPAN, read_percent=percent, seconds=choice.seconds / 2)
            cluster.load("v", work)
        loaded = {name: mib for name, mib in resident(cluster).items() if name in pids}
        largest = max(loaded[f"s{number}"] for number in range(1, STORES + 1))
        save(choice, LOADED, largest, listed(loaded, 0), strangers)


def cpu(pids: dict[str, int]) -> dict[str, float]:
    """Give the CPU seconds of each process."""
    return {name: rig.cpu_of(pid) for name, pid in pids.items()}


def save(choice: rig.Choice, goal: Goal, value: float, detail: str, strangers: float) -> None:
    """Keep one figure."""
    rig.save(
        choice,
        goal,
        figure=common.spread([value]),
        detail=detail,
        rules="none needed (plp)",
        strangers=strangers,
        runs={},
    )


if __name__ == "__main__":
    main()
