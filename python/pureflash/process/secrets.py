"""The secrets of a cluster on disk: `admin.token` and `cluster.key`, 0600 in a folder of 0700."""

from __future__ import annotations

from pathlib import Path

from pureflash.errors import CallerError, Code
from pureflash.model.bearer import TOKEN_BYTES_MAX, token_in
from pureflash.model.ticket import KEY_BYTES


def read_key(path: Path) -> bytes:
    """Read the cluster key: 64 hexadecimal digits. Errors: CallerError INVALID."""
    try:
        key = bytes.fromhex(_read(path).decode("ascii").strip())
    except ValueError as cause:
        raise _damaged(path, "is not a cluster key") from cause
    if len(key) != KEY_BYTES:
        raise _damaged(path, f"has {len(key)} bytes, a key has {KEY_BYTES}")
    return key


def read_token(path: Path) -> str:
    """Read the token of the API: one word of printable ASCII. Errors: CallerError INVALID."""
    token = token_in(_read(path))
    if token is None:
        raise _damaged(path, "is not a token: one word of printable ASCII")
    return token


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(TOKEN_BYTES_MAX + 1)
    except OSError as cause:
        raise _damaged(path, f"cannot be read: {cause.strerror}") from cause


def _damaged(path: Path, what: str) -> CallerError:
    return CallerError(
        Code.INVALID, f"{path} {what}", next_step="restore it from a backup of the data directory"
    )
