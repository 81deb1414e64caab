"""Many random requests at once, with clients that leave: everything ends once, nothing leaks, nothing is compiled."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from engine_conformance import close, terminal, tokens, until_idle
from server_harness import CHAT, COMPLETIONS, live_server, make_app
from tiny_engine import EOS, SPEC, Compiled, check_books, compiled, counting, generate_all, serving, start

from jaxserve.core.types import FinishReason, Request, SamplingParams, TokenEvent
from jaxserve.engine.compile import CompileCounter
from jaxserve.engine.loop import LocalEngine

NUM_REQUESTS = 1000
IN_FLIGHT = 64
SEED = 20260


def random_request(rng: random.Random, number: int) -> Request:
    """Any request that is valid, parameters of all kinds mixed."""

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(4, SPEC.vocab_size) for _ in range(count))

    def maybe(chance: float, value: Any, otherwise: Any) -> Any:
        return value if rng.random() < chance else otherwise

    # Few beginnings, so that prefixes are shared.
    beginning = rng.randrange(4) * 50
    head = [(beginning + place * 3) % 250 + 4 for place in range(rng.choice((0, 8, 21, 40)))]
    prompt = (*head, *ids(rng.choice((1, 2, 7, 30))))
    max_tokens = rng.choice((1, 2, 5, 10, 30))
    allowed = maybe(0.1, ids(12), None)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=maybe(0.2, rng.randint(0, max_tokens), 0),
        temperature=maybe(0.4, 0.0, rng.choice((0.3, 1.0, 2.0))),
        top_k=maybe(0.3, rng.choice((1, 5, 100)), 0),
        top_p=maybe(0.3, rng.choice((0.1, 0.9)), 1.0),
        min_p=maybe(0.2, 0.1, 0.0),
        repetition_penalty=maybe(0.2, 1.3, 1.0),
        frequency_penalty=maybe(0.2, rng.uniform(-2, 2), 0.0),
        presence_penalty=maybe(0.2, rng.uniform(-2, 2), 0.0),
        logit_bias=maybe(0.2, dict.fromkeys(ids(5), 2.0), {}),
        allowed_token_ids=allowed,
        bad_words=() if allowed else maybe(0.2, (ids(1), ids(3)), ()),
        seed=rng.randrange(2**31),
        stop_token_ids=maybe(0.3, ids(30), ()),
        ignore_eos=rng.random() < 0.5,
        logprobs=maybe(0.2, rng.randint(0, 20), None),
        prompt_logprobs=maybe(0.1, rng.randint(0, 20), None),
    )
    return Request(
        request_id=f"r{number}",
        prompt=prompt,
        sampling=sampling,
        n=maybe(0.2, rng.randint(2, 4), 1),
        priority=maybe(0.2, rng.randint(-3, 3), 0),
        cache_salt=maybe(0.1, "tenant", ""),
        client=rng.choice(("", "a", "b", "c")),
    )


async def read_some(stream: AsyncIterator[TokenEvent], count: int) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    async for event in stream:
        events.append(event)
        if len(events) == count:
            break
    return events


async def one_client(engine: LocalEngine, rng: random.Random, request: Request, outcomes: Counter[str]) -> Any:
    """Sends a request and reads it, or leaves in one of the ways clients do; the events if they were all read."""
    stream = engine.stream(request)
    kind = rng.choices(("reads", "leaves", "never reads", "aborts", "cancelled"), (60, 15, 5, 10, 10))[0]
    count = rng.randint(1, 12)
    if kind == "cancelled":
        reader = asyncio.create_task(read_some(stream, 10**6))
        await asyncio.sleep(rng.random() * 0.05)
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
        await close(stream)
    elif kind == "never reads":
        await asyncio.sleep(rng.random() * 0.02)
        await close(stream)
    elif kind == "leaves":
        await read_some(stream, count)
        await close(stream)
    else:
        events = await read_some(stream, count if kind == "aborts" else 10**6)
        if kind == "aborts":
            engine.abort(request.request_id)
            events += await read_some(stream, 10**6)
        check_answer(request, events)
        if all(terminal(events, index).finish_reason is not FinishReason.ABORT for index in range(request.n)):
            outcomes["complete"] += 1
            return events
    outcomes[kind] += 1
    return None


def check_answer(request: Request, events: list[TokenEvent]) -> None:
    """Every sequence ends once, for the reason it says, with the tokens it was asked for."""
    sampling = request.sampling
    for index in range(request.n):
        end, output = terminal(events, index), tokens(events, index)
        stops = {*sampling.stop_token_ids} | (set() if sampling.ignore_eos else {EOS})
        assert sampling.max_tokens is not None
        assert not stops.intersection(output[sampling.min_tokens : -1])
        match end.finish_reason:
            case FinishReason.LENGTH:
                assert len(output) == sampling.max_tokens
            case FinishReason.STOP:
                assert output[-1] == end.stop_token_id
                assert output[-1] in stops
                assert len(output) >= max(1, sampling.min_tokens)
            case _:
                assert end.finish_reason is FinishReason.ABORT
                assert len(output) < sampling.max_tokens
        if sampling.allowed_token_ids is not None:
            assert set(output) <= set(sampling.allowed_token_ids)
        assert all(
            (event.logprobs is not None) == (sampling.logprobs is not None) for event in events if event.token_ids
        )


async def audit(engine: LocalEngine) -> None:
    """Looks into the books while the engine works."""
    while True:
        with engine._work:
            engine._scheduler.check_integrity()
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def tiny() -> Compiled:
    return compiled()


async def test_engine_with_clients_that_leave(tiny: Compiled) -> None:
    rng = random.Random(SEED)
    requests = [random_request(rng, number) for number in range(NUM_REQUESTS)]
    outcomes: Counter[str] = Counter()
    free = asyncio.Semaphore(IN_FLIGHT)
    peak = 0

    async def client(engine: LocalEngine, request: Request) -> list[TokenEvent] | None:
        nonlocal peak
        async with free:
            peak = max(peak, engine.stats().num_running)
            events: list[TokenEvent] | None = await one_client(engine, rng, request, outcomes)
            return events

    counter = CompileCounter()
    # A pool far smaller than what the slots would fill: sequences are preempted all the time.
    engine_of_few_pages = start(tiny, counter=counter, num_pages=60)
    with counting(counter):
        async with serving(engine_of_few_pages) as engine:
            auditing = asyncio.create_task(audit(engine))
            async with asyncio.timeout(120):
                results = await asyncio.gather(*(client(engine, request) for request in requests))
                await until_idle(engine)
            auditing.cancel()
            stats = engine.stats()
            assert engine.health().ready
            await asyncio.to_thread(check_books, engine)
    assert outcomes.total() == NUM_REQUESTS
    assert min(outcomes.values()) > 20, outcomes
    assert outcomes["complete"] > NUM_REQUESTS // 2
    assert peak > 8
    assert stats.num_preemptions > 10
    assert stats.prefix_cache_hits_tokens > 0
    assert (counter.count, stats.num_compiles_after_ready) == (0, 0)
    # Whoever stayed got what he would have got alone.
    picked = [(q, events) for q, events in zip(requests, results, strict=True) if events][::10]
    async with serving(start(tiny, enable_prefix_caching=False)) as engine:
        for request, events in picked:
            [again] = await generate_all(engine, [request])
            for index in range(request.n):
                assert tokens(events, index) == tokens(again, index), request


def random_body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    text = "".join(rng.choice("abcdefgh ") for _ in range(rng.choice((1, 5, 20, 40))))
    fields: dict[str, Any] = {
        "model": "fake",
        "max_tokens": rng.choice((1, 4, 12, 30)),
        "temperature": rng.choice((0, 1)),
        "n": rng.choice((1, 1, 2)),
        "stream": rng.random() < 0.5,
        "seed": rng.randrange(1000),
    }
    fields |= rng.choice(({}, {"stop": ["a", "bc"]}, {"logit_bias": {"7": 5}}, {"top_k": 7, "ignore_eos": True}))
    if rng.random() < 0.5:
        return CHAT, {**fields, "messages": [{"role": "user", "content": text}], **rng.choice(({}, {"logprobs": True}))}
    prompts = rng.choice((text, [text, text[:3]], [10, 11, 12], [[20, 21], [22]]))
    return COMPLETIONS, {**fields, "prompt": prompts, **rng.choice(({}, {"logprobs": 3}))}


async def test_server_with_clients_that_leave(tiny: Compiled) -> None:
    rng = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    free = asyncio.Semaphore(32)

    async def client(http: httpx.AsyncClient) -> None:
        path, body = random_body(rng)
        leaves_after = rng.choice((None, None, 0, 2))
        async with free, http.stream("POST", path, json=body) as response:
            assert response.status_code == 200, (await response.aread(), body)
            if leaves_after is not None and body["stream"]:
                async for _ in response.aiter_lines():
                    leaves_after -= 1
                    if leaves_after < 0:
                        break
                outcomes["left"] += 1
                return
            answer = (await response.aread()).decode()
        if body["stream"]:
            assert answer.endswith("data: [DONE]\n\n")
            assert "error" not in answer
        else:
            assert all(choice["finish_reason"] in {"stop", "length"} for choice in json.loads(answer)["choices"])
        outcomes["stayed"] += 1

    async def impatient(http: httpx.AsyncClient) -> None:
        """Does not wait for the whole answer."""
        body = {"model": "fake", "prompt": "abc", "max_tokens": 100, "ignore_eos": True, "n": 4}
        async with free:
            with contextlib.suppress(httpx.TimeoutException):
                await http.post(COMPLETIONS, json=body, timeout=rng.random() * 0.1)
        outcomes["impatient"] += 1

    counter = CompileCounter()
    crowded = start(tiny, counter=counter, num_pages=150)
    with counting(counter):
        async with serving(crowded) as engine:
            async with (
                live_server(make_app(engine), engine) as server,
                httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=64)) as http,
                asyncio.timeout(120),
            ):
                await asyncio.gather(*(impatient(http) if i % 10 == 0 else client(http) for i in range(300)))
                await until_idle(engine)
                assert (await http.get("/ready")).status_code == 200
                metrics = (await http.get("/metrics")).text
            assert 'jaxserve_compiles_after_ready_total{model_name="fake"} 0.0' in metrics
            assert 'vllm:num_requests_running{model_name="fake"} 0.0' in metrics
            assert 'vllm:kv_cache_usage_perc{model_name="fake"} 0.0' in metrics
    assert outcomes["impatient"] == 30
    assert outcomes["left"] > 30
    assert outcomes["stayed"] > 100
    assert counter.count == 0
