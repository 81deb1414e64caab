"""Every way a request can fail, in OpenAI's error body `{"error": {"message", "type", "param", "code"}}`.

Typed errors carry their own status. Errors of the framework (no such route, wrong method) and unforeseen exceptions get
the same body.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from jaxserve.core.errors import (
    ContextLengthError,
    JaxserveError,
    NotFoundError,
    OverloadedError,
    QueueFullError,
)

CLIENT_CLOSED_REQUEST = 499
"""Status in the log of a request whose client went away; nobody receives it."""


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


def install_error_handlers(app: FastAPI) -> None:
    """Makes the app answer every failure in OpenAI's form."""
    app.add_exception_handler(JaxserveError, _handle_typed)
    app.add_exception_handler(HTTPException, _handle_http)
    app.add_exception_handler(ClientDisconnect, _handle_disconnect)


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
