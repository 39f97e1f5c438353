"""`/metrics` in Prometheus' text format: read from the view when it is asked for, nothing kept."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from litestar import Response, get
from litestar.di import NamedDependency
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from pureflash.conductor import health, states
from pureflash.conductor.damage import damaged_shards
from pureflash.conductor.disk_states import disk_views
from pureflash.conductor.service import Conductor
from pureflash.conductor.standing import store_name
from pureflash.conductor.view import View
from pureflash.model.domain import HealthState, StoreState


class ViewCollector(Collector):
    """Turns one view into metric families."""

    def __init__(self, conductor: Conductor) -> None:
        """Read from `conductor` at each collection."""
        self._conductor = conductor

    def collect(self) -> Iterator[Metric]:
        """Give all families."""
        view = self._conductor.view()
        term = GaugeMetricFamily("pureflash_term", "Term of the leading conductor")
        term.add_metric([], self._conductor.term)
        yield term
        up = GaugeMetricFamily("pureflash_store_up", "1 while a store is online", labels=["store"])
        total = CounterMetricFamily(
            "pureflash_store_events", "Counters of a store process", labels=["store", "counter"]
        )
        free = GaugeMetricFamily(
            "pureflash_disk_free_bytes", "Bytes free on a disk", labels=["store", "disk"]
        )
        latency = GaugeMetricFamily(
            "pureflash_disk_latency_seconds",
            "What operations of a disk took in the last few seconds",
            labels=["store", "disk", "operation", "statistic"],
        )
        slow = GaugeMetricFamily(
            "pureflash_disk_slow", "1 while a disk is judged slow", labels=["store", "disk"]
        )
        for store in view.stores.values():
            seen = view.observation(store.id)
            up.add_metric([store.name], float(seen.state is StoreState.ONLINE))
            for name, value in seen.counters.items():
                total.add_metric([store.name, name], value)
            for report in seen.disks.values():
                free.add_metric([store.name, str(report.index)], report.bytes_free)
            for disk in disk_views(view, store):
                at = [store.name, str(disk.index)]
                pace = view.paces.get(disk.id)
                slow.add_metric(at, float(pace is not None and pace.is_slow))
                for operation, statistic in product(("write", "read"), ("ewma", "p99")):
                    seen_us = getattr(disk, f"{operation}_{statistic}_us")
                    if seen_us is not None:
                        latency.add_metric([*at, operation, statistic], seen_us / 1e6)
        yield from (up, total, free, latency, slow, *_data_families(view))
        volumes = GaugeMetricFamily("pureflash_volumes", "Volumes by state", labels=["state"])
        now = [states.volume_state(view, volume)[0] for volume in view.volumes.values()]
        for state in HealthState:
            volumes.add_metric([state], now.count(state))
        yield volumes
        space = GaugeMetricFamily("pureflash_capacity_bytes", "Capacity", labels=["kind"])
        shown = health.capacity_view(view)
        for kind in ("raw", "usable", "used", "promised"):
            space.add_metric([kind], getattr(shown, f"{kind}_bytes"))
        yield space
        found = GaugeMetricFamily("pureflash_health", "Findings by code", labels=["code"])
        codes = [finding.code for finding in health.findings(view)]
        for code in health.CODES:
            found.add_metric([code], codes.count(code))
        yield found


def _data_families(view: View) -> Iterator[Metric]:
    """Give what is known to be wrong with data; volumes with nothing wrong have no line."""
    damaged = GaugeMetricFamily(
        "pureflash_damaged_blocks",
        "Blocks of 4 KiB that a copy cannot read",
        labels=["volume", "shard", "store"],
    )
    lost = GaugeMetricFamily(
        "pureflash_lost_blocks",
        "Blocks of 4 KiB without any good copy",
        labels=["volume", "shard"],
    )
    differing = GaugeMetricFamily(
        "pureflash_differing_regions",
        "Regions of 1 MiB in which copies were found to differ",
        labels=["volume", "shard"],
    )
    for (volume_id, index), found in damaged_shards(view):
        volume = view.volumes.get(volume_id)
        if volume is None:
            continue
        at = [volume.name, str(index)]
        for copy in found.copies:
            damaged.add_metric([*at, store_name(view, copy.store)], copy.blocks)
        if found.lost_blocks:
            lost.add_metric(at, found.lost_blocks)
        if found.differing is not None:
            differing.add_metric(at, found.differing.count)
    yield from (damaged, lost, differing)


@get("/metrics", include_in_schema=False)
async def show_metrics(metrics: NamedDependency[CollectorRegistry]) -> Response[bytes]:
    """Show the metrics."""
    # The framework adds the charset, and a header with two of them is not one.
    media_type = CONTENT_TYPE_LATEST.removesuffix("; charset=utf-8")
    return Response(generate_latest(metrics), media_type=media_type)
