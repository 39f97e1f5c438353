"""Ports of this machine, each promised to one supervisor at a time.

Theory of operation. A port is chosen long before a child listens on it, and until then nothing
about the port itself shows that it is taken: two supervisors that look at the same moment would
both find it free, and one of their children could not start. So a supervisor first claims the port
by a name, an abstract unix socket bound to it. The kernel gives a name to one socket only, for all
users and in the same network namespace as the ports themselves, takes it back when the process
ends however it ends, and leaves no file behind. Only then is the port itself tried.

A claim binds supervisors alone. A port that another program takes between choice and start is
found by the child, which names the holder.

A cluster keeps its ports over stops and reboots, but another program may have taken one meanwhile.
Then `settle` chooses the next free one, as at the first start, and says so; it waits for a moment
first, because the one in the way may be a process of this very cluster that has not ended yet.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final, Self

from pureflash.errors import CallerError, Code
from pureflash.process.net import holder_of

PORT_MAX: Final = 65_535
PORT_TRIES: Final = 20
ENDING_S: Final = 5.0
"""How long a process of the same cluster may need to give its port back; its sockets are closed
first when it stops, so this is long."""
LOOK_S: Final = 0.1
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

    def take(self, port: int) -> bool:
        """Claim one port, if it is free as well."""
        if not self.claim(port):
            return False
        if _is_free(port):
            return True
        self._held.pop(port).close()
        return False

    def next_free(self, base: int) -> int:
        """Claim the next free of `PORT_TRIES` ports. Errors: CallerError IN_USE."""
        for port in range(base, base + PORT_TRIES):
            if self.take(port):
                return port
        raise CallerError(
            Code.IN_USE,
            f"no free port from {base} to {base + PORT_TRIES - 1}",
            next_step="stop a program that listens there, or another cluster with `pf down`",
        )

    def exactly(self, port: int, *, flag: str) -> int:
        """Claim the port that a person asked for. Errors: CallerError IN_USE, INVALID."""
        if not 1 <= port <= PORT_MAX:
            raise CallerError(
                Code.INVALID, f"{flag}: there is no port {port}", next_step=f"use 1 to {PORT_MAX}"
            )
        if not self.take(port):
            raise CallerError(
                Code.IN_USE,
                f"{flag}: port {port} is taken{holder_of(port)}",
                next_step="end that program, or ask for another port",
            )
        return port

    async def settle(self, port: int, *, base: int) -> tuple[int, str]:
        """Claim the port of before, or else the next free one from `base` and the reason.

        Errors: CallerError IN_USE when none is free.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ENDING_S
        while not self.take(port):
            if loop.time() >= deadline:
                return self.next_free(base), f"{port} is taken{holder_of(port)}"
            await asyncio.sleep(LOOK_S)
        return port, ""


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
