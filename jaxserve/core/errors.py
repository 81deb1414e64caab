"""Typed errors: what went wrong, whose fault it is, and how each protocol reports it.

Every error a user can cause derives from `JaxserveError` and carries a sentence that says what to do. The HTTP layer
turns `http_status` and `kind` into OpenAI's error body; the gRPC layer turns `grpc_code` into a status.
"""

from __future__ import annotations

from typing import ClassVar


class JaxserveError(Exception):
    """Base of every error jaxserve raises on purpose.

    Args:
        message: One sentence for the user: what is wrong and what to do about it.
        param: The request field or command-line flag at fault, if one is.
    """

    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    kind: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(JaxserveError):
    """The request can never succeed as it stands."""

    http_status = 400
    grpc_code = "INVALID_ARGUMENT"
    kind = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """The prompt, or the prompt and the asked-for output, do not fit the model's context or the KV cache."""


class AuthenticationError(JaxserveError):
    """The API key is missing or wrong."""

    http_status = 401
    grpc_code = "UNAUTHENTICATED"
    kind = "authentication_error"


class NotFoundError(JaxserveError):
    """The model, route or object asked for does not exist."""

    http_status = 404
    grpc_code = "NOT_FOUND"
    kind = "not_found_error"


class PayloadTooLargeError(InvalidRequestError):
    """The request body is larger than the server accepts."""

    http_status = 413


class HeadTooLargeError(InvalidRequestError):
    """The request line and headers together are larger than the server accepts."""

    http_status = 431


class SlowRequestError(InvalidRequestError):
    """The request did not come within the time the server gives it."""

    http_status = 408


class MisdirectedError(InvalidRequestError):
    """The request is for a host that the server does not answer for."""

    http_status = 421


class UnsupportedMediaTypeError(InvalidRequestError):
    """The request body is not of a content type that the server reads."""

    http_status = 415


class DeadlineError(JaxserveError):
    """The request took longer than the server allows and was ended."""

    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"
    kind = "timeout_error"


class QueueFullError(JaxserveError):
    """The waiting queue is at its bound; the client should come back later.

    Args:
        message: What is full.
        retry_after_s: Seconds after which a retry is sensible.
        capacity: Sequences that fit when nobody else is there, if that is known; more will never fit.
    """

    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"
    kind = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: int = 1, capacity: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.capacity = capacity


class UnavailableError(JaxserveError):
    """The server is starting, draining or has lost its device."""

    http_status = 503
    grpc_code = "UNAVAILABLE"
    kind = "service_unavailable_error"


class OverloadedError(UnavailableError):
    """The server has no connection or memory to spare for the request just now.

    Attributes:
        retry_after_s: Seconds after which a retry is sensible.
    """

    retry_after_s: ClassVar[int] = 1


class EngineError(JaxserveError):
    """A step failed on the device; the requests in it end with this error and the server lives on."""


class ConfigError(JaxserveError):
    """A flag, config file or environment variable is wrong."""

    grpc_code = "FAILED_PRECONDITION"
    kind = "config_error"


class CheckpointError(JaxserveError):
    """A checkpoint is missing, corrupt, or does not match the model it is loaded into."""

    grpc_code = "FAILED_PRECONDITION"
    kind = "checkpoint_error"
