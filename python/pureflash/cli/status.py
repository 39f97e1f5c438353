"""The screen of `pf status`, after `zpool status`. Pure: values in, lines out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pureflash.model.rest import CapacityView, ClusterView, StoreView
from pureflash.units import format_size

FINDINGS_SHOWN: Final = 8
LINE_CHARS: Final = 100
STORES_SHOWN: Final = 16
"""More would leave the screen; `pf store list` has them all."""


def status_lines(
    seen: ClusterView, address: str, children: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Lay out the status; `children` is what a local supervisor knows, else empty."""
    lines = [
        f"cluster: {seen.cluster_id[:8]}  http://{address}/docs",
        f"  state: {seen.state}",
        f" status: {seen.sentence}",
    ]
    if seen.health:
        lines.append(f" action: {seen.health[0].next_step}")
    lines += [
        _space_line(seen.capacity),
        f"volumes: {_counts(seen.volumes_by_state)}; {seen.exports} exported",
    ]
    if seen.gateways:
        shown = (f"{g.name} {g.state}, {g.connections} client(s)" for g in seen.gateways)
        lines.append(f"gateway: {'; '.join(shown)}")
    lines += ["", *_store_table(seen.stores)]
    if children:
        pids = (f"{child['name']} {child.get('pid') or '-'}" for child in children)
        text = f"processes of this machine, with their pids: {', '.join(pids)}"
        lines += ["", *textwrap.wrap(text, LINE_CHARS, subsequent_indent="  ")]
    lines += [f"  {child['name']}: {_fate(child)}" for child in children if _is_in_trouble(child)]
    if seen.running_jobs:
        lines += ["", "jobs:"]
        lines += [
            f"  {job.id} {job.kind} {job.target}: {job.done} of {job.total} {job.unit}"
            for job in seen.running_jobs
        ]
    lines += ["", *_findings(seen)]
    return lines


def _is_in_trouble(child: Mapping[str, Any]) -> bool:
    """Whether a process does not run, or is being started again after an end that has a reason."""
    if child["state"] == "starting":
        return bool(child["reason"])
    return bool(child["state"] != "running")


def _fate(child: Mapping[str, Any]) -> str:
    state = "to be started again" if child["state"] == "waiting" else child["state"]
    return f"{state}: {child['reason']}"


def _space_line(capacity: CapacityView) -> str:
    limit = format_size(int(capacity.usable_bytes * capacity.overcommit_ratio))
    return (
        f"  space: {format_size(capacity.raw_bytes)} raw,"
        f" {format_size(capacity.usable_bytes)} usable,"
        f" {format_size(capacity.after_one_loss_bytes)} without the largest store;"
        f" {format_size(capacity.used_bytes)} used,"
        f" {format_size(capacity.promised_bytes)} promised of {limit}"
    )


def _counts(by_state: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in by_state.items()) or "none"


def _store_table(stores: Sequence[StoreView]) -> list[str]:
    lines = [f"  {'STORE':<8} {'STATE':<10} {'ADDRESS':<22} {'REPLICAS':>14}  DISKS"]
    for store in stores[:STORES_SHOWN]:
        disks = ", ".join(
            f"{disk.state}, {_free(disk.bytes_free)}{format_size(disk.size_bytes)}"
            for disk in store.disks
        )
        out = f" ({store.replicas_out} out)" if store.replicas_out else ""
        replicas = f"{store.replicas}{out}"
        lines.append(
            f"  {store.name:<8} {store.state:<10} {store.address:<22} {replicas:>14}  {disks}"
        )
    if len(stores) > STORES_SHOWN:
        lines.append(f"  and {len(stores) - STORES_SHOWN} more: pf store list")
    return lines


def _free(number: int | None) -> str:
    return "" if number is None else f"{format_size(number)} free of "


def _findings(seen: ClusterView) -> list[str]:
    found = seen.health
    if not found and seen.state != "healthy":
        return ["Nothing is known of the data."]
    if not found:
        return ["No known data errors"]
    lines = ["findings:"]
    for finding in found[:FINDINGS_SHOWN]:
        lines.append(f"  {finding.code} {finding.subject}: {finding.cause}")
        lines.append(f"    what to do: {finding.next_step}")
    if len(found) > FINDINGS_SHOWN:
        lines.append(f"  and {len(found) - FINDINGS_SHOWN} more: pf status -o json")
    return lines
