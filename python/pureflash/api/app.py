"""Assemble the API: handlers, guard, problems, documentation."""

from __future__ import annotations

from typing import Any, Final

from litestar import Litestar, Request, Router
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.types import ASGIApp
from prometheus_client import CollectorRegistry

from pureflash.api import problems
from pureflash.api.agent_socket import agent_socket
from pureflash.api.bodies import check_body
from pureflash.api.description import DocumentJson, DocumentPage, refuse_unknown_page
from pureflash.api.guard import Guard
from pureflash.api.handlers import HANDLERS, provide_once
from pureflash.api.idempotency import Idempotency
from pureflash.api.metrics import ViewCollector, show_metrics
from pureflash.conductor.service import Conductor
from pureflash.errors import PureFlashError
from pureflash.process.logs import Log

BODY_BYTES_MAX: Final = 1 << 20

__all__ = ["BODY_BYTES_MAX", "create_app"]


def create_app(conductor: Conductor, *, token: str, version: str, log: Log) -> ASGIApp:
    """Make the ASGI application over one conductor; `token` opens it."""
    registry = CollectorRegistry()
    registry.register(ViewCollector(conductor))
    idempotency = Idempotency()

    def answer_bug(request: Request[Any, Any, Any], error: Exception) -> Any:
        return problems.on_bug(log, request, error)

    app = Litestar(
        route_handlers=[*HANDLERS, show_metrics, agent_socket],
        dependencies={
            "log": Provide(lambda: log, sync_to_thread=False),
            "conductor": Provide(lambda: conductor, sync_to_thread=False),
            "idempotency": Provide(lambda: idempotency, sync_to_thread=False),
            "once": Provide(provide_once),
            "metrics": Provide(lambda: registry, sync_to_thread=False),
        },
        exception_handlers={
            PureFlashError: problems.on_known,
            HTTPException: problems.on_http,
            RecursionError: problems.on_deep,
            Exception: answer_bug,
        },
        openapi_config=OpenAPIConfig(
            title="PureFlash",
            version=version,
            openapi_router=Router(
                "/docs",
                route_handlers=[],
                include_in_schema=False,
                before_request=refuse_unknown_page,
            ),
            render_plugins=[DocumentPage(), DocumentJson()],
        ),
        before_request=check_body,
        request_max_body_size=BODY_BYTES_MAX,
        logging_config=None,
        signature_namespace={"Conductor": Conductor, "Log": Log},
    )
    return Guard(app, token=token)
