"""What `launch.serve` makes of its settings, without a socket and without weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from server_harness import make_engine

from jaxserve.checkpoint.presets import default_presets_dir, read_preset
from jaxserve.checkpoint.sources import resolve_source
from jaxserve.core.config import ServeConfig, load
from jaxserve.core.errors import CheckpointError
from jaxserve.core.types import NO_DEFAULTS, SamplingDefaults
from jaxserve.engine.api import Engine
from jaxserve.launch import build, serve
from jaxserve.launch.build import find_model
from jaxserve.server.openai.config import AppConfig

TEXT_DATA = Path(__file__).parents[1] / "text" / "data"
CONFIG = ServeConfig(model="random:smollm2-135m")


@dataclass
class Wired:
    """What `serve.run` has put together.

    Attributes:
        app: Settings of the app.
        engine: What was to be drained and closed.
        start: Makes the engine.
    """

    app: list[AppConfig] = field(default_factory=list)
    engine: list[Engine] = field(default_factory=list)
    start: list[Callable[[], None]] = field(default_factory=list)


@pytest.fixture
def wired(monkeypatch: pytest.MonkeyPatch) -> Wired:
    wired = Wired()

    def create_app(slot: Engine, tokenizer: object, template: object, config: AppConfig, **given: object) -> object:
        wired.app.append(config)
        return object()

    def serve_app(app: object, engine: Engine, *, start: Callable[[], None], **given: object) -> None:
        wired.engine.append(engine)
        wired.start.append(start)

    monkeypatch.setattr(serve, "create_app", create_app)
    monkeypatch.setattr(serve, "serve_app", serve_app)
    monkeypatch.setattr(serve, "build_engine", lambda *given, **named: make_engine())
    return wired


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_settings_reach_the_app(wired: Wired) -> None:
    flags: dict[str, Any] = {"model": CONFIG.model, "request_timeout_s": "2.5", "max_body_bytes": "1000"}
    serve.run(load({**flags, "served_model_name": "a,b", "api_key": "k"}, environ={}))
    [app] = wired.app
    assert app.request_timeout_s == 2.5
    assert app.max_body_bytes == 1000
    assert app.served_model_names[:2] == ("a", "b")
    assert app.api_keys == ("k",)
    assert load({"request_timeout_s": "none"}, environ={}).request_timeout_s is None


@pytest.mark.parametrize("flag", [None, "auto", "none"])
def test_sampling_defaults_reach_the_app(wired: Wired, monkeypatch: pytest.MonkeyPatch, flag: str | None) -> None:
    card = SamplingDefaults(temperature=0.6, top_k=20)
    monkeypatch.setattr(build, "load_sampling_defaults", lambda source, preset: card)
    serve.run(load({"model": CONFIG.model, "generation_config": flag}, environ={}))
    [app] = wired.app
    assert app.sampling_defaults == (NO_DEFAULTS if flag == "none" else card)


def test_presets_are_found_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    def defaults(source: object, preset: object) -> SamplingDefaults:
        given.append(preset)
        return NO_DEFAULTS

    monkeypatch.setattr(build, "load_sampling_defaults", defaults)
    monkeypatch.setattr(build, "resolve_source", lambda model, **given: resolve_source(CONFIG.model, **given))
    for model in ("smollm2-135m", "a/smollm2-135m"):
        find_model(ServeConfig(model=model))
    assert given == [read_preset("smollm2-135m", default_presets_dir()), None]


def test_defaults_that_no_request_could_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load_sampling_defaults", lambda source, preset: SamplingDefaults(top_p=0.0))
    with pytest.raises(CheckpointError, match=r"top_p must be greater than 0.*--generation-config none"):
        find_model(CONFIG)


@pytest.mark.usefixtures("thawed")
def test_what_exists_at_readiness_is_kept_out_of_garbage_collection(wired: Wired) -> None:
    serve.run(CONFIG)
    gc.unfreeze()
    [slot] = wired.engine
    assert not slot.health().ready
    wired.start[0]()
    assert slot.health().ready
    assert gc.get_freeze_count() > 1000


def test_template_for_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder has a template for tools beside the usual one; its config is not one of a model that can be served."""
    from jaxserve.text.tokenizer import tokenizer_from_folder

    tokenizer = tokenizer_from_folder(TEXT_DATA / "llama3_folder", eos_token_ids=(2,))
    monkeypatch.setattr(build, "load_tokenizer", lambda source: tokenizer)
    template = find_model(CONFIG).chat_template
    assert template is not None
    messages = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert template.render(messages) == "<|im_start|>Hi"
    assert template.render(messages, tools=tools) == "tools:1"
