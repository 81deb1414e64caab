"""The real engine with a tiny model: the conformance suite, and what it reports beyond it."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import jax
import numpy as np
import pytest
from counting_engine import counting_engine
from engine_conformance import EngineConformance, make_request, run, terminal, tokens
from tiny_engine import EOS, SPEC, Compiled, compiled, generate_all, new_runner, serving, start

from jaxserve.core.types import FinishReason, Request, SamplingParams, TokenEvent
from jaxserve.engine.api import Engine
from jaxserve.engine.loop import LocalEngine
from jaxserve.engine.programs import programs

PROMPT = tuple(range(20, 61))


@pytest.fixture(scope="module")
def tiny() -> Compiled:
    return compiled()


class TestConformance(EngineConformance):
    async def make_engine(self, *, max_num_waiting: int = 64) -> Engine:
        return start(compiled(), max_waiting=max_num_waiting)

    async def make_endless_engine(self) -> Engine:
        return counting_engine()


async def test_all_64_bits_of_a_seed_count(tiny: Compiled) -> None:
    """Each bit gives other noise, the sign too; the seed -1 gives other noise each time."""
    seeds = [5, 5 - 2**63, 5 + 2**32, 5 + 2**62, -5, 4]

    async def drawn(engine: LocalEngine, seed: int | None) -> tuple[int, ...]:
        return tuple(tokens(await run(engine, make_request(temperature=1.0, seed=seed, max_tokens=16))))

    async with serving(start(tiny)) as engine:
        first, second = [[await drawn(engine, seed) for seed in seeds] for _ in range(2)]
        assert first == second
        assert len(set(first)) == len(seeds)
        assert len({await drawn(engine, -1) for _ in range(3)}) == 3


def test_programs_change_their_state_in_place(tiny: Compiled) -> None:
    """There is no room for a second pool: what a program is given and gives back new is the same memory."""

    def num_bytes(tree: object) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    aliased = {}
    for program in programs(tiny.replica):
        memory = tiny.executables[program.key].memory_analysis()
        aliased.setdefault(program.key[0], []).append(memory.alias_size_in_bytes)
    pool, state = (
        num_bytes(tiny.replica.layout.abstract(tiny.replica.mesh)),
        num_bytes(tiny.replica.abstract_sampling()),
    )
    for name, changed in (("decode", pool), ("copy_pages", pool), ("head", state), ("admit", state)):
        assert min(aliased[name]) >= changed, name


async def test_a_step_leaves_no_second_pool(tiny: Compiled) -> None:
    """By the addresses of the arrays before and after steps that write, copy pages, admit and sample."""
    runner = new_runner(tiny)
    before = [runner._kv_pages, *jax.tree.leaves(runner._sampling)]
    places = [array.unsafe_buffer_pointer() for array in before]
    async with serving(start(tiny, runner=runner)) as engine:
        # A prompt that ends within a page: its forks copy that page.
        events = await run(engine, make_request(prompt=PROMPT, n=3, temperature=1.0, seed=1))
        assert len(tokens(events, 2)) == 8
        assert all(array.is_deleted() for array in before)
        after = [runner._kv_pages, *jax.tree.leaves(runner._sampling)]
        assert [array.unsafe_buffer_pointer() for array in after] == places


def dense_logprobs(model: Compiled, token_ids: list[int]) -> np.ndarray:
    """Log-probabilities after every token, from a forward pass written with plain arrays."""
    spec, params = SPEC, {path: np.asarray(value, np.float64) for path, value in model.params.items()}
    half = spec.head_dim // 2
    position = np.arange(len(token_ids))
    angles = position[:, None] / spec.rope.theta ** (np.arange(half) / half)

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + spec.norm_eps) * scale

    def turn(x: np.ndarray) -> np.ndarray:
        first, second, cos, sin = x[..., :half], x[..., half:], np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def softmax(x: np.ndarray) -> np.ndarray:
        weights = np.exp(x - x.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    x = params["embed.table"][token_ids]
    for layer in range(spec.num_layers):
        weights = {path.removeprefix("layers."): value[layer] for path, value in params.items() if "layers." in path}
        qkv = np.einsum("td,dkgh->kgth", norm(x, weights["attn_norm.scale"]), weights["attn.qkv.kernel"])
        query, key, value = turn(qkv[:, :-2]), turn(qkv[:, -2]), qkv[:, -1]
        scores = np.einsum("kgth,ksh->kgts", query, key) / math.sqrt(spec.head_dim)
        scores[..., position[:, None] < position[None, :]] = -np.inf
        attended = np.einsum("kgts,ksh->kgth", softmax(scores), value)
        x = x + np.einsum("kgth,kghd->td", attended, weights["attn.out.kernel"])
        gate_up = np.einsum("td,dgf->gtf", norm(x, weights["mlp_norm.scale"]), weights["mlp.gate_up.kernel"])
        gate, up = gate_up
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights["mlp.down.kernel"]
    return np.log(softmax(norm(x, params["final_norm.scale"]) @ params["lm_head.table"].T))


async def test_logprobs_equal_a_dense_forward_pass(tiny: Compiled) -> None:
    """Of prompt and output, greedy and sampled, with the prompt cut into chunks and alternatives asked for."""
    sampling = SamplingParams(temperature=1.0, seed=5, max_tokens=12, logprobs=4, prompt_logprobs=3, ignore_eos=True)
    async with serving(start(tiny, max_num_batched_tokens=16)) as engine:
        events, greedy = await generate_all(
            engine,
            [
                Request(request_id="sampled", prompt=PROMPT, sampling=sampling),
                make_request("greedy", prompt=PROMPT[:7], logprobs=0, prompt_logprobs=0),
            ],
        )
    for prompt, given, num_prompt_top, num_top in ((PROMPT, events, 3, 4), (PROMPT[:7], greedy, 0, 0)):
        output = tokens(given)
        token_ids = [*prompt, *output]
        expected = dense_logprobs(tiny, token_ids)
        prompt_entries = given[0].prompt_logprobs
        assert prompt_entries is not None
        assert (prompt_entries[0], len(prompt_entries)) == (None, len(prompt))
        entries = [*prompt_entries[1:], *(entry for event in given for entry in event.logprobs or ())]
        assert len(entries) == len(token_ids) - 1
        for place, entry in enumerate(entries):
            row, token_id = expected[place], token_ids[place + 1]
            assert entry is not None
            assert entry.token_id == token_id
            assert entry.logprob == pytest.approx(row[token_id], abs=1e-4)
            assert entry.rank == 1 + np.sum(row > row[token_id] + 1e-9)
            wanted = num_prompt_top if place + 1 < len(prompt) else num_top
            best = np.argsort(-row)[:wanted]
            assert [i for i, _ in entry.top] == best.tolist()
            np.testing.assert_allclose([value for _, value in entry.top], row[best], atol=1e-4)
    # Tokens were drawn, not looked up: most are not the most likely one.
    assert any(entry.rank > 1 for event in events for entry in event.logprobs or ())
    assert all(entry.rank == 1 for event in greedy for entry in event.logprobs or ())


async def test_samples_follow_the_distribution(tiny: Compiled) -> None:
    """The first token of many seeds is as likely as the model says (chi-square over the likeliest tokens)."""
    num_draws, num_kept = 2000, 8
    sampling = SamplingParams(temperature=1.0, top_k=num_kept, max_tokens=1, logprobs=num_kept, ignore_eos=True, seed=1)
    async with serving(start(tiny, max_waiting=num_draws)) as engine:
        [events] = await generate_all(engine, [Request(request_id="r", prompt=PROMPT, sampling=sampling, n=num_draws)])
    counts: dict[int, int] = {}
    for event in events:
        counts[event.token_ids[0]] = counts.get(event.token_ids[0], 0) + 1
    assert events[0].logprobs is not None
    top = dict(events[0].logprobs[0].top)
    weights = np.exp(np.array(list(top.values())))
    expected = num_draws * weights / weights.sum()
    observed = np.array([counts.pop(token_id, 0) for token_id in top])
    assert counts == {}
    # 24.3 is the 99.9th percentile with 7 degrees of freedom.
    assert float(np.sum((observed - expected) ** 2 / expected)) < 24.3


async def test_sequences_of_a_request_differ_and_share_the_prompt(tiny: Compiled) -> None:
    request = Request(
        request_id="r", prompt=PROMPT, n=4, sampling=SamplingParams(max_tokens=8, seed=9, ignore_eos=True)
    )
    async with serving(start(tiny)) as engine:
        [events] = await generate_all(engine, [request])
        cached = engine.stats().prefix_cache_queries_tokens
    outputs = [tokens(events, index) for index in range(4)]
    assert len({tuple(output) for output in outputs}) == 4
    # The prompt was looked up once: the others were forked from the first.
    assert cached == len(PROMPT)


async def test_eos_ends_a_sequence_unless_ignored(tiny: Compiled) -> None:
    forced = {"logit_bias": {EOS: 100.0}, "max_tokens": 6}
    async with serving(start(tiny)) as engine:
        ended = await run(engine, make_request("a", ignore_eos=False, **forced))
        ignored = await run(engine, make_request("b", ignore_eos=True, **forced))
        delayed = await run(engine, make_request("c", ignore_eos=False, min_tokens=3, **forced))
    assert tokens(ended) == [EOS]
    assert terminal(ended).finish_reason is FinishReason.STOP
    assert terminal(ended).stop_token_id == EOS
    assert tokens(ignored) == [EOS] * 6
    assert len(tokens(delayed)) == 4
    assert tokens(delayed).index(EOS) == 3


async def test_priorities_decide_who_waits(tiny: Compiled) -> None:
    """With one slot, requests that wait run in order of priority, then of arrival."""
    ended: list[str] = []

    async def read(stream: AsyncIterator[TokenEvent]) -> None:
        async for event in stream:
            if event.finish_reason is not None:
                ended.append(event.request_id)

    async with serving(start(tiny, max_num_seqs=1)) as engine:
        running = engine.stream(make_request("running", prompt=PROMPT, max_tokens=80))
        await anext(running)
        waiting = [
            engine.stream(replace(make_request(name, prompt=PROMPT), priority=priority))
            for name, priority in (("late", 5), ("normal", 0), ("normal2", 0), ("urgent", -5))
        ]
        await asyncio.gather(*map(read, (running, *waiting)))
    assert ended == ["running", "urgent", "normal", "normal2", "late"]


def test_engine_is_used_from_several_event_loops(tiny: Compiled) -> None:
    """Each stream's events come in the loop that asked for it; a loop that is gone harms nobody."""
    engine = start(tiny)
    results: dict[int, list[int]] = {}

    async def ask(number: int) -> None:
        results[number] = tokens(await run(engine, make_request(f"r{number}")))

    async def leave() -> None:
        engine.stream(make_request("left", max_tokens=60))

    threads = [threading.Thread(target=asyncio.run, args=(ask(number),)) for number in range(3)]
    asyncio.run(leave())
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    engine.abort("left")
    asyncio.run(ask(3))
    asyncio.run(engine.close())
    assert len(results) == 4
    assert len({tuple(output) for output in results.values()}) == 1


async def test_close_gives_device_memory_back(tiny: Compiled) -> None:
    pool_shape = tiny.replica.layout.shape

    def num_pools() -> int:
        return sum(array.shape == pool_shape for array in jax.live_arrays())

    before = num_pools()
    engine = start(tiny, runner=new_runner(tiny))
    await run(engine, make_request())
    assert num_pools() == before + 1
    await engine.close()
    assert num_pools() == before
