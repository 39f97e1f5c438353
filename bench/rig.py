"""What a measurement needs of the machine: clusters, clients, baselines, CPU accounting, results.

Disks of clusters are files in a directory in memory (`/dev/shm`), formatted with `durability=plp`:
memory has no volatile cache, so neither side of a comparison flushes. A store chooses the engine
`inline` for them by itself. Rows that compare reads with those of a device use files of the
checkout's own file system, every block of them written before, because holes read faster than
anything.

Only processes that were started here are ended, by pid, and everything that was made is removed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench import common
from bench.common import Goal, Run

from pureflash.client.api import Api
from pureflash.client.context import resolve_server
from pureflash.model.core import core_spec
from pureflash.model.layout import Layout
from pureflash.supervisor import cluster as clusters
from pureflash.supervisor.ports import PortClaims

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "bench" / "results"
PF: Final = str(Path(sys.executable).with_name("pf"))
TICKS: Final = os.sysconf("SC_CLK_TCK")
MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a directory in memory is what is asked for
GUARD_S: Final = 120
"""Beyond its own time, after which a program that does not end is killed."""
BUSY_CORES: Final = 0.3
"""CPU of strangers above which a result says that the machine was busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How long to measure."""

    pairs: int
    seconds: float
    is_saved: bool


def choose(description: str, *, pairs: int = 5, seconds: float = 3.0) -> Choice:
    """Read the command line that every script has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=pairs, help=f"pairs of runs ({pairs})")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"of each run ({seconds:g})")
    parser.add_argument("--no-save", action="store_true", help="print only")
    given = parser.parse_args()
    if given.pairs < 1 or not 0.1 <= given.seconds <= 600:
        parser.error("--pairs from 1, --seconds from 0.1 to 600")
    return Choice(pairs=given.pairs, seconds=given.seconds, is_saved=not given.no_save)


def cpu_of(pid: int) -> float:
    """Give the CPU seconds of a live process, all threads, ended ones included."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return common.parse_stat_cpu(text, ticks_per_second=TICKS)


def rss_kib(pid: int) -> int:
    """Give the resident memory of a live process."""
    return common.parse_status_kib(Path(f"/proc/{pid}/status").read_text(), "VmRSS")


def host_busy() -> float:
    """Give the busy seconds of all cores since the start of the machine."""
    return common.parse_host_busy(Path("/proc/stat").read_text(), ticks_per_second=TICKS)


def require(*programs: str) -> None:
    """End with exit status 2 when a baseline is not installed: no result is better than half."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        sys.exit(f"bench: not installed: {' '.join(missing)}; Debian's packages have these names")


@contextlib.contextmanager
def folder(*, is_device: bool = False) -> Iterator[Path]:
    """Give a directory for the time of a measurement, in memory or where the checkout is."""
    above = ROOT / "target" / "bench" if is_device else MEMORY
    above.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pf-bench-", dir=above) as text:
        yield Path(text)


def write_whole_file(path: Path, size_bytes: int) -> None:
    """Make a file without holes, durably."""
    block = bytes(1 << 20)
    with path.open("wb") as stream:
        for _ in range(size_bytes >> 20):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())


def run_json(command: Sequence[str], *, seconds: float) -> tuple[dict[str, Any], float]:
    """Run a program to its end; gives the JSON that it printed, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=seconds + GUARD_S
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stdout[-500:]}{done.stderr[-1500:]}")
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    # fio may print a line of its own before the document.
    document: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return document, cpu


def fio(arguments: Sequence[str], *, seconds: float, servers: Mapping[str, int]) -> Run:
    """Run fio once. Its CPU of starting, which a run with one I/O shows, is taken off."""
    common_part = ["fio", "--name=b", "--output-format=json", "--eta=never", "--randrepeat=0"]
    common_part += ["--norandommap", "--thread", "--group_reporting", *arguments]
    _, start = run_json([*common_part, "--number_ios=1"], seconds=5)
    before = {name: cpu_of(pid) for name, pid in servers.items()}
    document, cpu = run_json(
        [*common_part, "--time_based", f"--runtime={seconds}"], seconds=seconds
    )
    used = {name: cpu_of(pid) - before[name] for name, pid in servers.items()}
    return common.parse_fio(document, cpu_s={"fio": max(cpu - start, 0.0), **used})


class EpollPair:
    """The floor: `epoll_pair.c`, compiled where it is needed."""

    def __init__(self, place: Path) -> None:
        """Compile into `place`."""
        require("cc")
        self._program = place / "epoll_pair"
        source = ROOT / "bench" / "epoll_pair.c"
        subprocess.run(["cc", "-O2", "-o", str(self._program), str(source)], check=True, timeout=60)

    def run(self, mode: str, *, depth: int, seconds: float) -> Run:
        """Run it once with payloads of 4 KiB; `mode` is read or write."""
        words = [str(self._program), mode, str(depth), str(seconds), "4096"]
        found, _ = run_json(words, seconds=seconds)
        cpu = {"client": found["client_cpu_s"], "server": found["server_cpu_s"]}
        return Run(operations=found["operations"], seconds=found["seconds"], cpu_s=cpu)


def work(**changes: Any) -> dict[str, Any]:
    """Describe a load of our own generator: 4 KiB, depth 32, reads anywhere, unless changed."""
    usual = {
        "depth": 32,
        "block_bytes": 4096,
        "read_percent": 100,
        "span_bytes": 1 << 30,
        "seconds": 3.0,
        "operations": None,
        "is_sequential": False,
        "seed": 1,
    }
    unknown = set(changes) - set(usual)
    assert not unknown, f"the load has no {unknown}"
    return usual | changes


def fill_work(span_bytes: int) -> dict[str, Any]:
    """Describe writing everything once, so that reads find data."""
    block = 1 << 20
    return work(
        depth=8,
        block_bytes=block,
        read_percent=0,
        span_bytes=span_bytes,
        seconds=600.0,
        operations=span_bytes // block,
        is_sequential=True,
    )


def client(kind: str, document: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Run a load in a process of its own; gives its report and the CPU of the load alone."""
    words = [sys.executable, "-m", "bench.client", kind, json.dumps(document)]
    seconds = document["work"]["seconds"]
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, timeout=seconds + GUARD_S, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"the load failed: {done.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found["report"], found["cpu_s"]


class Cluster:
    """A cluster of `pf up --detach`; its disks are sparse, or without holes."""

    def __init__(self, place: Path, *, stores: int, disk_bytes: int, is_full: bool) -> None:
        """Make its directory with formatted disks, and start it."""
        from pureflash._core import format_disk

        self.layout = Layout(place / "data")
        self.stores = stores
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PF_")}
        (place / "run").mkdir(mode=0o700)
        self._environment = {
            **kept,
            "HOME": str(place),
            "XDG_CONFIG_HOME": str(place / "config"),
            "XDG_RUNTIME_DIR": str(place / "run"),
            "PF_DATA": str(self.layout.directory),
        }
        wish = clusters.Wish(stores=stores, disk_bytes=disk_bytes)
        with PortClaims() as claims:
            made, _ = asyncio.run(clusters.open_cluster(self.layout, wish, ports=claims))
        for number in range(1, stores + 1):
            data = self.layout.store_data(f"s{number}")
            data.mkdir(parents=True)
            path = data / "disk0.img"
            if is_full:
                write_whole_file(path, disk_bytes)
            format_disk(
                str(path),
                size_bytes=None if is_full else disk_bytes,
                cluster_id=bytes.fromhex(made.cluster_id),
                durability="plp",
            )
        self.pf("up", "--detach", "--stores", str(stores), "--disk", f"{disk_bytes}B")
        found = resolve_server(None, self.layout.directory)
        self.api = Api(found.address, found.token, source="the measurement")

    def pf(self, *words: str) -> str:
        """Run `pf`; gives what it printed."""
        done = subprocess.run(
            [PF, *words],
            check=False,
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=GUARD_S,
        )
        if done.returncode:
            raise RuntimeError(f"pf {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def pids(self) -> dict[str, int]:
        """Give the pid of every process of the cluster, the supervisor included."""
        report = json.loads(self.layout.supervisor_file.read_text())
        found = {child["name"]: child["pid"] for child in report["children"]}
        return {**found, "supervisor": int(self.layout.lock.read_text().split()[0])}

    def volume(self, name: str, size_bytes: int, *, replicas: int) -> None:
        """Make a volume, and write all of it once."""
        self.pf("volume", "create", name, f"{size_bytes}B", "--replicas", str(replicas))
        self.load(name, fill_work(size_bytes))

    def load(self, volume: str, document: Mapping[str, Any]) -> Run:
        """Put load on a volume by the native client; CPU of every process is accounted."""
        spec = self.api.attach_volume(volume, is_read_only=False)
        described = {
            "cluster_id": spec.cluster_id,
            "spec": core_spec(spec) | {"ticket": spec.ticket},
            "work": dict(document),
        }
        pids = self.pids()
        before = {name: cpu_of(pid) for name, pid in pids.items()}
        flushes = self.counter("flushes")
        report, cpu = client("volume", described)
        used = {name: cpu_of(pid) - before[name] for name, pid in pids.items()}
        report["flushes"] = self.counter("flushes") - flushes
        return common.parse_load(report, cpu_s={"client": cpu, **used})

    def counter(self, name: str) -> int:
        """Give a counter, added up over the stores, as of their last heartbeat."""
        return int(self.api.cluster().counters.get(name, 0))

    def close(self) -> None:
        """End it."""
        self.api.close()
        self.pf("down")


@contextlib.contextmanager
def cluster(*, stores: int, disk_bytes: int, is_device: bool = False) -> Iterator[Cluster]:
    """Give a cluster for the time of a measurement, in memory or on the checkout's device."""
    with folder(is_device=is_device) as place:
        made = Cluster(place, stores=stores, disk_bytes=disk_bytes, is_full=is_device)
        try:
            yield made
        finally:
            made.close()


def pairs(
    choice: Choice, baseline: Callable[[], Run], ours: Callable[[], Run]
) -> tuple[list[Run], list[Run], float]:
    """Run both in turn; gives their runs, and the cores that strangers used meanwhile."""
    first: list[Run] = []
    second: list[Run] = []
    busy, started = host_busy(), time.monotonic()
    for _ in range(choice.pairs):
        first.append(baseline())
        second.append(ours())
    known = sum(sum(run.cpu_s.values()) for run in (*first, *second))
    strangers = max(host_busy() - busy - known, 0.0) / (time.monotonic() - started)
    return first, second, strangers


def machine(strangers: float) -> dict[str, Any]:
    """Describe where and with what a result was made."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    is_busy = strangers > BUSY_CORES
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "strangers_cores": round(strangers, 2),
        "remark": f"machine busy ({strangers:.1f} cores)" if is_busy else "",
    }


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], check=False, capture_output=True, text=True, cwd=ROOT, timeout=30
    )
    return done.stdout.strip()


def save(
    choice: Choice,
    goal: Goal,
    *,
    figure: common.Spread,
    detail: str,
    rules: str,
    strangers: float,
    runs: Mapping[str, Sequence[Run]],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Print a result, and keep it in `bench/results/` beside the table of all rows."""
    command = f"python -m bench.{Path(sys.argv[0]).stem} --pairs {choice.pairs}"
    document: dict[str, Any] = {
        "row": goal.row,
        "title": goal.title,
        "unit": goal.unit,
        "goal": goal.text(),
        "figure": asdict(figure),
        "verdict": goal.verdict(figure.median),
        "detail": detail,
        "flush_rules": rules,
        "machine": machine(strangers),
        "date": dt.datetime.now(tz=dt.UTC).isoformat(timespec="seconds"),
        "command": f"{command} --seconds {choice.seconds:g}",
        "commit": _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain") else ""),
        "corehash": subprocess.run(
            [sys.executable, str(ROOT / "tools" / "corehash")],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout.strip(),
        "runs": {name: [asdict(run) for run in found] for name, found in runs.items()},
        **(more or {}),
    }
    print(common.markdown_row(document))
    print(f"    flushes: {rules}")
    if not choice.is_saved:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"row{goal.row}.json").write_text(json.dumps(document, indent=1) + "\n")
    write_table()


def write_table() -> None:
    """Write the table of all results that are kept."""
    kept = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("row*.json"))]
    head = [
        "# Results",
        "",
        "Written by the scripts of `bench/`; one JSON file a row has every run, machine, date,",
        "command, commit and corehash.",
        "",
        "| Row | What | Figure [least .. most] | Goal | Detail | Machine |",
        "|---|---|---|---|---|---|",
    ]
    lines = [common.markdown_row(document) for document in kept]
    (RESULTS / "README.md").write_text("\n".join([*head, *lines]) + "\n")


def rules_text(baseline: str, ours: str, runs: Sequence[Run]) -> str:
    """Say the flush rules of both sides, and how many flushes the engine saw on ours."""
    seen = [run.flushes for run in runs if run.flushes is not None]
    counted = f"{sum(seen)} flushes in {len(seen)} runs" if seen else "not counted"
    return f"baseline: {baseline}; ours: {ours}, engine saw {counted}"
