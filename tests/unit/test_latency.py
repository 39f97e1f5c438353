"""What a store tells of its disks' latency, from histograms that only grow."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pureflash.model.messages import DiskLatency, Heartbeat, decode_up, encode
from pureflash.store.agent import disk_reports
from pureflash.store.latency import WINDOW, Look, Meter, Meters

MS = 1_000_000


class Histogram:
    """Counts as the core does, with one bucket for each value."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.total_nanos = 0

    def record(self, *values: int) -> Histogram:
        for value in values:
            self.counts[value] = self.counts.get(value, 0) + 1
            self.total_nanos += value
        return self

    def look(self) -> Look:
        return Look(dict(self.counts), self.total_nanos)


def test_the_first_look_only_begins() -> None:
    meter, histogram = Meter(), Histogram().record(*[900 * MS] * 50)
    assert meter.look(histogram.look()) == (0, 0, 0)
    assert meter.look(histogram.record(2 * MS, 4 * MS).look()) == (3_000, 4_000, 2)


def test_quantiles_and_counts_are_of_the_window() -> None:
    meter, histogram = Meter(), Histogram()
    meter.look(histogram.look())
    meter.look(histogram.record(*[500 * MS] * 3).look())
    for _ in range(WINDOW - 1):
        mean_us, tail_us, count = meter.look(histogram.record(*[1 * MS] * 10).look())
    assert (tail_us, count) == (500_000, 3 + 10 * (WINDOW - 1))
    mean_us, tail_us, count = meter.look(histogram.record(*[1 * MS] * 10).look())
    assert (tail_us, count) == (1_000, 10 * WINDOW), "the late ones have left it"
    assert 1_000 < mean_us < 70_000, "the mean has nearly forgotten them"


def test_the_mean_follows_a_step_within_the_window() -> None:
    meter, histogram = Meter(), Histogram()
    meter.look(histogram.look())
    for _ in range(WINDOW):
        assert meter.look(histogram.record(*[2 * MS] * 5).look())[0] == 2_000
    means = [meter.look(histogram.record(*[102 * MS] * 5).look())[0] for _ in range(WINDOW)]
    assert means == sorted(means)
    assert means[0] == 22_000
    assert means[-1] > 90_000


def test_an_idle_disk_has_no_figures_and_begins_anew() -> None:
    meter, histogram = Meter(), Histogram()
    meter.look(histogram.look())
    meter.look(histogram.record(*[800 * MS] * 5).look())
    for _ in range(WINDOW - 1):
        assert meter.look(histogram.look())[2] == 5, "still in the window"
    assert meter.look(histogram.look()) == (0, 0, 0)
    assert meter.look(histogram.record(1 * MS).look()) == (1_000, 1_000, 1)


def test_quantiles_agree_with_a_sorted_list() -> None:
    draw = random.Random(7)
    for size in (1, 2, 99, 100, 101, 1_000):
        values = [draw.randrange(1, 1 << 30) for _ in range(size)]
        exact = sorted(values)[-(-size * 99 // 100) - 1]
        assert Histogram().record(*values).look().quantile_nanos(99) == exact
    assert Histogram().look().quantile_nanos(99) == 0


def stats(*, writes: Histogram, reads: Histogram) -> dict[str, Any]:
    latency = {
        "writes": sorted(writes.counts.items()),
        "writes_nanos": writes.total_nanos,
        "reads": sorted(reads.counts.items()),
        "reads_nanos": reads.total_nanos,
    }
    disk = {"state": "online", "reason": "", "engine": "mem", "bytes_total": 1, "bytes_free": 1}
    return {"disks": [disk | {"latency": latency}, disk]}


def test_each_disk_and_kind_is_measured_apart() -> None:
    meters, writes, reads = Meters(), Histogram(), Histogram()
    meters.look(stats(writes=writes, reads=reads)["disks"])
    writes.record(3 * MS, 5 * MS)
    seen = stats(writes=writes, reads=reads.record(1 * MS))
    latencies = meters.look(seen["disks"])
    expected = DiskLatency(
        write_ewma_us=4_000,
        write_p99_us=5_000,
        writes=2,
        read_ewma_us=1_000,
        read_p99_us=1_000,
        reads=1,
    )
    assert latencies == {0: expected}, "a core that does not measure has nothing to tell"
    reports = disk_reports(seen, {}, {}, latencies)
    assert [report.latency for report in reports] == [expected, None]
    beat = Heartbeat(id=0, term=1, disk_reports=reports)
    assert decode_up(encode(beat)) == beat


def test_a_heartbeat_of_a_store_that_knows_no_latency_is_read() -> None:
    report = (
        '{"index":0,"state":"online","reason":"","engine":"uring","bytes_total":2,"bytes_free":1}'
    )
    frame = f'{{"type":"heartbeat","v":1,"id":0,"term":1,"disk_reports":[{report}]}}'
    beat = decode_up(frame)
    assert isinstance(beat, Heartbeat)
    assert beat.disk_reports[0].latency is None


@pytest.mark.parametrize("percent", [1, 50, 99, 100])
def test_a_single_operation_is_every_quantile(percent: int) -> None:
    assert Histogram().record(7).look().quantile_nanos(percent) == 7
