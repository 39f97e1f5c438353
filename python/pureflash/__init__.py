"""PureFlash: shared, replicated block storage from the NVMe drives of ordinary servers.

Importing this package runs nothing and loads nothing: `pf --help` must answer at once, and a
planner that wants one pure module must not pull in the extension or a server. The version and
`connect` are looked up when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pureflash.client.cluster import connect

    __version__: str

__all__ = ["__version__", "connect"]


def __getattr__(name: str) -> Any:
    """Look up `__version__` in the installed package's metadata, the one place that states it."""
    if name == "__version__":
        from importlib.metadata import version

        return version("pureflash")
    if name == "connect":
        from pureflash.client.cluster import connect

        return connect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
