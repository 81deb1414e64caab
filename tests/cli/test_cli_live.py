"""Commands against the real app with a fake engine, and what Ctrl-C does to an answer."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from openai_stub import Stub, serving
from server_harness import live_server, make_app, make_engine

from jaxserve.cli import main
from jaxserve.server.openai.config import AppConfig

ROOT = Path(__file__).parent.parent.parent

# A test run started in the background ignores SIGINT, and so would all that it starts.
HEEDING_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
CLI = "import sys; from jaxserve.cli import main; sys.exit(main(sys.argv[1:]))"


async def test_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The fake model continues a chat with the letters after the control tokens, and stops at 4."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nagain\n"))
    engine = make_engine()
    async with live_server(make_app(engine), engine) as server:
        assert await asyncio.to_thread(main, ["chat", "--url", server.url, "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == '!"#$\n!"#$\n'


async def test_bench_serve(capsys: pytest.CaptureFixture[str]) -> None:
    engine = make_engine()
    config = AppConfig(served_model_names=("fake",), version="1", api_keys=("secret",))
    sizes = ["--num-requests", "5", "--warmup", "1", "--input-len", "20", "--output-len", "3"]
    async with live_server(make_app(engine, config), engine) as server:
        arguments = ["bench", "serve", "--url", server.url, "--api-key", "secret", "--concurrency", "2", *sizes]
        assert await asyncio.to_thread(main, [*arguments, "--slo", "ttft=60000", "--json"]) == 0
        [run] = json.loads(capsys.readouterr().out)["runs"]
        assert await asyncio.to_thread(main, [*arguments, "--endpoint", "chat"]) == 0
    assert (run["num_requests"], run["num_failed"], run["input_tokens"], run["output_tokens"]) == (5, 0, 100, 15)
    assert run["goodput_per_s"] == run["requests_per_s"] > 0
    assert run["total_tokens_per_s"] == pytest.approx(115 / run["duration_s"])
    assert "5 / 0" in capsys.readouterr().out


def test_ctrl_c_ends_the_answer_and_not_the_program() -> None:
    with serving(Stub(delay_s=0.2)) as stub:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", HEEDING_SIGINT + CLI, "chat", "--url", stub.url, "--max-tokens", "100"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        os.write(ours, b"first\n")
        shown = _read_until(ours, "t1")
        process.send_signal(signal.SIGINT)
        shown += _read_until(ours, "(stopped)")
        os.write(ours, b"second\n")
        shown += _read_until(ours, "t1")
        process.send_signal(signal.SIGINT)
        shown += _read_until(ours, "(stopped)")
        os.write(ours, b"/exit\n")
        assert process.wait(30) == 0, shown
        os.close(ours)
    first, second = stub.bodies
    assert first["messages"] == [{"role": "user", "content": "first"}]
    assert second["messages"] == [{"role": "user", "content": "second"}]
    assert "Traceback" not in shown


def _read_until(terminal: int, text: str) -> str:
    """What a program writes to its terminal until this appears; fails if it ends before."""
    shown = b""
    while text.encode() not in shown:
        ready, _, _ = select.select([terminal], [], [], 30)
        assert ready, f"no {text!r} in {shown!r}"
        shown += os.read(terminal, 4096)
    return shown.decode()
