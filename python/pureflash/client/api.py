"""The typed client of the HTTP API: one method per operation, errors as PureFlashError.

Blocking and small; an application with its own loop runs it in a thread. Every call has a timeout
longer than the server's own waiting. A call that creates something carries an idempotency key, so
that it may be repeated when the connection breaks before the answer.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import httpx2
import msgspec

from pureflash.errors import CallerError, ClusterError, Code, SoftwareError, from_code
from pureflash.model.messages import VolumeSpec
from pureflash.model.outside import UNREADABLE
from pureflash.model.rest import (
    AttachVolume,
    ClusterView,
    CreateExport,
    CreateVolume,
    DiskView,
    EventView,
    ExitedStore,
    ExplainLine,
    ExportView,
    ForceAccept,
    ForceAcceptView,
    JobView,
    Page,
    PatchVolume,
    Problem,
    RecoverConfig,
    RecoveryView,
    RenewAttach,
    StoreView,
    VolumeView,
)

TIMEOUT_S: Final = 30.0
READ_TIMEOUT_S: Final = 10.0
"""Of what only asks: no such request waits for anything at the conductor."""
CONNECT_TIMEOUT_S: Final = 5.0
_TIMEOUT: Final = httpx2.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
_T = TypeVar("_T")


class Api:
    """A client of one conductor. A context manager; `close` ends its connections."""

    def __init__(
        self,
        address: str,
        token: str,
        *,
        source: str = "the caller",
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """Speak to host:port; `source` says in errors what named the address."""
        self.address = address
        self._source = source
        self._http = httpx2.Client(
            base_url=f"http://{address}",
            headers={"Authorization": f"Bearer {token}"},
            timeout=_TIMEOUT,
            trust_env=False,
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connections."""
        self._http.close()

    def cluster(self) -> ClusterView:
        """Show the cluster."""
        return self._call("GET", "/v1/cluster", ClusterView)

    def volumes(self) -> list[VolumeView]:
        """List all volumes."""
        return self._list("/v1/volumes", Page[VolumeView])

    def volume(self, reference: str) -> VolumeView:
        """Show a volume by name or id."""
        return self._call("GET", f"/v1/volumes/{_quoted(reference)}", VolumeView)

    def create_volume(self, wish: CreateVolume) -> VolumeView:
        """Make a volume; answers when its stores have it."""
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        return self._call("POST", "/v1/volumes", VolumeView, body=wish, headers=headers)

    def resize_volume(
        self, reference: str, *, size_bytes: int, if_version: int | None = None
    ) -> VolumeView:
        """Let a volume grow."""
        return self._call(
            "PATCH",
            f"/v1/volumes/{_quoted(reference)}",
            VolumeView,
            body=PatchVolume(size_bytes=size_bytes),
            headers=_if_match(if_version),
        )

    def delete_volume(self, reference: str, *, if_version: int | None = None) -> JobView:
        """Begin to delete a volume; gives the job."""
        path = f"/v1/volumes/{_quoted(reference)}"
        return self._call("DELETE", path, JobView, headers=_if_match(if_version))

    def verify_volume(self, reference: str) -> JobView:
        """Begin to compare all in-sync replicas of a volume; gives the job."""
        return self._call("POST", f"/v1/volumes/{_quoted(reference)}/verify", JobView)

    def force_accept(self, reference: str, wish: ForceAccept) -> ForceAcceptView:
        """Let a copy count when no in-sync copy is left; with `dry_run` only say what that does."""
        path = f"/v1/volumes/{_quoted(reference)}/force-accept"
        return self._call("POST", path, ForceAcceptView, body=wish)

    def recover_config(self, wish: RecoverConfig) -> RecoveryView:
        """Rebuild the conductor's records from the stores; with `dry_run` only say what changes."""
        return self._call("POST", "/v1/conductor/recover-config", RecoveryView, body=wish)

    def explain_volume(self, reference: str) -> list[ExplainLine]:
        """Say why a volume is as it is."""
        return self._list(f"/v1/volumes/{_quoted(reference)}/explain", Page[ExplainLine])

    def attach_volume(self, reference: str, *, is_read_only: bool = False) -> VolumeSpec:
        """Give what is needed to do I/O on a volume directly."""
        path = f"/v1/volumes/{_quoted(reference)}/attach"
        return self._call("POST", path, VolumeSpec, body=AttachVolume(is_read_only=is_read_only))

    def renew_attach(self, reference: str, ticket: str, *, timeout_s: float) -> VolumeSpec:
        """Give what has become of an attached volume, for the session of a ticket.

        `timeout_s` is for each of connecting, sending and receiving.
        """
        path = f"/v1/volumes/{_quoted(reference)}/renew"
        body = RenewAttach(ticket=ticket)
        return self._call("POST", path, VolumeSpec, body=body, timeout_s=timeout_s)

    def stores(self) -> list[StoreView]:
        """List stores."""
        return self._list("/v1/stores", Page[StoreView])

    def store_exited(self, name: str, *, incarnation: int) -> None:
        """Report that a store's process has ended."""
        path = f"/v1/stores/{_quoted(name)}/exited"
        self._send("POST", path, body=ExitedStore(incarnation=incarnation))

    def disks(self) -> list[DiskView]:
        """List disks."""
        return self._list("/v1/disks", Page[DiskView])

    def exports(self) -> list[ExportView]:
        """List exports."""
        return self._list("/v1/exports", Page[ExportView])

    def create_export(self, wish: CreateExport) -> ExportView:
        """Export a volume; the same again gives the same export."""
        return self._call("POST", "/v1/exports", ExportView, body=wish)

    def delete_export(self, reference: str) -> None:
        """Take an export away."""
        self._send("DELETE", f"/v1/exports/{_quoted(reference)}")

    def jobs(self) -> list[JobView]:
        """List jobs."""
        return self._list("/v1/jobs", Page[JobView])

    def job(self, job_id: int) -> JobView:
        """Show a job."""
        return self._call("GET", f"/v1/jobs/{job_id}", JobView)

    def events(self, *, after: int | None = None) -> Iterator[EventView]:
        """Follow events for ever; `after`: an id to resume from."""
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        try:
            with self._http.stream("GET", "/v1/events", headers=headers, timeout=None) as answer:
                if answer.is_error:
                    answer.read()
                    raise _error_of(answer)
                for line in answer.iter_lines():
                    if line.startswith("data:"):
                        yield msgspec.json.decode(line[5:], type=EventView)
        except httpx2.TransportError as cause:
            raise self._unreachable(cause) from cause

    def _list(self, path: str, kind: type[Page[_T]]) -> list[_T]:
        items: list[_T] = []
        cursor: str | None = None
        while True:
            query = {} if cursor is None else {"cursor": cursor}
            found = self._call("GET", path, kind, query=query)
            items += found.items
            cursor = found.next
            if cursor is None:
                return items

    def _call(
        self,
        method: str,
        path: str,
        kind: type[_T],
        *,
        body: msgspec.Struct | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> _T:
        answer = self._send(
            method, path, body=body, headers=headers, query=query, timeout_s=timeout_s
        )
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except UNREADABLE as cause:
            raise SoftwareError(
                Code.UNSUPPORTED, f"{self.address} gave an answer that this version cannot read"
            ) from cause

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: msgspec.Struct | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> httpx2.Response:
        content = None if body is None else msgspec.json.encode(body)
        if timeout_s is None:
            timeout_s = READ_TIMEOUT_S if method == "GET" else TIMEOUT_S
        timeout = httpx2.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))
        sent: dict[str, str] = dict(headers or {})
        if body is not None:
            sent["Content-Type"] = "application/json"
        try:
            answer = self._http.request(
                method,
                path,
                content=content,
                headers=sent,
                params=dict(query or {}),
                timeout=timeout,
            )
        except httpx2.TransportError as cause:
            raise self._unreachable(cause) from cause
        if answer.is_error:
            raise _error_of(answer)
        return answer

    def _unreachable(self, cause: Exception) -> ClusterError:
        step = "start the cluster with `pf up`, or name another with --server or --data"
        if isinstance(cause, httpx2.ReadTimeout):
            step = (
                "its process is there and hangs: see `pf logs c1`; volumes are served without it"
                " meanwhile, and `pf up` starts it again when it is ended"
            )
        return ClusterError(
            Code.UNAVAILABLE,
            f"the conductor at {self.address} (from {self._source}) does not answer:"
            f" {str(cause) or type(cause).__name__}",
            next_step=step,
        )


def _error_of(answer: httpx2.Response) -> Exception:
    try:
        problem = msgspec.json.decode(answer.content, type=Problem)
        code = int(Code[problem.code])
    except (*UNREADABLE, KeyError):
        return SoftwareError(
            Code.INTERNAL, f"the server answered {answer.status_code} without an explanation"
        )
    return from_code(
        code, problem.detail, next_step=problem.next_step, request_id=problem.request_id
    )


def _quoted(reference: str) -> str:
    from urllib.parse import quote

    if reference in ("", ".", ".."):  # in a path these would name something else
        raise CallerError(
            Code.NOT_FOUND,
            f"nothing can have the name {reference!r}",
            next_step="give a name or an id; `list` of the noun shows them",
        )
    return quote(reference, safe="")


def _if_match(version: int | None) -> dict[str, Any]:
    return {} if version is None else {"If-Match": f'"{version}"'}
