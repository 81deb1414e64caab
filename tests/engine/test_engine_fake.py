"""FakeEngine: the conformance suite, and the arithmetic it promises."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from engine_conformance import EngineConformance, collect, make_request, run, terminal, tokens, until_idle

from jaxserve.core.errors import InvalidRequestError, UnavailableError
from jaxserve.core.types import FinishReason, TokenLogprobs
from jaxserve.engine.api import EngineInfo
from jaxserve.engine.fake import FakeBehaviour, FakeEngine

INFO = EngineInfo(
    model="fake", max_model_len=128, vocab_size=100, page_size=16, num_pages=64, eos_token_ids=(2,), max_num_seqs=4
)


class TestFakeEngineConforms(EngineConformance):
    async def make_engine(self, *, max_num_waiting: int = 64) -> FakeEngine:
        return FakeEngine(INFO, behaviour=FakeBehaviour(max_num_waiting=max_num_waiting))

    async def make_endless_engine(self) -> FakeEngine:
        return FakeEngine(replace(INFO, max_model_len=1 << 40), behaviour=FakeBehaviour(step_delay_s=0.001))


async def test_counts_upwards_modulo_the_vocabulary() -> None:
    events = await run(FakeEngine(INFO), make_request(prompt=(5, 97), max_tokens=6))
    assert tokens(events) == [98, 99, 0, 1, 2, 3]


async def test_eos_ends_unless_ignored() -> None:
    engine = FakeEngine(INFO)
    events = await run(engine, make_request(prompt=(99,), ignore_eos=False))
    assert tokens(events) == [0, 1, 2]
    assert terminal(events).stop_token_id == 2
    events = await run(engine, make_request(prompt=(99,), ignore_eos=False, min_tokens=5))
    assert tokens(events)[:3] == [0, 1, 3]


async def test_given_function() -> None:
    def double(token_ids: Sequence[int]) -> int:
        return token_ids[-1] * 2 % 100

    assert tokens(await run(FakeEngine(INFO, next_token=double), make_request(prompt=(3,), max_tokens=4))) == [
        6, 12, 24, 48,
    ]  # fmt: skip


async def test_failing_function_fails_its_sequence_only() -> None:
    def picky(token_ids: Sequence[int]) -> int:
        if token_ids[-1] == 51:
            raise ValueError("51 it cannot stand")
        return token_ids[-1] + 1

    engine = FakeEngine(INFO, next_token=picky)
    bad, good = engine.stream(make_request("bad", prompt=(50,))), engine.stream(make_request("good", prompt=(60,)))
    bad_end, good_end = terminal(await collect(bad)), terminal(await collect(good))
    assert bad_end.finish_reason is FinishReason.ERROR
    assert bad_end.error == "A step failed: 51 it cannot stand"
    assert good_end.finish_reason is FinishReason.LENGTH


async def test_logprobs_by_hand() -> None:
    events = await run(FakeEngine(INFO), make_request(prompt=(8, 10, 9), max_tokens=1, logprobs=2, prompt_logprobs=1))
    assert events[0].logprobs == (TokenLogprobs(token_id=10, logprob=-1.0, rank=1, top=((10, -1.0), (11, -2.0))),)
    assert events[0].prompt_logprobs == (
        None,
        TokenLogprobs(token_id=10, logprob=-2.0, rank=2, top=((9, -1.0),)),
        TokenLogprobs(token_id=9, logprob=-99.0, rank=99, top=((11, -1.0),)),
    )


async def test_bad_words_of_several_tokens() -> None:
    events = await run(FakeEngine(INFO), make_request(prompt=(10,), bad_words=((11, 12),), max_tokens=3))
    assert tokens(events) == [11, 13, 14]


async def test_priority_goes_first() -> None:
    engine = FakeEngine(replace(INFO, max_num_seqs=1))
    order: list[str] = []

    async def watch(request_id: str, priority: int) -> None:
        await run(engine, replace(make_request(request_id, max_tokens=1), priority=priority))
        order.append(request_id)

    await asyncio.gather(watch("late", 5), watch("first", -5), watch("middle", 0))
    assert order == ["first", "middle", "late"]


async def test_error_after_tokens() -> None:
    engine = FakeEngine(INFO, behaviour=FakeBehaviour(error_after_tokens=3))
    events = await run(engine, make_request())
    assert len(tokens(events)) == 3
    assert terminal(events).finish_reason is FinishReason.ERROR
    assert terminal(events).error
    await until_idle(engine)


async def test_kill_fails_everything_for_good() -> None:
    engine = FakeEngine(INFO)
    stream = engine.stream(make_request(max_tokens=50))
    await anext(stream)
    engine.kill("The device is gone.")
    assert terminal(await collect(stream)).error == "The device is gone."
    assert not engine.health().alive
    with pytest.raises(UnavailableError, match="gone"):
        engine.stream(make_request("late"))


async def test_cached_tokens_are_reported_and_counted() -> None:
    engine = FakeEngine(INFO, behaviour=FakeBehaviour(num_cached_tokens=3))
    events = await run(engine, make_request(prompt=(1, 2, 3, 4, 5)))
    assert events[0].num_cached_tokens == 3
    stats = engine.stats()
    assert (stats.prefix_cache_queries_tokens, stats.prefix_cache_hits_tokens) == (5, 3)


async def test_duplicate_id_in_flight_is_refused() -> None:
    engine = FakeEngine(INFO)
    stream = engine.stream(make_request())
    with pytest.raises(InvalidRequestError):
        engine.stream(make_request())
    await collect(stream)


async def test_no_growth_over_many_requests() -> None:
    engine = FakeEngine(INFO)
    for i in range(300):
        await run(engine, make_request(f"r{i}", max_tokens=1))
    assert engine.stats().num_running == 0
    assert len(engine.submitted) <= 64
