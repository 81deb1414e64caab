"""What happens to every HTTP request before and after its route: id, key, log line.

Plain ASGI layers, within that of CORS if there is one, outermost first: `RequestContext` gives the request its id,
writes the access line and answers for exceptions nobody foresaw; `ApiKey` asks for a key. Between them `hosts` may
refuse the request's host, and within them `intake` bounds its body. None of them buffers anything, and streams pass
through untouched.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.core.errors import AuthenticationError
from jaxserve.server.openai.callers import Callers
from jaxserve.server.openai.errors import error_response, internal_error
from jaxserve.telemetry.logging import REQUEST_ID

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/", "/docs", "/openapi.json"})
"""Paths that ask for no key: probes, scrapers and who opens the server in a browser have none."""

_LOG = logging.getLogger("jaxserve.access")
_SHOWN_PATH_CHARS = 200
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContext:
    """Gives each request an id, and its response the same one.

    Args:
        app: The next layer.
        on_response: Called with the status of each response as it begins.
    """

    def __init__(self, app: ASGIApp, *, on_response: Callable[[int], None]) -> None:
        self._app = app
        self._on_response = on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        token = REQUEST_ID.set(request_id)
        start_s = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._on_response(status)
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            _LOG.exception("%s %s failed", scope["method"], _shown(scope["path"]))
            if not status:
                await error_response(internal_error())(scope, receive, send_with_id)
        finally:
            level = logging.DEBUG if scope["path"] in OPEN_PATHS else logging.INFO
            seconds = time.monotonic() - start_s
            _LOG.log(level, "%s %s %d in %.3f s", scope["method"], _shown(scope["path"]), status, seconds)
            REQUEST_ID.reset(token)


class ApiKey:
    """Lets only requests with a key through, except to the open paths.

    Args:
        app: The next layer.
        callers: Know the keys, and whose they are.
    """

    def __init__(self, app: ASGIApp, *, callers: Callers) -> None:
        self._app = app
        self._callers = callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._callers.admit(scope):
            await self._app(scope, receive, send)
            return
        error = AuthenticationError("The API key is missing or wrong; send it as `Authorization: Bearer KEY`.")
        await error_response(error, headers={"www-authenticate": "Bearer"})(scope, receive, send)


def _request_id(given: str | None) -> str:
    """The client's id if it is short and printable, so that it cannot forge log lines or headers."""
    return given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _shown(path: str) -> str:
    """A path for the log: one word, and not all of a long one."""
    shown = quote(path[:_SHOWN_PATH_CHARS], safe="/:@!$&'()*+,;=~-._")
    return shown if len(path) <= _SHOWN_PATH_CHARS else f"{shown}..."
