"""The swarm and the shrinker, with worlds of paper instead of simulated ones."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from pureflash.errors import CallerError, Code
from pureflash.testing import ledger, shrink, swarm
from pureflash.testing.swarm import Result, Total, run_seed

DEFAULTS = {"drop": 7, "torn": 1, "crash_every_ms": 900, "pause_every_ms": 0, "safety_ms": 20_000}
FORBIDDEN = 13
Break = Callable[[int, dict[str, int]], str | None]


class PanicException(BaseException):
    """Stands for PyO3's type of this name."""


class PaperWorld:
    """A world of three steps that breaks what `breaks` says of its seed and options."""

    def __init__(self, seed: int, options: str, trace: bool, breaks: Break) -> None:
        self.values: dict[str, int] = DEFAULTS | {"clients": 2} | json.loads(options)
        if self.values["drop"] == FORBIDDEN:
            raise CallerError(Code.INVALID, "no world can have this")
        self.seed, self.trace, self.steps = seed, trace, 0
        self.broken = breaks(seed, self.values)

    def step(self, events: int) -> bool:
        assert events > 0
        self.steps += 1
        if self.broken == "panic":
            raise PanicException("an assertion")
        return self.broken == "endless" or self.steps < 3

    def violation(self) -> str | None:
        return self.broken if self.broken != "refused" else None

    def options(self) -> str:
        return json.dumps(self.values)

    def counts(self) -> dict[str, int]:
        return {"fault.drop": 2, "transition.T1": 1, "op.read": 4, "sim.nanos": 5_000_000_000}

    def trace_hash(self) -> str:
        return f"{self.seed:032x}"

    def take_trace(self) -> str:
        if not self.trace:
            return ""
        inc = 1 if self.broken == "refused" else self.steps
        crash = json.dumps({"t": self.steps, "k": "crash", "store": 1, "inc": inc})
        boot = json.dumps({"t": self.steps, "k": "boot", "store": 1, "inc": inc})
        return f"{boot}\n{crash}\n"


def paper(breaks: Break) -> swarm.MakeWorld:
    return lambda seed, options, trace: PaperWorld(seed, options, trace, breaks)


def nothing(_seed: int, _options: dict[str, int]) -> str | None:
    return None


def test_a_good_seed_has_no_violation_and_its_counts() -> None:
    result = run_seed(4, make=paper(nothing))
    assert result.violation is None
    assert result.refined_lines == 0
    assert result.counts["op.read"] == 4
    assert result.trace_hash == f"{4:032x}"
    assert run_seed(4, refine=True, make=paper(nothing)).refined_lines == 6


@pytest.mark.parametrize(
    ("broken", "violation"),
    [
        ("I4: at 14 ns", "I4: at 14 ns"),
        ("panic", "panic: an assertion"),
        ("endless", "I23: no end after"),
        ("refused", "refinement: line 3: lives are new"),
    ],
)
def test_whatever_goes_wrong_is_a_violation_with_its_options(broken: str, violation: str) -> None:
    result = run_seed(4, '{"drop": 9}', refine=True, make=paper(lambda _seed, _options: broken))
    assert result.violation is not None
    assert result.violation.startswith(violation)
    assert json.loads(result.options)["drop"] == 9


def test_the_total_adds_up() -> None:
    total = Total()
    for seed in range(3):
        total.add(run_seed(seed, refine=seed == 0, make=paper(nothing)))
    total.add(run_seed(3, make=paper(lambda _seed, _options: "I1: lost")))
    assert (total.seeds, total.refined, len(total.violations)) == (4, 1, 1)
    assert total.of_kind("fault.") == {"drop": 8}
    assert total.simulated_seconds == 20
    lines = "\n".join(swarm.report(total, 2.0))
    for part in ["faults: drop 8", "transitions: T1 4", "10 per second", "1 traces of 6 lines"]:
        assert part in lines


def say(result: Result, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> int:
    monkeypatch.setattr(swarm, "run_seeds", lambda *_args, **_kw: iter([result]))
    return swarm.main(argv)


def test_a_violation_is_printed_with_the_command_that_replays_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_seed(33, '{"drop": 9}', make=paper(lambda _seed, _options: "I4: dirty"))
    argv = ["--seeds", "1", "--from-seed", "33", "--options", '{"drop": 9}']
    assert say(result, monkeypatch, argv) == 1
    out = capsys.readouterr().out
    assert "seed 33: I4: dirty" in out
    assert f"options: {result.options}" in out
    command = "python -m pureflash.testing.swarm --seeds 1 --from-seed 33 --refine 1"
    assert f"replay: {command} --options '{{\"drop\": 9}}'" in out
    assert ledger.figures_of(out) is None
    assert ledger.failure_of(out) == "FAILED: seed 33: I4: dirty"


def test_good_runs_print_the_figures_of_the_ledger(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_seed(7, make=paper(nothing))
    assert say(result, monkeypatch, ["--seeds", "1", "--from-seed", "7"]) == 0
    figures = ledger.figures_of(capsys.readouterr().out)
    assert figures == ledger.Figures(first_seed=7, seeds=1, simulated_hours=0.001)


@pytest.mark.parametrize("argv", [["--seeds", "0"], ["--options", "{"], ["--refine", "-1"]])
def test_nonsense_is_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        swarm.main(argv)


def test_seeds_run_once_each_on_two_processes() -> None:
    options = '{"safety_ms": 200, "conductorless_ms": 0}'
    both = sorted(swarm.run_seeds(range(10, 30), options, refine=7), key=lambda one: one.seed)
    assert [result.seed for result in both] == list(range(10, 30))
    assert [one.seed for one in both if one.refined_lines] == [14, 21, 28]
    alone = swarm.run_seeds(range(10, 30), options, processes=1)
    assert [one.trace_hash for one in alone] == [one.trace_hash for one in both]


def test_shrinking_keeps_the_invariant_and_drops_the_rest() -> None:
    def breaks(_seed: int, options: dict[str, int]) -> str | None:
        if options["safety_ms"] < 700:
            return None
        if options["drop"] and options["torn"]:
            return f"I4: with {options['crash_every_ms']}"
        return "I9: something else" if options["torn"] else None

    found = shrink.shrink(5, make=paper(breaks))
    assert found is not None
    options = json.loads(found.options)
    assert shrink.faults_of(options) == ["drop", "torn"]
    assert found.violation == "I4: with 0"
    assert (options["safety_ms"], options["clients"]) == (700, 1)


def test_shrinking_survives_options_that_no_world_has() -> None:
    def breaks(_seed: int, options: dict[str, int]) -> str | None:
        return "I4: always" if options["clients"] == 2 else None

    found = shrink.shrink(5, '{"drop": 12}', make=paper(breaks))
    assert found is not None
    assert shrink.faults_of(json.loads(found.options)) == []


def test_shrinking_ends_after_so_many_tries() -> None:
    tried = []

    def breaks(_seed: int, options: dict[str, int]) -> str | None:
        tried.append(options)
        return "I4: always"

    assert shrink.shrink(5, tries=3, make=paper(breaks)) is not None
    assert len(tried) == 4


def test_a_good_seed_cannot_be_shrunk() -> None:
    assert shrink.shrink(5, make=paper(nothing)) is None
