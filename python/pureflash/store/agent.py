"""The agent of a store: between the conductor's messages and the node's commands.

Theory of operation. A command of the conductor becomes one call of the node with a fresh request
id; the node's event with that id becomes the answer. The tables here say which question an id
belongs to; they are lost with the connection's owner, never needed across a restart. Heartbeats
carry the disks and totals each time, and the replicas whenever they differ from what was sent
last. Damaged blocks are told and kept by `damage.py`, which looks at the same replicas. What other
stores' PINGs say of the conductor goes into the allegiance with each heartbeat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import msgspec

from pureflash.errors import Code
from pureflash.model.conf import decode as decode_conf
from pureflash.model.conf import encode as encode_conf
from pureflash.model.domain import Disk
from pureflash.model.messages import (
    BATCH_MAX,
    Applied,
    CreateReplica,
    Dead,
    DeleteReplica,
    DiskLatency,
    DiskReport,
    Down,
    FetchConf,
    Heartbeat,
    Message,
    Proposal,
    Recall,
    Recalled,
    Refused,
    Registered,
    RegisterStore,
    ReplicaCommand,
    ReplicaReport,
    ReplicaTransition,
    ResizeReplica,
    ResyncReport,
    SetConf,
    SetExports,
    SetPeers,
    TransferPrimary,
    Verified,
    VerifyReplica,
)
from pureflash.process.allegiance import Allegiance, Known
from pureflash.process.logs import Log
from pureflash.store.core import StoreNode
from pureflash.store.damage import Damage, damage_in
from pureflash.store.disks import DISK_FAILED, Fault
from pureflash.store.latency import Meters

COMMANDS_MAX: Final = 4_096
"""Commands that wait for the node; the conductor sends more only after an answer or a reconnect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """What does not change while the process lives."""

    cluster_id: str
    store: int
    name: str
    incarnation: int
    address: str
    disks: tuple[Disk, ...]
    faults: Mapping[int, Fault] = field(default_factory=dict)
    """What was wrong at the start with disks that are not served."""


@dataclass(frozen=True, slots=True)
class _Question:
    command: ReplicaCommand
    send: Callable[[Message], None]


class StoreAgent:
    """An `AgentOwner` for one node."""

    def __init__(
        self,
        node: StoreNode,
        *,
        facts: StoreFacts,
        log: Log,
        held: Mapping[int, str] = MappingProxyType({}),
        allegiance: Allegiance | None = None,
        damage: Damage | None = None,
    ) -> None:
        """Speak for `node`; `held` are the disks that their host has no room for, and why.

        `damage` is where damaged blocks are told and kept; without it they are only logged.
        """
        self._damage = damage or damage_in(None, log)
        self._allegiance = allegiance or Allegiance()
        self._node = node
        self._held = held
        self._facts = facts
        self._log = log
        self._questions: dict[int, _Question] = {}
        self._next_request = 1
        self._sent_replicas: tuple[ReplicaReport, ...] | None = None
        self._send: Callable[[Message], None] | None = None
        self._term = 0
        self._meters = Meters()

    def registration(self) -> Message:
        """Tell everything."""
        facts = self._facts
        self._sent_replicas = self._replicas()
        known = self._listen()
        return RegisterStore(
            id=0,
            term=known.term,
            revision=known.revision,
            lineage=known.lineage,
            heard_term=known.heard_term,
            heard_revision=known.heard_revision,
            cluster_id=facts.cluster_id,
            store=facts.store,
            name=facts.name,
            incarnation=facts.incarnation,
            address=facts.address,
            disks=facts.disks,
            disk_reports=disk_reports(self._node.stats(), self._held, facts.faults),
            replicas=self._sent_replicas,
        )

    def heartbeat(self, term: int) -> Message:
        """Tell what changes."""
        stats = self._node.stats()
        latencies = self._meters.look(stats["disks"])
        replicas = self._replicas()
        is_same = replicas == self._sent_replicas
        self._sent_replicas = replicas
        known = self._listen()
        return Heartbeat(
            id=0,
            term=term,
            revision=known.revision,
            heard_term=known.heard_term,
            heard_revision=known.heard_revision,
            disk_reports=disk_reports(stats, self._held, self._facts.faults, latencies),
            replicas=None if is_same else replicas,
            counters={name: int(value) for name, value in stats["counters"].items()},
        )

    def led(self, known: Known) -> None:
        """Let the PINGs to other stores carry who leads."""
        self._node.set_conductor(known.term, known.lineage_number, known.revision)

    def _listen(self) -> Known:
        """Take in what other stores said of the conductor."""
        self._allegiance.heard(*self._node.heard_conductor())
        return self._allegiance.known

    def _recall(self, command: Recall, send: Callable[[Message], None]) -> None:
        """Tell every configuration that is followed here."""
        confs = [decode_conf(encoded) for encoded in self._node.confs()]
        starts = range(0, max(1, len(confs)), BATCH_MAX)
        for start in starts:
            part = tuple(confs[start : start + BATCH_MAX])
            is_last = start == starts[-1]
            send(Recalled(id=command.id, term=self._term, confs=part, is_last=is_last))

    def handle(self, command: Down, send: Callable[[Message], None]) -> None:
        """Pass a command on to the node."""
        if isinstance(command, Recall):
            self._recall(command, send)
            return
        self._send, self._term = send, command.term
        if isinstance(command, SetPeers):
            peers = [(peer.store, peer.incarnation, peer.address) for peer in command.peers]
            self._node.set_peers(peers)
            return
        if isinstance(command, Dead):
            self._node.dead(command.store, command.incarnation)
            return
        if isinstance(command, Registered):
            return
        if isinstance(command, SetExports | Refused):
            self._log.error("agent.misled", f"a store was sent {type(command).__name__}")
            return
        if len(self._questions) >= COMMANDS_MAX:
            text = f"{COMMANDS_MAX} commands are waiting"
            send(Applied(id=command.id, term=command.term, code=int(Code.BUSY), message=text))
            return
        request = self._next_request
        self._next_request += 1
        self._questions[request] = _Question(command, send)
        self._ask(request, command)

    def _ask(self, request: int, command: ReplicaCommand) -> None:
        match command:
            case CreateReplica():
                self._node.create_replica(
                    request,
                    command.volume_id,
                    command.index,
                    command.copy,
                    command.size_bytes,
                    command.disk,
                    encode_conf(command.conf),
                )
            case DeleteReplica():
                self._node.delete_replica(request, command.volume_id, command.index)
            case ResizeReplica():
                self._node.resize_replica(
                    request, command.volume_id, command.index, command.size_bytes
                )
            case VerifyReplica():
                self._node.verify_replica(
                    request, command.volume_id, command.index, command.is_repairing
                )
            case TransferPrimary():
                self._node.transfer_primary(request, command.volume_id, command.index, command.to)
            case SetConf():
                self._node.set_conf(
                    request, command.volume_id, command.index, encode_conf(command.conf)
                )

    def drain(self) -> None:
        """Take the node's events; called when its eventfd is readable."""
        for event in self._node.drain():
            match event:
                case ("done", int(request), _):
                    self._answer(request, code=int(Code.OK), message="")
                case ("failed", int(request), int(code), str(message)):
                    self._answer(request, code=code, message=message)
                case ("verified", request, regions, copies, different, unreadable, mended):
                    question = self._questions.pop(request)
                    question.send(
                        Verified(
                            id=question.command.id,
                            term=question.command.term,
                            regions=regions,
                            copies=copies,
                            different=tuple(different),
                            unreadable=tuple(unreadable),
                            mended_blocks=mended,
                        )
                    )
                case ("proposal", int(volume_id), int(index), int(epoch), dict(transition)):
                    wanted = msgspec.convert(transition, ReplicaTransition)
                    self._say(
                        Proposal(
                            id=0,
                            term=self._term,
                            volume_id=volume_id,
                            index=index,
                            epoch=epoch,
                            transition=wanted,
                        )
                    )
                case ("fetch_conf", int(volume_id), int(index), int(newer_than)):
                    self._say(
                        FetchConf(
                            id=0,
                            term=self._term,
                            volume_id=volume_id,
                            index=index,
                            newer_than=newer_than,
                        )
                    )
                case ("disk_failed", int(index), str(message)):
                    self._log.warning(
                        "disk.failed", f"disk {index}: {message}", code="DISK_FAILED", disk=index
                    )
                case _:
                    raise AssertionError(f"the node has no event {event!r}")

    def _say(self, message: Message) -> None:
        """Send what a replica asks for; it asks again while there is no connection."""
        if self._send is not None:
            self._send(message)

    def _answer(self, request: int, *, code: int, message: str) -> None:
        question = self._questions.pop(request)
        command = question.command
        key = (command.volume_id, command.index)
        found = (report for report in self._replicas() if (report.volume_id, report.index) == key)
        replica = next(found, None) if code == Code.OK else None
        question.send(
            Applied(id=command.id, term=command.term, code=code, message=message, replica=replica)
        )
        self._log.info(
            "replica.command",
            f"{type(command).__name__}: {message or 'done'}",
            volume=command.volume_id,
            shard=command.index,
        )

    def _replicas(self) -> tuple[ReplicaReport, ...]:
        return tuple(self._report(found) for found in self.look())

    def look(self) -> Sequence[Mapping[str, Any]]:
        """Look at the node's replicas, also while no conductor asks: damage is told and kept."""
        replicas = self._node.replicas()
        self._damage.look(replicas)
        return replicas

    def check_kept_damage(self) -> None:
        """Let the node read the blocks again that were damaged before the start."""
        for volume_id, index, runs in self._damage.to_check():
            self._node.check_blocks(volume_id, index, runs)

    def _report(self, found: Mapping[str, Any]) -> ReplicaReport:
        since = self._damage.since_ms(found["volume_id"], found["index"])
        return replica_report(found, damaged_since_ms=since)


def replica_report(found: Mapping[str, Any], *, damaged_since_ms: int = 0) -> ReplicaReport:
    """Turn one of `StoreNode.replicas()` into a report."""
    return ReplicaReport(
        volume_id=found["volume_id"],
        index=found["index"],
        copy=found["copy"],
        size_bytes=found["size_bytes"],
        epoch=found["epoch"],
        disk=found["disk"],
        used_bytes=found.get("used_bytes"),
        promised=found["promised"],
        complete_seq=found["complete_seq"],
        applied_seq=found["applied_seq"],
        role=found["role"],
        resyncs=tuple(ResyncReport(**resync) for resync in found["resyncs"]),
        verifying=found.get("verifying"),
        damaged=tuple(found["damaged"]),
        damaged_blocks=found["damaged_blocks"],
        lost=tuple(found["lost"]),
        lost_blocks=found["lost_blocks"],
        damaged_since_ms=damaged_since_ms,
    )


def disk_reports(
    stats: Mapping[str, Any],
    held: Mapping[int, str],
    faults: Mapping[int, Fault],
    latencies: Mapping[int, DiskLatency] = MappingProxyType({}),
) -> tuple[DiskReport, ...]:
    """Turn the disks of `StoreNode.stats()` into reports.

    `held` says of disks why they may not grow, `faults` what was wrong with them at the start.
    """
    return tuple(
        _disk_report(index, disk, held.get(index, ""), faults.get(index), latencies.get(index))
        for index, disk in enumerate(stats["disks"])
    )


def _disk_report(
    index: int,
    disk: Mapping[str, Any],
    held: str,
    fault: Fault | None,
    latency: DiskLatency | None,
) -> DiskReport:
    code = ""
    if disk["state"] == "failed":
        code = fault.code if fault else DISK_FAILED
    elif disk["reason"]:
        code = "DISK_HANGS"
    elif held:
        code = "DISK_FULL"
    return DiskReport(
        index=index,
        state=disk["state"],
        reason=disk["reason"] or held,
        code=code,
        next_step=fault.next_step if fault else "",
        engine=disk["engine"],
        engine_reason=disk.get("engine_reason") or "",
        bytes_total=disk["bytes_total"],
        bytes_free=disk["bytes_free"],
        bad_slots=disk.get("bad_slots", 0),
        latency=latency,
    )
