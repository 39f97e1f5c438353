"""The shell of `pf`: version, completion, exit statuses, and what starting it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import pytest

import pureflash
from pureflash.cli.app import run
from pureflash.cli.outcome import CommandProblem, Exit, describe, exit_status_of, present

PF = Path(sys.executable).with_name("pf")


class Code(IntEnum):
    """Some codes of errors.toml, and one that has no exit status of its own."""

    INVALID = 20
    NOT_FOUND = 23
    ALREADY_EXISTS = 24
    NO_SPACE = 40
    NO_QUORUM = 61


@dataclass
class ServerProblem(Exception):
    """An error in the shape that the generated `PureFlashError` has."""

    code: Code
    message: str = "volume v1 cannot be made"
    next_step: str | None = "choose another name"
    request_id: str | None = "r-17"


def test_help_is_answered_without_the_core_a_server_or_rich_output_code() -> None:
    # A subprocess: this very process has loaded everything already.
    script = (
        "import sys; from pureflash.cli.app import run; status = run(['--help']);"
        "print(status, sorted(name for name in sys.modules if name in"
        " {'pureflash._core', 'litestar', 'granian', 'msgspec', 'asyncio', 'sqlite3', 'httpx2'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert "Usage: pf" in result.stdout
    assert result.stdout.splitlines()[-1] == "0 []"


def test_the_console_script_is_installed_and_lists_its_commands() -> None:
    result = subprocess.run([PF, "--help"], check=True, capture_output=True, text=True)
    for command in ("version", "doctor", "completion", "--install-completion"):
        assert command in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("version",), ("version", "-o", "json"), ("doctor",), ("completion", "bash")],
)
def test_output_that_cannot_be_written_is_one_error_with_its_status(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [PF, *arguments],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        )
    assert done.stderr == (
        "pf: cannot write standard output: No space left on device\n"
        "  what to do: make room there, or send it elsewhere\n"
    )
    assert done.returncode == Exit.FAILED


def test_version_names_the_package_and_an_equal_core(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version"]) == Exit.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"pureflash {pureflash.__version__}"
    assert lines[1].startswith(f"core      {pureflash.__version__} (release, opt-level 3, ")


def test_the_version_is_also_an_option_as_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version"]) == Exit.OK
    first = capsys.readouterr().out.splitlines()[0]
    assert run(["--version"]) == Exit.OK
    assert capsys.readouterr().out == f"{first}\n"


def test_version_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version", "-o", "json"]) == Exit.OK
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == facts["core"]["version"] == pureflash.__version__
    assert facts["core"]["profile"] == "release"
    assert facts["core"]["features"] == []


def test_a_core_that_cannot_be_loaded_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pureflash._core", None)
    monkeypatch.delattr(pureflash, "_core", raising=False)
    assert run(["version"]) == Exit.FAILED
    error = capsys.readouterr().err
    assert "the Rust core cannot be loaded" in error
    assert "what to do: install the package again" in error


@pytest.mark.parametrize("arguments", [["no-such-command"], ["version", "--no-such-flag"], []])
def test_a_line_that_pf_does_not_understand_is_a_usage_error(arguments: list[str]) -> None:
    assert run(arguments) == Exit.USAGE


def test_an_unknown_output_form_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version", "-o", "xml"]) == Exit.USAGE
    assert "json" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["completion", shell]) == Exit.OK
    assert "_PF_COMPLETE" in capsys.readouterr().out


def test_the_completion_protocol_offers_the_commands() -> None:
    result = subprocess.run(
        [PF],
        check=False,
        capture_output=True,
        text=True,
        env={"_PF_COMPLETE": "complete_bash", "COMP_WORDS": "pf doc", "COMP_CWORD": "1"},
    )
    assert result.stdout.split() == ["doctor"]


def test_completion_of_an_unknown_shell_names_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["completion", "tcsh"]) == Exit.USAGE
    assert "bash, zsh, fish" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("problem", "status"),
    [
        (ServerProblem(Code.INVALID), 2),
        (ServerProblem(Code.NOT_FOUND), 3),
        (ServerProblem(Code.ALREADY_EXISTS), 4),
        (ServerProblem(Code.NO_QUORUM), 5),
        (ServerProblem(Code.NO_SPACE), 1),
        (CommandProblem("not without --yes", exit_status=Exit.UNSAFE), 6),
        (KeyboardInterrupt(), 130),
        (RuntimeError("a bug"), 1),
    ],
)
def test_each_kind_of_problem_has_its_documented_status(
    problem: BaseException, status: int
) -> None:
    assert exit_status_of(problem) == status


def test_an_error_says_what_failed_what_to_do_and_the_request() -> None:
    assert describe(ServerProblem(Code.ALREADY_EXISTS)).splitlines() == [
        "pf: volume v1 cannot be made (ALREADY_EXISTS)",
        "  what to do: choose another name",
        "  request id: r-17",
    ]


def test_a_bug_is_called_a_bug_and_its_trace_is_kept_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PF_DEBUG", raising=False)
    assert present(RuntimeError("lost my way")) == Exit.FAILED
    quiet = capsys.readouterr().err
    assert "internal error: RuntimeError: lost my way" in quiet
    assert "Traceback" not in quiet

    monkeypatch.setenv("PF_DEBUG", "1")
    try:
        raise RuntimeError("lost my way")
    except RuntimeError as problem:
        present(problem)
    assert "Traceback" in capsys.readouterr().err


def test_a_system_error_names_its_file() -> None:
    assert describe(PermissionError(13, "Permission denied", "/data/x")) == (
        "pf: Permission denied: /data/x"
    )
