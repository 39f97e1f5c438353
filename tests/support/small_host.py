"""A file system of a known size for a cluster's directory, that a test may really fill.

It is a tmpfs in a mount namespace of its own, which the kernel lets anybody make inside a new user
namespace; root needs no user namespace for it. Programs see it when they are started through
`enter`; the test itself looks at it through the process that holds the namespace.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

WAYS: Final = (("--user", "--map-root-user", "--mount"), ("--mount",))
"""How to get a mount namespace: as anybody, and as root where user namespaces are turned off."""
SPARE_BYTES: Final = 1 << 30
"""Memory that must be left when the file system is full."""


@dataclass(frozen=True, slots=True)
class SmallHost:
    """A mounted file system; `seen` is its root for a process outside of the namespace."""

    seen: Path
    enter: tuple[str, ...]

    @property
    def free_bytes(self) -> int:
        """Room that is left for anybody."""
        about = os.statvfs(self.seen)
        return about.f_bavail * about.f_frsize


@contextlib.contextmanager
def small_host(place: Path, size_bytes: int) -> Iterator[SmallHost]:
    """Mount a file system of this size at `place`, which is made.

    Skips the test where the machine cannot give it: the reason is in pytest's summary.
    """
    place.mkdir(mode=0o700)
    available = _available_bytes()
    if available < size_bytes + SPARE_BYTES:
        pytest.skip(f"{available >> 20} MiB of memory, a file system of {size_bytes >> 20} in it")
    script = f'mount -t tmpfs -o size={size_bytes},mode=700 tmpfs "$1" && echo mounted && exec cat'
    said = ""
    for way in WAYS:
        with subprocess.Popen(
            ["unshare", *way, "sh", "-c", script, "sh", str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as keeper:
            assert keeper.stdin is not None
            assert keeper.stdout is not None
            assert keeper.stderr is not None
            if keeper.stdout.readline() == "mounted\n":
                seen = Path(f"/proc/{keeper.pid}/root") / place.relative_to("/")
                spaces = [name for name in ("--user", "--mount") if name in way]
                enter = ("nsenter", f"--target={keeper.pid}", *spaces, "--preserve-credentials")
                try:
                    yield SmallHost(seen, enter)
                finally:
                    keeper.stdin.close()  # its `cat` ends, and with the last process the mount
                return
            said += keeper.stderr.read()
    pytest.skip(f"no mount namespace for a small file system: {said.strip()}")


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")
