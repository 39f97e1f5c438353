"""The store process: settings, disks, node, agent, and an ordered stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pureflash.errors import CallerError, ClusterError, Code, PureFlashError, from_code
from pureflash.model.domain import Disk
from pureflash.model.layout import allegiance_file
from pureflash.model.settings import DiskSetting, Settings
from pureflash.process.allegiance import Allegiance
from pureflash.process.lifecycle import announce, next_incarnation, stop_event
from pureflash.process.link import AgentLink
from pureflash.process.logs import JsonLog, Log
from pureflash.process.net import check_loopback, split_address
from pureflash.process.secrets import read_key
from pureflash.store import known_disks
from pureflash.store.agent import StoreAgent, StoreFacts
from pureflash.store.core import StoreCore, StoreNode, load_core
from pureflash.store.damage import LOOK_S as DAMAGE_LOOK_S
from pureflash.store.damage import damage_in
from pureflash.store.host_space import LOOK_S, HostSpace

DISK_STEP: Final = (
    "nothing was written to it; put the disk of this store back at this path, and see"
    " `pf disk inspect` for what is there now"
)
"""After a disk that cannot be read: never to make a new one in its place, that would lose it."""


async def run_store(settings: Settings) -> None:
    """Run a store until TERM; errors of the start are raised."""
    await run_store_on(load_core(), settings)


async def run_store_on(core: StoreCore, settings: Settings) -> None:
    """Run a store on a core: the real one, or a fake that tests give."""
    name = settings.text("node.id")
    log = JsonLog(name, settings.path("log.file"), level=settings.text("log.level"))
    stop = stop_event()
    data = Path(settings.text("node.data"))
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    disks = prepare_disks(core, settings, log)
    incarnation = next_incarnation(data / "incarnation", wall_ms=time.time_ns() // 1_000_000)
    check_loopback(split_address(settings.text("node.listen"))[0])
    # Opening recovers the disks, which may take seconds: the loop has nothing else to do yet.
    node = core.StoreNode(
        store_id=settings.number("node.number"),
        incarnation=incarnation,
        cluster_id=bytes.fromhex(settings.text("cluster.id")),
        cluster_key=read_key(Path(settings.text("node.key_file"))),
        listen=settings.text("node.listen"),
        disks=[_core_disk(disk) for disk in settings.disks],
    )
    try:
        facts = StoreFacts(
            cluster_id=settings.text("cluster.id"),
            store=settings.number("node.number"),
            name=name,
            incarnation=incarnation,
            address=settings.text("node.advertise") or node.address,
            disks=disks,
        )
        log.info("store.started", f"incarnation {incarnation} at {facts.address}")
        await _serve(node, facts, settings, stop, log)
    finally:
        node.close()
        log.info("store.stopped", "stopped")
        log.close()


async def _serve(
    node: StoreNode, facts: StoreFacts, settings: Settings, stop: asyncio.Event, log: Log
) -> None:
    paths = {disk.index: Path(disk.path) for disk in facts.disks}
    host = HostSpace(paths, hold=node.hold_growth, log=log)
    host.look()
    allegiance = Allegiance(allegiance_file(Path(settings.text("node.data"))))
    agent = StoreAgent(
        node,
        facts=facts,
        log=log,
        held=host.held,
        allegiance=allegiance,
        damage=damage_in(Path(settings.text("node.data")), log),
    )
    agent.led(allegiance.known)
    agent.check_kept_damage()
    token = Path(settings.text("node.token_file")).read_text().strip()
    link = AgentLink(
        address=settings.text("node.conductors"),
        token=token,
        owner=agent,
        log=log,
        allegiance=allegiance,
    )
    loop = asyncio.get_running_loop()
    loop.add_reader(node.fileno(), agent.drain)
    coroutines = (
        link.run(),
        stop.wait(),
        _repeat(host.look, LOOK_S),
        _repeat(agent.look, DAMAGE_LOOK_S),
    )
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        announce(settings.path("node.ready"), incarnation=facts.incarnation, address=facts.address)
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        loop.remove_reader(node.fileno())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _repeat(look: Callable[[], object], every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        look()


def prepare_disks(core: StoreCore, settings: Settings, log: Log) -> tuple[Disk, ...]:
    """Format the disks that never existed, and read what all of them are.

    Errors: CallerError INVALID without disks or with one that has no size and does not exist;
    MediaError DISK_FAILED for one that existed before and does not now;
    ClusterError WRONG_CLUSTER for a disk of another cluster; what the core raises.
    """
    if not settings.disks:
        raise CallerError(Code.INVALID, "the settings name no [[disk]]")
    cluster_id = settings.text("cluster.id")
    data = Path(settings.text("node.data"))
    disks: list[Disk] = []
    for index, wanted in enumerate(settings.disks):
        if not wanted.path.exists():
            name = settings.text("node.id")
            known_disks.check_new(data, index=index, path=wanted.path, name=name)
            _format(core, wanted, cluster_id)
            log.info("disk.formatted", str(wanted.path), disk=index)
        try:
            found = core.inspect_disk(str(wanted.path))
        except PureFlashError as problem:
            raise from_code(problem.code, problem.message, next_step=DISK_STEP) from problem
        if found["cluster_id"] != cluster_id:
            raise ClusterError(
                Code.WRONG_CLUSTER,
                f"{wanted.path} belongs to cluster {found['cluster_id']}",
                next_step="name the disk of this cluster, or give it back to its own",
            )
        disks.append(
            Disk(
                index=index,
                path=str(wanted.path),
                disk_uuid=found["disk_uuid"],
                format_uuid=found["format_uuid"],
                size_bytes=found["size_bytes"],
            )
        )
    for disk in disks:
        known_disks.remember(data, disk)
    return tuple(disks)


def _format(core: StoreCore, wanted: DiskSetting, cluster_id: str) -> None:
    if wanted.size_bytes is None:
        raise CallerError(
            Code.INVALID,
            f"{wanted.path} does not exist and its [[disk]] has no size",
            next_step="give it a size such as 10G, or correct the path",
        )
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    core.format_disk(
        str(wanted.path),
        size_bytes=wanted.size_bytes,
        cluster_id=bytes.fromhex(cluster_id),
        journal_bytes=wanted.journal_bytes,
        durability=wanted.durability,
    )


def _core_disk(disk: DiskSetting) -> dict[str, Any]:
    return {"path": str(disk.path), "engine": disk.engine, "durability": disk.durability}
