"""The commands of `pf` against a real API, and the pure parts of what they print."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pwd
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import msgspec.yaml
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.server import TOKEN, Served, serving
from tests.support.world import GIB

from pureflash.cli.app import run
from pureflash.cli.clusters import children_of
from pureflash.cli.images import CHUNK_BYTES, copy_in, copy_out, data_chunks
from pureflash.cli.logs import human_line
from pureflash.cli.outcome import Exit
from pureflash.cli.progress import LINE_EVERY_S, Progress
from pureflash.cli.status import status_lines
from pureflash.cli.volumes import growth_notice
from pureflash.client.context import context_file, forget, remember, resolve_data, resolve_server
from pureflash.client.device import Device
from pureflash.errors import CallerError, PureFlashError
from pureflash.model.layout import Layout
from pureflash.model.rest import (
    CapacityView,
    ClusterView,
    DiskView,
    ExportView,
    HealthView,
    StoreView,
)

SECTOR = 512


class FakeVolume:
    """A volume in memory that counts what is written to it."""

    def __init__(self, size: int, fill: bytes = b"\0") -> None:
        self.data = bytearray(fill * size)
        self.writes: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return len(self.data)

    def pread(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def pwrite(self, offset: int, data: bytes) -> None:
        assert offset % SECTOR == 0
        assert len(data) % SECTOR == 0
        self.writes.append((offset, len(data)))
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        pass

    def discard(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        assert offset % SECTOR == length % SECTOR == 0
        self.data[offset : offset + length] = bytes(length)

    def close(self) -> None:
        pass


def pf(*arguments: str) -> int:
    return run(list(arguments))


def commands_of(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Awaitable[tuple[int, str, str]]]:
    """Give a function that runs `pf` against the server: (status, output, errors)."""
    monkeypatch.setenv("PF_SERVER", served.address)
    monkeypatch.setenv("PF_TOKEN", TOKEN)
    monkeypatch.setenv("PF_DATA", str(served.folder / "nothing"))

    async def command(*arguments: str) -> tuple[int, str, str]:
        status = await asyncio.to_thread(pf, *arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


@pytest.mark.slow
async def test_a_volume_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(tmp_path) as served, served.store(1):
        command = commands_of(served, monkeypatch, capsys)
        status, out, _ = await command("volume", "create", "v1", "1.0000001G")
        assert status == Exit.OK
        assert out.splitlines()[2] == "state       healthy"
        status, out, err = await command("volume", "create", "v1", "1G")
        assert status == Exit.IN_THE_WAY
        assert "a volume named v1 exists (ALREADY_EXISTS)" in err
        assert "request id: r-" in err
        status, _, err = await command("volume", "create", "v2", "5")
        assert status == Exit.USAGE
        assert "5G for GiB" in err
        status, _, err = await command("volume", "create", "v2", "5G", "--replicas", "2")
        assert status == Exit.UNAVAILABLE
        assert "2 replicas need 2 stores; 1 online (s1)" in err
        assert "or use --replicas 1" in err
        status, out, _ = await command("vol", "ls", "-H")
        assert out == "v1\t1 GiB\t0 GiB\t1\thealthy\n"
        status, out, _ = await command("volume", "show", "v1", "-o", "json")
        assert json.loads(out)["size_bytes"] == GIB + 4096
        status, out, _ = await command("volume", "list", "-o", "name")
        assert out == "v1\n"
        status, out, _ = await command("volume", "resize", "v1", "2G", "-o", "yaml")
        assert msgspec.yaml.decode(out.encode())["size_bytes"] == 2 * GIB
        status, out, _ = await command("volume", "explain", "v1", "-H")
        assert out.splitlines()[1].startswith("v1/0\thealthy\tprimary on s1")


WISHES: list[tuple[tuple[str, ...], Exit, str]] = [
    (("create", "v2", "0"), Exit.USAGE, "greater than zero"),
    (("create", "v2", "0G"), Exit.USAGE, "greater than zero"),
    (("create", "v2", "5"), Exit.USAGE, "5,368,709,120 bytes"),
    (("create", "v2", "1G", "--shard-size", "3G"), Exit.USAGE, "3 GiB (3221225472 bytes)"),
    (("create", "v2", "1G", "--shard-size", "1M"), Exit.USAGE, "power of two from 1G to 64G"),
    (("create", "v2", "1G", "--shard-size", "128G"), Exit.USAGE, "power of two"),
    (("create", "v2", "1G", "--shard-size", "1073741824"), Exit.USAGE, "has no unit"),
    (("create", "v2", "1G", "--replicas", "0"), Exit.USAGE, "use 1 to 3"),
    (("create", "V 2", "1G"), Exit.USAGE, "1 to 96 of a-z"),
    (("create", "v2", "100P"), Exit.USAGE, "8,388,608 GiB"),
    (("create", "v2", "100G"), Exit.FAILED, "overcommit_ratio"),
    (("create", "v1", "1G"), Exit.IN_THE_WAY, "a volume named v1 exists"),
    (("show", "none"), Exit.NOT_FOUND, "there is no volume 'none'"),
    (("resize", "v1", "1M"), Exit.USAGE, "cannot shrink"),
    (("resize", "v1", "100G"), Exit.FAILED, "overcommit_ratio"),
    (("delete", "v1"), Exit.UNSAFE, "--yes"),
]


@pytest.mark.slow
async def test_a_wish_that_cannot_be_is_refused_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(tmp_path) as served, served.store(1):
        command = commands_of(served, monkeypatch, capsys)
        assert (await command("volume", "create", "v1", "1G"))[0] == Exit.OK
        for arguments, status, said in WISHES:
            found, _, err = await command("volume", *arguments)
            assert (found, said in err) == (status, True), f"{arguments}: {err}"
        assert [volume.name for volume in await served.call("volumes")] == ["v1"]


@pytest.mark.slow
async def test_a_list_has_the_columns_and_the_order_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(tmp_path) as served, served.store(1):
        command = commands_of(served, monkeypatch, capsys)
        for name, size in (("b", "2G"), ("a", "3G"), ("c", "1536M")):
            assert (await command("volume", "create", name, size))[0] == Exit.OK

        async def listed(*flags: str) -> list[str]:
            status, out, err = await command("volume", "ls", "-H", *flags)
            assert status == Exit.OK, err
            return out.splitlines()

        assert await listed("--columns", "name") == ["b", "a", "c"]
        assert await listed("--columns", "name", "--sort", "name") == ["a", "b", "c"]
        by_size = await listed("--columns", "Size, name", "--sort", "size")
        assert by_size == ["1.5 GiB\tc", "2 GiB\tb", "3 GiB\ta"]
        assert await listed("--columns", "name", "--sort", "-size") == ["a", "b", "c"]
        assert len((await listed("--columns", "id,reason"))[0].split("\t")) == 2, "also wide ones"
        assert await listed("-o", "name", "--sort", "-name") == ["c", "b", "a"]
        status, out, _ = await command("volume", "list", "-o", "json", "--sort", "name")
        assert [item["name"] for item in json.loads(out)["items"]] == ["a", "b", "c"]
        status, out, _ = await command("volume", "explain", "a", "--columns", "subject", "-H")
        assert out.splitlines() == ["a", "a/0"]
        for wrong, said in (
            (("volume", "ls", "--columns", "colour"), "use name, size, used"),
            (("store", "ls", "--sort", "colour"), "there is no column 'colour'"),
            (("disk", "ls", "-o", "json", "--columns", "id"), "--columns is for tables"),
            (("export", "ls", "--sort", "size"), "use volume, kind"),
            (("job", "ls", "--columns", "size"), "use id, kind"),
        ):
            status, _, err = await command(*wrong)
            assert (status, said in err) == (Exit.USAGE, True), err


@pytest.mark.slow
async def test_the_parts_of_a_cluster_and_a_deletion_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(tmp_path) as served, served.store(1):
        command = commands_of(served, monkeypatch, capsys)
        await command("volume", "create", "v1", "2G")
        status, out, _ = await command("store", "list")
        assert out.splitlines()[0].split() == [
            "NAME", "STATE", "ADDRESS", "DISKS", "REPLICAS", "OUT", "HEARD", "REASON",
        ]  # fmt: skip
        status, out, _ = await command("disk", "list", "-o", "wide", "-H")
        assert out.split("\t")[0] == "s1"
        status, out, _ = await command("status")
        assert status == Exit.OK
        assert "No known data errors" in out
        status, _, err = await command("export", "nbd", "v1")
        assert status == Exit.UNAVAILABLE
        assert "no gateway" in err
        status, _, err = await command("volume", "show", "none")
        assert status == Exit.NOT_FOUND
        status, out, _ = await command("volume", "delete", "v1", "--dry-run")
        assert out.startswith("would delete volume v1: 2 GiB")
        status, _, err = await command("volume", "delete", "v1")
        assert status == Exit.UNSAFE
        assert "--yes" in err
        status, out, _ = await command("volume", "delete", "v1", "--yes")
        assert status == Exit.OK
        assert "succeeded" in out
        status, out, _ = await command("job", "list", "-o", "json")
        assert json.loads(out)["items"][0]["kind"] == "volume.delete"


async def test_what_a_deletion_prints_for_a_program_is_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(tmp_path) as served, served.store(1):
        command = commands_of(served, monkeypatch, capsys)
        await command("volume", "create", "v1", "1G")
        _, shown, _ = await command("volume", "show", "v1", "-o", "json")
        status, out, _ = await command("volume", "delete", "v1", "--dry-run", "-o", "json")
        assert (status, json.loads(out)) == (Exit.OK, json.loads(shown)), "what would be deleted"
        _, out, _ = await command("volume", "delete", "v1", "--dry-run", "-o", "yaml")
        assert msgspec.yaml.decode(out.encode()) == json.loads(shown)
        assert (await command("volume", "delete", "v1", "--dry-run", "-o", "name"))[1] == "v1\n"
        _, out, _ = await command("volume", "delete", "v1", "--dry-run", "-o", "wide")
        assert out.startswith("would delete volume v1")
        status, out, err = await command("volume", "delete", "v1", "--yes", "-o", "json")
        assert (status, json.loads(out)["state"]) == (Exit.OK, "succeeded")
        assert err.startswith("delete volume v1: 1 GiB"), "a person may look on"


async def test_a_replicated_volume_is_shown_copy_by_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(tmp_path) as served, served.store(1) as primary, served.store(2):
        command = commands_of(served, monkeypatch, capsys)
        status, _, err = await command("volume", "create", "v1", "18G", "--replicas", "2")
        assert (status, "NO_SPACE" in err) == (Exit.FAILED, True), "it has no room twice"
        wish = ("volume", "create", "v2", "4G", "--replicas", "2", "--shard-size", "1G")
        status, out, _ = await command(*wish)
        table = [line.split() for line in out.splitlines()]
        assert [
            "SHARD",
            "EPOCH",
            "STATE",
            "PRIMARY",
            "IN-SYNC",
            "LEARNERS",
            "OUT",
            "REASON",
        ] in table
        assert ["0", "1", "healthy", "s2", "s1", "s2", "-", "-"] in table
        assert ["1", "1", "healthy", "s1", "s1", "s2", "-", "-"] in table
        primary.resyncs[1, 1] = [{"to": 2, "regions_left": 3, "regions_copied": 1}]
        primary.propose(1, 1, {"kind": "remove", "copy": 1})
        assert await served.conductor.wait_for(
            lambda view: view.shards[1, 1].learners == (1,), timeout_s=10
        )
        assert await served.conductor.wait_for(
            lambda view: view.observation(1).replicas[1, 1].epoch == 3, timeout_s=10
        )
        status, out, _ = await command("volume", "show", "v2")
        table = [line.split() for line in out.splitlines()]
        assert ["1", "3", "single_copy", "s1", "s1", "s2:25%", "-"] in [row[:7] for row in table]
        status, out, _ = await command("volume", "explain", "v2", "-H")
        assert "v2/1/s2\tlearner\ts2 is being made equal, 1 of 4 regions copied (25 %)" in out
        status, out, _ = await command("store", "list", "-H")
        assert out.splitlines()[1].endswith("1 being made equal; 3 regions left")
        status, out, _ = await command("status")
        assert "VOLUME_SINGLE_COPY v2" in out
        assert "REPLICAS_OUT s2: 1 being made equal; 3 regions left" in out


@pytest.mark.parametrize(("connections", "count"), [([], 0), ([0], 0), ([2], 2), ([1, 2], 3)])
def test_clients_of_before_a_growth_are_counted(connections: list[int], count: int) -> None:
    exports = [
        ExportView(
            id=number, kind="nbd", volume=name, uri="", gateway="g1", state="ready", reason="",
            transport="unix", read_only=False, connections=open_now,
        )
        for name, numbers in (("v1", connections), ("v2", [5]))
        for number, open_now in enumerate(numbers)
    ]  # fmt: skip
    notice = growth_notice(exports, "v1")
    if not count:
        assert notice is None
    else:
        assert notice is not None
        assert f"{count} NBD connection(s) keep the size of before" in notice


def test_without_a_cluster_every_command_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PF_SERVER", raising=False)
    monkeypatch.setenv("PF_DATA", str(tmp_path))
    for arguments in (["status"], ["volume", "list"], ["export", "list"]):
        assert pf(*arguments) == Exit.UNAVAILABLE
        error = capsys.readouterr().err
        assert f"there is no cluster in {tmp_path} (from PF_DATA)" in error
        assert "pf up" in error
    assert pf("down") == Exit.OK
    assert pf("down", "--purge", "--yes") == Exit.UNSAFE
    assert tmp_path.exists()
    assert pf("logs") == Exit.NOT_FOUND


def test_the_context_is_remembered_and_forgotten(tmp_path: Path) -> None:
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    remember(tmp_path / 'odd "name"', environment)
    assert resolve_data(None, environment).directory == tmp_path / 'odd "name"'
    forget(tmp_path / "other", environment)
    assert resolve_data(None, environment).source != "default"
    forget(tmp_path / 'odd "name"', environment)
    assert resolve_data(None, environment).source == "default"


def test_an_empty_home_is_none_and_a_user_without_any_is_told_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(pwd.getpwuid(os.getuid()).pw_dir)
    monkeypatch.setenv("HOME", "")
    for variables in ({}, {"HOME": ""}):
        assert context_file(variables) == own / ".config/pureflash/context.toml"
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    with pytest.raises(CallerError, match="HOME is not set") as refused:
        context_file({"HOME": ""})
    assert "set HOME" in refused.value.next_step
    assert context_file({"XDG_CONFIG_HOME": str(tmp_path)}).is_relative_to(tmp_path)


def test_what_is_forgotten_leaves_no_empty_folder_and_no_strangers_file_behind(
    tmp_path: Path,
) -> None:
    environment = {"HOME": str(tmp_path)}
    (tmp_path / ".local/state").mkdir(parents=True)
    (tmp_path / ".local/strangers").touch()
    remember(tmp_path / "data", environment)
    forget(tmp_path / "other", environment)
    assert (tmp_path / ".config/pureflash/context.toml").exists(), "that one is remembered"
    forget(tmp_path / "data", environment)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".local", "strangers"]


def test_the_server_and_its_token_are_found_with_their_source(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/admin.token").write_text("t1\n")
    (tmp_path / "cluster.toml").write_text("[ports]\nconductor = 7185\n")
    found = resolve_server(None, tmp_path, {})
    assert (found.address, found.token) == ("127.0.0.1:7185", "t1")
    named = resolve_server(None, tmp_path, {"PF_SERVER": "http://localhost:1/", "PF_TOKEN": "t2"})
    assert (named.address, named.token, named.source) == ("localhost:1", "t2", "PF_SERVER")
    assert resolve_server("h:2", tmp_path, {"PF_SERVER": "h:3"}).address == "h:2"
    (tmp_path / "secret/admin.token").unlink()
    with pytest.raises(PureFlashError, match="cannot read the token"):
        resolve_server(None, tmp_path, {})


def sparse_file(path: Path, size: int, pieces: list[tuple[int, bytes]]) -> bytes:
    with path.open("wb") as file:
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
        file.truncate(size)
    return path.read_bytes()


@pytest.mark.parametrize("size", [1, 511, 512, 4096, CHUNK_BYTES, 5 * CHUNK_BYTES + 700])
def test_an_image_goes_in_and_comes_out_as_it_was(tmp_path: Path, size: int) -> None:
    pieces = [(0, b"head"), (size - 1, b"t")] if size > 10 else [(0, b"x")]
    expected = sparse_file(tmp_path / "in.img", size, pieces)
    volume = FakeVolume(8 * CHUNK_BYTES, fill=b"\xff")
    device = Device(volume)
    with (tmp_path / "in.img").open("rb") as image:
        copy_in(image, device, size, title="import")
    assert volume.data[:size] == expected
    padded = -(-size // SECTOR) * SECTOR
    assert volume.data[size:padded] == bytes(padded - size)
    assert volume.data[padded:] == b"\xff" * (len(volume.data) - padded)
    with (tmp_path / "out.img").open("xb") as image:
        copy_out(device, image, volume.size, title="export")
    assert (tmp_path / "out.img").read_bytes() == bytes(volume.data)


def test_holes_are_not_sent_and_zeros_are_not_stored(tmp_path: Path) -> None:
    size = 64 * CHUNK_BYTES
    sparse_file(tmp_path / "in.img", size, [(40 * CHUNK_BYTES + 5, b"data")])
    volume = FakeVolume(size)
    device = Device(volume)
    with (tmp_path / "in.img").open("rb") as image:
        assert copy_in(image, device, size, title="import") == CHUNK_BYTES
    assert volume.writes == [(40 * CHUNK_BYTES, CHUNK_BYTES)]
    with (tmp_path / "out.img").open("xb") as image:
        assert copy_out(device, image, volume.size, title="export") == CHUNK_BYTES
    found = (tmp_path / "out.img").stat()
    assert found.st_size == size
    assert found.st_blocks * 512 <= 2 * CHUNK_BYTES


@given(st.lists(st.integers(0, 40 * 65536), max_size=6), st.integers(1, 40 * 65536))
def test_the_chunks_of_a_file_cover_its_data_once(offsets: list[int], size: int) -> None:
    descriptor = os.memfd_create("test")
    try:
        os.ftruncate(descriptor, size)
        for offset in offsets:
            if offset < size:
                os.pwrite(descriptor, b"x", offset)
        chunks = list(data_chunks(descriptor, size))
        assert all(offset % CHUNK_BYTES == 0 for offset, _ in chunks)
        assert [offset for offset, _ in chunks] == sorted({offset for offset, _ in chunks})
        for offset in offsets:
            if offset < size:
                assert any(start <= offset < start + length for start, length in chunks)
    finally:
        os.close(descriptor)


def test_a_device_refuses_what_lies_outside() -> None:
    device = Device(FakeVolume(4096))
    with pytest.raises(CallerError):
        device.pread(4096, 512)
    with pytest.raises(CallerError):
        device.pwrite(bytes(512), offset=-512)


def test_off_a_terminal_progress_is_a_line_every_ten_seconds() -> None:
    now = 0.0
    stream = io.StringIO()
    with Progress("import x", total=100, unit="shards", stream=stream, clock=lambda: now) as bar:
        for second in range(25):
            now = float(second)
            bar.update(second)
    assert LINE_EVERY_S == 10
    assert stream.getvalue().splitlines() == [
        "import x: 10 of 100 shards (10 %)",
        "import x: 20 of 100 shards (20 %)",
    ]


def status_seen(stores: int, findings: int) -> ClusterView:
    gib = 1 << 30
    disk = DiskView(
        id="d", store="s1", index=0, path="/p", size_bytes=10 * gib, state="ok", reason="",
        engine="uring", engine_reason="uring: one read done",
        bytes_total=10 * gib, bytes_free=9 * gib,
    )  # fmt: skip
    store = StoreView(
        id=1, name="s1", state="online", reason="", address="127.0.0.1:7162", incarnation=1,
        silent_ms=3, replicas=2, disks=[disk],
    )  # fmt: skip
    finding = HealthView(
        code="STORE_OFFLINE", severity="error", subject="s2", meaning="gone", cause="it ended",
        next_step="pf logs s2",
    )  # fmt: skip
    return ClusterView(
        cluster_id="ab" * 16,
        state="offline" if findings else "healthy",
        sentence="A sentence.",
        term=1,
        lineage="0",
        revision=1,
        capacity=CapacityView(
            raw_bytes=30 * gib, usable_bytes=28 * gib, used_bytes=gib, promised_bytes=5 * gib,
            after_one_loss_bytes=19 * gib, overcommit_ratio=1.0,
        ),
        stores=[store] * stores,
        gateways=[],
        volumes_by_state={"healthy": 1},
        exports=1,
        running_jobs=[],
        counters={},
        health=[finding] * findings,
    )  # fmt: skip


def status_of(stores: int, findings: int) -> list[str]:
    children: list[dict[str, object]] = [
        {"name": "s1", "state": "running", "reason": "", "pid": 4711},
        {"name": "s2", "state": "waiting", "reason": "it ended by SIGKILL", "pid": None},
    ]
    for number in range(3, 17):
        name = f"s{number}"
        children.append({"name": name, "state": "running", "reason": "", "pid": 4_194_304})
    return status_lines(status_seen(stores, findings), "127.0.0.1:7180", children)


def test_the_status_tells_space_disks_and_processes_apart() -> None:
    lines = status_of(1, 0)
    assert (
        "  space: 30 GiB raw, 28 GiB usable, 19 GiB without the largest store;"
        " 1 GiB used, 5 GiB promised of 28 GiB"
    ) in lines
    (store,) = (line for line in lines if line.startswith("  s1 "))
    assert store.endswith("  ok, 9 GiB free of 10 GiB")
    assert any("with their pids: s1 4711, s2 -, s3 4194304," in line for line in lines)
    assert [line for line in lines if line.startswith("  s2: ")] == [
        "  s2: to be started again: it ended by SIGKILL"
    ]


@pytest.mark.parametrize(
    ("state", "reason", "shown"),
    [
        ("starting", "", None),
        ("starting", "it ended with status 1: x", "starting: it ended with status 1: x"),
        ("running", "it ended by SIGKILL", None),
        ("given up", "it ended by SIGKILL", "given up: it ended by SIGKILL"),
    ],
)
def test_a_process_says_why_it_ended_until_it_runs(
    state: str, reason: str, shown: str | None
) -> None:
    child = {"name": "s9", "state": state, "reason": reason, "pid": None}
    lines = status_lines(status_seen(1, 0), "127.0.0.1:7180", [child])
    assert [line.strip() for line in lines if line.startswith("  s9: ")] == (
        [f"s9: {shown}"] if shown else []
    )


def test_a_cluster_that_nobody_has_joined_knows_nothing_of_its_data() -> None:
    seen = msgspec.structs.replace(status_seen(0, 0), state="offline")
    lines = status_lines(seen, "127.0.0.1:7180", [])
    assert "No known data errors" not in lines
    assert lines[-1] == "Nothing is known of the data."


def test_the_status_fits_one_screen_whatever_is_wrong() -> None:
    assert "No known data errors" in status_of(3, 0)
    worst = status_of(1_000, 1_000)
    assert len(worst) <= 50
    assert max(len(line) for line in worst) <= 132
    assert "  and 984 more: pf store list" in worst
    assert " action: pf logs s2" in worst


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"7", b'{"pid":1}', b'{"children":[7]}', b'{"children":[{}]}', b"\xff"],
)
def test_a_damaged_record_of_the_supervisor_spoils_no_status(tmp_path: Path, text: bytes) -> None:
    layout = Layout(tmp_path)
    layout.supervisor_file.parent.mkdir()
    assert children_of(layout) == []
    layout.supervisor_file.write_bytes(text)
    assert children_of(layout) == []
    child = {"name": "s1", "state": "running", "pid": 7, "reason": ""}
    layout.supervisor_file.write_text(json.dumps({"pid": 1, "children": [child]}))
    assert children_of(layout) == [child]


def test_a_log_line_is_shown_for_people() -> None:
    line = '{"ts":"2026-01-02T03:04:05Z","level":"INFO","process":"s1","event":"e","msg":"text"}'
    assert human_line(line) == (
        "2026-01-02T03:04:05Z",
        "2026-01-02T03:04:05Z INFO    s1         e: text",
    )
    assert human_line("a panic") == ("", "a panic")


def test_config_show_prints_values_with_their_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "g1.toml"
    path.write_text(
        '[cluster]\nid = "ab"\n[node]\nid = "g1"\ndata = "/d"\ntoken_file = "/t"\n'
        '[nbd]\nsocket = "/s"\n'
    )
    monkeypatch.setenv("PF_NBD_LISTEN", "127.0.0.1:1")
    assert pf("config", "show", "--config", str(path), "--kind", "gateway", "-o", "json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["nbd.listen"] == {"value": "127.0.0.1:1", "source": "PF_NBD_LISTEN"}
    assert shown["nbd.socket"] == {"value": "/s", "source": str(path)}
    assert shown["log.level"]["source"] == "default"
    path.write_text("[nbd]\nsoket = 1\n")
    assert pf("config", "show", "--config", str(path), "--kind", "gateway") == Exit.USAGE
    assert "did you mean nbd.socket?" in capsys.readouterr().err
