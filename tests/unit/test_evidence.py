"""The ledger and what fills it: no figure that no run printed, no seed counted twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools import deep

from pureflash.testing import ledger
from pureflash.testing.ledger import Figures, Kind, LedgerBroken, Row, Sum

ROOT = Path(__file__).resolve().parents[2]
CORE = "0123456789abcdef"
OTHER_CORE = "f" * 16
DAY = date(2026, 11, 22)
EMPTY = (
    "# Ledger\n\nText | with a bar.\n\n"
    "| Date | Core | Kind | From seed | Seeds | States | Simulated hours | Result |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def row(
    first_seed: int,
    seeds: int,
    *,
    kind: Kind = Kind.SIMULATOR,
    core: str = CORE,
    result: str = ledger.OK,
) -> Row:
    is_simulated = kind is Kind.SIMULATOR
    figures = Figures(
        first_seed=first_seed,
        seeds=seeds,
        states=None if is_simulated else 10 * seeds,
        simulated_hours=seeds / 8 if is_simulated else None,
    )
    return Row(
        day=DAY,
        core=core,
        kind=kind,
        first_seed=first_seed,
        figures=figures if result == ledger.OK else None,
        result=result,
    )


# ------------------------------------------------------------------------------------- corehash --


def corehash(root: Path) -> str:
    command = [sys.executable, str(ROOT / "tools/corehash"), str(root)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def core(tmp_path: Path) -> Path:
    for path, text in {
        "Cargo.lock": "lock",
        "crates/lane/src/lib.rs": "lane",
        "crates/lane/testdata/a.bin": "bytes",
        "python/pureflash/model/ids.py": "ids",
        "python/pureflash/conductor/states.py": "states",
        "python/pureflash/api/app.py": "not of the core",
        "docs/a.md": "not of the core",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def write(path: str, text: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)

    return change


def move(source: str, target: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / source).rename(root / target)

    return change


@pytest.mark.parametrize(
    "change",
    [
        write("Cargo.lock", "lock 2"),
        write("crates/lane/src/lib.rs", "lane "),
        write("crates/lane/src/new.rs", ""),
        write("python/pureflash/model/ids.py", "idx"),
        write("python/pureflash/conductor/planner.py", "new"),
        move("crates/lane/src/lib.rs", "crates/lane/src/bil.rs"),
        # The same bytes in the same order, cut elsewhere.
        write("crates/lane/testdata/a.bi", "nbytes"),
    ],
)
def test_a_change_of_the_core_changes_its_hash(core: Path, change: Callable[[Path], None]) -> None:
    before = corehash(core)
    change(core)
    assert corehash(core) != before


@pytest.mark.parametrize(
    "path",
    [
        "docs/a.md",
        "python/pureflash/api/app.py",
        "python/pureflash/model/__pycache__/ids.cpython-311.pyc",
        "python/pureflash/_core.abi3.so",
        "crates/lane/target/release/lane.d",
        "crates/lane/src/.lib.rs.swp",
        ".git/index",
    ],
)
def test_what_is_not_the_core_changes_nothing(core: Path, path: str) -> None:
    before = corehash(core)
    write(path, "other")(core)
    assert corehash(core) == before


def test_the_hash_does_not_depend_on_where_the_checkout_is(core: Path, tmp_path: Path) -> None:
    shutil.copytree(core / "crates", tmp_path / "elsewhere/crates")
    shutil.copytree(core / "python", tmp_path / "elsewhere/python")
    shutil.copy(core / "Cargo.lock", tmp_path / "elsewhere/Cargo.lock")
    assert corehash(tmp_path / "elsewhere") == corehash(core)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        corehash(tmp_path)
    assert failed.value.returncode == 2


def test_the_core_of_this_checkout_is_named_by_the_beginning_of_its_hash() -> None:
    assert os.access(ROOT / "tools/corehash", os.X_OK)
    printed = subprocess.run([ROOT / "tools/corehash"], check=True, capture_output=True, text=True)
    assert printed.stdout.startswith(ledger.present_core(ROOT))
    assert len(ledger.present_core(ROOT)) == ledger.CORE_DIGITS


# --------------------------------------------------------------------------------------- ledger --


def test_the_ledger_of_this_repository_can_be_read() -> None:
    text = (ROOT / ledger.LEDGER).read_text()
    assert all(row.figures is not None or not row.is_ok for row in ledger.parse(text))


def test_a_row_is_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.md"
    path.write_text(EMPTY)
    rows = [row(0, 1000), row(0, 4000, kind=Kind.CRASH), row(1000, 1, result="FAILED: seed 1000")]
    for each in rows:
        ledger.append(path, each)
    assert path.read_text().startswith(EMPTY)
    assert path.read_text().splitlines()[-3:] == [
        f"| 2026-11-22 | {CORE} | simulator | 0 | 1000 | - | 125.000 | ok |",
        f"| 2026-11-22 | {CORE} | crash explorer | 0 | 4000 | 40000 | - | ok |",
        f"| 2026-11-22 | {CORE} | simulator | 1000 | - | - | - | FAILED: seed 1000 |",
    ]
    assert ledger.parse(path.read_text()) == rows


@pytest.mark.parametrize(
    "line",
    [
        "",
        "| 2026-11-22 |",
        f"| 22.11.2026 | {CORE} | simulator | 0 | 1 | - | 1.0 | ok |",
        "| 2026-11-22 | beef | simulator | 0 | 1 | - | 1.0 | ok |",
        f"| 2026-11-22 | {CORE} | dream | 0 | 1 | - | 1.0 | ok |",
        f"| 2026-11-22 | {CORE} | simulator | 0 | many | - | 1.0 | ok |",
        f"| 2026-11-22 | {CORE} | simulator | 0 | 1 | - | 1.0 | |",
    ],
)
def test_a_row_that_cannot_be_read_is_named_and_nothing_is_appended(
    tmp_path: Path, line: str
) -> None:
    path = tmp_path / "ledger.md"
    path.write_text(f"{EMPTY}{row(0, 1).text()}\n{line}\n")
    before = path.read_text()
    with pytest.raises(LedgerBroken, match="line 8"):
        ledger.append(path, row(1, 1))
    assert path.read_text() == before


def test_a_page_without_the_table_is_no_ledger() -> None:
    with pytest.raises(LedgerBroken, match="no line"):
        ledger.parse("# Ledger\n")


def test_good_rows_of_one_core_and_kind_add_up() -> None:
    rows = [
        row(0, 100),
        row(100, 60),
        row(0, 1000, core=OTHER_CORE),
        row(0, 4000, kind=Kind.CRASH),
        row(160, 1, result="FAILED: seed 160"),
    ]
    expected = Sum(seeds=160, simulated_hours=20.0, failures=1, next_seed=160)
    assert ledger.add_up(rows, CORE, Kind.SIMULATOR) == expected
    expected = Sum(seeds=4000, states=40_000, next_seed=4000)
    assert ledger.add_up(rows, CORE, Kind.CRASH) == expected
    assert ledger.add_up(rows, "a" * 16, Kind.CRASH) == Sum()


def test_a_seed_counts_once() -> None:
    rows = [row(0, 100), row(0, 100), row(50, 100), row(200, 10), row(100, 50)]
    total = ledger.add_up(rows, CORE, Kind.SIMULATOR)
    assert (total.seeds, total.next_seed) == (160, 210)


def test_the_report_begins_with_this_checkout() -> None:
    lines = ledger.report([row(0, 8, core=OTHER_CORE), row(0, 16)], CORE).splitlines()
    assert lines[0] == f"core {CORE} (this checkout)"
    assert " ".join(lines[1].split()) == (
        "simulator 16 seeds, 0 states, 2.000 simulated hours, 0 failed chunks"
    )
    assert lines[3] == f"core {OTHER_CORE}"


@given(
    first_seed=st.integers(0, 2**63),
    seeds=st.integers(0, 10**9),
    states=st.none() | st.integers(0, 10**12),
    millis=st.none() | st.integers(0, 10**9),
)
def test_figures_are_read_as_they_are_written(
    first_seed: int, seeds: int, states: int | None, millis: int | None
) -> None:
    hours = None if millis is None else millis / 1000
    figures = Figures(first_seed=first_seed, seeds=seeds, states=states, simulated_hours=hours)
    output = f"much\n  {figures.line()}  \ntalk\n"
    assert ledger.figures_of(output) == figures


@pytest.mark.parametrize(
    "output",
    [
        "",
        "all is well",
        "figures: first_seed=1",
        "figures: seeds=1.5 first_seed=0",
        "see figures: first_seed=0 seeds=1",
        "figures: first_seed=0 seeds=1 states=x",
    ],
)
def test_what_is_not_a_line_of_figures_brings_none(output: str) -> None:
    assert ledger.figures_of(output) is None


def test_the_last_figures_count() -> None:
    output = "figures: first_seed=0 seeds=1\nfigures: first_seed=0 seeds=2\n"
    assert ledger.figures_of(output) == Figures(first_seed=0, seeds=2)


def test_a_failure_is_told_by_the_line_that_names_the_seed() -> None:
    output = "running\nseed 17 Config { a | b }: lost\n  note: run with x\n"
    assert ledger.failure_of(output) == "FAILED: seed 17 Config { a / b }: lost"
    assert len(ledger.failure_of("seed 1 " + "x" * 500) or "") == ledger.RESULT_LENGTH_MAX


@pytest.mark.parametrize("output", ["", "error: could not compile", "seeds 0 to 9", "seed x"])
def test_what_names_no_seed_tells_of_no_failed_run(output: str) -> None:
    assert ledger.failure_of(output) is None


def test_only_a_hash_is_taken_for_a_core() -> None:
    assert ledger.short_core("ab" * 32 + "\n") == "ab" * 8
    with pytest.raises(LedgerBroken):
        ledger.short_core("corehash: no crates here")


# ----------------------------------------------------------------------------------------- deep --


class Runs:
    """A runner whose runs take a second per 100 seeds, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked: list[tuple[Kind, int, int]] = []
        self.broken_at: int | None = None
        self.is_silent = False
        self.cores = [CORE]

    def __call__(self, kind: Kind, first_seed: int, seeds: int) -> deep.Outcome:
        self.asked.append((kind, first_seed, seeds))
        self.now += seeds / 100
        if self.broken_at is not None and first_seed <= self.broken_at < first_seed + seeds:
            return deep.Outcome(f"seed {self.broken_at}: lost a write\n", 1, seeds / 100)
        states = 5 * seeds if kind is Kind.CRASH else None
        hours = seeds / 4 if kind is Kind.SIMULATOR else None
        figures = Figures(first_seed=first_seed, seeds=seeds, states=states, simulated_hours=hours)
        return deep.Outcome("" if self.is_silent else figures.line(), 0, seeds / 100)

    def go(self, path: Path, seconds: float, kinds: tuple[Kind, ...] = tuple(Kind)) -> int:
        return deep.go_deep(
            path,
            kinds,
            seconds=seconds,
            core=lambda: self.cores.pop(0) if len(self.cores) > 1 else self.cores[0],
            run=self,
            clock=lambda: self.now,
            today=lambda: DAY,
        )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.md"
    path.write_text(EMPTY)
    return path


def test_chunks_alternate_and_end_with_the_time_asked_for(path: Path) -> None:
    runs = Runs()
    assert runs.go(path, 1000) == 0
    assert runs.asked == [
        (Kind.SIMULATOR, 0, 100),
        (Kind.CRASH, 0, 4000),
        (Kind.SIMULATOR, 100, 30_000),
        (Kind.CRASH, 4000, 30_000),
        (Kind.SIMULATOR, 30_100, 30_000),
        (Kind.CRASH, 34_000, 5900),
    ]
    assert runs.now == 1000
    total = ledger.add_up(ledger.parse(path.read_text()), CORE, Kind.SIMULATOR)
    assert (total.seeds, total.simulated_hours) == (60_100, 15_025)


def test_a_later_run_goes_on_where_the_ledger_ends(path: Path) -> None:
    assert Runs().go(path, 1, (Kind.SIMULATOR,)) == 0
    runs = Runs()
    assert runs.go(path, 1, (Kind.SIMULATOR,)) == 0
    assert runs.asked == [(Kind.SIMULATOR, 100, 100)]


def test_another_core_begins_at_the_first_seed(path: Path) -> None:
    assert Runs().go(path, 1, (Kind.SIMULATOR,)) == 0
    runs = Runs()
    runs.cores = [OTHER_CORE]
    assert runs.go(path, 1, (Kind.SIMULATOR,)) == 0
    assert runs.asked == [(Kind.SIMULATOR, 0, 100)]


def test_a_failed_chunk_is_entered_ends_the_run_and_is_tried_again(path: Path) -> None:
    runs = Runs()
    runs.broken_at = 150
    assert runs.go(path, 1000, (Kind.SIMULATOR,)) == 1
    (good, bad) = ledger.parse(path.read_text())
    assert (good.is_ok, bad.is_ok, bad.figures) == (True, False, None)
    assert (bad.first_seed, bad.result) == (100, "FAILED: seed 150: lost a write")
    assert ledger.add_up([good, bad], CORE, Kind.SIMULATOR).next_seed == 100


def test_a_run_that_prints_no_figures_is_not_entered(path: Path) -> None:
    runs = Runs()
    runs.is_silent = True
    assert runs.go(path, 1000, (Kind.CRASH,)) == 2
    assert path.read_text() == EMPTY


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (deep.Outcome(Figures(first_seed=0, seeds=9).line(), 0, 1.0), "it ran 9 seeds from 0"),
        (deep.Outcome(Figures(first_seed=1, seeds=10).line(), 0, 1.0), "10 seeds from 1"),
        (deep.Outcome("No module named swarm", 1, 1.0), "exit status 1, and no seed is named"),
        (deep.Outcome("all is well", 0, 1.0), "no figures"),
    ],
)
def test_what_did_not_run_as_asked_has_no_row(outcome: deep.Outcome, why: str) -> None:
    with pytest.raises(deep.NotRun, match=why):
        deep.row_of(outcome, day=DAY, cores=(CORE, CORE), kind=Kind.SIMULATOR, asked=range(10))


def test_a_failed_run_has_no_figures_even_if_it_printed_some() -> None:
    outcome = deep.Outcome(f"{Figures(first_seed=0, seeds=10).line()}\nseed 3: lost", 1, 1.0)
    bad = deep.row_of(outcome, day=DAY, cores=(CORE, CORE), kind=Kind.SIMULATOR, asked=range(10))
    assert (bad.figures, bad.result) == (None, "FAILED: seed 3: lost")


def test_nothing_is_entered_when_the_core_changes_meanwhile(path: Path) -> None:
    runs = Runs()
    runs.cores = [CORE, OTHER_CORE]
    assert runs.go(path, 1000) == 2
    assert ledger.parse(path.read_text()) == []


def test_a_command_that_hangs_is_killed_with_its_children() -> None:
    # The child would hold the pipe open for a minute.
    command = ["sh", "-c", "echo begun; sleep 60 & wait"]
    outcome = deep.run_command(command, {}, seconds_max=0.5, first_seed=70)
    assert outcome.output.startswith("begun\n")
    assert (outcome.status, outcome.seconds < 30) == (1, True)
    expected = "FAILED: seed 70 or a later one: no end within 0.5 s"
    assert ledger.failure_of(outcome.output) == expected


def test_a_command_gets_its_environment_and_all_it_prints_is_kept() -> None:
    command = ["sh", "-c", 'echo "$SEEDS"; echo error >&2; exit 3']
    outcome = deep.run_command(command, {"SEEDS": "7"}, seconds_max=60, first_seed=0)
    assert (outcome.output, outcome.status) == ("7\nerror\n", 3)


@pytest.mark.parametrize("kind", list(Kind))
def test_the_command_of_a_chunk_names_its_seeds(kind: Kind) -> None:
    command, environment = deep.command_of(kind, 70, 9)
    named = [*command, *(f"{name}={value}" for name, value in environment.items())]
    if kind is Kind.SIMULATOR:
        assert named[-4:] == ["--seeds", "9", "--from-seed", "70"]
    else:
        assert named[-2:] == ["PF_CRASH_SEED=70", "PF_CRASH_TRIALS=9"]
