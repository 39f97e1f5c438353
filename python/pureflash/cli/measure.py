"""The measurements of `pf bench`: loads of the core on a volume, a lane and a bare engine."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import typer

from pureflash.cli.budget import Part, means, read_budget, write_budget
from pureflash.cli.options import Output
from pureflash.cli.outcome import CommandProblem, Exit
from pureflash.cli.render import print_object, print_rows
from pureflash.client.context import resolve_data
from pureflash.client.follow import CALL_S
from pureflash.errors import PureFlashError
from pureflash.model.core import core_spec
from pureflash.model.rest import CreateVolume

if TYPE_CHECKING:
    from pureflash.client.api import Api

BLOCK_BYTES: Final = 4096
FILL_BYTES: Final = 1 << 20
SETTLE_S: Final = 1.5
"""Stores tell their counters twice a second: after this time without news all were told."""
COUNTERS_S: Final = 6
"""So long is waited for that."""
LOOK_S: Final = 0.1
SIM_OPTIONS: Final = '{"ops_per_s": 20}'
SIM_REQUESTS: Final = ("op.read", "op.write", "op.zero", "op.flush")
LOCAL_DISK_BYTES_MIN: Final = 1 << 30


class Measured(msgspec.Struct, frozen=True):
    """One load and what it did; times in microseconds, CPU in seconds per million operations."""

    name: str
    iops: float
    mean_us: float
    p50_us: float
    p99_us: float
    cpu_client: float


class Line(msgspec.Struct, frozen=True):
    """One part of a budget."""

    part: str
    mean_us: float
    share: float
    meaning: str
    is_inside: bool


class Budget(msgspec.Struct, frozen=True):
    """Where the time of one kind of request goes, at depth 1."""

    kind: str
    whole: Measured
    parts: list[Line]


class Report(msgspec.Struct, frozen=True):
    """Everything that was measured."""

    replicas: int
    budgets: list[Budget]
    loads: list[Measured]


class SimReport(msgspec.Struct, frozen=True):
    """Speed of the simulator on one core."""

    worlds: int
    simulated_s: float
    cpu_s: float
    simulated_per_cpu: float
    operations_per_simulated_s: float


def measure_cluster(
    core: Any,
    api: Api,
    *,
    size_bytes: int,
    replicas: int | None,
    seconds: float,
    depth: int,
) -> Report:
    """Measure a volume that is made for it: budgets at depth 1, then loads at `depth`."""
    with temporary_volume(api, size_bytes, replicas) as name:
        bench = _Bench(core, api, name, size_bytes)
        bench.fill()
        budgets = bench.budgets(seconds)
        loads = [bench.load(kind, seconds, depth) for kind in ("write", "read")]
        return Report(api.volume(name).replicas, budgets, loads)


def simulate(core: Any, seconds: float) -> SimReport:
    """Run worlds for some CPU time. Errors: CommandProblem for a broken invariant."""
    started = time.process_time()
    nanos = operations = worlds = 0
    while worlds == 0 or time.process_time() - started < seconds:
        worlds += 1
        world = core.World(worlds, SIM_OPTIONS)
        world.run()
        if (violation := world.violation()) is not None:
            raise CommandProblem(
                f"the world of seed {worlds} has broken an invariant: {violation}",
                exit_status=Exit.FAILED,
                next_step="report it with the seed and `pf version`",
            )
        counts = world.counts()
        nanos += counts["sim.nanos"]
        operations += sum(counts.get(name, 0) for name in SIM_REQUESTS)
    used, simulated = time.process_time() - started, nanos / 1e9
    return SimReport(worlds, simulated, used, simulated / used, operations / simulated)


@contextmanager
def temporary_volume(api: Api, size_bytes: int, replicas: int | None) -> Iterator[str]:
    """Make a volume with a name of its own; it is deleted whatever happens."""
    name = f"pf-bench-{secrets.token_hex(4)}"
    api.create_volume(CreateVolume(name=name, size_bytes=size_bytes, replicas=replicas))
    try:
        yield name
    finally:
        api.delete_volume(name)


class _Bench:
    """Loads on one volume."""

    def __init__(self, core: Any, api: Api, name: str, size_bytes: int) -> None:
        self._core, self._api, self._name, self._size = core, api, name, size_bytes

    def _run(self, work: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        spec = self._api.attach_volume(self._name, is_read_only=False)
        started = time.process_time()
        cluster_id = bytes.fromhex(spec.cluster_id)

        def look() -> dict[str, Any] | None:
            try:
                news = self._api.renew_attach(self._name, spec.ticket, timeout_s=CALL_S)
            except PureFlashError:
                return None  # the load goes on as it can, and looks again
            return core_spec(news)

        report = self._core.load_volume(
            core_spec(spec), dict(work), cluster_id=cluster_id, look=look
        )
        return report, time.process_time() - started

    def fill(self) -> None:
        """Write everything once, so that reads find data and writes overwrite."""
        self._run(fill_work(self._size))

    def load(self, kind: str, seconds: float, depth: int) -> Measured:
        """Put one kind of load on it."""
        report, cpu = self._run(work(kind, self._size, seconds, depth))
        return measured(f"volume, 4k {kind}", report, cpu)

    def budgets(self, seconds: float) -> list[Budget]:
        """Measure at depth 1, where nothing waits for anything else, and arrange the hops."""
        found = []
        before = self._settled()
        for kind in ("write", "read"):
            report, cpu = self._run(work(kind, self._size, seconds, 1))
            after = self._settled()
            whole = measured(f"volume, 4k {kind}, depth 1", report, cpu)
            arrange = read_budget if kind == "read" else write_budget
            parts = arrange(whole.mean_us, means(before, after))
            found.append(Budget(kind, whole, lines_of(parts, whole.mean_us)))
            before = after
        return found

    def _settled(self) -> Mapping[str, int]:
        counters, is_quiet = settled(lambda: self._api.cluster().counters)
        if not is_quiet:
            typer.echo("notice: others use the cluster; their requests are in the means", err=True)
        return counters


def settled(
    look: Callable[[], Mapping[str, int]],
    *,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> tuple[Mapping[str, int], bool]:
    """Look until the stores have told of everything: until no hop was added for a while.

    Gives the counters, and False when that did not come about because others use the cluster.
    """
    deadline, last = clock() + COUNTERS_S, look()
    since = clock()
    while True:
        pause(LOOK_S)
        found = look()
        if _hops(found) != _hops(last):
            last, since = found, clock()
        if clock() - since >= SETTLE_S:
            return found, True
        if clock() > deadline:
            return found, False


def _hops(counters: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counters.items() if name.endswith("_hops")}


def work(kind: str, span_bytes: int, seconds: float, depth: int) -> dict[str, Any]:
    """Describe a load of 4 KiB requests anywhere in the span; `kind` is read or write."""
    return {
        "depth": depth,
        "block_bytes": BLOCK_BYTES,
        "read_percent": 100 if kind == "read" else 0,
        "span_bytes": span_bytes,
        "seconds": seconds,
        "operations": None,
        "is_sequential": False,
        "seed": 1,
    }


def fill_work(span_bytes: int) -> dict[str, Any]:
    """Describe writing a span once."""
    changes = {
        "block_bytes": FILL_BYTES,
        "operations": span_bytes // FILL_BYTES,
        "is_sequential": True,
    }
    return work("write", span_bytes, 3600.0, 8) | changes


def measured(name: str, report: Mapping[str, Any], cpu_s: float) -> Measured:
    """Turn the core's report of a load of one kind into ours."""
    side = max((report["reads"], report["writes"]), key=lambda found: found["count"])
    return Measured(
        name,
        report["operations"] / report["seconds"],
        side["mean_us"],
        side["p50_us"],
        side["p99_us"],
        cpu_s / report["operations"] * 1e6,
    )


def lines_of(parts: list[Part], whole_us: float) -> list[Line]:
    """Give each part its share of the whole."""
    return [
        Line(part.name, part.mean_us, part.mean_us / whole_us, part.meaning, part.is_inside)
        for part in parts
    ]


def compare_local(
    core: Any,
    place: Path,
    size_bytes: int,
    seconds: float,
    depth: int,
) -> list[Measured]:
    """Measure one lane, and the engine alone, on a disk file made in `place` and removed again."""
    found: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="pf-bench-", dir=place) as folder:
        path = Path(folder) / "disk.img"
        cluster_id = secrets.token_bytes(16)
        room = max(2 * size_bytes, LOCAL_DISK_BYTES_MIN)
        core.format_disk(path, size_bytes=room, cluster_id=cluster_id)
        core.load_lane(path, fill_work(size_bytes), cluster_id=cluster_id)
        for kind in ("write", "read"):
            started = time.process_time()
            wanted = work(kind, size_bytes, seconds, depth)
            report = core.load_lane(path, wanted, cluster_id=cluster_id)
            cpu = time.process_time() - started
            found.append(measured(f"lane in this process, 4k {kind}", report, cpu))
        raw = Path(folder) / "raw.img"
        block = secrets.token_bytes(FILL_BYTES)
        with raw.open("wb") as stream:
            for _ in range(size_bytes // FILL_BYTES):
                stream.write(block)
        started = time.process_time()
        report = core.load_disk(raw, work("read", size_bytes, seconds, depth))
        found.append(measured("engine alone, 4k read", report, time.process_time() - started))
    return found


def place_of(data: Path | None) -> Path:
    """Give the directory of the cluster that is meant: its disk is what the comparison uses."""
    return resolve_data(data).directory


def print_report(report: Report, output: Output, depth: int) -> None:
    """Print everything that was measured."""
    if output not in (Output.TABLE, Output.WIDE):
        print_object(report, [], name="bench", output=output)
        return
    for budget in report.budgets:
        whole = budget.whole
        typer.echo(
            f"one 4 KiB {budget.kind}, {report.replicas} replica(s), depth 1:"
            f" mean {whole.mean_us:.0f} us, p50 {whole.p50_us:.0f} us, p99 {whole.p99_us:.0f} us"
        )
        rows = [_budget_row(line) for line in budget.parts]
        print_rows(["PART", "MEAN", "SHARE", "WHAT"], rows, is_bare=False)
        typer.echo("")
    typer.echo(f"depth {depth}:")
    titles = ["LOAD", "IOPS", "MEAN", "P50", "P99", "CPU-S PER MILLION, THIS PROCESS"]
    print_rows(titles, [_load_row(load) for load in report.loads], is_bare=False)


def _budget_row(line: Line) -> list[str]:
    name = f"  {line.part}" if line.is_inside else line.part
    share = "" if line.is_inside else f"{100 * line.share:.0f} %"
    return [name, f"{line.mean_us:.1f} us", share, line.meaning]


def _load_row(load: Measured) -> list[str]:
    times = (load.mean_us, load.p50_us, load.p99_us)
    return [
        load.name,
        f"{load.iops:.0f}",
        *(f"{time_us:.0f} us" for time_us in times),
        f"{load.cpu_client:.1f}",
    ]
