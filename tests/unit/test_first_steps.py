"""What a stranger types first, and what is said to it: forms, names that lead nowhere, next steps.

Nothing here needs a server: each of these is answered by the command itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import msgspec.yaml
import pytest
from tests.support.making import opened
from tests.unit.test_commands import FakeVolume

import pureflash
from pureflash.cli import app
from pureflash.cli.outcome import Exit
from pureflash.cli.render import local_time, moment_key
from pureflash.client.api import READ_TIMEOUT_S, TIMEOUT_S, Api
from pureflash.client.cluster import Cluster
from pureflash.client.device import Device
from pureflash.errors import CallerError, ClusterError, Code
from pureflash.model.layout import Layout
from pureflash.model.rest import CreateVolume
from pureflash.supervisor.cluster import Wish
from pureflash.units import parse_size

ROOT = Path(__file__).resolve().parents[2]
GATEWAY = """\
[cluster]
id = "ab"
[node]
id = "g1"
data = "/d"
token_file = "/t"
[nbd]
socket = "/s"
"""


def pf(*arguments: str | Path) -> int:
    return app.run([str(one) for one in arguments])


def test_version_and_doctor_have_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PF_DATA", str(tmp_path))
    assert pf("version", "-o", "name") == Exit.OK
    assert capsys.readouterr().out == f"{pureflash.__version__}\n"
    assert pf("version", "-o", "yaml") == Exit.OK
    assert msgspec.yaml.decode(capsys.readouterr().out)["core"]["profile"] == "release"
    status = pf("doctor", "-o", "json")
    found = json.loads(capsys.readouterr().out)
    assert status == (Exit.FAILED if found["state"] == "fail" else Exit.OK)
    assert pf("doctor", "-o", "yaml") == status
    again = msgspec.yaml.decode(capsys.readouterr().out)
    assert [one["name"] for one in again["checks"]] == [one["name"] for one in found["checks"]]
    assert pf("doctor", "-o", "name") == status
    assert capsys.readouterr().out == f"{found['state']}\n"


def test_the_settings_of_a_process_are_shown_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PF_DATA", str(tmp_path))
    assert pf("config", "show", "g1") == Exit.NOT_FOUND
    assert "start a cluster with `pf up`" in capsys.readouterr().err
    (tmp_path / "config").mkdir()
    (tmp_path / "config/g1.toml").write_text(GATEWAY)
    assert pf("config", "show") == Exit.USAGE
    assert (
        f"is in {tmp_path} (from PF_DATA)\n  what to do: use one of g1" in capsys.readouterr().err
    )
    assert pf("config", "show", "s9") == Exit.NOT_FOUND
    assert "there is no process 's9'" in capsys.readouterr().err
    assert pf("config", "show", "g1", "-o", "yaml") == Exit.OK
    shown = msgspec.yaml.decode(capsys.readouterr().out)
    assert shown["nbd.socket"] == {"value": "/s", "source": str(tmp_path / "config/g1.toml")}
    assert pf("config", "show", "--config", tmp_path / "none.toml") == Exit.NOT_FOUND
    assert "what to do: " in capsys.readouterr().err
    (tmp_path / "bytes.toml").write_bytes(b"[node]\nid = '\xff'\n")
    assert pf("config", "show", "--config", tmp_path / "bytes.toml") == Exit.FAILED
    assert "it is not UTF-8\n  what to do: name a settings file" in capsys.readouterr().err


def test_a_path_that_leads_nowhere_is_named_with_a_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PF_DATA", str(tmp_path))
    for arguments, status, said in (
        (("disk", "inspect", tmp_path / "none"), Exit.NOT_FOUND, f"there is no {tmp_path}/none"),
        (("image", "import", tmp_path / "none", "v1"), Exit.NOT_FOUND, "No such file"),
        (("image", "import", tmp_path, "v1"), Exit.FAILED, "Is a directory"),
        (
            ("image", "export", "v1", tmp_path / "none/x.img"),
            Exit.NOT_FOUND,
            f"cannot make {tmp_path}/none/x.img: {tmp_path}/none is not there",
        ),
        (("logs",), Exit.NOT_FOUND, "start a cluster with `pf up`"),
    ):
        assert pf(*arguments) == status
        error = capsys.readouterr().err
        assert said in error
        assert "what to do: " in error


def test_logs_begin_with_as_many_lines_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PF_DATA", str(tmp_path))
    (tmp_path / "log").mkdir()
    (tmp_path / "log/s1.jsonl").write_text("one\ntwo\nthree\n")
    for count, shown in (("0", ""), ("2", "two\nthree\n"), ("9", "one\ntwo\nthree\n")):
        assert pf("logs", "s1", "-n", count) == Exit.OK
        assert capsys.readouterr().out == shown
    assert pf("logs", "-n", "-1") == Exit.USAGE


@pytest.mark.parametrize("reference", ["", ".", ".."])
def test_a_reference_that_would_change_the_path_never_reaches_the_server(reference: str) -> None:
    asked: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return httpx2.Response(200, json={})

    with Api("fake:1", "token", transport=httpx2.MockTransport(answer)) as api:
        for call in (api.volume, api.delete_volume, api.delete_export, api.explain_volume):
            with pytest.raises(CallerError, match="nothing can have the name") as refused:
                call(reference)
            assert refused.value.code is Code.NOT_FOUND
    assert asked == []


@pytest.mark.parametrize(
    ("fails_with", "next_step"),
    [
        (httpx2.ReadTimeout, "its process is there and hangs: see `pf logs c1`"),
        (httpx2.ConnectError, "start the cluster with `pf up`"),
    ],
)
def test_a_conductor_that_hangs_and_one_that_is_not_there_need_different_steps(
    fails_with: type[httpx2.TransportError], next_step: str
) -> None:
    waits: list[float] = []

    def fail(request: httpx2.Request) -> httpx2.Response:
        waits.append(request.extensions["timeout"]["read"])
        raise fails_with("no answer")

    with Api("fake:1", "token", transport=httpx2.MockTransport(fail)) as api:
        with pytest.raises(ClusterError) as found:
            api.cluster()
        assert found.value.next_step is not None
        assert found.value.next_step.startswith(next_step)
        with pytest.raises(ClusterError):
            api.create_volume(CreateVolume(name="v1", size_bytes=4096))
    assert waits == [READ_TIMEOUT_S, TIMEOUT_S], "who only asks waits less than who makes"


def test_zero_is_called_zero_with_a_unit_and_without() -> None:
    for text in ("0", "0G", "0.0"):
        with pytest.raises(ValueError, match="a size must be greater than zero"):
            parse_size(text)


def test_python_callers_hear_the_same_kinds_of_errors() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        raise AssertionError(f"nothing is asked: {request.url}")

    transport = httpx2.MockTransport(answer)
    with Cluster(Api("fake:1", "token", transport=transport)) as cluster:
        with pytest.raises(CallerError, match="5 has no unit") as refused:
            cluster.volumes.create("v1", "5")
        assert refused.value.code is Code.INVALID
    device = Device(FakeVolume(8192))
    for attempt in (
        lambda: device.pwrite(b"abc", offset=0),
        lambda: device.pread(1, 512),
        lambda: device.discard(0, 100),
    ):
        with pytest.raises(CallerError, match="both must be multiples of 512") as refused:
            attempt()
        assert refused.value.code is Code.MISALIGNED
    assert device.pread(512, 512) == bytes(512)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (Wish(disk_bytes=2 << 30), "made with 1 GiB (1,073,741,824 bytes), not 2 GiB ("),
        (Wish(stores=2), "made with 1, not 2"),
    ],
)
def test_what_a_cluster_was_made_with_is_said_in_gib(tmp_path: Path, wish: Wish, said: str) -> None:
    opened(Layout(tmp_path), Wish(stores=1, disk_bytes=1 << 30))
    with pytest.raises(CallerError) as refused:
        opened(Layout(tmp_path), wish)
    assert said in refused.value.message


def test_a_second_purge_says_that_nothing_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PF_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert pf("down", "--purge", "--yes") == Exit.OK
    assert capsys.readouterr().out == f"there is nothing in {tmp_path}/none (from PF_DATA)\n"


def test_times_of_a_list_are_local_and_sorted_as_times() -> None:
    early, late = "2026-01-02T03:04:05.000Z", "2026-01-02T03:04:05.120Z"
    assert moment_key(None) < moment_key(early) < moment_key(late)
    assert local_time(early).endswith(" ago)")


def test_the_page_of_commands_has_those_that_need_no_verb() -> None:
    assert "\n### `pf bench`\n" in (ROOT / "docs/reference/cli.md").read_text()
