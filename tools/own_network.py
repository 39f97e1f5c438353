"""Run a program on a network of its own: a loopback that nobody else listens on.

    python tools/own_network.py PROGRAM [ARGUMENT...]

Tests of whole clusters choose ports, and want them back after a restart; on one network, two at a
time take them from each other. The kernel gives a network namespace to root, and to anybody else
inside of a user namespace, in which the program keeps its uid and gets no capability. The loopback
of a new namespace is down, so this program runs twice: outside, where it becomes `unshare`, and
inside, where it brings the loopback up and becomes the program. The pid stays the same. Exit status
of the program; that of `unshare` where the machine gives no namespace.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Final, NoReturn

INSIDE: Final = "--inside"
SIOCSIFFLAGS: Final = 0x8914  # linux/sockios.h
IFF_UP: Final = 0x1  # linux/if.h
AS_ANYBODY: Final = ("--user", "--map-current-user", "--keep-caps")
WITHOUT_CAPABILITIES: Final = ("setpriv", "--inh-caps=-all", "--ambient-caps=-all")


def command(*program: str) -> tuple[str, ...]:
    """Make the command that runs a program on a network of its own."""
    return (sys.executable, str(Path(__file__).resolve()), *program)


def is_possible() -> bool:
    """Tell whether this machine lets this user have networks of his own."""
    return subprocess.run(command("true"), check=False, capture_output=True).returncode == 0


def bring_loopback_up() -> None:
    """Bring the loopback of this namespace up. Errors: OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def main(arguments: list[str]) -> NoReturn:
    """Become the program; see the module's head."""
    is_root = os.geteuid() == 0
    if arguments[0] == INSIDE:
        bring_loopback_up()
        program = [*(() if is_root else WITHOUT_CAPABILITIES), *arguments[1:]]
    else:
        way = () if is_root else AS_ANYBODY
        program = ["unshare", *way, "--net", *command(INSIDE, *arguments)]
    os.execvp(program[0], program)  # noqa: S606 no shell is wanted


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: own_network.py PROGRAM [ARGUMENT...]")
    main(sys.argv[1:])
