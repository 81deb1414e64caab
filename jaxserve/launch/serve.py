"""`jaxserve serve`: listen at once, make the engine meanwhile, serve until told to stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version

from prometheus_client import CollectorRegistry

from jaxserve.core.config import ServeConfig
from jaxserve.core.errors import JaxserveError
from jaxserve.launch.build import Model, Progress, build_engine, find_model
from jaxserve.launch.memory import settle_heap
from jaxserve.server.keys import read_keys
from jaxserve.server.lifecycle import serve_app
from jaxserve.server.limits import connection_limits, raise_open_files
from jaxserve.server.openai.app import create_app
from jaxserve.server.openai.callers import Callers
from jaxserve.server.openai.config import AppConfig, CallerPolicy
from jaxserve.server.openai.hosts import hosts_of, is_loopback
from jaxserve.server.openai.slot import EngineSlot
from jaxserve.server.tls import tls_context
from jaxserve.telemetry.metrics import EngineMetrics
from jaxserve.telemetry.tracing import exporting_tracer
from jaxserve.text.chat import ChatTemplate

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
    policy = _policy(config)
    shares = Callers(keys, policy).shares
    tls = tls_context(config.tls_cert, config.tls_key)
    limits = connection_limits(config.max_connections, open_files=raise_open_files())
    if not keys and not is_loopback(config.host):
        _LOG.warning("listening on %s without an API key: %s", config.host, _OPEN_TO_ALL)
    model = find_model(config, progress)
    _tell_sampling_defaults(model)
    registry = CollectorRegistry()
    tracer = None
    if config.otlp_endpoint is not None:
        tracer = exporting_tracer(config.otlp_endpoint, service_name="jaxserve", version=release)
    slot = EngineSlot("The engine is loading and compiling; try again in a few seconds.")
    names = tuple(dict.fromkeys((*config.served_model_name, model.name)))
    metrics = EngineMetrics(registry, names[0])
    app_config = replace(_app_config(config, model, names, release), api_keys=keys, callers=policy)
    app = create_app(
        slot,
        model.tokenizer,
        model.chat_template,
        app_config,
        registry=registry,
        tracer=tracer,
    )

    def start() -> None:
        with _checking(model.chat_template):
            engine = build_engine(config, model, observer=metrics, progress=progress, shares=shares)
        settle_heap()
        slot.fill(engine)

    try:
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
    finally:
        if model.chat_template is not None:
            model.chat_template.close()


def _keys(config: ServeConfig) -> tuple[str, ...]:
    from_file = () if config.api_key_file is None else read_keys(config.api_key_file)
    return tuple(dict.fromkeys((*config.api_key, *from_file)))


def _policy(config: ServeConfig) -> CallerPolicy:
    return CallerPolicy(
        trusted_proxies=config.trusted_proxies,
        min_priority=config.min_priority,
        max_priority=config.max_priority,
        share_prefix_cache=config.share_prefix_cache,
    )


def _app_config(config: ServeConfig, model: Model, names: tuple[str, ...], release: str) -> AppConfig:
    return AppConfig(
        served_model_names=names,
        version=release,
        allowed_hosts=hosts_of(config.allowed_hosts, listens_on=config.host),
        allowed_origins=config.allowed_origins,
        max_body_bytes=config.max_body_bytes,
        request_timeout_s=config.request_timeout_s,
        sampling_defaults=model.sampling_defaults,
    )


def _tell_sampling_defaults(model: Model) -> None:
    if said := model.sampling_defaults.said():
        named = ", ".join(f"{name}={value:g}" for name, value in said.items())
        _LOG.info("sampling defaults of the model: %s (--generation-config none takes neutral ones)", named)


@contextmanager
def _checking(template: ChatTemplate | None) -> Iterator[None]:
    """Gets the template ready beside what is done here, so that the first chat need not wait for it.

    A model whose template is not valid is served: only its chats are refused, with the reason.
    """

    def check() -> None:
        assert template is not None
        try:
            template.check()
        except JaxserveError as error:
            _LOG.warning("chats will be refused: %s", error.message)

    checker = threading.Thread(target=check, name="jaxserve-chat-template", daemon=True)
    if template is not None:
        checker.start()
    yield
    if template is not None:
        checker.join()
