"""When a dead child is started again. Pure.

The delay doubles from the first to `DELAY_LAST_MS` while deaths follow one another, and starts
anew after a life of `CALM_MS`. `DEATHS_MAX` deaths within `WINDOW_MS` and the child is given up:
what dies that often would only fill the log, and a person has to look.

```
RUNNING -died-> WAITING -delay is over-> RUNNING
                WAITING -too many deaths-> GIVEN_UP
```
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

DELAY_FIRST_MS: Final = 1_000
DELAY_LAST_MS: Final = 10_000
DEATHS_MAX: Final = 10
WINDOW_MS: Final = 60_000
CALM_MS: Final = 30_000


class ChildState(StrEnum):
    """What the supervisor does about a child."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"
    GIVEN_UP = "degraded"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The newest deaths (monotonic ms) and the delay that the last one earned."""

    deaths_ms: tuple[int, ...] = ()
    delay_ms: int = 0


def after_death(
    history: History, *, started_ms: int, now_ms: int, first_ms: int = DELAY_FIRST_MS
) -> History | None:
    """Take note of a death; gives the history with the delay to wait, None to give the child up.

    Units: `first_ms` is the shortest delay (`--restart-delay`).
    """
    recent = tuple(t for t in (*history.deaths_ms, now_ms) if now_ms - t < WINDOW_MS)
    if len(recent) >= DEATHS_MAX:
        return None
    is_calm = now_ms - started_ms >= CALM_MS
    delay_ms = first_ms if is_calm or not history.delay_ms else history.delay_ms * 2
    limit_ms = max(DELAY_LAST_MS, first_ms)
    return replace(history, deaths_ms=recent, delay_ms=min(delay_ms, limit_ms))
