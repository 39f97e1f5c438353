"""Attach tickets: their bytes, and that nothing but the right bytes is accepted."""

from __future__ import annotations

import hashlib
import hmac
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pureflash.errors import Code, SecurityError
from pureflash.model.ticket import TICKET_BYTES, Rights, Ticket, make_ticket, verify_ticket

KEY = bytes(range(32))
U64 = st.integers(0, 2**64 - 1)
TICKETS = st.builds(
    Ticket,
    volume_id=U64,
    attach_epoch=U64,
    session=U64,
    expires=st.integers(1, 2**64 - 1),
    rights=st.sampled_from(Rights),
)


def test_the_layout_is_that_of_the_hello_message() -> None:
    # docs/reference/pfw.md, HELLO: volume, attach_epoch, session, expires 8 each, rights 4, MAC 32.
    ticket = Ticket(volume_id=1, attach_epoch=2, session=3, expires=4, rights=Rights.READ_WRITE)
    signed = make_ticket(KEY, ticket)
    body = struct.pack("<QQQQI", 1, 2, 3, 4, 3)
    assert signed == body + hmac.new(KEY, body, hashlib.sha256).digest()
    assert len(signed) == TICKET_BYTES == 68


@given(TICKETS)
def test_a_ticket_is_read_back_as_it_was_made(ticket: Ticket) -> None:
    assert verify_ticket(KEY, make_ticket(KEY, ticket), now=ticket.expires - 1) == ticket


@given(TICKETS, st.integers(0, TICKET_BYTES - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused(ticket: Ticket, position: int, flip: int) -> None:
    signed = bytearray(make_ticket(KEY, ticket))
    signed[position] ^= flip
    with pytest.raises(SecurityError) as caught:
        verify_ticket(KEY, bytes(signed), now=0)
    assert caught.value.code is Code.UNAUTHENTICATED


@given(TICKETS, st.binary(max_size=100).filter(lambda text: len(text) != TICKET_BYTES))
def test_another_key_length_or_time_is_refused(ticket: Ticket, other: bytes) -> None:
    signed = make_ticket(KEY, ticket)
    for key, text, now in (
        (bytes(32), signed, 0),
        (KEY, other, 0),
        (KEY, signed, ticket.expires),
    ):
        with pytest.raises(SecurityError):
            verify_ticket(key, text, now=now)


def test_rights_that_do_not_exist_are_refused_even_when_signed() -> None:
    body = struct.pack("<QQQQI", 1, 2, 3, 4, 2)
    with pytest.raises(SecurityError, match="grants unknown 2"):
        verify_ticket(KEY, body + hmac.digest(KEY, body, "sha256"), now=0)
