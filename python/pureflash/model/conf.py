"""Steps of a shard's configuration, typed; the rules are `crates/shard` (`conf`).

Theory of operation. Python proposes and stores, Rust decides: `apply` hands a configuration, a
proposal and what the conductor knows to the only functions that make the next configuration, and
raises what they refuse. Nothing here judges; a second, independent opinion for the tests is
`pureflash.testing.model.conf`. Pure: no clock, no I/O.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from pureflash.model.domain import Member, ShardConf

MEMBERS_MAX: Final = 8
"""Members of one configuration at most, as in `crates/shard`."""
HISTORY_SHIFT: Final = 44
"""As in `crates/shard`: a history's number counts from this bit on how often a person forced one,
and every seq of it lies above those of the histories before."""


def next_history(history_id: int) -> int:
    """Give the number of the history that follows when a person forces it (T7)."""
    return history_id + (1 << HISTORY_SHIFT)


def operation_text(seq: int) -> str:
    """Write a seq for people: its number in its history, with the history's when it was forced."""
    forced, number = seq >> HISTORY_SHIFT, seq & ((1 << HISTORY_SHIFT) - 1)
    return f"{number} of history {forced}" if forced else str(number)


class Remove(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="remove"):
    """T1: leave `copy` out of the ISR."""

    copy: int


class Promote(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="promote"):
    """T2: make `copy` primary, and leave the old primary out of the ISR."""

    copy: int


class AddLearner(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="add_learner"):
    """T3: begin to make `member` equal; it replaces the member with its number, if any."""

    member: Member


class Admit(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="admit"):
    """T4: take the learner `copy` into the ISR, in the life that was made equal."""

    copy: int
    incarnation: int


class Transfer(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="transfer"):
    """T5: make `copy` primary; the old one is drained and stays in the ISR."""

    copy: int


class Reopen(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="reopen"):
    """T6: open again after the whole ISR was lost; `present` are all good members as now."""

    primary: int
    present: tuple[Member, ...]


class ForceAccept(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="force_accept"):
    """T7: a person decides that the content of `member` counts, in a new history."""

    member: Member
    history_id: int


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="cancel"):
    """T8: stop making `copy` equal."""

    copy: int


class Attach(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="attach"):
    """T9: refuse writers attached earlier."""

    attach_epoch: int


class Properties(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="properties"):
    """T9: change what the shard is to have."""

    rf: int
    min_write: int


Transition = (
    Remove
    | Promote
    | AddLearner
    | Admit
    | Transfer
    | Reopen
    | ForceAccept
    | Cancel
    | Attach
    | Properties
)


class ByConductor(msgspec.Struct, frozen=True, tag_field="kind", tag="conductor"):
    """The leading conductor asks."""


class ByReplica(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="replica"):
    """A replica asks, in this life of its store."""

    copy: int
    incarnation: int


class ByHuman(msgspec.Struct, frozen=True, tag_field="kind", tag="human"):
    """A person asks, and the decision is audited."""


Proposer = ByConductor | ByReplica | ByHuman


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """The newest life of a store, as the conductor sees it now.

    `has_good_journal` is about the replica on the disk and formatting that the configuration names.
    """

    incarnation: int
    is_reachable: bool
    has_good_journal: bool


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the conductor knows when it decides about a proposal.

    `registered` is by store. `complete`, by copy, is what the present candidates of T6 reported as
    complete_lsn (epoch, seq); nothing else looks at it. `ended`, by store, is the newest life that
    is over for certain; only T7 looks at it.
    """

    proposer: Proposer
    registered: Mapping[int, Registration]
    complete: Mapping[int, tuple[int, int]] = {}
    ended: Mapping[int, int] = {}


def first(
    *,
    volume_id: int,
    index: int,
    rf: int,
    min_write: int,
    primary: int,
    members: Sequence[Member],
    history_id: int,
    attach_epoch: int,
) -> ShardConf:
    """Make the first configuration of a shard: epoch 1, every member in the ISR.

    Errors: `CallerError` INVALID when that would be no sound configuration.
    """
    made = _core().conf_first(
        volume_id=volume_id,
        index=index,
        rf=rf,
        min_write=min_write,
        primary=primary,
        members=msgspec.to_builtins(list(members)),
        history_id=history_id,
        attach_epoch=attach_epoch,
    )
    return msgspec.convert(made, ShardConf)


def apply(conf: ShardConf, epoch: int, transition: Transition, facts: Facts) -> ShardConf:
    """Make the configuration that follows `conf`; `epoch` is the one that the proposal names.

    Errors: `RouteError` STALE_EPOCH when the shard has left that epoch, `CallerError` INVALID with
    the guard that forbids it. Neither is an outcome: an earlier copy may have been applied.
    """
    made = _core().conf_apply(
        msgspec.to_builtins(conf),
        epoch,
        msgspec.to_builtins(transition),
        msgspec.to_builtins(facts),
    )
    return msgspec.convert(made, ShardConf)


def encode(conf: ShardConf) -> bytes:
    """Give the bytes that replicas keep; `CallerError` INVALID when it is not sound."""
    encoded: bytes = _core().conf_encode(msgspec.to_builtins(conf))
    return encoded


def decode(encoded: bytes) -> ShardConf:
    """Read the bytes of one configuration; `CallerError` INVALID with the first broken rule."""
    return msgspec.convert(_core().conf_decode(encoded), ShardConf)


def _core() -> Any:
    """Give the Rust half; imported by name, as an import statement would draw in the clients."""
    return importlib.import_module("pureflash._core")
