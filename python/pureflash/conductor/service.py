"""The conductor at work: owns the records and the agents' sessions, and carries plans out.

Theory of operation. One task reconciles: whenever something was learned (`kick`), and every
`TICK_MS` for the detector, it makes a view, plans, writes, tells, and repeats until a plan has no
writes left. Every write to the metastore happens under one lock, so a request and the reconciler
never plan from the same view at once. A request writes the least that makes its wish durable, kicks
the reconciler, and waits for what it wants to see in the view, with a bound.

What is only here (observations, sessions, commands in flight, failures) may be lost at any point:
the agents connect again and tell everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from pureflash.conductor import detector, planner, requests, states
from pureflash.conductor.agents import Session, Sessions
from pureflash.conductor.attaching import Attaching
from pureflash.conductor.data_watch import DataWatch
from pureflash.conductor.disks import DiskWatch
from pureflash.conductor.events import EventLog
from pureflash.conductor.forcing import Forcing
from pureflash.conductor.observations import Observations
from pureflash.conductor.planner import Offer
from pureflash.conductor.recovering import Recovering
from pureflash.conductor.specs import TICKET_S, Clock, Identity, Specs, peers_of, store_of
from pureflash.conductor.standing import lost_memory, store_name
from pureflash.conductor.tell import Tell
from pureflash.conductor.view import View
from pureflash.conductor.writer import Writer
from pureflash.errors import ClusterError, Code, SecurityError
from pureflash.metastore import keys
from pureflash.metastore.lease import Lead, Term, take_leadership
from pureflash.metastore.records import Records, Write
from pureflash.model.domain import (
    Cluster,
    Export,
    HealthState,
    Job,
    JobState,
    NameClaim,
    Store,
    StoreState,
    Volume,
)
from pureflash.model.messages import (
    Applied,
    Dead,
    ExportsApplied,
    FetchConf,
    Heartbeat,
    Proposal,
    Recalled,
    Registered,
    RegisterGateway,
    RegisterStore,
    SetConf,
    SetPeers,
    TransferPrimary,
    Up,
    Verified,
    set_exports,
)
from pureflash.process.logs import Log

TICK_MS: Final = 250
PASSES_MAX: Final = 64
"""Plans in one reconciliation; more means that two rules undo one another."""
SETTLE_TIMEOUT_S: Final = 10.0
"""How long a request waits for the stores before it answers with what is so far."""


class Conductor:
    """See the module's head. `start` before anything else; all methods run on one event loop."""

    def __init__(
        self,
        records: Records,
        *,
        identity: Identity,
        clock: Clock,
        log: Log,
        settle_timeout_s: float = SETTLE_TIMEOUT_S,
    ) -> None:
        """Take empty records, which `start` loads; 0 for `settle_timeout_s`: never wait."""
        self._settle_timeout_s = settle_timeout_s
        self.records = records
        self.events = EventLog()
        self.observations = Observations()
        self._disks = DiskWatch(
            self.observations, self.events, log=log, floor_us=identity.slow_disk_us
        )
        self._data = DataWatch(self.events, log=log)
        self._identity = identity
        self._clock = clock
        self._log = log
        self._reign = Term(0)
        self._sessions = Sessions(lambda: (self.term, records.revision))
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._news = asyncio.Condition()
        self._lead = Lead(records.metastore, owner=identity.owner)
        self._writer = Writer(records, self.observations, self.events, clock=clock, log=log)
        own: Any = {"view": self.view, "lock": self._lock, "writer": self._writer}
        self.forcing = Forcing(**own, end_store=self.store_exited, kick=self.kick)
        self.attaching = Attaching(
            **own, settled=self._settled, specs=self._specs, draw=identity.draw
        )
        self.recovering = Recovering(
            **own,
            records=records,
            sessions=self._sessions,
            expected=identity.stores,
            wait_for=self._settled,
            begin=self._begin_reign,
        )
        self._started_ms = clock.now_ms()
        self._trouble = ""

    @property
    def term(self) -> int:
        """The term of this conductor; 0 before it leads."""
        return self._reign.term

    async def start(self) -> None:
        """Take the lead and read the records; makes the cluster's record the first time.

        Errors: ClusterError UNAVAILABLE while another conductor leads, WRONG_CLUSTER when the
        metastore belongs to another cluster.
        """
        store, wall_ms = self.records.metastore, self._clock.wall_ms()
        reign = await take_leadership(store, owner=self._identity.owner, now_ms=wall_ms)
        if reign is None:
            raise ClusterError(Code.UNAVAILABLE, "another conductor leads")
        self._begin_reign(reign)
        await self.records.load()
        if self.records.cluster is None:
            first = Cluster(cluster_id=self._identity.cluster_id, next_id=1, created_at_ms=wall_ms)
            await self._writer.write([Write(keys.CLUSTER, first, "the first start")])
        assert self.records.cluster is not None, "written above"
        if self.records.cluster.cluster_id != self._identity.cluster_id:
            raise ClusterError(
                Code.WRONG_CLUSTER,
                f"the metastore belongs to cluster {self.records.cluster.cluster_id}",
            )

    def _begin_reign(self, reign: Term) -> None:
        self._reign = reign
        self._log.info("conductor.leads", f"leading term {reign.term}", term=reign.term)

    async def run(self) -> None:
        """Reconcile until cancelled."""
        while True:
            await self.reconcile()
            try:
                async with asyncio.timeout(TICK_MS / 1000):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    def kick(self) -> None:
        """Let the reconciler look again."""
        self._wake.set()

    def view(self) -> View:
        """Read the world as it is now."""
        records = self.records
        assert records.cluster is not None, "start() was called"
        return View(
            now_ms=self._clock.now_ms(),
            wall_ms=self._clock.wall_ms(),
            overcommit_ratio=self._identity.overcommit_ratio,
            cluster=records.cluster,
            stores=records.stores,
            volumes=records.volumes,
            names=records.names,
            shards=records.shards,
            exports=records.exports,
            jobs=records.jobs,
            observed=self.observations.stores,
            gateways=self.observations.gateways,
            in_flight=frozenset(
                tell.key for session in self._sessions for tell in session.in_flight.values()
            ),
            failures=self.observations.failures,
            proposals=tuple(self.observations.proposals),
            backoffs=self.observations.backoffs,
            verified=self.observations.verified,
            started_ms=self._started_ms,
            changed_ms=self.observations.changed_ms,
            transferred_ms=self.observations.transferred_ms,
            balance_after_ms=self._identity.balance_after_ms,
            amnesia=records.amnesia,
            expected_stores=self._identity.stores,
            expected_gateways=self._identity.gateways,
            differing=records.differing,
            paces=self.observations.paces,
        )

    def shown_stores(self) -> list[Store]:
        """Give the stores by id; in amnesia also those that only their connection tells of."""
        known = dict(self.records.stores)
        if self.records.amnesia is not None:
            for told in self.recovering.told.values():
                known.setdefault(told.store, store_of(told))
        return [known[number] for number in sorted(known)]

    async def reconcile(self) -> None:
        """Plan and act until there is nothing to write; a metastore that fails is tried later."""
        try:
            async with self._lock:
                now_ms, wall_ms = self._clock.now_ms(), self._clock.wall_ms()
                await self._lead.keep(now_ms=now_ms, wall_ms=wall_ms)
                self._watch_silence()
                self._disks.look(self.view())
                self._data.look(self.view())
                for _ in range(PASSES_MAX):
                    actions = planner.plan(self.view())  # nothing, in amnesia
                    writes = [action for action in actions if isinstance(action, Write)]
                    self._tell([action for action in actions if isinstance(action, Tell)])
                    self._offer([action for action in actions if isinstance(action, Offer)])
                    if not writes:
                        self.observations.proposals.clear()
                        break
                    await self._writer.write(writes)
                else:
                    self._log.error("planner.circle", f"{PASSES_MAX} plans without an end")
            self._trouble = ""
        except ClusterError as problem:
            if problem.message != self._trouble:  # once per trouble, not four times a second
                self._trouble = problem.message
                self._log.error("metastore.failed", str(problem))
        async with self._news:
            self._news.notify_all()

    async def wait_for(self, is_so: Callable[[View], bool], *, timeout_s: float) -> bool:
        """Wait until the view satisfies `is_so`; False when it did not in time."""
        async with self._news:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._news.wait_for(lambda: is_so(self.view()))
            except TimeoutError:
                return False
        return True

    # Requests of users.

    async def create_volume(
        self,
        *,
        name: str,
        size_bytes: int,
        replicas: int | None,
        shard_size_bytes: int | None,
        is_dry_run: bool = False,
    ) -> Volume:
        """Make a volume and wait until its stores have it; errors as `requests.new_volume`."""
        async with self._lock:
            view = self.view()
            if view.amnesia is not None:
                raise lost_memory(view.amnesia)
            volume = requests.new_volume(
                view,
                name=name,
                size_bytes=size_bytes,
                replicas=requests.default_replicas(view) if replicas is None else replicas,
                shard_size_bytes=shard_size_bytes,
            )
            if is_dry_run:
                return volume
            await self._writer.take_id()
            claim = NameClaim(volume_id=volume.id)
            # The name first: of two volumes that want it one must lose before it is stored.
            await self._writer.write_all([Write(keys.name(name), claim, "a request")])
            await self._writer.write_all([Write(keys.volume(volume.id), volume, "a request")])
        await self._settle(volume)
        return volume

    async def resize_volume(
        self, reference: str, *, size_bytes: int, if_version: int | None
    ) -> Volume:
        """Let a volume grow and wait for its stores; errors as `requests.resized`."""
        async with self._lock:
            view = self.view()
            volume = requests.find_volume(view, reference)
            grown = requests.resized(view, volume, size_bytes=size_bytes, if_version=if_version)
            if grown != volume:
                await self._writer.write_all([Write(keys.volume(volume.id), grown, "a request")])
        await self._settle(grown)
        return grown

    async def delete_volume(self, reference: str, *, if_version: int | None) -> Job:
        """Begin to delete a volume; gives the job, also when one is under way."""

        def make(view: View, volume: Volume) -> Job | None:
            return requests.delete_job(view, volume, if_version=if_version)

        job = await self._begin(reference, requests.DELETE_JOB, make)
        await self.wait_for(
            lambda view: view.jobs[job.id].state is not JobState.QUEUED,
            timeout_s=self._settle_timeout_s,
        )
        return self.records.jobs[job.id]

    async def verify_volume(self, reference: str, *, is_repairing: bool) -> Job:
        """Begin to compare all in-sync replicas; gives the job, also when one is under way.

        `is_repairing`: mend what cannot be read where another copy has it.
        """

        def make(view: View, volume: Volume) -> Job | None:
            return requests.verify_job(view, volume, is_repairing=is_repairing)

        return await self._begin(reference, requests.VERIFY_JOB, make)

    async def _begin(
        self, reference: str, kind: str, make: Callable[[View, Volume], Job | None]
    ) -> Job:
        """Store the job that `make` gives; without one, one of this kind is under way."""
        async with self._lock:
            view = self.view()
            volume = requests.find_volume(view, reference)
            job = make(view, volume)
            if job is None:
                return requests.running_job(view, volume, kind)
            await self._writer.take_id()
            await self._writer.write_all([Write(keys.job(job.id), job, "a request")])
        self.kick()
        return job

    async def create_export(
        self,
        *,
        kind: str,
        volume: str,
        transport: str,
        is_read_only: bool,
        gateway: str | None,
    ) -> tuple[int, bool]:
        """Make an export and wait for its gateway; gives its id and whether it is new."""

        def wanted(view: View) -> tuple[Export, bool]:
            export = requests.new_export(
                view,
                kind=kind,
                volume=requests.find_volume(view, volume),
                transport=transport,
                is_read_only=is_read_only,
                gateway=gateway,
            )
            return export, export.id not in view.exports

        export, is_new = wanted(self.view())
        if is_new and not is_read_only:
            await self.attaching.take_over(export.volume_id)
        async with self._lock:
            export, is_new = wanted(self.view())
            if is_new:
                await self._writer.take_id()
                await self._writer.write_all([Write(keys.export(export.id), export, "a request")])
        self.kick()
        await self.wait_for(
            lambda view: states.export_view(view, export).state in ("ready", "failed"),
            timeout_s=self._settle_timeout_s,
        )
        return export.id, is_new

    async def delete_export(self, export_id: int) -> None:
        """Forget an export and wait until its gateway, if connected, has taken it away."""
        async with self._lock:
            gateway = self.records.exports[export_id].gateway
            await self._writer.write_all([Write(keys.export(export_id), None, "a request")])
        self.kick()

        def is_gone(view: View) -> bool:
            seen, session = view.gateways.get(gateway), self._sessions.of(gateway)
            return seen is None or session is None or session.lacks(export_id, seen.answered)

        await self.wait_for(is_gone, timeout_s=self._settle_timeout_s)

    async def store_exited(
        self, store_id: int, *, incarnation: int, reason: str = "its process ended"
    ) -> None:
        """Believe a supervisor that this incarnation ended; an older one is no news.

        Stored before anybody is told: what was told to be over must not come back, not even to
        another conductor.
        """
        async with self._lock:
            store = self.records.stores.get(store_id)
            if store is None or incarnation <= max(store.exited, store.incarnation - 1):
                return
            ended = replace(store, exited=incarnation)
            await self._writer.write_all([Write(keys.store(store_id), ended, reason)])
        if store.incarnation != incarnation:
            return
        self._sessions.end(store_id)
        seen = self.view().observation(store_id)
        self.observations.stores[store_id] = detector.exited(seen)
        self.events.add(self._clock.wall_ms(), "store.exited", store.name, reason)
        self._sessions.to_stores(Dead(id=0, term=0, store=store_id, incarnation=incarnation))
        self.kick()

    # Agents.

    async def receive(self, session: Session, message: Up) -> None:
        """Take in one message of an agent.

        Errors: SecurityError and ClusterError for an agent that may not register; the caller
        answers with `Refused` and closes the connection.
        """
        if isinstance(message, RegisterStore):
            await self._register_store(session, message)
        elif isinstance(message, RegisterGateway):
            self._register_gateway(session, message)
        elif session.store is None and session.gateway is None:
            raise SecurityError(Code.UNAUTHENTICATED, "an agent must register first")
        elif isinstance(message, Heartbeat):
            self.observations.heartbeat(session, message, now_ms=self._clock.now_ms())
            if session.store is not None:
                await self.recovering.hear(self._reign.reigns, session.store, message)
        elif session.store is not None:
            self._hear_store(session, session.store, message)
        elif isinstance(message, ExportsApplied) and session.gateway is not None:
            self.observations.exports(session.gateway, message)
            self.kick()

    def _hear_store(self, session: Session, store: int, message: Up) -> None:
        """Take in what only stores say; anything else is ignored."""
        if isinstance(message, Applied):
            self._applied(session, message)
        elif isinstance(message, Verified):
            self.observations.verify(session.in_flight.pop(message.id, None), message, self.view())
        elif isinstance(message, Proposal):
            self.observations.proposed(session, message)
        elif isinstance(message, FetchConf):
            self._answer_fetch(session, message)
        elif isinstance(message, Recalled):
            self.recovering.recalled(store, message)
        self.kick()

    def disconnect(self, session: Session) -> None:
        """Forget a session; a store is then silent, a gateway is disconnected."""
        if not self._sessions.leave(session):
            return
        if session.gateway is not None:
            self.observations.gateway_left(session.gateway)
        self.kick()

    def close_sessions(self) -> None:
        """End all agents' connections; the process is about to stop."""
        for session in self._sessions:
            session.close()

    async def _register_store(self, session: Session, message: RegisterStore) -> None:
        requests.check_cluster(self._identity.cluster_id, message)
        async with self._lock:
            requests.check_given_up(self.view().cluster, message)
            if await self.recovering.is_amnesia(self._reign.reigns, message):
                self._enter_unled(session, message)
                return
            known = self.records.stores.get(message.store)
            requests.check_registration(known, message)
            store = store_of(message, exited=known.exited if known else 0)
            if store != known:
                await self._writer.write_all([Write(keys.store(store.id), store, "it registered")])
        self._enter_store(session, message)
        self._answer_registration(session)
        peers = peers_of(self.records.stores.values())
        self._sessions.to_stores(SetPeers(id=0, term=0, peers=peers))
        self._log.info("store.registered", f"{store.name} at {store.address}", store=store.id)

    def _enter_store(self, session: Session, message: RegisterStore) -> None:
        self._sessions.enter(message.store, session)
        session.store, session.incarnation = message.store, message.incarnation
        self.recovering.told[message.store] = message
        self.observations.register_store(message, now_ms=self._clock.now_ms())

    def _enter_unled(self, session: Session, message: RegisterStore) -> None:
        """Keep the connection of a store, in amnesia: it is asked and told nothing."""
        self._enter_store(session, message)
        self.recovering.ask()
        self._log.info("store.connected", f"{message.name}, which is not led", store=message.store)
        self.kick()

    def _register_gateway(self, session: Session, message: RegisterGateway) -> None:
        requests.check_cluster(self._identity.cluster_id, message)
        self._sessions.enter(message.gateway, session)
        session.gateway, session.incarnation = message.gateway, message.incarnation
        self.observations.register_gateway(message.gateway, now_ms=self._clock.now_ms())
        self._answer_registration(session)
        self._log.info("gateway.registered", message.gateway, gateway=message.gateway)

    def _answer_registration(self, session: Session) -> None:
        answer = Registered(
            id=0,
            term=0,
            lineage=self.records.metastore.lineage,
            predecessors=self.view().cluster.predecessors,
        )
        self._sessions.send(session, answer)
        self.kick()

    def _answer_fetch(self, session: Session, message: FetchConf) -> None:
        """Send a newer configuration, if there is one: only stored ones are ever seen."""
        conf = self.records.shards.get((message.volume_id, message.index))
        is_newer = conf is not None and conf.epoch > message.newer_than
        if conf is not None and is_newer and self.records.amnesia is None:
            place = {"volume_id": message.volume_id, "index": message.index}
            self._sessions.send(session, SetConf(id=0, term=0, conf=conf, **place))

    def _applied(self, session: Session, message: Applied) -> None:
        tell = session.in_flight.pop(message.id, None)
        if tell is None:
            return  # an answer to a question of an earlier session
        failure = self.observations.applied(tell, message, now_ms=self._clock.now_ms())
        if failure is not None:
            self._log.warning(
                "store.refused",
                f"{type(tell.command).__name__}: {failure.message}",
                code="VOLUME_PARKED",
                store=tell.store,
                volume=tell.command.volume_id,
                shard=tell.command.index,
            )

    # Carrying plans out.

    def _tell(self, tells: Sequence[Tell]) -> None:
        for tell in tells:
            session = self._sessions.of(tell.store)
            if session is None:
                continue  # its connection ended a moment ago; planned again when it is back
            command = tell.command
            if isinstance(command, TransferPrimary):
                self.observations.transferred_ms = self._clock.now_ms()
            session.in_flight[self._sessions.send(session, command)] = tell
            self._log.info(
                "store.told",
                f"{type(command).__name__}: {tell.reason}",
                store=tell.store,
                volume=command.volume_id,
                shard=command.index,
            )

    def _specs(self) -> Specs:
        return Specs(
            cluster_id=self._identity.cluster_id,
            cluster_key=self._identity.cluster_key,
            wall_ms=self._clock.wall_ms(),
        )

    def _offer(self, offers: Sequence[Offer]) -> None:
        for offer in offers:
            session = self._sessions.of(offer.gateway)
            # Tickets are made anew at half of their life, so none expires at a gateway.
            half_life = self._clock.wall_ms() // (TICKET_S * 500)
            if session is None or session.offered == (offer.plans, half_life):
                continue
            session.offered = (offer.plans, half_life)
            specs = self._specs()
            for part in set_exports([specs.export(plan) for plan in offer.plans]):
                session.offer_id = self._sessions.send(session, part)

    async def _settled(self, is_told: Callable[[View], bool]) -> None:
        self.kick()
        await self.wait_for(is_told, timeout_s=self._settle_timeout_s)

    async def _settle(self, volume: Volume) -> None:
        """Wait until every shard of a volume serves, or for `SETTLE_TIMEOUT_S`."""
        self.kick()
        await self.wait_for(
            lambda view: (
                volume.id not in view.volumes
                or states.volume_state(view, view.volumes[volume.id])[0] is HealthState.HEALTHY
            ),
            timeout_s=self._settle_timeout_s,
        )

    def _watch_silence(self) -> None:
        for store_id, before, after in self.observations.watch(now_ms=self._clock.now_ms()):
            name = store_name(self.view(), store_id)
            self.events.add(self._clock.wall_ms(), "store.changed", name, after.cause)
            self._log.warning(
                "store.silent",
                f"{name}: {before.state} -> {after.state}: {after.cause}",
                code=f"STORE_{after.state.upper()}",
                store=store_id,
            )
            if after.state is StoreState.OFFLINE:
                # A store that was only paused must register again and tell everything anew.
                self._sessions.end(store_id)
