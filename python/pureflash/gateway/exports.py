"""Which exports a gateway offers, and the volumes that are open for them.

Theory of operation. The conductor sends the whole list; `apply` compares it with what is open and
closes, opens or updates volumes. An export's id is its handle in `_core`. The list is also kept in
a file, so that a gateway that starts while no conductor is there offers what it offered before; the
conductor's list replaces it. What a handshake looks at (a `Table` by transport, handles by name) is
made once per list, so a connection costs the same with ten thousand exports as with one.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec

from pureflash.errors import PureFlashError
from pureflash.gateway.core import Gateway
from pureflash.gateway.nbd import Export, Table
from pureflash.model.core import core_spec
from pureflash.model.domain import Transport
from pureflash.model.messages import ExportReport, ExportSpec
from pureflash.model.outside import UNREADABLE
from pureflash.process.lifecycle import write_whole
from pureflash.process.logs import Log


class Exports:
    """The table of exports by id."""

    def __init__(self, gateway: Gateway, *, path: Path, log: Log) -> None:
        """Begin with none; `path` is where the list is kept."""
        self._gateway = gateway
        self._path = path
        self._log = log
        self.specs: dict[int, ExportSpec] = {}
        self.failures: dict[int, str] = {}
        self._opened: set[int] = set()
        self._tables: dict[Transport, Table] = {}
        self._handles: dict[tuple[str, str], int] = {}
        self.connections: dict[int, int] = {}
        """Export by connection number."""

    def restore(self) -> None:
        """Offer what was offered before the restart, as far as the file can be read."""
        try:
            kept = msgspec.json.decode(self._path.read_bytes(), type=tuple[ExportSpec, ...])
        except FileNotFoundError:
            return
        except UNREADABLE as problem:
            self._log.error("exports.unreadable", f"{self._path}: {problem}")
            return
        self.apply(kept)

    def apply(self, wanted: tuple[ExportSpec, ...]) -> None:
        """Offer exactly these."""
        now = {spec.id: spec for spec in wanted}
        for handle in [handle for handle in self.specs if handle not in now]:
            del self.specs[handle]
            self.failures.pop(handle, None)
            if handle in self._opened:
                self._opened.remove(handle)
                self._gateway.close_volume(handle)
            self._log.info("export.closed", f"export {handle}", export=handle)
        for handle, spec in now.items():
            if self.specs.get(handle) != spec:
                self._open(handle, spec)
        self._tables.clear()
        self._handles = {(spec.transport, spec.name): handle for handle, spec in now.items()}
        write_whole(self._path, msgspec.json.encode(wanted))

    def table(self, transport: Transport) -> Table:
        """Give what a negotiation may offer on a transport; the same object until a list comes."""
        if transport not in self._tables:
            self._tables[transport] = Table(
                Export(spec.name, spec.volume.size_bytes, is_read_only=spec.is_read_only)
                for spec in self.specs.values()
                if spec.transport == transport and spec.id not in self.failures
            )
        return self._tables[transport]

    def handle_of(self, name: str, transport: Transport) -> int | None:
        """Give the handle of an export that is still offered."""
        return self._handles.get((transport, name))

    def reports(self, uris: dict[Transport, str]) -> tuple[ExportReport, ...]:
        """Say how each export is; `uris` has, by transport, a format with {name}."""
        users = Counter(self.connections.values())
        reports: list[ExportReport] = []
        for handle, spec in sorted(self.specs.items()):
            form = uris.get(Transport(spec.transport))
            reason = self.failures.get(handle, "" if form else "the gateway is not listening")
            reports.append(
                ExportReport(
                    id=handle,
                    is_ready=not reason,
                    uri=form.format(name=spec.name) if form and not reason else "",
                    reason=reason,
                    connections=users[handle],
                )
            )
        return tuple(reports)

    def _open(self, handle: int, spec: ExportSpec) -> None:
        self.specs[handle] = spec
        try:
            if handle in self._opened:
                self._gateway.update_volume(handle, core_spec(spec.volume))
            else:
                self._gateway.open_volume(handle, core_spec(spec.volume))
                self._opened.add(handle)
                self._log.info("export.opened", f"{spec.name} over {spec.transport}", export=handle)
            self.failures.pop(handle, None)
        except PureFlashError as problem:
            self.failures[handle] = problem.message
            self._log.warning("export.failed", str(problem), code="EXPORT_NOT_READY", export=handle)
