"""Messages between the conductor and the agents of stores and gateways.

One WebSocket per agent, text frames, each one tagged JSON object: `type`, `v` (1), `id`, `term`.
All are idempotent: a message that is delivered twice, or again after a reconnect, changes nothing
more. `term` is the sender's view of the conductor's term; an agent ignores what has a lower one
than it has seen. `revision` is that of the metastore when a message went down, and the highest that
the agent has heard of when it goes up: a store remembers both, so that a metastore which was
restored from a copy is found out. Unknown fields are ignored, an unknown type or version closes the
connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec

from pureflash.errors import CallerError, Code, SoftwareError
from pureflash.model.conf import Admit, Cancel, Promote, Remove, Transfer
from pureflash.model.domain import Disk, ShardConf
from pureflash.model.outside import UNREADABLE

VERSION: Final = 1
HEARTBEAT_MS: Final = 500
SILENT_MS: Final = 2_250
"""Silence after which an agent is suspected: four lost heartbeats and a margin."""
BATCH_MAX: Final = 1_000
FRAME_BYTES_MAX: Final = 4 << 20
"""A batch of 1,000 configurations of at most 1,024 bytes, encoded, fits."""

EXPORTS_BYTES_MAX: Final = 1 << 20
"""Of the exports in one message, before the last: one of a volume of 16,384 shards is about as much
again, and both fit into a frame."""

PROBLEM_CHARS_MAX: Final = 512
"""Of the text about a message that is none: it may quote what was sent."""

ReplicaTransition = Remove | Promote | Admit | Cancel | Transfer
"""What a replica may propose."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=False):
    """What all messages have. `id` pairs an answer with its question on one connection."""

    v: int = VERSION
    id: int
    term: int
    revision: int = 0


class ResyncReport(msgspec.Struct, frozen=True, kw_only=True):
    """How far a primary is with making the replica on store `to` equal, in regions of 1 MiB."""

    to: int
    regions_left: int
    regions_copied: int


class ReplicaReport(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that a store holds; `used_bytes` is None where the store does not count it.

    `epoch` is of the configuration that it follows (0: none), `complete_seq` its complete_lsn.
    """

    volume_id: int
    index: int
    copy: int
    size_bytes: int
    epoch: int
    disk: int
    used_bytes: int | None = None
    promised: int = 0
    complete_seq: int = 0
    applied_seq: int = 0
    """Highest seq of anything in it: above `complete_seq`, parts of it are newer than others."""
    role: str = "out"
    resyncs: tuple[ResyncReport, ...] = ()
    verifying: tuple[int, int] | None = None
    """As primary: regions compared of a verification under way, and of how many."""
    damaged: tuple[tuple[int, int], ...] = ()
    """Runs (first block, blocks) that are known to be unreadable here; ascending, the first 64."""
    damaged_blocks: int = 0
    """All of these blocks, also of runs that `damaged` leaves out."""
    lost: tuple[tuple[int, int], ...] = ()
    """As primary: runs of which no copy is left that can be read; ascending, the first 64."""
    lost_blocks: int = 0
    damaged_since_ms: int = 0
    """Wall clock when the present damage was first known, across restarts; 0: there is none."""


class DiskLatency(msgspec.Struct, frozen=True, kw_only=True):
    """What the operations of a disk took in the last few seconds, and how many those were.

    Microseconds: a mean that forgets (EWMA) and the 99th percentile; 0 without operations. Flushes
    are among the writes.
    """

    write_ewma_us: int = 0
    write_p99_us: int = 0
    writes: int = 0
    read_ewma_us: int = 0
    read_p99_us: int = 0
    reads: int = 0


class DiskReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a disk is; `bytes_total` is what data can use.

    `reason` explains a bad `state`, or why a disk takes overwrites only, and `code` is the health
    code that it belongs to; `next_step`, where the store knows one, is better than the code's own.
    `latency` is None before the store has measured for a while.
    """

    index: int
    state: str
    reason: str
    code: str = ""
    next_step: str = ""
    engine: str
    engine_reason: str = ""
    """Which engines were tried for it, and what decided."""
    bytes_total: int
    bytes_free: int
    bad_slots: int = 0
    latency: DiskLatency | None = None


class RegisterStore(Message, frozen=True, kw_only=True, tag="register"):
    """Up: a store introduces itself, after each connect.

    `lineage` is the metastore's that it was led by last, with `term` and `revision`; empty: none.
    Other stores of that lineage were told of `heard_term` and `heard_revision`; 0: none was heard.
    """

    lineage: str = ""
    heard_term: int = 0
    heard_revision: int = 0
    cluster_id: str
    store: int
    name: str
    incarnation: int
    address: str
    disks: tuple[Disk, ...]
    disk_reports: tuple[DiskReport, ...]
    replicas: tuple[ReplicaReport, ...]


class RegisterGateway(Message, frozen=True, kw_only=True, tag="register_gateway"):
    """Up: a gateway introduces itself, after each connect."""

    cluster_id: str
    gateway: str
    incarnation: int


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat"):
    """Up, every `HEARTBEAT_MS`; `counters` are totals since the process started.

    A store sends `replicas` (all of them) when they differ from what it sent last, else None, and
    what it has heard of the conductor as it does when it registers; a gateway has none of these.
    """

    heard_term: int = 0
    heard_revision: int = 0

    disk_reports: tuple[DiskReport, ...] = ()
    replicas: tuple[ReplicaReport, ...] | None = None
    counters: dict[str, int] = {}
    connections: int = 0


class Applied(Message, frozen=True, kw_only=True, tag="applied"):
    """Up: the answer to the command with the same `id`; `code` 0 is success.

    `replica` is how the replica is after a success, None when it is no more.
    """

    code: int
    message: str = ""
    replica: ReplicaReport | None = None


class Verified(Message, frozen=True, kw_only=True, tag="verified"):
    """Up: the answer to `VerifyReplica` with the same `id`.

    `different` and `unreadable` are (region of 1 MiB, store) pairs: content that is not the
    primary's, and blocks that cannot be read there. `mended_blocks` is 0 unless it was to repair.
    """

    regions: int
    copies: int
    different: tuple[tuple[int, int], ...]
    unreadable: tuple[tuple[int, int], ...]
    mended_blocks: int = 0


class Proposal(Message, frozen=True, kw_only=True, tag="proposal"):
    """Up: a replica asks for a change of its shard's configuration of this epoch.

    There is no answer: a replica learns the outcome from the next configuration, and repeats
    itself while the need lasts.
    """

    volume_id: int
    index: int
    epoch: int
    transition: ReplicaTransition


class FetchConf(Message, frozen=True, kw_only=True, tag="fetch_conf"):
    """Up: a replica has reason to believe that there is a newer configuration; send it."""

    volume_id: int
    index: int
    newer_than: int


class Recalled(Message, frozen=True, kw_only=True, tag="recalled"):
    """Up: the answer to `Recall`, in parts: the configurations that the store's replicas follow."""

    confs: tuple[ShardConf, ...]
    is_last: bool


class ExportReport(msgspec.Struct, frozen=True, kw_only=True):
    """How an export is at its gateway; `uri` is empty unless it is ready."""

    id: int
    is_ready: bool
    uri: str
    reason: str
    connections: int = 0


class ExportsApplied(Message, frozen=True, kw_only=True, tag="exports_applied"):
    """Up: the answer to `SetExports`, and again whenever a report changes."""

    reports: tuple[ExportReport, ...]


class Registered(Message, frozen=True, kw_only=True, tag="registered"):
    """Down: accepted. `term` of this message is now the least that the agent obeys.

    A store that was led by one of `predecessors` goes over to `lineage`.
    """

    lineage: str
    predecessors: tuple[str, ...] = ()


class Recall(Message, frozen=True, kw_only=True, tag="recall"):
    """Down: the conductor has lost its memory; go on as you are, and tell what you hold."""


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """Down: not accepted; the connection is closed after it."""

    code: int
    message: str
    next_step: str


class CreateReplica(Message, frozen=True, kw_only=True, tag="replica_create"):
    """Down: hold a replica on the disk with the uuid `disk`."""

    volume_id: int
    index: int
    copy: int
    size_bytes: int
    disk: str
    conf: ShardConf


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """Where a store listens, in its newest registered life. Every earlier life is over."""

    store: int
    incarnation: int
    address: str


class SetPeers(Message, frozen=True, kw_only=True, tag="peers"):
    """Down: the stores of the cluster are these."""

    peers: tuple[Peer, ...]


class Dead(Message, frozen=True, kw_only=True, tag="dead"):
    """Down: this life of a store is over for certain; its supervisor saw the process end."""

    store: int
    incarnation: int


class DeleteReplica(Message, frozen=True, kw_only=True, tag="replica_delete"):
    """Down: forget a replica; success also when there is none."""

    volume_id: int
    index: int


class ResizeReplica(Message, frozen=True, kw_only=True, tag="replica_resize"):
    """Down: let a replica have this size; it never shrinks."""

    volume_id: int
    index: int
    size_bytes: int


class VerifyReplica(Message, frozen=True, kw_only=True, tag="verify"):
    """Down: as primary, compare all in-sync replicas region by region; `Verified` answers.

    With `is_repairing`, blocks that cannot be read are written again wherever a good copy exists,
    and only what is still unreadable after that is told as such.
    """

    volume_id: int
    index: int
    is_repairing: bool = False


class TransferPrimary(Message, frozen=True, kw_only=True, tag="transfer"):
    """Down: as primary, give the reign to member `to` of the ISR; success when it was passed on."""

    volume_id: int
    index: int
    to: int


class SetConf(Message, frozen=True, kw_only=True, tag="conf"):
    """Down: follow a newer configuration."""

    volume_id: int
    index: int
    conf: ShardConf


class ShardRoute(msgspec.Struct, frozen=True, kw_only=True):
    """Where a shard's primary is; `address` is empty while none can serve."""

    index: int
    epoch: int
    address: str


class VolumeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a client needs to do I/O; `cluster_id` and `ticket` as hex (model/ticket.py)."""

    cluster_id: str
    volume_id: int
    size_bytes: int
    shard_size_bytes: int
    attach_epoch: int
    ticket: str
    shards: tuple[ShardRoute, ...]


class ExportSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One export for a gateway to offer under `name`."""

    id: int
    name: str
    kind: str
    transport: str
    is_read_only: bool
    volume: VolumeSpec


class SetExports(Message, frozen=True, kw_only=True, tag="exports"):
    """Down, in parts from the first to the last: offer exactly these; what is missing goes away."""

    exports: tuple[ExportSpec, ...]
    is_first: bool = True
    is_last: bool = True


def set_exports(exports: Sequence[ExportSpec]) -> list[SetExports]:
    """Make the messages, at least one, that tell a gateway its exports; ids and terms are 0."""
    parts: list[list[ExportSpec]] = [[]]
    size = 0
    for spec in exports:
        if size >= EXPORTS_BYTES_MAX:
            parts.append([])
            size = 0
        parts[-1].append(spec)
        size += len(msgspec.json.encode(spec))
    last = len(parts) - 1
    return [
        SetExports(id=0, term=0, exports=tuple(part), is_first=at == 0, is_last=at == last)
        for at, part in enumerate(parts)
    ]


Up = (
    RegisterStore
    | RegisterGateway
    | Heartbeat
    | Applied
    | Verified
    | Proposal
    | FetchConf
    | ExportsApplied
    | Recalled
)
Down = (
    Registered
    | Recall
    | Refused
    | CreateReplica
    | DeleteReplica
    | ResizeReplica
    | SetConf
    | VerifyReplica
    | TransferPrimary
    | SetPeers
    | Dead
    | SetExports
)
ReplicaCommand = (
    CreateReplica | DeleteReplica | ResizeReplica | SetConf | VerifyReplica | TransferPrimary
)

_M = TypeVar("_M", bound=Message)
_UP: Final = msgspec.json.Decoder(Up)
_DOWN: Final = msgspec.json.Decoder(Down)


def encode(message: Message) -> str:
    """Write a message as the text of one frame."""
    return msgspec.json.encode(message).decode()


def decode_up(frame: str | bytes) -> Up:
    """Read what an agent sent.

    Errors: CallerError INVALID for anything that is not a message of this version.
    """
    message: Up = _checked(_UP, frame)
    return message


def decode_down(frame: str | bytes) -> Down:
    """Read what the conductor sent; errors as `decode_up`."""
    message: Down = _checked(_DOWN, frame)
    return message


def _checked(decoder: msgspec.json.Decoder[_M], frame: str | bytes) -> _M:
    if len(frame) > FRAME_BYTES_MAX:
        raise CallerError(Code.LIMIT, f"an agent message of {len(frame)} bytes")
    try:
        message = decoder.decode(frame)
    except UNREADABLE as cause:
        # An unknown field is ignored, but what is nested a thousand deep in it is still read.
        text = f"not an agent message: {cause}"[:PROBLEM_CHARS_MAX]
        raise CallerError(Code.INVALID, text) from cause
    if message.v != VERSION:
        raise SoftwareError(Code.UNSUPPORTED, f"agent message of version {message.v}")
    return message
