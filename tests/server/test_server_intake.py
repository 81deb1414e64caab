"""Bodies that are slow or many: by counting, with clients that never end by themselves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from server_harness import COMPLETIONS, CONFIG, completion, make_app, make_engine
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from jaxserve.core.errors import JaxserveError
from jaxserve.server.openai.errors import error_response
from jaxserve.server.openai.intake import BODIES_AT_ONCE, SMALL_BODY_BYTES, BodyLimit, BodyLimits, body_is_parsed

LIMITS = BodyLimits(max_bytes=SMALL_BODY_BYTES + 1000, silence_s=30.0)


class Sender:
    """A request whose body comes as the test likes."""

    def __init__(self, app: BodyLimit, *headers: tuple[bytes, bytes]) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        scope = {"type": "http", "method": "POST", "path": "/", "headers": list(headers)}
        self.task = asyncio.create_task(app(scope, self.messages.get, self._send))

    async def send(self, num_bytes: int, *, more: bool = True) -> None:
        self.messages.put_nowait({"type": "http.request", "body": b"x" * num_bytes, "more_body": more})
        for _ in range(10):
            await asyncio.sleep(0)

    async def ended(self) -> int:
        async with asyncio.timeout(10):
            await self.task
        return self.status

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])


@pytest.fixture
async def parsed() -> asyncio.Event:
    """Lets requests that have been read go on."""
    return asyncio.Event()


@pytest.fixture
async def senders() -> AsyncIterator[list[Sender]]:
    senders: list[Sender] = []
    yield senders
    for sender in senders:
        sender.task.cancel()
    await asyncio.gather(*(sender.task for sender in senders), return_exceptions=True)


def reading(parsed: asyncio.Event, limits: BodyLimits = LIMITS) -> BodyLimit:
    """An app that reads all, waits, says that it has parsed it, and answers when told so a second time."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while (await receive()).get("more_body", False):
                pass
            await parsed.wait()
            body_is_parsed(scope)
            await asyncio.sleep(3600 if scope["headers"] else 0)
            await PlainTextResponse("ok")(scope, receive, send)
        except JaxserveError as error:
            await error_response(error)(scope, receive, send)

    return BodyLimit(app, limits=limits)


class TestMemory:
    async def fill(self, app: BodyLimit, senders: list[Sender], *headers: tuple[bytes, bytes]) -> None:
        """Half-sent bodies that hold all there is."""
        for _ in range(BODIES_AT_ONCE):
            senders.append(Sender(app, *headers))
            await senders[-1].send(SMALL_BODY_BYTES)
            await senders[-1].send(1000)

    async def test_of_all_bodies_is_bounded(self, parsed: asyncio.Event, senders: list[Sender]) -> None:
        app = reading(parsed)
        await self.fill(app, senders)
        late = Sender(app)
        await late.send(SMALL_BODY_BYTES + 1)
        assert await late.ended() == 503
        assert late.headers[b"retry-after"] == b"1"
        assert not any(sender.task.done() for sender in senders)

    async def test_small_bodies_pass(self, parsed: asyncio.Event, senders: list[Sender]) -> None:
        app = reading(parsed)
        await self.fill(app, senders)
        parsed.set()
        small = Sender(app)
        await small.send(SMALL_BODY_BYTES, more=False)
        assert await small.ended() == 200

    @pytest.mark.parametrize("how", ["parsed", "gone", "failed"])
    async def test_is_given_back(self, parsed: asyncio.Event, senders: list[Sender], how: str) -> None:
        app = reading(parsed)
        await self.fill(app, senders, (b"x-slow", b"1"))
        if how == "parsed":
            parsed.set()
            for sender in senders:
                await sender.send(0, more=False)
            assert not any(sender.task.done() for sender in senders), "their answers take long"
        elif how == "gone":
            parsed.set()
            for sender in senders:
                sender.messages.put_nowait({"type": "http.disconnect"})
            await asyncio.sleep(0.01)
        else:
            for sender in senders:
                await sender.send(1)
                assert await sender.ended() == 413
        again: list[Sender] = []
        await self.fill(app, again)
        senders += again
        assert not any(sender.status for sender in again)

    async def test_of_one_that_is_silent_goes_to_another(self, parsed: asyncio.Event, senders: list[Sender]) -> None:
        app = reading(parsed, replace(LIMITS, spare_s=0.05))
        await self.fill(app, senders)
        await asyncio.sleep(0.1)
        parsed.set()
        late = Sender(app)
        await late.send(LIMITS.max_bytes, more=False)
        assert await late.ended() == 200
        assert await senders[0].ended() == 408
        assert not any(sender.task.done() for sender in senders[1:])


class TestTime:
    async def test_silence_ends_a_body(self, parsed: asyncio.Event, senders: list[Sender]) -> None:
        senders.append(Sender(reading(parsed, replace(LIMITS, silence_s=0.1))))
        await senders[0].send(10)
        assert await senders[0].ended() == 408

    async def test_so_does_a_drip(self, parsed: asyncio.Event, senders: list[Sender]) -> None:
        sender = Sender(reading(parsed, replace(LIMITS, total_s=0.3)))
        senders.append(sender)
        async with asyncio.timeout(10):
            while not sender.task.done():
                await sender.send(1)
                await asyncio.sleep(0.01)
        assert sender.status == 408

    async def test_waiting_for_an_answer_is_no_silence(self, parsed: asyncio.Event) -> None:
        sender = Sender(reading(parsed, replace(LIMITS, silence_s=0.05)))
        await sender.send(10, more=False)
        await asyncio.sleep(0.2)
        parsed.set()
        assert await sender.ended() == 200


async def test_app_lets_go_of_bodies_before_it_generates() -> None:
    """More large prompts may be in flight than may be read at once."""
    engine = make_engine(step_delay_s=0.05)
    limit = SMALL_BODY_BYTES + 10_000
    app = make_app(engine, replace(CONFIG, max_body_bytes=limit))
    data = json.dumps(completion("x" * (limit - 200), max_tokens=200, truncate_prompt_tokens=10)).encode()
    statuses: list[int] = []

    async def ask() -> None:
        messages: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]

        async def receive() -> Message:
            return messages.pop() if messages else await asyncio.Event().wait() or {}

        async def send(message: Message) -> None:
            statuses.append(message.get("status", 0))

        headers = [(b"content-type", b"application/json")]
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers}
        await app(
            {**scope, "query_string": b"", "raw_path": b"", "root_path": "", "http_version": "1.1"}, receive, send
        )

    tasks = []
    async with asyncio.timeout(30):
        for num_running in range(1, BODIES_AT_ONCE + 4):
            tasks.append(asyncio.create_task(ask()))
            while engine.stats().num_running < num_running and not statuses:
                await asyncio.sleep(0.001)
    assert statuses == []
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await engine.close()
