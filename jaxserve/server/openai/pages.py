"""What a browser sees: `/` says what this is, `/docs` shows the API's description as one page that needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from jaxserve.server.openai.openapi import document

_POLICY = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code,pre{font-family:ui-monospace,monospace;background:#8881;border-radius:3px;padding:0 .2em}"
    "pre{padding:.6em;overflow-x:auto}table{border-collapse:collapse}td,th{border:1px solid #8884;padding:.2em .5em;"
    "text-align:left;vertical-align:top}summary{cursor:pointer}:root{color-scheme:light dark}"
)
_LINKS = {"docs": "/docs", "openapi": "/openapi.json", "models": "/v1/models", "health": "/health", "ready": "/ready",
          "metrics": "/metrics"}  # fmt: skip
_EXAMPLE = (
    "curl {base}v1/chat/completions -H 'content-type: application/json' \\\n"
    '  -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\''
)


class Pages:
    """Routes for people.

    Args:
        version: The server's.
        model: The model's name.
        needs_key: Whether requests must bring an API key.
    """

    def __init__(self, *, version: str, model: str, needs_key: bool) -> None:
        self._version = version
        self._model = model
        self._needs_key = needs_key

    @cached_property
    def _document(self) -> dict[str, Any]:
        return document(self._version, needs_key=self._needs_key)

    @cached_property
    def _docs(self) -> HTMLResponse:
        described = self._document
        sections = [
            _operation(method, path, operation, described["components"]["schemas"])
            for path, methods in described["paths"].items()
            for method, operation in methods.items()
        ]
        intro = f'<p>{_prose(described["info"]["description"])} As <a href="/openapi.json">OpenAPI</a>.</p>'
        return _page(f"jaxserve {self._version}: API", intro + "".join(sections))

    async def root(self, request: Request) -> Response:
        """`GET /`: what this is, as a page for browsers and as JSON for others."""
        if "text/html" not in request.headers.get("accept", ""):
            return JSONResponse({"name": "jaxserve", "version": self._version, **_LINKS})
        key = " It asks for an API key." if self._needs_key else ""
        links = "".join(f'<li><a href="{path}">{path}</a></li>' for path in _LINKS.values())
        example = _EXAMPLE.format(base=request.base_url, model=self._model)
        return _page(
            "jaxserve",
            f"<p>jaxserve {escape(self._version)} serves a language model behind OpenAI's API.{key}</p>"
            f"<pre>{escape(example)}</pre><ul>{links}</ul>",
        )

    async def openapi(self, request: Request) -> Response:
        """`GET /openapi.json`."""
        return JSONResponse(self._document)

    async def docs(self, request: Request) -> Response:
        """`GET /docs`."""
        return self._docs


def _page(title: str, body: str) -> HTMLResponse:
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{escape(title)}</h1>{body}</body></html>'
    return HTMLResponse(page, headers=_POLICY)


def _operation(method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    parts = [f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{_prose(operation['summary'])}</p>"]
    if "requestBody" in operation:
        body = _resolved(operation["requestBody"]["content"]["application/json"]["schema"], schemas)
        rows = [
            (
                f"<code>{escape(name)}</code>" + (" (required)" if name in body["required"] else ""),
                escape(_kind(field)),
                _prose(field.get("description", "")),
            )
            for name, field in body["properties"].items()
        ]
        parts.append(
            f"<details open><summary>Body</summary>{_table(('field', 'type', 'what it does'), rows)}</details>"
        )
    answers = [
        (f"<code>{status}</code>", _prose(each["description"])) for status, each in operation["responses"].items()
    ]
    parts.append(f"<details><summary>Answers</summary>{_table(('status', 'meaning'), answers)}")
    for media_type, content in operation["responses"]["200"]["content"].items():
        parts.append(f"<p><code>{media_type}</code>: {escape(_kind(content['schema']))}</p>")
        parts.append(_fields(content["schema"], schemas))
    return "".join(parts) + "</details>"


def _fields(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    fields = _resolved(schema, schemas).get("properties", {})
    return _table(("field", "type"), [(f"<code>{name}</code>", escape(_kind(field))) for name, field in fields.items()])


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = schema.get("items", schema)
    found: Mapping[str, Any] = schemas[inner["$ref"].rpartition("/")[2]] if "$ref" in inner else schema
    return found


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = "".join(f"<th>{each}</th>" for each in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>" if body else ""


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    match schema:
        case {"$ref": str(name)}:
            return name.rpartition("/")[2]
        case {"anyOf": branches}:
            return " or ".join(_kind(branch) for branch in branches if branch != {"type": "null"})
        case {"enum": values}:
            return ", ".join("null" if value is None else str(value) for value in values)
        case {"type": "array", "items": items}:
            return f"list of {_kind(items)}"
        case {"type": str(name)}:
            low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
            bounds = [f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None)
            return " ".join([name, *bounds])
        case _:
            return "any"


def _prose(text: str) -> str:
    """Markdown's code marks as HTML; links are left as they are written."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))
