"""What a template drops is mapped or refused; templates of the kinds that models have, each cut down to that."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.core.errors import InvalidRequestError
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.template_pool import TemplatePool

POOL = TemplatePool()

GENERIC = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
"""ChatML of the plain sort (SmolLM2, Qwen 1.5): any role, and nothing of tools."""

QWEN = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% else %}<system>You are helpful{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}<{{ m.role }}>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<assistant>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "{% elif m.role == 'tool' %}<result>{{ m.content }}{% endif %}{% endfor %}"
)
"""Drops developer; knows tools (Qwen 2.5, Qwen 3)."""

GRANITE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role in ('system', 'user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)
"""Drops developer, tool calls and tool messages, and knows tools."""

ALTERNATING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
"""Raises for all but user and assistant, and drops tool calls (Gemma 2)."""

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endif %}"
    "{% endfor %}"
)
"""Drops everything else (the first Phi 3)."""

STRICT_SYSTEM = (
    "{% set rest = messages %}{% if messages[0].role == 'system' %}[{{ messages[0].content }}]"
    "{% set rest = messages[1:] %}{% endif %}{% for m in rest %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('Unexpected role ' ~ m.role) }}{% endif %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}"
)
"""Raises for developer and for a second system message; changes the case (Mistral, Qwen 3.5)."""

FIRST_SYSTEM_ONLY = "{% if messages[0].role == 'system' %}[{{ messages[0].content }}]{% endif %}" + NO_SYSTEM
"""Drops every system message but the first (SmolLM 3)."""

TEXT_ARGUMENTS = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}{% for c in m.tool_calls %}"
    "[{{ c.function.name + ' ' + c.function.arguments }}]{% endfor %}"
    "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)
"""Joins arguments as text (DeepSeek V3, R1)."""

ID_ONLY = (
    "{% for m in messages %}<{{ m.name or m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.id }} {{ c.function.arguments | tojson }}]{% endfor %}{% endfor %}"
)
"""Shows ids of tool calls instead of names; shows names of speakers (Kimi K2)."""


def message(role: str, content: str = "c", **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def calling(arguments: object = None) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": "Paris"} if arguments is None else arguments}
    return message("assistant", "", tool_calls=[{"id": "call_1", "type": "function", "function": function}])


def make(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, pool=POOL)


USER = message("user", "u")
ANSWER = message("assistant", "a")
RESULT = message("tool", "20 degrees", tool_call_id="call_1")
DEVELOPER, SYSTEM = message("developer", "d"), message("system", "s")


@pytest.mark.parametrize(
    ("source", "chat", "text"),
    [
        (GENERIC, [DEVELOPER, USER], "<developer>d<user>u"),
        (GENERIC, [USER, ANSWER, RESULT], "<user>u<assistant>a<tool>20 degrees"),
        (QWEN, [DEVELOPER, USER], "<system>d<user>u"),
        (QWEN, [SYSTEM, DEVELOPER, USER], "<system>s<system>d<user>u"),
        (QWEN, [USER, ANSWER, DEVELOPER, USER], "<system>You are helpful<user>u<assistant>a<system>d<user>u"),
        (
            QWEN,
            [USER, calling(), RESULT],
            '<system>You are helpful<user>u<assistant>[weather {"city": "Paris"}]<result>20 degrees',
        ),
        (GRANITE, [DEVELOPER, USER], "<system>d<user>u"),
        (STRICT_SYSTEM, [DEVELOPER, USER], "[d]<user>U"),
        (FIRST_SYSTEM_ONLY, [DEVELOPER, USER], "[d]<user>u"),
        (TEXT_ARGUMENTS, [USER, calling(), RESULT], '<user>u[weather {"city": "Paris"}]<tool>20 degrees'),
        (TEXT_ARGUMENTS, [USER, calling("{}"), RESULT], "<user>u[weather {}]<tool>20 degrees"),
        (ID_ONLY, [USER, calling()], '<user>u<assistant>[call_1 {"city": "Paris"}]'),
        (ID_ONLY, [message("user", name="ann"), message("user", name="bob")], "<ann>c<bob>c"),
        # A name that tells nobody apart is decoration, as is that of a tool, whose call has it.
        (GENERIC, [message("user", name="ann"), message("assistant", name="bot"), USER], "<user>c<assistant>c<user>u"),
        (QWEN, [message("user", name="ann"), message("user", name="ann")], "<system>You are helpful<user>c<user>c"),
        (GENERIC, [USER, message("tool", name="f"), message("tool", name="g")], "<user>u<tool>c<tool>c"),
        # Templates drop reasoning of earlier turns on purpose.
        (GENERIC, [USER, message("assistant", reasoning_content="hm"), USER], "<user>u<assistant>c<user>u"),
        (GENERIC, [USER, message("assistant", tool_calls=[])], "<user>u<assistant>c"),
    ],
)
def test_what_the_template_shows(source: str, chat: list[dict[str, Any]], text: str) -> None:
    assert make(source).render(chat, add_generation_prompt=False) == text


@pytest.mark.parametrize(
    ("source", "chat", "param", "what"),
    [
        (GENERIC, [USER, calling(), RESULT], "messages.1.tool_calls", "tool calls of earlier messages"),
        (GRANITE, [USER, calling(), RESULT], "messages.1.tool_calls", "tool calls of earlier messages"),
        (ALTERNATING, [USER, calling(), USER], "messages.1.tool_calls", "tool calls of earlier messages"),
        (GRANITE, [USER, RESULT], "messages.1.role", "messages of the role tool"),
        (NO_SYSTEM, [SYSTEM, USER], "messages.0.role", "messages of the role system"),
        (NO_SYSTEM, [DEVELOPER, USER], "messages.0.role", "messages of the role developer"),
        (FIRST_SYSTEM_ONLY, [SYSTEM, DEVELOPER, USER], "messages.1.role", "all but one message of the role developer"),
        (FIRST_SYSTEM_ONLY, [USER, ANSWER, SYSTEM], "messages.2.role", "messages of the role system behind others"),
        (GENERIC, [message("user", name="ann"), ANSWER, message("user", name="bob")], "messages.2.name", "names"),
        (QWEN, [message("assistant", name="a"), message("assistant", name="b")], "messages.1.name", "more than one"),
    ],
)
def test_what_the_template_would_drop(source: str, chat: list[dict[str, Any]], param: str, what: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"^{param}: the model's chat template drops .*{what}") as caught:
        make(source).render(chat)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("source", "chat", "reason"),
    [
        (ALTERNATING, [SYSTEM, USER], "System role not supported"),
        (ALTERNATING, [DEVELOPER, USER], "Conversation roles must alternate"),
        (ALTERNATING, [USER, ANSWER, RESULT], "Conversation roles must alternate"),
        (STRICT_SYSTEM, [SYSTEM, DEVELOPER, USER], "Unexpected role system"),
        (STRICT_SYSTEM, [USER, RESULT], "Unexpected role tool"),
    ],
)
def test_the_template_has_the_say_where_it_raises(source: str, chat: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"cannot render these messages: {reason}"):
        make(source).render(chat)


def test_tools_and_documents_are_shown_or_refused() -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    assert make(GRANITE).render([USER], tools=tools).startswith('[{"type": "function"')
    with pytest.raises(InvalidRequestError, match=r"^tools: ") as caught:
        make(GENERIC).render([USER], tools=tools)
    assert caught.value.param == "tools"
    with pytest.raises(InvalidRequestError, match=r"^documents: "):
        make(GENERIC).render([USER], documents=[{"text": "t"}])
    shown = "{% for d in documents or [] %}({{ d.text }}){% endfor %}" + GENERIC
    assert make(shown).render([USER], documents=[{"text": "t"}]) == "(t)<user>u"
    assert make(GENERIC).render([USER], tools=[], documents=[]) == "<user>u"


def test_a_template_that_shows_nothing_recognisable_is_left_alone() -> None:
    template = make("{% for m in messages %}{{ m.content | length }} {% endfor %}")
    assert template.render([SYSTEM, USER, calling(), RESULT]) == "1 1 0 10 "


def test_a_template_that_hangs_on_a_probe_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    hangs = "{% for m in messages if m.role == 'system' %}{% for i in range(99999) %}{% for j in range(99999) %}"
    template = ChatTemplate(f"{hangs}{{% endfor %}}{{% endfor %}}{{% endfor %}}{GENERIC}", {}, pool=POOL, timeout_s=0.3)
    assert template.render([USER]) == template.render([USER]) == "<user>u"
    [record] = caplog.records
    assert record.message == "what the chat template drops is not known: trying it out, it takes longer than 0.3 s"


def test_a_template_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    template = make(QWEN)
    template.check()
    asked = []
    render = POOL.render
    monkeypatch.setattr(POOL, "render", lambda *args, **kwargs: asked.append(args) or render(*args, **kwargs))
    template.render([DEVELOPER, USER])
    template.render([USER])
    assert len(asked) == 2
