"""Routers that others run in front of engines, in front of this server: their own binaries, as installed from PyPI.

Each adds fields of its own to every body and asks for paths of its own before it routes. `pip install '.[test]'` brings
them where there are wheels of them (Linux on x86-64).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import platform
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_harness import CHAT, COMPLETIONS, chat, completion, live_server, make_app, make_engine

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the routers have wheels for Linux on x86-64 only"
)

START_S = 60


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield process
        finally:
            # They take long to end politely, waiting for metrics and health checks of their own.
            process.kill()


async def until_routed(client: httpx.AsyncClient, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until the router has found its worker."""
    async with asyncio.timeout(START_S):
        while True:
            assert process.poll() is None, log.read_text(errors="replace")
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/readiness")).status_code == 200:
                    return
            await asyncio.sleep(0.1)


@asynccontextmanager
async def routed(module: str, policy: str, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a router before a server whose model counts letters."""
    engine = make_engine()
    async with live_server(make_app(engine), engine) as server:
        port, log = free_port(), folder / "router.log"
        command = [
            *(sys.executable, "-m", f"{module}.launch_router", "--worker-urls", server.url),
            *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())),
            *("--policy", policy, "--worker-startup-check-interval", "1"),
            # A refusal is shown as it is.
            "--disable-retries",
        ]
        with running(command, log) as process:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                await until_routed(client, process, log)
                yield client


def pieces(text: str) -> list[Any]:
    *events, done = [line for line in text.splitlines() if line]
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize(
    ("module", "policy"),
    [
        ("sglang_router", "cache_aware"),
        ("sglang_router", "round_robin"),
        ("vllm_router", "cache_aware"),
        ("vllm_router", "round_robin"),
        ("smg", "cache_aware"),
    ],
)
async def test_chats_and_completions_go_through(
    module: str, policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jaxserve.access")
    async with routed(module, policy, tmp_path) as client:
        answer = await client.post(CHAT, json=chat())
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == '!"#$'

        answer = await client.post(COMPLETIONS, json=completion("A"))
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == "BCDE"

        answer = await client.post(CHAT, json=chat(stream=True))
        assert answer.status_code == 200, answer.text
        deltas = [choice["delta"].get("content") or "" for piece in pieces(answer.text) for choice in piece["choices"]]
        assert "".join(deltas) == '!"#$'

        answer = await client.post(COMPLETIONS, json=completion("A", stream=True))
        assert answer.status_code == 200, answer.text
        assert "".join(choice["text"] for piece in pieces(answer.text) for choice in piece["choices"]) == "BCDE"
    served = [message.rpartition(" in ")[0] for message in caplog.messages]
    for route in (CHAT, COMPLETIONS):
        assert served.count(f"POST {route} 200") == 2
        if (module, policy) == ("vllm_router", "cache_aware"):
            assert f"POST {route}/render 200" in served, "it asks for the prompt's tokens before it routes"
