"""The golden bytes of PFW, read and written by the model, and the model against itself.

The Rust test of the same name asserts that the codec writes these bytes; so model and codec agree
on every byte although neither knows the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pureflash.testing.model import wire
from pureflash.testing.model.wire import Body, MalformedError, Message, Opcode

TESTDATA = Path(__file__).parents[2] / "crates/proto/testdata"
GOLDEN: list[dict[str, Any]] = json.loads((TESTDATA / "golden.json").read_text())
NAMES = [entry["name"] for entry in GOLDEN]


def described(entry: dict[str, Any]) -> Message:
    """Make the message that golden.json describes."""
    head = dict(entry["header"])
    return Message(
        opcode=Opcode(head.pop("opcode")),
        is_reply=bool(head.pop("is_reply")),
        is_fua=bool(head.pop("is_fua")),
        is_error=bool(head.pop("is_error")),
        extension={
            name: value if isinstance(value, int) else bytes.fromhex(value)
            for name, value in entry["extension"].items()
        },
        data=bytes.fromhex(entry["data"]),
        **head,
    )


def golden(name: str) -> bytes:
    return (TESTDATA / f"{name}.bin").read_bytes()


def test_crc32c_of_the_standard_check_string() -> None:
    assert wire.crc32c(b"123456789") == 0xE3069283


def test_every_file_is_described_and_every_opcode_has_both_directions() -> None:
    assert sorted(path.stem for path in TESTDATA.glob("*.bin")) == sorted(NAMES)
    shapes = {described(entry).shape for entry in GOLDEN if not entry["header"]["is_error"]}
    assert shapes == {(opcode, is_reply) for opcode in Opcode for is_reply in (False, True)}


@pytest.mark.parametrize("entry", GOLDEN, ids=NAMES)
def test_the_model_writes_and_reads_the_golden_bytes(entry: dict[str, Any]) -> None:
    message = described(entry)
    assert wire.encode(message) == golden(entry["name"])
    assert wire.decode(golden(entry["name"])) == message


WITH_RECORDS = [name for name in NAMES if wire.decode(golden(name)).shape in wire.RECORDS]


@pytest.mark.parametrize("name", WITH_RECORDS)
def test_records_are_whole(name: str) -> None:
    message = wire.decode(golden(name))
    packed = b"".join(
        wire.pack(wire.TAIL_RESULT if "outcome" in record else wire.RECORDS[message.shape], record)
        for record in wire.records(message)
    )
    assert packed == message.data


def test_what_records_say() -> None:
    tails = wire.records(wire.decode(golden("reply_tails")))
    assert [record["seq"] for record in tails] == [1_000_001, 1_000_002, 1_000_001]
    assert tails[0]["op"] == Opcode.WRITE
    assert tails[2]["first_difference"] == 3
    fenced = wire.records(wire.decode(golden("reply_fence_path")))
    assert [record["command_id"] for record in fenced] == [71]
    kinds = [
        record["kind"] for record in wire.records(wire.decode(golden("request_ping_heartbeat")))
    ]
    assert kinds == [1, 2, 3]


@pytest.mark.parametrize("name", NAMES)
def test_every_damaged_byte_is_noticed(name: str) -> None:
    good = golden(name)
    # Every byte of header, extension and CRCs; of the data one byte in 97 (7 does not divide 97).
    for at in [*range(min(len(good), 300)), *range(300, len(good), 97)]:
        bad = bytearray(good)
        bad[at] ^= 0x10
        with pytest.raises(MalformedError):
            wire.decode(bytes(bad))


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_message_is_noticed(name: str) -> None:
    good = golden(name)
    for length in {0, 63, 64, len(good) - 1} - {len(good)}:
        with pytest.raises(MalformedError, match=r"truncated"):
            wire.decode(good[:length])


def change(name: str, at: int, value: int, size: int) -> bytes:
    """Change a header field and make the header CRC right again."""
    head = bytearray(golden(name)[: wire.HEADER_BYTES])
    head[at : at + size] = value.to_bytes(size, "little")
    head[60:] = wire.crc32c(bytes(head[:60])).to_bytes(4, "little")
    return bytes(head) + golden(name)[wire.HEADER_BYTES :]


@pytest.mark.parametrize(
    ("name", "at", "value", "size", "rule"),
    [
        ("request_flush", 0, 0x31574651, 4, "magic"),
        ("request_flush", 4, 2, 1, "version"),
        ("request_flush", 5, 0x2A, 1, "opcode"),
        ("request_flush", 6, 8, 2, "unknown flag"),
        ("request_flush", 6, 4, 2, "no reply"),
        ("request_flush", 6, 2, 2, "FUA"),
        ("request_flush", 16, 1 << 53, 8, "volume_id"),
        ("request_flush", 28, 512, 4, "above the limit"),
        ("request_flush", 32, 512, 8, "offset without"),
        ("request_flush", 56, 1, 4, "body_length"),
        ("request_read", 32, 100, 8, "alignment"),
        ("request_read", 28, 0, 4, "range"),
        ("request_read", 28, wire.MIB + 512, 4, "above the limit"),
        ("request_discard", 32, (1 << 64) - 512, 8, "range"),
        ("request_prepare_discard", 32, 512, 8, "alignment"),
        ("reply_write", 32, 41, 4, "status"),
        ("reply_write", 36, 1, 4, "detail"),
        ("reply_read_failed", 32, 0, 4, "status"),
        ("reply_read_failed", 28, 512, 4, "above the limit"),
    ],
)
def test_each_rule_of_the_header(name: str, at: int, value: int, size: int, rule: str) -> None:
    with pytest.raises(MalformedError, match=rule):
        wire.decode(change(name, at, value, size))


@st.composite
def messages(draw: st.DrawFn) -> Message:
    """Draw any message whose lengths are consistent."""
    opcode = draw(st.sampled_from(list(Opcode)))
    is_reply = draw(st.booleans())
    body, _ = wire.BODIES.get((opcode, is_reply), (Body.NONE, 0))
    layout = wire.EXTENSIONS.get((opcode, is_reply), ())
    extension: dict[str, wire.Value] = {}
    for name, size in layout:
        if size > 8:
            extension[name] = draw(st.binary(min_size=size, max_size=size))
        else:
            extension[name] = draw(st.integers(0, (1 << 8 * size) - 1))
    unit = 4096 if opcode in wire.WHOLE_BLOCK_OPCODES else 512
    start = draw(st.integers(0, 1 << 30)) * unit
    length = draw(st.integers(1, 5 if unit == 4096 else 20)) * unit
    has_data = body is not Body.DATA_OR_NOTHING or draw(st.booleans())
    place = start
    if body is Body.DATA_TWICE:
        length = min(length, 4096 - start % 4096)
    elif body is Body.RECORDS:
        length = draw(st.integers(0, 400 if opcode is not Opcode.NEED_CONF else 4096))
        place = 0
    elif body is Body.NONE:
        length = place = 0
    if is_reply and body is Body.DATA:
        place = start % 4096 << 32
    carried = 0 if body in (Body.NONE, Body.RANGE) or not has_data else length
    return Message(
        opcode=opcode,
        is_reply=is_reply,
        is_fua=not is_reply and opcode in wire.FUA_OPCODES and draw(st.booleans()),
        command_id=draw(st.integers(0, (1 << 64) - 1)),
        volume_id=draw(st.integers(0, (1 << 53) - 1)),
        shard_index=draw(st.integers(0, (1 << 32) - 1)),
        length=length,
        place=place,
        epoch=draw(st.integers(0, (1 << 64) - 1)),
        position=draw(st.integers(0, (1 << 64) - 1)),
        extension=extension,
        data=bytes(i % 251 for i in range(carried * (2 if body is Body.DATA_TWICE else 1))),
    )


@given(messages())
def test_any_message_round_trips(message: Message) -> None:
    assert wire.decode(wire.encode(message)) == message


@given(st.sampled_from(NAMES), st.binary(max_size=80), st.integers(0, 200))
def test_spliced_bytes_give_an_error_or_a_message_that_is_written_the_same(
    name: str, splice: bytes, at: int
) -> None:
    data = golden(name)[:at] + splice + golden(name)[at + len(splice) :]
    try:
        message = wire.decode(data)
    except MalformedError:
        return
    assert wire.encode(message) == data
