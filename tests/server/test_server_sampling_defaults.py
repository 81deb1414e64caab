"""Sampling defaults of the model: for what a request leaves out, and only for that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from server_harness import CHAT, COMPLETIONS, CONFIG, INFO, chat, client_of, completion, make_app, make_engine

from jaxserve.core.types import SamplingDefaults
from jaxserve.engine.fake import FakeEngine

CARD = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.1, max_tokens=10)
SHAPING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
BODIES = [(CHAT, chat()), (COMPLETIONS, completion())]


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    engine = make_engine()
    yield engine
    await engine.close()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_app(engine, replace(CONFIG, sampling_defaults=CARD))) as client:
        yield client


async def sampling(client: httpx.AsyncClient, engine: FakeEngine, route: str, body: dict[str, Any]) -> dict[str, Any]:
    """What the engine is asked for."""
    response = await client.post(route, json=body)
    assert response.status_code == 200, response.text
    asked = engine.submitted[-1].sampling
    return {name: getattr(asked, name) for name in (*SHAPING, "max_tokens")}


@pytest.mark.parametrize(("route", "body"), BODIES)
@pytest.mark.parametrize("nulls", [{}, dict.fromkeys(SHAPING)])
async def test_they_stand_in_for_what_is_left_out(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, body: dict[str, Any], nulls: dict[str, None]
) -> None:
    assert await sampling(client, engine, route, {**body, **nulls}) == {**CARD.said(), "max_tokens": 4}


@pytest.mark.parametrize(("route", "body"), BODIES)
@pytest.mark.parametrize(
    ("name", "given", "asked"),
    [
        ("temperature", 0, 0.0),
        ("temperature", 1, 1.0),
        ("top_k", 0, 0),
        ("top_k", -1, 0),
        ("top_p", 1, 1.0),
        ("min_p", 0, 0.0),
        ("repetition_penalty", 1, 1.0),
    ],
)
async def test_what_is_given_counts(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    route: str,
    body: dict[str, Any],
    name: str,
    given: float,
    asked: float,
) -> None:
    expected = {**CARD.said(), "max_tokens": 4, name: asked}
    assert await sampling(client, engine, route, {**body, name: given}) == expected


async def test_length_of_answers(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Nobody has asked for it, so that it is never too much; completions keep OpenAI's 16."""

    async def max_tokens(route: str, body: dict[str, Any], **fields: Any) -> int:
        given = {name: value for name, value in body.items() if name != "max_tokens"}
        return int((await sampling(client, engine, route, {**given, **fields}))["max_tokens"])

    assert await max_tokens(CHAT, chat()) == 10
    assert await max_tokens(CHAT, chat(), max_tokens=None) == 10
    assert await max_tokens(CHAT, chat(), max_tokens=40) == 40
    assert await max_tokens(CHAT, chat(), max_completion_tokens=40) == 40
    assert await max_tokens(CHAT, chat(), min_tokens=12) == 12
    num_chars = INFO.max_model_len - 2 - 3
    assert await max_tokens(CHAT, chat("x" * num_chars)) == 3
    assert await max_tokens(CHAT, chat("x" * 400), truncate_prompt_tokens=-1) == 1
    assert await max_tokens(COMPLETIONS, completion()) == 16


async def test_models_show_them(client: httpx.AsyncClient) -> None:
    for model in (await client.get("/v1/models")).json()["data"]:
        assert model["default_sampling_params"] == CARD.said()
    assert (await client.get("/v1/models/fake")).json()["default_sampling_params"] == CARD.said()


async def test_there_may_be_none(engine: FakeEngine) -> None:
    async with client_of(make_app(engine)) as client:
        asked = await sampling(client, engine, CHAT, chat())
        assert (asked["temperature"], asked["top_k"], asked["top_p"]) == (1.0, 0, 1.0)
        assert (await client.get("/v1/models/fake")).json()["default_sampling_params"] == {}
