"""Sizes and durations as people write and read them.

The one place where text becomes a number of bytes or milliseconds and back, used by the CLI, by
configuration files and by the Python API. Inside the product a size is an `int` of bytes and a
duration an `int` of milliseconds; everything in this module is exact (no floats), pure and cheap.

A bare number is refused on purpose: `5` could be bytes, GiB or GB, and a wrong guess is either a
uselessly small volume or a surprise on the bill. So is a number that fits no reading.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

BLOCK_BYTES = 4096
"""The addressable unit of a volume; sizes are rounded up to it."""

SIZE_BYTES_MAX = 2**53 - BLOCK_BYTES
"""Largest size, 8 PiB less one block: sizes are JSON integers, exact only below 2^53."""

DURATION_MS_MAX = 100 * 365 * 24 * 3600 * 1000
"""Longest duration, 100 years: far beyond any timeout, far below any overflow."""

NUMBER_CHARS_MAX = 32
"""Longest text that is parsed: exact numbers of unlimited length would cost unlimited time."""

_PREFIXES = "KMGTP"
_SIZE_UNITS = {
    "B": 1,
    **{prefix: 1024**power for power, prefix in enumerate(_PREFIXES, 1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate(_PREFIXES, 1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(_PREFIXES, 1)},
}
_DURATION_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_WITH_COMMA = re.compile(r"([0-9]+),([0-9]+)\s*([A-Za-z]*)")
_MIB = 1024**2
_GIB = 1024**3


LARGEST_SIZE = (
    f"one block of 4 KiB below {(SIZE_BYTES_MAX + BLOCK_BYTES) // _GIB:,} GiB:"
    f" {SIZE_BYTES_MAX:,} bytes"
)
"""The same in words; rounded to GiB it would read like the first size that is refused."""


@dataclass(frozen=True, slots=True)
class Size:
    """A size that was asked for, as it will be used.

    Units: `size_bytes` is a positive multiple of `BLOCK_BYTES`. `notice` is a sentence for the
    user when the size had to be rounded, else None.
    """

    size_bytes: int
    notice: str | None = None


def parse_size(text: str) -> Size:
    """Read a size such as `5G`, `5GiB`, `5GB`, `1.5T` or `4096B`; rounds up to 4 KiB.

    `K M G T P` and `KiB` ... are powers of 1024, `KB` ... powers of 1000; case does not matter.
    Errors: ValueError, in words meant for the user, for no number, no or an unknown unit, zero,
    and more than `SIZE_BYTES_MAX`.
    """
    number, unit = _split_quantity(text, example="5G")
    if number == 0:
        raise ValueError(f"{text!r}: a size must be greater than zero")
    if not unit:
        raise ValueError(_both_readings(text.strip(), number))
    factor = _SIZE_UNITS.get(unit.upper())
    if factor is None:
        raise ValueError(f"{text!r}: no unit {unit!r}; use B, K, M, G, T, P, KiB ... or KB ...")
    exact = number * factor
    if exact > SIZE_BYTES_MAX:
        raise ValueError(f"{text!r}: the largest size is {LARGEST_SIZE}")
    size_bytes = _round_up_to_block(exact)
    if size_bytes == exact:
        return Size(size_bytes)
    return Size(
        size_bytes, f"{text.strip()} is not a multiple of 4 KiB: rounded up to {size_bytes:,} bytes"
    )


def format_size(size_bytes: int) -> str:
    """Write a size in GiB, or in MiB when it is less than one: two units, easily told apart.

    At most two decimals, rounded to nearest; what is not zero is never shown as zero.
    """
    if size_bytes < 0:
        raise ValueError(f"a size cannot be negative: {size_bytes}")
    in_mib = _decimal(Fraction(size_bytes, _MIB))
    if size_bytes == 0 or in_mib == "1,024" or size_bytes >= _GIB:
        return f"{_decimal(Fraction(size_bytes, _GIB))} GiB"
    return "<0.01 MiB" if in_mib == "0" else f"{in_mib} MiB"


def format_sizes(*sizes_bytes: int) -> list[str]:
    """Write sizes that stand beside each other; those that differ and look alike get their bytes.

    For a message that compares: "5.25 GiB, only 5.25 GiB" says nothing.
    """
    texts = [format_size(one) for one in sizes_bytes]
    alike: dict[str, set[int]] = {}
    for text, one in zip(texts, sizes_bytes, strict=True):
        alike.setdefault(text, set()).add(one)
    return [
        f"{text} ({one:,} bytes)" if len(alike[text]) > 1 else text
        for text, one in zip(texts, sizes_bytes, strict=True)
    ]


def parse_duration_ms(text: str) -> int:
    """Read a duration such as `500ms`, `1.5s`, `2m`, `3h`, `7d` or `1h30m`; gives milliseconds.

    Errors: ValueError, in words meant for the user, for anything else, and for fractions of a
    millisecond, which no timer of ours keeps.
    """
    rest = text.strip()
    if not 0 < len(rest) <= NUMBER_CHARS_MAX:
        raise ValueError(f"{text[:NUMBER_CHARS_MAX]!r} is not a duration; write for example 1.5s")
    total_ms = Fraction(0)
    while rest:
        match = re.match(r"([0-9]+(?:\.[0-9]+)?)(ms|[smhd]|$)", rest)
        if match is None:
            advice = _without_comma(text.strip()) or "write for example 500ms, 1.5s or 1h30m"
            raise ValueError(f"{text!r} is not a duration; {advice}")
        number, unit = match.groups()
        if not unit:
            raise ValueError(f"{text!r} has no unit; write {number}s for seconds or {number}ms")
        total_ms += Fraction(number) * _DURATION_UNITS_MS[unit]
        rest = rest[match.end() :]
    if total_ms.denominator != 1:
        raise ValueError(f"{text!r}: the finest duration is 1ms")
    if total_ms > DURATION_MS_MAX:
        raise ValueError(f"{text!r}: the longest duration is 36500d")
    return int(total_ms)


def format_duration(duration_ms: int) -> str:
    """Write a duration with its two largest units: `850 ms`, `1.5 s`, `2 min 5 s`, `3 d 4 h`."""
    if duration_ms < 0:
        raise ValueError(f"a duration cannot be negative: {duration_ms}")
    if duration_ms < 1000:
        return f"{duration_ms} ms"
    if duration_ms < 60_000:
        # Rounded down: 59,999 ms must not read as a minute.
        return f"{_decimal(Fraction(duration_ms // 100, 10))} s"
    seconds = duration_ms // 1000
    for large, large_name, small, small_name in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= large:
            count, rest = divmod(seconds, large)
            tail = f" {rest // small} {small_name}" if rest // small else ""
            return f"{count:,} {large_name}{tail}"
    raise AssertionError("60 s or more always reaches the last row")


def _split_quantity(text: str, *, example: str) -> tuple[Fraction, str]:
    stripped = text.strip()
    match = _QUANTITY.fullmatch(stripped) if len(stripped) <= NUMBER_CHARS_MAX else None
    if match is None:
        advice = _without_comma(stripped) or f"write for example {example}"
        raise ValueError(f"{text[:NUMBER_CHARS_MAX]!r} is not a size; {advice}")
    return Fraction(match[1]), match[2]


def _without_comma(text: str) -> str:
    """Say how a number with a comma is written here; empty for any other text."""
    match = _WITH_COMMA.fullmatch(text) if len(text) <= NUMBER_CHARS_MAX else None
    if match is None:
        return ""
    whole, part, unit = match.groups()
    with_point = f"{whole}.{part}{unit}, with a point"
    if len(part) == 3:  # thousands, as we write them ourselves, or a fraction: who knows
        return f"write {whole}{part}{unit}, or {with_point}"
    return f"write {with_point}"


def _both_readings(text: str, number: Fraction) -> str:
    binary, decimal = number * _GIB, number * 1000**3
    if number >= BLOCK_BYTES:  # nobody means 4,096 GiB or more by a bare number: it is bytes
        gib, gb = _decimal(number / _GIB, places=3), _decimal(number / 1000**3, places=3)
        return f"{text} has no unit; if it is bytes write {text}B (that is {gib} GiB or {gb} GB)"
    return (
        f"{text} has no unit; write {text}G for GiB ({int(binary):,} bytes)"
        f" or {text}GB for decimal gigabytes ({int(decimal):,} bytes)"
    )


def _round_up_to_block(exact: Fraction) -> int:
    return -(-exact // BLOCK_BYTES) * BLOCK_BYTES


def _decimal(number: Fraction, *, places: int = 2) -> str:
    """Write a number rounded to nearest, halves up, without trailing zeros."""
    whole, part = divmod(int(number * 10**places + Fraction(1, 2)), 10**places)
    return f"{whole:,}.{part:0{places}d}".rstrip("0").rstrip(".")
