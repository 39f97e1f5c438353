"""Arithmetic of a measurement: medians, spreads, ratios of pairs, and what /proc says.

Pure: values in, values out; `rig` does the I/O. A *pair* is one run of the baseline and one of ours
right after it. Ratios are taken pair by pair and the median of them is quoted, so that a machine
whose speed drifts between the pairs does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and most of several values of one kind."""

    median: float
    least: float
    most: float

    def text(self, digits: int = 2) -> str:
        """Write it as `median [least .. most]`."""
        return f"{self.median:.{digits}f} [{self.least:.{digits}f} .. {self.most:.{digits}f}]"


def spread(values: Sequence[float]) -> Spread:
    """Sum values up. Errors: ValueError for none."""
    if not values:
        raise ValueError("a spread needs at least one value")
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Divide pair by pair. Errors: ValueError for lists of unequal length or a baseline of 0."""
    if len(ours) != len(baseline):
        raise ValueError(f"{len(ours)} of ours, {len(baseline)} of the baseline: not pairs")
    if any(value <= 0 for value in baseline):
        raise ValueError("a baseline of 0 or less measured nothing")
    return spread([one / other for one, other in zip(ours, baseline, strict=True)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of one side.

    `cpu_s`: CPU seconds of each process that took part, by name. `flushes`: what the engine or the
    client's own report counted; None where nothing counts them.
    """

    operations: int
    seconds: float
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    p50_us: float = 0.0
    p99_us: float = 0.0
    flushes: int | None = None

    @property
    def iops(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds

    @property
    def cpu_per_million(self) -> float:
        """CPU seconds of all processes per million operations."""
        return sum(self.cpu_s.values()) / self.operations * 1e6


def cpu_by_name(runs: Sequence[Run]) -> dict[str, float]:
    """Give the median CPU seconds per million operations of each process."""
    names = sorted({name for run in runs for name in run.cpu_s})
    return {
        name: statistics.median(run.cpu_s.get(name, 0.0) / run.operations * 1e6 for run in runs)
        for name in names
    }


def parse_stat_cpu(text: str, *, ticks_per_second: int) -> float:
    """Read user and system CPU seconds out of `/proc/PID/stat`.

    The second field is the program's name in brackets and may hold anything, brackets and spaces
    included; what counts begins behind the last one (proc(5): utime is field 14, stime field 15).
    """
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / ticks_per_second


def parse_status_kib(text: str, name: str) -> int:
    """Read a size in KiB out of `/proc/PID/status`. Errors: KeyError when there is no such line."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise KeyError(name)


def parse_host_busy(text: str, *, ticks_per_second: int) -> float:
    """Read the busy seconds of all cores out of `/proc/stat`: all but idle and disk wait."""
    fields = [int(word) for word in text.splitlines()[0].split()[1:]]
    user, nice, system, interrupts, soft = fields[0], fields[1], fields[2], fields[5], fields[6]
    return (user + nice + system + interrupts + soft) / ticks_per_second


def parse_fio(document: Mapping[str, Any], *, cpu_s: Mapping[str, float]) -> Run:
    """Turn fio's JSON report, of one job or many that were added up, into a run."""
    job = document["jobs"][0]
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    if not sides:
        raise ValueError("fio has done no I/O")
    percentiles = [side["clat_ns"].get("percentile", {}) for side in sides]
    return Run(
        operations=sum(side["total_ios"] for side in sides),
        seconds=max(side["runtime"] for side in sides) / 1000,
        cpu_s=cpu_s,
        p50_us=max(found.get("50.000000", 0) for found in percentiles) / 1000,
        p99_us=max(found.get("99.000000", 0) for found in percentiles) / 1000,
        flushes=job.get("sync", {}).get("total_ios"),
    )


def parse_load(report: Mapping[str, Any], *, cpu_s: Mapping[str, float]) -> Run:
    """Turn a report of our own generator into a run; the kind that was done more often counts."""
    side = max((report["reads"], report["writes"]), key=lambda found: found["count"])
    return Run(
        operations=report["operations"],
        seconds=report["seconds"],
        cpu_s=cpu_s,
        p50_us=side["p50_us"],
        p99_us=side["p99_us"],
        flushes=report["flushes"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a row of docs/reference/performance.md asks for; `is_least`: more is better."""

    row: str
    title: str
    must: float
    unit: str = "x"
    is_least: bool = False

    def verdict(self, value: float) -> str:
        """Say whether a value reaches it."""
        is_met = value >= self.must if self.is_least else value <= self.must
        return "met" if is_met else "missed"

    def text(self) -> str:
        """Write the goal itself."""
        return f"{'>=' if self.is_least else '<='} {self.must:g}{self.unit}"


def markdown_row(document: Mapping[str, Any]) -> str:
    """Write one result, as `rig.save` keeps it, as a line of the table of results."""
    figure = document["figure"]
    cells = [
        document["row"],
        document["title"],
        f"{figure['median']:.2f}{document['unit']} [{figure['least']:.2f} .. {figure['most']:.2f}]",
        f"{document['goal']}: {document['verdict']}",
        document["detail"],
        document["machine"]["remark"] or "quiet",
    ]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
