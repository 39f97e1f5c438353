"""The secrets of a cluster on disk: `admin.token` and `cluster.key`, 0600 in a folder of 0700."""

from __future__ import annotations

from pathlib import Path

from pureflash.errors import CallerError, Code
from pureflash.model.ticket import KEY_BYTES


def read_key(path: Path) -> bytes:
    """Read the cluster key: 64 hexadecimal digits. Errors: CallerError INVALID; OSError."""
    try:
        key = bytes.fromhex(path.read_text().strip())
    except ValueError as cause:
        raise CallerError(Code.INVALID, f"{path} is not a cluster key") from cause
    if len(key) != KEY_BYTES:
        raise CallerError(Code.INVALID, f"{path} has {len(key)} bytes, a key has {KEY_BYTES}")
    return key
