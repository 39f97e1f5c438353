"""A conductor with simulated stores on a manual clock: the control plane without any I/O.

`pump` lets the conductor reconcile and the stores answer until nothing moves. Stores keep their
replicas over restarts of themselves and of the conductor, as disks do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from tests.support.fake_core import role_in

from pureflash.conductor.agents import Session
from pureflash.conductor.service import Conductor
from pureflash.conductor.specs import Identity
from pureflash.errors import PureFlashError
from pureflash.metastore.memory import MemoryMetastore
from pureflash.metastore.records import Records
from pureflash.model.conf import Admit, Remove, Transfer
from pureflash.model.domain import Disk, ShardConf
from pureflash.model.messages import (
    Applied,
    CreateReplica,
    DeleteReplica,
    DiskLatency,
    DiskReport,
    ExportReport,
    ExportsApplied,
    Heartbeat,
    Proposal,
    Recall,
    Recalled,
    Refused,
    Registered,
    RegisterGateway,
    RegisterStore,
    ReplicaReport,
    ReplicaTransition,
    ResizeReplica,
    SetConf,
    SetExports,
    TransferPrimary,
    decode_down,
)
from pureflash.process.allegiance import Allegiance

T = TypeVar("T")
GIB = 1 << 30
CLUSTER = "ab" * 16
ROUNDS_MAX = 200
"""Rounds of one pump; more means that the world does not come to rest."""


@dataclass
class ManualClock:
    """A clock that tests move."""

    ms: int = 1_000

    def now_ms(self) -> int:
        return self.ms

    def wall_ms(self) -> int:
        return 1_700_000_000_000 + self.ms


RUNS_TOLD = 64
"""Runs of blocks that a store names of a replica; it counts the others too."""

REPLICA_COMMANDS = CreateReplica | DeleteReplica | ResizeReplica | SetConf | TransferPrimary


@dataclass
class ListLog:
    """A log that keeps its lines as (level, event, msg)."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)
    on_line: Callable[[str, str], None] | None = None

    def info(self, event: str, msg: str, **fields: object) -> None:
        self._add("INFO", event, f"{msg} {fields or ''}")

    def warning(self, event: str, msg: str, *, code: str, **fields: object) -> None:
        self._add("WARNING", event, f"{msg} {code} {fields or ''}")

    def error(self, event: str, msg: str, **fields: object) -> None:
        self._add("ERROR", event, f"{msg} {fields or ''}")

    def _add(self, level: str, event: str, text: str) -> None:
        self.lines.append((level, event, text))
        if self.on_line is not None:
            self.on_line(level, event)


@dataclass
class SimStore:
    """A store: one disk, replicas by (volume, index), each with the configuration it follows.

    A replica follows a newer configuration at once, and a primary proposes at once to admit its
    learners, as if there were nothing to copy.
    """

    id: int
    size_bytes: int = 10 * GIB
    incarnation: int = 1
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)
    confs: dict[tuple[int, int], ShardConf] = field(default_factory=dict)
    complete: dict[tuple[int, int], int] = field(default_factory=dict)
    handing_over: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    disk_uuid: str = ""
    disk_state: str = "ok"
    disk_code: str = ""
    """Health code of a disk that could not be opened: what is on it is not seen."""
    latency: DiskLatency | None = None
    is_frozen: bool = False
    session: Session | None = None
    refusal: tuple[int, str] | None = None
    told: list[object] = field(default_factory=list)
    allegiance: Allegiance = field(default_factory=Allegiance)
    damaged: dict[tuple[int, int], tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """Runs of blocks that a replica knows it cannot read."""
    lost: dict[tuple[int, int], tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """The same of which, as primary, it knows that nobody can."""

    def __post_init__(self) -> None:
        """Give it the first disk, unless a test has another."""
        self.disk_uuid = self.disk_uuid or f"{self.id:032x}"

    def registration(self) -> RegisterStore:
        disk = Disk(
            index=0,
            path="disk0.img",
            disk_uuid=self.disk_uuid,
            format_uuid=f"{self.id + 1000:032x}",
            size_bytes=self.size_bytes,
        )
        known = self.allegiance.known
        return RegisterStore(
            id=0,
            term=known.term,
            revision=known.revision,
            lineage=known.lineage,
            heard_term=known.heard_term,
            heard_revision=known.heard_revision,
            cluster_id=CLUSTER,
            store=self.id,
            name=f"s{self.id}",
            incarnation=self.incarnation,
            address=f"127.0.0.1:{7161 + self.id}",
            disks=(disk,),
            disk_reports=(self.report(),),
            replicas=tuple(self.replicas.values()),
        )

    def report(self) -> DiskReport:
        if self.disk_code:
            return DiskReport(
                index=0,
                state="failed",
                reason="it cannot be read",
                code=self.disk_code,
                next_step="bring it back",
                engine="none",
                bytes_total=0,
                bytes_free=0,
            )
        total = self.size_bytes
        return DiskReport(
            index=0,
            state=self.disk_state,
            reason="" if self.disk_state == "ok" else "a flush failed",
            engine="mem",
            bytes_total=total,
            bytes_free=total,
            latency=self.latency,
        )

    @property
    def replicas(self) -> dict[tuple[int, int], ReplicaReport]:
        """Give what the store would report."""
        return {} if self.disk_code else {key: self._report(key) for key in self.sizes}

    def _report(self, key: tuple[int, int]) -> ReplicaReport:
        conf = self.confs[key]
        copy = next(member.copy for member in conf.members if member.store == self.id)
        return ReplicaReport(
            volume_id=key[0],
            index=key[1],
            copy=copy,
            size_bytes=self.sizes[key],
            epoch=conf.epoch,
            promised=conf.epoch,
            complete_seq=self.complete.get(key, 0),
            role=role_in(conf, store=self.id, incarnation=self.incarnation),
            disk=0,
            used_bytes=0,
            damaged=self.damaged.get(key, ())[:RUNS_TOLD],
            damaged_blocks=sum(count for _, count in self.damaged.get(key, ())),
            damaged_since_ms=1_796_000_000_000 if self.damaged.get(key) else 0,
            lost=self.lost.get(key, ())[:RUNS_TOLD],
            lost_blocks=sum(count for _, count in self.lost.get(key, ())),
        )

    @property
    def is_up(self) -> bool:
        """Whether the process runs and is scheduled; only then anything comes from it."""
        return self.session is not None and not self.is_frozen

    def leads(self) -> list[ShardConf]:
        """Give the configurations of the shards that this store is the primary of."""
        return [
            conf
            for key, conf in sorted(self.confs.items())
            if not self.disk_code and self._report(key).role == "active"
        ]

    def carry_out(self, command: object) -> Applied:
        self.told.append(command)
        assert isinstance(command, REPLICA_COMMANDS)
        if self.refusal is not None:
            code, message = self.refusal
            return Applied(id=command.id, term=command.term, code=code, message=message)
        key = (command.volume_id, command.index)
        match command:
            case CreateReplica():
                assert command.disk == self.disk_uuid, "it goes to a disk that the store has"
                assert not self.disk_code, "nothing is made on a disk that is not served"
                self.sizes.setdefault(key, command.size_bytes)
                self._follow(key, command.conf)
            case DeleteReplica():
                self.sizes.pop(key, None)
                self.confs.pop(key, None)
                self.complete.pop(key, None)
            case ResizeReplica():
                self.sizes[key] = command.size_bytes
            case SetConf():
                self._follow(key, command.conf)
            case TransferPrimary():
                self.handing_over[key] = (self.confs[key].epoch, command.to)
        replica = self.replicas.get(key)
        return Applied(id=command.id, term=command.term, code=0, replica=replica)

    def _follow(self, key: tuple[int, int], conf: ShardConf) -> None:
        if key not in self.confs or conf.epoch > self.confs[key].epoch:
            self.confs[key] = conf


class World:
    """One metastore, one conductor at a time, some stores, perhaps a gateway."""

    def __init__(
        self,
        *,
        stores: int = 3,
        overcommit_ratio: float = 1.0,
        balance_after_ms: int = 0,
        slow_disk_us: int = 0,
        metastore: MemoryMetastore | None = None,
        settle_timeout_s: float = 0,
        expected: Mapping[int, str] = MappingProxyType({}),
        gateways: tuple[str, ...] = (),
    ) -> None:
        self.expected, self.gateways = expected, gateways
        self.metastore = metastore or MemoryMetastore()
        self.clock = ManualClock()
        self.log = ListLog()
        self.stores = {number: SimStore(number) for number in range(1, stores + 1)}
        self.settle_timeout_s = settle_timeout_s
        self.gateway: Session | None = None
        self.offered: tuple[str, ...] = ()
        self.overcommit_ratio = overcommit_ratio
        self.balance_after_ms = balance_after_ms
        self.slow_disk_us = slow_disk_us
        self.conductor: Conductor

    async def start_conductor(self) -> Conductor:
        """Start a conductor on the metastore, as after a crash: all sessions are gone."""
        for store in self.stores.values():
            store.session = None
        self.gateway = None
        self.conductor = Conductor(
            Records(self.metastore),
            identity=Identity(
                cluster_id=CLUSTER,
                cluster_key=bytes(32),
                owner="c1",
                overcommit_ratio=self.overcommit_ratio,
                balance_after_ms=self.balance_after_ms,
                slow_disk_us=self.slow_disk_us,
                stores=self.expected,
                gateways=self.gateways,
                draw=lambda: 7,
            ),
            clock=self.clock,
            log=self.log,
            settle_timeout_s=self.settle_timeout_s,
        )
        await self.conductor.start()
        return self.conductor

    async def join(self, number: int) -> None:
        """Let a store connect and register."""
        store = self.stores[number]
        store.session = Session()
        await self.conductor.receive(store.session, store.registration())

    async def join_all(self) -> None:
        for number in self.stores:
            await self.join(number)

    async def meanwhile(self, request: Coroutine[object, object, T]) -> T:
        """Await a request while stores answer."""
        task = asyncio.create_task(request)
        for _ in range(ROUNDS_MAX):
            await self.pump()
            if task.done():
                break
            await asyncio.sleep(0)
        return await task

    async def join_gateway(self) -> None:
        self.gateway = Session()
        message = RegisterGateway(id=0, term=0, cluster_id=CLUSTER, gateway="g1", incarnation=1)
        await self.conductor.receive(self.gateway, message)

    async def beat(self, number: int) -> None:
        store = self.stores[number]
        assert store.session is not None
        beat = Heartbeat(
            id=0,
            term=self.conductor.term,
            heard_term=store.allegiance.known.heard_term,
            heard_revision=store.allegiance.known.heard_revision,
            disk_reports=(store.report(),),
            replicas=tuple(store.replicas.values()),
        )
        await self.conductor.receive(store.session, beat)

    async def pump(self) -> None:
        """Reconcile and answer until nothing moves."""
        proposed: set[tuple[int, int, int]] = set()
        for _ in range(ROUNDS_MAX):
            await self.conductor.reconcile()
            has_moved = await self._answer_all()
            if not await self._propose_all(proposed) and not has_moved:
                return
        raise AssertionError("the world does not come to rest")

    async def _propose_all(self, proposed: set[tuple[int, int, int]]) -> bool:
        """Let primaries propose what they see among their peers, once per epoch."""
        has_moved = False
        for store in self.stores.values():
            for conf in store.leads() if store.is_up else ():
                place = (conf.volume_id, conf.index, conf.epoch)
                wish = self.wish_of(store, conf)
                if place not in proposed and wish is not None:
                    proposed.add(place)
                    has_moved = True
                    await self.propose(store, conf, wish)
        return has_moved

    def wish_of(self, primary: SimStore, conf: ShardConf) -> Admit | Remove | Transfer | None:
        """Say what a primary wants: T1 of the silent, T4 of who follows it, T5 if it was asked."""
        for member in conf.members:
            store = self.stores[member.store]
            is_there = store.is_up and store.incarnation == member.incarnation
            if member.copy in conf.isr and store is not primary and not is_there:
                return Remove(copy=member.copy)
            key = (conf.volume_id, conf.index)
            if member.copy in conf.learners and is_there and store.confs.get(key) == conf:
                return Admit(copy=member.copy, incarnation=member.incarnation)
        epoch, to = primary.handing_over.get((conf.volume_id, conf.index), (0, 0))
        return Transfer(copy=to) if epoch == conf.epoch else None

    async def propose(self, store: SimStore, conf: ShardConf, wish: ReplicaTransition) -> None:
        """Let the replica on `store` propose for the configuration that it follows."""
        assert store.session is not None
        message = Proposal(
            id=0,
            term=self.conductor.term,
            volume_id=conf.volume_id,
            index=conf.index,
            epoch=conf.epoch,
            transition=wish,
        )
        await self.conductor.receive(store.session, message)

    async def _answer_all(self) -> bool:
        has_moved = False
        for store in self.stores.values():
            session = store.session if not store.is_frozen else None
            while session is not None and not session.outbox.empty():
                frame = session.outbox.get_nowait()
                if frame is None:
                    store.session = None
                    break
                command = decode_down(frame)
                if isinstance(command, Registered):
                    store.allegiance.check(command)
                if not isinstance(command, Recall | Refused):
                    assert command.term >= store.allegiance.least_term, "no older one leads"
                    store.allegiance.note(command)
                if isinstance(command, REPLICA_COMMANDS):
                    has_moved = True
                    await self.conductor.receive(session, store.carry_out(command))
                elif isinstance(command, Recall):
                    has_moved = True
                    held = () if store.disk_code else tuple(store.confs.values())
                    answer = Recalled(id=command.id, term=0, confs=held, is_last=True)
                    await self.conductor.receive(session, answer)
        while self.gateway is not None and not self.gateway.outbox.empty():
            frame = self.gateway.outbox.get_nowait()
            offer = decode_down(frame) if frame else None
            if isinstance(offer, SetExports):
                has_moved = True
                await self._offer(offer)
        return has_moved

    async def _offer(self, command: SetExports) -> None:
        self.offered = tuple(export.name for export in command.exports)
        reports = tuple(
            ExportReport(id=export.id, is_ready=True, uri=f"nbd://{export.name}", reason="")
            for export in command.exports
        )
        assert self.gateway is not None
        answer = ExportsApplied(id=command.id, term=command.term, reports=reports)
        await self.conductor.receive(self.gateway, answer)

    def held(self) -> set[tuple[int, int]]:
        """Give the shards that any store holds a replica of."""
        return {key for store in self.stores.values() for key in store.sizes}

    def check_rest(self) -> None:
        """Assert what is true whenever the world has come to rest with all stores online."""
        view = self.conductor.view()
        assert {claim.volume_id for claim in view.names.values()} == set(view.volumes)
        assert all(view.volumes[c.volume_id].name == name for name, c in view.names.items())
        wanted = {
            (volume.id, index)
            for volume in view.volumes.values()
            for index in range(volume.shard_count)
        }
        assert set(view.shards) == wanted == self.held()
        for key, conf in view.shards.items():
            volume = view.volumes[key[0]]
            assert len(conf.members) == len(conf.isr) == conf.rf == volume.replicas
            for member in conf.members:
                store = self.stores[member.store]
                assert member.incarnation == store.incarnation
                assert store.confs[key] == conf
                assert store.sizes[key] == volume.shard_bytes(key[1])
        assert all(job.is_finished for job in view.jobs.values())
        assert all(export.volume_id in view.volumes for export in view.exports.values())


async def attempt(request: Awaitable[object]) -> PureFlashError | None:
    """Await a request; gives the error that a user would see."""
    try:
        await request
    except PureFlashError as error:
        return error
    return None


def run(story: Coroutine[object, object, None]) -> None:
    """Run a story on a fresh event loop."""
    asyncio.run(story)
