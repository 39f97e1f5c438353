"""Which primary is asked to hand over, and when none is: `plan_balance` on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from tests.support.views import KEY, NOW_MS, Situation

from pureflash.conductor.balance import PAUSE_MS, plan_balance
from pureflash.conductor.view import View
from pureflash.model.domain import VolumeIntent
from pureflash.model.messages import TransferPrimary

CALM_MS = 30_000


def crowded(situation: Situation, **changes: Any) -> View:
    """Give three shards like the situation's one: all primaries are on one store."""
    conf = situation.conf()
    view = situation.view()
    keys = [(KEY[0], index) for index in range(3)]
    observed = {
        store: replace(
            seen,
            replicas={
                (volume, index): msgspec.structs.replace(report, index=index)
                for (volume, _), report in seen.replicas.items()
                for index in range(3)
            },
        )
        for store, seen in view.observed.items()
    }
    defaults: dict[str, Any] = {
        "balance_after_ms": CALM_MS,
        "shards": {key: replace(conf, index=key[1]) for key in keys},
        "observed": observed,
    }
    return replace(view, **(defaults | changes))


def asked(view: View) -> list[tuple[int, int, int]]:
    """Give (store, shard, to) of what is asked."""
    found: list[tuple[int, int, int]] = []
    for tell in plan_balance(view):
        assert isinstance(tell.command, TransferPrimary)
        found.append((tell.store, tell.command.index, tell.command.to))
    return found


def test_one_primary_is_asked_to_hand_over_to_the_store_with_the_fewest() -> None:
    assert asked(crowded(Situation())) == [(1, 0, 1)]


@pytest.mark.parametrize(
    ("why", "situation", "changes"),
    [
        ("it is switched off", Situation(), {"balance_after_ms": 0}),
        ("one is not in sync", Situation(isr=(0, 1)), {}),
        ("one is being made equal", Situation(isr=(0, 1), learners=(2,)), {}),
        ("one is silent", Situation().suspected(3), {}),
        ("one has restarted", Situation().reborn(2), {}),
        ("a disk has failed", Situation().failed_disk(2), {}),
        ("its primary does not serve yet", Situation().tell(1, role="settling"), {}),
        ("its copies are being compared", Situation().tell(1, verifying=(1, 2)), {}),
        ("its volume goes away", Situation(intent=VolumeIntent.DELETING), {}),
        ("the conductor has just begun", Situation(started_ms=NOW_MS - CALM_MS + 1), {}),
        (
            "configurations have just changed",
            Situation(),
            {"changed_ms": {(KEY[0], index): NOW_MS - CALM_MS + 1 for index in range(3)}},
        ),
        ("another was asked a moment ago", Situation(), {"transferred_ms": NOW_MS - PAUSE_MS + 1}),
    ],
)
def test_nobody_is_asked_when(why: str, situation: Situation, changes: dict[str, Any]) -> None:
    assert asked(crowded(situation, **changes)) == [], why


def test_a_difference_of_one_is_even() -> None:
    view = crowded(Situation())
    only = {key: conf for key, conf in view.shards.items() if key[1] == 0}
    assert asked(replace(view, shards=only)) == []
