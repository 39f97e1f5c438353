"""Health: stable codes with meaning, cause and next step. Pure.

`CODES` is the whole list; a finding names one of them, so documentation and mutes can rely on the
identifiers. A cluster is OFFLINE when some volume cannot be served or no store is there, and
DEGRADED with any other finding: what failed while everything is served is not an outage.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Final

from pureflash.conductor.damage import (
    blocks,
    copy_text,
    damaged_shards,
    differing_text,
    lost_ranges,
    way_out,
)
from pureflash.conductor.disk_states import disk_code, disk_step
from pureflash.conductor.failover import START_MS
from pureflash.conductor.pace import Stage
from pureflash.conductor.placement import RAISE_RATIO
from pureflash.conductor.requests import capacity
from pureflash.conductor.slow import trial
from pureflash.conductor.standing import RECOVER, awaited, is_proven, store_name
from pureflash.conductor.states import (
    OutKind,
    export_view,
    out_reason,
    replicas_out,
    volume_state,
    why_out,
)
from pureflash.conductor.view import View
from pureflash.model.domain import HealthState, StoreState, VolumeIntent
from pureflash.model.rest import CapacityView, HealthView
from pureflash.units import format_size, format_sizes

NEAR_FULL_PERCENT: Final = 85
FULL_PERCENT: Final = 95


class Severity(StrEnum):
    """How bad a finding is."""

    WARN = "warn"
    ERROR = "error"


CODES: Final[dict[str, tuple[Severity, str]]] = {
    "AMNESIA": (Severity.ERROR, "The conductor's records are not the newest that stores know of"),
    "STORES_AWAITED": (Severity.WARN, "Too few stores are there to know that the records are new"),
    "STORE_OFFLINE": (Severity.ERROR, "A store node is not there; its copies are out of reach"),
    "STORE_SUSPECTED": (Severity.WARN, "A store node has been silent for too long"),
    "DISK_FAILED": (
        Severity.ERROR,
        "A disk is not served: missing, not readable, or stopped",
    ),
    "WRONG_CLUSTER": (Severity.ERROR, "A disk belongs to another cluster, and was not touched"),
    "DISK_HANGS": (Severity.WARN, "A disk has not answered an operation for more than a second"),
    "DISK_SLOW": (Severity.WARN, "A disk answers far later than the others"),
    "DISK_NEAR_FULL": (Severity.WARN, f"A disk is more than {NEAR_FULL_PERCENT} % full"),
    "DISK_FULL": (Severity.ERROR, "A disk takes overwrites only; new data has no place"),
    "DATA_LOST": (Severity.ERROR, "Blocks of a volume have no good copy: reading them fails"),
    "DATA_DIFFERS": (Severity.ERROR, "Copies in sync differ, and nothing shows which is right"),
    "DATA_DAMAGED": (Severity.WARN, "A copy has blocks that cannot be read; others have them"),
    "VOLUME_OFFLINE": (Severity.ERROR, "A volume cannot serve I/O until something comes back"),
    "VOLUME_PARKED": (Severity.WARN, "A volume keeps some I/O waiting; none fails"),
    "VOLUME_SINGLE_COPY": (Severity.WARN, "A volume has one copy in sync: its loss loses data"),
    "VOLUME_DEGRADED": (Severity.WARN, "A volume has fewer copies in sync than it should"),
    "REPLICAS_OUT": (Severity.WARN, "A store node holds replicas that are not in sync"),
    "EXPORT_NOT_READY": (Severity.WARN, "An export is wanted but clients cannot connect to it"),
    "GATEWAY_OFFLINE": (Severity.WARN, "A gateway is not connected; clients cannot reach exports"),
    "REPLICA_UNKNOWN": (Severity.WARN, "A store holds a replica that no volume has"),
    "OVERPROMISED": (Severity.WARN, "Volumes were promised more space than there is"),
}


def findings(view: View) -> list[HealthView]:
    """List everything that is not as it should be, errors first."""
    found = [
        *_memory(view),
        *_never_seen(view),
        *_stores(view),
        *_disks(view),
        *_slow(view),
        *data_findings(view),
        *_volumes(view),
        *_exports(view),
        *_replicas_out(view),
        *_space(view),
    ]
    return sorted(found, key=lambda finding: finding.severity != Severity.ERROR)


def cluster_state(view: View, found: list[HealthView]) -> tuple[HealthState, str]:
    """Sum the findings up in a state and one sentence."""
    if view.amnesia is not None:
        sentence = f"{found[0].meaning}; nothing changes before they are rebuilt."
        return HealthState.AMNESIA, sentence
    if not view.stores:
        return HealthState.OFFLINE, "No store has joined yet."
    if not found:
        return HealthState.HEALTHY, "Everything is as it should be."
    first = found[0]
    more = f" ({len(found) - 1} more below)" if len(found) > 1 else ""
    is_served = any(view.is_online(store) for store in view.stores) and not any(
        finding.code == "VOLUME_OFFLINE" for finding in found
    )
    state = HealthState.DEGRADED if is_served else HealthState.OFFLINE
    return state, f"{first.meaning}: {first.subject}{more}."


def capacity_view(view: View) -> CapacityView:
    """Show the capacity as `GET /v1/cluster` does."""
    now = capacity(view)
    return CapacityView(
        raw_bytes=now.raw_bytes,
        usable_bytes=now.usable_bytes,
        used_bytes=now.used_bytes,
        promised_bytes=now.promised_bytes,
        after_one_loss_bytes=now.usable_bytes - now.largest_store_bytes,
        overcommit_ratio=view.overcommit_ratio,
    )


def finding(code: str, subject: str, cause: str, next_step: str) -> HealthView:
    """Make a finding of one of `CODES`."""
    severity, meaning = CODES[code]
    return HealthView(
        code=code,
        severity=severity,
        subject=subject,
        meaning=meaning,
        cause=cause,
        next_step=next_step,
    )


def _memory(view: View) -> Iterator[HealthView]:
    """Say whether the records can be believed."""
    if view.amnesia is not None:
        step = f"start all stores, then {RECOVER}, which shows first what it changes"
        yield finding("AMNESIA", "conductor", view.amnesia.reason, step)
        return
    if view.now_ms < view.started_ms + START_MS:
        return
    if stuck := sum(not is_proven(view, conf) for conf in view.shards.values()):
        names = ", ".join(store.name for store in awaited(view))
        cause = f"{names} not heard since the conductor started; {stuck} shards stay as they are"
        step = f"start {names}; if one is lost for good: {RECOVER} --without NAME"
        yield finding("STORES_AWAITED", "conductor", cause, step)


def _never_seen(view: View) -> Iterator[HealthView]:
    """Say which stores that the supervisor starts have never registered, so no record has them."""
    if view.amnesia is not None or view.now_ms < view.started_ms + START_MS:
        return
    for number, name in sorted(view.expected_stores.items()):
        if number not in view.stores:
            yield finding("STORE_OFFLINE", name, "it has never registered", _restart(name))


def _stores(view: View) -> Iterator[HealthView]:
    for store in view.stores.values():
        seen = view.observation(store.id)
        if seen.state is StoreState.OFFLINE:
            yield finding("STORE_OFFLINE", store.name, seen.cause, _restart(store.name))
        elif seen.state is StoreState.SUSPECTED:
            step = f"look at its machine; its log: pf logs {store.name}"
            yield finding("STORE_SUSPECTED", store.name, seen.cause, step)
        for volume_id, index in seen.replicas:
            if (volume_id, index) not in view.shards and view.amnesia is None:
                cause = f"shard {index} of volume {volume_id} has no record"
                step = (
                    f"if records may be lost: {RECOVER} --dry-run shows what stores hold; else"
                    " report it: a deletion removes records last, so this should not happen"
                )
                yield finding("REPLICA_UNKNOWN", store.name, cause, step)


def _slow(view: View) -> Iterator[HealthView]:
    for store in view.stores.values():
        for disk in store.disks:
            pace = view.paces.get(disk.disk_uuid)
            if pace is None or not pace.is_slow:
                continue
            done = "other disks lead what it led"
            if pace.stage is Stage.DEMOTED:
                done = "it is left out of every shard with enough other copies"
            step = (
                f"nothing at once, {done}; {trial(view, disk.disk_uuid)};"
                " look at the device and its host, and replace it if it stays slow"
            )
            yield finding("DISK_SLOW", f"{store.name} disk {disk.index}", pace.cause, step)


def _disks(view: View) -> Iterator[HealthView]:
    for store in view.stores.values():
        for report in view.observation(store.id).disks.values():
            name = f"{store.name} disk {report.index}"
            if code := disk_code(report):
                yield finding(code, name, report.reason, disk_step(report))
                continue
            used = report.bytes_total - report.bytes_free
            percent = 100 * used // report.bytes_total if report.bytes_total else 0
            cause = f"{percent} % of {format_size(report.bytes_total)} used"
            step = "delete or discard data, or add a disk"
            if percent >= FULL_PERCENT:
                yield finding("DISK_FULL", name, cause, step)
            elif percent >= NEAR_FULL_PERCENT:
                yield finding("DISK_NEAR_FULL", name, cause, step)


def data_findings(view: View) -> Iterator[HealthView]:
    """Say of each shard and copy what is known to be wrong with the data."""
    for (volume_id, index), found in damaged_shards(view):
        volume = view.volumes.get(volume_id)
        if volume is None or volume.intent is VolumeIntent.DELETING:
            continue
        shard = f"{volume.name}/{index}"
        step = way_out(volume, found)
        if found.lost_blocks:
            first = lost_ranges(volume, index, found)[0]
            cause = f"{blocks(found.lost_blocks)}; the first: {first}"
            yield finding("DATA_LOST", shard, cause, step)
        if found.differing is not None:
            yield finding("DATA_DIFFERS", shard, differing_text(view, found.differing), step)
        for copy in found.copies:
            subject = f"{shard}/{store_name(view, copy.store)}"
            yield finding("DATA_DAMAGED", subject, copy_text(view, copy), step)


def _volumes(view: View) -> Iterator[HealthView]:
    for volume in view.volumes.values():
        if volume.intent is VolumeIntent.DELETING:
            continue
        state, reason = volume_state(view, volume)
        step = f"pf volume explain {volume.name}"
        if state is HealthState.AMNESIA:
            continue  # one cause for all of them, said above
        if state is HealthState.OFFLINE:
            yield finding("VOLUME_OFFLINE", volume.name, reason, step)
        elif state is HealthState.PARKED:
            yield finding("VOLUME_PARKED", volume.name, reason, step)
        elif state is HealthState.SINGLE_COPY:
            yield finding("VOLUME_SINGLE_COPY", volume.name, reason, step)
        elif state is HealthState.DEGRADED:
            yield finding("VOLUME_DEGRADED", volume.name, reason, step)


def _replicas_out(view: View) -> Iterator[HealthView]:
    """Say of stores that are there why some of their replicas are not in sync."""
    for store_id, out in sorted(replicas_out(view).items()):
        if view.is_online(store_id):
            step = "nothing, they are made equal by themselves; see `pf volume explain NAME`"
            if any(out_reason(view, conf, member)[0] is OutKind.FAILED for conf, member in out):
                step = "bring the failed disk back or replace it; see `pf disk list`"
            yield finding("REPLICAS_OUT", view.stores[store_id].name, why_out(view, out), step)


def _exports(view: View) -> Iterator[HealthView]:
    offline: set[str] = set()
    if view.now_ms >= view.started_ms + START_MS:
        seen = {name for name, gateway in view.gateways.items() if gateway.is_connected}
        offline.update(set(view.expected_gateways) - seen)
    for export in view.exports.values():
        shown = export_view(view, export)
        if shown.state == "offline":
            offline.add(export.gateway)
        elif shown.state != "ready":
            step = f"see the gateway's log: pf logs {export.gateway}"
            yield finding("EXPORT_NOT_READY", shown.volume, shown.reason, step)
    for name in sorted(offline):
        why = "its connection is closed" if name in view.gateways else "it has not registered"
        yield finding("GATEWAY_OFFLINE", name, why, _restart(name))


def _restart(name: str) -> str:
    """Say how a process comes back."""
    return (
        f"see why: `pf status` on its machine, and `pf logs {name}`; `pf up` starts what ended"
        " again; end it if it hangs"
    )


def _space(view: View) -> Iterator[HealthView]:
    now = capacity(view)
    limit = int(now.usable_bytes * view.overcommit_ratio)
    if now.promised_bytes > limit:
        promised, most = format_sizes(now.promised_bytes, limit)
        cause = f"{promised} promised, {most} is the limit"
        step = f"add a disk, delete volumes, or {RAISE_RATIO}"
        yield finding("OVERPROMISED", "cluster", cause, step)
