"""Prometheus instruments under the names that dashboards and routers look for.

`ServerMetrics` belongs to the HTTP app: a `RequestTimer` for each engine request observes its events, and a collector
reads the engine's own numbers when `/metrics` is scraped. `EngineMetrics` belongs to the engine's loop. Both write into
a registry that is passed in. Names beginning with `vllm:` are those the Inference Gateway and llm-d's router read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

NUM_WAITING = "vllm:num_requests_waiting"
NUM_RUNNING = "vllm:num_requests_running"
KV_CACHE_USAGE = "vllm:kv_cache_usage_perc"
CACHE_CONFIG = "vllm:cache_config_info"
LORA_REQUESTS = "vllm:lora_requests_info"
PREFIX_CACHE_QUERIES = "vllm:prefix_cache_queries"
PREFIX_CACHE_HITS = "vllm:prefix_cache_hits"
NUM_PREEMPTIONS = "vllm:num_preemptions"
TIME_TO_FIRST_TOKEN = "vllm:time_to_first_token_seconds"
INTER_TOKEN_LATENCY = "vllm:inter_token_latency_seconds"
TIME_PER_OUTPUT_TOKEN = "vllm:request_time_per_output_token_seconds"
E2E_LATENCY = "vllm:e2e_request_latency_seconds"
QUEUE_TIME = "vllm:request_queue_time_seconds"
PREFILL_TIME = "vllm:request_prefill_time_seconds"
DECODE_TIME = "vllm:request_decode_time_seconds"
PROMPT_TOKENS = "vllm:prompt_tokens"
GENERATION_TOKENS = "vllm:generation_tokens"
REQUEST_SUCCESS = "vllm:request_success"
COMPILES_AFTER_READY = "jaxserve_compiles_after_ready"
STEPS = "jaxserve_steps"
STEP_AGE = "jaxserve_step_age_seconds"
STEP_SECONDS = "jaxserve_step_seconds"
STEP_HOST_SECONDS = "jaxserve_step_host_seconds"
HTTP_RESPONSES = "jaxserve_http_responses"

_LABEL = ("model_name",)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0)
_FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
_REQUEST_BUCKETS = (
    0.01,
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    30.0,
    60.0,
    120.0,
    480.0,
    1920.0,
)
_STEP_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """An engine's numbers at the moment of a scrape; see `EngineStats` for their meaning.

    Attributes:
        gauges: Value by metric name.
        counters: Total since the engine's start by metric name.
        page_size: Tokens a KV page holds.
        num_pages: Pages in the KV pool.
    """

    gauges: Mapping[str, float]
    counters: Mapping[str, float]
    page_size: int
    num_pages: int


_GAUGE_HELP = {
    NUM_WAITING: "Sequences that wait for their first step.",
    NUM_RUNNING: "Sequences that hold KV pages.",
    KV_CACHE_USAGE: "Share of the KV pool owned by running sequences, 0 to 1.",
    STEP_AGE: "Seconds since the oldest step under way was taken up; 0 when nothing runs.",
}
_COUNTER_HELP = {
    PREFIX_CACHE_QUERIES: "Prompt tokens looked up in the prefix cache.",
    PREFIX_CACHE_HITS: "Prompt tokens found in the prefix cache.",
    NUM_PREEMPTIONS: "Times a sequence gave its pages back and started over.",
    COMPILES_AFTER_READY: "Programs compiled after the engine was ready; must stay 0.",
    STEPS: "Steps the engine has executed.",
}


class _LoadCollector(Collector):
    """Reads the engine at scrape time; an engine that is not ready yet has no numbers."""

    def __init__(self, model_name: str, load: Callable[[], Load | None]) -> None:
        self._model_name = model_name
        self._load = load

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry must not scrape at registration."""
        return ()

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        if load is None:
            return
        labels = [self._model_name]
        for name, value in load.gauges.items():
            gauge = GaugeMetricFamily(name, _GAUGE_HELP[name], labels=_LABEL)
            gauge.add_metric(labels, value)
            yield gauge
        for name, value in load.counters.items():
            counter = CounterMetricFamily(name, _COUNTER_HELP[name], labels=_LABEL)
            counter.add_metric(labels, value)
            yield counter
        cache = GaugeMetricFamily(
            CACHE_CONFIG, "Shape of the KV pool; always 1.", labels=("model_name", "block_size", "num_gpu_blocks")
        )
        cache.add_metric([self._model_name, str(load.page_size), str(load.num_pages)], 1.0)
        yield cache


class ServerMetrics:
    """What the HTTP app measures.

    Args:
        registry: Where the instruments are registered.
        model_name: The `model_name` label of all of them.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model_name = model_name
        self.time_to_first_token = self._histogram(
            TIME_TO_FIRST_TOKEN, "Seconds from a request's arrival to its first token.", _FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            INTER_TOKEN_LATENCY, "Seconds between two events of a sequence.", _TOKEN_BUCKETS
        )
        self.time_per_output_token = self._histogram(
            TIME_PER_OUTPUT_TOKEN, "A sequence's mean seconds a token after the first.", _TOKEN_BUCKETS
        )
        self.e2e_latency = self._histogram(
            E2E_LATENCY, "Seconds from a request's arrival to a sequence's end.", _REQUEST_BUCKETS
        )
        self.queue_time = self._histogram(QUEUE_TIME, "Seconds a sequence waited for its first step.", _REQUEST_BUCKETS)
        self.prefill_time = self._histogram(
            PREFILL_TIME, "Seconds from a sequence's first step to its first token.", _REQUEST_BUCKETS
        )
        self.decode_time = self._histogram(
            DECODE_TIME, "Seconds from a sequence's first token to its last.", _REQUEST_BUCKETS
        )
        self.prompt_tokens = self._counter(PROMPT_TOKENS, "Prompt tokens of submitted requests.")
        self.generation_tokens = self._counter(GENERATION_TOKENS, "Tokens generated.")
        self._finished = Counter(
            REQUEST_SUCCESS, "Sequences that ended, by reason.", (*_LABEL, "finished_reason"), registry=registry
        )
        self._responses = Counter(HTTP_RESPONSES, "Responses begun, by status.", (*_LABEL, "status"), registry=registry)
        lora = Gauge(
            LORA_REQUESTS,
            "Adapters in use; the value is when this was last true.",
            (*_LABEL, "max_lora", "running_lora_adapters", "waiting_lora_adapters"),
            registry=registry,
        )
        lora.labels(model_name, "0", "", "").set_function(time.time)

    def observe_engine(self, load: Callable[[], Load | None]) -> None:
        """Reads the engine's numbers with `load` at each scrape, and the process's own with them.

        Args:
            load: A snapshot, or None while there is no engine.
        """
        self._registry.register(_LoadCollector(self._model_name, load))
        ProcessCollector(registry=self._registry)

    def finished(self, reason: str) -> None:
        """Counts the end of a sequence."""
        self._finished.labels(self._model_name, reason).inc()

    def responded(self, status: int) -> None:
        """Counts a response."""
        self._responses.labels(self._model_name, str(status)).inc()

    def exposition(self) -> bytes:
        """All metrics of the registry in Prometheus's text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, _LABEL, buckets=buckets, registry=self._registry).labels(self._model_name)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABEL, registry=self._registry).labels(self._model_name)


class EngineMetrics:
    """What an engine's loop measures.

    Args:
        registry: Where the instruments are registered.
        model_name: The `model_name` label of all of them.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model_name = model_name
        self._step = Histogram(
            STEP_SECONDS,
            "Seconds from a step's dispatch to its result.",
            (*_LABEL, "program", "bucket"),
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self._host = Histogram(
            STEP_HOST_SECONDS, "Host seconds spent on a step.", _LABEL, buckets=_STEP_BUCKETS, registry=registry
        ).labels(model_name)

    def observe_step(self, program: str, bucket: str, seconds: float) -> None:
        """Records a step of a program at a bucket."""
        self._step.labels(self._model_name, program, bucket).observe(seconds)

    def observe_step_host(self, seconds: float) -> None:
        """Records the host's part of a step."""
        self._host.observe(seconds)


class RequestTimer:
    """Follows the sequences of one engine request and records their latencies.

    Args:
        metrics: Where to record.
        num_prompt_tokens: Length of the prompt.
        num_sequences: How many sequences the request generates.
        clock: Seconds; monotonic.
    """

    def __init__(
        self,
        metrics: ServerMetrics,
        *,
        num_prompt_tokens: int,
        num_sequences: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._start_s = clock()
        self._first_s = [0.0] * num_sequences
        self._last_s = [0.0] * num_sequences
        self._num_tokens = [0] * num_sequences
        self._num_open = num_sequences
        metrics.prompt_tokens.inc(num_prompt_tokens)

    def on_tokens(self, index: int, num_tokens: int) -> None:
        """Records that a sequence got new tokens, at least one."""
        now = self._clock()
        metrics = self._metrics
        metrics.generation_tokens.inc(num_tokens)
        if self._num_tokens[index]:
            metrics.inter_token_latency.observe(now - self._last_s[index])
        else:
            self._first_s[index] = now
            if not any(self._num_tokens):
                metrics.time_to_first_token.observe(now - self._start_s)
        self._last_s[index] = now
        self._num_tokens[index] += num_tokens

    def on_started(self, queue_s: float, prefill_s: float) -> None:
        """Records how long a sequence waited and how long its prompt took, in seconds."""
        self._metrics.queue_time.observe(queue_s)
        self._metrics.prefill_time.observe(prefill_s)

    def on_finished(self, index: int, reason: str) -> None:
        """Records the end of a sequence."""
        self._num_open -= 1
        metrics, num_tokens = self._metrics, self._num_tokens[index]
        metrics.finished(reason)
        metrics.e2e_latency.observe(self._clock() - self._start_s)
        if num_tokens:
            decode_s = self._last_s[index] - self._first_s[index]
            metrics.decode_time.observe(decode_s)
            if num_tokens > 1:
                metrics.time_per_output_token.observe(decode_s / (num_tokens - 1))

    def close(self) -> None:
        """Counts sequences that nobody waits for any more as aborted. Idempotent."""
        for _ in range(self._num_open):
            self._metrics.finished("abort")
        self._num_open = 0
