"""What agents told, kept for the planner; lost with the process and told again by the agents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from pureflash.conductor import detector
from pureflash.conductor.agents import Session
from pureflash.conductor.pace import Pace
from pureflash.conductor.tell import Tell
from pureflash.conductor.view import (
    Asked,
    Failure,
    GatewayObservation,
    ShardKey,
    StoreObservation,
    View,
)
from pureflash.errors import Code
from pureflash.model.domain import ShardConf, StoreEvent, next_store_state
from pureflash.model.messages import (
    Applied,
    ExportsApplied,
    Heartbeat,
    Proposal,
    RegisterStore,
    ReplicaReport,
    Verified,
)

RETRY_FIRST_MS: Final = 1_000
RETRY_LAST_MS: Final = 30_000
PROPOSALS_MAX: Final = 10_000
"""Proposals that wait for one plan; a replica repeats what was dropped."""


class Observations:
    """Tables that `View` reads; every method takes one piece of news in."""

    def __init__(self) -> None:
        self.stores: dict[int, StoreObservation] = {}
        self.gateways: dict[str, GatewayObservation] = {}
        self.failures: dict[tuple[int, int, int], Failure] = {}
        self.proposals: list[Asked] = []
        self.backoffs: dict[tuple[int, int, int], int] = {}
        self.verified: dict[tuple[int, int], Verified] = {}
        self.changed_ms: dict[ShardKey, int] = {}
        self.transferred_ms: int | None = None
        self.paces: dict[str, Pace] = {}
        self._given_up: dict[tuple[int, int, int], int] = {}

    def register_store(self, message: RegisterStore, *, now_ms: int) -> None:
        """Begin anew with a store that told everything it has."""
        before = self.stores.get(message.store, StoreObservation())
        self.stores[message.store] = StoreObservation(
            state=next_store_state(before.state, StoreEvent.REGISTERED),
            cause="",
            heard_at_ms=now_ms,
            registered_at_ms=now_ms,
            disks={report.index: report for report in message.disk_reports},
            replicas=_by_shard(message.replicas),
        )
        for key in [key for key in self.failures if key[0] == message.store]:
            del self.failures[key]

    def register_gateway(self, name: str, *, now_ms: int) -> None:
        """Begin anew with a gateway."""
        self.gateways[name] = GatewayObservation(is_connected=True, heard_at_ms=now_ms)

    def gateway_left(self, name: str) -> None:
        """Take note that a gateway's connection ended."""
        self.gateways[name] = replace(self.gateways[name], is_connected=False)

    def heartbeat(self, session: Session, message: Heartbeat, *, now_ms: int) -> None:
        """Take a heartbeat in; absent lists mean "as before"."""
        if session.store is not None:
            heard = detector.hear(self.stores[session.store], now_ms=now_ms)
            disks = {report.index: report for report in message.disk_reports}
            replicas = message.replicas
            self.stores[session.store] = replace(
                heard,
                disks=disks or heard.disks,
                replicas=heard.replicas if replicas is None else _by_shard(replicas),
                counters=message.counters,
            )
        elif session.gateway is not None:
            self.gateways[session.gateway] = replace(
                self.gateways[session.gateway],
                heard_at_ms=now_ms,
                connections=message.connections,
                counters=message.counters,
            )

    def exports(self, gateway: str, message: ExportsApplied) -> None:
        """Take in how a gateway's exports are."""
        reports = {report.id: report for report in message.reports}
        before = self.gateways[gateway]
        answered = max(before.answered, message.id)
        self.gateways[gateway] = replace(before, exports=reports, answered=answered)

    def applied(self, tell: Tell, message: Applied, *, now_ms: int) -> Failure | None:
        """Take in the answer to a command; gives the failure if it is one."""
        command = tell.command
        key = (tell.store, command.volume_id, command.index)
        if message.code != Code.OK:
            attempts = self.failures[key].attempts + 1 if key in self.failures else 1
            delay_ms = min(RETRY_LAST_MS, RETRY_FIRST_MS << min(attempts - 1, 10))
            self.failures[key] = Failure(
                code=message.code,
                message=message.message,
                attempts=attempts,
                retry_at_ms=now_ms + delay_ms,
            )
            return self.failures[key]
        self.failures.pop(key, None)
        seen = self.stores[tell.store]
        replicas = dict(seen.replicas)
        if message.replica is None:
            replicas.pop((command.volume_id, command.index), None)
        else:
            replicas[command.volume_id, command.index] = message.replica
        self.stores[tell.store] = replace(seen, replicas=replicas)
        return None

    def proposed(self, session: Session, message: Proposal) -> None:
        """Keep what a replica asks for until the next plan."""
        assert session.store is not None, "only stores have replicas"
        if len(self.proposals) < PROPOSALS_MAX:
            self.proposals.append(
                Asked(
                    store=session.store,
                    incarnation=session.incarnation,
                    volume_id=message.volume_id,
                    index=message.index,
                    epoch=message.epoch,
                    transition=message.transition,
                )
            )

    def configured(self, before: ShardConf, after: ShardConf, *, now_ms: int) -> None:
        """Take note of a stored configuration: learners that were given up wait, longer each time.

        One that was admitted may be tried at once the next time.
        """
        key = (after.volume_id, after.index)
        self.changed_ms[key] = now_ms
        for copy in before.learners:
            place = (*key, copy)
            if copy in after.isr:
                self._given_up.pop(place, None)
                self.backoffs.pop(place, None)
            elif copy not in after.learners:
                attempts = self._given_up.get(place, 0) + 1
                self._given_up[place] = attempts
                delay_ms = min(RETRY_LAST_MS, RETRY_FIRST_MS << min(attempts - 1, 10))
                self.backoffs[place] = now_ms + delay_ms

    def forget(self, gone: Iterable[ShardKey]) -> None:
        """Forget what is remembered of shards that are no more."""
        for key in gone:
            self.changed_ms.pop(key, None)

    def verify(self, tell: Tell | None, message: Verified, view: View) -> None:
        """Keep what a primary found, for every verification of its volume that is under way."""
        if tell is None:
            return  # an answer to a question of an earlier session
        command = tell.command
        self.failures.pop((tell.store, command.volume_id, command.index), None)
        running = {job.id for job in view.jobs.values() if not job.is_finished}
        for job in view.jobs.values():
            if job.id in running and job.volume_id == command.volume_id:
                self.verified[job.id, command.index] = message
        for place in [place for place in self.verified if place[0] not in running]:
            del self.verified[place]

    def watch(self, *, now_ms: int) -> Iterator[tuple[int, StoreObservation, StoreObservation]]:
        """Judge all silences; gives (store, before, after) of those that changed."""
        for store_id, before in list(self.stores.items()):
            after = detector.watch(before, now_ms=now_ms)
            if after is not before:
                self.stores[store_id] = after
                yield store_id, before, after


def _by_shard(reports: tuple[ReplicaReport, ...]) -> dict[ShardKey, ReplicaReport]:
    return {(report.volume_id, report.index): report for report in reports}
