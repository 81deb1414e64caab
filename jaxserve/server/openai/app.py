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

from jaxserve.core.errors import UnavailableError
from jaxserve.engine.api import Engine
from jaxserve.server.openai.callers import Callers
from jaxserve.server.openai.config import AppConfig
from jaxserve.server.openai.errors import error_response, install_error_handlers
from jaxserve.server.openai.hosts import Hosts
from jaxserve.server.openai.intake import BodyLimit, BodyLimits
from jaxserve.server.openai.middleware import ApiKey, RequestContext
from jaxserve.server.openai.offload import Offload
from jaxserve.server.openai.pages import Pages
from jaxserve.server.openai.parameters import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE
from jaxserve.server.openai.service import Service
from jaxserve.server.openai.token_routes import TokenRoutes
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

    Raises:
        ConfigError: The attributes of an API key are wrong.
    """
    metrics = ServerMetrics(registry or CollectorRegistry(), config.served_model_names[0])
    metrics.observe_engine(lambda: _load(engine))
    translator = Translator(tokenizer, chat_template, config)
    callers = Callers(config.api_keys, config.callers)
    offload = Offload()
    service = Service(
        engine=engine,
        translator=translator,
        callers=callers,
        config=config,
        metrics=metrics,
        tracer=tracer,
        offload=offload,
    )
    tokens = TokenRoutes(engine=engine, translator=translator, offload=offload)
    facts = _Facts(engine=engine, translator=translator, config=config, metrics=metrics, created=int(time.time()))
    pages = Pages(version=config.version, model=config.served_model_names[0], needs_key=bool(config.api_keys))

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    install_error_handlers(app)
    _add_layers(app, config, callers, metrics)
    for method, path, handler in _routes(service, tokens, facts, pages):
        app.add_route(path, handler, methods=[method])
    return app


def _add_layers(app: FastAPI, config: AppConfig, callers: Callers, metrics: ServerMetrics) -> None:
    """What each request passes before and after its route."""
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limits=BodyLimits(max_bytes=config.max_body_bytes))
    if callers.ask_for_key:
        app.add_middleware(ApiKey, callers=callers)
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
            "default_sampling_params": self.config.sampling_defaults.said(),
        }


def _routes(service: Service, tokens: TokenRoutes, facts: _Facts, pages: Pages) -> tuple[tuple[str, str, Handler], ...]:
    """Method, path and handler of everything there is."""
    return (
        ("POST", CHAT, service.chat),
        ("POST", COMPLETIONS, service.completion),
        ("POST", f"{CHAT}/render", service.render_chat),
        ("POST", f"{COMPLETIONS}/render", service.render_completion),
        ("POST", TOKENIZE, tokens.tokenize),
        ("POST", DETOKENIZE, tokens.detokenize),
        ("GET", "/v1/models", facts.models),
        ("GET", "/v1/models/{model:path}", facts.model),
        ("GET", "/health", facts.health),
        ("GET", "/ready", facts.ready),
        ("GET", "/metrics", facts.metrics_page),
        ("GET", "/version", facts.version),
        ("GET", "/", pages.root),
        ("GET", "/docs", pages.docs),
        ("GET", "/openapi.json", pages.openapi),
    )


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
            names.STEP_AGE: stats.step_age_s,
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
