"""What a browser sees, and the API's description: of every route, true to the bodies that are read and the answers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest
from server_harness import CHAT, COMPLETIONS, CONFIG, chat, client_of, completion, events_of, make_app

from jaxserve.engine.fake import FakeEngine
from jaxserve.server.openai import replies
from jaxserve.server.openai.openapi import ROUTES
from jaxserve.server.openai.parameters import DETOKENIZE, ENDPOINTS, PARAMETERS, TOKENIZE


@pytest.fixture
async def document(client: httpx.AsyncClient) -> Any:
    response = await client.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    return response.json()


def refs_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        inner = [found for each in value.values() for found in refs_in(each)]
        return [*inner, value["$ref"]] if isinstance(value.get("$ref"), str) else inner
    return [found for each in value for found in refs_in(each)] if isinstance(value, list) else []


async def test_every_route_is_described(engine: FakeEngine, document: Any) -> None:
    app = make_app(engine)
    pages = {"/", "/docs", "/openapi.json"}
    there = {
        (method.lower(), route.path.replace(":path", ""))
        for route in app.routes
        for method in route.methods or ()
        if method != "HEAD" and route.path not in pages
    }
    assert there == {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"] == CONFIG.version


async def test_every_reference_resolves(document: Any) -> None:
    names = {ref.removeprefix("#/components/schemas/") for ref in refs_in(document)}
    assert names == set(document["components"]["schemas"])


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_every_parameter_is_described(document: Any, endpoint: str) -> None:
    ref = document["paths"][endpoint]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    properties = document["components"]["schemas"][ref.rpartition("/")[2]]["properties"]
    listed = {parameter.name: parameter for parameter in PARAMETERS if endpoint in parameter.endpoints}
    assert properties.keys() == listed.keys()
    for name, parameter in listed.items():
        assert parameter.note[1:] in properties[name]["description"]
        if not parameter.applied:
            assert properties[name]["enum"] == [*parameter.no_op, None]


async def test_limits_come_from_the_types(document: Any) -> None:
    temperature = document["components"]["schemas"]["ChatBody"]["properties"]["temperature"]
    assert {"type": "number", "minimum": 0, "maximum": 2.0} in temperature["anyOf"]
    assert len(document["components"]["schemas"]["CompletionBody"]["properties"]["prompt"]["anyOf"]) == 4


SHOWN: dict[str, Any] = {"return_token_ids": True, "prompt_logprobs": 1}
STREAMED: dict[str, Any] = {
    "stream": True, "return_token_ids": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("route", "body", "kind"),
    [
        (CHAT, chat(), replies.ChatAnswer),
        (CHAT, chat(logprobs=True, top_logprobs=2, n=2, stop=["$"], **SHOWN), replies.ChatAnswer),
        (CHAT, chat(stream=True), replies.ChatChunk),
        (CHAT, chat(logprobs=True, top_logprobs=2, **STREAMED), replies.ChatChunk),
        (COMPLETIONS, completion(), replies.CompletionAnswer),
        (COMPLETIONS, completion(logprobs=2, n=2, echo=True, **SHOWN), replies.CompletionAnswer),
        (COMPLETIONS, completion(stream=True), replies.CompletionAnswer),
        (COMPLETIONS, completion(logprobs=2, **STREAMED), replies.CompletionAnswer),
        (f"{CHAT}/render", chat(), replies.TokenIdsAnswer),
        (f"{COMPLETIONS}/render", completion(["A", "B"]), list[replies.TokenIdsAnswer]),
        (TOKENIZE, {"prompt": "A", "return_token_strs": True}, replies.TokenizeAnswer),
        (DETOKENIZE, {"tokens": [5]}, replies.DetokenizeAnswer),
        ("/v1/models", None, replies.Models),
        ("/v1/models/fake", None, replies.Model),
        ("/health", None, replies.Status),
        ("/ready", None, replies.Status),
        ("/version", None, replies.Version),
        (CHAT, chat(n=0), replies.Error),
        ("/v1/models/other", None, replies.Error),
    ],
)
async def test_answers_are_what_is_described(client: httpx.AsyncClient, route: str, body: Any, kind: Any) -> None:
    response = await client.request("GET" if body is None else "POST", route, json=body)
    answers = events_of(response.text) if body and "stream" in body else [response.json()]
    for answer in answers:
        msgspec.convert(answer, kind)


@pytest.mark.parametrize("keys", [(), ("secret",)])
async def test_pages_are_open_and_tell_no_secret(engine: FakeEngine, keys: tuple[str, ...]) -> None:
    async with client_of(make_app(engine, replace(CONFIG, api_keys=keys))) as client:
        for path in ("/", "/docs", "/openapi.json"):
            for accept in ("*/*", "text/html,application/xhtml+xml"):
                response = await client.get(path, headers={"accept": accept})
                assert response.status_code == 200
                assert "secret" not in response.text
        document = (await client.get("/openapi.json")).json()
        asks = {route.path for route in ROUTES if "401" in document["paths"][route.path][route.method]["responses"]}
        for route in ROUTES:
            assert ("security" in document["paths"][route.path][route.method]) is (route.path in asks)
            response = await client.request(route.method, route.path.replace("{model}", "fake"))
            assert (response.status_code == 401) is (route.path in asks)


async def test_root_says_what_this_is(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/")).json()
    assert answer["name"] == "jaxserve"
    assert answer["version"] == CONFIG.version
    page = await client.get("/", headers={"accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")
    for path in answer.values():
        if path.startswith("/"):
            assert (await client.get(path)).status_code == 200
            assert f'href="{path}"' in page.text


async def test_docs_need_no_network(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"<script|<link|<img|src=|@import|url\(", page.text)
    assert not re.search(r'href="(?!/)', page.text)
    for route in ROUTES:
        assert f"{route.method.upper()} {route.path}" in page.text
    for parameter in PARAMETERS:
        assert f"<code>{parameter.name}</code>" in page.text


async def test_what_clients_send_is_escaped(client: httpx.AsyncClient) -> None:
    page = await client.get("/", headers={"accept": "text/html", "host": 'x"><script>alert(1)</script>'})
    assert "<script>" not in page.text
