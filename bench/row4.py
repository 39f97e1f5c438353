"""Row 4: CPU of the server per million 4 KiB random reads over NBD, against nbdkit's memory plugin.

The client is the same on both sides, fio's NBD engine at depth 32 on a unix socket, and does not
count. Ours is two processes, gateway and store, with one loopback TCP hop between them.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench import common, rig
from bench.common import Goal, Run

GOAL: Final = Goal(
    row="4",
    title="server CPU per 4k randread QD32 over NBD, against nbdkit memory",
    must=1.0,
)
SPAN: Final = 1 << 30
START_S: Final = 10
SERVERS: Final = ("nbdkit", "g1", "s1")


@contextlib.contextmanager
def nbdkit(place: Path) -> Iterator[tuple[str, int]]:
    """Serve memory; gives the URI and the pid."""
    socket = place / "nbdkit.sock"
    words = ["nbdkit", "--foreground", "--unix", str(socket), "memory", str(SPAN)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server:
        try:
            deadline = time.monotonic() + START_S
            while not socket.exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("nbdkit did not start")
                time.sleep(0.05)
            yield f"nbd+unix:///?socket={socket}", server.pid
        finally:
            server.terminate()
            server.wait(timeout=START_S)


def fio_nbd(uri: str, mode: str, choice: rig.Choice, servers: dict[str, int]) -> Run:
    """Put load on an export."""
    words = ["--ioengine=nbd", f"--uri={uri}", f"--rw={mode}", "--bs=4k", "--iodepth=32"]
    return rig.fio([*words, f"--size={SPAN}"], seconds=choice.seconds, servers=servers)


def server_cpu(runs: list[Run]) -> list[float]:
    """Give the CPU seconds per million operations of the servers alone."""
    return [
        sum(used for name, used in run.cpu_s.items() if name in SERVERS) / run.operations * 1e6
        for run in runs
    ]


def main() -> None:
    """Measure."""
    assert __doc__ is not None
    choice = rig.choose(__doc__)
    rig.require("fio", "nbdkit")
    with (
        rig.folder() as place,
        nbdkit(place) as (uri, pid),
        rig.cluster(stores=1, disk_bytes=2 << 30) as cluster,
    ):
        cluster.volume("v", SPAN, replicas=1)
        own_uri = cluster.pf("export", "nbd", "v", "-o", "name").strip()
        theirs = {"nbdkit": pid}
        fill = ["--ioengine=nbd", f"--uri={uri}", "--rw=write", "--bs=1m", f"--size={SPAN}"]
        rig.run_json(["fio", "--name=f", "--output-format=json", *fill], seconds=60)
        baseline, measured, strangers = rig.pairs(
            choice,
            lambda: fio_nbd(uri, "randread", choice, theirs),
            lambda: fio_nbd(own_uri, "randread", choice, cluster.pids()),
        )
    figure = common.ratios(server_cpu(measured), server_cpu(baseline))
    named = common.cpu_by_name(measured)
    rig.save(
        choice,
        GOAL,
        figure=figure,
        detail=f"CPU-s per million: nbdkit {common.spread(server_cpu(baseline)).median:.1f}, ours"
        f" {common.spread(server_cpu(measured)).median:.1f}"
        f" (gateway {named['g1']:.1f}, store {named['s1']:.1f}); IOPS"
        f" {common.spread([r.iops for r in baseline]).median:.0f} and"
        f" {common.spread([r.iops for r in measured]).median:.0f}",
        rules=rig.rules_text("none needed (memory, reads)", "none needed (plp, reads)", measured),
        strangers=strangers,
        runs={"nbdkit": baseline, "ours": measured},
    )


if __name__ == "__main__":
    main()
