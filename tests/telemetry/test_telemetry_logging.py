"""Log lines: text and JSON, each with the request id and a record's own facts."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from jaxserve.telemetry.logging import REQUEST_ID, install

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
