"""Request ids, API keys, log lines, and the engine slot."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from dataclasses import replace
from typing import Any

import httpx
import pytest
from server_harness import CHAT, COMPLETIONS, CONFIG, INFO, chat, client_of, completion, make_app, make_engine

from jaxserve.engine.fake import FakeEngine
from jaxserve.server.openai.slot import EngineSlot
from jaxserve.telemetry.logging import RequestIdFilter

OPEN = ("/health", "/ready", "/metrics", "/version")


class TestRequestId:
    @pytest.mark.parametrize(
        ("route", "body", "status"),
        [(CHAT, chat(), 200), (CHAT, chat(stream=True), 200), (CHAT, chat(n=0), 400), ("/nowhere", {}, 404)],
    )
    async def test_comes_back(self, client: httpx.AsyncClient, route: str, body: Any, status: int) -> None:
        response = await client.post(route, json=body, headers={"x-request-id": "abc-123"})
        assert response.status_code == status
        assert response.headers.get_list("x-request-id") == ["abc-123"]

    async def test_is_made_up_when_missing(self, client: httpx.AsyncClient) -> None:
        first, second = [(await client.get("/health")).headers["x-request-id"] for _ in range(2)]
        assert len(first) == 32
        assert first != second

    @pytest.mark.parametrize("bad", [b"", b"a b", b"x" * 129, b"\xff\xfe", b"a\tb"])
    async def test_is_replaced_when_it_could_forge(self, client: httpx.AsyncClient, bad: bytes) -> None:
        response = await client.get("/health", headers=[(b"x-request-id", bad)])
        assert len(response.headers["x-request-id"]) == 32

    @pytest.mark.parametrize("stream", [False, True])
    async def test_is_in_every_log_line(
        self, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, stream: bool
    ) -> None:
        caplog.set_level("DEBUG", "jaxserve")
        caplog.handler.addFilter(RequestIdFilter())
        await client.post(COMPLETIONS, json=completion(["A", "B"], stream=stream), headers={"x-request-id": "abc"})
        lines = [record for record in caplog.records if record.name.startswith("jaxserve")]
        assert len(lines) == 2
        assert {record.__dict__["request_id"] for record in lines} == {"abc"}

    async def test_access_line(self, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", "jaxserve.access")
        await client.get("/v1/models")
        await client.get("/health")
        assert [line.rpartition(" in ")[0] for line in caplog.messages] == ["GET /v1/models 200"]

    async def test_access_line_shows_a_path_as_one_word(
        self, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "jaxserve.access")
        await client.get("/a%0A2026-01-01 INFO%20GET /%1b[31m%25")
        await client.get("/" + "b" * 10_000)
        forged, long = [line.rpartition(" in ")[0] for line in caplog.messages]
        assert forged == "GET /a%0A2026-01-01%20INFO%20GET%20/%1B%5B31m%25 404"
        assert long == f"GET /{'b' * 199}... 404"

    async def test_same_client_id_twice_at_once(self, client: httpx.AsyncClient) -> None:
        headers = {"x-request-id": "same"}
        answers = await asyncio.gather(*(client.post(CHAT, json=chat(), headers=headers) for _ in range(5)))
        assert [answer.status_code for answer in answers] == [200] * 5
        assert len({answer.json()["id"] for answer in answers}) == 5


class TestApiKey:
    @pytest.fixture
    async def guarded(self, engine: FakeEngine) -> Any:
        config = replace(CONFIG, api_keys=("sk-one", "schlüssel"))
        async with client_of(make_app(engine, config)) as client:
            yield client

    @pytest.mark.parametrize(
        "header",
        [
            None,
            b"",
            b"Bearer",
            b"Bearer ",
            b"Bearer sk-on",
            b"Bearer sk-one2",
            b"Basic sk-one",
            b"sk-one",
            b"Bearer \xff",
        ],
    )
    @pytest.mark.parametrize("path", ["/v1/models", CHAT, "/tokenize", "/nowhere"])
    async def test_wrong_key(self, guarded: httpx.AsyncClient, header: bytes | None, path: str) -> None:
        headers = [] if header is None else [(b"authorization", header)]
        response = await guarded.request("GET", path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]

    @pytest.mark.parametrize("header", [b"Bearer sk-one", b"bearer  sk-one ", "Bearer schlüssel".encode()])
    async def test_right_key(self, guarded: httpx.AsyncClient, header: bytes) -> None:
        response = await guarded.post(CHAT, json=chat(), headers=[(b"authorization", header)])
        assert response.status_code == 200

    @pytest.mark.parametrize("path", OPEN)
    async def test_open_paths(self, guarded: httpx.AsyncClient, path: str) -> None:
        assert (await guarded.get(path)).status_code == 200

    async def test_body_is_not_read_without_a_key(self, guarded: httpx.AsyncClient) -> None:
        response = await guarded.post(CHAT, content=b"x" * (CONFIG.max_body_bytes + 1))
        assert response.status_code == 401


class TestFacts:
    async def test_models(self, client: httpx.AsyncClient) -> None:
        answer = (await client.get("/v1/models")).json()
        assert answer["object"] == "list"
        assert [(m["id"], m["root"], m["max_model_len"]) for m in answer["data"]] == [
            ("fake", "fake", 256),
            ("alias", "fake", 256),
        ]
        assert (await client.get("/v1/models/alias")).json() == answer["data"][1]

    async def test_model_names_with_slashes(self, engine: FakeEngine) -> None:
        config = replace(CONFIG, served_model_names=("org/model",))
        async with client_of(make_app(engine, config)) as client:
            assert (await client.get("/v1/models/org/model")).json()["id"] == "org/model"

    async def test_version(self, client: httpx.AsyncClient) -> None:
        assert (await client.get("/version")).json() == {"version": "1.2.3"}

    async def test_dead_engine_fails_health(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        assert (await client.get("/health")).status_code == 200
        engine.kill("The device is gone.")
        for path in ("/health", "/ready"):
            response = await client.get(path)
            assert response.status_code == 503
            assert response.json()["error"]["message"] == "The device is gone."

    async def test_draining_is_alive_but_not_ready(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        await engine.drain(1.0)
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 503
        response = await client.post(CHAT, json=chat())
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "service_unavailable_error"


class TestSlot:
    async def test_empty_then_filled(self) -> None:
        slot = EngineSlot("Programs compile.")
        async with client_of(make_app(slot)) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/version")).status_code == 200
            for response in (
                await client.get("/ready"),
                await client.get("/v1/models"),
                await client.post(CHAT, json=chat()),
                await client.post("/tokenize", json={"prompt": "A"}),
            ):
                assert response.status_code == 503
                assert response.json()["error"]["message"] == "Programs compile."
            assert "vllm:num_requests_running" not in (await client.get("/metrics")).text
            engine = make_engine()
            slot.fill(engine)
            assert slot.filled
            assert slot.info == INFO
            assert (await client.get("/ready")).status_code == 200
            assert (await client.post(CHAT, json=chat())).status_code == 200
            assert "vllm:num_requests_running" in (await client.get("/metrics")).text
            assert slot.stats() == engine.stats()
            assert await slot.drain(1.0)
            assert not engine.health().ready
            await slot.close()

    async def test_failed(self) -> None:
        slot = EngineSlot()
        slot.fail("The checkpoint is corrupt.")
        async with client_of(make_app(slot)) as client:
            response = await client.get("/health")
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "The checkpoint is corrupt."

    async def test_drained_while_empty(self) -> None:
        slot = EngineSlot()
        slot.abort("nobody")
        assert await slot.drain(0.0)
        assert "shutting down" in slot.health().reason
        await slot.close()


async def test_time_limit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    engine = make_engine(step_delay_s=0.02)
    async with client_of(make_app(engine, replace(CONFIG, request_timeout_s=0.1))) as client:
        response = await client.post(CHAT, json=chat(max_tokens=100))
        assert response.status_code == 504
        assert response.json()["error"]["type"] == "timeout_error"
        response = await client.post(CHAT, json=chat(max_tokens=100, stream=True))
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"timeout_error"' in response.text
    assert engine.stats().num_running == 0
    outcomes = [record.__dict__["outcome"] for record in caplog.records if "outcome" in record.__dict__]
    assert outcomes == ["timeout", "timeout"]
    assert logging.getLogger("jaxserve").handlers == []


def test_the_app_does_not_import_jax() -> None:
    code = "import sys, jaxserve.server.openai.app, jaxserve.server.lifecycle; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
