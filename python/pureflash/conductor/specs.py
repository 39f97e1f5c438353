"""What stores, gateways and clients are told: who is where, and tickets that prove it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from pureflash.conductor.planner import ExportPlan
from pureflash.errors import CallerError, Code, SecurityError
from pureflash.model.domain import Store, Volume
from pureflash.model.messages import ExportSpec, Peer, RegisterStore, ShardRoute, VolumeSpec
from pureflash.model.ticket import Rights, Ticket, make_ticket, verify_ticket

TICKET_S: Final = 24 * 3600
"""Life of a ticket in seconds."""


class Clock(Protocol):
    """Two clocks: `now_ms` only grows, `wall_ms` counts from 1970."""

    def now_ms(self) -> int:
        """Give monotonic milliseconds."""

    def wall_ms(self) -> int:
        """Give milliseconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What the conductor is told about the cluster. `draw` gives a random number below 2^53.

    `balance_after_ms`: calm after which primaries are spread over the stores; 0: never.
    `slow_disk_us`: latency below which no disk is judged slow; 0: none ever is.
    `stores`: names by id of the stores that its supervisor starts, whatever the records know;
    `gateways`: the same of gateways.
    """

    cluster_id: str
    cluster_key: bytes
    owner: str
    overcommit_ratio: float
    balance_after_ms: int = 0
    slow_disk_us: int = 0
    stores: Mapping[int, str] = field(default_factory=dict)
    gateways: tuple[str, ...] = ()
    draw: Callable[[], int]


def store_of(told: RegisterStore, *, exited: int = 0) -> Store:
    """Make the record of a store as it registered."""
    return Store(
        id=told.store,
        name=told.name,
        incarnation=told.incarnation,
        address=told.address,
        disks=told.disks,
        exited=exited,
    )


def peers_of(stores: Iterable[Store]) -> tuple[Peer, ...]:
    """Say where each store listens, in its newest registered life."""
    return tuple(
        Peer(store=store.id, incarnation=store.incarnation, address=store.address)
        for store in stores
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Specs:
    """Makes specifications of one cluster at one time."""

    cluster_id: str
    cluster_key: bytes
    wall_ms: int

    def export(self, plan: ExportPlan) -> ExportSpec:
        """Describe an export for its gateway."""
        rights = Rights.READ if plan.export.is_read_only else Rights.READ_WRITE
        return ExportSpec(
            id=plan.export.id,
            name=plan.volume.name,
            kind=plan.export.kind,
            transport=plan.export.transport,
            is_read_only=plan.export.is_read_only,
            # An export is one session for all its life, also over restarts of its gateway: only a
            # session itself can fence its own path slots. Ids are unique among objects of a
            # cluster; sessions of clients are drawn from 2^53 and do not meet them.
            volume=self.volume(plan.volume, plan.routes, rights, plan.export.id),
        )

    def volume(
        self, volume: Volume, routes: tuple[ShardRoute, ...], rights: Rights, session: int
    ) -> VolumeSpec:
        """Describe a volume for a session with these rights."""
        ticket = Ticket(
            volume_id=volume.id,
            attach_epoch=volume.attach_epoch,
            session=session,
            expires=self.wall_ms // 1000 + TICKET_S,
            rights=rights,
        )
        return VolumeSpec(
            cluster_id=self.cluster_id,
            volume_id=volume.id,
            size_bytes=volume.size_bytes,
            shard_size_bytes=volume.shard_size_bytes,
            attach_epoch=volume.attach_epoch,
            ticket=make_ticket(self.cluster_key, ticket).hex(),
            shards=routes,
        )

    def renewed(self, volume: Volume, routes: tuple[ShardRoute, ...], ticket: str) -> VolumeSpec:
        """Describe a volume for the session of an earlier ticket, in hex.

        A reader's attach epoch follows the volume's. A writer's stays: if it is not the newest any
        more, the stores must be able to say so. Errors: SecurityError for a ticket that is none of
        this volume. It may have expired: whoever asks has shown a token, and a client that has not
        reached a conductor for so long goes on where it was.
        """
        try:
            held = verify_ticket(self.cluster_key, bytes.fromhex(ticket), now=0)
        except ValueError as cause:
            raise CallerError(Code.INVALID, "the attach ticket is not written in hex") from cause
        if held.volume_id != volume.id:
            raise SecurityError(Code.DENIED, f"the attach ticket is not of {volume.name}")
        if held.rights is Rights.READ_WRITE:
            volume = replace(volume, attach_epoch=held.attach_epoch)
        return self.volume(volume, routes, held.rights, held.session)
