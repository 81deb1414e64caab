"""A real server on a real socket: disconnects, many clients, the `openai` client, draining, the whole process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam
from server_harness import (
    CHAT,
    COMPLETIONS,
    LiveServer,
    chat,
    completion,
    events_of,
    live_server,
    make_app,
    make_engine,
    until_idle,
)
from server_process import process, until_status

from jaxserve.core.errors import ConfigError
from jaxserve.server.lifecycle import listen

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "A"}]


@pytest.fixture
async def slow() -> AsyncIterator[LiveServer]:
    """A server that takes 10 ms a token."""
    engine = make_engine(step_delay_s=0.01)
    async with live_server(make_app(engine), engine) as server:
        yield server


@pytest.fixture
async def server() -> AsyncIterator[LiveServer]:
    engine = make_engine()
    async with live_server(make_app(engine), engine) as server:
        yield server


class TestDisconnect:
    @pytest.mark.parametrize("body", [chat(max_tokens=200), chat(max_tokens=200, n=2)])
    async def test_while_waiting(self, slow: LiveServer, body: dict[str, object]) -> None:
        async with httpx.AsyncClient(base_url=slow.url) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(CHAT, json=body, timeout=0.1)
        assert slow.engine.stats().num_running
        await until_idle(slow.engine)
        assert slow.engine.stats().num_steps < 100

    @pytest.mark.parametrize("body", [completion(max_tokens=200), completion(["A", "B", "C"], max_tokens=200, n=2)])
    async def test_in_a_stream(self, slow: LiveServer, body: dict[str, object]) -> None:
        async with (
            httpx.AsyncClient(base_url=slow.url) as client,
            client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response,
        ):
            await anext(response.aiter_lines())
            assert slow.engine.stats().num_running
        await until_idle(slow.engine)
        assert slow.engine.stats().num_steps < 100

    async def test_many_at_random_moments(self, slow: LiveServer) -> None:
        async def visit(client: httpx.AsyncClient, i: int) -> None:
            with contextlib.suppress(httpx.TimeoutException):
                body = chat(max_tokens=100, stream=i % 2 == 0)
                await client.post(CHAT, json=body, timeout=0.01 + 0.01 * (i % 7))

        async with httpx.AsyncClient(base_url=slow.url, limits=httpx.Limits(max_connections=100)) as client:
            await asyncio.gather(*(visit(client, i) for i in range(60)))
            await until_idle(slow.engine)
            response = await client.post(COMPLETIONS, json=completion())
            assert response.json()["choices"][0]["text"] == "BCDE"


async def test_64_streams_at_once(server: LiveServer) -> None:
    async with httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=64)) as client:
        bodies = [completion(chr(97 + i % 20), stream=True, max_tokens=5) for i in range(64)]
        responses = await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in bodies))
    for i, response in enumerate(responses):
        text = "".join(event["choices"][0]["text"] for event in events_of(response.text))
        assert text == "".join(chr(98 + i % 20 + k) for k in range(5))


async def test_chunks_arrive_as_they_are_made(slow: LiveServer) -> None:
    arrivals = []
    async with (
        httpx.AsyncClient(base_url=slow.url) as client,
        client.stream("POST", CHAT, json=chat(max_tokens=10, stream=True)) as response,
    ):
        async for _ in response.aiter_bytes():
            arrivals.append(time.monotonic())
    assert len(arrivals) >= 4
    assert arrivals[-1] - arrivals[0] > 0.05


async def test_chunked_request_body(server: LiveServer) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in json.dumps(chat()).encode():
            yield bytes([byte])

    async with httpx.AsyncClient(base_url=server.url) as client:
        response = await client.post(CHAT, content=pieces(), headers={"content-type": "application/json"})
        assert response.request.headers["transfer-encoding"] == "chunked"
        assert response.status_code == 200


async def test_large_body_is_translated_in_a_thread(server: LiveServer) -> None:
    async with httpx.AsyncClient(base_url=server.url) as client:
        body = completion("x" * 100_000 + "A", truncate_prompt_tokens=10)
        assert (await client.post(COMPLETIONS, json=body)).json()["choices"][0]["text"] == "BCDE"


class TestOpenAIClient:
    @pytest.fixture
    async def client(self, server: LiveServer) -> AsyncIterator[openai.AsyncOpenAI]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            yield client

    async def test_models(self, client: openai.AsyncOpenAI) -> None:
        assert [model.id async for model in client.models.list()] == ["fake", "alias"]
        assert (await client.models.retrieve("fake")).id == "fake"

    async def test_chat(self, client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(
            model="fake",
            messages=MESSAGES,
            max_completion_tokens=4,
            logprobs=True,
            top_logprobs=2,
            n=2,
        )
        ChatCompletion.model_validate(answer.model_dump(), strict=True)
        assert [choice.message.content for choice in answer.choices] == ['!"#$'] * 2
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.choices[0].logprobs is not None

    async def test_chat_stream(self, client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model="fake",
            messages=MESSAGES,
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == '!"#$'
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 7

    async def test_chat_stream_helper(self, client: openai.AsyncOpenAI) -> None:
        async with client.chat.completions.stream(model="fake", messages=MESSAGES, stop="%") as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == '!"#$'

    async def test_completions(self, client: openai.AsyncOpenAI) -> None:
        answer = await client.completions.create(model="fake", prompt=["A", "B"], max_tokens=4, logprobs=2)
        Completion.model_validate(answer.model_dump(), strict=True)
        assert [choice.text for choice in answer.choices] == ["BCDE", "CDEF"]
        stream = await client.completions.create(model="fake", prompt="A", max_tokens=4, stream=True)
        chunks = [chunk async for chunk in stream]
        for chunk in chunks:
            assert chunk.object == "text_completion"
        assert "".join(chunk.choices[0].text for chunk in chunks) == "BCDE"

    async def test_errors(self, client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="fake", messages=MESSAGES, n=0)
        assert caught.value.param == "n"
        assert caught.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="gpt-9", prompt="A")
        assert missing.value.code == "model_not_found"

    async def test_error_in_a_stream(self) -> None:
        engine = make_engine(error_after_tokens=2)
        async with (
            live_server(make_app(engine), engine) as server,
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
        ):
            stream = await client.completions.create(model="fake", prompt="A", stream=True)
            with pytest.raises(openai.APIError, match="A step failed"):
                async for _ in stream:
                    pass

    async def test_sync_client(self, server: LiveServer) -> None:
        def talk() -> tuple[str | None, str]:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
                answer = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=4)
                stream = client.completions.create(model="fake", prompt="A", max_tokens=4, stream=True)
                return answer.choices[0].message.content, "".join(chunk.choices[0].text for chunk in stream)

        assert await asyncio.to_thread(talk) == ('!"#$', "BCDE")


class TestDrain:
    async def test_finishes_what_is_in_flight(self, slow: LiveServer) -> None:
        async with httpx.AsyncClient(base_url=slow.url) as client:
            running = asyncio.create_task(client.post(CHAT, json=chat(max_tokens=40, stream=True)))
            while not slow.engine.stats().num_running:
                await asyncio.sleep(0.005)
            slow.stop.next()
            while slow.engine.health().ready:
                await asyncio.sleep(0.005)
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/health")).status_code == 200
            assert (await client.post(CHAT, json=chat())).status_code == 503
            response = await running
        assert events_of(response.text)[-1]["choices"][0]["finish_reason"] == "length"
        await asyncio.wait_for(asyncio.shield(slow.task), 5)

    @pytest.mark.parametrize("second_signal", [False, True])
    async def test_aborts_the_rest(self, second_signal: bool) -> None:
        engine = make_engine(step_delay_s=0.05)
        deadline_s = 60.0 if second_signal else 0.1
        async with live_server(make_app(engine), engine, drain_deadline_s=deadline_s) as server:
            async with httpx.AsyncClient(base_url=server.url) as client:
                stream = asyncio.create_task(client.post(CHAT, json=chat(max_tokens=200, stream=True)))
                whole = asyncio.create_task(client.post(CHAT, json=chat(max_tokens=200)))
                while engine.stats().num_running < 2:
                    await asyncio.sleep(0.005)
                start_s = time.monotonic()
                server.stop.next()
                if second_signal:
                    await asyncio.sleep(0.05)
                    server.stop.next()
                error = events_of((await stream).text)[-1]["error"]
                assert error["type"] == "service_unavailable_error"
                assert (await whole).status_code == 503
            await asyncio.wait_for(asyncio.shield(server.task), 5)
            assert time.monotonic() - start_s < 5


class TestProcess:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    async def test_signals_drain_and_exit_with_0(self, number: signal.Signals) -> None:
        with process("time.sleep(0.5)") as (child, url):
            async with httpx.AsyncClient(base_url=url) as client:
                await until_status(client, "/ready", 503)
                await until_status(client, "/health", 200)
                await until_status(client, "/ready", 200)
                running = asyncio.create_task(client.post(CHAT, json=chat(max_tokens=50), timeout=30))
                await asyncio.sleep(0.3)
                child.send_signal(number)
                response = await running
                assert response.json()["choices"][0]["finish_reason"] == "length"
            assert await asyncio.to_thread(child.wait, 10) == 0
            assert child.stderr is not None
            lines = [json.loads(line) for line in child.stderr.read().splitlines()]
        assert {"time", "level", "request_id", "logger", "message"} <= set(lines[0])
        assert response.headers["x-request-id"] in {line["request_id"] for line in lines}

    async def test_nohup_is_respected(self) -> None:
        with process("", before="signal.signal(signal.SIGHUP, signal.SIG_IGN)") as (child, url):
            async with httpx.AsyncClient(base_url=url) as client:
                await until_status(client, "/ready", 200)
                child.send_signal(signal.SIGHUP)
                await asyncio.sleep(0.3)
                assert (await client.post(COMPLETIONS, json=completion())).status_code == 200

    async def test_sigterm_while_the_engine_starts(self) -> None:
        with process("time.sleep(60)") as (child, url):
            async with httpx.AsyncClient(base_url=url) as client:
                await until_status(client, "/health", 200)
                child.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(child.wait, 10) == 0

    async def test_an_engine_that_does_not_end_is_left_behind(self) -> None:
        start = """
    import asyncio
    from jaxserve.server import lifecycle
    lifecycle.FLUSH_S = 0.2
    engine = make_engine()
    engine.close = lambda: asyncio.sleep(3600)
    slot.fill(engine)
    return
"""
        with process(start) as (child, url):
            async with httpx.AsyncClient(base_url=url) as client:
                await until_status(client, "/ready", 200)
                child.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(child.wait, 10) == 1
            assert child.stderr is not None
            logged = [json.loads(line)["message"] for line in child.stderr.read().splitlines()]
        assert logged[-2:] == ["drained", "the engine did not end within 0.2 s"]

    async def test_failing_start_ends_the_process(self) -> None:
        with process("raise ValueError('no such checkpoint')") as (child, _):
            assert await asyncio.to_thread(child.wait, 30) == 1
            assert child.stderr is not None
            lines = child.stderr.read().splitlines()
        assert lines[-1] == "ValueError: no such checkpoint"
        logged = [json.loads(line)["message"] for line in lines if line.startswith("{")]
        assert [message.split(" port ")[0] for message in logged] == ["listening on 127.0.0.1"], "nothing to drain"


@pytest.mark.parametrize("host", ["1.2.3.4", "no.such.host.invalid"])
def test_a_host_that_is_not_here_is_not_the_ports_fault(host: str) -> None:
    with pytest.raises(ConfigError, match="--host must be an address of this machine"):
        listen(host, 0)


def test_taken_port_is_one_sentence() -> None:
    with (
        listen("127.0.0.1", 0) as taken,
        pytest.raises(ConfigError, match=r"Cannot listen on 127\.0\.0\.1 port .* choose another with --port\."),
    ):
        listen("127.0.0.1", taken.getsockname()[1])


async def test_ipv6() -> None:
    with listen("::1", 0) as sock:
        assert sock.family is socket.AF_INET6
