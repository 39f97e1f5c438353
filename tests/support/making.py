"""Making the directory of a cluster, for tests that need no process."""

from __future__ import annotations

import asyncio

from pureflash.model.layout import Layout
from pureflash.supervisor.cluster import ClusterFile, Wish, open_cluster
from pureflash.supervisor.ports import PortClaims


def opened(
    layout: Layout, wish: Wish, *, ports: PortClaims | None = None
) -> tuple[ClusterFile, list[str]]:
    """Make or read a cluster; its ports are claimed in `ports`, or only for this moment."""
    if ports is not None:
        return asyncio.run(open_cluster(layout, wish, ports=ports))
    with PortClaims() as brief:
        return opened(layout, wish, ports=brief)
