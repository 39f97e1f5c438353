"""How disks are, for people: a state, what is wrong, and what to do about it. Pure.

A store says of each disk its state, a reason where something is wrong, and the health code that the
reason belongs to; whether a disk is slow is the conductor's own judgement (`slow`).
"""

from __future__ import annotations

from typing import Final

from pureflash.conductor.view import View
from pureflash.model.domain import Store, StoreState
from pureflash.model.messages import DiskLatency, DiskReport
from pureflash.model.rest import DiskView

DISK_STEPS: Final = {
    "DISK_FAILED": "replace the disk; data with other replicas is not lost",
    "WRONG_CLUSTER": "put the disk of this cluster back there; nothing was written to it",
    "DISK_HANGS": "look at the device and its host; requests to it wait, none fails",
    "DISK_FULL": "make room on that host; overwrites go on, new data waits for it",
}
"""What to do about a disk when its store knows nothing better."""


def disk_code(report: DiskReport) -> str:
    """Give the health code of what a store says of a disk; empty when all is well.

    A store of an earlier version names none.
    """
    if report.state != "failed" and not report.reason:
        return ""
    if report.code in DISK_STEPS:
        return report.code
    return "DISK_FAILED" if report.state == "failed" else "DISK_FULL"


def disk_step(report: DiskReport) -> str:
    """Say what to do about a disk with a code."""
    return report.next_step or DISK_STEPS[disk_code(report)]


def disk_views(view: View, store: Store) -> list[DiskView]:
    """Show the disks of a store; what is not known while it is away is None."""
    seen = view.observation(store.id)
    views: list[DiskView] = []
    for disk in store.disks:
        report = seen.disks.get(disk.index) if seen.state is not StoreState.OFFLINE else None
        state, reason = "unknown", f"{store.name} is {seen.state}"
        if report is not None:
            state, reason = report.state, report.reason
        pace = view.paces.get(disk.disk_uuid)
        if pace is not None and pace.is_slow and state not in ("failed", "unknown"):
            state, reason = pace.stage, "; ".join(filter(None, [pace.cause, reason]))
        latency = report.latency if report and report.latency else DiskLatency()
        views.append(
            DiskView(
                id=disk.disk_uuid,
                store=store.name,
                index=disk.index,
                path=disk.path,
                size_bytes=disk.size_bytes,
                state=state,
                reason=reason,
                next_step=disk_step(report) if report and disk_code(report) else "",
                bad_slots=report.bad_slots if report else 0,
                engine=report.engine if report else None,
                engine_reason=report.engine_reason if report else None,
                bytes_total=report.bytes_total if report else None,
                bytes_free=report.bytes_free if report else None,
                write_ewma_us=latency.write_ewma_us if latency.writes else None,
                write_p99_us=latency.write_p99_us if latency.writes else None,
                read_ewma_us=latency.read_ewma_us if latency.reads else None,
                read_p99_us=latency.read_p99_us if latency.reads else None,
            )
        )
    return views
