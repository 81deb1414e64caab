"""Reading a request's body into its type."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from starlette.requests import Request

from jaxserve.core.errors import UnsupportedMediaTypeError
from jaxserve.server.openai.decode import BodyDecoder
from jaxserve.server.openai.parameters import refuse_unsupported
from jaxserve.server.openai.schema import Body

B = TypeVar("B", bound=Body)


async def read_body(request: Request) -> bytes:
    """The whole body; `BodyLimit` bounds it.

    Only JSON is read: a browser sends other types across origins without asking, so a web page could otherwise have
    requests run here in the name of whoever looks at it.

    Raises:
        UnsupportedMediaTypeError: The content type is not JSON, or not given.
        PayloadTooLargeError: The body passes the limit.
        SlowRequestError: The body does not come.
        OverloadedError: Too many bodies are being read.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        given = (
            f"The content type {content_type[:100]!r} is not read here" if content_type else "No content type is given"
        )
        raise UnsupportedMediaTypeError(f"{given}; send `content-type: application/json`.", param="content-type")
    # `request.body()` would keep the body as long as the request lives, which may be until the last token.
    data = bytearray()
    async for piece in request.stream():
        data += piece
    return bytes(data)


def body_decoder(model: type[B], endpoint: str) -> BodyDecoder[B]:
    """What reads the bodies of an endpoint.

    Args:
        model: What the endpoint takes.
        endpoint: The route, for the table of parameters.
    """
    return BodyDecoder(model, partial(refuse_unsupported, endpoint))
