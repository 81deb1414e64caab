"""Every way a request can fail, in OpenAI's error body `{"error": {"message", "type", "param", "code"}}`.

Typed errors carry their own status. Validation errors of the request models become one `InvalidRequestError` that
names the field by its path (`messages.0.content`). Errors of the framework (no such route, wrong method) and unforeseen
exceptions get the same body.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from jaxserve.core.errors import (
    ContextLengthError,
    InvalidRequestError,
    JaxserveError,
    NotFoundError,
    OverloadedError,
    QueueFullError,
)

CLIENT_CLOSED_REQUEST = 499
"""Status in the log of a request whose client went away; nobody receives it."""

_UNION_BRANCHES = frozenset({"str", "int", "float", "bool", "dict", "none"})


def error_body(error: JaxserveError, *, code: str | None = None) -> dict[str, Any]:
    """The error object of a typed error."""
    if code is None and isinstance(error, ContextLengthError):
        code = "context_length_exceeded"
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": code}}


def error_response(error: JaxserveError, *, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response to a request that failed before its answer began.

    Args:
        error: What went wrong.
        headers: Further response headers.
    """
    code = "model_not_found" if isinstance(error, NotFoundError) and error.param == "model" else None
    return JSONResponse(
        error_body(error, code=code), status_code=error.http_status, headers={**retry_after(error), **(headers or {})}
    )


def retry_after(error: JaxserveError) -> dict[str, str]:
    """The header that says when to come back, for errors that pass by themselves."""
    return {"retry-after": str(error.retry_after_s)} if isinstance(error, QueueFullError | OverloadedError) else {}


def internal_error() -> JaxserveError:
    """What a client is told of a bug of ours; the details are in the log only."""
    return JaxserveError("The server failed; its log has the details under this request's id.")


def invalid_request(error: ValidationError) -> InvalidRequestError:
    """One sentence for the most telling of a request model's validation errors."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    if problems[0]["type"] == "json_invalid":
        return InvalidRequestError(f"The body cannot be read as JSON. {problems[0]['msg']}.", param="body")
    first_field = problems[0]["loc"][:1]
    same_field = [problem for problem in problems if problem["loc"][:1] == first_field]
    # Of a union's branches the one that got furthest tells most; one of the wrong type altogether tells least.
    problem = max(same_field, key=lambda each: (len(_path(each["loc"])), not each["type"].endswith("_type")))
    param = ".".join(_path(problem["loc"])) or "body"
    if problem["type"] == "extra_forbidden":
        return InvalidRequestError(f"{param} is not a known field; remove it.", param=param)
    if problem["type"] == "missing":
        return InvalidRequestError(f"{param} is missing.", param=param)
    return InvalidRequestError(f"{param}: {problem['msg']}.", param=param)


def install_error_handlers(app: FastAPI) -> None:
    """Makes the app answer every failure in OpenAI's form."""
    app.add_exception_handler(JaxserveError, _handle_typed)
    app.add_exception_handler(HTTPException, _handle_http)
    app.add_exception_handler(ClientDisconnect, _handle_disconnect)


def _path(location: tuple[int | str, ...]) -> list[str]:
    """A field's path without the names pydantic gives to the branches of a union."""
    return [str(part) for part in location if part not in _UNION_BRANCHES and not _is_type(part)]


def _is_type(part: int | str) -> bool:
    return isinstance(part, str) and any(mark in part for mark in "[(-")


async def _handle_typed(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, JaxserveError)
    return error_response(error)


async def _handle_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _handle_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"There is no {request.url.path} here.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    body = {"message": messages.get(error.status_code, error.detail), "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, status_code=error.status_code, headers=error.headers)
