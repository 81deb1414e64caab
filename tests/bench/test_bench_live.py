"""The benchmark against the real app, with an engine whose figures can be worked out by hand."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from server_harness import INFO, TOKENIZER, live_server, make_app

from jaxserve.bench.report import Report
from jaxserve.bench.serve import Load, Plan, run_plan
from jaxserve.bench.workload import Shape
from jaxserve.engine.fake import FakeBehaviour, FakeEngine

SHAPE = Shape(num_requests=6, input_tokens=32, output_tokens=8)


async def reports_of(engine: FakeEngine, **fields: Any) -> Report:
    """The report of a run against the app with this engine."""
    settings: dict[str, Any] = {
        "endpoint": "completions",
        "model": None,
        "api_key": None,
        "shape": SHAPE,
        "loads": (Load(concurrency=3),),
        "num_warmup": 0,
        "seed": 0,
        "temperature": 0.0,
        "ignore_eos": True,
        "prompt_kind": "auto",
        "timeout_s": 10.0,
        "objective_ms": {},
    }
    async with live_server(make_app(engine), engine) as server:
        plan = Plan(url=server.url, **{**settings, **fields})
        [report] = await asyncio.to_thread(run_plan, plan, lambda *_: None)
    return report


async def test_completions_of_token_ids() -> None:
    engine = FakeEngine(INFO, behaviour=FakeBehaviour(num_cached_tokens=10))
    report = await reports_of(engine)
    assert (report.num_requests, report.num_failed) == (6, 0)
    assert (report.input_tokens, report.cached_tokens, report.output_tokens) == (6 * 32, 6 * 10, 6 * 8)
    requests = [request for request in engine.submitted if request.sampling.max_tokens == 8]
    assert {len(request.prompt) for request in requests} == {32}
    assert all(request.sampling.ignore_eos for request in requests)
    assert report.rates["total_tokens_per_s"] == pytest.approx(6 * 40 / report.duration_s)
    assert report.client_cpu_s > 0


async def test_chats() -> None:
    engine = FakeEngine(INFO, behaviour=FakeBehaviour(start_delay_s=0.2, step_delay_s=0.01))
    shape = Shape(num_requests=2, input_tokens=4, output_tokens=8)
    report = await reports_of(engine, endpoint="chat", shape=shape, loads=(Load(concurrency=2),))
    assert (report.num_failed, report.output_tokens) == (0, 16)
    assert report.input_tokens == sum(len(request.prompt) for request in engine.submitted)
    texts = [TOKENIZER.decode(request.prompt, skip_special_tokens=False) for request in engine.submitted]
    assert all(text.startswith("<|user|>") and len(text.split(" ")) == 4 for text in texts)
    # The chunk that names the role goes out before the engine starts; it is not the first token.
    assert report.latencies["ttft"].mean >= 200
    assert report.latencies["tpot"].mean >= 9


async def test_requests_that_cannot_be_served() -> None:
    report = await reports_of(FakeEngine(INFO), shape=replace(SHAPE, input_tokens=300))
    assert (report.num_failed, report.output_tokens) == (6, 0)
    [reason] = report.failures
    assert reason.startswith("HTTP 400: ")


async def test_errors_in_the_middle_of_answers() -> None:
    report = await reports_of(FakeEngine(INFO, behaviour=FakeBehaviour(error_after_tokens=2)))
    [(reason, count)] = report.failures.items()
    assert reason.startswith("error in stream: ")
    assert count == 6


async def test_load_that_the_queue_refuses() -> None:
    """All arrive before the engine runs any; one has a slot and one may wait."""
    engine = FakeEngine(replace(INFO, max_num_seqs=1), behaviour=FakeBehaviour(start_delay_s=0.5, max_num_waiting=1))
    report = await reports_of(engine, loads=(Load(rate=1e6),), prompt_kind="text", shape=replace(SHAPE, input_tokens=8))
    [(reason, count)] = report.failures.items()
    assert reason.startswith("HTTP 429: ")
    assert (count, report.output_tokens) == (4, 2 * 8)


async def test_goodput() -> None:
    """One slot: the second request waits for the four steps of the first."""
    engine = FakeEngine(replace(INFO, max_num_seqs=1), behaviour=FakeBehaviour(step_delay_s=0.15))
    shape = Shape(num_requests=2, input_tokens=8, output_tokens=4)
    loads = (Load(concurrency=2),)
    report = await reports_of(engine, shape=shape, loads=loads, prompt_kind="text", objective_ms={"ttft": 450})
    assert report.num_good == 1
    assert report.rates["goodput_per_s"] == pytest.approx(1 / report.duration_s)
    assert report.rates["requests_per_s"] == pytest.approx(2 / report.duration_s)
    assert report.latencies["e2e"].percentiles[50] == pytest.approx(report.latencies["e2e"].mean)
