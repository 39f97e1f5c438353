"""Which data directory a command means, and what chose it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pureflash.cli.outcome import Exit, exit_status_of
from pureflash.client.context import Place, resolve_data, resolve_server
from pureflash.errors import CallerError, Code, SecurityError
from pureflash.model.bearer import TOKEN_BYTES_MAX, token_in


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


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Give a data directory with what a command reads of it."""
    directory = tmp_path / "data"
    (directory / "secret").mkdir(parents=True)
    (directory / "cluster.toml").write_text('[cluster]\nid = "ab"\n[ports]\nconductor = 7180\n')
    (directory / "secret/admin.token").write_text("a-token\n")
    return directory


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"ssh key\nSECRET\n", b"\xff\xfe", b"a\x00b", b"x" * (TOKEN_BYTES_MAX + 1)]
)
def test_what_is_no_token_is_neither_sent_nor_shown(cluster: Path, text: bytes) -> None:
    (cluster / "secret/admin.token").write_bytes(text)
    with pytest.raises(SecurityError) as caught:
        resolve_server(None, cluster, {"HOME": "/nowhere"})
    assert "admin.token is not a token" in caught.value.message
    assert "SECRET" not in str(caught.value)
    assert token_in(text) is None


@pytest.mark.parametrize("text", ["", "two words", "two\nlines"])
def test_a_variable_that_is_no_token_is_named(text: str) -> None:
    variables = {"PF_TOKEN": text, "PF_SERVER": "127.0.0.1:1", "HOME": "/nowhere"}
    with pytest.raises(SecurityError, match="PF_TOKEN is not a token"):
        resolve_server(None, None, variables)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("way", ["link", "folder", "fifo"])
def test_a_prepared_directory_does_not_get_the_token_of_another(
    cluster: Path, tmp_path: Path, way: str
) -> None:
    """Who prepared it listens at the port that its `cluster.toml` names."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "admin.token").write_text("MINE\n")
    assert resolve_server(None, cluster, {}).token == "a-token"
    token = cluster / "secret/admin.token"
    token.unlink()
    if way == "folder":
        token.parent.rmdir()
        token.parent.symlink_to(mine)
    elif way == "link":
        token.symlink_to(mine / "admin.token")
    else:
        os.mkfifo(token)
    os.chown(cluster, 65_534, 65_534)
    with pytest.raises(SecurityError) as caught:
        resolve_server(None, cluster, {})
    assert caught.value.code is Code.UNAUTHENTICATED
    assert "was not read" in caught.value.message


def test_a_cluster_file_that_cannot_be_read_is_said_with_a_way_on(cluster: Path) -> None:
    (cluster / "cluster.toml").unlink()
    (cluster / "cluster.toml").mkdir()
    with pytest.raises(CallerError) as caught:
        resolve_server(None, cluster, {})
    assert "Is a directory" in caught.value.message
    assert "--data" in caught.value.next_step
