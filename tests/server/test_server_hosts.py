"""Which hosts requests may be for, and which web pages may read the answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest
from server_harness import CHAT, COMPLETIONS, CONFIG, chat, client_of, completion, make_app, make_engine

from jaxserve.core.config import load
from jaxserve.core.errors import ConfigError
from jaxserve.engine.fake import FakeEngine
from jaxserve.server.openai.hosts import LOOPBACK, hosts_of, is_loopback

PAGE = "https://page.example"


class TestLoopback:
    @pytest.mark.parametrize(
        "host", ["localhost", "LOCALHOST", "a.localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"]
    )
    def test_is(self, host: str) -> None:
        assert is_loopback(host)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "evil.example", "localhost.evil.example", "", "1"])
    def test_is_not(self, host: str) -> None:
        assert not is_loopback(host)

    def test_what_may_be_asked_for(self) -> None:
        assert hosts_of(None, listens_on="127.0.0.1") == LOOPBACK
        assert hosts_of(None, listens_on="0.0.0.0") is None
        assert hosts_of(("*",), listens_on="127.0.0.1") is None
        assert hosts_of(("a.example",), listens_on="0.0.0.0") == ("a.example", *LOOPBACK)


class TestHosts:
    async def status(self, engine: FakeEngine, hosts: tuple[str, ...] | None, *headers: tuple[str, str]) -> int:
        async with client_of(make_app(engine, replace(CONFIG, allowed_hosts=hosts))) as client:
            request = client.build_request("POST", COMPLETIONS, json=completion())
            del request.headers["host"]
            request.headers = httpx.Headers([*request.headers.multi_items(), *headers])
            response = await client.send(request)
        if response.status_code == 421:
            assert "--allowed-hosts" in response.json()["error"]["message"]
            assert response.headers["x-request-id"]
        return response.status_code

    @pytest.mark.parametrize(
        "host",
        ["localhost", "localhost:8000", "LocalHost.", "127.0.0.1:1", "[::1]", "[::1]:8000", "a.localhost:80",
         "[::ffff:127.0.0.1]:8000", ""],
    )  # fmt: skip
    async def test_loopback_passes(self, engine: FakeEngine, host: str) -> None:
        assert await self.status(engine, LOOPBACK, ("host", host)) == 200

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::2]:1",
         "localhost@evil.example", "evil.example\x1b[31m", "[", "*"],
    )  # fmt: skip
    async def test_others_do_not(self, engine: FakeEngine, host: str) -> None:
        assert await self.status(engine, LOOPBACK, ("host", host)) == 421
        assert await self.status(engine, None, ("host", host)) == 200

    async def test_every_host_counts(self, engine: FakeEngine) -> None:
        assert await self.status(engine, LOOPBACK, ("host", "localhost"), ("host", "evil.example")) == 421

    async def test_no_host_comes_from_no_browser(self, engine: FakeEngine) -> None:
        assert await self.status(engine, LOOPBACK) == 200

    async def test_named(self, engine: FakeEngine) -> None:
        hosts = hosts_of(("api.example", "*.wild.example", "10.0.0.0/8"), listens_on="0.0.0.0")
        for host, status in {
            "api.example:443": 200, "x.api.example": 421, "a.wild.example": 200, "wild.example": 421,
            "10.1.2.3:8000": 200, "11.1.2.3": 421, "localhost:8000": 200,
        }.items():  # fmt: skip
            assert await self.status(engine, hosts, ("host", host)) == status, host

    async def test_probes_too(self, engine: FakeEngine) -> None:
        async with client_of(make_app(engine, replace(CONFIG, allowed_hosts=LOOPBACK))) as client:
            assert (await client.get("/metrics", headers={"host": "evil.example"})).status_code == 421
            assert (await client.get("/metrics", headers={"host": "localhost"})).status_code == 200

    def test_setting(self) -> None:
        assert load({"allowed_hosts": "A.example., [::1]"}, environ={}).allowed_hosts == ("a.example", "[::1]")
        for wrong in ("http://a.example", "a.example:80", "a b", "", "a..b"):
            with pytest.raises(ConfigError, match="--allowed-hosts"):
                load({"allowed_hosts": wrong}, environ={})


class TestOrigins:
    @pytest.fixture
    async def client(self, engine: FakeEngine) -> Any:
        config = replace(CONFIG, api_keys=("k",), allowed_origins=(PAGE,), max_body_bytes=1000)
        async with client_of(make_app(engine, config)) as client:
            client.headers["origin"] = PAGE
            yield client

    async def test_preflight_needs_no_key(self, client: httpx.AsyncClient) -> None:
        asked = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-os",
        }
        response = await client.options(CHAT, headers=asked)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == PAGE
        allowed = response.headers["access-control-allow-headers"].replace(" ", "").split(",")
        assert {"authorization", "content-type", "x-stainless-os"} <= set(allowed)
        evil = await client.options(CHAT, headers={**asked, "origin": "https://evil.example"})
        assert evil.status_code == 400
        assert "access-control-allow-origin" not in evil.headers

    @pytest.mark.parametrize(
        ("status", "key", "body"),
        [(200, "k", chat()), (200, "k", chat(stream=True)), (401, "x", chat()), (400, "k", chat(n=0)),
         (413, "k", chat("x" * 2000))],
    )  # fmt: skip
    async def test_page_may_read_every_answer(
        self, client: httpx.AsyncClient, status: int, key: str, body: dict[str, Any]
    ) -> None:
        response = await client.post(CHAT, json=body, headers={"authorization": f"Bearer {key}"})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == PAGE
        assert set(response.headers["access-control-expose-headers"].split(", ")) == {"x-request-id", "retry-after"}
        assert "access-control-allow-credentials" not in response.headers

    async def test_failures_of_ours_too(self, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise RuntimeError

        monkeypatch.setattr(engine, "health", fail)
        async with client_of(make_app(engine, replace(CONFIG, allowed_origins=("*",)))) as client:
            response = await client.get("/health", headers={"origin": PAGE})
        assert response.status_code == 500
        assert response.headers["access-control-allow-origin"] == "*"

    async def test_other_pages_may_not(self, client: httpx.AsyncClient) -> None:
        response = await client.get("/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in response.headers

    async def test_off_by_default(self) -> None:
        engine = make_engine()
        async with client_of(make_app(engine)) as client:
            response = await client.get("/health", headers={"origin": PAGE})
            assert not [name for name in response.headers if name.startswith("access-control")]
            asked = {"origin": PAGE, "access-control-request-method": "POST"}
            assert (await client.options(CHAT, headers=asked)).status_code == 405
        await engine.close()

    def test_setting(self) -> None:
        text = "HTTPS://A.example/, http://localhost:3000, https://b.example:443, *"
        assert load({"allowed_origins": text}, environ={}).allowed_origins == (
            "https://a.example", "http://localhost:3000", "https://b.example", "*",
        )  # fmt: skip
        for wrong in ("a.example", "https://a.example/path", "null", "https://"):
            with pytest.raises(ConfigError, match="--allowed-origins"):
                load({"allowed_origins": wrong}, environ={})
