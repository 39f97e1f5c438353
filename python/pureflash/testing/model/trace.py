"""Lines of a trace: what a simulated world tells, one JSON object each.

`t` is virtual nanoseconds, `k` the kind. `epoch` and `seq` of an operation are its lsn, where
`epoch` is that of the configuration in which the reign began. `first` and `count` are blocks: of
the volume for clients, of the shard for operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from pureflash.model.domain import ShardConf


class Line(msgspec.Struct, frozen=True, tag_field="k", forbid_unknown_fields=True):
    """What all lines have."""

    t: int


class Boot(Line, frozen=True, tag="boot"):
    """A store begins a life."""

    store: int
    inc: int


class Crash(Line, frozen=True, tag="crash"):
    """A store's life ends."""

    store: int
    inc: int


class Conf(Line, frozen=True, tag="conf"):
    """A configuration is stored in the register. `by` is a store, or 0 for the conductor."""

    shard: int
    conf: ShardConf
    transition: str
    by: int


class ReplicaLine(Line, frozen=True):
    """What a replica tells, in this life of its store."""

    shard: int
    store: int
    inc: int


class Role(ReplicaLine, frozen=True, tag="role"):
    """A replica's role has changed; `epoch` is that of the configuration that it follows."""

    epoch: int
    role: str


class Promised(ReplicaLine, frozen=True, tag="promised"):
    """The promise not to follow anything below `epoch` is durable."""

    epoch: int


class Assigned(ReplicaLine, frozen=True, tag="assigned"):
    """As primary: an operation has its lsn."""

    epoch: int
    seq: int
    first: int
    count: int
    settle: bool
    heal: bool = False
    """It writes a damaged block again, or gives it up: nothing that a client has changed."""


class Durable(ReplicaLine, frozen=True, tag="durable"):
    """An operation is durable here."""

    epoch: int
    seq: int


class Committed(ReplicaLine, frozen=True, tag="committed"):
    """As primary: an operation is committed; `acked` are the stores known to have it durable."""

    epoch: int
    seq: int
    acked: tuple[int, ...]


class Copied(ReplicaLine, frozen=True, tag="copied"):
    """As primary: a region was sent to a learner, which has acknowledged it."""

    to: int
    region: int


class CaughtUp(ReplicaLine, frozen=True, tag="caught_up"):
    """As primary: a learner has everything and is proposed for admission."""

    to: int
    regions: int


class Invoke(Line, frozen=True, tag="invoke"):
    """A client's request begins; `values` are those of a write."""

    client: int
    id: int
    op: str
    first: int
    count: int
    values: list[int]


class Reply(Line, frozen=True, tag="reply"):
    """A client's request is answered; `values` are those of a read."""

    client: int
    id: int
    status: int
    values: list[int]


AnyLine = (
    Boot
    | Crash
    | Conf
    | Role
    | Promised
    | Assigned
    | Durable
    | Committed
    | Copied
    | CaughtUp
    | Invoke
    | Reply
)

_DECODER: Final = msgspec.json.Decoder(AnyLine)


def read(text: str) -> Iterator[AnyLine]:
    """Read lines; a line that is none raises `msgspec.ValidationError`."""
    for line in text.splitlines():
        yield _DECODER.decode(line)
