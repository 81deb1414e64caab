"""One span tree a request, when tracing is configured; otherwise spans that record nothing.

Only OpenTelemetry's API is imported here. `exporting_tracer` needs the SDK (the extra `tracing`) and is called by `cli`
alone; its tracer is passed down, never made global. The root span continues the trace of a `traceparent` header; under
it lie tokenisation and, for each sequence, queue, prefill and decode with the times the engine reports.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module

from opentelemetry.trace import NoOpTracer, Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jaxserve.core.errors import ConfigError

_NANO = 1_000_000_000


class RequestSpan:
    """The root span of one request.

    Args:
        tracer: Makes the spans; None records nothing.
        name: The span's name, such as "POST /v1/completions".
        headers: The request's headers in lower case; `traceparent` names the caller's span.
        request_id: The request's id.
    """

    def __init__(self, tracer: Tracer | None, name: str, *, headers: Mapping[str, str], request_id: str) -> None:
        self._tracer = tracer or NoOpTracer()
        parent = TraceContextTextMapPropagator().extract(headers) if tracer else None
        self._span: Span = self._tracer.start_span(
            name, context=parent, kind=SpanKind.SERVER, attributes={"request.id": request_id}
        )
        self._context = set_span_in_context(self._span)
        self.recording = self._span.is_recording()
        self._ended = False

    @contextmanager
    def child(self, name: str) -> Iterator[None]:
        """A span over a block."""
        span = self._tracer.start_span(name, context=self._context)
        try:
            yield
        finally:
            span.end()

    def phase(self, name: str, *, start_ns: int, seconds: float, sequence: int) -> int:
        """A span over a time that has passed.

        Args:
            name: The span's name.
            start_ns: When it began, in nanoseconds since the epoch.
            seconds: How long it took.
            sequence: Which of the request's sequences it is about.

        Returns:
            When it ended, in nanoseconds since the epoch.
        """
        end_ns = start_ns + int(seconds * _NANO)
        attributes = {"jaxserve.sequence": sequence}
        self._tracer.start_span(name, context=self._context, start_time=start_ns, attributes=attributes).end(end_ns)
        return end_ns

    def set(self, attributes: Mapping[str, str | int]) -> None:
        """Adds facts to the root span."""
        self._span.set_attributes(attributes)

    def fail(self, message: str) -> None:
        """Marks the request as failed, unless it has ended."""
        if not self._ended:
            self._span.set_status(StatusCode.ERROR, message)

    def end(self) -> None:
        """Ends the root span. Idempotent."""
        if not self._ended:
            self._ended = True
            self._span.end()


class SequencePhases:
    """Queue, prefill and decode of the sequences of one engine request, as spans.

    Args:
        span: The request's root.
    """

    def __init__(self, span: RequestSpan) -> None:
        self._span = span
        self._submitted_ns = time.time_ns()
        self._decode_ns: dict[int, int] = {}

    def on_started(self, index: int, queue_s: float, prefill_s: float) -> None:
        """Records a sequence's queue and prefill, in seconds."""
        prefill_ns = self._span.phase("queue", start_ns=self._submitted_ns, seconds=queue_s, sequence=index)
        self._decode_ns[index] = self._span.phase("prefill", start_ns=prefill_ns, seconds=prefill_s, sequence=index)

    def on_finished(self, index: int) -> None:
        """Records a sequence's decode, which ends now."""
        start_ns = self._decode_ns.pop(index, None)
        if start_ns is not None:
            seconds = max(0, time.time_ns() - start_ns) / _NANO
            self._span.phase("decode", start_ns=start_ns, seconds=seconds, sequence=index)


def exporting_tracer(endpoint: str, *, service_name: str, version: str) -> Tracer:
    """A tracer that sends spans to an OTLP collector over gRPC.

    Args:
        endpoint: The collector, such as "http://localhost:4317".
        service_name: The `service.name` of the spans.
        version: The `service.version` of the spans.

    Raises:
        ConfigError: The SDK is not installed.
    """
    try:
        # By name, for the exporter is an optional dependency that type checkers may not find.
        exporter = import_module("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError("Tracing needs the OpenTelemetry SDK: install jaxserve[tracing].") from error
    resource = Resource.create({"service.name": service_name, "service.version": version})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter.OTLPSpanExporter(endpoint=endpoint)))
    return provider.get_tracer("jaxserve", version)
