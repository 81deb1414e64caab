"""Reading a request's body into its strict model."""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from jaxserve.core.errors import UnsupportedMediaTypeError
from jaxserve.server.openai.errors import invalid_request
from jaxserve.server.openai.parameters import refuse_unsupported
from jaxserve.server.openai.schema import Body

B = TypeVar("B", bound=Body)


async def read_body(request: Request) -> bytes:
    """The whole body; `BodyLimit` bounds it.

    Raises:
        UnsupportedMediaTypeError: The content type is given and not JSON.
        PayloadTooLargeError: The body passes the limit.
        SlowRequestError: The body does not come.
        OverloadedError: Too many bodies are being read.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in ("", "application/json"):
        raise UnsupportedMediaTypeError(
            f"The content type {content_type[:100]!r} is not read here; send `content-type: application/json`.",
            param="content-type",
        )
    # `request.body()` would keep the body as long as the request lives, which may be until the last token.
    data = bytearray()
    async for piece in request.stream():
        data += piece
    return bytes(data)


def parse_body(model: type[B], data: bytes, endpoint: str) -> B:
    """The body as its model.

    Args:
        model: What the endpoint takes.
        data: JSON text in UTF-8.
        endpoint: The route, for the table of parameters.

    Raises:
        InvalidRequestError: The body is not JSON, does not fit the model, or has fields that are not supported.
    """
    try:
        body = model.model_validate_json(data)
    except ValidationError as error:
        raise invalid_request(error) from error
    refuse_unsupported(endpoint, body.model_extra)
    return body
