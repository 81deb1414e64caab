"""Histories of other engines, and hints that clients send unasked: taken, given to the template, or passed over."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from server_harness import CHAT, COMPLETIONS, CONFIG, INFO, TOKENIZER, chat, client_of, completion, make_engine

from jaxserve.engine.fake import FakeEngine
from jaxserve.server.openai.app import create_app
from jaxserve.text.chat import ChatTemplate

SHOW_ALL = "{% for message in messages %}{{ message | tojson }}\n{% endfor %}"


async def templates_view(*messages: Any) -> list[Any]:
    """The messages as the chat template sees them."""
    engine = make_engine()
    app = create_app(engine, TOKENIZER, ChatTemplate(SHOW_ALL, TOKENIZER.special_tokens), CONFIG)
    async with client_of(app) as client:
        response = await client.post("/tokenize", json={"messages": list(messages)})
        assert response.status_code == 200, response.text
        text = TOKENIZER.decode(response.json()["tokens"], skip_special_tokens=False)
    await engine.close()
    return [json.loads(line) for line in text.splitlines()]


def call(arguments: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}, **fields}]}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ('{"a": [1, null]}', {"a": [1, None]}),
        ({"a": [1, None]}, {"a": [1, None]}),
        (" {} ", {}),
        ({}, {}),
        ("", {}),
        (None, {}),
        ('{"a": "Lon', '{"a": "Lon'),
        ('{"a": NaN}', '{"a": NaN}'),
        ("[1]", "[1]"),
        ("5", "5"),
        ("get the weather", "get the weather"),
        ('{"a": 1}{"b": 2}', '{"a": 1}{"b": 2}'),
    ],
)
async def test_arguments_of_tool_calls(arguments: Any, seen: Any) -> None:
    """An object where it is one; what a model wrote badly stays as it wrote it."""
    [message] = await templates_view(call(arguments))
    assert message["tool_calls"] == [{"id": "1", "type": "function", "function": {"name": "f", "arguments": seen}}]


async def test_arguments_may_be_missing() -> None:
    [message] = await templates_view({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]})
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({"content": None}, {"content": ""}),
        ({}, {"content": ""}),
        ({"content": "x", "annotations": []}, {"content": "x"}),
        ({"content": "x", "annotations": [{"type": "url_citation", "url_citation": {}}]}, {"content": "x"}),
        ({"content": "x", "tool_calls": [], "audio": None, "function_call": None}, {"content": "x"}),
        ({"content": "x", "provider_specific_fields": None}, {"content": "x"}),
        ({"content": "x", "cache_control": {"type": "ephemeral"}}, {"content": "x"}),
        ({"content": None, "refusal": "No."}, {"content": "No."}),
        ({"content": "x", "refusal": "No."}, {"content": "x"}),
        ({"content": "", "refusal": None}, {"content": ""}),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, {"content": "No."}),
        (
            {"content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
                         {"type": "text", "text": "b", "annotations": [], "refusal": None}]},
            {"content": "a\nb"},
        ),
        ({"content": "x", "reasoning": None}, {"content": "x"}),
    ],
)  # fmt: skip
async def test_answers_of_other_engines(given: dict[str, Any], seen: dict[str, Any]) -> None:
    [message] = await templates_view({"role": "assistant", **given})
    assert message == {"role": "assistant", **seen}


@pytest.mark.parametrize(
    "given",
    [{"reasoning": "so"}, {"reasoning_content": "so"}, {"reasoning": "other", "reasoning_content": "so"},
     {"reasoning": "so", "reasoning_content": None}],
)  # fmt: skip
async def test_reasoning_by_either_name(given: dict[str, Any]) -> None:
    [message] = await templates_view({"role": "assistant", "content": "x", **given})
    assert message["reasoning_content"] == "so"


async def test_streamed_tool_calls_have_an_index() -> None:
    [message] = await templates_view(call("{}", index=0))
    assert "index" not in message["tool_calls"][0]


async def test_arguments_are_bounded_together(client: httpx.AsyncClient) -> None:
    messages = [call(json.dumps({"a": [[]] * 9000}))] * 4
    response = await client.post(CHAT, json=chat(messages=messages))
    assert response.json()["error"]["param"] == "messages.3.tool_calls.0.function.arguments"
    deep = '{"a":' * 200 + "1" + "}" * 200
    response = await client.post(CHAT, json=chat(messages=[call(deep)]))
    assert response.json()["error"]["param"] == "messages.0.tool_calls.0.function.arguments"


# What clients and routers send without being asked: it asks for nothing.
HINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sglang-router": (CHAT, {"no_stop_trim": False, "separate_reasoning": True, "stream_reasoning": True,
                             "return_hidden_states": False, "include_reasoning": True}),
    "sglang-router completions": (COMPLETIONS, {"no_stop_trim": False, "return_hidden_states": False}),
    "agents": (CHAT, {"parallel_tool_calls": False, "prompt_cache_key": "session-1", "verbosity": "medium",
                      "store": False, "service_tier": "auto", "metadata": {"session": "1"}}),
    "tool choice without tools": (CHAT, {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}),
    "guidellm": (COMPLETIONS, {"max_tokens": 4, "max_completion_tokens": 4, "ignore_eos": True, "stop": None}),
    "format": (CHAT, {"response_format": {"type": "text", "json_schema": None}}),
    "vllm": (CHAT, {"use_beam_search": False, "length_penalty": 1.0, "spaces_between_special_tokens": True}),
    "older clients": (COMPLETIONS, {"suffix": "", "best_of": 1, "logit_bias": {}, "logprobs": None, "echo": False}),
    "unknown null": (CHAT, {"guided_json": None, "chat_template": None, "some_new_thing": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", HINTS)
async def test_hints_that_ask_for_nothing_pass(client: httpx.AsyncClient, engine: FakeEngine, name: str) -> None:
    route, fields = HINTS[name]
    body = {CHAT: chat, COMPLETIONS: completion}[route]
    assert (await client.post(route, json=body())).status_code == 200
    response = await client.post(route, json=body(**fields))
    assert response.status_code == 200, response.text
    plain, hinted = list(engine.submitted)[-2:]
    assert hinted.prompt == plain.prompt
    assert hinted.sampling.max_tokens == plain.sampling.max_tokens


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_stop_trim", True), ("separate_reasoning", False), ("stream_reasoning", False),
        ("return_hidden_states", True), ("include_reasoning", False), ("verbosity", "low"), ("tool_choice", "required"),
        ("store", True), ("service_tier", "priority"), ("use_beam_search", True), ("length_penalty", 0.5),
        ("metadata", {"a": 1}), ("metadata", [1]), ("prompt_cache_key", 5), ("parallel_tool_calls", "no"),
    ],
)  # fmt: skip
async def test_hints_that_ask_for_something_are_refused(client: httpx.AsyncClient, name: str, value: Any) -> None:
    response = await client.post(CHAT, json=chat(**{name: value}))
    assert response.status_code == 400
    assert response.json()["error"]["param"].split(".")[0] == name


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_max_completion_tokens_of_both(client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
    body = {CHAT: chat, COMPLETIONS: completion}[route]
    assert (await client.post(route, json=body(max_tokens=None, max_completion_tokens=3))).status_code == 200
    assert engine.submitted[-1].sampling.max_tokens == 3
    response = await client.post(route, json=body(max_tokens=4, max_completion_tokens=3))
    assert response.json()["error"]["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("fields", "param", "numbers"),
    [
        ({"prompt": ["A"] * 1024, "n": 2, "stop": ["a"] * 33}, "stop", "33 strings for each of 2048 sequences"),
        ({"prompt": ["A"] * 16, "n": 128, "stop": ["a"] * 32}, None, ""),
        ({"prompt": ["A"] * 100, "n": 50, "allowed_token_ids": [5]}, "n", "100 prompts with n=50 are 5000 sequences"),
        ({"prompt": ["A"] * 1024, "n": 2, "allowed_token_ids": [*range(200)] * 3}, "allowed_token_ids", "260"),
        ({"stop_token_ids": [5] * 65}, "stop_token_ids", "64"),
        ({"prompt": "A", "allowed_token_ids": []}, "allowed_token_ids", "empty"),
    ],
)
async def test_products_are_bounded(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str | None, numbers: str
) -> None:
    response = await client.post(f"{COMPLETIONS}/render", json=completion(**fields))
    if param is None:
        assert response.status_code == 200, response.text
        return
    error = response.json()["error"]
    assert error["param"] == param
    assert numbers in error["message"]


async def test_products_of_log_probabilities_and_allowed_ids(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxserve.server.openai.asked.MAX_PROMPT_LOGPROBS", 100)
    monkeypatch.setattr("jaxserve.server.openai.asked.MAX_ALLOWED_IDS", 100)
    for number, status in ((4, 200), (5, 400)):
        # Each prompt has a BOS and a letter, each token ten log-probabilities.
        body = completion(["A"] * number + ["A"], prompt_logprobs=9)
        assert (await client.post(f"{COMPLETIONS}/render", json=body)).status_code == status
        body = completion(["A"] * number, n=5, allowed_token_ids=[5, 6, 7, 8, 9])
        assert (await client.post(f"{COMPLETIONS}/render", json=body)).status_code == status
    assert INFO.max_model_len > 100
