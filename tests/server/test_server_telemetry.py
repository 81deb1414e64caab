"""What requests to the app leave in metrics and traces."""

from __future__ import annotations

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from server_harness import CHAT, COMPLETIONS, chat, client_of, completion, make_app, make_engine

from jaxserve.engine.fake import FakeEngine

MODEL = {"model_name": "fake"}


@pytest.mark.parametrize("stream", [False, True])
async def test_request_in_metrics(engine: FakeEngine, stream: bool) -> None:
    registry = CollectorRegistry()
    async with client_of(make_app(engine, registry=registry)) as client:
        await client.post(COMPLETIONS, json=completion(["A", "B"], n=2, stream=stream, stop="E"))
        await client.post(CHAT, json=chat(n=0))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {**MODEL, **labels})

    assert value("vllm:prompt_tokens_total") == 4
    assert value("vllm:generation_tokens_total") == 2 * 4 + 2 * 3
    assert value("vllm:request_success_total", finished_reason="stop") == 4
    assert value("vllm:request_success_total", finished_reason="abort") is None
    assert value("vllm:time_to_first_token_seconds_count") == 2
    assert value("vllm:inter_token_latency_seconds_count") == 2 * 3 + 2 * 2
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert value(f"vllm:{name}_seconds_count") == 4
    assert value("vllm:num_requests_running") == 0
    assert value("vllm:prefix_cache_queries_total") == 4
    assert value("jaxserve_http_responses_total", status="200") == 1
    assert value("jaxserve_http_responses_total", status="400") == 1
    assert value("jaxserve_compiles_after_ready_total") == 0
    assert value("jaxserve_step_age_seconds") == 0


async def test_metrics_page(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'vllm:cache_config_info{block_size="16",model_name="fake",num_gpu_blocks="256"} 1.0' in response.text


@pytest.mark.parametrize("stream", [False, True])
async def test_request_in_traces(stream: bool) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engine = make_engine()
    async with client_of(make_app(engine, tracer=provider.get_tracer("test"))) as client:
        headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x-request-id": "abc"}
        await client.post(CHAT, json=chat(stream=stream, n=2, user="ann", metadata={"job": "7"}), headers=headers)
    spans = exporter.get_finished_spans()
    names = sorted(span.name for span in spans)
    assert names == sorted([f"POST {CHAT}", "tokenize", *["queue", "prefill", "decode"] * 2])
    assert {f"{span.context.trace_id:032x}" for span in spans} == {"0af7651916cd43dd8448eb211c80319c"}
    (root,) = [span for span in spans if span.name.startswith("POST")]
    assert root.attributes is not None
    assert root.attributes["request.id"] == "abc"
    assert root.attributes["gen_ai.usage.output_tokens"] == 8
    assert root.attributes["jaxserve.end_user"] == "ann"
    assert root.attributes["jaxserve.metadata.job"] == "7"
    assert root.status.is_unset


@pytest.mark.parametrize(("body", "description"), [(chat(n=0), "n"), (chat(), "error"), (chat(stream=True), "error")])
async def test_failures_in_traces(body: dict[str, object], description: str) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engine = make_engine(error_after_tokens=1)
    async with client_of(make_app(engine, tracer=provider.get_tracer("test"))) as client:
        await client.post(CHAT, json=body)
    (root,) = [span for span in exporter.get_finished_spans() if span.name.startswith("POST")]
    assert not root.status.is_ok
    assert not root.status.is_unset
    assert description in (root.status.description or "")
