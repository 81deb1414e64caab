"""A whole HTTP response in bytes, for requests that no app ever sees."""

from __future__ import annotations

import json
from collections.abc import Sequence

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from jaxserve.core.errors import JaxserveError
from jaxserve.server.openai.errors import error_body, retry_after


def refusal(error: JaxserveError, headers: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """The response that tells of an error and that the connection closes.

    Args:
        error: What is wrong; its body is OpenAI's.
        headers: Further headers.
    """
    body = json.dumps(error_body(error)).encode()
    every = [
        *headers,
        *((name.encode(), value.encode()) for name, value in retry_after(error).items()),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    lines = b"".join(b"%b: %b\r\n" % header for header in every)
    return STATUS_LINE[error.http_status] + lines + b"\r\n" + body
