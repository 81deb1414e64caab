"""Log lines: text and JSON, each with the request id and a record's own facts."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.telemetry.logging import REQUEST_ID, JsonFormatter, TextFormatter, install

LOG = logging.getLogger("jaxserve.test")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Puts the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield
    root.handlers = handlers
    root.setLevel(level)


def lines(*, as_json: bool, level: str = "INFO") -> io.StringIO:
    stream = io.StringIO()
    install(level=level, as_json=as_json, stream=stream)
    return stream


def test_text() -> None:
    stream = lines(as_json=False)
    token = REQUEST_ID.set("req-1")
    LOG.info("done with %s", "it", extra={"tokens": 5})
    REQUEST_ID.reset(token)
    LOG.warning("outside")
    inside, outside = stream.getvalue().splitlines()
    assert inside.endswith("INFO [req-1] jaxserve.test: done with it tokens=5")
    assert outside.endswith("WARNING [-] jaxserve.test: outside")


def test_json() -> None:
    stream = lines(as_json=True)
    token = REQUEST_ID.set("req-1")
    LOG.info("done with %s", "ît", extra={"tokens": 5})
    REQUEST_ID.reset(token)
    line = json.loads(stream.getvalue())
    assert line.pop("time").startswith("20")
    assert line == {
        "level": "INFO", "request_id": "req-1", "logger": "jaxserve.test", "message": "done with ît", "tokens": 5,
    }  # fmt: skip


@pytest.mark.parametrize("as_json", [False, True])
def test_exceptions(as_json: bool) -> None:
    stream = lines(as_json=as_json)
    try:
        raise ValueError("oh")
    except ValueError:
        LOG.exception("failed")
    text = json.loads(stream.getvalue())["exception"] if as_json else stream.getvalue()
    assert text.rstrip().endswith("ValueError: oh")


def test_level() -> None:
    stream = lines(as_json=False, level="warning")
    LOG.info("quiet")
    assert stream.getvalue() == ""


def test_installing_twice_does_not_double_lines() -> None:
    lines(as_json=False)
    stream = lines(as_json=False)
    LOG.info("once")
    assert len(stream.getvalue().splitlines()) == 1


# What ends a line for some reader, moves a terminal's cursor, or turns the direction of writing.
FORGERIES = (
    *("\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\x1b[2K", "\x1b]0;t\x07", "\x9b31m", "\x08"),
    *("\x00", "\x7f", "\u202e", "\u2066", "\u200f", "\ud800", "\U000e0041", "\ufeff"),
)
LINE = "2026-01-01 00:00:00,000 INFO [-] jaxserve.access: GET /v1/models 200"


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("mark", FORGERIES)
@pytest.mark.parametrize("where", ["message", "argument", "extra", "request id", "logger", "exception"])
def test_no_line_can_be_forged(as_json: bool, mark: str, where: str) -> None:
    stream = lines(as_json=as_json)
    text = f"a{mark}{LINE}"
    token = REQUEST_ID.set(text if where == "request id" else "-")
    logger = logging.getLogger(f"jaxserve.{text}") if where == "logger" else LOG
    try:
        if where == "exception":
            raise ValueError(text)
        logger.info(
            text if where == "message" else "%s",
            *([] if where == "message" else [text if where == "argument" else "b"]),
            extra={"user": text} if where == "extra" else None,
        )
    except ValueError:
        LOG.exception("failed")
    REQUEST_ID.reset(token)
    written = stream.getvalue()
    assert written.replace("\n", "").isprintable()
    told = [line for line in written.splitlines() if not line.startswith("  ")]
    assert len(told) == 1


@given(text=st.text(), name=st.text(), as_json=st.booleans())
def test_any_text_is_one_printable_line(text: str, name: str, as_json: bool) -> None:
    formatter = JsonFormatter() if as_json else TextFormatter()
    record = logging.LogRecord("jaxserve", logging.INFO, "", 0, "%s", (text,), None)
    record.__dict__ |= {"request_id": "-", "user": name}
    line = formatter.format(record)
    assert line.isprintable()
    if as_json:
        assert (json.loads(line)["message"], json.loads(line)["user"]) == (text, name)


def test_a_field_cannot_pass_for_several() -> None:
    stream = lines(as_json=False)
    LOG.info("ended", extra={"user": "x outcome=complete", "other": 'a"b', "empty": "", "tokens": 5, "word": "a-b/ç"})
    assert (
        stream.getvalue()
        .rstrip()
        .endswith(r'ended user="x outcome=complete" other="a\"b" empty="" tokens=5 word=a-b/ç')
    )
