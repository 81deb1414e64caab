"""The API's description in OpenAPI 3.1, made of the types that read bodies and of the parameter table.

Each field of a body has its type and range from `schema` and its note from `parameters`; parameters that are refused
stand among them with the values that are let through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from jaxserve.server.openai import replies, schema
from jaxserve.server.openai.parameters import CHAT, COMPLETIONS, DETOKENIZE, PARAMETERS, TOKENIZE

_REF = "#/components/schemas/{name}"
_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _TOKEN_IDS,
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
    ]
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """One thing the server does.

    Attributes:
        method: In lower case.
        path: As OpenAPI writes it.
        summary: A sentence.
        body: The type of its body; None takes none.
        table: Whose parameters the table lists for it.
        answer: The type of its answer; None is text.
        event: The type of a streamed answer's events.
        errors: Statuses it may answer with beside those that every route may.
    """

    method: str
    path: str
    summary: str
    body: type[schema.Body] | None = None
    table: str | None = None
    answer: Any = None
    event: Any = None
    errors: Sequence[int] = ()


_GENERATES = (400, 404, 413, 415, 429, 503, 504)
_READS = (400, 404, 413, 415, 429, 503)

ROUTES = (
    Route(
        method="post", path=CHAT, summary="Continues a conversation.", body=schema.ChatBody, table=CHAT,
        answer=replies.ChatAnswer, event=replies.ChatChunk, errors=_GENERATES,
    ),
    Route(
        method="post", path=COMPLETIONS, summary="Continues prompts.", body=schema.CompletionBody, table=COMPLETIONS,
        answer=replies.CompletionAnswer, event=replies.CompletionAnswer, errors=_GENERATES,
    ),
    Route(
        method="post", path=f"{CHAT}/render", summary="The token ids that the same body would be prompted with.",
        body=schema.ChatBody, table=CHAT, answer=replies.TokenIdsAnswer, errors=_READS,
    ),
    Route(
        method="post", path=f"{COMPLETIONS}/render", summary="The token ids of each prompt.",
        body=schema.CompletionBody, table=COMPLETIONS, answer=list[replies.TokenIdsAnswer], errors=_READS,
    ),
    Route(
        method="post", path=TOKENIZE, summary="Text or messages to token ids.", body=schema.TokenizeBody,
        table=TOKENIZE, answer=replies.TokenizeAnswer, errors=_READS,
    ),
    Route(
        method="post", path=DETOKENIZE, summary="Token ids to text.", body=schema.DetokenizeBody, table=DETOKENIZE,
        answer=replies.DetokenizeAnswer, errors=_READS,
    ),
    Route(method="get", path="/v1/models", summary="The names the model is served by.", answer=replies.Models),
    Route(
        method="get", path="/v1/models/{model}", summary="One of these names.", answer=replies.Model, errors=(404,)
    ),
    Route(
        method="get", path="/health", summary="Whether the process is worth keeping.", answer=replies.Status,
        errors=(503,),
    ),
    Route(method="get", path="/ready", summary="Whether requests are accepted.", answer=replies.Status, errors=(503,)),
    Route(method="get", path="/version", summary="The server's version.", answer=replies.Version),
    Route(method="get", path="/metrics", summary="Prometheus metrics."),
)  # fmt: skip

STATUSES: Mapping[int, str] = {
    400: "The request can never succeed as it stands; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "The model is not served here.",
    413: "The body is too large.",
    415: "The content type is not application/json.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "The server failed; its log has the details.",
    503: "The server is starting or draining, or has lost its device.",
    504: "The request took longer than the server allows.",
}


def document(version: str, *, needs_key: bool) -> dict[str, Any]:
    """The description of a server.

    Args:
        version: The server's.
        needs_key: Whether requests must bring an API key.
    """
    kinds = [kind for route in ROUTES for kind in (route.body, route.answer, route.event) if kind is not None]
    kinds.append(replies.Error)
    found, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    schemas = dict(zip(kinds, found, strict=True))
    for route in ROUTES:
        if route.body is not None and route.table is not None:
            _describe(components[route.body.__name__], route.table)
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route, schemas, needs_key=needs_key)
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "jaxserve",
            "version": version,
            "description": "OpenAI's API, with vLLM's parameters. Every parameter is applied, or refused with a 400 "
            "that names it; null always means the default.",
        },
        "paths": paths,
        "components": {"schemas": components},
    }
    if needs_key:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return described


def _describe(body: dict[str, Any], table: str) -> None:
    """Adds to a body's schema what the parameter table says of each field."""
    properties = body["properties"]
    body["additionalProperties"] = {"type": "null"}
    if table == COMPLETIONS:
        properties["prompt"] = dict(_PROMPTS)
    for parameter in PARAMETERS:
        if table not in parameter.endpoints:
            continue
        if parameter.applied:
            properties[parameter.name]["description"] = f"{parameter.note}."
        else:
            note = f"Refused, but for the values listed: {parameter.note[:1].lower()}{parameter.note[1:]}."
            properties[parameter.name] = {"enum": [*parameter.no_op, None], "description": note}


def _operation(route: Route, schemas: Mapping[Any, dict[str, Any]], *, needs_key: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if route.answer is not None:
        answer = {"application/json": {"schema": schemas[route.answer]}}
    if route.event is not None:
        answer["text/event-stream"] = {"schema": schemas[route.event]}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method}{route.path}".replace("/", "_").replace("{", "").replace("}", ""),
        "responses": {"200": {"description": "Success.", "content": answer}},
    }
    is_open = not route.path.startswith("/v1/") and route.body is None
    errors = sorted({*route.errors, 500, *([401] if needs_key and not is_open else [])})
    for status in errors:
        content = {"application/json": {"schema": schemas[replies.Error]}}
        operation["responses"][str(status)] = {"description": STATUSES[status], "content": content}
    if "{" in route.path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if route.body is not None:
        content = {"application/json": {"schema": schemas[route.body]}}
        operation["requestBody"] = {"required": True, "content": content}
    if needs_key and not is_open:
        operation["security"] = [{"key": []}]
    return operation
