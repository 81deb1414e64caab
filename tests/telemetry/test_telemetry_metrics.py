"""Metrics: the names routers look for, and the numbers a request leaves behind."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.telemetry import metrics as names
from jaxserve.telemetry.metrics import EngineMetrics, Load, RequestTimer, ServerMetrics

MODEL = {"model_name": "m"}


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> ServerMetrics:
    return ServerMetrics(registry, "m")


def load() -> Load:
    return Load(
        gauges={names.NUM_WAITING: 3, names.NUM_RUNNING: 2, names.KV_CACHE_USAGE: 0.25, names.STEP_AGE: 1.5},
        counters={names.PREFIX_CACHE_QUERIES: 100, names.PREFIX_CACHE_HITS: 40, names.NUM_PREEMPTIONS: 1},
        page_size=16,
        num_pages=512,
    )


def test_names_and_labels_are_verbatim(metrics: ServerMetrics, registry: CollectorRegistry) -> None:
    metrics.observe_engine(load)
    EngineMetrics(registry, "m").observe_step("decode", "8", 0.01)
    metrics.finished("stop")
    families = {f.name: f for f in text_string_to_metric_families(metrics.exposition().decode())}
    samples = {sample.name: sample for family in families.values() for sample in family.samples}
    for name in (
        "vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total", "jaxserve_step_age_seconds",
    ):  # fmt: skip
        assert samples[name].labels == MODEL
    for name in (
        "time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds",
    ):  # fmt: skip
        assert families[f"vllm:{name}"].type == "histogram"
        assert samples[f"vllm:{name}_count"].labels == MODEL
    assert samples["vllm:cache_config_info"].labels == {**MODEL, "block_size": "16", "num_gpu_blocks": "512"}
    assert samples["vllm:cache_config_info"].value == 1
    lora = samples["vllm:lora_requests_info"]
    assert lora.labels == {**MODEL, "max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert lora.value > 1.7e9
    assert samples["vllm:request_success_total"].labels == {**MODEL, "finished_reason": "stop"}
    assert samples["jaxserve_step_seconds_count"].labels == {**MODEL, "program": "decode", "bucket": "8"}
    assert samples["process_resident_memory_bytes"].value > 0


def test_engine_is_read_at_each_scrape(metrics: ServerMetrics, registry: CollectorRegistry) -> None:
    loads = [None, load()]
    metrics.observe_engine(lambda: loads.pop(0))
    assert registry.get_sample_value("vllm:num_requests_waiting", MODEL) is None
    text = metrics.exposition().decode()
    assert 'vllm:num_requests_waiting{model_name="m"} 3.0' in text
    assert 'vllm:prefix_cache_hits_total{model_name="m"} 40.0' in text


def test_request_timer(metrics: ServerMetrics, registry: CollectorRegistry) -> None:
    clock = Clock()

    def value(name: str, part: str = "sum") -> float | None:
        return registry.get_sample_value(f"vllm:{name}_{part}", MODEL)

    timer = RequestTimer(metrics, num_prompt_tokens=7, num_sequences=2, clock=clock)
    clock.now += 0.5
    timer.on_started(0.2, 0.25)
    timer.on_tokens(0, 1)
    clock.now += 0.25
    timer.on_tokens(1, 1)
    timer.on_tokens(0, 2)
    clock.now += 0.25
    timer.on_tokens(0, 1)
    timer.on_finished(0, "length")
    assert value("prompt_tokens", "total") == 7
    assert value("generation_tokens", "total") == 5
    assert (value("time_to_first_token_seconds"), value("time_to_first_token_seconds", "count")) == (0.5, 1)
    assert (value("inter_token_latency_seconds"), value("inter_token_latency_seconds", "count")) == (0.5, 2)
    assert value("request_decode_time_seconds") == 0.5
    assert value("request_time_per_output_token_seconds") == pytest.approx(0.5 / 3)
    assert value("e2e_request_latency_seconds") == 1.0
    assert value("request_queue_time_seconds") == pytest.approx(0.2)
    assert value("request_prefill_time_seconds") == pytest.approx(0.25)
    timer.close()
    timer.close()
    success = "vllm:request_success_total"
    assert registry.get_sample_value(success, {**MODEL, "finished_reason": "length"}) == 1
    assert registry.get_sample_value(success, {**MODEL, "finished_reason": "abort"}) == 1


def test_sequence_without_tokens(metrics: ServerMetrics, registry: CollectorRegistry) -> None:
    timer = RequestTimer(metrics, num_prompt_tokens=1, num_sequences=1)
    timer.on_finished(0, "error")
    timer.close()
    assert registry.get_sample_value("vllm:request_success_total", {**MODEL, "finished_reason": "error"}) == 1
    assert registry.get_sample_value("vllm:request_decode_time_seconds_count", MODEL) == 0


def test_engine_metrics(registry: CollectorRegistry) -> None:
    metrics = EngineMetrics(registry, "m")
    metrics.observe_step("decode", "8", 0.25)
    metrics.observe_step_host(0.5)
    labels = {**MODEL, "program": "decode", "bucket": "8"}
    assert registry.get_sample_value("jaxserve_step_seconds_sum", labels) == 0.25
    assert registry.get_sample_value("jaxserve_step_host_seconds_sum", MODEL) == 0.5


def test_two_registries_do_not_meet() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    ServerMetrics(first, "a").finished("stop")
    ServerMetrics(second, "b")
    assert second.get_sample_value("vllm:request_success_total", {"model_name": "a", "finished_reason": "stop"}) is None
