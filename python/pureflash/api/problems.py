"""Errors as responses: every failure leaves here as problem+json with a code and a next step."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException

from pureflash.api.guard import REQUEST_ID, problem_of
from pureflash.errors import CallerError, Code, PureFlashError, SoftwareError
from pureflash.model.rest import Problem
from pureflash.process.logs import Log

_CODE_OF_STATUS: Final = {
    404: Code.NOT_FOUND,
    405: Code.UNSUPPORTED,
    413: Code.LIMIT,
    415: Code.INVALID,
    400: Code.INVALID,
}

FIELDS_STEP: Final = "see /docs for the paths, methods and fields"
DETAIL_CHARS_MAX: Final = 512
"""Of what the framework says: it quotes the request, which may be long."""


def respond(problem: Problem) -> Response[bytes]:
    """Make the response that carries a problem."""
    return Response(
        msgspec.json.encode(problem),
        status_code=problem.status,
        media_type="application/problem+json",
    )


def on_known(request: Request[Any, Any, Any], error: PureFlashError) -> Response[bytes]:
    """Answer an error of ours."""
    return respond(problem_of(error, status=None, request_id=request_id_of(request)))


def on_http(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """Answer what the framework refused: unknown path, wrong method, body that does not decode."""
    code = _CODE_OF_STATUS.get(error.status_code, Code.INTERNAL)
    extra = error.extra
    detail = str(error.detail)
    if isinstance(extra, list) and extra:
        detail += ": " + "; ".join(
            f"{item.get('key', '')} {item.get('message', '')}".strip()
            for item in extra
            if isinstance(item, dict)
        )
    cause = CallerError(code, detail[:DETAIL_CHARS_MAX], next_step=FIELDS_STEP)
    return respond(problem_of(cause, status=error.status_code, request_id=request_id_of(request)))


def on_deep(request: Request[Any, Any, Any], error: RecursionError) -> Response[bytes]:
    """Answer a body that is nested deeper than the decoder goes; nothing of ours recurses."""
    del error
    cause = CallerError(Code.INVALID, "the body is nested too deeply", next_step=FIELDS_STEP)
    return respond(problem_of(cause, status=None, request_id=request_id_of(request)))


def on_bug(log: Log, request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Answer a bug of ours: the reader gets the request id, the log the rest."""
    request_id = request_id_of(request)
    log.error("api.bug", f"{type(error).__name__}: {error}", request_id=request_id)
    cause = SoftwareError(Code.INTERNAL, "the conductor failed to answer")
    return respond(problem_of(cause, status=None, request_id=request_id))


def request_id_of(request: Request[Any, Any, Any]) -> str:
    """Give the id that the guard set."""
    scope: Any = request.scope
    return str(scope[REQUEST_ID])
