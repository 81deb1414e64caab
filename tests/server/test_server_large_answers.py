"""Answers that are large are written in bounded parts, and others have their turn between them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from server_harness import CHAT, COMPLETIONS, CONFIG, INFO, chat, client_of, completion, events_of, make_app

from jaxserve.engine.fake import FakeEngine
from jaxserve.server.openai import answer, choices, json_text
from jaxserve.server.openai.json_text import ListText, object_pieces
from jaxserve.server.openai.responses import SEND_BYTES, JSONText

NUM_PROMPT = 600
PROMPT = [5 + i % 200 for i in range(NUM_PROMPT)]
LARGEST_PART = 64 * 1024
"""Most characters that one call of the encoder may write here: some two milliseconds' worth."""


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    engine = FakeEngine(replace(INFO, max_model_len=4096))
    async with client_of(make_app(engine, replace(CONFIG, max_body_bytes=1 << 20))) as client:
        yield client
    await engine.close()


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of what the encoder was made to write at once."""
    lengths: list[int] = []
    encode = json_text.encode

    def measured(value: object) -> str:
        text = encode(value)
        lengths.append(len(text))
        return text

    for module in (json_text, choices, answer):
        monkeypatch.setattr(module, "encode", measured)
    return lengths


class Turns:
    """Counts how often another task has had its turn."""

    def __init__(self) -> None:
        self.count = 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.count += 1


LARGE: dict[str, tuple[str, dict[str, Any], int]] = {
    "prompt logprobs": (COMPLETIONS, completion(PROMPT, prompt_logprobs=20, max_tokens=1), 20),
    "prompt logprobs, chat": (CHAT, chat("A" * NUM_PROMPT, prompt_logprobs=20, max_tokens=1, n=2), 20),
    "echo": (COMPLETIONS, completion(PROMPT, echo=True, logprobs=20, max_tokens=1), 20),
    "echo of several": (COMPLETIONS, completion(PROMPT, echo=True, logprobs=20, max_tokens=1, n=8), 20),
    "echo, streamed": (COMPLETIONS, completion(PROMPT, echo=True, logprobs=20, max_tokens=1, n=2, stream=True), 40),
    "output": (CHAT, chat(logprobs=True, top_logprobs=20, max_tokens=NUM_PROMPT, ignore_eos=True), 0),
}


@pytest.mark.parametrize("name", LARGE)
async def test_others_have_their_turn(
    name: str, client: httpx.AsyncClient, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_text, "TURN_S", 0.0)
    route, body, least_turns = LARGE[name]
    turns = Turns()
    ticking = asyncio.create_task(turns.run())
    response = await client.post(route, json=body)
    ticking.cancel()
    assert response.status_code == 200
    assert len(response.content) > 100_000
    assert max(parts) < LARGEST_PART
    assert turns.count > least_turns


async def test_prompts_are_written_once_for_all_choices(client: httpx.AsyncClient, parts: list[int]) -> None:
    fields = {"echo": True, "logprobs": 20, "prompt_logprobs": 20, "return_token_ids": True, "max_tokens": 1}
    one = (await client.post(COMPLETIONS, json=completion(PROMPT, **fields))).json()
    written = sum(parts)
    parts.clear()
    many = (await client.post(COMPLETIONS, json=completion(PROMPT, n=16, **fields))).json()
    assert sum(parts) < 2 * written
    for choice in many["choices"]:
        assert {**choice, "index": 0} == one["choices"][0]


async def test_whole_and_streamed_say_the_same(client: httpx.AsyncClient) -> None:
    body = completion([PROMPT, PROMPT[:50]], echo=True, logprobs=3, max_tokens=40, n=2)
    whole = (await client.post(COMPLETIONS, json=body)).json()["choices"]
    events = events_of((await client.post(COMPLETIONS, json={**body, "stream": True})).text)
    for number, expected in enumerate(whole):
        chunks = [c for event in events for c in event["choices"] if c["index"] == number]
        assert "".join(chunk["text"] for chunk in chunks) == expected["text"]
        for name, values in expected["logprobs"].items():
            assert [v for chunk in chunks if chunk["logprobs"] for v in chunk["logprobs"][name]] == values


@pytest.mark.parametrize("num_events", [0, 1, 3])
def test_lists_of_lists(num_events: int) -> None:
    parts = [ListText() for _ in range(3)]
    for i in range(num_events):
        parts[i].extend([i, {"a": "\u00e9\ud7ff"}])
        parts[i].extend([])
        parts[i].extend([None])
    expected = [item for i in range(num_events) for item in (i, {"a": "\u00e9\ud7ff"}, None)]
    assert json.loads(b"".join(ListText.pieces(*parts))) == expected


@pytest.mark.parametrize("plain", [{}, {"a": 1, "b": [None]}])
@pytest.mark.parametrize("large", [{}, {"c": (b"[1,", b"2]")}, {"c": (b"1",), 'd"': (b"2",)}])
def test_objects(plain: dict[str, Any], large: dict[str, Any]) -> None:
    found = json.loads(b"".join(object_pieces(plain, large)))
    assert found == {**plain, **{name: json.loads(b"".join(pieces)) for name, pieces in large.items()}}


@pytest.mark.parametrize("sizes", [[0], [10, 20], [SEND_BYTES], [SEND_BYTES + 1, 3], [5, 3 * SEND_BYTES, 7]])
async def test_large_answers_leave_in_parts(sizes: list[int]) -> None:
    letters: Iterator[str] = iter("abcdefgh")
    pieces = [next(letters).encode() * size for size in sizes]
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    await JSONText(pieces)({"type": "http"}, receive, send)
    start, *bodies = sent
    assert dict(start["headers"])[b"content-length"] == str(sum(sizes)).encode()
    assert dict(start["headers"])[b"content-type"] == b"application/json"
    assert b"".join(body["body"] for body in bodies) == b"".join(pieces)
    assert max(len(body["body"]) for body in bodies) < 2 * SEND_BYTES
    assert [body["more_body"] for body in bodies] == [True] * (len(bodies) - 1) + [False]
