"""Whose request it is: keys and their attributes, addresses, trusted headers, bounds of priority, cached prefixes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from counting_engine import counting_engine
from server_harness import (
    CHAT,
    COMPLETIONS,
    CONFIG,
    TOKENIZER,
    chat,
    client_of,
    completion,
    events_of,
    live_server,
    make_app,
    make_engine,
)

from jaxserve.core.errors import ConfigError
from jaxserve.engine.fake import FakeEngine
from jaxserve.server.openai.callers import FAIRNESS_HEADER, Callers, parse_line
from jaxserve.server.openai.config import CallerPolicy

POLICY = CallerPolicy()


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@asynccontextmanager
async def asking(
    engine: FakeEngine, *keys: str, address: str = "127.0.0.1", **policy: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server with these keys, at an address."""
    app = make_app(engine, replace(CONFIG, api_keys=keys, callers=CallerPolicy(**policy)))
    transport = httpx.ASGITransport(app, client=(address, 1234))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def client_seen(engine: FakeEngine, client: httpx.AsyncClient, headers: dict[str, str] | None = None) -> str:
    """Whose request the engine takes it for."""
    response = await client.post(CHAT, json=chat(), headers=headers)
    assert response.status_code == 200
    return engine.submitted[-1].client


class TestLines:
    def test_a_plain_key(self) -> None:
        given, caller = parse_line("sk-secret", POLICY)
        assert given == b"sk-secret"
        assert (caller.trusted, caller.min_priority, caller.max_priority) == (False, -10, 10)
        assert caller.id.startswith("key:")
        assert "secret" not in caller.id
        assert caller.id == parse_line("sk-secret", POLICY)[1].id != parse_line("sk-other", POLICY)[1].id

    def test_attributes(self) -> None:
        given, caller = parse_line("  schlüssel  priority=-100..0 weight=2.5 trusted name=team-a.1 ", POLICY)
        assert given == "schlüssel".encode()
        assert (caller.id, caller.trusted) == ("name:team-a.1", True)
        assert (caller.min_priority, caller.max_priority, caller.weight) == (-100, 0, 2.5)

    def test_shares_by_client(self) -> None:
        callers = Callers(("a", "b weight=3", "c name=team weight=0.5", "d name=team weight=2"), POLICY)
        assert callers.shares == {parse_line("b", POLICY)[1].id: 3.0, "name:team": 2.0}

    @pytest.mark.parametrize(
        "attributes",
        [
            "nonsense",
            "Trusted",
            "trusted=no",
            "trusted trusted",
            "weight=0",
            "weight=-1",
            "weight=nan",
            "weight=10000",
            "share=2",
            "name=",
            "name=a/b",
            "name=" + "a" * 65,
            "name=a name=b",
            "priority=1",
            "priority=..",
            "priority=1..5",
            "priority=-5..-1",
            "priority=5..-5",
            "priority=a..b",
            "priority=-99999999..0",
        ],
    )
    def test_wrong_attributes(self, attributes: str) -> None:
        with pytest.raises(ConfigError, match="API key 7 is not of the form KEY") as caught:
            parse_line(f"sk-secret {attributes}", POLICY, number=7)
        assert "secret" not in caught.value.message

    def test_an_empty_line(self) -> None:
        with pytest.raises(ConfigError, match="API key 1"):
            Callers(("  ",), POLICY)

    def test_a_key_twice(self) -> None:
        Callers(("a name=x", "a  name=x"), POLICY)
        with pytest.raises(ConfigError, match="API key 3 stands in another line"):
            Callers(("b", "a", "a trusted"), POLICY)

    @pytest.mark.parametrize("bounds", [(1, 5), (-5, -1)])
    def test_the_default_priority_is_within_bounds(self, bounds: tuple[int, int]) -> None:
        with pytest.raises(ConfigError, match="min_priority"):
            Callers((), CallerPolicy(min_priority=bounds[0], max_priority=bounds[1]))


class TestClient:
    async def test_is_the_key(self, engine: FakeEngine) -> None:
        async with asking(engine, "a", "b", "c name=team", "d name=team", address="10.0.0.1") as client:
            seen = [await client_seen(engine, client, key(name)) for name in "abcda"]
        assert seen[0] == seen[4]
        assert len(set(seen)) == 3
        assert seen[2] == seen[3] == "name:team"
        assert not any("10.0.0.1" in who for who in seen)

    @pytest.mark.parametrize(
        ("address", "client"),
        [
            ("10.0.0.1", "address:10.0.0.1"),
            ("::ffff:10.0.0.1", "address:10.0.0.1"),
            ("2001:db8:1:2:3:4:5:6", "address:2001:db8:1:2::/64"),
            ("fe80::1%eth0", "address:fe80::/64"),
            ("", "address:unknown"),
        ],
    )
    async def test_is_the_address_without_keys(self, engine: FakeEngine, address: str, client: str) -> None:
        async with asking(engine, address=address) as http:
            assert await client_seen(engine, http) == client

    async def test_is_told_for_text_completions_and_all_prompts(self, engine: FakeEngine) -> None:
        async with asking(engine, "a name=me") as client:
            response = await client.post(COMPLETIONS, json=completion(["A", "B"], stream=True), headers=key("a"))
            assert response.status_code == 200
        assert [request.client for request in engine.submitted] == ["name:me"] * 2

    async def test_is_in_the_log_line(self, engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "jaxserve")
        async with asking(engine, "secret", "other name=me") as client:
            for name in ("secret", "other"):
                await client_seen(engine, client, key(name))
        clients = [record.__dict__["client"] for record in caplog.records if "client" in record.__dict__]
        assert [who.split(":")[0] for who in clients] == ["key", "name"]
        assert "secret" not in str([record.__dict__ for record in caplog.records if "client" in record.__dict__])


class TestTrust:
    async def test_a_fairness_header_counts_from_trusted_keys_only(self, engine: FakeEngine) -> None:
        named = {FAIRNESS_HEADER: "tenant-1"}
        async with asking(engine, "user", "router trusted", "other trusted") as client:
            plain = await client_seen(engine, client, key("user"))
            assert await client_seen(engine, client, key("user") | named) == plain
            router = await client_seen(engine, client, key("router"))
            first = await client_seen(engine, client, key("router") | named)
            second = await client_seen(engine, client, key("router") | {FAIRNESS_HEADER: "tenant-2"})
            assert await client_seen(engine, client, key("other") | named) == first
        assert len({plain, router, first, second}) == 4

    async def test_nobody_is_trusted_by_default(self, engine: FakeEngine) -> None:
        forged = {FAIRNESS_HEADER: "tenant", "X-Forwarded-For": "1.2.3.4", "Forwarded": "for=1.2.3.4"}
        async with asking(engine) as client:
            assert await client_seen(engine, client, forged) == "address:127.0.0.1"

    @pytest.mark.parametrize(
        ("peer", "forwarded", "client"),
        [
            ("10.0.0.1", "1.2.3.4", "1.2.3.4"),
            ("10.0.0.1", "6.6.6.6, 1.2.3.4, 10.0.0.2", "1.2.3.4"),
            ("10.0.0.1", "2001:db8:1:2::9", "2001:db8:1:2::/64"),
            ("10.0.0.1", "", "10.0.0.1"),
            ("10.0.0.1", "1.2.3.4, nonsense", "10.0.0.1"),
            ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.1"),
            ("11.0.0.1", "1.2.3.4", "11.0.0.1"),
        ],
    )
    async def test_trusted_proxies_tell_for_whom(
        self, engine: FakeEngine, peer: str, forwarded: str, client: str
    ) -> None:
        async with asking(engine, address=peer, trusted_proxies=("10.0.0.0/8",)) as http:
            assert await client_seen(engine, http, {"X-Forwarded-For": forwarded}) == f"address:{client}"

    async def test_a_fairness_header_counts_from_trusted_proxies(self, engine: FakeEngine) -> None:
        headers = {FAIRNESS_HEADER: "tenant", "X-Forwarded-For": "1.2.3.4"}
        async with asking(engine, address="10.0.0.1", trusted_proxies=("10.0.0.1",)) as client:
            assert (await client_seen(engine, client, headers)).startswith("client:")

    async def test_the_real_server_believes_no_header_either(self) -> None:
        engine = make_engine()
        async with live_server(make_app(engine), engine) as server, httpx.AsyncClient(base_url=server.url) as client:
            assert await client_seen(engine, client, {"X-Forwarded-For": "1.2.3.4"}) == "address:127.0.0.1"


class TestPriority:
    @pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
    async def test_is_bounded(self, client: httpx.AsyncClient, engine: FakeEngine, route: str) -> None:
        make = chat if route == CHAT else completion
        for priority in (-10, 10, 0, None):
            assert (await client.post(route, json=make(priority=priority))).status_code == 200
            assert engine.submitted[-1].priority == (priority or 0)
        num_submitted = len(engine.submitted)
        for priority in (-11, 11, -1_000_000, 10**30):
            response = await client.post(route, json=make(priority=priority))
            assert response.status_code == 400
            error = response.json()["error"]
            assert error["param"] == "priority"
            if abs(priority) < 2**63:
                assert "[-10, 10]" in error["message"]
        assert len(engine.submitted) == num_submitted

    async def test_the_server_and_keys_have_bounds_of_their_own(self, engine: FakeEngine) -> None:
        async with asking(engine, "user", "batch priority=0..1000", min_priority=-1, max_priority=2) as client:
            for name, priority, status in (
                ("user", -1, 200),
                ("user", -2, 400),
                ("user", 3, 400),
                ("batch", 1000, 200),
                ("batch", -1, 400),
            ):
                response = await client.post(CHAT, json=chat(priority=priority), headers=key(name))
                assert response.status_code == status
                if status == 400:
                    bounds = {"user": "[-1, 2]", "batch": "[0, 1000]"}[name]
                    assert bounds in response.json()["error"]["message"]


PROMPT = "what another user asked before"


class TestCachedPrefixes:
    """Over the engine's real prefix cache, whose pages hold four tokens."""

    @asynccontextmanager
    async def server(self, *keys: str, **policy: Any) -> AsyncIterator[httpx.AsyncClient]:
        engine = counting_engine(vocab_size=TOKENIZER.vocab_size)
        config = replace(CONFIG, api_keys=keys, callers=CallerPolicy(**policy))
        async with client_of(make_app(engine, config)) as client:
            yield client
        await engine.close()

    async def num_cached(self, client: httpx.AsyncClient, name: str, *, stream: bool = False, **fields: Any) -> int:
        """Prompt tokens that came from the cache, as the answer says."""
        body = completion(PROMPT, max_tokens=1, **fields)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        response = await client.post(COMPLETIONS, json=body, headers=key(name) if name else {})
        assert response.status_code == 200
        usage = events_of(response.text)[-1]["usage"] if stream else response.json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_several_keys_do_not_share(self, stream: bool) -> None:
        async with self.server("alice", "bob", "carol name=team", "dave name=team") as client:
            assert await self.num_cached(client, "alice", stream=stream) == 0
            assert await self.num_cached(client, "bob", stream=stream) == 0
            assert await self.num_cached(client, "alice", stream=stream) > 16
            assert await self.num_cached(client, "bob", cache_salt="x", stream=stream) == 0
            assert await self.num_cached(client, "bob", cache_salt="x", stream=stream) > 16
            assert await self.num_cached(client, "alice", cache_salt="x", stream=stream) == 0
            assert await self.num_cached(client, "carol", stream=stream) == 0
            assert await self.num_cached(client, "dave", stream=stream) > 16

    @pytest.mark.parametrize("keys", [(), ("alice",), ("alice", "alice")])
    async def test_one_key_or_none_has_the_salt_of_the_request(self, keys: tuple[str, ...]) -> None:
        name = keys[0] if keys else ""
        async with self.server(*keys) as client:
            assert await self.num_cached(client, name) == 0
            assert await self.num_cached(client, name, cache_salt="x") == 0
            assert await self.num_cached(client, name) > 16
            assert await self.num_cached(client, name, cache_salt="x") > 16

    async def test_keys_share_when_told_to(self) -> None:
        async with self.server("alice", "bob", share_prefix_cache=True) as client:
            assert await self.num_cached(client, "alice") == 0
            assert await self.num_cached(client, "bob") > 16
            assert await self.num_cached(client, "bob", cache_salt="x") == 0

    async def test_a_trusted_caller_has_applied_the_salt_already(self) -> None:
        """A router's users keep the salts it gave them, whichever router of the fleet they come through."""
        async with self.server("one trusted", "two trusted", "user") as client:
            assert await self.num_cached(client, "one", cache_salt="from the router") == 0
            assert await self.num_cached(client, "two", cache_salt="from the router") > 16
            assert await self.num_cached(client, "user", cache_salt="from the router") == 0
