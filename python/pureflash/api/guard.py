"""Who may call: Host, token and request id, checked before any handler runs.

The Host must be a loopback name, so that a web page that resolves its own name to 127.0.0.1
cannot reach the API through a browser; no CORS header is ever sent. Everything but `/healthz`,
`/readyz`, `/metrics` and `/docs` needs `Authorization: Bearer`. A request id is taken from
`X-Request-ID` when it looks like one, else drawn; it is in every answer and every error.

What can be read in two ways is refused: a header or a field of the query that may be there once and
is there twice, a path or query whose percent-encoding is broken or does not give UTF-8 (the
framework would put a replacement character for it, and so one name for many).
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections import Counter
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from pureflash.errors import CallerError, Code, PureFlashError, SecurityError
from pureflash.model.rest import Problem

REQUEST_ID: Final = "pureflash.request_id"
"""Where the id stands in the ASGI scope."""
OPEN_PATHS: Final = ("/healthz", "/readyz", "/metrics", "/docs")
LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
ONCE: Final = frozenset(
    {
        *(b"host", b"authorization", b"content-type"),
        *(b"idempotency-key", b"if-match", b"last-event-id"),
    }
)
"""Headers whose second value would be read instead of the first by some and not by others. The
server itself sees to Content-Length."""
_HALF_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


def host_name(header: str) -> str:
    """Give the name in a Host header, without its port."""
    name, colon, port = header.rpartition(":")
    is_port = port.isascii() and port.isdigit()
    return name.lower() if colon and is_port else header.lower()


def check_form(scope: Any) -> None:
    """Refuse a request whose head says something twice or in no known alphabet.

    Errors: CallerError INVALID.
    """
    headers = [name for name, _ in scope["headers"] if name in ONCE]
    fields = [field.partition(b"=")[0] for field in scope["query_string"].split(b"&") if field]
    for what, names in (("header", headers), ("field of the query", fields)):
        for name, times in Counter(names).items():
            if times > 1:
                raise CallerError(
                    Code.INVALID,
                    f"the {what} {name.decode('latin-1')[:96]!r} came {times} times",
                    next_step="send it once",
                )
    for what, part in (("path", scope["raw_path"]), ("query", scope["query_string"])):
        if (half := _HALF_ESCAPE.search(part)) is not None:
            reason = f"a % without two hexadecimal digits at byte {half.start()}"
        else:
            try:
                unquote_to_bytes(part).decode()
            except UnicodeDecodeError as cause:
                reason = f"it is not UTF-8: {cause.reason} at byte {cause.start}"
            else:
                continue
        raise CallerError(
            Code.INVALID,
            f"the {what} cannot be read: {reason}",
            next_step="percent-encode the bytes of its UTF-8 form",
        )


def problem_of(error: PureFlashError, *, status: int | None, request_id: str) -> Problem:
    """Describe an error as problem+json; `status` None: the code's own."""
    return Problem(
        type=f"urn:pureflash:error:{error.code.name.lower()}",
        title=error.code.name,
        status=error.http_status if status is None else status,
        detail=error.message,
        code=error.code.name,
        request_id=request_id,
        next_step=error.next_step,
    )


class Guard:
    """ASGI around the whole application, also around paths that it does not know."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        """Stand before `app`; `token` is the one that callers must show."""
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"r-{secrets.token_hex(6)}"
        scope[REQUEST_ID] = request_id
        try:
            self._check(scope, headers)
        except PureFlashError as error:
            await _refuse(scope, send, problem_of(error, status=None, request_id=request_id))
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        await self._app(scope, receive, send_with_id)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        check_form(scope)
        host = host_name(headers.get(b"host", b"").decode("latin-1"))
        if host not in LOOPBACK_NAMES:
            raise CallerError(
                Code.INVALID,
                f"the Host header names {host[:96]!r}",
                next_step="call the API by a loopback name: 127.0.0.1 or localhost",
            )
        path = scope["path"]
        if any(path == name or path.startswith(f"{name}/") for name in OPEN_PATHS):
            return
        kind, _, shown = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), self._token):
            raise SecurityError(
                Code.UNAUTHENTICATED,
                "the request shows no valid token",
                next_step="send `Authorization: Bearer` with the contents of secret/admin.token",
            )


async def _refuse(scope: Scope, send: Send, problem: Problem) -> None:
    if scope["type"] == ScopeType.WEBSOCKET:
        # Closing before accepting answers the upgrade with 403.
        await send({"type": "websocket.close", "code": 4401, "reason": problem.detail})
        return
    body = msgspec.json.encode(problem)
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", problem.request_id.encode()),
    ]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
