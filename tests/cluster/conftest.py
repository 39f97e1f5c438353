"""A cluster per test; `tests/support/cluster.py` says what it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.cluster import EXPECTED_WARNINGS, RealCluster, temporary_cluster

__all__ = ["EXPECTED_WARNINGS", "RealCluster", "cluster"]


@pytest.fixture
def cluster() -> Iterator[RealCluster]:
    """Give a directory for a cluster; whatever runs there is stopped afterwards."""
    with temporary_cluster() as made:
        yield made
