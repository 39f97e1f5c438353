"""The failure detector: what silence and messages mean for a store. Pure.

A store that is silent for `SILENT_MS` is suspected, and after twice that it is gone; a suspected
one is not sent commands. Only its supervisor, which saw the process end, makes it offline at
once: that is the "provably dead" of docs/internals/replication.md.
"""

from __future__ import annotations

from dataclasses import replace

from pureflash.conductor.view import StoreObservation
from pureflash.model.domain import StoreEvent, StoreState, next_store_state
from pureflash.model.messages import SILENT_MS


def hear(observation: StoreObservation, *, now_ms: int) -> StoreObservation:
    """Take note of a message from a registered store; one of a gone store changes nothing."""
    if observation.state is StoreState.OFFLINE:
        return observation
    state = next_store_state(observation.state, StoreEvent.HEARD)
    return replace(observation, state=state, cause="", heard_at_ms=now_ms)


def watch(observation: StoreObservation, *, now_ms: int) -> StoreObservation:
    """Judge the silence of a store at `now_ms`."""
    if observation.heard_at_ms is None or observation.state is StoreState.OFFLINE:
        return observation
    silent_ms = now_ms - observation.heard_at_ms
    if observation.state is StoreState.ONLINE and silent_ms >= SILENT_MS:
        state = next_store_state(observation.state, StoreEvent.SILENT)
        return replace(observation, state=state, cause=f"silent for more than {SILENT_MS} ms")
    if observation.state is StoreState.SUSPECTED and silent_ms >= 2 * SILENT_MS:
        state = next_store_state(observation.state, StoreEvent.GONE)
        return replace(observation, state=state, cause=f"silent for more than {2 * SILENT_MS} ms")
    return observation


def exited(observation: StoreObservation) -> StoreObservation:
    """Believe a supervisor that the process has ended."""
    state = next_store_state(observation.state, StoreEvent.EXITED)
    return replace(observation, state=state, cause="its process ended")
