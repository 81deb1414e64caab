"""`jaxserve serve`: listen at once, make the engine meanwhile, serve until told to stop."""

from __future__ import annotations

import logging
from importlib.metadata import version

from prometheus_client import CollectorRegistry

from jaxserve.core.config import ServeConfig
from jaxserve.launch.build import Progress, build_engine, find_model
from jaxserve.launch.memory import settle_heap
from jaxserve.server.lifecycle import serve_app
from jaxserve.server.openai.app import create_app
from jaxserve.server.openai.config import AppConfig
from jaxserve.server.openai.slot import EngineSlot
from jaxserve.telemetry.metrics import EngineMetrics
from jaxserve.telemetry.tracing import exporting_tracer

logger = logging.getLogger(__name__)


def run(config: ServeConfig, progress: Progress | None = None) -> None:
    """Serves a model until SIGTERM or SIGINT, then drains and returns.

    Args:
        config: What to serve and how.
        progress: Is told how far downloading, loading and compiling are.

    Raises:
        JaxserveError: The model cannot be found, loaded or served as configured.
    """
    release = version("jaxserve")
    model = find_model(config, progress)
    if said := model.sampling_defaults.said():
        named = ", ".join(f"{name}={value:g}" for name, value in said.items())
        logger.info("sampling defaults of the model: %s (--generation-config none takes neutral ones)", named)
    registry = CollectorRegistry()
    tracer = None
    if config.otlp_endpoint is not None:
        tracer = exporting_tracer(config.otlp_endpoint, service_name="jaxserve", version=release)
    slot = EngineSlot("The engine is loading and compiling; try again in a few seconds.")
    names = tuple(dict.fromkeys((*config.served_model_name, model.name)))
    metrics = EngineMetrics(registry, names[0])
    app = create_app(
        slot,
        model.tokenizer,
        model.chat_template,
        AppConfig(
            served_model_names=names,
            version=release,
            api_keys=config.api_key,
            max_body_bytes=config.max_body_bytes,
            request_timeout_s=config.request_timeout_s,
            sampling_defaults=model.sampling_defaults,
        ),
        registry=registry,
        tracer=tracer,
    )

    def start() -> None:
        engine = build_engine(config, model, observer=metrics, progress=progress)
        settle_heap()
        slot.fill(engine)

    serve_app(
        app,
        slot,
        host=config.host,
        port=config.port,
        drain_deadline_s=config.drain_deadline_s,
        start=start,
    )
