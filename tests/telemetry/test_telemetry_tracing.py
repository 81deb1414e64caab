"""Spans: one tree a request, continuing the caller's trace; nothing when tracing is off."""

from __future__ import annotations

import sys

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode, Tracer

from jaxserve.core.errors import ConfigError
from jaxserve.telemetry.tracing import RequestSpan, SequencePhases, exporting_tracer

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Tracer:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider.get_tracer("test")


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_one_tree(tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    root = RequestSpan(tracer, "POST /x", headers={"traceparent": TRACEPARENT}, request_id="abc")
    assert root.recording
    with root.child("tokenize"):
        pass
    phases = SequencePhases(root)
    phases.on_started(0, 0.5, 0.25)
    phases.on_finished(0)
    phases.on_finished(1)
    root.set({"tokens": 5})
    root.end()
    root.end()
    spans = by_name(exporter)
    assert set(spans) == {"POST /x", "tokenize", "queue", "prefill", "decode"}
    top = spans["POST /x"]
    assert top.parent is not None
    assert f"{top.parent.span_id:x}" == "b7ad6b7169203331"
    assert top.attributes == {"request.id": "abc", "tokens": 5}
    for name in ("tokenize", "queue", "prefill", "decode"):
        parent = spans[name].parent
        assert parent is not None
        assert parent.span_id == top.context.span_id
        assert f"{spans[name].context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    queue, prefill, decode = spans["queue"], spans["prefill"], spans["decode"]
    assert queue.start_time is not None
    assert queue.end_time == queue.start_time + 500_000_000
    assert prefill.start_time == queue.end_time
    assert prefill.end_time == prefill.start_time + 250_000_000
    assert decode.start_time == prefill.end_time


def test_failure(tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    span = RequestSpan(tracer, "x", headers={}, request_id="abc")
    span.fail("The engine failed.")
    span.end()
    span.fail("too late to matter")
    status = by_name(exporter)["x"].status
    assert (status.status_code, status.description) == (StatusCode.ERROR, "The engine failed.")


def test_off() -> None:
    span = RequestSpan(None, "x", headers={"traceparent": TRACEPARENT}, request_id="abc")
    assert not span.recording
    with span.child("y"):
        span.set({"a": 1})
    span.end()


def test_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match="install jaxserve"):
        exporting_tracer("http://localhost:4317", service_name="s", version="1")
