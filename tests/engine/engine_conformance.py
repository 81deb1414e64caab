"""What every `Engine` must do; each implementation's tests derive from `EngineConformance`.

A subclass overrides `make_engine`. Only the `Engine` interface is used, and prompts of small token ids, so that any
engine with a vocabulary of at least 64 and a context of at least 64 tokens can take part.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol, runtime_checkable

import pytest

from jaxserve.core.errors import ContextLengthError, InvalidRequestError, QueueFullError, UnavailableError
from jaxserve.core.types import FinishReason, Request, SamplingParams, TokenEvent
from jaxserve.engine.api import Engine, Health

PROMPT = (10, 11, 12, 13)


@runtime_checkable
class Closable(Protocol):
    async def aclose(self) -> None: ...


def make_request(request_id: str = "r", *, prompt: tuple[int, ...] = PROMPT, n: int = 1, **sampling: Any) -> Request:
    params = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | sampling
    return Request(request_id=request_id, prompt=prompt, n=n, sampling=SamplingParams(**params))


async def collect(events: AsyncIterator[TokenEvent]) -> list[TokenEvent]:
    return [event async for event in events]


async def close(events: AsyncIterator[TokenEvent]) -> None:
    """Closes a stream early."""
    assert isinstance(events, Closable)
    await events.aclose()


async def run(engine: Engine, request: Request) -> list[TokenEvent]:
    return await asyncio.wait_for(collect(engine.stream(request)), 60)


def tokens(events: list[TokenEvent], index: int = 0) -> list[int]:
    return [token_id for event in events if event.index == index for token_id in event.token_ids]


def terminal(events: list[TokenEvent], index: int = 0) -> TokenEvent:
    """The one terminal event of a sequence, after checking that it is one and the last."""
    mine = [event for event in events if event.index == index]
    assert [event.finish_reason is not None for event in mine] == [False] * (len(mine) - 1) + [True]
    return mine[-1]


async def until_idle(engine: Engine) -> None:
    """Waits until no sequence waits or runs and no page is owned."""
    async with asyncio.timeout(30):
        while (stats := engine.stats()).num_waiting or stats.num_running or stats.kv_cache_usage:
            await asyncio.sleep(0.005)


class EngineConformance:
    """Override `make_engine`; the engines it makes are closed here."""

    async def make_engine(self, *, max_num_waiting: int = 64) -> Engine:
        """A fresh engine that is ready.

        Args:
            max_num_waiting: Bound of its queue.
        """
        raise NotImplementedError

    async def make_endless_engine(self) -> Engine:
        """A fresh engine on which a request without `max_tokens` does not end within hours.

        What gives requests up is tested with such requests: of any other nobody can say why it ended.
        """
        raise NotImplementedError

    @pytest.fixture
    async def endless(self) -> AsyncIterator[Engine]:
        engine = await self.make_endless_engine()
        yield engine
        await asyncio.wait_for(engine.close(), 30)

    @pytest.fixture
    async def engine(self) -> AsyncIterator[Engine]:
        engine = await self.make_engine()
        yield engine
        await engine.close()

    async def test_implements_protocol(self, engine: Engine) -> None:
        assert isinstance(engine, Engine)
        assert engine.health() == Health(alive=True, ready=True, reason="")
        assert engine.info.vocab_size >= 64
        assert engine.info.max_model_len >= 64

    async def test_max_tokens(self, engine: Engine) -> None:
        events = await run(engine, make_request(max_tokens=5))
        assert len(tokens(events)) == 5
        assert all(0 <= token_id < engine.info.vocab_size for token_id in tokens(events))
        assert terminal(events).finish_reason is FinishReason.LENGTH
        assert terminal(events).stop_token_id is None
        assert {event.request_id for event in events} == {"r"}

    async def test_first_event_tells_of_cache_and_times(self, engine: Engine) -> None:
        events = await run(engine, make_request())
        first, *rest = events
        assert first.num_cached_tokens is not None
        assert 0 <= first.num_cached_tokens < len(PROMPT)
        assert first.queue_s is not None
        assert first.queue_s >= 0
        assert first.prefill_s is not None
        assert first.prefill_s >= 0
        assert all(event.queue_s is None and event.num_cached_tokens is None for event in rest)

    async def test_no_max_tokens_fills_context(self, engine: Engine) -> None:
        prompt = tuple(i % 64 for i in range(engine.info.max_model_len - 3))
        events = await run(engine, make_request(prompt=prompt, max_tokens=None))
        assert len(tokens(events)) == 3
        assert terminal(events).finish_reason is FinishReason.LENGTH

    async def test_greedy_is_reproducible(self, engine: Engine) -> None:
        first = await run(engine, make_request("a"))
        assert tokens(await run(engine, make_request("b"))) == tokens(first)

    async def test_stop_token(self, engine: Engine) -> None:
        free = tokens(await run(engine, make_request("a")))
        stop = free[3]
        events = await run(engine, make_request("b", stop_token_ids=(stop,)))
        assert tokens(events) == free[: free.index(stop) + 1]
        assert terminal(events).finish_reason is FinishReason.STOP
        assert terminal(events).stop_token_id == stop

    async def test_min_tokens_delays_stop_token(self, engine: Engine) -> None:
        first = tokens(await run(engine, make_request("a")))[0]
        events = await run(engine, make_request("b", stop_token_ids=(first,), min_tokens=4))
        assert len(tokens(events)) >= 4
        assert first not in tokens(events)[:4]

    async def test_allowed_token_ids(self, engine: Engine) -> None:
        events = await run(engine, make_request(allowed_token_ids=(7, 9)))
        assert set(tokens(events)) <= {7, 9}

    async def test_logit_bias_forces_token(self, engine: Engine) -> None:
        events = await run(engine, make_request(logit_bias={33: 100.0}, max_tokens=1, allowed_token_ids=(32, 33)))
        assert tokens(events) == [33]

    async def test_bad_words(self, engine: Engine) -> None:
        free = tokens(await run(engine, make_request("a")))
        events = await run(engine, make_request("b", bad_words=((free[0],),)))
        assert free[0] not in tokens(events)

    async def test_n_sequences(self, engine: Engine) -> None:
        events = await run(engine, make_request(n=3))
        alone = tokens(await run(engine, make_request("alone")))
        for index in range(3):
            assert tokens(events, index) == alone
            assert terminal(events, index).finish_reason is FinishReason.LENGTH

    async def test_logprobs(self, engine: Engine) -> None:
        events = await run(engine, make_request(logprobs=3))
        for event in events:
            assert event.logprobs is not None
            assert [entry.token_id for entry in event.logprobs] == list(event.token_ids)
            for entry in event.logprobs:
                assert len(entry.top) == 3
                assert entry.top[0][0] == entry.token_id
                assert entry.top[0][1] == pytest.approx(entry.logprob, abs=1e-4)
                assert [value for _, value in entry.top] == sorted((v for _, v in entry.top), reverse=True)
                assert entry.logprob <= 0
                assert entry.rank == 1

    async def test_logprobs_of_sampled_token_only(self, engine: Engine) -> None:
        events = await run(engine, make_request(logprobs=0))
        assert all(entry.top == () for event in events for entry in event.logprobs or ())
        assert all(event.logprobs for event in events if event.token_ids)
        assert all(event.logprobs is None for event in await run(engine, make_request("none")))

    async def test_prompt_logprobs(self, engine: Engine) -> None:
        first, *rest = await run(engine, make_request(prompt_logprobs=2))
        assert first.prompt_logprobs is not None
        head, *entries = first.prompt_logprobs
        assert head is None
        assert [entry.token_id for entry in entries if entry is not None] == list(PROMPT[1:])
        assert all(entry is not None and len(entry.top) == 2 for entry in entries)
        assert all(event.prompt_logprobs is None for event in rest)

    async def test_many_at_once(self, engine: Engine) -> None:
        num_requests = 3 * engine.info.max_num_seqs
        alone = tokens(await run(engine, make_request("alone")))
        streams = [engine.stream(make_request(f"r{i}")) for i in range(num_requests)]
        results = await asyncio.wait_for(asyncio.gather(*(collect(stream) for stream in streams)), 120)
        for events in results:
            assert tokens(events) == alone
            assert terminal(events).finish_reason is FinishReason.LENGTH
        await until_idle(engine)

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"prompt": ()}, "prompt"),
            ({"prompt": (-1,)}, "prompt"),
            ({"prompt": (1 << 30,)}, "prompt"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"n": 0}, "n"),
        ],
    )
    async def test_invalid_requests_raise_at_the_call(self, engine: Engine, change: dict[str, Any], param: str) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            engine.stream(make_request(**change))
        assert caught.value.param == param
        assert len(tokens(await run(engine, make_request()))) == 8

    async def test_too_long_raises_at_the_call(self, engine: Engine) -> None:
        too_long = tuple(i % 64 for i in range(engine.info.max_model_len + 1))
        with pytest.raises(ContextLengthError):
            engine.stream(make_request(prompt=too_long))
        with pytest.raises(ContextLengthError):
            engine.stream(make_request(max_tokens=engine.info.max_model_len))

    async def test_queue_bound(self) -> None:
        engine = await self.make_engine(max_num_waiting=2)
        streams: list[AsyncIterator[TokenEvent]] = []

        def submit_many() -> None:
            for i in range(engine.info.max_num_seqs + 50):
                streams.append(engine.stream(make_request(f"r{i}")))

        with pytest.raises(QueueFullError) as caught:
            submit_many()
        assert caught.value.retry_after_s >= 1
        assert caught.value.capacity == engine.info.max_num_seqs + 2
        assert len(streams) >= engine.info.max_num_seqs + 2
        with pytest.raises(InvalidRequestError) as refused:
            engine.stream(make_request("n", n=engine.info.max_num_seqs + 3))
        assert refused.value.param == "n"
        for stream in streams:
            assert terminal(await collect(stream)).finish_reason is FinishReason.LENGTH
        await until_idle(engine)
        await engine.close()

    async def test_abort_ends_every_sequence_once(self, endless: Engine) -> None:
        stream = endless.stream(make_request(n=2, max_tokens=None))
        events = [await anext(stream)]
        endless.abort("r")
        events += await asyncio.wait_for(collect(stream), 30)
        assert [terminal(events, index).finish_reason for index in range(2)] == [FinishReason.ABORT] * 2
        await until_idle(endless)

    async def test_abort_before_the_first_step(self, endless: Engine) -> None:
        stream = endless.stream(make_request(max_tokens=None))
        endless.abort("r")
        assert terminal(await asyncio.wait_for(collect(stream), 30)).finish_reason is FinishReason.ABORT
        await until_idle(endless)

    async def test_abort_ends_that_request_alone(self, endless: Engine) -> None:
        kept, given_up = (endless.stream(make_request(name, max_tokens=None)) for name in ("kept", "given up"))
        await anext(given_up)
        endless.abort("given up")
        assert terminal(await asyncio.wait_for(collect(given_up), 30)).finish_reason is FinishReason.ABORT
        for _ in range(50):
            assert (await asyncio.wait_for(anext(kept), 30)).finish_reason is None
        await close(kept)
        await until_idle(endless)

    async def test_abort_of_unknown_or_finished_is_ignored(self, engine: Engine) -> None:
        engine.abort("nobody")
        events = await run(engine, make_request())
        engine.abort("r")
        assert terminal(events).finish_reason is FinishReason.LENGTH

    async def test_aclose_aborts(self, endless: Engine) -> None:
        stream = endless.stream(make_request(n=2, max_tokens=None))
        await anext(stream)
        await close(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await until_idle(endless)
        num_steps = endless.stats().num_steps
        assert len(tokens(await run(endless, make_request()))) == 8
        assert endless.stats().num_steps - num_steps <= 8 + 2, "something else was computed beside the last request"

    async def test_aclose_of_an_unread_stream_aborts(self, endless: Engine) -> None:
        stream = endless.stream(make_request(max_tokens=None))
        await close(stream)
        await until_idle(endless)
        assert len(tokens(await run(endless, make_request()))) == 8

    async def test_aclose_twice_and_after_the_end(self, endless: Engine) -> None:
        ended = endless.stream(make_request("ended"))
        await collect(ended)
        other = endless.stream(make_request("ended", max_tokens=None))
        await close(ended)
        await close(ended)
        assert (await asyncio.wait_for(anext(other), 30)).finish_reason is None
        await close(other)
        await close(other)
        await until_idle(endless)

    async def test_aclose_gives_slots_to_those_who_wait(self, endless: Engine) -> None:
        """As many times the slots as there are, all at once and none of an end: each runs once others are closed."""
        num_slots = endless.info.max_num_seqs
        streams = [endless.stream(make_request(f"r{i}", max_tokens=None)) for i in range(3 * num_slots)]
        unread = streams.pop()
        await close(unread)
        for stream in streams:
            await asyncio.wait_for(anext(stream), 30)
            assert endless.stats().num_running <= num_slots
            await close(stream)
        await until_idle(endless)

    async def test_cancelled_reader_leaves_nothing_once_closed(self, endless: Engine) -> None:
        stream = endless.stream(make_request(max_tokens=None))
        reader = asyncio.create_task(collect(stream))
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await close(stream)
        await until_idle(endless)

    async def test_id_can_be_used_again(self, engine: Engine) -> None:
        assert tokens(await run(engine, make_request())) == tokens(await run(engine, make_request()))

    async def test_drain_finishes_what_runs(self) -> None:
        engine = await self.make_engine()
        stream = engine.stream(make_request())
        draining = asyncio.create_task(engine.drain(30.0))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError):
            engine.stream(make_request("late"))
        assert not engine.health().ready
        assert engine.health().alive
        assert terminal(await collect(stream)).finish_reason is FinishReason.LENGTH
        assert await draining is True
        await engine.close()

    @pytest.mark.parametrize("deadline_s", [0.0, 0.05])
    async def test_drain_aborts_past_the_deadline(self, endless: Engine, deadline_s: float) -> None:
        streams = [endless.stream(make_request(f"r{i}", max_tokens=None)) for i in range(endless.info.max_num_seqs + 1)]
        assert await asyncio.wait_for(endless.drain(deadline_s), 30) is False
        for stream in streams:
            assert terminal(await asyncio.wait_for(collect(stream), 30)).finish_reason is FinishReason.ABORT
        await until_idle(endless)

    async def test_close_ends_streams_and_is_idempotent(self, endless: Engine) -> None:
        streams = [endless.stream(make_request(f"r{i}", max_tokens=None)) for i in range(endless.info.max_num_seqs + 1)]
        await asyncio.wait_for(endless.close(), 30)
        await endless.close()
        for stream in streams:
            assert terminal(await asyncio.wait_for(collect(stream), 30)).finish_reason is FinishReason.ABORT
        assert not endless.health().ready
        with pytest.raises(UnavailableError):
            endless.stream(make_request("late"))

    async def test_stats_count_steps_and_load(self, engine: Engine) -> None:
        before = engine.stats()
        stream = engine.stream(make_request())
        assert engine.stats().num_waiting + engine.stats().num_running >= 1
        await collect(stream)
        await until_idle(engine)
        after = engine.stats()
        assert after.num_steps > before.num_steps
        assert after.prefix_cache_queries_tokens >= before.prefix_cache_queries_tokens
        assert after.prefix_cache_hits_tokens <= after.prefix_cache_queries_tokens
        assert after.num_compiles_after_ready == 0
