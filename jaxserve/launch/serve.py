"""`jaxserve serve`: listen at once, make the engine meanwhile, serve until told to stop."""

from __future__ import annotations

import logging
from importlib.metadata import version

from prometheus_client import CollectorRegistry

from jaxserve.core.config import ServeConfig
from jaxserve.launch.build import Progress, build_engine, find_model
from jaxserve.launch.memory import settle_heap
from jaxserve.server.keys import read_keys
from jaxserve.server.lifecycle import serve_app
from jaxserve.server.limits import connection_limits, raise_open_files
from jaxserve.server.openai.app import create_app
from jaxserve.server.openai.config import AppConfig
from jaxserve.server.openai.hosts import hosts_of, is_loopback
from jaxserve.server.openai.slot import EngineSlot
from jaxserve.server.tls import tls_context
from jaxserve.telemetry.metrics import EngineMetrics
from jaxserve.telemetry.tracing import exporting_tracer

_LOG = logging.getLogger(__name__)
_OPEN_TO_ALL = "whoever reaches it can use it and spend its time; set --api-key-file (or --host 127.0.0.1)"


def run(config: ServeConfig, progress: Progress | None = None) -> None:
    """Serves a model until SIGTERM, SIGINT or SIGHUP, then drains and returns.

    Args:
        config: What to serve and how.
        progress: Is told how far downloading, loading and compiling are.

    Raises:
        JaxserveError: The model cannot be found, loaded or served as configured.
    """
    release = version("jaxserve")
    # What is wrong with these shows before a model is fetched.
    keys = _keys(config)
    tls = tls_context(config.tls_cert, config.tls_key)
    limits = connection_limits(config.max_connections, open_files=raise_open_files())
    if not keys and not is_loopback(config.host):
        _LOG.warning("listening on %s without an API key: %s", config.host, _OPEN_TO_ALL)
    model = find_model(config, progress)
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
            api_keys=keys,
            allowed_hosts=hosts_of(config.allowed_hosts, listens_on=config.host),
            allowed_origins=config.allowed_origins,
            max_body_bytes=config.max_body_bytes,
            request_timeout_s=config.request_timeout_s,
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
        limits=limits,
        tls=tls,
    )


def _keys(config: ServeConfig) -> tuple[str, ...]:
    from_file = () if config.api_key_file is None else read_keys(config.api_key_file)
    return tuple(dict.fromkeys((*config.api_key, *from_file)))
