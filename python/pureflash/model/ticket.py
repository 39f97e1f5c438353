"""Attach tickets: what a client shows a store instead of a secret.

The conductor makes one after it has checked the caller; a store verifies it with the cluster key
alone, so that attaching needs no round trip to the conductor. Layout (docs/reference/pfw.md, HELLO;
little-endian): volume u64, attach_epoch u64, session u64, expires u64 (seconds since 1970), rights
u32 (1 read, 3 read and write), then HMAC-SHA256 under the cluster key over those 36 bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from pureflash.errors import Code, SecurityError

_BODY: Final = struct.Struct("<QQQQI")
MAC_BYTES: Final = 32
TICKET_BYTES: Final = _BODY.size + MAC_BYTES
KEY_BYTES: Final = 32


class Rights(IntEnum):
    """What the holder may do."""

    READ = 1
    READ_WRITE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """What a ticket says. Units: `expires` in seconds since 1970."""

    volume_id: int
    attach_epoch: int
    session: int
    expires: int
    rights: Rights


def make_ticket(cluster_key: bytes, ticket: Ticket) -> bytes:
    """Sign a ticket; gives `TICKET_BYTES` bytes. The key has `KEY_BYTES` bytes."""
    assert len(cluster_key) == KEY_BYTES, "the key was checked when it was read"
    body = _BODY.pack(
        ticket.volume_id, ticket.attach_epoch, ticket.session, ticket.expires, ticket.rights
    )
    return body + hmac.digest(cluster_key, body, hashlib.sha256)


def verify_ticket(cluster_key: bytes, signed: bytes, *, now: int) -> Ticket:
    """Check a ticket and read it; `now` in seconds since 1970.

    Errors: SecurityError UNAUTHENTICATED for a wrong length, a wrong MAC, rights that do not exist
    and a ticket that has expired. The MAC is compared before anything in it is looked at.
    """
    if len(signed) != TICKET_BYTES:
        raise SecurityError(Code.UNAUTHENTICATED, f"an attach ticket of {len(signed)} bytes")
    body, mac = signed[: _BODY.size], signed[_BODY.size :]
    if not hmac.compare_digest(mac, hmac.digest(cluster_key, body, hashlib.sha256)):
        raise SecurityError(Code.UNAUTHENTICATED, "the attach ticket is not of this cluster")
    volume_id, attach_epoch, session, expires, rights = _BODY.unpack(body)
    if rights not in set(Rights):
        raise SecurityError(Code.UNAUTHENTICATED, f"the attach ticket grants unknown {rights}")
    if now >= expires:
        raise SecurityError(
            Code.UNAUTHENTICATED, f"the attach ticket expired {now - expires} s ago"
        )
    return Ticket(
        volume_id=volume_id,
        attach_epoch=attach_epoch,
        session=session,
        expires=expires,
        rights=Rights(rights),
    )
