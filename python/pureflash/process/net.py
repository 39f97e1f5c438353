"""Sockets: who listens does so on loopback only, and a port that is taken says who has it.

A bind to any other address is refused, because nothing is encrypted in this version. A taken port
is tried for `BIND_TIMEOUT_S`: the process that held it may be on its way out.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from typing import Final

import msgspec
import psutil

from pureflash.errors import CallerError, ClusterError, Code, SoftwareError
from pureflash.model.outside import UNREADABLE
from pureflash.model.rest import Alive

BIND_TIMEOUT_S: Final = 5.0
BIND_RETRY_S: Final = 0.25
BACKLOG: Final = 128
GREETING_TIMEOUT_S: Final = 5.0
GREETING_BYTES_MAX: Final = 4_096


def split_address(address: str) -> tuple[str, int]:
    """Split host:port; errors: CallerError INVALID."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535:
        raise CallerError(Code.INVALID, f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def check_loopback(host: str) -> None:
    """Refuse an address that others could reach. Errors: SoftwareError UNSUPPORTED."""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise SoftwareError(
            Code.UNSUPPORTED,
            f"listening on {host}: needs TLS, not in this version",
            next_step="listen on 127.0.0.1",
        )


async def bind_tcp(address: str, *, name: str, timeout_s: float = BIND_TIMEOUT_S) -> socket.socket:
    """Bind and listen on host:port of loopback; `name` is who asks, for the error.

    Errors: INVALID, UNSUPPORTED, UNAVAILABLE with the holder of the port.
    """
    host, port = split_address(address)
    check_loopback(host)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        try:
            return _bind(host, port)
        except OSError as problem:
            if problem.errno != errno.EADDRINUSE or loop.time() >= deadline:
                raise ClusterError(
                    Code.UNAVAILABLE,
                    f"{name} cannot listen on {address}: {problem.strerror}{holder_of(port)}",
                    next_step="end that program or choose another port",
                ) from problem
        await asyncio.sleep(BIND_RETRY_S)


async def cluster_at(address: str) -> str:
    """Ask whoever listens at host:port which cluster's conductor it is; empty: none that we know.

    It is asked before a token is shown to it, because a port may be another program's by now.
    Errors: OSError, TimeoutError when nobody listens, or nobody answers.
    """
    host, port = split_address(address)
    async with asyncio.timeout(GREETING_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            head = f"GET /healthz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode())
            answer = b""
            while len(answer) < GREETING_BYTES_MAX:
                part = await reader.read(GREETING_BYTES_MAX - len(answer))
                if not part:
                    break
                answer += part
        finally:
            writer.close()
    first, _, rest = answer.partition(b"\r\n")
    if not first.startswith(b"HTTP/1.1 200 "):
        return ""
    try:
        return msgspec.json.decode(rest.partition(b"\r\n\r\n")[2], type=Alive).cluster_id
    except UNREADABLE:
        return ""


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def holder_of(port: int) -> str:
    """Name the process that listens on a port, as far as we may see it; it follows a cause."""
    try:
        for connection in psutil.net_connections("tcp"):
            is_ours = connection.laddr and connection.laddr.port == port
            if is_ours and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None:
                    return ", held by another user's process"
                process = psutil.Process(connection.pid)
                return f", held by {process.name()} (pid {connection.pid})"
    except (psutil.Error, OSError):
        return ""
    return ""
