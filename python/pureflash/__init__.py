"""PureFlash: shared, replicated block storage from the NVMe drives of ordinary servers.

Importing this package runs nothing and loads nothing: `pf --help` must answer at once, and a
planner that wants one pure module must not pull in the extension or a server. The version is
looked up when it is first asked for.
"""

from __future__ import annotations

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """Look up `__version__` in the installed package's metadata, the one place that states it."""
    if name == "__version__":
        from importlib.metadata import version

        return version("pureflash")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
