"""What is refused for its length or as a product, and that the error names who asked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from server_harness import CHAT, COMPLETIONS, INFO, chat, client_of, completion, make_app

from jaxserve.engine.fake import FakeBehaviour, FakeEngine
from jaxserve.server.openai import asked


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    engine = FakeEngine(replace(INFO, max_num_seqs=2), behaviour=FakeBehaviour(max_num_waiting=6))
    async with client_of(make_app(engine)) as client:
        yield client
    await engine.close()


def without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


LONG = [5] * 250  # of a context of 256
NOBODY = without(completion(LONG), "max_tokens")
# (route, body, param, what the message says, what it must not say)
REFUSED: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "the default": (COMPLETIONS, NOBODY, "prompt", "where max_tokens is not given", "asked"),
    "the default, advice": (COMPLETIONS, NOBODY, "prompt", "give max_tokens of at most 6", "lower"),
    "max_tokens": (COMPLETIONS, completion(LONG, max_tokens=7), "max_tokens", "max_tokens=7", "not given"),
    "max_tokens, second prompt": (
        COMPLETIONS, completion([[5], LONG], max_tokens=7), "max_tokens", "250 tokens and max_tokens=7", "not given",
    ),
    "max_completion_tokens": (
        CHAT,
        without(chat("x" * 200, max_completion_tokens=99), "max_tokens"),
        "max_completion_tokens",
        "max_completion_tokens=99",
        "max_tokens=",
    ),
    "max_tokens of a chat": (CHAT, chat("x" * 200, max_tokens=99), "max_tokens", "max_tokens=99", "completion_tokens"),
    "min_tokens above the default": (
        COMPLETIONS, without(completion(min_tokens=20), "max_tokens"), "min_tokens", "where max_tokens is not given",
        "max_tokens=",
    ),
    "min_tokens above max_tokens": (CHAT, chat(min_tokens=5), "min_tokens", "max_tokens=4", "not given"),
    "min_tokens above nothing": (
        COMPLETIONS, completion(min_tokens=5, max_tokens=0, echo=True), "min_tokens", "max_tokens=0", "not given",
    ),
    "best_of": (COMPLETIONS, completion(best_of=9), "best_of", "best_of=9", "n=9:"),
    "n": (COMPLETIONS, completion(n=9), "n", "n=9", "best_of"),
    "prompts with n": (COMPLETIONS, completion(["x"] * 100, n=30), "n", "100 prompts with n=30", "best_of"),
    "prompts with best_of": (
        COMPLETIONS, completion(["x"] * 100, best_of=30), "best_of", "100 prompts with best_of=30", " n=",
    ),
    "prompt_logprobs of a streamed chat": (
        CHAT, chat(prompt_logprobs=1, stream=True), "prompt_logprobs", "leave stream out", "echo",
    ),
    "bad_words": (
        COMPLETIONS,
        completion(bad_words=[chr(97 + i % 26) * (1 + i // 26) for i in range(40)]),
        "bad_words",
        "40 texts have 80 forms",
        "not 80",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_the_error_names_who_asked(client: httpx.AsyncClient, name: str) -> None:
    route, body, param, said, unsaid = REFUSED[name]
    response = await client.post(route, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert said in error["message"]
    assert unsaid not in error["message"]


async def test_what_just_fits(client: httpx.AsyncClient) -> None:
    for body in (completion(LONG, max_tokens=6), without(completion([5] * 240), "max_tokens")):
        assert (await client.post(COMPLETIONS, json=body)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "most", "param"),
    [
        ({"prompt": [[5, 6]] * 3, "n": 2, "allowed_token_ids": list(range(10))}, 60, "allowed_token_ids"),
        ({"prompt": [[5, 6]] * 3, "n": 2, "prompt_logprobs": 4}, 60, "prompt_logprobs"),
        ({"prompt": [[5, 6]] * 3, "n": 2, "logprobs": 4, "echo": True}, 60, "logprobs"),
        ({"prompt": [[5, 6]] * 3, "n": 1, "prompt_logprobs": 1, "logprobs": 4, "echo": True}, 42, "logprobs"),
    ],
)
async def test_products_are_bounded(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], most: int, param: str
) -> None:
    for limit, status in ((most, 200), (most - 1, 400)):
        monkeypatch.setattr(asked, "MAX_ALLOWED_IDS", limit)
        monkeypatch.setattr(asked, "MAX_PROMPT_LOGPROBS", limit)
        response = await client.post(COMPLETIONS, json={**completion(), **fields})
        assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param
    assert str(limit) in response.json()["error"]["message"]


async def test_output_alone_is_not_bounded_as_a_prompt(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked, "MAX_PROMPT_LOGPROBS", 1)
    assert (await client.post(COMPLETIONS, json=completion(logprobs=4))).status_code == 200
    assert (await client.post(CHAT, json=chat(logprobs=True, echo=True))).status_code == 200
