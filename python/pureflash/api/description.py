"""What the API says of itself: the OpenAPI document, and one page that lists the operations.

The framework writes down paths, parameters and bodies; what it cannot know is added here by rule,
so that no handler can forget it: every error of every operation is a problem+json object, callers
show a token except on the open paths, and a body with a field that we do not know is refused.
tests/api/test_schema.py holds the running server to this document.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
from litestar.connection import Request
from litestar.exceptions import NotFoundException
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin

from pureflash.api.guard import OPEN_PATHS
from pureflash.model import rest

_METHODS: Final = ("get", "post", "put", "patch", "delete")
_SCHEMAS: Final = "#/components/schemas/"
_PROBLEM: Final = {
    "description": "What failed, why, and what to do",
    "content": {"application/problem+json": {"schema": {"$ref": f"{_SCHEMAS}Problem"}}},
}
_FRAMEWORK_ERROR: Final = "400"
"""Which the framework describes in a form of its own, that nobody is ever answered in."""

Document = dict[str, Any]


def complete(document: Mapping[str, Any]) -> Document:
    """Give the framework's document with what holds for all operations; it is not changed."""
    (problem,) = msgspec.json.schema_components([rest.Problem], ref_template=f"{_SCHEMAS}{{name}}")[
        1
    ].values()
    schemas = {
        name: {**schema, "additionalProperties": False} if _is_strict(name) else schema
        for name, schema in document["components"]["schemas"].items()
    }
    components = {
        **document["components"],
        "schemas": {**schemas, "Problem": problem},
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
    }
    paths = {
        path: {
            method: _operation(path, item) if method in _METHODS else item
            for method, item in items.items()
        }
        for path, items in document["paths"].items()
    }
    return {**document, "components": components, "security": [{"token": []}], "paths": paths}


def _operation(path: str, operation: Mapping[str, Any]) -> Document:
    responses = {
        status: response
        for status, response in operation["responses"].items()
        if status != _FRAMEWORK_ERROR
    }
    found = {**operation, "responses": {**responses, "default": _PROBLEM}}
    return {**found, "security": []} if path in OPEN_PATHS else found


def _is_strict(name: str) -> bool:
    struct = getattr(rest, name, None)
    config: msgspec.structs.StructConfig | None = getattr(struct, "__struct_config__", None)
    return config is not None and config.forbid_unknown_fields


class DocumentJson(JsonRenderPlugin):
    """The document, at `/docs/openapi.json`."""

    def __init__(self) -> None:
        """Serve it under its usual name."""
        super().__init__(path="/openapi.json")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """Write it."""
        return super().render(request, complete(openapi_schema))


class DocumentPage(OpenAPIRenderPlugin):
    """The list of operations as one page that fetches nothing from anywhere."""

    def __init__(self) -> None:
        """Serve at `/docs/`."""
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """Make the page."""
        del request
        info = openapi_schema["info"]
        rows = "".join(
            f"<tr><td><code>{method.upper()}</code></td><td><code>{html.escape(path)}</code></td>"
            f"<td>{html.escape(str(operation.get('description', '')))}</td></tr>"
            for path, items in openapi_schema["paths"].items()
            for method, operation in operations(items)
        )
        title = html.escape(f"{info['title']} {info['version']}")
        return (
            f"<!doctype html><meta charset=utf-8><title>{title}</title>"
            "<style>body{font:16px/1.5 system-ui;margin:2em auto;max-width:70em}"
            "td{padding:.2em 1em;vertical-align:top}</style>"
            f"<h1>{title}</h1><p>Schema: <a href=/docs/openapi.json>/docs/openapi.json</a>"
            f"<table>{rows}</table>"
        ).encode()


def refuse_unknown_page(request: Request[Any, Any, Any]) -> None:
    """Answer a path below `/docs` that nothing is served at with a problem.

    The framework catches all of them under the parameter `path`, for a page of its own in HTML.
    """
    if "path" in request.path_params:
        raise NotFoundException


def operations(items: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Give the operations of one path with their methods."""
    return ((method, item) for method, item in items.items() if method in _METHODS)
