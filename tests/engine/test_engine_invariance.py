"""A seeded request gives the same tokens however it is scheduled, on whatever mesh and backend."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from invariance import Results
from invariance import assert_same as assert_same_results
from invariance import run as run_requests
from tiny_engine import EOS, SMALL, SPEC, Compiled, compiled, generate_all, on_mesh, serving, start, tokens_by_index

from jaxserve.core.types import Request, SamplingParams
from jaxserve.engine.api import EngineStats
from jaxserve.models.layers.attention import Placement
from jaxserve.sharding.rules import kv_repeat

PARAMETERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "frequency_penalty": 0.7, "presence_penalty": 0.3},
    {"temperature": 0.0, "bad_words": ((11,), (126, 166), (40, 126, 72))},
    {"temperature": 0.0, "min_tokens": 12, "ignore_eos": False, "logit_bias": {EOS: 4.0}},
    {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 0},
    {"temperature": 0.0, "allowed_token_ids": tuple(range(40, 80))},
    {"temperature": 1.0},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "min_p": 0.05, "logprobs": 5},
    {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": -0.4},
    {"temperature": 0.8, "logit_bias": {7: 3.0, 9: 2.5, 11: -100.0}},
    {"temperature": 1.0, "min_tokens": 8, "stop_token_ids": tuple(range(100, 140)), "ignore_eos": False},
    {"temperature": 1.0, "bad_words": ((7,), (9, 11)), "n": 2},
    {"temperature": 1.5, "top_k": 5, "prompt_logprobs": 1},
    {"temperature": 1.0, "frequency_penalty": 2.0, "logit_bias": {5: 6.0}, "n": 2, "logprobs": 1},
)


def requests() -> list[Request]:
    """Twenty; every other prompt begins like the one before it."""
    made = []
    for number, given in enumerate(PARAMETERS):
        length = 6 + 13 * (number * 7 % 20) // 4
        prompt = tuple(10 + (number // 2 * 31 + place * 7) % 250 for place in range(length))
        fields = {"seed": 1000 + number, "max_tokens": 24, "ignore_eos": True, **given}
        n = fields.pop("n", 1)
        made.append(Request(request_id=f"r{number}", prompt=prompt, n=n, sampling=SamplingParams(**fields)))
    return made


def run(model: Compiled, **how: Any) -> tuple[Results, EngineStats]:
    return run_requests(model, requests(), **how)


def assert_same(results: Results, expected: Results) -> None:
    assert_same_results(requests(), results, expected)


@pytest.fixture(scope="module")
def tiny() -> Compiled:
    return compiled()


@pytest.fixture(scope="module")
def alone(tiny: Compiled) -> Results:
    """Each request by itself, nothing cached, on one device."""
    results, stats = run(tiny, concurrently=False, enable_prefix_caching=False)
    assert (stats.num_preemptions, stats.prefix_cache_hits_tokens) == (0, 0)
    return results


def test_requests_are_of_every_kind(alone: Results) -> None:
    assert len(alone) == 20
    assert len({tuple(tokens) for events in alone for tokens in tokens_by_index(events).values()}) == 24
    reasons = [event.finish_reason for events in alone for event in events if event.finish_reason]
    assert sorted(set(reasons)) == ["length", "stop"]


def test_batched(tiny: Compiled, alone: Results) -> None:
    results, stats = run(tiny, enable_prefix_caching=False)
    assert_same(results, alone)
    assert stats.num_steps < sum(len(events) for events in alone) / 4


def test_layers_apart(tiny: Compiled, alone: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs: each layer's parameters are arrays of their own."""
    monkeypatch.setattr(Placement, "layers_apart", True)
    apart = compiled.__wrapped__()
    held = apart.replica.abstract_params()
    stacked = tiny.replica.abstract_params()["layers.mlp.down.kernel"]
    assert [each.shape for each in held["layers.mlp.down.kernel"]] == [stacked.shape[1:]] * SPEC.num_layers
    assert held["embed.table"].shape == (SPEC.vocab_size, SPEC.hidden_size)
    results, _ = run(apart, enable_prefix_caching=False)
    assert_same(results, alone)


def test_in_another_order_of_arrival(tiny: Compiled, alone: Results) -> None:
    async def generate() -> Results:
        async with serving(start(tiny)) as engine:
            return await generate_all(engine, requests()[::-1])

    assert_same(asyncio.run(generate())[::-1], alone)


@pytest.mark.parametrize("budget", [3, 16])
def test_chunked(tiny: Compiled, alone: Results, budget: int) -> None:
    results, stats = run(tiny, max_num_batched_tokens=budget, max_num_seqs=min(budget, 16), enable_prefix_caching=False)
    assert_same(results, alone)
    assert stats.num_steps > sum(len(request.prompt) for request in requests()) / budget


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_preempted(tiny: Compiled, alone: Results, enable_prefix_caching: bool) -> None:
    results, stats = run(tiny, num_pages=30, enable_prefix_caching=enable_prefix_caching)
    assert_same(results, alone)
    assert stats.num_preemptions > 5


def test_preempted_and_chunked(tiny: Compiled, alone: Results) -> None:
    results, stats = run(tiny, num_pages=40, max_num_batched_tokens=16, long_prefill_token_threshold=5)
    assert_same(results, alone)
    assert stats.num_preemptions > 5


@pytest.mark.parametrize("concurrently", [True, False])
def test_prefix_cached(tiny: Compiled, alone: Results, concurrently: bool) -> None:
    results, stats = run(tiny, concurrently=concurrently, rounds=2)
    assert_same(results, alone)
    cached = [events[0].num_cached_tokens or 0 for events in results]
    # Of each prompt all whole pages but what the last token needs; prompt log-probabilities take a computed prompt.
    page = tiny.resolved.page_size
    assert cached == [
        0 if request.sampling.prompt_logprobs is not None else (len(request.prompt) - 1) // page * page
        for request in requests()
    ]
    assert stats.prefix_cache_hits_tokens >= sum(cached)


def test_salts_do_not_share(tiny: Compiled, alone: Results) -> None:
    async def generate() -> tuple[Results, EngineStats]:
        async with serving(start(tiny)) as engine:
            await generate_all(engine, requests()[:4], concurrently=False)
            before = engine.stats().prefix_cache_hits_tokens
            salted = [replace(request, cache_salt=f"tenant {request.request_id}") for request in requests()[:4]]
            results = await generate_all(engine, salted, concurrently=False)
            assert engine.stats().prefix_cache_hits_tokens == before
            return results, engine.stats()

    results, _ = asyncio.run(generate())
    for given, wanted in zip(results, alone, strict=False):
        assert tokens_by_index(given) == tokens_by_index(wanted)


@pytest.mark.parametrize(
    ("tensor", "repeat", "split"),
    [
        pytest.param(2, 1, 2, id="kv heads divide"),
        pytest.param(4, 2, 4, id="kv heads are repeated"),
        pytest.param(3, 1, 1, id="heads do not divide"),
    ],
)
def test_on_a_mesh(alone: Results, tensor: int, repeat: int, split: int) -> None:
    model = compiled(config=on_mesh(SMALL, tensor=tensor))
    mesh, layout = model.replica.mesh, model.replica.layout
    assert mesh.size == tensor
    assert kv_repeat(SPEC.num_heads, SPEC.num_kv_heads, mesh) == repeat
    assert layout.num_kv_heads == SPEC.num_kv_heads * repeat
    assert layout.sharding(mesh).shard_shape(layout.shape)[2] == 2 * layout.num_kv_heads // split
    results, _ = run(model)
    assert_same(results, alone)


def test_with_the_reference_attention(alone: Results) -> None:
    """The plain oracle, which the efficient implementation must equal."""
    results, _ = run(compiled(config=replace(SMALL, attention="reference")))
    assert_same(results, alone)
