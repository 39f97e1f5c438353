"""Error codes: one list, three files that agree with it, and exceptions that keep their class."""

from __future__ import annotations

import importlib.util
import pickle
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pureflash import errors
from pureflash.errors import Code, PureFlashError, from_code

ROOT = Path(__file__).parents[2]
FAILURES = [code for code in Code if code is not Code.OK]
BANDS = {
    range(1, 20): errors.RouteError,
    range(20, 40): errors.CallerError,
    range(40, 60): errors.MediaError,
    range(60, 80): errors.ClusterError,
    range(80, 90): errors.SecurityError,
    range(90, 100): errors.SoftwareError,
}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """Load the generator, which is a tool and no package."""
    spec = importlib.util.spec_from_file_location("gen_errors", ROOT / "tools/gen_errors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gen_errors"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("code", FAILURES, ids=lambda code: code.name)
def test_every_code_has_the_class_of_its_band_and_something_to_say(code: Code) -> None:
    error = from_code(int(code), request_id="r-17")
    (band,) = [band for numbers, band in BANDS.items() if code in numbers]
    assert type(error) is band
    assert error.code is code
    assert 400 <= error.http_status <= 599
    assert str(error) == f"{code.name}: {error.message}. {error.next_step}. (request r-17)"


def test_particulars_replace_the_general_text() -> None:
    error = from_code(21, "offset 9 of 8", next_step="Use a smaller offset")
    assert str(error) == "OUT_OF_RANGE: offset 9 of 8. Use a smaller offset."
    assert error.request_id is None


def test_a_code_of_a_newer_peer_is_internal_and_named() -> None:
    error = from_code(12_345, "from the future")
    assert error.code is Code.INTERNAL
    assert error.message == "unknown code 12345: from the future"
    assert from_code(12_345).message == "unknown code 12345"


def test_success_is_no_error() -> None:
    with pytest.raises(ValueError, match="OK is not an error"):
        from_code(0)


@pytest.mark.parametrize("code", FAILURES, ids=lambda code: code.name)
def test_an_error_survives_another_process(code: Code) -> None:
    error = from_code(int(code), "why", next_step="what now", request_id="r-1")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert isinstance(copy, PureFlashError)


def test_generated_files_are_those_of_the_list(generator: ModuleType) -> None:
    bands, codes = generator.read_list((ROOT / "errors.toml").read_text())
    assert generator.RUST.read_text() == generator.rust(bands, codes)
    assert generator.PYTHON.read_text() == generator.python(bands, codes)
    assert generator.PAGE.read_text() == generator.page(bands, codes)
    assert [(code.name, code.number) for code in codes] == [(c.name, int(c)) for c in Code]
    rust = dict(re.findall(r"^    (\w+) = (\d+),$", generator.RUST.read_text(), re.MULTILINE))
    assert sorted(int(number) for number in rust.values()) == [int(code) for code in Code]


def test_check_names_a_stale_file(
    generator: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "argv", ["gen_errors.py", "--check"])
    assert generator.main() == 0
    stale = tmp_path / "errors.md"
    monkeypatch.setattr(generator, "PAGE", stale)
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    assert generator.main() == 1
    assert "errors.md is stale" in capsys.readouterr().out
    assert not stale.exists()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("number = 2\n", "number = 1\n", "not unique"),
        ("number = 99\n", "number = 100\n", "0 bands"),
        ('name = "FENCED"', 'name = "BUSY"', "one name"),
        ('meaning = "Done"', 'meaning = "Done."', "full stop"),
        ("http = 507", "http = 7", "HTTP status"),
    ],
)
def test_a_list_that_contradicts_itself_is_refused(
    generator: ModuleType, old: str, new: str, problem: str
) -> None:
    text = (ROOT / "errors.toml").read_text()
    assert old in text
    with pytest.raises(generator.ListError, match=problem):
        generator.read_list(text.replace(old, new, 1))
