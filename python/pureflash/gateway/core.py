"""What the gateway process expects of `pureflash._core`, so that a type checker sees both sides."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from pureflash.errors import Code, SoftwareError


class Gateway(Protocol):
    """`_core.Gateway(*, cluster_id)`: volumes that are open, and the connections that use them."""

    def open_volume(self, handle: int, spec: dict[str, Any]) -> None:
        """Open a volume under a handle of the caller's choice; connects as needed."""

    def update_volume(self, handle: int, spec: dict[str, Any]) -> None:
        """Follow new routes, a new size or a new ticket."""

    def close_volume(self, handle: int) -> None:
        """Close a volume and the connections that use it."""

    def adopt_nbd(
        self, fd: int, leftover: bytes, handle: int, structured: bool, read_only: bool
    ) -> int:
        """Take a socket over for NBD's transmission phase; gives the connection's number.

        The gateway keeps a duplicate; the caller closes its own. `leftover`: bytes already read.
        """

    def fileno(self) -> int:
        """Give the eventfd that is readable while events wait."""

    def drain(self) -> list[tuple[Any, ...]]:
        """Take all events: ("closed", connection, reason), ("conf_needed", handle, shard_index)."""

    def stats(self) -> Mapping[str, Any]:
        """Give "volumes": {handle: {name: int}}, of each open volume's session."""

    def close(self) -> None:
        """Close everything; blocks until that is done."""


class GatewayCore(Protocol):
    """The part of the module `pureflash._core` that a gateway needs."""

    def Gateway(self, *, cluster_id: bytes) -> Gateway:  # noqa: N802 - the name of a class
        """Start a gateway without volumes."""


def totals(volumes: dict[int, dict[str, int]]) -> dict[str, int]:
    """Add up the counters of all sessions; sizes and gauges of single volumes are left out."""
    gauges = {"size_bytes", "open_requests", "connections"}
    names = {name for counters in volumes.values() for name in counters} - gauges
    return {
        name: sum(counters.get(name, 0) for counters in volumes.values()) for name in sorted(names)
    }


def load_core() -> GatewayCore:
    """Load the extension module; errors as `store.core.load_core`."""
    module: Any = importlib.import_module("pureflash._core")
    if not hasattr(module, "Gateway"):
        raise SoftwareError(
            Code.UNSUPPORTED,
            "this build of the core has no Gateway",
            next_step="build the package again: pip install .",
        )
    core: GatewayCore = module
    return core
