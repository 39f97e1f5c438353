"""The store process: settings, disks, node, agent, and an ordered stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from pureflash.model.domain import Disk
from pureflash.model.layout import allegiance_file
from pureflash.model.settings import Settings
from pureflash.process.allegiance import Allegiance
from pureflash.process.lifecycle import announce, next_incarnation, stop_event
from pureflash.process.link import AgentLink
from pureflash.process.logs import JsonLog, Log
from pureflash.process.net import check_loopback, split_address
from pureflash.process.secrets import read_key, read_token
from pureflash.store.agent import StoreAgent, StoreFacts
from pureflash.store.core import StoreCore, StoreNode, load_core
from pureflash.store.damage import LOOK_S as DAMAGE_LOOK_S
from pureflash.store.damage import damage_in
from pureflash.store.disks import DISK_FAILED, DiskWatch, Probe, prepare_disks
from pureflash.store.host_space import LOOK_S, HostSpace


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
    probe = Probe(core, settings.text("cluster.id"), data, name)
    disks = prepare_disks(probe, settings, log)
    incarnation = next_incarnation(data / "incarnation", wall_ms=time.time_ns() // 1_000_000)
    check_loopback(split_address(settings.text("node.listen"))[0])
    # Opening recovers the disks, which may take seconds: the loop has nothing else to do yet.
    node = core.StoreNode(
        store_id=settings.number("node.number"),
        incarnation=incarnation,
        cluster_id=bytes.fromhex(settings.text("cluster.id")),
        cluster_key=read_key(Path(settings.text("node.key_file"))),
        listen=settings.text("node.listen"),
        disks=[one.for_core for one in disks],
    )
    try:
        facts = StoreFacts(
            cluster_id=settings.text("cluster.id"),
            store=settings.number("node.number"),
            name=name,
            incarnation=incarnation,
            address=settings.text("node.advertise") or node.address,
            disks=tuple(one.disk for one in disks),
            faults={one.disk.index: one.fault for one in disks if one.fault is not None},
        )
        log.info("store.started", f"incarnation {incarnation} at {facts.address}")
        _log_unopened(node, facts, log)

        def restart(reason: str) -> None:
            log.info("store.restarts", f"ending, to be started again: {reason}")
            stop.set()

        watch = DiskWatch(
            disks,
            fail=node.fail_disk,
            is_back=lambda index, path: isinstance(probe.look(index, path), Disk),
            restart=restart,
        )
        await _serve(node, facts, watch, settings, stop, log)
    finally:
        node.close()
        log.info("store.stopped", "stopped")
        log.close()


def _log_unopened(node: StoreNode, facts: StoreFacts, log: Log) -> None:
    """Tell of disks that looked well and could not be opened; of the others it was told before."""
    for index, disk in enumerate(node.stats()["disks"]):
        if disk["state"] == "failed" and index not in facts.faults:
            text = f"disk {index}: {disk['reason']}"
            log.warning("disk.failed", text, code=DISK_FAILED, disk=index)


async def _serve(
    node: StoreNode,
    facts: StoreFacts,
    watch: DiskWatch,
    settings: Settings,
    stop: asyncio.Event,
    log: Log,
) -> None:
    served = [disk for disk in facts.disks if disk.index not in facts.faults]
    paths = {disk.index: Path(disk.path) for disk in served}
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
    token = read_token(Path(settings.text("node.token_file")))
    link = AgentLink(
        address=settings.text("node.conductors"),
        token=token,
        owner=agent,
        log=log,
        allegiance=allegiance,
        cluster_id=facts.cluster_id,
    )
    loop = asyncio.get_running_loop()
    loop.add_reader(node.fileno(), agent.drain)
    announce(settings.path("node.ready"), incarnation=facts.incarnation, address=facts.address)
    try:
        await _until_one_ends(
            link.run(),
            stop.wait(),
            _repeat(watch.look, LOOK_S),
            _repeat(host.look, LOOK_S),
            _repeat(agent.look, DAMAGE_LOOK_S),
        )
    finally:
        loop.remove_reader(node.fileno())


async def _until_one_ends(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Run all until the first has ended, and end the others; its error is raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _repeat(look: Callable[[], object], every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        look()
