"""Ports of this machine, each promised to one supervisor at a time.

Theory of operation. A port is chosen long before a child listens on it, and until then nothing
about the port itself shows that it is taken: two supervisors that look at the same moment would
both find it free, and one of their children could not start. So a supervisor first claims the port
by a name, an abstract unix socket bound to it. The kernel gives a name to one socket only, for all
users and in the same network namespace as the ports themselves, takes it back when the process
ends however it ends, and leaves no file behind. Only then is the port itself tried.

A claim binds supervisors alone. A port that another program takes between choice and start is
found by the child, which names the holder.
"""

from __future__ import annotations

import socket
from typing import Final, Self

from pureflash.errors import CallerError, Code

PORT_TRIES: Final = 20
_NAME: Final = "\0pureflash-port-{port}"
"""The leading zero makes the name an abstract one."""


class PortClaims:
    """The ports that this process has claimed; they are free again when it is closed."""

    def __init__(self) -> None:
        """Begin with none."""
        self._held: dict[int, socket.socket] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all claims back."""
        while self._held:
            self._held.popitem()[1].close()

    def claim(self, port: int) -> bool:
        """Claim one port; False when another supervisor, or an earlier call, has done so."""
        name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            name.bind(_NAME.format(port=port))
        except OSError:
            name.close()
            return False
        self._held[port] = name
        return True

    def next_free(self, base: int) -> int:
        """Claim the next free of `PORT_TRIES` ports. Errors: CallerError IN_USE."""
        for port in range(base, base + PORT_TRIES):
            if self.claim(port):
                if _is_free(port):
                    return port
                self._held.pop(port).close()
        raise CallerError(
            Code.IN_USE,
            f"no free port from {base} to {base + PORT_TRIES - 1}",
            next_step="stop a program that listens there, or another cluster with `pf down`",
        )


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
