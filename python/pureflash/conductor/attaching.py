"""Attaching volumes: who writes fences whoever wrote before (T9), and gets what I/O needs.

Theory of operation. A volume has one writer at a time. To attach for writing raises the volume's
attach epoch, which is stored first; the reconciler then gives every shard a configuration with it,
and a shard serves the new writer in that epoch at the earliest. A shard is fenced when one ISR
member of that configuration follows it, because nothing is committed without every member. The
attach is answered when all shards are, or after a while: what nobody can reach serves nobody.
Readers attach without any of it. An attached client renews what it was given: routes and sizes
change, and tickets end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from pureflash.conductor import planner, requests
from pureflash.conductor.specs import Specs
from pureflash.conductor.standing import check_memory, is_known, report_of
from pureflash.conductor.view import View
from pureflash.conductor.writer import Writer
from pureflash.metastore import keys
from pureflash.metastore.records import Write
from pureflash.model.domain import ShardConf
from pureflash.model.messages import VolumeSpec
from pureflash.model.ticket import Rights


class Attaching:
    """See the module's head."""

    def __init__(
        self,
        *,
        view: Callable[[], View],
        lock: asyncio.Lock,
        writer: Writer,
        settled: Callable[[Callable[[View], bool]], Awaitable[None]],
        specs: Callable[[], Specs],
        draw: Callable[[], int],
    ) -> None:
        """Take what belongs to the conductor; `settled` lets it act until the view shows it."""
        self._view = view
        self._lock = lock
        self._writer = writer
        self._settled = settled
        self._specs = specs
        self._draw = draw

    async def attach(self, reference: str, *, is_read_only: bool) -> VolumeSpec:
        """Give what a client needs to do I/O by itself.

        Errors as `requests.check_attach`, and UNAVAILABLE while the records may be old.
        """
        if not _is_sure(self._view(), reference):
            await self._settled(lambda view: _is_sure(view, reference))
        check_memory(self._view(), self._view().find_volume(reference))
        volume = requests.find_volume(self._view(), reference)
        requests.check_attach(self._view(), volume, is_read_only=is_read_only)
        if not is_read_only:
            await self.take_over(volume.id)
        view = self._view()
        volume = requests.find_volume(view, str(volume.id))
        rights = Rights.READ if is_read_only else Rights.READ_WRITE
        return self._specs().volume(volume, planner.routes(view, volume), rights, self._draw())

    def renew(self, reference: str, *, ticket: str) -> VolumeSpec:
        """Describe an attached volume as it is now.

        Errors as `Specs.renewed`, and UNAVAILABLE while the records may be old: the client then
        goes on with what it has.
        """
        view = self._view()
        check_memory(view, view.find_volume(reference))
        volume = requests.find_volume(view, reference)
        return self._specs().renewed(volume, planner.routes(view, volume), ticket)

    async def take_over(self, volume_id: int) -> None:
        """Fence every writer of before, whatever it still has on its way: one at a time."""
        async with self._lock:
            volume = requests.find_volume(self._view(), str(volume_id))
            after = replace(volume, attach_epoch=volume.attach_epoch + 1)
            await self._writer.write_all(
                [Write(keys.volume(volume_id), after, "it is attached anew")]
            )

        await self._settled(lambda view: is_fenced(view, volume_id, after.attach_epoch))


def _is_sure(view: View, reference: str) -> bool:
    """Whether there is nothing to wait for before a volume is looked up."""
    return view.amnesia is not None or is_known(view, view.find_volume(reference))


def is_fenced(view: View, volume_id: int, attach_epoch: int) -> bool:
    """Whether nothing of an earlier attach can be committed any more, or the volume is gone."""
    volume = view.volumes.get(volume_id)
    confs = view.shards_of(volume) if volume is not None else []
    return all(conf.attach_epoch >= attach_epoch and _is_followed(view, conf) for conf in confs)


def _is_followed(view: View, conf: ShardConf) -> bool:
    """Whether an ISR member has told that it follows this configuration."""
    key = (conf.volume_id, conf.index)
    reports = (report_of(view, key, conf.member(copy)) for copy in conf.isr)
    return any(report is not None and report.epoch >= conf.epoch for report in reports)
