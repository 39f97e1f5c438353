"""Take the body of a request in, whole and in time, before a decoder or a handler sees it.

The framework's decoder raises other errors than its own for bytes that are no UTF-8, and its reader
calls a client that stopped in the middle an error of the server. Both are mistakes of the caller,
and only here are they still told apart from bugs of ours.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from litestar import Request
from litestar.exceptions import InternalServerException

from pureflash.errors import CallerError, Code

BODY_S: Final = 10.0
"""For a body of at most 1 MiB; as long as the server waits for the head of a request."""


async def check_body(request: Request[Any, Any, Any]) -> None:
    """Read the body of a request that may have one; the framework keeps it for the handler.

    Errors: CallerError INVALID when it does not come, ends too early, is empty where the operation
    takes one, or is not UTF-8; the framework's own for one that is too long.
    """
    if request.method == "GET":
        return
    try:
        async with asyncio.timeout(BODY_S):
            body = await request.body()
    except TimeoutError as cause:
        raise CallerError(
            Code.INVALID,
            f"the body did not come within {BODY_S:g} s",
            next_step="send as many bytes as Content-Length says",
        ) from cause
    except InternalServerException as cause:
        # How the framework says `http.disconnect`: the client is gone, or a chunk is not one.
        raise CallerError(
            Code.INVALID,
            "the body ended in the middle",
            next_step="send as many bytes as Content-Length or the chunks say",
        ) from cause
    try:
        body.decode()
    except UnicodeDecodeError as cause:
        raise CallerError(
            Code.INVALID,
            f"the body is not UTF-8: {cause.reason} at byte {cause.start}",
            next_step="send JSON as UTF-8",
        ) from cause
    if not body and "data" in request.route_handler.parsed_fn_signature.parameters:
        raise CallerError(
            Code.INVALID,
            "the request has no body",
            next_step="see /docs for the fields of the operation",
        )
