"""The oracle of the whole-stack test is right itself: compared with plain bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.support.sparse import PAGE_BYTES, SparseBytes

SIZE = 4 * PAGE_BYTES
EDGES = st.sampled_from([0, 512, PAGE_BYTES, 2 * PAGE_BYTES, 3 * PAGE_BYTES])
RANGES = st.tuples(EDGES, st.integers(0, PAGE_BYTES)).map(lambda pair: min(sum(pair), SIZE - 1))


@given(
    st.lists(
        st.tuples(st.booleans(), RANGES, st.integers(1, 2 * PAGE_BYTES), st.integers(1, 255)),
        max_size=12,
    )
)
def test_it_reads_as_plain_bytes_do(steps: list[tuple[bool, int, int, int]]) -> None:
    sparse, plain = SparseBytes(), bytearray(SIZE)
    for is_write, offset, length, value in steps:
        count = min(length, SIZE - offset)
        if is_write:
            sparse.write(offset, bytes([value]) * count)
            plain[offset : offset + count] = bytes([value]) * count
        else:
            sparse.zero(offset, count)
            plain[offset : offset + count] = bytes(count)
        assert sparse.read(offset, count) == plain[offset : offset + count]
    assert sparse.read(0, SIZE) == plain
