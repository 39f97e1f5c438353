"""The typed client of the HTTP API: one method per operation, errors as PureFlashError.

Blocking and small; an application with its own loop runs it in a thread. Every call has a timeout
longer than the server's own waiting.

What only asks fails with UNAVAILABLE when no answer comes. What changes something does so only
while it cannot have been sent; after that nobody here knows whether it is done, and the error is
TIMED_OUT, which says where to look. Each change carries an idempotency key. When the connection
breaks it is sent once more with the same key, within the time of the first: the server carries out
a key once, whichever of the two arrives.

Connections are not shared with forked children: there every call raises CallerError IN_USE.
"""

from __future__ import annotations

import secrets
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import httpx2
import msgspec

from pureflash.client.owner import Owner
from pureflash.errors import (
    CallerError,
    ClusterError,
    Code,
    PureFlashError,
    SoftwareError,
    from_code,
)
from pureflash.model.messages import VolumeSpec
from pureflash.model.outside import UNREADABLE
from pureflash.model.rest import (
    Alive,
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
GREETING_TIMEOUT_S: Final = 5.0
"""For the question whose conductor it is."""
NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Trusts nobody. The API speaks no TLS, and a client that is not told so first reads every
certificate authority of the machine, which takes longer than most commands."""
_TIMEOUT: Final = httpx2.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
_NOT_SENT: Final = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.LocalProtocolError,
    httpx2.UnsupportedProtocol,
)
"""After these the server has nothing of the request. After all others it may have all of it."""
_T = TypeVar("_T")


class Api:
    """A client of one conductor. A context manager; `close` ends its connections."""

    def __init__(
        self,
        address: str,
        token: str,
        *,
        source: str = "the caller",
        cluster_id: str = "",
        transport: httpx2.BaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Speak to host:port; `source` says in errors what named the address.

        With `cluster_id` the token is shown only to a conductor of that cluster. `transport` and
        `clock`, in seconds, are for tests.
        """
        self.owner = Owner("the connection to the conductor")
        """Asked before every call, and by whoever holds connections together with this one."""
        self._clock = clock
        self.address = address
        self._cluster_id = cluster_id
        self._source = source
        self._token = token
        self._http = httpx2.Client(
            base_url=f"http://{address}",
            timeout=_TIMEOUT,
            trust_env=False,
            transport=transport,
            verify=NO_TLS,
        )

    def __enter__(self) -> Self:
        self.owner.check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or self.owner.is_here:  # a child's own exception goes its way
            self.close()

    def close(self) -> None:
        """End the connections."""
        self.owner.check()
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
        look = None if wish.dry_run else f"`pf volume list` shows whether there is a {wish.name}"
        return self._call("POST", "/v1/volumes", VolumeView, body=wish, look=look)

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
            look=f"`pf volume show {reference}` shows its size",
        )

    def delete_volume(self, reference: str, *, if_version: int | None = None) -> JobView:
        """Begin to delete a volume; gives the job."""
        path = f"/v1/volumes/{_quoted(reference)}"
        look = "`pf volume list` and `pf job list` show whether it goes"
        return self._call("DELETE", path, JobView, headers=_if_match(if_version), look=look)

    def verify_volume(self, reference: str, *, is_repairing: bool = True) -> JobView:
        """Begin to compare all in-sync replicas of a volume; gives the job.

        `is_repairing`: what one copy cannot read is mended where another one has it.
        """
        path = f"/v1/volumes/{_quoted(reference)}/verify"
        query = {} if is_repairing else {"repair": "false"}
        return self._call("POST", path, JobView, query=query, look="`pf job list` shows it")

    def force_accept(self, reference: str, wish: ForceAccept) -> ForceAcceptView:
        """Let a copy count when no in-sync copy is left; with `dry_run` only say what that does."""
        path = f"/v1/volumes/{_quoted(reference)}/force-accept"
        look = None if wish.dry_run else "`pf job list` shows whether it was done"
        return self._call("POST", path, ForceAcceptView, body=wish, look=look)

    def recover_config(self, wish: RecoverConfig) -> RecoveryView:
        """Rebuild the conductor's records from the stores; with `dry_run` only say what changes."""
        path = "/v1/conductor/recover-config"
        look = None if wish.dry_run else "`pf status` says whether the records are still missing"
        return self._call("POST", path, RecoveryView, body=wish, look=look)

    def explain_volume(self, reference: str) -> list[ExplainLine]:
        """Say why a volume is as it is."""
        return self._list(f"/v1/volumes/{_quoted(reference)}/explain", Page[ExplainLine])

    def attach_volume(self, reference: str, *, is_read_only: bool = False) -> VolumeSpec:
        """Give what is needed to do I/O on a volume directly."""
        path = f"/v1/volumes/{_quoted(reference)}/attach"
        # A writer of before may have been fenced; nothing else has changed.
        look = None if is_read_only else f"`pf volume show {reference} -o json` counts attaches"
        body = AttachVolume(is_read_only=is_read_only)
        return self._call("POST", path, VolumeSpec, body=body, look=look)

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
        look = "`pf store list` shows the state of the store"
        self._send("POST", path, body=ExitedStore(incarnation=incarnation), look=look)

    def disks(self) -> list[DiskView]:
        """List disks."""
        return self._list("/v1/disks", Page[DiskView])

    def exports(self) -> list[ExportView]:
        """List exports."""
        return self._list("/v1/exports", Page[ExportView])

    def create_export(self, wish: CreateExport) -> ExportView:
        """Export a volume; the same again gives the same export."""
        look = f"`pf export list` shows whether {wish.volume} is exported"
        return self._call("POST", "/v1/exports", ExportView, body=wish, look=look)

    def delete_export(self, reference: str) -> None:
        """Take an export away."""
        look = "`pf export list` shows whether it is still there"
        self._send("DELETE", f"/v1/exports/{_quoted(reference)}", look=look)

    def jobs(self) -> list[JobView]:
        """List jobs."""
        return self._list("/v1/jobs", Page[JobView])

    def job(self, job_id: int) -> JobView:
        """Show a job."""
        return self._call("GET", f"/v1/jobs/{job_id}", JobView)

    def events(self, *, after: int | None = None) -> Iterator[EventView]:
        """Follow events for ever; `after`: an id to resume from."""
        self.owner.check()
        self._greet()
        headers = {"Authorization": f"Bearer {self._token}"}
        if after is not None:
            headers["Last-Event-ID"] = str(after)
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
        look: str | None = None,
    ) -> _T:
        answer = self._send(
            method, path, body=body, headers=headers, query=query, timeout_s=timeout_s, look=look
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
        look: str | None = None,
    ) -> httpx2.Response:
        """Send a request; `look` says where a change shows that was not answered.

        Without `look` it changes nothing. Errors: ClusterError UNAVAILABLE, and TIMED_OUT of a
        change; what the server answers with.
        """
        self.owner.check()
        if timeout_s is None:
            timeout_s = READ_TIMEOUT_S if method == "GET" else TIMEOUT_S
        self._greet()
        sent = {"Authorization": f"Bearer {self._token}", **(headers or {})}
        if body is not None:
            sent["Content-Type"] = "application/json"
        if look is not None:
            sent["Idempotency-Key"] = secrets.token_hex(16)
        request = self._http.build_request(
            method,
            path,
            content=None if body is None else msgspec.json.encode(body),
            headers=sent,
            params=dict(query or {}),
            timeout=_timeout(timeout_s),
        )
        end_s = self._clock() + timeout_s
        try:
            answer = self._http.send(request)
        except httpx2.TransportError as cause:
            if look is None or isinstance(cause, _NOT_SENT):
                raise self._unreachable(cause) from cause
            answer = self._repeat(request, cause, look=look, end_s=end_s)
        if answer.is_error:
            raise _error_of(answer)
        return answer

    def _greet(self) -> None:
        """Look whose conductor has the port, once, before the token is shown to it.

        After a stop or a reboot another program may listen there. This is against accidents: who
        wants to be taken for the conductor can be. Errors: ClusterError WRONG_CLUSTER, UNAVAILABLE.
        """
        if not self._cluster_id:
            return
        try:
            answer = self._http.get("/healthz", timeout=GREETING_TIMEOUT_S)
            alive = msgspec.json.decode(answer.content, type=Alive)
            found = alive.cluster_id if answer.is_success else ""
        except httpx2.RemoteProtocolError:
            found = ""  # it does not even speak HTTP
        except httpx2.TransportError as cause:
            raise self._unreachable(cause) from cause
        except UNREADABLE:
            found = ""
        if found != self._cluster_id:
            what = f"cluster {found[:32]!r}" if found else "another program"
            raise ClusterError(
                Code.WRONG_CLUSTER,
                f"at {self.address} (from {self._source}) is {what}, not the conductor of cluster"
                f" {self._cluster_id[:8]}; it was not shown the token",
                next_step="start this cluster with `pf up`, which takes another port when its own"
                " is taken",
            )
        self._cluster_id = ""  # once for each of us

    def _repeat(
        self, request: httpx2.Request, cause: httpx2.TransportError, *, look: str, end_s: float
    ) -> httpx2.Response:
        """Send a change with its key once more, if its connection broke and time is left.

        Only a success counts. A refusal may be one of what the first sending has done, when the
        server has forgotten its keys in between. Errors: ClusterError TIMED_OUT.
        """
        left_s = end_s - self._clock()
        if isinstance(cause, httpx2.TimeoutException) or left_s <= 0:
            raise self._unknown(cause, look) from cause
        request.extensions["timeout"] = _timeout(left_s).as_dict()
        try:
            answer = self._http.send(request)
        except httpx2.TransportError as again:
            raise self._unknown(again, look) from again
        if answer.is_error:
            refusal = _error_of(answer)
            said = f"sent again it was refused: {refusal.message} ({refusal.code.name})"
            raise self._unknown(cause, f"{look}; {said}", refusal.request_id) from refusal
        return answer

    def _unknown(self, cause: Exception, look: str, request_id: str | None = None) -> ClusterError:
        return ClusterError(
            Code.TIMED_OUT,
            f"the conductor at {self.address} (from {self._source}) took the request and gave no"
            f" answer: {str(cause) or type(cause).__name__}. It may have been carried out, or may"
            " be yet",
            next_step=f"{look}; to give the command again is safe: it does nothing twice",
            request_id=request_id,
        )

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


def _timeout(seconds: float) -> httpx2.Timeout:
    return httpx2.Timeout(seconds, connect=min(CONNECT_TIMEOUT_S, seconds))


def _error_of(answer: httpx2.Response) -> PureFlashError:
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
