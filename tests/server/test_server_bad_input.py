"""Every kind of bad input gets OpenAI's error body naming the field, and the next request is answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from server_harness import (
    CHAT,
    COMPLETIONS,
    CONFIG,
    INFO,
    TOKENIZER,
    chat,
    client_of,
    completion,
    live_server,
    make_app,
    make_engine,
)

from jaxserve.engine.fake import FakeEngine
from jaxserve.server.openai.app import create_app
from jaxserve.server.openai.schema import MAX_STOP_STRINGS

TOOL = {"type": "function", "function": {"name": "f"}}
IMAGE = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]

# (route, body, status, param)
BAD_BODIES: dict[str, tuple[str, Any, int, str | None]] = {
    # wrong types
    "max_tokens text": (CHAT, chat(max_tokens="5"), 400, "max_tokens"),
    "max_tokens bool": (CHAT, chat(max_tokens=True), 400, "max_tokens"),
    "max_tokens float": (CHAT, chat(max_tokens=5.5), 400, "max_tokens"),
    "max_tokens list": (CHAT, chat(max_tokens=[5]), 400, "max_tokens"),
    "temperature text": (CHAT, chat(temperature="hot"), 400, "temperature"),
    "temperature bool": (CHAT, chat(temperature=False), 400, "temperature"),
    "stream text": (CHAT, chat(stream="true"), 400, "stream"),
    "stream int": (CHAT, chat(stream=1), 400, "stream"),
    "stop int": (CHAT, chat(stop=5), 400, "stop"),
    "stop list of ints": (CHAT, chat(stop=[5]), 400, "stop.0"),
    "seed float": (CHAT, chat(seed=1.5), 400, "seed"),
    "model int": (CHAT, chat(model=5), 400, "model"),
    "model null": (CHAT, chat(model=None), 400, "model"),
    "user int": (CHAT, chat(user=5), 400, "user"),
    "chat logprobs int": (CHAT, chat(logprobs=1), 400, "logprobs"),
    "completion logprobs bool": (COMPLETIONS, completion(logprobs=True), 400, "logprobs"),
    "logit_bias list": (CHAT, chat(logit_bias=[1]), 400, "logit_bias"),
    "logit_bias text value": (CHAT, chat(logit_bias={"5": "1"}), 400, "logit_bias.5"),
    "logit_bias key not a number": (CHAT, chat(logit_bias={"five": 1}), 400, "logit_bias"),
    "logit_bias key out of vocabulary": (CHAT, chat(logit_bias={"100000": 1}), 400, "logit_bias"),
    "logit_bias negative key": (CHAT, chat(logit_bias={"-1": 1}), 400, "logit_bias"),
    "stream_options list": (CHAT, chat(stream=True, stream_options=[]), 400, "stream_options"),
    "stream_options unknown": (CHAT, chat(stream=True, stream_options={"x": 1}), 400, "stream_options.x"),
    "chat_template_kwargs list": (CHAT, chat(chat_template_kwargs=[]), 400, "chat_template_kwargs"),
    "body list": (CHAT, [1, 2], 400, "body"),
    "body text": (CHAT, "hello", 400, "body"),
    # messages
    "no messages": (CHAT, {"model": "fake"}, 400, "messages"),
    "empty messages": (CHAT, {"model": "fake", "messages": []}, 400, "messages"),
    "messages text": (CHAT, {"model": "fake", "messages": "hi"}, 400, "messages"),
    "message text": (CHAT, {"model": "fake", "messages": ["hi"]}, 400, "messages.0"),
    "message without role": (CHAT, {"model": "fake", "messages": [{"content": "hi"}]}, 400, "messages.0.role"),
    "message without content": (CHAT, {"model": "fake", "messages": [{"role": "user"}]}, 400, "messages.0.content"),
    "message content null": (CHAT, chat(None), 400, "messages.0.content"),
    "message content int": (CHAT, chat(5), 400, "messages.0.content"),
    "message content part text": (CHAT, chat(["hi"]), 400, "messages.0.content.0"),
    "message image part": (CHAT, chat(IMAGE), 400, "messages.0.content.0.type"),
    "message part without text": (CHAT, chat([{"type": "text"}]), 400, "messages.0.content.0.text"),
    "message unknown role": (
        CHAT, {"model": "fake", "messages": [{"role": "cat", "content": ""}]}, 400, "messages.0.role",
    ),
    "message unknown field": (
        CHAT, {"model": "fake", "messages": [{"role": "user", "content": "", "mood": 1}]}, 400, "messages.0.mood",
    ),
    "tool call arguments list": (
        CHAT,
        {"model": "fake", "messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": []}}]}]},
        400,
        "messages.0.tool_calls.0.function.arguments",
    ),
    "tool call without function": (
        CHAT, {"model": "fake", "messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, 400,
        "messages.0.tool_calls.0.function",
    ),
    "refusal part without refusal": (
        CHAT, chat([{"type": "refusal", "text": "x"}]), 400, "messages.0.content.0.refusal",
    ),
    "message part unknown field": (
        CHAT, chat([{"type": "text", "text": "x", "mood": 1}]), 400, "messages.0.content.0.mood",
    ),
    "template refuses the messages": (
        CHAT, {"model": "fake", "messages": [{"role": "tool", "content": "x"}]}, 400, "messages",
    ),
    "template variable reserved": (CHAT, chat(chat_template_kwargs={"messages": []}), 400, "chat_template_kwargs"),
    "continue and generation prompt": (CHAT, chat(continue_final_message=True), 400, "continue_final_message"),
    # prompts
    "no prompt": (COMPLETIONS, {"model": "fake"}, 400, "prompt"),
    "prompt empty text without tokens": (COMPLETIONS, completion("", add_special_tokens=False), 400, "prompt"),
    "prompt empty list": (COMPLETIONS, completion([]), 400, "prompt"),
    "prompt list of empty list": (COMPLETIONS, completion([[]]), 400, "prompt"),
    "prompt int": (COMPLETIONS, completion(5), 400, "prompt"),
    "prompt null": (COMPLETIONS, completion(None), 400, "prompt"),
    "prompt mixed": (COMPLETIONS, completion(["a", 1]), 400, "prompt"),
    "prompt bools": (COMPLETIONS, completion([True, False]), 400, "prompt"),
    "prompt floats": (COMPLETIONS, completion([1.0, 2.0]), 400, "prompt"),
    "prompt ids out of vocabulary": (COMPLETIONS, completion([5, 1 << 20]), 400, "prompt"),
    "prompt ids negative": (COMPLETIONS, completion([-1]), 400, "prompt"),
    "messages too long": (CHAT, chat("x" * 300), 400, "messages"),
    "too many messages": (
        CHAT, {"model": "fake", "messages": [{"role": "user", "content": ""}] * 16_385}, 400, "messages",
    ),
    "prompt ids too long": (COMPLETIONS, completion([5] * 300), 400, "prompt"),
    "prompt too long": (COMPLETIONS, completion("x" * 300), 400, "prompt"),
    "prompt and max_tokens too long": (COMPLETIONS, completion("x", max_tokens=1000), 400, "max_tokens"),
    "second prompt too long": (COMPLETIONS, completion(["x", "x" * 300]), 400, "prompt"),
    "too many prompts": (COMPLETIONS, completion(["x"] * 2000), 400, "prompt"),
    # ranges
    "max_tokens negative": (CHAT, chat(max_tokens=-1), 400, "max_tokens"),
    "max_tokens zero": (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    "completion max_tokens zero": (COMPLETIONS, completion(max_tokens=0), 400, "max_tokens"),
    "max_completion_tokens zero": (CHAT, chat(max_completion_tokens=0), 400, "max_completion_tokens"),
    "max_tokens twice": (CHAT, chat(max_tokens=4, max_completion_tokens=5), 400, "max_tokens"),
    "n zero": (CHAT, chat(n=0), 400, "n"),
    "n huge": (CHAT, chat(n=10**6), 400, "n"),
    "n beyond int64": (CHAT, chat(n=10**30), 400, "n"),
    "sequences huge": (COMPLETIONS, completion(["x"] * 100, n=100), 400, "n"),
    "best_of below n": (COMPLETIONS, completion(n=3, best_of=2), 400, "best_of"),
    "best_of huge": (COMPLETIONS, completion(best_of=10**6), 400, "best_of"),
    "best_of streamed": (COMPLETIONS, completion(best_of=2, stream=True), 400, "best_of"),
    "temperature negative": (CHAT, chat(temperature=-0.1), 400, "temperature"),
    "temperature too hot": (CHAT, chat(temperature=2.1), 400, "temperature"),
    "top_p zero": (CHAT, chat(top_p=0), 400, "top_p"),
    "top_p above one": (CHAT, chat(top_p=1.1), 400, "top_p"),
    "top_k below minus one": (CHAT, chat(top_k=-2), 400, "top_k"),
    "min_p above one": (CHAT, chat(min_p=1.5), 400, "min_p"),
    "repetition_penalty too small": (CHAT, chat(repetition_penalty=0.009), 400, "repetition_penalty"),
    "repetition_penalty zero": (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty"),
    "presence_penalty too large": (CHAT, chat(presence_penalty=2.5), 400, "presence_penalty"),
    "frequency_penalty too small": (CHAT, chat(frequency_penalty=-2.5), 400, "frequency_penalty"),
    "seed beyond int64": (CHAT, chat(seed=2**63), 400, "seed"),
    "logit_bias too large": (CHAT, chat(logit_bias={"5": 101}), 400, "logit_bias.5"),
    "top_logprobs too large": (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    "top_logprobs without logprobs": (CHAT, chat(top_logprobs=2), 400, "top_logprobs"),
    "logprobs negative": (COMPLETIONS, completion(logprobs=-1), 400, "logprobs"),
    "prompt_logprobs streamed": (CHAT, chat(prompt_logprobs=1, stream=True), 400, "prompt_logprobs"),
    "min_tokens negative": (CHAT, chat(min_tokens=-1), 400, "min_tokens"),
    "min_tokens above max_tokens": (CHAT, chat(min_tokens=5), 400, "min_tokens"),
    "stop long": (CHAT, chat(stop="x" * 1025), 400, "stop"),
    "bad_words long": (CHAT, chat(bad_words=["x" * 1025]), 400, "bad_words.0"),
    "too many bad_words": (CHAT, chat(bad_words=["x"] * 65), 400, "bad_words"),
    "stop empty text": (CHAT, chat(stop=""), 400, "stop"),
    "stop list of empty text": (CHAT, chat(stop=["a", ""]), 400, "stop.1"),
    "too many stops": (CHAT, chat(stop=["a"] * 100), 400, "stop"),
    "stop_token_ids negative": (CHAT, chat(stop_token_ids=[-1]), 400, "stop_token_ids.0"),
    "stop_token_ids out of vocabulary": (CHAT, chat(stop_token_ids=[1 << 20]), 400, "stop_token_ids"),
    "allowed_token_ids empty": (CHAT, chat(allowed_token_ids=[]), 400, "allowed_token_ids"),
    "allowed_token_ids out of vocabulary": (CHAT, chat(allowed_token_ids=[1 << 20]), 400, "allowed_token_ids"),
    "bad_words blank": (CHAT, chat(bad_words=[" "]), 400, "bad_words"),
    "truncate_prompt_tokens zero": (CHAT, chat(truncate_prompt_tokens=0), 400, "truncate_prompt_tokens"),
    "truncate_prompt_tokens below minus one": (CHAT, chat(truncate_prompt_tokens=-2), 400, "truncate_prompt_tokens"),
    "priority huge": (CHAT, chat(priority=1_000_001), 400, "priority"),
    "cache_salt empty": (CHAT, chat(cache_salt=""), 400, "cache_salt"),
    "user too long": (CHAT, chat(user="x" * 1000), 400, "user"),
    "stream_options without stream": (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options"),
    # fields
    "unknown field": (CHAT, chat(temprature=1), 400, "temprature"),
    "unknown field empty": (CHAT, chat(temprature=[]), 400, "temprature"),
    "field of the other endpoint": (CHAT, chat(best_of=1), 400, "best_of"),
    "messages to completions": (COMPLETIONS, completion(messages=[]), 400, "messages"),
    # models
    "unknown model": (CHAT, chat(model="gpt-9"), 404, "model"),
    "unknown model of completions": (COMPLETIONS, completion(model="gpt-9"), 404, "model"),
    "no model": (CHAT, {"messages": [{"role": "user", "content": "x"}]}, 400, "model"),
    # tokenize
    "tokenize nothing": ("/tokenize", {}, 400, "prompt"),
    "tokenize both": ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
    "tokenize unknown model": ("/tokenize", {"prompt": "a", "model": "x"}, 404, "model"),
    "tokenize list": ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
    "detokenize text": ("/detokenize", {"tokens": "a"}, 400, "tokens"),
    "detokenize out of vocabulary": ("/detokenize", {"tokens": [1 << 20]}, 400, "tokens"),
    "detokenize nothing": ("/detokenize", {}, 400, "tokens"),
}  # fmt: skip

# (route, raw body, status, param)
BAD_BYTES: dict[str, tuple[str, bytes, int, str]] = {
    "empty": (CHAT, b"", 400, "body"),
    "cut off": (CHAT, json.dumps(chat()).encode()[:-5], 400, "body"),
    "not JSON": (CHAT, b"model=fake&n=1", 400, "body"),
    "single quotes": (CHAT, b"{'model': 'fake'}", 400, "body"),
    "trailing comma": (CHAT, b'{"model": "fake",}', 400, "body"),
    "two objects": (CHAT, b"{}{}", 400, "body"),
    "bad UTF-8": (CHAT, b'{"model": "fake", "messages": [{"role": "user", "content": "\xff\xfe"}]}', 400, "messages.0"),
    "bad UTF-8 in a name": (CHAT, b'{"model": "fake", "\xff": 1}', 400, "body"),
    "null": (CHAT, b"null", 400, "body"),
    "field twice": (CHAT, b'{"model":"fake","model":"alias","messages":[{"role":"user","content":""}]}', 400, "body"),
    "field twice in another spelling": (CHAT, b'{"n":1,"model":"fake","\\u006e":1,"messages":[]}', 400, "body"),
    "UTF-16": (CHAT, json.dumps(chat()).encode("utf-16"), 400, "body"),
    "lone surrogate": (CHAT, b'{"model": "fake", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "body"),
    "control character": (CHAT, b'{"model": "fa\x00ke"}', 400, "body"),
    "NaN": (CHAT, b'{"model":"fake","messages":[{"role":"user","content":"x"}],"temperature":NaN}', 400, "body"),
    "Infinity": (CHAT, b'{"model":"fake","messages":[{"role":"user","content":"x"}],"top_p":-Infinity}', 400, "body"),
    "1e999": (CHAT, b'{"model":"fake","messages":[{"role":"user","content":"x"}],"min_p":1e999}', 400, "min_p"),
    "10000 digits": (
        CHAT, b'{"model":"fake","messages":[{"role":"user","content":"x"}],"seed":' + b"9" * 10_000 + b"}", 400, "seed",
    ),
    "deep list": (CHAT, b'{"model":"fake","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "body"),
    "deep object": (CHAT, b'{"x":' * 50_000 + b"1" + b"}" * 50_000, 400, "body"),
    "above the limit": (CHAT, b" " * (CONFIG.max_body_bytes + 1), 413, "body"),
}  # fmt: skip


def check_error(response: httpx.Response, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param, body
    assert body["error"]["message"]


async def check_alive(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETIONS, json=completion("A"))
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == "BCDE"


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_bad_body(client: httpx.AsyncClient, engine: FakeEngine, name: str) -> None:
    route, body, status, param = BAD_BODIES[name]
    response = await client.post(route, json=body)
    check_error(response, status, param)
    if param is not None and param != "body":
        assert param.split(".")[0] in response.json()["error"]["message"].lower()
    assert engine.stats().num_waiting == engine.stats().num_running == 0
    await check_alive(client)


@pytest.mark.parametrize("name", BAD_BYTES)
async def test_bad_bytes(client: httpx.AsyncClient, name: str) -> None:
    route, data, status, param = BAD_BYTES[name]
    response = await client.post(route, content=data, headers={"content-type": "application/json"})
    check_error(response, status, param)
    await check_alive(client)


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json", ""]
)
async def test_wrong_content_type(client: httpx.AsyncClient, content_type: str) -> None:
    response = await client.post(CHAT, content=json.dumps(chat()), headers={"content-type": content_type})
    check_error(response, 415, "content-type")
    await check_alive(client)


@pytest.mark.parametrize(
    "route", [CHAT, f"{CHAT}/render", COMPLETIONS, f"{COMPLETIONS}/render", "/tokenize", "/detokenize"]
)
async def test_no_content_type(client: httpx.AsyncClient, route: str) -> None:
    """A web page can send a body without a type to any origin, unasked."""
    response = await client.post(route, content=json.dumps(chat()))
    assert "content-type" not in response.request.headers
    check_error(response, 415, "content-type")
    await check_alive(client)


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
async def test_right_content_type(client: httpx.AsyncClient, content_type: str) -> None:
    response = await client.post(CHAT, content=json.dumps(chat()), headers={"content-type": content_type})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", COMPLETIONS, 405),
        ("POST", "/metrics", 405),
        ("POST", "/v1/chat", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", f"{CHAT}/render", 405),
        ("GET", "/redoc", 404),
        ("GET", "/v1/%00%ff", 404),
    ],
)
async def test_wrong_route(client: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    response = await client.request(method, path)
    check_error(response, status, None)
    if status == 405:
        assert response.headers["allow"]
    await check_alive(client)


async def test_unknown_model_has_openai_code(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models/gpt-9")
    check_error(response, 404, "model")
    assert response.json()["error"]["code"] == "model_not_found"


async def test_too_long_has_openai_code(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETIONS, json=completion("x" * INFO.max_model_len))
    assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_too_many_stops_are_told_the_limit(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=chat(stop=["a"] * 65))
    check_error(response, 400, "stop")
    assert str(MAX_STOP_STRINGS) in response.json()["error"]["message"]


async def test_chat_without_a_template(engine: FakeEngine) -> None:
    async with client_of(create_app(engine, TOKENIZER, None, CONFIG)) as client:
        check_error(await client.post(CHAT, json=chat()), 400, "messages")
        await check_alive(client)


class Flood:
    """A body of 100 MB that counts how much of it was asked for."""

    total = 100 * 2**20

    def __init__(self) -> None:
        self.sent = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        while self.sent < self.total:
            self.sent += 1 << 20
            yield b" " * (1 << 20)


async def test_flood_is_refused_before_it_is_read() -> None:
    flood = Flood()
    received = []

    async def send(message: Any) -> None:
        received.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": await anext(flood.chunks()), "more_body": True}

    engine = make_engine()
    app = make_app(engine)
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(),
        "query_string": b"", "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(Flood.total).encode())],
    }  # fmt: skip
    await app(scope, receive, send)
    assert received[0]["status"] == 413
    assert flood.sent == 0

    received.clear()
    scope["headers"] = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
    await app(scope, receive, send)
    assert received[0]["status"] == 413
    assert flood.sent <= CONFIG.max_body_bytes + (1 << 20)


@pytest.mark.parametrize("chunked", [False, True])
async def test_flood_over_a_socket(chunked: bool) -> None:
    engine = make_engine()
    async with live_server(make_app(engine), engine) as server, httpx.AsyncClient(base_url=server.url) as client:
        headers = {"content-type": "application/json"} | ({} if chunked else {"content-length": str(Flood.total)})
        response = await client.post(CHAT, content=Flood().chunks(), headers=headers, timeout=60)
        check_error(response, 413, "body")
        await check_alive(client)


async def test_garbage_instead_of_http() -> None:
    engine = make_engine()
    async with live_server(make_app(engine), engine) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"\x16\x03\x01 not http at all\r\n\r\n")
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 400")
        async with httpx.AsyncClient(base_url=server.url) as client:
            await check_alive(client)


async def test_there_are_enough_kinds() -> None:
    assert len(BAD_BODIES) + len(BAD_BYTES) >= 50
