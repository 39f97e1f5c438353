"""`pureflash.connect()`: volumes of a cluster as Python objects.

cluster = pureflash.connect()
volume = cluster.volumes.create("v1", "20GiB", replicas=3)
with volume.open() as device:
device.pwrite(bytes(4096), offset=0)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from pureflash.client.api import Api
from pureflash.client.context import resolve_server
from pureflash.client.device import Device, open_device
from pureflash.errors import CallerError, Code
from pureflash.model.rest import ClusterView, CreateVolume, VolumeView
from pureflash.units import parse_size


class Volume:
    """A volume; `view` is how it was when it was last read."""

    def __init__(self, api: Api, view: VolumeView, devices: weakref.WeakSet[Device]) -> None:
        """Wrap what the API gave; a device that is opened joins `devices`."""
        self._api = api
        self._devices = devices
        self.view = view

    @property
    def name(self) -> str:
        """Name of the volume."""
        return self.view.name

    def refresh(self) -> VolumeView:
        """Read it again."""
        self.view = self._api.volume(str(self.view.id))
        return self.view

    def resize(self, size: int | str) -> VolumeView:
        """Let it grow to `size`: bytes, or text such as 20GiB."""
        self.view = self._api.resize_volume(str(self.view.id), size_bytes=_bytes_of(size))
        return self.view

    def delete(self) -> None:
        """Delete it and its data; the space is free a moment later."""
        self._api.delete_volume(str(self.view.id))

    def open(self, *, is_read_only: bool = False) -> Device:
        """Attach it for I/O in this process.

        For writing it takes the volume over: who wrote before is fenced. Errors: CallerError
        IN_USE while it is exported for writing.
        """
        device = open_device(self._api, str(self.view.id), is_read_only=is_read_only)
        self._devices.add(device)
        return device


class Volumes:
    """The volumes of a cluster; iterating lists them."""

    def __init__(self, api: Api) -> None:
        """Work through `api`."""
        self._api = api
        self.devices: weakref.WeakSet[Device] = weakref.WeakSet()
        """Those that were opened and still exist."""

    def __iter__(self) -> Iterator[Volume]:
        return (Volume(self._api, view, self.devices) for view in self._api.volumes())

    def get(self, reference: str) -> Volume:
        """Find a volume by name or id. Errors: CallerError NOT_FOUND."""
        return Volume(self._api, self._api.volume(reference), self.devices)

    def create(
        self,
        name: str,
        size: int | str,
        *,
        replicas: int | None = None,
        shard_size: int | str | None = None,
    ) -> Volume:
        """Make a volume; sizes are bytes, or text such as 20GiB.

        Errors: CallerError INVALID, ALREADY_EXISTS; MediaError NO_SPACE.
        """
        wish = CreateVolume(
            name=name,
            size_bytes=_bytes_of(size),
            replicas=replicas,
            shard_size_bytes=None if shard_size is None else _bytes_of(shard_size),
        )
        return Volume(self._api, self._api.create_volume(wish), self.devices)


class Cluster:
    """A connection to a cluster; a context manager."""

    def __init__(self, api: Api) -> None:
        """Work through `api`."""
        self.api = api
        self.volumes = Volumes(api)

    def __enter__(self) -> Self:
        self.api.owner.check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or self.api.owner.is_here:  # a child's own exception goes its way
            self.close()

    def status(self) -> ClusterView:
        """Show the cluster."""
        return self.api.cluster()

    def close(self) -> None:
        """End the connections; open devices go on, but do not follow their volumes any more."""
        self.api.owner.check()
        devices = list(self.volumes.devices)
        for device in devices:
            device.unfollow(is_awaited=False)
        for device in devices:
            device.unfollow()
        self.api.close()


def connect(server: str | None = None, *, data: str | Path | None = None) -> Cluster:
    """Connect to a cluster: `server` (host:port) or `data`, else as `pf` finds it.

    Errors: ClusterError UNAVAILABLE, SecurityError UNAUTHENTICATED.
    """
    found = resolve_server(server, None if data is None else Path(data))
    return Cluster(
        Api(found.address, found.token, source=found.source, cluster_id=found.cluster_id)
    )


def _bytes_of(size: int | str) -> int:
    if isinstance(size, int):
        return size
    try:
        return parse_size(size).size_bytes
    except ValueError as cause:
        step = "give a number of bytes, or text such as 20GiB"
        raise CallerError(Code.INVALID, str(cause), next_step=step) from cause
