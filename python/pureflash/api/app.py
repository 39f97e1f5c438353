"""Assemble the API: handlers, guard, problems, documentation."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any, Final

from litestar import Litestar, Request
from litestar.connection import Request as ConnectionRequest
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin
from litestar.types import ASGIApp
from prometheus_client import CollectorRegistry

from pureflash.api import problems
from pureflash.api.agent_socket import agent_socket
from pureflash.api.guard import Guard
from pureflash.api.handlers import HANDLERS
from pureflash.api.idempotency import Idempotency
from pureflash.api.metrics import ViewCollector, show_metrics
from pureflash.conductor.service import Conductor
from pureflash.errors import PureFlashError
from pureflash.process.logs import Log

BODY_BYTES_MAX: Final = 1 << 20

__all__ = ["BODY_BYTES_MAX", "create_app"]


class DocumentationPage(OpenAPIRenderPlugin):
    """The list of operations as one page that fetches nothing from anywhere."""

    def __init__(self) -> None:
        """Serve at `/docs/`."""
        super().__init__(path="/")

    def render(
        self, request: ConnectionRequest[Any, Any, Any], openapi_schema: dict[str, Any]
    ) -> bytes:
        """Make the page."""
        del request
        info = openapi_schema["info"]
        rows = "".join(
            f"<tr><td><code>{method.upper()}</code></td><td><code>{html.escape(path)}</code></td>"
            f"<td>{html.escape(str(operation.get('description', '')))}</td></tr>"
            for path, operations in openapi_schema["paths"].items()
            for method, operation in _operations(operations)
        )
        title = html.escape(f"{info['title']} {info['version']}")
        return (
            f"<!doctype html><meta charset=utf-8><title>{title}</title>"
            "<style>body{font:16px/1.5 system-ui;margin:2em auto;max-width:70em}"
            "td{padding:.2em 1em;vertical-align:top}</style>"
            f"<h1>{title}</h1><p>Schema: <a href=/docs/openapi.json>/docs/openapi.json</a>"
            f"<table>{rows}</table>"
        ).encode()


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
            "conductor": Provide(lambda: conductor, sync_to_thread=False),
            "idempotency": Provide(lambda: idempotency, sync_to_thread=False),
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
            path="/docs",
            render_plugins=[DocumentationPage(), JsonRenderPlugin(path="/openapi.json")],
        ),
        request_max_body_size=BODY_BYTES_MAX,
        logging_config=None,
        signature_namespace={"Conductor": Conductor},
    )
    return Guard(app, token=token)


def _operations(operations: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    methods = ("get", "post", "put", "patch", "delete")
    return [(name, item) for name, item in operations.items() if name in methods]
