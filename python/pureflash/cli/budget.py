"""Where the time of one request goes: means of the stores' hops, arranged as a budget. Pure.

The client knows how long its requests took; the stores count, for every hop of their data threads,
how often and how long (`NAME_hops`, `NAME_nanos` in their counters). What is between two clocks is
the network with the wake-ups at both ends. Means and not quantiles, because only means add up.

    client |<------------------------------ whole request ------------------------------>|
    primary            |<------------------- client_read, client_write -------->|
      its disk             |<-- lane_write -->|
      a replica            |<---------- peer_write ------------->|
        at the replica          |<-- served_write -->|
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

NANOS_PER_MICRO: Final = 1_000


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a budget. `is_inside`: it runs beside other parts and does not add to the sum."""

    name: str
    mean_us: float
    meaning: str
    is_inside: bool = False


@dataclass(frozen=True, slots=True)
class Means:
    """Mean time and number of each hop within some time."""

    us: Mapping[str, float]
    counts: Mapping[str, int]


def means(before: Mapping[str, int], after: Mapping[str, int]) -> Means:
    """Take the difference of two readings; hops that did not happen are left out."""
    us: dict[str, float] = {}
    counts: dict[str, int] = {}
    for key in after:
        name, _, kind = key.rpartition("_")
        if kind != "hops":
            continue
        count = after[key] - before.get(key, 0)
        nanos = after.get(f"{name}_nanos", 0) - before.get(f"{name}_nanos", 0)
        if count > 0:
            us[name] = nanos / count / NANOS_PER_MICRO
            counts[name] = count
    return Means(us, counts)


def read_budget(whole_us: float, seen: Means) -> list[Part]:
    """Arrange a read; `whole_us` is the client's mean. Errors: KeyError if no store served one."""
    at_primary, disk = seen.us["client_read"], seen.us.get("lane_read", 0.0)
    return [
        Part("client and network", whole_us - at_primary, "session, CRC, TCP both ways, wake-ups"),
        Part("primary", at_primary - disk, "checks, lease, range lock, reply"),
        Part("disk", disk, "queue, read, CRC"),
    ]


def write_budget(whole_us: float, seen: Means) -> list[Part]:
    """Arrange a write; `whole_us` is the client's mean. Errors: KeyError when no store served one.

    The primary's own disk and the other replicas work at the same time: what waits for the slowest
    of them is one part, and what is known of each is listed inside it.
    """
    at_primary, disk = seen.us["client_write"], seen.us.get("lane_write", 0.0)
    parts = [
        Part("client and network", whole_us - at_primary, "session, CRC, TCP both ways, wake-ups"),
    ]
    if "peer_write" not in seen.us:
        parts.append(Part("primary", at_primary - disk, "checks, range lock, commit, reply"))
        parts.append(Part("disk", disk, "journal record and data until durable"))
        return parts
    peer, served = seen.us["peer_write"], seen.us.get("served_write", 0.0)
    waited = min(max(peer, disk), at_primary)
    parts += [
        Part(
            "primary", at_primary - waited, "checks, range lock, the slower replica, commit, reply"
        ),
        Part("replicas", waited, "until the primary's disk and the mean replica are durable"),
        Part("network", peer - served, "of a replica: TCP both ways, wake-ups", is_inside=True),
        Part("secondary", max(served - disk, 0.0), "of a replica: checks, answer", is_inside=True),
        Part("disk", disk, "of any replica: journal record and data", is_inside=True),
    ]
    return parts
