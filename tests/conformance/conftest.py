"""One cluster of three stores for all foreign clients; each test makes a volume of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.support.cluster import RealCluster, temporary_cluster

Exporter = Callable[..., str]


@pytest.fixture(scope="session")
def cluster() -> Iterator[RealCluster]:
    """Start three stores; no client may cause a warning in any log."""
    with temporary_cluster() as made:
        made.pf("up", "--detach", "--disk", "4G", "--journal", "16M")
        yield made


@pytest.fixture
def export(cluster: RealCluster) -> Iterator[Exporter]:
    """Make volumes of three replicas and export them; gives the URI of each."""
    names: list[str] = []

    def make(size: str, *flags: str) -> str:
        name = f"v{len(names)}"
        names.append(name)
        cluster.pf("volume", "create", name, size, "--replicas", "3", "--shard-size", "1G")
        return cluster.export(name, *flags)

    yield make
    for name in names:
        assert "3 copies are equal" in cluster.pf("volume", "verify", name)
        cluster.pf("export", "delete", name)
        cluster.pf("volume", "delete", name, "--yes")
