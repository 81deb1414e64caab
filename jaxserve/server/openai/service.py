"""The few steps every generation request takes.

A body is read, parsed and translated (in a thread if it is large), its engine requests are submitted, and the answer is
written whole or as a stream. Whatever ends the answer early (a disconnect, the time limit, an error) closes the engine
requests and the request's span.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fastapi.responses import JSONResponse
from opentelemetry.trace import Tracer
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.core.errors import JaxserveError
from jaxserve.engine.api import Engine
from jaxserve.server.openai.answer import Answer
from jaxserve.server.openai.body import parse_body, read_body
from jaxserve.server.openai.config import AppConfig
from jaxserve.server.openai.dialects import ChatDialect, CompletionDialect, Dialect
from jaxserve.server.openai.inflight import COMPLETE, InFlight
from jaxserve.server.openai.intake import body_is_parsed
from jaxserve.server.openai.parameters import CHAT, COMPLETIONS
from jaxserve.server.openai.responses import EventStream, until_disconnect
from jaxserve.server.openai.schema import ChatBody, CompletionBody
from jaxserve.server.openai.translate import Generation, Translator
from jaxserve.telemetry.logging import REQUEST_ID
from jaxserve.telemetry.metrics import ServerMetrics
from jaxserve.telemetry.tracing import RequestSpan

T = TypeVar("T")

LARGE_BODY_BYTES = 8 * 1024
"""Bodies above this are parsed and tokenised in a thread, so that they do not hold up other requests' tokens: this much
text takes some two milliseconds."""

_LOG = logging.getLogger(__name__)


async def in_thread_if_large(data: bytes, work: Callable[[], T]) -> T:
    """Runs work on a body here if it is small, in a thread if it is large."""
    return work() if len(data) <= LARGE_BODY_BYTES else await asyncio.to_thread(work)


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """What generation requests need.

    Attributes:
        engine: Generates.
        translator: Turns bodies into engine requests.
        config: The app's settings.
        metrics: Where latencies go.
        tracer: Where spans go; None records nothing.
    """

    engine: Engine
    translator: Translator
    config: AppConfig
    metrics: ServerMetrics
    tracer: Tracer | None

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""

        def translate(data: bytes, response_id: str) -> Generation:
            body = parse_body(ChatBody, data, CHAT)
            return self.translator.chat(body, self.engine.info, response_id)

        return await self._generate(request, ChatDialect(), translate)

    async def completion(self, request: Request) -> Response:
        """`POST /v1/completions`."""

        def translate(data: bytes, response_id: str) -> Generation:
            body = parse_body(CompletionBody, data, COMPLETIONS)
            return self.translator.completion(body, self.engine.info, response_id)

        return await self._generate(request, CompletionDialect(), translate)

    async def _generate(
        self, request: Request, dialect: Dialect, translate: Callable[[bytes, str], Generation]
    ) -> Response:
        span = RequestSpan(
            self.tracer,
            f"{request.method} {request.url.path}",
            headers=dict(request.headers) if self.tracer else {},
            request_id=REQUEST_ID.get(),
        )
        try:
            return await self._answer(request, dialect, translate, span)
        except JaxserveError as error:
            span.fail(error.message)
            span.end()
            raise
        except BaseException:
            span.fail("The server failed.")
            span.end()
            raise

    async def _answer(
        self,
        request: Request,
        dialect: Dialect,
        translate: Callable[[bytes, str], Generation],
        span: RequestSpan,
    ) -> Response:
        created = int(time.time())
        data = await read_body(request)
        response_id = dialect.id_prefix + uuid.uuid4().hex
        with span.child("tokenize"):
            generation = await in_thread_if_large(data, lambda: translate(data, response_id))
        del data
        body_is_parsed(request.scope)
        inflight = InFlight(
            self.engine,
            generation,
            self.translator.tokenizer,
            self.metrics,
            span=span,
            timeout_s=self.config.request_timeout_s,
        )
        answer = Answer(
            generation,
            dialect,
            self.translator.tokenizer,
            created=created,
            fingerprint=f"jaxserve-{self.config.version}",
        )

        async def close() -> None:
            await inflight.aclose()
            self._conclude(generation, inflight, span)

        if generation.stream:
            return EventStream(answer.chunks(inflight), on_end=close)
        try:
            return JSONResponse(await until_disconnect(request.receive, answer.whole(inflight)))
        finally:
            await close()

    def _conclude(self, generation: Generation, inflight: InFlight, span: RequestSpan) -> None:
        """Writes what the request came to into its log line and its span."""
        usage = inflight.usage
        facts: dict[str, str | int] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "outcome": inflight.outcome,
        }
        if generation.end_user is not None:
            facts["end_user"] = generation.end_user
        _LOG.info("%s ended", generation.response_id, extra=facts)
        if inflight.outcome != COMPLETE:
            span.fail(inflight.outcome)
        span.set(
            {
                "gen_ai.request.model": generation.model,
                "gen_ai.response.id": generation.response_id,
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                **{f"jaxserve.{name}": value for name, value in facts.items() if name in ("outcome", "end_user")},
            }
        )
        span.end()
