"""The HTTP app: which route does what.

`create_app` puts the layers together: middleware (request id, key, size limit), error handlers, the generation service
and the small routes that tell about the server. The app holds an `Engine` (or an `EngineSlot` that gets one later) and
knows nothing of devices.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from opentelemetry.trace import Tracer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.core.errors import InvalidRequestError, UnavailableError
from jaxserve.engine.api import Engine
from jaxserve.server.openai.body import parse_body, read_body
from jaxserve.server.openai.config import AppConfig
from jaxserve.server.openai.errors import error_response, install_error_handlers
from jaxserve.server.openai.hosts import Hosts
from jaxserve.server.openai.intake import BodyLimit, BodyLimits
from jaxserve.server.openai.middleware import ApiKey, RequestContext
from jaxserve.server.openai.parameters import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE
from jaxserve.server.openai.schema import DetokenizeBody, TokenizeBody
from jaxserve.server.openai.service import Service, in_thread_if_large
from jaxserve.server.openai.translate import Translator
from jaxserve.telemetry import metrics as names
from jaxserve.telemetry.metrics import Load, ServerMetrics
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

Handler = Callable[[Request], Awaitable[Response]]


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    config: AppConfig,
    *,
    registry: CollectorRegistry | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The app that serves an engine.

    Args:
        engine: What generates; an `EngineSlot` if it is still being made.
        tokenizer: The model's.
        chat_template: The model's; None if it has none, then messages are refused.
        config: Names, keys and limits.
        registry: Where the app's metrics go and what `/metrics` shows; by default one of its own.
        tracer: Where spans go; None records nothing.
    """
    metrics = ServerMetrics(registry or CollectorRegistry(), config.served_model_names[0])
    metrics.observe_engine(lambda: _load(engine))
    translator = Translator(tokenizer, chat_template, config)
    service = Service(engine=engine, translator=translator, config=config, metrics=metrics, tracer=tracer)
    facts = _Facts(engine=engine, translator=translator, config=config, metrics=metrics, created=int(time.time()))

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limits=BodyLimits(max_bytes=config.max_body_bytes))
    if config.api_keys:
        app.add_middleware(ApiKey, keys=config.api_keys)
    if config.allowed_hosts is not None:
        app.add_middleware(Hosts, hosts=config.allowed_hosts)
    app.add_middleware(RequestContext, on_response=metrics.responded)
    if config.allowed_origins:
        # Outermost: preflights bring no key, and a page may read every answer, errors included.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
    routes: tuple[tuple[str, str, Handler], ...] = (
        ("POST", CHAT, service.chat),
        ("POST", COMPLETIONS, service.completion),
        ("POST", TOKENIZE, facts.tokenize),
        ("POST", DETOKENIZE, facts.detokenize),
        ("GET", "/v1/models", facts.models),
        ("GET", "/v1/models/{model:path}", facts.model),
        ("GET", "/health", facts.health),
        ("GET", "/ready", facts.ready),
        ("GET", "/metrics", facts.metrics_page),
        ("GET", "/version", facts.version),
    )
    for method, path, handler in routes:
        app.add_route(path, handler, methods=[method])
    return app


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
    """Routes that generate nothing."""

    engine: Engine
    translator: Translator
    config: AppConfig
    metrics: ServerMetrics
    created: int

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        data = [self._model_json(name) for name in self.config.served_model_names]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{id}`."""
        name = request.path_params["model"]
        self.translator.check_model(name)
        return JSONResponse(self._model_json(name))

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`."""
        data = await read_body(request)
        return JSONResponse(await in_thread_if_large(data, lambda: self._tokenize(data)))

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`."""
        data = await read_body(request)
        return JSONResponse(await in_thread_if_large(data, lambda: self._detokenize(data)))

    async def health(self, request: Request) -> Response:
        """`GET /health`: whether the process is worth keeping."""
        health = self.engine.health()
        if not health.alive:
            return error_response(UnavailableError(health.reason or "The engine is dead."))
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """`GET /ready`: whether requests are accepted."""
        health = self.engine.health()
        if not (health.alive and health.ready):
            return error_response(UnavailableError(health.reason or "The engine is not ready."))
        return JSONResponse({"status": "ready"})

    async def metrics_page(self, request: Request) -> Response:
        """`GET /metrics`."""
        return Response(self.metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def version(self, request: Request) -> Response:
        """`GET /version`."""
        return JSONResponse({"version": self.config.version})

    def _model_json(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "jaxserve",
            "root": self.config.served_model_names[0],
            "parent": None,
            "max_model_len": self.engine.info.max_model_len,
        }

    def _tokenize(self, data: bytes) -> dict[str, Any]:
        body = parse_body(TokenizeBody, data, TOKENIZE)
        tokenizer = self.translator.tokenizer
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("Give either prompt or messages.", param="prompt")
        if body.prompt is None:
            token_ids = self.translator.chat_prompt(body)
        else:
            token_ids = tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        answer = {
            "count": len(token_ids),
            "max_model_len": self.engine.info.max_model_len,
            "tokens": token_ids,
            "token_strs": [tokenizer.token_text(token_id) for token_id in token_ids],
        }
        return answer if body.return_token_strs else {**answer, "token_strs": None}

    def _detokenize(self, data: bytes) -> dict[str, Any]:
        body = parse_body(DetokenizeBody, data, DETOKENIZE)
        tokenizer = self.translator.tokenizer
        self._check_model(body.model)
        if any(token_id >= tokenizer.vocab_size for token_id in body.tokens):
            raise InvalidRequestError(f"tokens must be token ids in [0, {tokenizer.vocab_size}).", param="tokens")
        return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}

    def _check_model(self, model: str | None) -> None:
        if model is not None:
            self.translator.check_model(model)


def _load(engine: Engine) -> Load | None:
    """The engine's numbers under the names they are scraped by; None while it is not there."""
    try:
        info = engine.info
    except UnavailableError:
        return None
    stats = engine.stats()
    return Load(
        gauges={
            names.NUM_WAITING: stats.num_waiting,
            names.NUM_RUNNING: stats.num_running,
            names.KV_CACHE_USAGE: stats.kv_cache_usage,
        },
        counters={
            names.PREFIX_CACHE_QUERIES: stats.prefix_cache_queries_tokens,
            names.PREFIX_CACHE_HITS: stats.prefix_cache_hits_tokens,
            names.NUM_PREEMPTIONS: stats.num_preemptions,
            names.COMPILES_AFTER_READY: stats.num_compiles_after_ready,
            names.STEPS: stats.num_steps,
        },
        page_size=info.page_size,
        num_pages=info.num_pages,
    )
