"""The arithmetic of measurements, and what `pf bench` makes of counters and reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import common, rig
from bench.common import Goal, Run

from pureflash.cli import measure
from pureflash.cli.app import run
from pureflash.cli.budget import means, read_budget, write_budget
from pureflash.cli.outcome import Exit

ROOT = Path(__file__).resolve().parents[2]
TICKS = 100


def test_ratios_are_taken_pair_by_pair() -> None:
    # The machine is four times slower in the second pair: no ratio sees it.
    found = common.ratios([100, 25, 90], [200, 50, 200])
    assert found == common.Spread(median=0.5, least=0.45, most=0.5)
    assert found.text() == "0.50 [0.45 .. 0.50]"
    with pytest.raises(ValueError, match="not pairs"):
        common.ratios([1], [1, 2])
    with pytest.raises(ValueError, match="measured nothing"):
        common.ratios([1], [0])
    with pytest.raises(ValueError, match="at least one"):
        common.spread([])


def test_cpu_is_per_operation_and_per_process() -> None:
    first = Run(operations=1000, seconds=0.5, cpu_s={"client": 0.1, "s1": 0.3})
    second = Run(operations=2000, seconds=0.5, cpu_s={"client": 0.2, "s1": 0.4})
    assert first.iops == 2000
    assert first.cpu_per_million == pytest.approx(400)
    assert common.cpu_by_name([first, second]) == pytest.approx({"client": 100, "s1": 250})


def test_the_program_name_in_stat_may_hold_anything() -> None:
    text = "7 (a) R (b c) 9) S 1 7 7 0 -1 4194304 100 0 0 0 123 77 5 6 20 0 3 0 99 0 0"
    assert common.parse_stat_cpu(text, ticks_per_second=TICKS) == pytest.approx(2.0)


def test_sizes_and_busy_time_of_proc() -> None:
    status = "Name:\tpf\nVmPeak:\t  900 kB\nVmRSS:\t   512 kB\n"
    assert common.parse_status_kib(status, "VmRSS") == 512
    with pytest.raises(KeyError):
        common.parse_status_kib(status, "VmSwap")
    host = "cpu  100 20 30 4000 500 6 7 8 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    assert common.parse_host_busy(host, ticks_per_second=TICKS) == pytest.approx(1.63)


def test_a_report_of_fio_becomes_a_run() -> None:
    side = {"total_ios": 500, "runtime": 2000, "clat_ns": {"percentile": {"50.000000": 9000}}}
    idle = {"total_ios": 0, "runtime": 0, "clat_ns": {}}
    found = common.parse_fio({"jobs": [{"read": side, "write": idle}]}, cpu_s={"fio": 0.5})
    assert (found.iops, found.p50_us, found.p99_us, found.flushes) == (250, 9, 0, None)
    with pytest.raises(ValueError, match="no I/O"):
        common.parse_fio({"jobs": [{"read": idle, "write": idle}]}, cpu_s={})


def test_a_goal_knows_its_direction() -> None:
    most = Goal(row="7", title="CPU", must=21)
    least = Goal(row="1", title="IOPS", must=0.9, is_least=True)
    assert (most.verdict(21), most.verdict(21.1), most.text()) == ("met", "missed", "<= 21x")
    assert (least.verdict(0.9), least.verdict(0.89), least.text()) == ("met", "missed", ">= 0.9x")


def test_a_result_is_one_line_of_a_table() -> None:
    document = {
        "row": "8",
        "title": "a | b",
        "unit": "x",
        "figure": {"median": 2.0, "least": 1.5, "most": 2.5},
        "goal": "<= 2.2x",
        "verdict": "met",
        "detail": "p50",
        "machine": {"remark": ""},
    }
    line = common.markdown_row(document)
    assert line == "| 8 | a / b | 2.00x [1.50 .. 2.50] | <= 2.2x: met | p50 | quiet |"


def test_a_load_is_described_completely() -> None:
    assert rig.work(depth=1).keys() == measure.work("read", 1 << 20, 1.0, 1).keys()
    with pytest.raises(AssertionError, match="no"):
        rig.work(deepness=1)


def test_every_script_is_run_by_make_bench() -> None:
    from bench.all import SCRIPTS

    rows = {path.stem for path in (ROOT / "bench").glob("row*.py")}
    assert rows | {"footprint"} == set(SCRIPTS)


BEFORE = {"client_write_hops": 10, "client_write_nanos": 1_000_000, "writes": 5}
AFTER = {
    "client_write_hops": 110,
    "client_write_nanos": 9_000_000,
    "lane_write_hops": 300,
    "lane_write_nanos": 3_000_000,
    "peer_write_hops": 200,
    "peer_write_nanos": 10_000_000,
    "served_write_hops": 200,
    "served_write_nanos": 4_000_000,
    "client_read_hops": 0,
    "client_read_nanos": 0,
    "writes": 105,
}


def test_hops_become_means_of_what_happened_in_between() -> None:
    found = means(BEFORE, AFTER)
    assert found.us == {
        "client_write": 80.0,
        "lane_write": 10.0,
        "peer_write": 50.0,
        "served_write": 20.0,
    }
    assert found.counts["client_write"] == 100
    assert "client_read" not in found.us, "nothing was read"


def test_the_parts_of_a_replicated_write_add_up_to_the_whole() -> None:
    parts = write_budget(100.0, means(BEFORE, AFTER))
    assert sum(part.mean_us for part in parts if not part.is_inside) == pytest.approx(100.0)
    named = {part.name: part.mean_us for part in parts}
    assert named == {
        "client and network": 20.0,
        "primary": 30.0,
        "replicas": 50.0,
        "network": 30.0,
        "secondary": 10.0,
        "disk": 10.0,
    }


def test_the_parts_of_a_lonely_write_and_of_a_read_add_up() -> None:
    alone = {key: value for key, value in AFTER.items() if "peer" not in key}
    parts = write_budget(100.0, means(BEFORE, alone))
    assert [(part.name, part.mean_us) for part in parts] == [
        ("client and network", 20.0),
        ("primary", 70.0),
        ("disk", 10.0),
    ]
    reads = {"client_read_hops": 2, "client_read_nanos": 40_000}
    reads |= {"lane_read_hops": 2, "lane_read_nanos": 30_000}
    parts = read_budget(50.0, means({}, reads))
    assert [part.mean_us for part in parts] == [30.0, 5.0, 15.0]


def test_counters_are_waited_for_until_no_hop_is_added() -> None:
    now, looks = 0.0, 0

    def pause(seconds: float) -> None:
        nonlocal now
        now += seconds

    def look_three_times() -> dict[str, int]:
        nonlocal looks
        looks += 1
        return {"client_read_hops": min(looks, 3), "sessions": looks}

    found, is_quiet = measure.settled(look_three_times, clock=lambda: now, pause=pause)
    assert is_quiet
    assert found["client_read_hops"] == 3
    assert now >= measure.SETTLE_S

    def look_for_ever() -> dict[str, int]:
        nonlocal looks
        looks += 1
        return {"client_read_hops": looks}

    now = 0.0
    found, is_quiet = measure.settled(look_for_ever, clock=lambda: now, pause=pause)
    assert not is_quiet
    assert now <= measure.COUNTERS_S + 2 * measure.LOOK_S


@pytest.mark.slow
def test_a_load_on_one_lane_and_on_the_bare_engine(tmp_path: Path) -> None:
    from pureflash import _core

    found = measure.compare_local(_core, tmp_path, 8 << 20, 0.2, 4)
    assert [one.name for one in found] == [
        "lane in this process, 4k write",
        "lane in this process, 4k read",
        "engine alone, 4k read",
    ]
    assert all(one.iops > 0 and one.p50_us <= one.p99_us for one in found)
    assert list(tmp_path.iterdir()) == [], "everything is removed"


def test_a_bare_disk_is_only_read(tmp_path: Path) -> None:
    from pureflash import _core
    from pureflash.errors import CallerError

    raw = tmp_path / "raw.img"
    raw.write_bytes(bytes(1 << 20))
    with pytest.raises(CallerError, match="only read"):
        _core.load_disk(raw, measure.work("write", 1 << 20, 0.2, 1))  # type: ignore[arg-type]
    with pytest.raises(CallerError, match="depth 0"):
        _core.load_disk(raw, measure.work("read", 1 << 20, 0.2, 0))  # type: ignore[arg-type]
    with pytest.raises(CallerError, match="a span of"):
        _core.load_disk(raw, measure.work("read", 2 << 20, 0.2, 1))  # type: ignore[arg-type]


def test_the_speed_of_the_simulator(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "sim", "--seconds", "0.2", "-o", "json"]) == Exit.OK
    report = json.loads(capsys.readouterr().out)
    assert report["worlds"] >= 1
    assert report["simulated_s"] > 1
    assert report["simulated_per_cpu"] == pytest.approx(report["simulated_s"] / report["cpu_s"])


def test_a_size_that_is_no_whole_mebibytes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--size", "4KiB"]) == Exit.USAGE
    assert "whole MiB" in capsys.readouterr().err
