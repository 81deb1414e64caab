"""What one connection may take of a server: bytes of its head, seconds of silence, requests ahead of their answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from server_harness import (
    CHAT,
    COMPLETIONS,
    CONFIG,
    LiveServer,
    chat,
    completion,
    live_server,
    make_app,
    make_engine,
    until_idle,
)

from jaxserve.server import lifecycle
from jaxserve.server.connection import Connection
from jaxserve.server.connections import Connections
from jaxserve.server.limits import LIMITS, ConnectionLimits

QUICK = replace(LIMITS, head_s=0.3, keep_alive_s=0.6, linger_s=0.3)
"""For tests that wait for the end of a time."""

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@asynccontextmanager
async def serving(limits: ConnectionLimits = LIMITS, **behaviour: Any) -> AsyncIterator[LiveServer]:
    engine = make_engine(**behaviour)
    async with live_server(make_app(engine), engine, limits=limits) as server:
        yield server


class Client:
    """A socket that says what it is told to say."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def response(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(20):
            head = await self.reader.readuntil(b"\r\n\r\n")
            status, *lines = head.decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines if line)
            return int(status.split()[1]), headers, await self.reader.readexactly(int(headers["content-length"]))

    async def error(self, status: int) -> str:
        """The message of an error, after checking its form."""
        got, headers, body = await self.response()
        assert got == status, body
        assert headers["content-type"] == "application/json"
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return str(error["message"])

    async def closed(self) -> bytes:
        """What is left to read until the server closes."""
        async with asyncio.timeout(20):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""


@asynccontextmanager
async def client_of(server: LiveServer, **given: Any) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, **given)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


def post(body: dict[str, Any], *extra: bytes) -> bytes:
    content = json.dumps(body).encode()
    return HEAD + b"".join(extra) + b"Content-Length: %d\r\n\r\n" % len(content) + content


def text_of(body: bytes) -> str:
    return str(json.loads(body)["choices"][0]["text"])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Connections]:
    """The servers' own books."""
    made: list[Connections] = []

    def make(*given: Any, **named: Any) -> Connections:
        made.append(Connections(*given, **named))
        return made[-1]

    monkeypatch.setattr(lifecycle, "Connections", make)
    return made


class TestHeads:
    @pytest.mark.parametrize("where", ["url", "value", "name", "many", "blank lines"])
    async def test_too_large(self, where: str) -> None:
        head = {
            "url": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
            "value": b"GET /health HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
            "name": b"GET /health HTTP/1.1\r\n" + b"a" * 70_000 + b": 1\r\n\r\n",
            "many": b"GET /health HTTP/1.1\r\n" + b"a: 1\r\n" * 12_000 + b"\r\n",
            "blank lines": b"\r\n" * 40_000 + HEALTH,
        }[where]
        async with serving() as server, client_of(server) as client:
            await client.send(head)
            assert "65536 bytes" in await client.error(431)
            assert await client.closed() == b""

    async def test_nothing_is_built_of_64_mib(self) -> None:
        async with serving(QUICK) as server, client_of(server) as client:
            await client.send(b"GET /health HTTP/1.1\r\nX: ")
            sending = asyncio.create_task(client.send(b"a" * (64 << 20)))
            assert "65536 bytes" in await client.error(431)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def test_nearly_too_large(self) -> None:
        async with serving() as server, client_of(server) as client:
            for _ in range(3):
                await client.send(b"GET /health HTTP/1.1\r\nX: " + b"a" * 65_000 + b"\r\n\r\n")
                assert (await client.response())[0] == 200

    async def test_trailers_are_heads_too(self) -> None:
        async with serving() as server, client_of(server) as client:
            await client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: " + b"a" * 70_000)
            assert "65536 bytes" in await client.error(431)

    async def test_short_trailers_change_nothing(self) -> None:
        body = json.dumps(completion()).encode()
        async with serving() as server, client_of(server) as client:
            await client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(body), body))
            await client.send(b"Content-Type: text/html\r\n\r\n" + HEALTH)
            assert [(await client.response())[0] for _ in range(2)] == [200, 200]

    @pytest.mark.parametrize("start", [b"", b"G", b"GET /health HTTP/1.1\r\n", b"\r\n"])
    async def test_that_does_not_come(self, start: bytes) -> None:
        async with serving(QUICK) as server, client_of(server) as client:
            await client.send(start)
            if start:
                assert "0.3 s" in await client.error(408)
            assert await client.closed() == b""

    async def test_that_drips(self) -> None:
        async with serving(QUICK) as server, client_of(server) as client:

            async def drip() -> None:
                for byte in b"GET /" + b"a" * 1000:
                    await client.send(bytes([byte]))
                    await asyncio.sleep(0.02)

            dripping = asyncio.create_task(drip())
            assert "0.3 s" in await client.error(408)
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)

    async def test_later_one_has_its_own_time(self) -> None:
        async with serving(replace(QUICK, head_s=0.6, keep_alive_s=60.0)) as server, client_of(server) as client:
            for _ in range(3):
                await client.send(HEALTH[:10])
                await asyncio.sleep(0.25)
                await client.send(HEALTH[10:])
                assert (await client.response())[0] == 200
            await client.send(HEALTH[:10])
            await client.error(408)

    async def test_idle_connections_are_kept_a_while(self) -> None:
        async with serving(QUICK) as server, client_of(server) as client:
            await client.send(HEALTH)
            await client.response()
            start_s = time.monotonic()
            assert await client.closed() == b""
            assert time.monotonic() - start_s > 0.4

    @pytest.mark.parametrize("data", [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n"])
    async def test_garbage(self, data: bytes) -> None:
        async with serving() as server, client_of(server) as client:
            await client.send(data)
            assert "Invalid HTTP" in await client.error(400)
            assert await client.closed() == b""

    async def test_upgrades_are_ignored(self) -> None:
        """Java's client offers HTTP/2 so with every request; the parser would take no body of it."""
        offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
        async with serving() as server, client_of(server) as client:
            for _ in range(2):
                await client.send(post(completion(), offer))
                status, _, body = await client.response()
                assert (status, text_of(body)) == (200, "BCDE")


class TestBodies:
    async def test_rest_of_a_refused_one_is_read_for_a_while(self) -> None:
        async with serving(QUICK) as server, client_of(server) as client:
            await client.send(HEAD + b"Content-Length: 9999999\r\n\r\n" + b"x" * 100_000)
            await client.error(413)
            await client.send(b"x" * 100_000)
            assert await client.closed() == b""

    async def test_connection_goes_on_after_a_refused_one(self) -> None:
        size = CONFIG.max_body_bytes + 1
        async with serving() as server, client_of(server) as client:
            await client.send(HEAD + b"Content-Length: %d\r\n\r\n" % size)
            await client.error(413)
            await client.send(b"x" * size + HEALTH)
            assert (await client.response())[0] == 200

    async def test_unread_one_that_drips(self) -> None:
        """An answer before the body's end, then a byte now and then: no timer of uvicorn's ends that."""
        async with serving(QUICK) as server, client_of(server) as client:
            await client.send(b"GET /health HTTP/1.1\r\nContent-Length: 1000\r\n\r\n")
            assert (await client.response())[0] == 200

            async def drip() -> None:
                while True:
                    await client.send(b"x")
                    await asyncio.sleep(0.05)

            dripping = asyncio.create_task(drip())
            assert await client.closed() == b""
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)

    async def test_bad_chunk(self) -> None:
        async with serving() as server, client_of(server) as client:
            await client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\nzz\r\n")
            assert "Invalid HTTP" in await client.error(400)

    async def test_every_split(self) -> None:
        """However the bytes are cut, the answers are the same."""
        body = json.dumps(completion()).encode()
        chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        data = post(completion("B")) + chunked + HEALTH + post(completion("C"))
        async with serving() as server:
            for step in (1, 2, 3, 5, 7, 64, 200, 300, len(data)):
                async with client_of(server) as client:
                    client.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    for start in range(0, len(data), step):
                        await client.send(data[start : start + step])
                        if start % 64 == 0:
                            await asyncio.sleep(0)
                    answers = [(await client.response())[2] for _ in range(4)]
                assert [text_of(answer) for answer in (answers[0], answers[1], answers[3])] == ["CDEF", "BCDE", "DEFG"]


class TestPipelining:
    async def test_answers_come_in_order(self) -> None:
        async with serving() as server, client_of(server) as client:
            letters = [chr(65 + i % 20) for i in range(100)]
            await client.send(b"".join(post(completion(letter, max_tokens=1)) for letter in letters))
            answers = [text_of((await client.response())[2]) for _ in letters]
        assert answers == [chr(ord(letter) + 1) for letter in letters]

    async def test_requests_ahead_of_their_answers_are_not_read(self) -> None:
        """Once nobody reads any more, what is sent stays in the kernel's buffers."""
        async with serving(step_delay_s=0.05) as server, client_of(server) as client:
            await client.send(post(completion(max_tokens=200)))
            while not server.engine.stats().num_running:
                await asyncio.sleep(0.01)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.send(HEALTH * 2_000_000), 1)

    async def test_few_are_parsed_ahead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What waits, waits as bytes: a parsed request takes a hundred times as much memory."""
        num_queued = []

        class Watched(Connection):
            def on_headers_complete(self) -> None:
                super().on_headers_complete()
                num_queued.append(len(self.pipeline))

        monkeypatch.setattr(lifecycle, "Connection", Watched)
        num_requests = 1500
        async with serving() as server, client_of(server) as client:
            sending = asyncio.create_task(client.send(HEALTH * num_requests))
            for _ in range(num_requests):
                assert (await client.response())[0] == 200
            await sending
        assert len(num_queued) == num_requests
        assert max(num_queued) <= 1

    async def test_garbage_after_a_request(self) -> None:
        async with serving() as server, client_of(server) as client:
            await client.send(post(completion()) + b"GARBAGE\r\n\r\n")
            assert text_of((await client.response())[2]) == "BCDE"
            await client.error(400)

    async def test_a_few_bytes_ahead_do_not_hide_a_disconnect(self) -> None:
        async with serving(step_delay_s=0.02) as server:
            async with client_of(server) as client:
                await client.send(post(completion(max_tokens=200)) + b"\r\n")
                while not server.engine.stats().num_running:
                    await asyncio.sleep(0.01)
            await until_idle(server.engine)
            assert server.engine.stats().num_steps < 100


class TestSlowReaders:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_are_cut_off(self, stream: bool, made: list[Connections], monkeypatch: pytest.MonkeyPatch) -> None:
        """An answer larger than the kernel's buffers, which nobody reads."""
        from jaxserve.server.openai import answer

        class Inflated(answer.Answer):
            async def whole(self, inflight: Any) -> list[Any]:
                return [*await super().whole(inflight), b" " * (32 << 20)]

            async def chunks(self, inflight: Any) -> Any:
                async for chunk in super().chunks(inflight):
                    yield chunk + b":" + b"x" * (4 << 20) + b"\n\n"

        monkeypatch.setattr("jaxserve.server.openai.service.Answer", Inflated)
        async with serving(replace(LIMITS, stall_s=1.0)) as server, client_of(server, limit=1024) as client:
            await client.send(post(completion(max_tokens=50, stream=stream)))
            await client.reader.readuntil(b"\r\n\r\n")
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # the transport of a socket reads
            assert made[0].num_open == 1
            async with asyncio.timeout(20):
                while made[0].num_open:
                    await asyncio.sleep(0.05)
            await until_idle(server.engine)

    async def test_that_read_slowly_but_steadily_are_not(self) -> None:
        async with serving(replace(LIMITS, stall_s=0.5), step_delay_s=0.02) as server, client_of(server) as client:
            body = json.dumps(chat(max_tokens=100, stream=True)).encode()
            head = HEAD.replace(COMPLETIONS.encode(), CHAT.encode())
            await client.send(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            got = b""
            while not got.endswith(b"0\r\n\r\n"):
                got += await asyncio.wait_for(client.reader.read(200), 20)
                await asyncio.sleep(0.01)
            assert b"[DONE]" in got


async def test_mangled_requests_leave_nothing_behind(made: list[Connections]) -> None:
    """Pieces of good requests in any order, cut anywhere, bytes changed: no callback fails, no connection stays."""
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    draw = random.Random(7)
    chunked = HEAD + b'Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n5\r\n{"mod\r\n0\r\nX: 1\r\n\r\n'
    good = (
        post(completion()),
        post(completion(stream=True)),
        chunked,
        HEALTH,
        b"\r\n",
        HEAD,
        b"\r\n\r\n",
        b"0\r\n\r\n",
    )

    async def visit(server: LiveServer) -> None:
        data = bytearray(b"".join(draw.choice(good) for _ in range(draw.randint(1, 6))))
        for _ in range(draw.choice((0, 0, 1, 3))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        async with client_of(server) as client:
            for start in range(0, len(data), size := draw.choice((7, 100, 10_000))):
                if not client.writer.is_closing():
                    client.writer.write(bytes(data[start : start + size]))
                    await asyncio.sleep(0)
            with contextlib.suppress(TimeoutError, ConnectionError):
                await asyncio.wait_for(client.reader.read(1000), draw.choice((0.001, 0.1)))

    async with serving(QUICK) as server:
        for _ in range(20):
            await asyncio.gather(*(visit(server) for _ in range(20)))
        async with asyncio.timeout(20):
            while made[0].num_open:
                await asyncio.sleep(0.05)
        await until_idle(server.engine)
        async with client_of(server) as client:
            await client.send(post(completion()))
            assert text_of((await client.response())[2]) == "BCDE"
    assert failures == []


async def test_chunks_of_one_byte_are_handed_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base class copies all it has of a body for each part it is given; a byte each would be work squared."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    sizes: list[int] = []
    on_body = HttpToolsProtocol.on_body

    def spy(self: HttpToolsProtocol, body: bytes) -> None:
        sizes.append(len(body))
        on_body(self, body)

    monkeypatch.setattr(HttpToolsProtocol, "on_body", spy)
    text = json.dumps(completion(user="u" * 500)).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in text) + b"0\r\n\r\n"
    async with serving() as server, client_of(server) as client:
        await client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        assert (await client.reader.readline()).startswith(b"HTTP/1.1 200")
    assert sum(sizes) == len(text)
    assert len(sizes) < len(text) / 20
