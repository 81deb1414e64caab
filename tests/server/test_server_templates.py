"""Chat templates behind the API: beside the event loop, refused with a reason, and in nobody's way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from server_harness import CHAT, COMPLETIONS, CONFIG, TEMPLATE, TOKENIZER, chat, client_of, completion, make_engine

from jaxserve.core.errors import OverloadedError
from jaxserve.engine.fake import FakeEngine
from jaxserve.server.openai.app import create_app
from jaxserve.server.openai.offload import Offload
from jaxserve.text import template_pool
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.template_pool import LARGE_BYTES, TemplatePool

SLOW = (
    "{% if messages[0].content == 'slow' %}{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}{% endif %}" + TEMPLATE
)


@pytest.fixture
def pool() -> Iterator[TemplatePool]:
    pool = TemplatePool()
    yield pool
    pool.close()


class Watched(ChatTemplate):
    """Notes the threads that ask it."""

    threads: set[int]

    def render(self, *args: object, **kwargs: object) -> str:  # type: ignore[override]  # passes everything on
        self.threads.add(threading.get_ident())
        return super().render(*args, **kwargs)  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize("size", [1, LARGE_BYTES + 1])
async def test_chats_are_rendered_beside_the_event_loop(engine: FakeEngine, pool: TemplatePool, size: int) -> None:
    template = Watched(TEMPLATE, {}, pool=pool)
    template.threads = set()
    async with client_of(create_app(engine, TOKENIZER, template, CONFIG)) as client:
        await client.post(CHAT, json=chat("A" * size))
        messages = [{"role": "user", "content": "A" * size}]
        assert (await client.post("/tokenize", json={"messages": messages})).status_code == 200
    assert template.threads
    assert threading.get_ident() not in template.threads


async def test_a_template_that_does_not_end_stops_only_its_own_request(engine: FakeEngine, pool: TemplatePool) -> None:
    template = ChatTemplate(SLOW, {}, pool=pool, timeout_s=1.5)
    template.check()
    async with client_of(create_app(engine, TOKENIZER, template, CONFIG)) as client:
        slow = asyncio.create_task(client.post(CHAT, json=chat("slow")))
        for _ in range(5):
            assert (await client.get("/health")).status_code == 200
            assert (await client.post(CHAT, json=chat("A"))).status_code == 200
        assert not slow.done()
        response = await slow
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert error["message"] == (
        "The chat template was stopped while it rendered these messages: it takes longer than 1.5 s."
    )


async def test_an_invalid_template_costs_only_the_chats(engine: FakeEngine, pool: TemplatePool) -> None:
    template = ChatTemplate("{% if %}", {}, pool=pool)
    async with client_of(create_app(engine, TOKENIZER, template, CONFIG)) as client:
        assert (await client.post(COMPLETIONS, json=completion())).status_code == 200
        for route in (CHAT, "/tokenize"):
            response = await client.post(route, json={"model": "fake", "messages": [{"role": "user", "content": "A"}]})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, "messages")
            assert error["message"].startswith("The chat template is not valid Jinja: Expected an expression, got")
            assert error["message"].endswith("Use /v1/completions, or serve the model with another --chat-template.")


async def test_no_process_for_templates(
    engine: FakeEngine, pool: TemplatePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_pool, "_BOOT", "raise SystemExit('no jinja here')")
    async with client_of(create_app(engine, TOKENIZER, ChatTemplate(TEMPLATE, {}, pool=pool), CONFIG)) as client:
        response = await client.post(CHAT, json=chat())
    assert response.status_code == 503
    assert "did not start (exit code 1): no jinja here" in response.json()["error"]["message"]


async def test_what_the_template_drops_is_mapped_or_refused(engine: FakeEngine, pool: TemplatePool) -> None:
    source = "{% for m in messages %}{% if m.role != 'developer' %}{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}"
    user = {"role": "user", "content": "A"}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    async with client_of(create_app(engine, TOKENIZER, ChatTemplate(source, {}, pool=pool), CONFIG)) as client:
        await client.post(CHAT, json=chat(messages=[{"role": "developer", "content": "x"}, user]))
        assert TOKENIZER.decode(engine.submitted[-1].prompt) == "system:x;user:A;"
        history = [user, {"role": "assistant", "content": None, "tool_calls": [call]}, user]
        response = await client.post(CHAT, json=chat(messages=history))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.1.tool_calls"


async def test_long_chats_do_not_hold_up_short_ones() -> None:
    """Long chats do not wait in the line of short ones nor short ones in theirs; who waits too long is told."""
    offload = Offload(patience_s=0.1)
    go = threading.Event()
    long = [asyncio.create_task(offload.run(LARGE_BYTES + 1, go.wait, renders=True)) for _ in range(4)]
    await asyncio.sleep(0)
    assert await offload.run(1, lambda: "short", renders=True) == "short"
    await asyncio.sleep(0.2)
    go.set()
    ends = await asyncio.gather(*long, return_exceptions=True)
    assert ends[:2] == [True, True]
    assert [type(end) for end in ends[2:]] == [OverloadedError] * 2
    assert await offload.run(LARGE_BYTES + 1, lambda: "long", renders=True) == "long"


async def test_the_engine_is_not_asked_for_what_cannot_be_rendered() -> None:
    engine = make_engine()
    async with client_of(create_app(engine, TOKENIZER, None, CONFIG)) as client:
        assert (await client.post(CHAT, json=chat())).status_code == 400
    assert not engine.submitted
    await engine.close()
