"""`jaxserve chat` against a stub server, piped and on a terminal."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai_stub import Stub, serving

from jaxserve.cli import main

ROOT = Path(__file__).parent.parent.parent
USER = {"role": "user"}
ANSWER = {"role": "assistant", "content": "t0 t1 t2 "}


def piped(monkeypatch: pytest.MonkeyPatch, text: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(["chat", *arguments])


def sent(stub: Stub) -> list[Any]:
    return [body["messages"] for body in stub.bodies]


def test_each_piped_line_is_a_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Stub()) as stub:
        assert piped(monkeypatch, "one\n\ntwo\n", "--url", stub.url) == 0
    assert capsys.readouterr().out == "t0 t1 t2 \nt0 t1 t2 \n"
    assert sent(stub) == [
        [{**USER, "content": "one"}],
        [{**USER, "content": "one"}, ANSWER, {**USER, "content": "two"}],
    ]


def test_flags_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"--model": "m", "--system": "S", "--api-key": "secret"}
    numbers = {"--temperature": "0", "--max-tokens": "2", "--seed": "7"}
    flags = [word for pair in {**texts, **numbers}.items() for word in pair]
    with serving(Stub(api_key="secret")) as stub:
        assert piped(monkeypatch, "hi\n", "--url", f"{stub.url}/v1/", *flags) == 0
    assert stub.bodies == [
        {
            "model": "m",
            "messages": [{"role": "system", "content": "S"}, {**USER, "content": "hi"}],
            "temperature": 0,
            "max_tokens": 2,
            "seed": 7,
            "stream": True,
        }
    ]


@pytest.mark.parametrize(("fault", "reason"), [("status", "HTTP 503: overloaded"), ("error", "device lost")])
def test_a_failed_turn_is_told_and_forgotten(
    fault: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Stub(fault=fault, fault_at=0)) as stub:
        assert piped(monkeypatch, "one\ntwo\n", "--url", stub.url) == 1
    assert capsys.readouterr().err == f"jaxserve: {reason}\n"
    assert sent(stub)[1] == [{**USER, "content": "two"}]


def test_no_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert piped(monkeypatch, "hi\n", "--url", "127.0.0.1:9") == 1
    assert "does not answer" in capsys.readouterr().err


def test_not_a_url(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert piped(monkeypatch, "hi\n", "--url", "ftp://host") == 2
    assert "ftp://host" in capsys.readouterr().err


def test_on_a_terminal() -> None:
    """Slash commands work, and end of input leaves."""
    lines = ["one", "/reset", "two", "/system S", "three", "/help", "/system", "four", "/exit", "never"]
    with serving(Stub()) as stub:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve.cli", "chat", "--url", stub.url],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        os.write(ours, "".join(f"{line}\n" for line in lines).encode())
        shown = _read_all(ours)
        assert process.wait(30) == 0, shown
        os.close(ours)
    assert sent(stub) == [
        [{**USER, "content": "one"}],
        [{**USER, "content": "two"}],
        [{"role": "system", "content": "S"}, {**USER, "content": "three"}],
        [{**USER, "content": "four"}],
    ]
    assert "stub-model at" in shown
    assert "/reset " in shown
    assert shown.count("t0 t1 t2") == 4


def _read_all(terminal: int) -> str:
    """What a program wrote to its terminal until it ended."""
    parts = []
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # how Linux tells that the other side is closed
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts).decode()
