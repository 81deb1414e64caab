"""Log lines that carry the id of the request they were written for, and that no client can forge.

The request id travels in a context variable, so every line logged while a request is handled has it, whoever logs. Only
`cli` installs a handler; libraries and tests see plain `logging`.

Texts of clients get into log lines: paths, names of users, parts of bodies in error messages. Whatever is not printable
(line breaks of all kinds, escape codes of terminals, marks that turn the direction of writing) is escaped, in both
formats, so that one record is one line that shows what is in it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TextIO

REQUEST_ID: ContextVar[str] = ContextVar("jaxserve_request_id", default="-")
"""Id of the request that the running task handles; "-" outside of requests."""

_WORD = re.compile(r"[^\s\"=]+")
_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {
    "request_id",
    "message",
    "asctime",
    "color_message",
}


class RequestIdFilter(logging.Filter):
    """Puts the request id into each record."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Adds `request_id`; lets every record through."""
        record.request_id = REQUEST_ID.get()
        return True


class TextFormatter(logging.Formatter):
    """Lines for people: time, level, request id, logger, message, and a record's further facts as `key=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s [%(request_id)s] %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - named by logging
        """The line without its traceback."""
        extras = " ".join(f"{name}={_word(value)}" for name, value in _extras(record).items())
        return _escaped(f"{super().formatMessage(record)} {extras}".rstrip(), _text_escape)

    def formatException(self, ei: Any) -> str:  # noqa: N802, ANN401 - named and typed by logging
        """The traceback, indented, so that no line of an exception's message looks like a line of the log."""
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - named by logging
        """The stack, indented likewise."""
        return _indented(super().formatStack(stack_info))


class JsonFormatter(logging.Formatter):
    """Lines for machines: one JSON object each."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "request_id": record.__dict__.get("request_id", "-"),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # Only line breaks of ASCII and the like are escaped by `json`, and nothing unprintable is outside of strings.
        return _escaped(json.dumps(line, ensure_ascii=False, default=str), _json_escape)


def install(*, level: str = "INFO", as_json: bool = False, stream: TextIO | None = None) -> None:
    """Sends all log lines to a stream; for `cli` alone to call.

    Args:
        level: Lowest level shown, such as "INFO".
        as_json: One JSON object a line instead of text.
        stream: Where to; standard error by default.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.addFilter(RequestIdFilter())
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # The client library reports every request it sends as news.
    logging.getLogger("httpx").setLevel(max(logging.WARNING, logging.getLogger().level))


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


def _word(value: object) -> str:
    """A value as one word: quoted if it could be taken for several, or for several fields."""
    text = str(value)
    return text if _WORD.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _indented(text: str) -> str:
    return "\n".join(f"  {_escaped(line, _text_escape)}" for line in text.split("\n"))


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    """A text with what is not printable escaped; a space is the only white space that stays."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else escape(character) for character in text)


def _text_escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _json_escape(character: str) -> str:
    return json.dumps(character)[1:-1]
