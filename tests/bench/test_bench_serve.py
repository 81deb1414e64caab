"""Load on a stub server: loops, arrival, prompts, failures and their reasons."""

from __future__ import annotations

from typing import Any

import pytest
from openai_stub import Stub, serving

from jaxserve.bench.serve import Load, Plan, run_plan
from jaxserve.bench.workload import Shape
from jaxserve.core.errors import ConfigError, UnavailableError


def plan(stub: Stub, **fields: Any) -> Plan:
    settings: dict[str, Any] = {
        "url": stub.url,
        "endpoint": "completions",
        "model": None,
        "api_key": None,
        "shape": Shape(num_requests=6, input_tokens=5, output_tokens=4),
        "loads": (Load(concurrency=2),),
        "num_warmup": 0,
        "seed": 0,
        "temperature": 0.0,
        "ignore_eos": True,
        "prompt_kind": "auto",
        "timeout_s": 10.0,
        "objective_ms": {},
    }
    return Plan(**{**settings, **fields})


def quiet(what: str, num_done: int, num_total: int) -> None:
    pass


def test_what_is_sent() -> None:
    with serving(Stub()) as stub:
        run_plan(plan(stub, temperature=0.5), quiet)
    assert len(stub.bodies) == 6
    for body in stub.bodies:
        prompt = body.pop("prompt")
        assert len(prompt) == 5
        assert all(isinstance(token, int) for token in prompt)
        assert body == {
            "model": "stub-model",
            "max_tokens": 4,
            "temperature": 0.5,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }


def test_figures() -> None:
    seen: list[tuple[str, int, int]] = []
    with serving(Stub(delay_s=0.02)) as stub:
        [report] = run_plan(plan(stub), lambda *progress: seen.append(progress))
    assert (report.num_requests, report.num_failed) == (6, 0)
    assert (report.input_tokens, report.cached_tokens, report.output_tokens) == (30, 6, 24)
    assert report.latencies["ttft"].percentiles[50] >= 20
    assert report.latencies["tpot"].percentiles[50] >= 19
    assert report.latencies["e2e"].percentiles[50] >= 80
    assert report.duration_s >= 3 * 0.08
    assert seen == [("c=2", done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_closed_loop_keeps_its_number_in_flight(concurrency: int) -> None:
    with serving(Stub(delay_s=0.02)) as stub:
        run_plan(plan(stub, loads=(Load(concurrency=concurrency),)), quiet)
    assert stub.most_in_flight == concurrency


def test_an_open_loop_does_not_wait_for_answers() -> None:
    with serving(Stub(delay_s=0.1)) as stub:
        [report] = run_plan(plan(stub, loads=(Load(rate=200),)), quiet)
    assert stub.most_in_flight >= 4
    assert report.load == "200 req/s"
    assert report.num_failed == 0


def test_an_open_loop_sends_at_its_rate() -> None:
    with serving(Stub()) as stub:
        [report] = run_plan(plan(stub, loads=(Load(rate=20),)), quiet)
    assert 0.05 < report.duration_s < 5
    assert stub.most_in_flight <= 3


def test_runs_and_warm_up_have_prompts_of_their_own() -> None:
    with serving(Stub()) as stub:
        reports = run_plan(plan(stub, loads=(Load(concurrency=1), Load(concurrency=4)), num_warmup=2), quiet)
    assert [report.load for report in reports] == ["c=1", "c=4"]
    assert [report.num_requests for report in reports] == [6, 6]
    assert len(stub.bodies) == 2 * (2 + 6)
    assert len({tuple(body["prompt"]) for body in stub.bodies}) == 16


@pytest.mark.parametrize(
    ("stub", "kind", "is_text"),
    [
        (Stub(tokenize="llama.cpp"), "auto", False),
        (Stub(tokenize=None), "auto", True),
        (Stub(takes_ids=False), "auto", True),
        (Stub(), "text", True),
        (Stub(), "tokens", False),
    ],
)
def test_prompts_are_ids_where_the_server_takes_them(stub: Stub, kind: str, is_text: bool) -> None:
    with serving(stub):
        [report] = run_plan(plan(stub, prompt_kind=kind), quiet)
    assert all(isinstance(body["prompt"], str) == is_text for body in stub.bodies)
    assert report.input_tokens == 30


def test_chats_are_text() -> None:
    with serving(Stub()) as stub:
        [report] = run_plan(plan(stub, endpoint="chat"), quiet)
    assert (report.num_failed, report.output_tokens) == (0, 24)
    for body in stub.bodies:
        [message] = body["messages"]
        assert message["role"] == "user"
        assert len(message["content"].split(" ")) == 5


def test_chats_of_ids_are_refused() -> None:
    with pytest.raises(ConfigError, match="--prompt-kind"):
        run_plan(plan(Stub(), endpoint="chat", prompt_kind="tokens"), quiet)


@pytest.mark.parametrize("stub", [Stub(tokenize=None), Stub(takes_ids=False)])
def test_ids_that_the_server_does_not_take_are_refused(stub: Stub) -> None:
    with serving(stub), pytest.raises(ConfigError, match="--prompt-kind text"):
        run_plan(plan(stub, prompt_kind="tokens"), quiet)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("status", "HTTP 503: overloaded"),
        ("cut", "stream ended without a finish reason"),
        ("error", "error in stream: device lost"),
        ("garbage", "an event of the stream is not JSON"),
        ("short", "3 tokens instead of 4"),
    ],
)
def test_failures_are_counted_with_their_reason(fault: str, reason: str) -> None:
    with serving(Stub(fault=fault, fault_at=2)) as stub:
        [report] = run_plan(plan(stub), quiet)
    assert report.failures == {reason: 1}
    assert (report.num_requests, report.output_tokens) == (6, 20)


def test_a_slow_server_is_a_failure() -> None:
    with serving(Stub(delay_s=0.5)) as stub:
        [report] = run_plan(
            plan(stub, shape=Shape(num_requests=1, input_tokens=1, output_tokens=1), timeout_s=0.1), quiet
        )
    assert report.failures == {"ReadTimeout": 1}


def test_the_key_is_presented() -> None:
    with serving(Stub(api_key="secret")) as stub:
        [report] = run_plan(plan(stub, api_key="secret"), quiet)
    assert report.num_failed == 0


def test_a_wrong_key_fails_every_request() -> None:
    with serving(Stub(api_key="secret")) as stub:
        [report] = run_plan(plan(stub, api_key="wrong"), quiet)
    assert report.failures == {"HTTP 401: wrong key": 6}


def test_no_server() -> None:
    with pytest.raises(UnavailableError, match="does not answer"):
        run_plan(plan(Stub(url="http://127.0.0.1:9")), quiet)
