"""Talking to any server with an OpenAI API: its root, its models, its errors, its server-sent events.

Events are cut out of the bytes as they come: decoding and splitting text costs a load generator more than reading JSON.
"""

from __future__ import annotations

import json
from typing import Any

import httpx

from jaxserve.core.errors import ConfigError, UnavailableError

DONE = b"[DONE]"
"""What the last server-sent event of a stream carries."""


def root_url(url: str) -> str:
    """The server's root, whether or not the URL ends in `/v1` or has a scheme."""
    if "://" not in url:
        url = f"http://{url}"
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is not an http:// or https:// URL.", param="--url")
    return url.rstrip("/").removesuffix("/v1")


def auth_headers(api_key: str | None) -> dict[str, str]:
    """Headers that present the key, if there is one."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def first_model(client: httpx.Client) -> str:
    """The name of the server's first model.

    Raises:
        UnavailableError: The server does not answer, or serves no model.
    """
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise UnavailableError(f"{client.base_url} does not answer ({error}); start a server or give --url.") from error
    if response.status_code != 200:
        raise UnavailableError(f"{client.base_url} cannot list its models: {error_of(response)}")
    models = response.json().get("data", [])
    if not models:
        raise UnavailableError(f"{client.base_url} serves no model.")
    return str(models[0]["id"])


def error_of(response: httpx.Response) -> str:
    """The status and what the server says is wrong, from OpenAI's error body or any other.

    Args:
        response: Read to its end.
    """
    try:
        body = response.json()
    except ValueError:
        body = None
    detail = body.get("error", body) if isinstance(body, dict) else response.text
    return f"HTTP {response.status_code}: {error_text(detail)}"


def error_text(error: object) -> str:
    """The message of an error object, or whatever stands in its place."""
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:300]


def sse_events(pending: bytes, chunk: bytes) -> tuple[list[dict[str, Any]], bytes]:
    """Reads a piece of a stream of server-sent events.

    Args:
        pending: What the piece before left over.
        chunk: The piece, cut anywhere.

    Returns:
        The JSON objects of the lines that are complete, and what is left over. The closing event is left out.

    Raises:
        ValueError: An event is not JSON.
    """
    *lines, pending = (pending + chunk).split(b"\n")
    data = (line[len(b"data:") :].strip() for line in lines if line.startswith(b"data:"))
    return [json.loads(each) for each in data if each != DONE], pending
