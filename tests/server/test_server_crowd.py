"""More connections than a process may have files: whoever asks for something is answered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme
from server_harness import CHAT, COMPLETIONS, chat, completion
from server_process import process, until_status

FEW_FILES = "resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))"
NUM_SILENT = 128
BEGINNINGS = {
    "silent": b"",
    "half a head": b"POST /v1/completions HTTP/1.1\r\nHost: local",
    "answered": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@dataclass(frozen=True)
class Server:
    """A server of few files.

    Attributes:
        url: Where it listens.
        verify: How its certificate is checked.
    """

    url: str
    verify: ssl.SSLContext | bool = True

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, verify=self.verify, timeout=30)

    @contextlib.contextmanager
    def crowd(self, data: bytes, num_clients: int = NUM_SILENT) -> Iterator[list[socket.socket]]:
        """Clients that say something and then nothing more."""
        port = int(self.url.rpartition(":")[2])
        with contextlib.ExitStack() as stack:
            clients = []
            for _ in range(num_clients):
                clients.append(stack.enter_context(socket.create_connection(("127.0.0.1", port))))
                # A reset is how the first ones learn that they were closed.
                with contextlib.suppress(OSError):
                    clients[-1].sendall(data)
            yield clients


@pytest.fixture(params=["http", "https"])
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Server]:
    tls, verify = certificate(tmp_path) if request.param == "https" else ("None", True)
    with process("", before=FEW_FILES, tls=tls) as (_, url):
        server = Server(url, verify)
        async with server.client() as client:
            await until_status(client, "/ready", 200)
        yield server


def certificate(folder: Path) -> tuple[str, ssl.SSLContext | bool]:
    """A TLS context as an expression, and a client's that trusts it."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    for part in issued.cert_chain_pems:
        part.write_to_path(folder / "cert.pem", append=True)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return f"tls_context(Path({str(folder / 'cert.pem')!r}), Path({str(folder / 'key.pem')!r}))", context


async def answered_s(client: httpx.AsyncClient) -> float:
    """Seconds until a new client's request is answered."""
    start_s = time.monotonic()
    response = await client.post(COMPLETIONS, json=completion(max_tokens=1))
    assert response.status_code == 200
    return time.monotonic() - start_s


@pytest.mark.parametrize("beginning", BEGINNINGS)
async def test_new_request_is_answered(server: Server, beginning: str) -> None:
    with server.crowd(BEGINNINGS[beginning]):
        async with server.client() as client:
            # Well under the ten seconds after which silent connections are closed anyway.
            assert await answered_s(client) < 4
            assert (await client.get("/health")).status_code == 200


async def test_requests_in_flight_are_not_closed_and_probes_get_through(server: Server) -> None:
    """As many streams as there is room for: more get a 503, probes an answer, and every stream its end."""
    body = chat(max_tokens=150, stream=True)
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.client()) for _ in range(60)]
        streams = [asyncio.create_task(client.post(CHAT, json=body)) for client in clients]
        await asyncio.sleep(1.5)
        async with server.client() as client:
            response = await client.post(COMPLETIONS, json=completion())
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert response.json()["error"]["type"] == "service_unavailable_error"
            assert (await client.get("/ready")).status_code == 200
        with server.crowd(b""):
            async with server.client() as client:
                assert (await client.get("/health")).status_code == 200
            responses = await asyncio.gather(*streams)
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) > 40
    assert all("[DONE]" in response.text for response in responses if response.status_code == 200)


@pytest.mark.parametrize(
    ("start", "line"),
    [
        ("pass", "all 56 connections (max_connections) are taken: 1 idle or silent ones closed, 0 requests refused"),
        (
            "globals()['files'] = [open('/dev/null') for _ in range(70)]",
            "cannot accept connections: Too many open files; closing",
        ),
    ],
)
async def test_log_tells_but_not_each_time(start: str, line: str) -> None:
    """Also when something else than connections has taken the files that there is room for."""
    with process(start, before=FEW_FILES) as (child, url):
        server = Server(url)
        async with server.client() as client:
            await until_status(client, "/ready", 200)
        with server.crowd(b""):
            async with server.client() as client:
                assert await answered_s(client) < 4
        child.terminate()
        assert child.stderr is not None
        messages = [json.loads(text)["message"] for text in (await asyncio.to_thread(child.stderr.read)).splitlines()]
    told = [message for message in messages if "taken" in message or "cannot accept" in message]
    assert any(message.startswith(line) for message in told), messages
    assert len(told) <= 4
