"""What `launch.serve` makes of its settings, without a socket and without weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from server_harness import make_engine

from jaxserve.core.config import ServeConfig, load
from jaxserve.core.errors import ConfigError
from jaxserve.engine.api import Engine
from jaxserve.launch import serve
from jaxserve.launch.build import find_model
from jaxserve.server.openai.config import AppConfig
from jaxserve.server.openai.hosts import LOOPBACK

TEXT_DATA = Path(__file__).parents[1] / "text" / "data"
CONFIG = ServeConfig(model="random:smollm2-135m")


@dataclass
class Wired:
    """What `serve.run` has put together.

    Attributes:
        app: Settings of the app.
        engine: What was to be drained and closed.
        start: Makes the engine.
        others: What else the server is told.
    """

    app: list[AppConfig] = field(default_factory=list)
    engine: list[Engine] = field(default_factory=list)
    start: list[Callable[[], None]] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def wired(monkeypatch: pytest.MonkeyPatch) -> Wired:
    wired = Wired()

    def create_app(slot: Engine, tokenizer: object, template: object, config: AppConfig, **given: object) -> object:
        wired.app.append(config)
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
    from jaxserve.launch import build
    from jaxserve.text.tokenizer import tokenizer_from_folder

    tokenizer = tokenizer_from_folder(TEXT_DATA / "llama3_folder", eos_token_ids=(2,))
    monkeypatch.setattr(build, "load_tokenizer", lambda source: tokenizer)
    template = find_model(CONFIG).chat_template
    assert template is not None
    messages = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert template.render(messages) == "<|im_start|>Hi"
    assert template.render(messages, tools=tools) == "tools:1"


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
