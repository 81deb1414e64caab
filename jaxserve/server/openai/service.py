"""The few steps every generation request takes.

A body is read, parsed and translated (in a thread if it is large), its engine requests are submitted, and the answer is
written whole or as a stream. Whatever ends the answer early (a disconnect, the time limit, an error) closes the engine
requests and the request's span.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from opentelemetry.trace import Tracer
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.core.errors import JaxserveError
from jaxserve.engine.api import Engine
from jaxserve.server.openai.answer import Answer
from jaxserve.server.openai.body import body_decoder, read_body
from jaxserve.server.openai.callers import Callers
from jaxserve.server.openai.config import AppConfig
from jaxserve.server.openai.decode import BodyDecoder
from jaxserve.server.openai.dialects import ChatDialect, CompletionDialect, Dialect
from jaxserve.server.openai.inflight import COMPLETE, InFlight
from jaxserve.server.openai.intake import body_is_parsed
from jaxserve.server.openai.offload import Offload
from jaxserve.server.openai.parameters import CHAT, COMPLETIONS
from jaxserve.server.openai.responses import EventStream, JSONText, until_disconnect
from jaxserve.server.openai.schema import ChatBody, CompletionBody
from jaxserve.server.openai.token_answers import token_ids_response
from jaxserve.server.openai.translate import Generation, Translator
from jaxserve.telemetry.logging import REQUEST_ID
from jaxserve.telemetry.metrics import ServerMetrics
from jaxserve.telemetry.tracing import RequestSpan

_LOG = logging.getLogger(__name__)


Reader = Callable[[bytes, str], Awaitable[Generation]]
"""Turns the bytes of a body into a generation whose answer has the id given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """What generation requests need.

    Attributes:
        engine: Generates.
        translator: Turns bodies into engine requests.
        callers: Say whose they are.
        config: The app's settings.
        metrics: Where latencies go.
        tracer: Where spans go; None records nothing.
        offload: Where large bodies are read.
    """

    engine: Engine
    translator: Translator
    callers: Callers
    config: AppConfig
    metrics: ServerMetrics
    tracer: Tracer | None
    offload: Offload
    chat_bodies: BodyDecoder[ChatBody] = field(default_factory=lambda: body_decoder(ChatBody, CHAT))
    completion_bodies: BodyDecoder[CompletionBody] = field(
        default_factory=lambda: body_decoder(CompletionBody, COMPLETIONS)
    )

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._generate(request, ChatDialect(), self._read_chat)

    async def completion(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._generate(request, CompletionDialect(), self._read_completion)

    async def render_chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions/render`: the prompt's token ids, which routers ask for before they route."""
        [prompt] = await self._render(request, self._read_chat)
        return await token_ids_response(self.offload, [prompt], listed=False)

    async def render_completion(self, request: Request) -> Response:
        """`POST /v1/completions/render`: each prompt's token ids."""
        return await token_ids_response(self.offload, await self._render(request, self._read_completion), listed=True)

    async def _render(self, request: Request, read: Reader) -> list[tuple[int, ...]]:
        generation = await read(await read_body(request), "")
        body_is_parsed(request.scope)
        return [each.prompt for each in generation.requests]

    async def _read_chat(self, data: bytes, response_id: str) -> Generation:
        def work() -> Generation:
            return self.translator.chat(self.chat_bodies.decode(data), self.engine.info, response_id)

        return await self.offload.run(len(data), work, renders=True)

    async def _read_completion(self, data: bytes, response_id: str) -> Generation:
        def work() -> Generation:
            return self.translator.completion(self.completion_bodies.decode(data), self.engine.info, response_id)

        return await self.offload.run(len(data), work)

    async def _generate(self, request: Request, dialect: Dialect, read: Reader) -> Response:
        span = RequestSpan(
            self.tracer,
            f"{request.method} {request.url.path}",
            headers=dict(request.headers) if self.tracer else {},
            request_id=REQUEST_ID.get(),
        )
        try:
            return await self._answer(request, dialect, read, span)
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
        read: Reader,
        span: RequestSpan,
    ) -> Response:
        created = int(time.time())
        caller = self.callers.of(request.scope)
        data = await read_body(request)
        response_id = dialect.id_prefix + uuid.uuid4().hex
        with span.child("tokenize"):
            generation = await read(data, response_id)
        del data
        body_is_parsed(request.scope)
        generation = replace(generation, requests=tuple(map(caller.claim, generation.requests)))
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
            return JSONText(await until_disconnect(request.receive, answer.whole(inflight)))
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
            "client": generation.requests[0].client,
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
                **{f"jaxserve.metadata.{name}": value for name, value in generation.metadata.items()},
            }
        )
        span.end()
