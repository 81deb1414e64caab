"""The demo model served by a real process: `openai` client, metrics, bad requests, disconnects, SIGTERM, a restart."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from serve_process import ServeProcess, serving

from jaxserve.checkpoint.sources import resolve_source

MODEL = "smollm2-135m"
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
SIZES = ("--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--max-model-len", "512", "--num-pages", "128")
METRICS = {
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:lora_requests_info",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:request_success_total",
    "vllm:num_preemptions_total",
    "jaxserve_compiles_after_ready_total",
}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "jaxserve_step_seconds",
    "jaxserve_step_host_seconds",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A cache folder that holds the model and no program."""
    resolve_source(MODEL, cache_dir=cache_dir)
    made = tmp_path_factory.mktemp("cache")
    (made / "pypi").symlink_to(cache_dir / "pypi")
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServeProcess]:
    """The first start."""
    with serving(folder / "first.log", MODEL, "--cache-dir", str(folder), *SIZES) as server:
        # It listens while programs compile.
        server.wait_for("/health", 200, timeout_s=60)
        server.wait_for("/ready", 200, timeout_s=180)
        yield server


@pytest.fixture
def client(server: ServeProcess) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def client_of(server: ServeProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI) -> list[str]:
    """The pieces of the answer."""
    stream = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stream=True)
    return [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]


def long_body(**fields: object) -> dict[str, object]:
    """A request that runs for some seconds."""
    return {"model": MODEL, "prompt": "One two", "max_tokens": 300, "ignore_eos": True, "stream": True, **fields}


def test_openai_client_streams_the_answer(client: openai.OpenAI) -> None:
    pieces = ask(client)
    assert "".join(pieces) == "The capital of France is Paris."
    assert len([piece for piece in pieces if piece]) >= 7


def test_the_demo_is_sampled_as_its_card_says(client: openai.OpenAI) -> None:
    """At temperature 1 it answers gibberish, and a newcomer's first chat says nothing of temperature."""
    [model] = client.models.list()
    assert model.model_dump()["default_sampling_params"] == {"temperature": 0.2, "top_p": 0.9}


def test_metrics_have_the_promised_names(server: ServeProcess, client: openai.OpenAI) -> None:
    ask(client)
    server.wait_until_idle()
    samples = server.metrics()
    names = {sample.partition("{")[0] for sample in samples}
    assert names >= METRICS | {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
    assert all(f'model_name="{MODEL}"' in sample for sample in samples if sample.startswith("vllm:"))
    assert all(server.metric(f"{name}_count") > 0 for name in HISTOGRAMS)
    [config] = [sample for sample in samples if sample.startswith("vllm:cache_config_info{")]
    assert 'block_size="16"' in config
    assert 'num_gpu_blocks="128"' in config
    assert server.metric("jaxserve_compiles_after_ready_total") == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "warm"}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"messages": []}, "messages"),
    ],
)
def test_bad_request_is_refused_and_the_next_is_served(
    server: ServeProcess, client: openai.OpenAI, fields: dict[str, object], param: str
) -> None:
    body = {"model": MODEL, "messages": QUESTION, **fields}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert "".join(ask(client)) == "The capital of France is Paris."


def test_disconnect_frees_everything(server: ServeProcess) -> None:
    before = server.metric("vllm:generation_tokens_total")
    # More sequences than there are slots: some run and some wait when the client goes away.
    body = long_body(prompt=["One two", "Three four", "Five six"], n=4)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(10):
            next(lines)
        assert server.metric("vllm:num_requests_running") > 0
        assert server.metric("vllm:num_requests_waiting") > 0
        assert server.metric("vllm:kv_cache_usage_perc") > 0
    server.wait_until_idle()
    assert server.metric("vllm:generation_tokens_total") - before < 12 * 300 / 2
    assert server.metric("jaxserve_compiles_after_ready_total") == 0


def programs(folder: Path) -> set[str]:
    """Compiled programs on disk."""
    return {path.name for path in (folder / "programs").glob("*-cache")}


def test_second_start_compiles_nothing_and_sigterm_drains(server: ServeProcess, folder: Path) -> None:
    first = programs(folder)
    assert len(first) > 10
    with serving(folder / "second.log", MODEL, "--cache-dir", str(folder), "--drain-deadline-s", "60", *SIZES) as again:
        again.wait_for("/ready", 200, timeout_s=60)
        assert programs(folder) == first
        with client_of(again) as client:
            assert "".join(ask(client)) == "The capital of France is Paris."
            stream = client.completions.create(
                model=MODEL, prompt="One two", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
            )
            next(stream)
            again.process.send_signal(signal.SIGTERM)
            again.wait_for("/ready", 503, timeout_s=5)
            refused = httpx.post(f"{again.url}/v1/completions", json=long_body(), timeout=30)
            assert refused.status_code == 503
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        started = time.monotonic()
        assert again.process.wait(timeout=30) == 0
        assert time.monotonic() - started < 10
        assert programs(folder) == first
        assert "Traceback" not in again.log.read_text()
