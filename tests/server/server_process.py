"""`serve_app` in a process of its own, with the fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

PROCESS = """
import resource, signal, sys, threading, time
from pathlib import Path
# Whoever runs the tests under nohup has it ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
{before}
sys.path.insert(0, {folder!r})
from server_harness import CHAT_TEMPLATE, make_app, make_engine
from jaxserve.server.lifecycle import serve_app
from jaxserve.server.limits import connection_limits, raise_open_files
from jaxserve.server.openai.slot import EngineSlot
from jaxserve.server.tls import tls_context
from jaxserve.telemetry.logging import install

install(as_json=True)
slot = EngineSlot("Programs compile.")
go = threading.Event()

def start():
    {start}
    CHAT_TEMPLATE.check()
    slot.fill(make_engine(step_delay_s=0.02))

limits = connection_limits(None, open_files=raise_open_files())
serve_app(
    make_app(slot), slot, host="127.0.0.1", port={port}, drain_deadline_s=5.0, start=start, limits=limits, tls={tls}
)
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def process(start: str, *, before: str = "", tls: str = "None") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Starts a server; it is killed at the end.

    Args:
        start: Statements that the start hook begins with.
        before: Statements that the process begins with.
        tls: Expression of the TLS context.
    """
    port = free_port()
    folder = str(Path(__file__).parent)
    code = PROCESS.format(folder=folder, start=start, port=port, before=before, tls=tls)
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        yield child, f"{'http' if tls == 'None' else 'https'}://127.0.0.1:{port}"
    finally:
        child.kill()
        child.communicate()


async def until_status(client: httpx.AsyncClient, path: str, status: int) -> None:
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(httpx.ConnectError):
                if (await client.get(path)).status_code == status:
                    return
            await asyncio.sleep(0.02)
