"""The JSON of the HTTP API, shared by the server and the typed client.

Sizes are integers in bytes, ids are below 2^53, times are RFC 3339 UTC text. A field is never
removed or given another meaning within `/v1`; a reader ignores what it does not know.
"""

from __future__ import annotations

import datetime as dt
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")


def timestamp(milliseconds: int) -> str:
    """Write milliseconds since 1970 as RFC 3339 UTC."""
    moment = dt.datetime.fromtimestamp(milliseconds / 1000, tz=dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Page(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """One page of a list; `next` goes into `?cursor=` for the following one."""

    items: list[T]
    next: str | None = None


class Alive(msgspec.Struct, frozen=True, kw_only=True):
    """GET /healthz, which needs no token."""

    status: str
    cluster_id: str = ""


class MemberView(msgspec.Struct, frozen=True, kw_only=True):
    """One copy of a shard; `role` is primary, secondary, learner or out.

    `reason` says what is wrong with it, or why it is not in sync; empty when nothing is. The region
    counts (of 1 MiB) are those of a learner, None before its primary reported any.
    """

    copy: int
    store: int
    name: str
    role: str
    reason: str
    disk: str
    incarnation: int
    regions_left: int | None
    regions_copied: int | None


class ShardView(msgspec.Struct, frozen=True, kw_only=True):
    """A shard; `primary`, `isr` and `learners` are store ids.

    `io` says what reads and writes do in this state, `leaves_by` who or what ends it.
    """

    index: int
    epoch: int
    state: str
    reason: str
    primary: int | None
    isr: list[int]
    learners: list[int]
    io: str = ""
    leaves_by: str = ""
    members: list[MemberView] = []


class VolumeView(msgspec.Struct, frozen=True, kw_only=True):
    """A volume. `used_bytes` of all copies is None while a store that holds a part is away."""

    id: int
    name: str
    size_bytes: int
    replicas: int
    shard_size_bytes: int
    state: str
    reason: str
    version: int
    created_at: str
    used_bytes: int | None
    attach_epoch: int
    shards: list[ShardView]
    io: str = ""
    leaves_by: str = ""


class CreateVolume(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/volumes."""

    name: str
    size_bytes: int
    replicas: int | None = None
    shard_size_bytes: int | None = None
    dry_run: bool = False


class PatchVolume(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PATCH /v1/volumes/REF."""

    size_bytes: int


class AttachVolume(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/volumes/REF/attach; answered with messages.VolumeSpec."""

    is_read_only: bool = False


class RenewAttach(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/volumes/REF/renew; answered with messages.VolumeSpec. `ticket` as hex."""

    ticket: str


class ExplainLine(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is so, and why."""

    subject: str
    state: str
    reason: str


class ForceAccept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/volumes/REF/force-accept: the copy of `shard` on `store` counts from now on.

    `by` is who decides, for the record. With `revoke` the caller vouches that the processes of
    stores that hold copies in sync, and that nobody has seen end, are off for good.
    """

    shard: int
    store: str
    by: str
    revoke: bool = False
    dry_run: bool = False


class ForcedCopy(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one copy of a shard that a person decides about.

    `state` is its store's, `role` its own. It has everything up to `last_seq`, by the last report;
    None when none came since the conductor started. `is_consistent` is false where parts of it are
    newer than others.
    """

    copy: int
    store: int
    name: str
    state: str
    role: str
    last_seq: int | None
    is_consistent: bool
    note: str


class ForceAcceptView(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of a force-accept, and the record of it: `job` is None while nothing was done.

    `loss` says in one sentence what is lost; `revoked` names the stores whose present life can
    never register again.
    """

    volume: str
    shard: int
    store: str
    epoch: int
    copies: list[ForcedCopy]
    loss: str
    revoked: list[str]
    job: JobView | None


class RecoverConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/conductor/recover-config: rebuild the records from what the stores hold.

    `by` is who decides, for the record; `without` names stores that are lost for good.
    """

    by: str
    without: list[str] = []
    dry_run: bool = False


class RecoveredObject(msgspec.Struct, frozen=True, kw_only=True):
    """One record that differs from what the stores hold, and how."""

    subject: str
    change: str


class RecoveryView(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of a recovery, and the record of it: `job` is None while nothing was done.

    `reason` says what stores remember that the records do not; empty without amnesia. The stores
    `given_up` can never register again with the disks that they had.
    """

    reason: str
    changes: list[RecoveredObject]
    given_up: list[str]
    job: JobView | None


class DiskView(msgspec.Struct, frozen=True, kw_only=True):
    """A disk; engine and byte counts are None while its store is away.

    `reason` says what is wrong with it, and `next_step` what to do; empty when nothing is. A bad
    slot of 64 KiB took no write, and is never used again.

    `engine_reason` says which engines were tried for it and what decided. What its operations took
    in the last few seconds, as a mean that forgets (EWMA) and as the 99th percentile, is None
    without operations; flushes are among the writes.
    """

    id: str
    store: str
    index: int
    path: str
    size_bytes: int
    state: str
    reason: str
    engine: str | None
    engine_reason: str | None
    bytes_total: int | None
    bytes_free: int | None
    next_step: str = ""
    bad_slots: int = 0
    write_ewma_us: int | None = None
    write_p99_us: int | None = None
    read_ewma_us: int | None = None
    read_p99_us: int | None = None


class StoreView(msgspec.Struct, frozen=True, kw_only=True):
    """A store node; `silent_ms` is the age of its last heartbeat, None before the first.

    `replicas_out` of `replicas` are not in sync; `out_reason` says why.
    """

    id: int
    name: str
    state: str
    reason: str
    address: str
    incarnation: int
    silent_ms: int | None
    replicas: int
    disks: list[DiskView]
    replicas_out: int = 0
    out_reason: str = ""


class ExitedStore(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/stores/REF/exited: a supervisor saw this incarnation end."""

    incarnation: int


class ExportView(msgspec.Struct, frozen=True, kw_only=True):
    """An export; `uri` is empty until its gateway offers it."""

    id: int
    kind: str
    volume: str
    uri: str
    gateway: str
    state: str
    reason: str
    read_only: bool
    transport: str
    connections: int


class CreateExport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/exports."""

    kind: str
    volume: str
    transport: str = "unix"
    read_only: bool = False
    gateway: str | None = None


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job; `done` of `total` in `unit`."""

    id: int
    kind: str
    target: str
    state: str
    done: int
    total: int
    unit: str
    reason: str
    created_at: str
    finished_at: str | None


class HealthView(msgspec.Struct, frozen=True, kw_only=True):
    """A finding: `code` is stable, `meaning`, `cause` and `next_step` are for people."""

    code: str
    severity: str
    subject: str
    meaning: str
    cause: str
    next_step: str


class CapacityView(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes. `usable` is what promises are made of; `after_one_loss` without the largest store."""

    raw_bytes: int
    usable_bytes: int
    used_bytes: int
    promised_bytes: int
    after_one_loss_bytes: int
    overcommit_ratio: float


class GatewayView(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway; `connections` of clients in their I/O phase."""

    name: str
    state: str
    connections: int


class ClusterView(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/cluster: what `pf status` prints."""

    cluster_id: str
    state: str
    sentence: str
    term: int
    lineage: str
    revision: int
    capacity: CapacityView
    stores: list[StoreView]
    gateways: list[GatewayView]
    volumes_by_state: dict[str, int]
    exports: int
    running_jobs: list[JobView]
    counters: dict[str, int]
    health: list[HealthView]


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """An error as application/problem+json (RFC 9457) with our code, request id and next step."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    next_step: str


class EventView(msgspec.Struct, frozen=True, kw_only=True):
    """A Server-Sent Event's data: `kind` such as `volume.changed`, about `subject`."""

    id: int
    at: str
    kind: str
    subject: str
    detail: str
