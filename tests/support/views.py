"""Views for tests of pure planning: one shard of a volume, and how its stores are.

Copy c of the shard is on store c + 1, whose registered life is 10 x store + 1 until it is reborn.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

from pureflash.conductor.first_conf import MIN_WRITE
from pureflash.conductor.view import Asked, StoreObservation, View
from pureflash.model.domain import (
    GIB,
    Cluster,
    Disk,
    Export,
    ExportKind,
    Job,
    Member,
    ShardConf,
    Store,
    StoreState,
    Transport,
    Volume,
    VolumeIntent,
)
from pureflash.model.messages import DiskReport, ReplicaReport, ReplicaTransition, ResyncReport

KEY = (7, 0)
EPOCH = 5
NOW_MS = 100_000


def life_of(store: int) -> int:
    """Give the first life of a store."""
    return 10 * store + 1


def member(copy: int, life: int | None = None) -> Member:
    """Make the member `copy`, in a life of its store."""
    store = copy + 1
    return Member(
        copy=copy,
        store=store,
        incarnation=life_of(store) if life is None else life,
        disk=f"{store:032x}",
        format_uuid=f"{store + 100:032x}",
    )


@dataclass
class Situation:
    """A shard at epoch 5 with primary 0. Every method changes something and gives itself."""

    rf: int = 3
    isr: tuple[int, ...] = (0, 1, 2)
    learners: tuple[int, ...] = ()
    primary: int = 0
    intent: VolumeIntent = VolumeIntent.PRESENT
    now_ms: int = NOW_MS
    started_ms: int = 0
    lives: dict[int, int] = field(default_factory=dict)
    exited: dict[int, int] = field(default_factory=dict)
    writers: bool = False
    jobs: dict[int, Job] = field(default_factory=dict)
    seen: dict[int, StoreObservation] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    backoffs: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Let every store be online, with its replica following the configuration."""
        for copy in range(self.rf):
            role = "learner" if copy in self.learners else "out"
            role = "secondary" if copy in self.isr else role
            role = "active" if copy == self.primary else role
            self.lives[copy + 1] = life_of(copy + 1)
            self.seen[copy + 1] = StoreObservation(
                state=StoreState.ONLINE,
                cause="",
                heard_at_ms=self.now_ms,
                registered_at_ms=1_000,
                disks={0: disk_report()},
                replicas={KEY: report(copy, role=role)},
            )

    def change(self, store: int, **changes: Any) -> Self:
        """Change what is known of a store."""
        self.seen[store] = replace(self.seen[store], **changes)
        return self

    def tell(self, store: int, **changes: Any) -> Self:
        """Change what a store reports of its replica."""
        now = self.seen[store].replicas[KEY]
        return self.change(
            store, replicas={KEY: report(now.copy, **({"role": now.role} | changes))}
        )

    def suspected(self, *stores: int) -> Self:
        """Let stores be silent for a while."""
        for store in stores:
            self.change(store, state=StoreState.SUSPECTED, cause="silent for more than 2250 ms")
        return self

    def offline(self, *stores: int) -> Self:
        """Let stores be gone."""
        for store in stores:
            self.change(store, state=StoreState.OFFLINE, cause="its process ended")
        return self

    def ended(self, *stores: int) -> Self:
        """Let stores be gone, by the word of their supervisors."""
        for number in stores:
            self.exited[number] = self.lives[number]
        return self.offline(*stores)

    def exported(self) -> Self:
        """Let a gateway offer the volume for writing."""
        self.writers = True
        return self

    def export(self) -> Export:
        """Give that export."""
        return Export(
            id=8,
            kind=ExportKind.NBD,
            volume_id=KEY[0],
            gateway="g1",
            transport=Transport.UNIX,
            is_read_only=False,
            created_at_ms=0,
        )

    def unheard(self, store: int) -> Self:
        """Let a store not have registered since the conductor started."""
        self.seen[store] = StoreObservation()
        return self

    def reborn(self, *stores: int, waited_ms: int = 0) -> Self:
        """Let stores be back in a new life, which registered `waited_ms` ago."""
        for store in stores:
            self.lives[store] += 1
            self.change(store, registered_at_ms=self.now_ms - waited_ms)
        return self

    def failed_disk(self, store: int) -> Self:
        """Let the disk of a store have failed."""
        return self.change(store, disks={0: disk_report("failed")})

    def without_replica(self, store: int) -> Self:
        """Let a store not have the replica."""
        return self.change(store, replicas={})

    def asks(
        self,
        store: int,
        transition: ReplicaTransition,
        *,
        epoch: int = EPOCH,
        life: int | None = None,
    ) -> Self:
        """Let the replica on a store propose."""
        incarnation = life_of(store) if life is None else life
        self.asked.append(
            Asked(
                store=store,
                incarnation=incarnation,
                volume_id=KEY[0],
                index=KEY[1],
                epoch=epoch,
                transition=transition,
            )
        )
        return self

    def paused(self, copy: int, *, for_ms: int) -> Self:
        """Let a learner have been given up, to be tried again in `for_ms`."""
        self.backoffs[(*KEY, copy)] = self.now_ms + for_ms
        return self

    def conf(self) -> ShardConf:
        """Give the stored configuration."""
        return ShardConf(
            volume_id=KEY[0],
            index=KEY[1],
            epoch=EPOCH,
            rf=self.rf,
            min_write=MIN_WRITE[self.rf],
            primary=self.primary,
            isr=self.isr,
            learners=self.learners,
            members=tuple(member(copy) for copy in range(self.rf)),
            history_id=KEY[0],
            attach_epoch=1,
        )

    def volume(self) -> Volume:
        """Give the volume of the shard."""
        return Volume(
            id=KEY[0],
            name="v1",
            size_bytes=GIB,
            replicas=self.rf,
            shard_size_bytes=GIB,
            created_at_ms=0,
            intent=self.intent,
        )

    def view(self) -> View:
        """Give what a planner sees."""
        return View(
            now_ms=self.now_ms,
            wall_ms=0,
            overcommit_ratio=1.0,
            cluster=Cluster(cluster_id="ab" * 16, next_id=9, created_at_ms=0),
            stores={
                number: store(number, life, exited=self.exited.get(number, 0))
                for number, life in self.lives.items()
            },
            volumes={KEY[0]: self.volume()},
            names={},
            shards={KEY: self.conf()},
            exports={8: self.export()} if self.writers else {},
            jobs=self.jobs,
            observed=self.seen,
            gateways={},
            proposals=tuple(self.asked),
            backoffs=self.backoffs,
            started_ms=self.started_ms,
        )


def store(number: int, life: int, *, size_bytes: int = 10 * GIB, exited: int = 0) -> Store:
    """Make the registration of a store with one disk."""
    disk = Disk(
        index=0,
        path="disk0.img",
        disk_uuid=f"{number:032x}",
        format_uuid=f"{number + 100:032x}",
        size_bytes=size_bytes,
    )
    address = f"127.0.0.1:{7161 + number}"
    return Store(
        id=number,
        name=f"s{number}",
        incarnation=life,
        address=address,
        disks=(disk,),
        exited=exited,
    )


def disk_report(state: str = "ok", *, total: int = 10 * GIB) -> DiskReport:
    """Make the report of a disk."""
    reason = "" if state == "ok" else "a flush failed"
    return DiskReport(
        index=0, state=state, reason=reason, engine="mem", bytes_total=total, bytes_free=total
    )


def report(
    copy: int,
    *,
    role: str,
    epoch: int = EPOCH,
    complete_seq: int = 0,
    applied_seq: int = 0,
    size_bytes: int = GIB,
    resyncs: tuple[ResyncReport, ...] = (),
    verifying: tuple[int, int] | None = None,
) -> ReplicaReport:
    """Make the report of a replica."""
    return ReplicaReport(
        volume_id=KEY[0],
        index=KEY[1],
        copy=copy,
        size_bytes=size_bytes,
        epoch=epoch,
        disk=0,
        used_bytes=0,
        promised=epoch,
        complete_seq=complete_seq,
        applied_seq=applied_seq,
        role=role,
        resyncs=resyncs,
        verifying=verifying,
    )
