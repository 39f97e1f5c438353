"""Where the files of a cluster on one machine are: `DIR` of `pf up`. Pure: paths, no I/O.

    DIR/cluster.toml  secret/{admin.token,cluster.key}  conductor/  stores/NAME/  gateways/NAME/
    DIR/log/NAME.jsonl  run/{up.lock,supervisor.json,NAME.ready}  config/NAME.toml

Sockets live elsewhere, in a folder with a short name, because AF_UNIX allows only 107 bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CONDUCTOR: Final = "c1"
GATEWAY: Final = "g1"


def store_name(number: int) -> str:
    """Name the store with this id, from 1."""
    return f"s{number}"


def known_disk_file(data: Path, index: int) -> Path:
    """Name the record of a disk in the directory of its store; see `store/known_disks.py`."""
    return data / f"disk{index}.json"


def allegiance_file(data: Path) -> Path:
    """Name a store's record of whom it obeys; see `process/allegiance.py`."""
    return data / "conductor.json"


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below one data directory, which is absolute."""

    directory: Path

    @property
    def cluster_file(self) -> Path:
        """Cluster id, ports and sizes, 0600."""
        return self.directory / "cluster.toml"

    @property
    def token(self) -> Path:
        """The bearer token of the API."""
        return self.directory / "secret" / "admin.token"

    @property
    def key(self) -> Path:
        """The cluster key."""
        return self.directory / "secret" / "cluster.key"

    @property
    def lock(self) -> Path:
        """Held by the supervisor; contains its pid."""
        return self.directory / "run" / "up.lock"

    @property
    def supervisor_file(self) -> Path:
        """What the supervisor knows of its children, as JSON."""
        return self.directory / "run" / "supervisor.json"

    @property
    def conductor_data(self) -> Path:
        """Directory of the metastore."""
        return self.directory / "conductor"

    def store_data(self, name: str) -> Path:
        """Directory of a store."""
        return self.directory / "stores" / name

    def disk(self, name: str) -> Path:
        """Disk of a store."""
        return self.store_data(name) / "disk0.img"

    def gateway_data(self, name: str) -> Path:
        """Directory of a gateway."""
        return self.directory / "gateways" / name

    def ready(self, name: str) -> Path:
        """File that a process writes when it is ready."""
        return self.directory / "run" / f"{name}.ready"

    def log(self, name: str) -> Path:
        """Log of a process."""
        return self.directory / "log" / f"{name}.jsonl"

    def output(self, name: str) -> Path:
        """Name what a process printed, which is little: panics and failures of the start."""
        return self.directory / "log" / f"{name}.out"

    def config(self, name: str) -> Path:
        """Name the settings of a process, written by `pf up`."""
        return self.directory / "config" / f"{name}.toml"

    def sockets(self, *, runtime_directory: str | None, uid: int) -> Path:
        """Folder of the unix sockets."""
        above = f"{runtime_directory}/pureflash" if runtime_directory else f"/tmp/pureflash-{uid}"  # noqa: S108 - documented; made 0700 with its owner checked
        mark = hashlib.sha256(str(self.directory).encode()).hexdigest()[:8]
        return Path(above) / mark
