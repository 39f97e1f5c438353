"""The store and gateway processes in this process, around a fake core, with a real conductor."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.support.fake_core import FakeCore
from tests.support.server import TOKEN, Served, is_healthy, serving
from tests.support.world import CLUSTER, GIB, ListLog

from pureflash.conductor import health
from pureflash.gateway.server import run_gateway_on
from pureflash.model.domain import Disk, StoreState
from pureflash.model.rest import CreateExport, CreateVolume
from pureflash.model.settings import GATEWAY, STORE, DiskSetting, Settings, load_settings
from pureflash.process.lifecycle import read_ready
from pureflash.store.agent import disk_reports
from pureflash.store.disks import DiskWatch, Fault, PreparedDisk, Probe, prepare_disks
from pureflash.store.server import run_store_on


@pytest.fixture(autouse=True)
def _restore_signal_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def store_settings(folder: Path, address: str, *, disk: str = 'size = "10G"') -> Settings:
    (folder / "token").write_text(TOKEN)
    (folder / "key").write_text("00" * 32)
    text = f"""
        [cluster]
        id = "{CLUSTER}"
        [node]
        id = "s1"
        number = 1
        data = "{folder}/s1"
        ready = "{folder}/s1.ready"
        listen = "127.0.0.1:7162"
        conductors = "{address}"
        token_file = "{folder}/token"
        key_file = "{folder}/key"
        [log]
        file = "{folder}/s1.jsonl"
        [[disk]]
        path = "{folder}/s1/disk0.img"
        {disk}
    """
    return load_settings(STORE, text=text, source="s1.toml", environment={})


def gateway_settings(folder: Path, address: str) -> Settings:
    (folder / "token").write_text(TOKEN)
    text = f"""
        [cluster]
        id = "{CLUSTER}"
        [node]
        id = "g1"
        data = "{folder}/g1"
        ready = "{folder}/g1.ready"
        conductors = "{address}"
        token_file = "{folder}/token"
        [log]
        file = "{folder}/g1.jsonl"
        [nbd]
        socket = "{folder}/g1.nbd"
        listen = "127.0.0.1:0"
    """
    return load_settings(GATEWAY, text=text, source="g1.toml", environment={})


async def stop(task: asyncio.Task[None]) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 10)


async def run_store(served: Served, core: FakeCore, folder: Path) -> asyncio.Task[None]:
    settings = store_settings(folder, served.address)
    task = asyncio.create_task(run_store_on(core, settings))
    assert await served.conductor.wait_for(lambda view: view.is_online(1), timeout_s=10)
    return task


async def test_a_store_formats_joins_stops_and_comes_back_as_a_newer_incarnation(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as served:
        core = FakeCore()
        task = await run_store(served, core, tmp_path)
        ready = read_ready(tmp_path / "s1.ready")
        assert ready is not None
        assert ready.incarnation == core.nodes[0].incarnation
        await served.call("create_volume", CreateVolume(name="v1", size_bytes=GIB))
        assert len(core.nodes[0].replicas()) == 1
        await stop(task)
        assert core.nodes[0].is_closed
        await served.conductor.store_exited(1, incarnation=ready.incarnation)
        assert served.conductor.view().observation(1).state is StoreState.OFFLINE

        task = await run_store(served, core, tmp_path)
        assert core.nodes[1].incarnation > core.nodes[0].incarnation
        assert await served.conductor.wait_for(is_healthy, timeout_s=10)
        await stop(task)


def prepared(core: FakeCore, folder: Path, log: ListLog, **disk: str) -> tuple[PreparedDisk, ...]:
    """Look at the disks of s1 as it does when it starts."""
    settings = store_settings(folder, "127.0.0.1:1", **disk)
    (folder / "s1").mkdir(exist_ok=True)
    probe = Probe(core, CLUSTER, folder / "s1", "s1")
    return prepare_disks(probe, settings, log)


def fault_of(disk: PreparedDisk) -> Fault:
    assert disk.fault is not None
    return disk.fault


def test_a_disk_of_another_cluster_and_one_without_a_size_are_not_served(tmp_path: Path) -> None:
    core, log = FakeCore(), ListLog()
    (without,) = prepared(core, tmp_path, log, disk="")
    assert "has no size" in fault_of(without).reason
    core.format_disk(
        str(tmp_path / "s1/disk0.img"),
        size_bytes=GIB,
        cluster_id=bytes(16),
        journal_bytes=None,
    )
    (foreign,) = prepared(core, tmp_path, log)
    assert fault_of(foreign).code == "WRONG_CLUSTER"
    assert "belongs to cluster 0000" in fault_of(foreign).reason
    assert foreign.for_core["failure"] == fault_of(foreign).reason
    assert ["WRONG_CLUSTER" in text for _, event, text in log.lines if event == "disk.failed"] == [
        False,
        True,
    ]


def test_a_store_whose_disk_is_missing_makes_no_new_one_in_its_place(tmp_path: Path) -> None:
    core, log = FakeCore(), ListLog()
    (first,) = prepared(core, tmp_path, log)
    assert first.fault is None
    disk, record = tmp_path / "s1/disk0.img", tmp_path / "s1/disk0.json"
    aside = disk.rename(tmp_path / "aside.img")
    (missing,) = prepared(core, tmp_path, log)
    assert f"{disk} is not there, and s1 had a disk 0" in fault_of(missing).reason
    assert first.disk.disk_uuid[:8] in fault_of(missing).reason
    assert "--new-disk s1" in fault_of(missing).next_step
    assert missing.disk == first.disk, "it is known which one is missing"
    assert not disk.exists()
    kept = record.read_bytes()
    record.write_bytes(kept[:-5])
    (unknown,) = prepared(core, tmp_path, log)
    assert "does not say" in fault_of(unknown).reason
    aside.rename(disk)
    assert prepared(core, tmp_path, log) == (first,)
    assert record.read_bytes() == kept, "the disk is back, and known as before"
    aside = disk.rename(aside)
    core.format_disk(
        str(disk), size_bytes=GIB, cluster_id=bytes.fromhex(CLUSTER), journal_bytes=None
    )
    (other,) = prepared(core, tmp_path, log)
    assert f"and s1 had disk {first.disk.disk_uuid[:8]} there" in fault_of(other).reason
    disk.unlink()
    record.unlink()
    (second,) = prepared(core, tmp_path, log)
    assert second.fault is None
    assert second.disk.disk_uuid != first.disk.disk_uuid, "a new disk, as a person wanted"


async def test_a_store_without_its_disk_says_so_and_starts_again_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pureflash.store.server.LOOK_S", 0.01)
    async with serving(tmp_path) as served:
        core = FakeCore()
        task = await run_store(served, core, tmp_path)
        await served.call("create_volume", CreateVolume(name="v1", size_bytes=GIB))
        await stop(task)
        await served.conductor.store_exited(1, incarnation=core.nodes[0].incarnation)
        disk = tmp_path / "s1/disk0.img"
        aside = disk.rename(tmp_path / "aside.img")
        task = await run_store(served, core, tmp_path)
        (shown,) = await served.call("disks")
        assert (shown.state, "is not there" in shown.reason) == ("failed", True)
        found = health.findings(served.conductor.view())
        assert {"DISK_FAILED", "VOLUME_OFFLINE"} <= {finding.code for finding in found}
        (cause,) = (finding for finding in found if finding.code == "DISK_FAILED")
        assert "put the disk of this store back: s1 takes it up by itself" in cause.next_step
        disk.write_text("{}")
        aside.rename(disk)
        await asyncio.wait_for(task, 10)  # by itself: the supervisor starts it again
        await served.conductor.store_exited(1, incarnation=core.nodes[1].incarnation)
        task = await run_store(served, core, tmp_path)
        assert await served.conductor.wait_for(is_healthy, timeout_s=10)
        await stop(task)


def exchange(disk: Path) -> None:
    disk.rename(disk.with_name("old"))
    disk.write_bytes(bytes(4096))


def note(told: list[str], index: int, reason: str) -> None:
    told.append(f"{index}: {reason}")


def never(index: int, path: Path) -> bool:
    raise AssertionError(f"disk {index} at {path} is served: nobody waits for it")


def test_what_happens_to_a_file_in_use_is_noticed_once(tmp_path: Path) -> None:
    stories: tuple[tuple[Callable[[Path], object], str], ...] = (
        (Path.unlink, "is not there any more"),
        (lambda disk: disk.rename(tmp_path / "elsewhere"), "is not there any more"),
        (lambda disk: os.truncate(disk, 100), "was cut from 4096 to 100 bytes"),
        (exchange, "is another file than the one that was opened"),
    )
    for harm, expected in stories:
        disk = tmp_path / "disk0.img"
        disk.write_bytes(bytes(4096))
        failed: list[str] = []
        watch = DiskWatch(
            [
                PreparedDisk(
                    disk=Disk(
                        index=3, path=str(disk), disk_uuid="", format_uuid="", size_bytes=4096
                    ),
                    setting=DiskSetting(path=disk),
                    fault=None,
                )
            ],
            fail=partial(note, failed),
            is_back=never,
            restart=failed.append,
        )
        os.truncate(disk, 8192)
        watch.look()
        assert failed == [], "it may grow"
        os.truncate(disk, 4096)
        harm(disk)
        watch.look()
        watch.look()
        (said,) = failed
        assert said.startswith("3: ")
        assert expected in said


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_disk_that_is_back_ends_only_a_store_that_serves_no_other(
    tmp_path: Path, is_alone: bool
) -> None:
    """All replicas of a store have to be made equal again after its end."""
    fault = Fault(code="DISK_FAILED", reason="it is not there", next_step="mount it")
    paths = [tmp_path / f"disk{index}.img" for index in range(2)]
    if not is_alone:
        paths[1].touch()
    disks = [
        PreparedDisk(
            disk=Disk(index=index, path=str(path), disk_uuid="", format_uuid="", size_bytes=0),
            setting=DiskSetting(path=path),
            fault=None if path.exists() else fault,
        )
        for index, path in enumerate(paths)
    ]
    failed: list[str] = []
    ended: list[str] = []
    watch = DiskWatch(
        disks,
        fail=partial(note, failed),
        is_back=lambda index, _: index == 0,
        restart=ended.append,
    )
    watch.look()
    paths[0].touch()
    watch.look()
    watch.look()
    assert (len(ended), failed) == (1 if is_alone else 0, [])


def test_a_disk_is_reported_with_what_was_wrong_with_it_at_the_start() -> None:
    fault = Fault(code="WRONG_CLUSTER", reason="of another cluster", next_step="give it back")
    disk = {
        "state": "failed",
        "reason": "of another cluster",
        "engine": "none",
        "bytes_total": 0,
        "bytes_free": 0,
    }
    told = disk_reports({"disks": [disk, disk]}, {}, {0: fault})
    assert [(one.code, one.next_step) for one in told] == [
        ("WRONG_CLUSTER", "give it back"),
        ("DISK_FAILED", ""),
    ]


async def test_an_export_reaches_its_gateway_and_is_offered_again_after_its_restart(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as served, served.store(1):
        await served.call("create_volume", CreateVolume(name="v1", size_bytes=GIB))
        core = FakeCore()
        settings = gateway_settings(tmp_path, served.address)
        task = asyncio.create_task(run_gateway_on(core, settings))
        assert await served.conductor.wait_for(lambda view: bool(view.gateways), timeout_s=10)
        wish = CreateExport(kind="nbd", volume="v1")
        made = await served.call("create_export", wish)
        assert (made.state, made.uri) == (
            "ready",
            f"nbd+unix:///v1?socket={tmp_path}/g1.nbd",
        )
        assert (await served.call("create_export", wish)).id == made.id
        (spec,) = core.gateways[0].volumes.values()
        assert spec["shards"] == [{"index": 0, "epoch": 2, "address": "127.0.0.1:7162"}], "T9"
        assert len(spec["ticket"]) == 68
        await stop(task)
        assert not (tmp_path / "g1.nbd").exists()
        assert await served.conductor.wait_for(
            lambda view: not view.gateways["g1"].is_connected, timeout_s=10
        )
        (shown,) = await served.call("exports")
        assert shown.state == "offline"

        task = asyncio.create_task(run_gateway_on(core, settings))
        assert await served.conductor.wait_for(
            lambda view: (
                view.gateways["g1"].is_connected
                and [list(gateway.volumes) for gateway in core.gateways[1:]] == [[made.id]]
            ),
            timeout_s=10,
        )
        await served.call("delete_export", "v1")
        assert core.gateways[1].volumes == {}
        await stop(task)


async def test_a_list_of_exports_that_takes_several_messages_is_offered_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pureflash.model.messages.EXPORTS_BYTES_MAX", 1)
    async with serving(tmp_path) as served, served.store(1):
        core = FakeCore()
        settings = gateway_settings(tmp_path, served.address)
        task = asyncio.create_task(run_gateway_on(core, settings))
        assert await served.conductor.wait_for(lambda view: bool(view.gateways), timeout_s=10)
        made = []
        for name in ("v1", "v2", "v3"):
            await served.call("create_volume", CreateVolume(name=name, size_bytes=GIB))
            made.append(await served.call("create_export", CreateExport(kind="nbd", volume=name)))
        assert [export.state for export in await served.call("exports")] == ["ready"] * 3
        assert sorted(core.gateways[0].volumes) == [export.id for export in made]
        await served.call("delete_export", "v2")
        assert sorted(core.gateways[0].volumes) == [made[0].id, made[2].id]
        await stop(task)


async def test_a_gateway_offers_what_it_offered_while_no_conductor_is_there(
    tmp_path: Path,
) -> None:
    core = FakeCore()
    async with serving(tmp_path) as served, served.store(1):
        await served.call("create_volume", CreateVolume(name="v1", size_bytes=GIB))
        settings = gateway_settings(tmp_path, served.address)
        task = asyncio.create_task(run_gateway_on(core, settings))
        assert await served.conductor.wait_for(lambda view: bool(view.gateways), timeout_s=10)
        await served.call("create_export", CreateExport(kind="nbd", volume="v1"))
        await stop(task)
    (tmp_path / "g1.ready").unlink()
    task = asyncio.create_task(run_gateway_on(core, settings))
    async with asyncio.timeout(10):
        while not (tmp_path / "g1.ready").exists():
            await asyncio.sleep(0)  # lets the gateway run; it announces itself when it listens
    assert [spec["size_bytes"] for spec in core.gateways[1].volumes.values()] == [GIB]
    await stop(task)
