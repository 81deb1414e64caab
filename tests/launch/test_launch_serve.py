"""What `launch.serve` makes of its settings, without a socket and without weights."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from server_harness import make_engine

from jaxserve.checkpoint.presets import default_presets_dir, read_preset
from jaxserve.checkpoint.sources import resolve_source
from jaxserve.core.config import ServeConfig, load
from jaxserve.core.errors import CheckpointError, ConfigError, InvalidRequestError, UnavailableError
from jaxserve.core.types import NO_DEFAULTS, SamplingDefaults
from jaxserve.engine.api import Engine
from jaxserve.launch import build, serve
from jaxserve.launch.build import find_model
from jaxserve.server.openai.config import AppConfig
from jaxserve.server.openai.hosts import LOOPBACK
from jaxserve.text.chat import ChatTemplate

TEXT_DATA = Path(__file__).parents[1] / "text" / "data"
CONFIG = ServeConfig(model="random:smollm2-135m")


@dataclass
class Wired:
    """What `serve.run` has put together.

    Attributes:
        app: Settings of the app.
        template: Its chat template.
        engine: What was to be drained and closed.
        start: Makes the engine.
        others: What else the server is told.
    """

    app: list[AppConfig] = field(default_factory=list)
    template: list[ChatTemplate] = field(default_factory=list)
    engine: list[Engine] = field(default_factory=list)
    start: list[Callable[[], None]] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def wired(monkeypatch: pytest.MonkeyPatch) -> Wired:
    wired = Wired()

    def create_app(
        slot: Engine, tokenizer: object, template: ChatTemplate, config: AppConfig, **given: object
    ) -> object:
        wired.app.append(config)
        wired.template.append(template)
        return object()

    def serve_app(app: object, engine: Engine, *, start: Callable[[], None], **given: Any) -> None:
        wired.engine.append(engine)
        wired.others.append(given)
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
    monkeypatch.setattr(build, "load_tokenizer", lambda source, spec: tokenizer)
    template = find_model(CONFIG).chat_template
    assert template is not None
    messages = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert template.render(messages) == "<|im_start|>Hi"
    assert template.render(messages, tools=tools) == "tools:1"


MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def given_templates(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Makes the model's tokenizer have certain templates."""
    from jaxserve.launch import build
    from jaxserve.text.tokenizer import tokenizer_from_folder

    def give(templates: dict[str, str]) -> None:
        tokenizer = tokenizer_from_folder(TEXT_DATA / "llama3_folder", eos_token_ids=(2,))
        tokenizer = type(tokenizer)(tokenizer.backend, replace(tokenizer.facts, chat_templates=templates))
        monkeypatch.setattr(build, "load_tokenizer", lambda source, spec: tokenizer)

    return give


@pytest.mark.usefixtures("thawed")
@pytest.mark.parametrize("source", ["{% if %}", "{{ messages[0].content }}"])
def test_the_template_is_checked_beside_the_engines_start(
    wired: Wired,
    given_templates: Callable[[dict[str, str]], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    """One warning about a template that is not valid, and the server starts; at its end no process is left."""
    found: list[object] = []

    def serve_app(app: object, slot: Engine, *, start: Callable[[], None], **given: object) -> None:
        start()
        found.append(slot.health().ready)
        [template] = wired.template
        try:
            found.append(template.render(MESSAGES))
        except InvalidRequestError as error:
            found.append(error.message)

    monkeypatch.setattr(serve, "serve_app", serve_app)
    given_templates({"default": source})
    serve.run(CONFIG)
    is_valid = source != "{% if %}"
    assert found[0] is True
    assert str(found[1]).startswith("Hi" if is_valid else "The chat template is not valid Jinja: ")
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == (
        []
        if is_valid
        else [
            "chats will be refused: The chat template is not valid Jinja: Expected an expression, got 'end of "
            "statement block'."
        ]
    )
    with pytest.raises(UnavailableError, match="is closed"):
        wired.template[0].render(MESSAGES)


def test_a_given_template_wins(given_templates: Callable[[dict[str, str]], None], tmp_path: Path) -> None:
    given_templates({"default": "model's", "tool_use": "model's for tools"})
    file = tmp_path / "mine.jinja"
    file.write_text("mine é {{ messages[0].content }} {{ tools }}", encoding="utf-8")
    template = find_model(load({"model": CONFIG.model, "chat_template": str(file)}, environ={})).chat_template
    assert template is not None
    assert template.render(MESSAGES) == "mine é Hi None"
    assert template.render(MESSAGES, tools=[{"name": "f"}]) == "mine é Hi [{'name': 'f'}]"
    template.close()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"\xff{{ x }}", "is not UTF-8"),
        (b"x" * ((1 << 20) + 1), "is larger than 1 MiB"),
        ("folder", "is not a file"),
        ("pipe", "is not a file"),
        (b"{% if %}", "The chat template is not valid Jinja: Expected an expression"),
    ],
)
def test_a_given_template_that_cannot_be_used_ends_the_start(
    tmp_path: Path, content: bytes | str | None, problem: str
) -> None:
    file = tmp_path / "mine.jinja"
    if content == "folder":
        file.mkdir()
    elif content == "pipe":
        os.mkfifo(file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        find_model(replace(CONFIG, chat_template=file))
    assert caught.value.param == "chat_template"
    assert str(file) in caught.value.message


def test_who_may_ask_reaches_the_app(wired: Wired, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("two\none\n")
    file.chmod(0o600)
    flags = {"model": CONFIG.model, "api_key": "one", "api_key_file": str(file), "allowed_origins": "https://a.example"}
    serve.run(load({**flags, "allowed_hosts": "a.example", "max_connections": "10"}, environ={}))
    [app] = wired.app
    assert app.api_keys == ("one", "two")
    assert app.allowed_origins == ("https://a.example",)
    assert app.allowed_hosts == ("a.example", *LOOPBACK)
    assert wired.others[0]["limits"].max_connections == 10
    assert wired.others[0]["tls"] is None


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [("127.0.0.1", None, False), ("localhost", None, False), ("0.0.0.0", None, True), ("::", None, True),
     ("0.0.0.0", "k", False)],
)  # fmt: skip
def test_listening_to_all_without_a_key_is_warned_of(
    wired: Wired, caplog: pytest.LogCaptureFixture, host: str, key: str | None, warns: bool
) -> None:
    serve.run(load({"model": CONFIG.model, "host": host, "api_key": key}, environ={}))
    assert [message.startswith(f"listening on {host} without an API key") for message in caplog.messages] == [
        True
    ] * warns
    assert (wired.app[0].allowed_hosts is None) == (host in ("0.0.0.0", "::"))


@pytest.mark.parametrize("setting", ["api_key_file", "tls_cert", "max_connections"])
def test_what_cannot_be_is_said_before_a_model_is_fetched(
    wired: Wired, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setattr(serve, "find_model", None)
    with pytest.raises(ConfigError):
        serve.run(load({setting: "99999999"}, environ={}))
