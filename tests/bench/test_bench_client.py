"""One timed request: what counts as a token, whatever way the stream is cut."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from jaxserve.bench.client import Target, Timing, send
from jaxserve.bench.openai_url import sse_events
from jaxserve.bench.workload import Item

IDS = Item(prompt=(5, 6, 7), output_tokens=2)
USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}


def target(endpoint: str = "completions") -> Target:
    return Target(endpoint=endpoint, model="m", temperature=0.0, ignore_eos=True)


def event(text: str | None, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": reason}]}


def delta(reason: str | None = None, **fields: object) -> dict[str, Any]:
    return {"choices": [{"delta": fields, "finish_reason": reason}]}


def stream_of(*events: dict[str, Any], newline: str = "\n") -> bytes:
    lines = [json.dumps(each, ensure_ascii=False) for each in events]
    return "".join(f"data: {line}{newline * 2}" for line in [*lines, "[DONE]"]).encode()


async def answered(data: bytes, item: Item = IDS, endpoint: str = "completions") -> Timing:
    """The timing of a request that gets these bytes, one at a time."""

    async def pieces() -> AsyncIterator[bytes]:
        for i in range(len(data)):
            yield data[i : i + 1]

    async def handle(request: httpx.Request) -> httpx.Response:
        assert request.url.path == ("/v1/chat/completions" if endpoint == "chat" else "/v1/completions")
        return httpx.Response(200, content=pieces())

    async with httpx.AsyncClient(transport=httpx.MockTransport(handle), base_url="http://test") as client:
        return await send(client, target(endpoint), item)


def test_events_may_be_cut_anywhere() -> None:
    def cuts(data: bytes) -> Iterator[tuple[bytes, bytes]]:
        return ((data[:i], data[i:]) for i in range(len(data) + 1))

    events = [event("Ünïcode 🦙"), event("b")]
    for first, second in cuts(b": comment\r\nevent: x\r\n" + stream_of(*events, newline="\r\n")):
        before, pending = sse_events(b"", first)
        after, pending = sse_events(pending, second)
        assert before + after == events
        assert pending == b""


def test_what_is_not_json() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        sse_events(b"data: {oo", b"ps\n")


async def test_pieces_without_text_are_tokens() -> None:
    timing = await answered(stream_of(event(""), event(""), event("", "length"), USAGE))
    assert timing.failure is None
    assert len(timing.gaps_s) == 1
    assert (timing.prompt_tokens, timing.output_tokens) == (9, 2)


async def test_the_last_token_may_come_with_the_reason() -> None:
    timing = await answered(stream_of(event("a"), event("b", "length"), USAGE))
    assert (len(timing.gaps_s), timing.failure) == (1, None)


async def test_a_server_that_does_not_count() -> None:
    timing = await answered(stream_of(event("a"), event("b"), event("", "length")))
    assert (timing.prompt_tokens, timing.cached_tokens, timing.output_tokens, timing.failure) == (3, 0, 2, None)
    text = await answered(stream_of(event("a", "stop")), Item(prompt="one two", output_tokens=1))
    assert (text.prompt_tokens, text.output_tokens) == (0, 1)


@pytest.mark.parametrize("content", ["", None])
async def test_the_role_of_a_chat_is_no_token(content: str | None) -> None:
    begin = delta(role="assistant", content=content)
    events = (begin, delta(content="a"), delta(content=""), delta("length"), USAGE)
    timing = await answered(stream_of(*events), Item(prompt="hi", output_tokens=2), "chat")
    assert (len(timing.gaps_s), timing.failure) == (1, None)
    only = await answered(stream_of(begin, delta("stop")), Item(prompt="hi", output_tokens=2), "chat")
    assert (only.first_s, only.failure) == (None, "no tokens")


@pytest.mark.parametrize("fields", [{"content": "a"}, {"reasoning_content": "a"}, {"tool_calls": [{"index": 0}]}])
async def test_tokens_of_a_chat(fields: dict[str, object]) -> None:
    timing = await answered(
        stream_of(delta(role="assistant", **fields), delta("stop")), Item(prompt="hi", output_tokens=1), "chat"
    )
    assert (timing.output_tokens, timing.failure) == (1, None)


def test_bodies() -> None:
    assert target().body(IDS)["prompt"] == [5, 6, 7]
    body = target("chat").body(Item(prompt="hi", output_tokens=2))
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert "prompt" not in body
