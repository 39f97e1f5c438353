"""How a disk keeps pace with its peers, as the conductor remembers it. Values only; see `slow`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """What is done about a disk."""

    EVEN = "even"  # nothing
    SLOW = "slow"  # it leads nothing that another disk could lead
    DEMOTED = "demoted"  # and is in no ISR that can do without it


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What is remembered of one disk; times are monotonic milliseconds.

    `since_ms`: when its stage began, SLOW and DEMOTED being one. `turning_ms`: since when what is
    measured says the opposite of the stage; None: it does not. `judged_ms`: when it was last
    measured with enough operations and peers, and `late_ms` when that last said late. `idle_ms`: as
    SLOW, since when it leads nothing that another disk could lead. `demoted_ms`: when it was last
    demoted. `strikes`: how often it was found slow. `kind`: the operations that it was last found
    slow with, and `cause` how slow.
    """

    since_ms: int
    judged_ms: int
    late_ms: int = 0
    stage: Stage = Stage.EVEN
    turning_ms: int | None = None
    idle_ms: int | None = None
    demoted_ms: int | None = None
    strikes: int = 0
    kind: str = ""
    cause: str = ""

    @property
    def is_slow(self) -> bool:
        """Whether something is done about it."""
        return self.stage is not Stage.EVEN
