"""Which data directory a command means, and what chose it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pureflash.cli.outcome import Exit, exit_status_of
from pureflash.client.context import Place, resolve_data
from pureflash.errors import CallerError


def remember(config: Path, text: str) -> Path:
    file = config / "pureflash" / "context.toml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return file


def test_the_order_is_flag_environment_context_default(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    default = Place(tmp_path / ".local/state/pureflash", "default")
    assert resolve_data(None, home) == default

    file = remember(tmp_path / ".config", 'data = "/srv/remembered"\n')
    assert resolve_data(None, home) == Place(Path("/srv/remembered"), str(file))

    named = {**home, "PF_DATA": "/srv/named"}
    assert resolve_data(None, named) == Place(Path("/srv/named"), "PF_DATA")
    assert resolve_data(Path("/srv/flag"), named) == Place(Path("/srv/flag"), "--data")


def test_the_xdg_folders_are_obeyed_and_relative_ones_ignored(tmp_path: Path) -> None:
    file = remember(tmp_path / "config", 'data = "/srv/elsewhere"\n')
    variables = {"HOME": "/nowhere", "XDG_CONFIG_HOME": str(tmp_path / "config")}
    assert resolve_data(None, variables).source == str(file)
    variables = {"HOME": "/nowhere", "XDG_STATE_HOME": "relative"}
    assert resolve_data(None, variables).directory == Path("/nowhere/.local/state/pureflash")


def test_a_context_without_data_falls_through_to_the_default(tmp_path: Path) -> None:
    remember(tmp_path / ".config", 'server = "http://127.0.0.1:7180"\n')
    assert resolve_data(None, {"HOME": str(tmp_path)}).source == "default"


@pytest.mark.parametrize("text", ["data = 7\n", 'data = "relative"\n', "not toml", "\x00"])
def test_a_broken_context_is_a_usage_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    file = remember(tmp_path / ".config", text)
    with pytest.raises(CallerError) as caught:
        resolve_data(None, {"HOME": str(tmp_path)})
    assert exit_status_of(caught.value) is Exit.USAGE
    assert str(file) in caught.value.message
    assert "--data" in caught.value.next_step
