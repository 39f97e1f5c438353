"""Where a command's data directory comes from: flag, environment, context file or default.

`pf up` writes the context file; every other command reads it, so that nothing has to be repeated.
An answer carries its source, because an error about a directory must name what chose it.
"""

from __future__ import annotations

import json
import os
import pwd
import stat
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pureflash.errors import CallerError, ClusterError, Code, SecurityError
from pureflash.model.bearer import TOKEN_BYTES_MAX, token_in
from pureflash.model.cluster_file import DAMAGED_STEP, entry
from pureflash.model.layout import Layout

CONTEXT_BYTES_MAX = 64 * 1024
"""Largest context file that is read; ours has two lines."""
WITHOUT_ONE_STEP: Final = "name the cluster's directory with --data, or set PF_TOKEN"


@dataclass(frozen=True, slots=True)
class Place:
    """A data directory and what named it: `--data`, `PF_DATA`, the context file or `default`."""

    directory: Path
    source: str


def resolve_data(flag: Path | None, environment: Mapping[str, str] | None = None) -> Place:
    """Choose the data directory; it need not exist.

    Errors: CallerError INVALID for a context file that is not what `pf up` writes.
    """
    variables = os.environ if environment is None else environment
    if flag is not None:
        return Place(flag.absolute(), "--data")
    if named := variables.get("PF_DATA"):
        return Place(Path(named).absolute(), "PF_DATA")
    file = context_file(variables)
    if (remembered := _read_context(file)) is not None:
        return Place(remembered, str(file))
    return Place(_folder(variables, "XDG_STATE_HOME", ".local/state") / "pureflash", "default")


def _folder(variables: Mapping[str, str], name: str, below_home: str) -> Path:
    # The XDG specification: a relative path in these variables is to be ignored.
    value = variables.get(name, "")
    if value.startswith("/"):
        return Path(value)
    return _home(variables) / below_home


def _home(variables: Mapping[str, str]) -> Path:
    """Give the home of the user; an empty HOME is none, and the system's records count.

    Errors: CallerError INVALID when they have none either, as in a container under a bare number.
    """
    if named := variables.get("HOME"):
        return Path(named)
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError as cause:
        raise CallerError(
            Code.INVALID,
            f"HOME is not set, and this machine knows no home of uid {os.getuid()}",
            next_step="set HOME, or XDG_CONFIG_HOME and XDG_STATE_HOME",
        ) from cause


def _read_context(file: Path) -> Path | None:
    try:
        with file.open("rb") as stream:
            text = stream.read(CONTEXT_BYTES_MAX)
    except FileNotFoundError:
        return None
    try:
        data = tomllib.loads(text.decode()).get("data")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
        raise _bad_context(file, f"it is not TOML ({cause})") from cause
    if data is None:
        return None
    if not isinstance(data, str) or not data.startswith("/"):
        raise _bad_context(file, "`data` is not an absolute path")
    return Path(data)


def _bad_context(file: Path, reason: str) -> CallerError:
    return CallerError(
        Code.INVALID,
        f"cannot use the context file {file}: {reason}",
        next_step=f"name the directory with --data or PF_DATA, or delete {file}",
    )


def context_file(variables: Mapping[str, str]) -> Path:
    """Give the path of the context file."""
    return _folder(variables, "XDG_CONFIG_HOME", ".config") / "pureflash/context.toml"


@dataclass(frozen=True, slots=True)
class Server:
    """Where the API is: host:port, its token, and what named it."""

    address: str
    token: str
    source: str
    cluster_id: str = ""
    """Whose token it is; empty: not known."""
    is_of_directory: bool = False
    """Whether the data directory named it: then its processes are those of this machine."""


def resolve_server(
    server: str | None, data: Path | None, environment: Mapping[str, str] | None = None
) -> Server:
    """Find the conductor: `--server` > `PF_SERVER` > the cluster of the data directory.

    The token is `PF_TOKEN`, else that of the data directory. Errors: ClusterError UNAVAILABLE when
    there is no cluster in the directory, SecurityError UNAUTHENTICATED without a readable token.
    """
    variables = os.environ if environment is None else environment
    place = resolve_data(data, variables)
    layout = Layout(place.directory)
    if server is not None:
        address, source = server, "--server"
    elif named := variables.get("PF_SERVER"):
        address, source = named, "PF_SERVER"
    else:
        address, source = _address_of(layout, place), f"{place.directory}, {place.source}"
    address = address.removeprefix("http://").rstrip("/")
    named_token = variables.get("PF_TOKEN")
    if named_token is None:
        cluster_id, token = _cluster_of(layout), _token_of(layout)
    else:
        cluster_id, token = "", token_in(os.fsencode(named_token))
    if token is None:
        source_of_token = layout.token if named_token is None else "PF_TOKEN"
        raise SecurityError(
            Code.UNAUTHENTICATED,
            f"{source_of_token} is not a token: one word of printable ASCII",
            next_step=WITHOUT_ONE_STEP,
        )
    is_named = server is not None or bool(variables.get("PF_SERVER"))
    return Server(address, token, source, cluster_id, is_of_directory=not is_named)


def _token_of(layout: Layout) -> str | None:
    """Read the token of a directory; None for what is no token.

    Whoever prepared the directory could have made a link there to another token, and listen where
    it would be sent: what does not belong to the owner of the directory is not read. Errors:
    SecurityError UNAUTHENTICATED.
    """
    try:
        with open(layout.token, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            owner = layout.directory.stat().st_uid
            if found.st_uid == owner and stat.S_ISREG(found.st_mode):
                return token_in(file.read(TOKEN_BYTES_MAX + 1))
    except OSError as cause:
        raise SecurityError(
            Code.UNAUTHENTICATED,
            f"cannot read the token {layout.token}: {cause.strerror}",
            next_step=WITHOUT_ONE_STEP,
        ) from cause
    raise SecurityError(
        Code.UNAUTHENTICATED,
        f"{layout.token} is no file of the owner of {layout.directory}, and was not read",
        next_step=WITHOUT_ONE_STEP,
    )


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # what is no file must not make us wait


def remember(directory: Path, environment: Mapping[str, str]) -> None:
    """Let later commands use this data directory.

    Errors: CallerError INVALID when it cannot be written; then nothing is left of it.
    """
    file = context_file(environment)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("x") as stream:
            # A JSON string is a TOML basic string.
            stream.write(f"data = {json.dumps(str(directory))}\n")
        temporary.replace(file)
    except OSError as cause:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _remove_empty(file.parent, _home(environment))
        raise CallerError(
            Code.INVALID,
            f"cannot write {file}, which tells later commands of {directory}: {cause.strerror}",
            next_step="let XDG_CONFIG_HOME name a folder that you may write to",
        ) from cause


def forget(directory: Path, environment: Mapping[str, str]) -> None:
    """Take the directory out of the context, if it is the one that is remembered.

    The folders of our default places are taken away as well when nothing is in them any more: who
    had none before has none afterwards.
    """
    file = context_file(environment)
    if _read_context(file) == directory:
        file.unlink()
    home = _home(environment)
    for folder in (file.parent, _folder(environment, "XDG_STATE_HOME", ".local/state")):
        _remove_empty(folder, home)


def _remove_empty(folder: Path, home: Path) -> None:
    """Remove a folder of ours, and those above it below the home, as far as they are empty."""
    while folder.name == "pureflash" or home in folder.parents:
        try:
            folder.rmdir()
        except FileNotFoundError:
            pass  # it was never made; the one above it may have been
        except OSError:
            return  # somebody else's files are in it
        folder = folder.parent


def cluster_id_in(layout: Layout) -> str:
    """Give the id of the cluster of a directory. Errors: CallerError INVALID for a damaged file.

    OSError for one that cannot be read.
    """
    try:
        return str(entry(tomllib.loads(layout.cluster_file.read_text()), "cluster", "id"))
    except ValueError as cause:  # also what is no TOML, or no UTF-8
        raise _damaged(layout, cause) from cause


def _damaged(layout: Layout, cause: ValueError) -> CallerError:
    text = f"{layout.cluster_file} is damaged: {cause}"
    return CallerError(Code.INVALID, text, next_step=DAMAGED_STEP)


def _cluster_of(layout: Layout) -> str:
    """Give the id of the cluster of a directory; empty when it cannot be read."""
    try:
        return cluster_id_in(layout)
    except (OSError, CallerError):
        return ""


def _address_of(layout: Layout, place: Place) -> str:
    try:
        document = tomllib.loads(layout.cluster_file.read_text())
        return f"127.0.0.1:{entry(document, 'ports', 'conductor')}"
    except FileNotFoundError as cause:
        raise ClusterError(
            Code.UNAVAILABLE,
            f"there is no cluster in {place.directory} (from {place.source})",
            next_step="start one with `pf up`, or name one with --data or --server",
        ) from cause
    except OSError as cause:
        raise CallerError(
            Code.INVALID,
            f"cannot read {layout.cluster_file} (from {place.source}): {cause.strerror}",
            next_step="name a directory of your own with --data; a cluster is run by its owner",
        ) from cause
    except ValueError as cause:  # also what is no TOML, or no UTF-8
        raise _damaged(layout, cause) from cause
