"""Where replicas go, and the first configuration that follows from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.views import life_of, store

from pureflash.conductor.first_conf import MIN_WRITE, first_conf
from pureflash.conductor.placement import Room, place_shard
from pureflash.errors import ClusterError, Code, MediaError
from pureflash.model.domain import GIB, REPLICAS_MAX, Volume


def rooms_of(*gib: int) -> list[Room]:
    """Make stores 1, 2, .. with one disk each that has so much room."""
    stores = [store(number, life_of(number)) for number in range(1, len(gib) + 1)]
    return [Room(one, one.disks[0], size * GIB) for one, size in zip(stores, gib, strict=True)]


def volume_of(replicas: int, *, number: int = 7, shards: int = 1) -> Volume:
    return Volume(
        id=number,
        name=f"v{number}",
        size_bytes=shards * GIB,
        replicas=replicas,
        shard_size_bytes=GIB,
        created_at_ms=0,
        attach_epoch=4,
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, REPLICAS_MAX))
def test_a_shard_lies_on_distinct_stores_that_had_room_or_nothing_is_taken(
    gib: list[int], replicas: int
) -> None:
    available = rooms_of(*gib)
    fitting = sum(size >= 2 for size in gib)
    placed: list[Room] = []
    if len(gib) < replicas:
        with pytest.raises(ClusterError) as too_few:
            place_shard(2 * GIB, replicas, available)
        assert too_few.value.code is Code.UNAVAILABLE
    elif fitting < replicas:
        with pytest.raises(MediaError) as too_full:
            place_shard(2 * GIB, replicas, available)
        assert too_full.value.code is Code.NO_SPACE
    else:
        placed = place_shard(2 * GIB, replicas, available)
        assert len({room.store.id for room in placed}) == replicas
        had = sorted((room.room_bytes + 2 * GIB for room in placed), reverse=True)
        assert had == sorted((size * GIB for size in gib), reverse=True)[:replicas]
        assert had[-1] >= 2 * GIB
    assert sum(room.room_bytes for room in available) == (sum(gib) - 2 * len(placed)) * GIB


def test_two_disks_of_one_store_hold_one_copy() -> None:
    (first, second) = rooms_of(5, 5)
    beside = replace(first, disk=replace(first.disk, index=1, disk_uuid="c" * 32))
    placed = place_shard(GIB, 2, [first, beside, second])
    assert [room.store.id for room in placed] == [1, 2]
    with pytest.raises(ClusterError, match=r"2 replicas need 2 stores; 1 online \(s1\)") as caught:
        place_shard(GIB, 2, [first, beside])
    assert "or use --replicas 1" in caught.value.next_step


def test_what_is_missing_is_said_in_stores() -> None:
    with pytest.raises(ClusterError, match="a store is needed; no store is online"):
        place_shard(GIB, 1, [])
    with pytest.raises(MediaError, match=r"need 3 store\(s\) with room for it and 2 have it"):
        place_shard(4 * GIB, 3, rooms_of(5, 3, 5))


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_the_first_configuration_has_everybody_in_the_isr(replicas: int) -> None:
    placed = place_shard(GIB, replicas, rooms_of(3, 4, 5))
    conf = first_conf(volume_of(replicas), 0, placed=placed)
    assert conf.isr == tuple(range(replicas))
    assert (conf.epoch, conf.rf, conf.min_write) == (1, replicas, MIN_WRITE[replicas])
    assert (conf.history_id, conf.attach_epoch, conf.learners) == (7, 4, ())
    assert {one.store: one.incarnation for one in conf.members} == {
        room.store.id: life_of(room.store.id) for room in placed
    }
    stores = [one.store for one in conf.members]
    assert stores == sorted(stores), "copies are numbered by store"


@pytest.mark.parametrize(("stores", "replicas"), [(3, 3), (3, 2), (3, 1), (4, 3), (6, 3), (5, 2)])
def test_primaries_and_copies_are_spread(stores: int, replicas: int) -> None:
    shards = 12 * stores
    available = rooms_of(*[1_000] * stores)
    volume = volume_of(replicas, shards=shards)
    primaries: Counter[int] = Counter()
    copies: Counter[int] = Counter()
    for index in range(shards):
        conf = first_conf(volume, index, placed=place_shard(GIB, replicas, available))
        primaries[conf.member(conf.primary).store] += 1
        copies.update(one.store for one in conf.members)
    assert max(copies.values()) - min(copies.values()) <= 1
    assert sum(primaries.values()) == shards
    assert max(primaries.values()) <= 1.5 * shards / stores, primaries


def test_small_volumes_have_their_primaries_on_different_stores() -> None:
    available = rooms_of(100, 100, 100)
    confs = [
        first_conf(volume_of(3, number=number), 0, placed=place_shard(GIB, 3, available))
        for number in range(1, 4)
    ]
    assert {conf.primary for conf in confs} == {0, 1, 2}
