"""Sizes and durations: docs/internals/interfaces.md, section 3."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pureflash.units import (
    BLOCK_BYTES,
    DURATION_MS_MAX,
    SIZE_BYTES_MAX,
    format_duration,
    format_size,
    format_sizes,
    parse_duration_ms,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("5G", 5 * 2**30),
        ("5GiB", 5 * 2**30),
        ("5gib", 5 * 2**30),
        (" 5 G ", 5 * 2**30),
        ("1.5T", 3 * 2**39),
        ("4096B", 4096),
        ("4K", 4096),
        ("1P", 2**50),
        ("8388607.99609375G", SIZE_BYTES_MAX - SIZE_BYTES_MAX % 2**22),
    ],
)
def test_an_exact_size_is_taken_as_it_is(text: str, size_bytes: int) -> None:
    size = parse_size(text)
    assert size.size_bytes == size_bytes
    assert size.notice is None


def test_a_decimal_unit_is_decimal_and_rounded_up_with_a_notice() -> None:
    size = parse_size("5GB")
    assert size.size_bytes == -(-(5 * 10**9) // 4096) * 4096 == 5_000_003_584
    assert size.notice == "5GB is not a multiple of 4 KiB: rounded up to 5,000,003,584 bytes"


def test_sizes_that_differ_and_look_alike_are_told_apart_by_their_bytes() -> None:
    assert format_sizes(2**30, 5 * 2**30) == ["1 GiB", "5 GiB"]
    assert format_sizes(2**30, 2**30) == ["1 GiB", "1 GiB"], "they are alike"
    assert format_sizes(64 << 20, (64 << 20) - 4096) == [
        "64 MiB (67,108,864 bytes)",
        "64 MiB (67,104,768 bytes)",
    ]
    assert format_sizes(2**30, 5 * 2**30, 2**30 + 512) == [
        "1 GiB (1,073,741,824 bytes)",
        "5 GiB",
        "1 GiB (1,073,742,336 bytes)",
    ]
    assert format_sizes() == []


@given(st.lists(st.integers(0, SIZE_BYTES_MAX), max_size=4))
def test_different_sizes_never_look_alike(sizes: list[int]) -> None:
    texts = format_sizes(*sizes)
    assert len(set(texts)) == len(set(sizes))
    assert all(text.startswith(format_size(one)) for text, one in zip(texts, sizes, strict=True))


@pytest.mark.parametrize("text", ["8388608G", "8P", "9007199254740992B", "9007199254736897B"])
def test_a_size_above_the_largest_is_told_that_one_to_the_byte(text: str) -> None:
    with pytest.raises(ValueError, match="one block of 4 KiB below 8,388,608 GiB") as caught:
        parse_size(text)
    assert "9,007,199,254,736,896 bytes" in str(caught.value)
    assert parse_size("9007199254736896B").size_bytes == SIZE_BYTES_MAX
    assert parse_size("9007199254732801B").size_bytes == SIZE_BYTES_MAX, "rounded up to it"


def test_a_bare_number_is_refused_and_both_readings_are_shown() -> None:
    with pytest.raises(ValueError, match="has no unit") as caught:
        parse_size("5")
    message = str(caught.value)
    assert "5G for GiB (5,368,709,120 bytes)" in message
    assert "5GB for decimal gigabytes (5,000,000,000 bytes)" in message


def test_a_large_bare_number_is_read_as_bytes_in_both_ways() -> None:
    with pytest.raises(ValueError, match="write 5368709120B") as caught:
        parse_size("5368709120")
    assert "5 GiB or 5.369 GB" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0G", "greater than zero"),
        ("0.0GB", "greater than zero"),
        ("-5G", "not a size"),
        ("", "not a size"),
        ("G", "not a size"),
        ("5X", "no unit 'X'"),
        ("5iB", "no unit"),
        ("1e9B", "not a size"),
        ("9P", "largest size"),
        ("9" * 40 + "G", "not a size"),
        ("5G5", "not a size"),
        ("1,5G", "write 1.5G, with a point"),
        ("1,25 GiB", "write 1.25GiB, with a point"),
        ("1,024M", "write 1024M, or 1.024M, with a point"),
        ("1,024,000M", "write for example 5G"),
    ],
)
def test_what_is_no_size_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_size(text)


@given(st.integers(1, SIZE_BYTES_MAX))
def test_any_number_of_bytes_is_rounded_up_by_less_than_a_block(size_bytes: int) -> None:
    size = parse_size(f"{size_bytes}B")
    assert size.size_bytes % BLOCK_BYTES == 0
    assert 0 <= size.size_bytes - size_bytes < BLOCK_BYTES
    assert (size.notice is None) == (size.size_bytes == size_bytes)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 GiB"),
        (5 * 2**30, "5 GiB"),
        (3 * 2**29, "1.5 GiB"),
        (10 * 2**40, "10,240 GiB"),
        (1, "<0.01 MiB"),
        (4096, "<0.01 MiB"),
        (2**20 // 100 + 1, "0.01 MiB"),
        (64 * 2**20, "64 MiB"),
        (2**28 + 2**19, "256.5 MiB"),
        (2**30 - 2**20, "1,023 MiB"),
        (2**30 - 1, "1 GiB"),
    ],
)
def test_a_size_is_written_in_gib_and_below_one_in_mib(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


def test_a_negative_size_is_our_own_bug() -> None:
    with pytest.raises(ValueError, match="negative"):
        format_size(-1)


@pytest.mark.parametrize(
    ("text", "duration_ms"),
    [("500ms", 500), ("1.5s", 1500), ("2m", 120_000), ("1h30m", 5_400_000), ("7d", 604_800_000)],
)
def test_a_duration_is_read_to_the_millisecond(text: str, duration_ms: int) -> None:
    assert parse_duration_ms(text) == duration_ms


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10", "write 10s"),
        ("1h30", "has no unit"),
        ("0.5ms", "finest"),
        ("40000d", "longest"),
        ("1,5s", "write 1.5s, with a point"),
        ("", "not a duration"),
        ("-1s", "not a duration"),
        ("soon", "not a duration"),
        ("1" * 40 + "s", "not a duration"),
    ],
)
def test_what_is_no_duration_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_duration_ms(text)


@pytest.mark.parametrize(
    ("duration_ms", "text"),
    [
        (0, "0 ms"),
        (850, "850 ms"),
        (1500, "1.5 s"),
        (59_999, "59.9 s"),
        (60_000, "1 min"),
        (125_000, "2 min 5 s"),
        (7_260_000, "2 h 1 min"),
        (273_600_000, "3 d 4 h"),
    ],
)
def test_a_duration_is_written_with_its_two_largest_units(duration_ms: int, text: str) -> None:
    assert format_duration(duration_ms) == text


@given(st.integers(0, DURATION_MS_MAX))
def test_every_duration_can_be_written_and_read(duration_ms: int) -> None:
    assert format_duration(duration_ms)
    assert parse_duration_ms(f"{duration_ms}ms") == duration_ms
