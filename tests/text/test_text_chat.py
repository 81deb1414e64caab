"""Chat templates: equal to transformers, safe, bounded, and one sentence when they fail."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jaxserve.core.errors import InvalidRequestError
from jaxserve.text.chat import ChatTemplate

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "chat_cases.json").read_text(encoding="utf-8"))
GOLDENS = json.loads((DATA / "text_goldens.json").read_text(encoding="utf-8"))
HI = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, Any]] = HI, **kwargs: Any) -> str:
    return ChatTemplate(source, GOLDENS["special_tokens"], timeout_s=0.5).render(messages, **kwargs)


@pytest.mark.parametrize(
    "case", GOLDENS["chats"], ids=lambda case: f"{case['template']}-{case['conversation']}-{case['options']}"
)
def test_texts_equal_transformers(case: Mapping[str, Any]) -> None:
    template = ChatTemplate(CASES["templates"][case["template"]], GOLDENS["special_tokens"])
    messages, options = CASES["conversations"][case["conversation"]], CASES["options"][case["options"]]
    if case["text"] is None:
        with pytest.raises(InvalidRequestError):
            template.render(messages, **options)
    else:
        assert template.render(messages, **options) == case["text"]


def test_inputs_are_not_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "x "}], "reasoning": "r"}]
    before = json.dumps(messages)
    render(CASES["templates"]["parts"], messages, add_generation_prompt=False, continue_final_message=True)
    assert json.dumps(messages) == before


def test_tool_template_is_used_with_tools() -> None:
    template = ChatTemplate("plain", {}, tool_source="{{ tools[0].name }}")
    assert template.render(HI) == "plain"
    assert template.render(HI, tools=[{"name": "f"}]) == "f"


def test_kwargs_win_over_special_tokens() -> None:
    assert render("{{ bos_token }}{{ extra }}", bos_token="<b>", extra=1) == "<b>1"
    assert render("{{ other }}", other=[1, {"a": None}]) == "[1, {'a': None}]"


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_one_template_renders_again_and_again() -> None:
    template = ChatTemplate(CASES["templates"]["blocks"], {})
    assert template.render(HI) == template.render(HI)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"cannot render these messages: roles must alternate\."),
        ("{{ messages[0].nothing.at_all }}", r"has no attribute 'nothing'\."),
        ("{{ messages[0].content + 1 }}", r"cannot render"),
        ("{{ 1 // 0 }}", r"cannot render"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"cannot render"),
        ("{% include 'x' %}", r"cannot render"),
    ],
)
def test_failing_template_is_one_sentence(source: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        render(source)
    assert "\n" not in caught.value.message
    assert caught.value.message.endswith(".")


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | no_such_filter }}", "{% endfor %}", "{{", "{{ " + "(" * 10000])
def test_malformed_template_is_refused_at_once(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="not valid Jinja"):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["text"], r"messages\[0\] must be an object"),
        ([{"role": "user", "content": object()}], r"messages holds a object, which is not a JSON value"),
        ([{"role": "user", "content": b"x"}], r"holds a bytes"),
        ([], r"at least one"),
    ],
)
def test_wrong_messages_are_refused(messages: list[Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        render("x", messages)


def test_continue_and_generate_exclude_each_other() -> None:
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        render("x", add_generation_prompt=True, continue_final_message=True)


def test_kwargs_cannot_replace_fields() -> None:
    with pytest.raises(InvalidRequestError, match="may not set messages"):
        ChatTemplate("x", {}).render(HI, messages=[])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
        "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_python_stays_out_of_reach(source: str) -> None:
    try:
        text = render(source)
    except InvalidRequestError:
        return
    assert not any(word in text for word in ("class", "module", "globals", "built-in"))
    assert text == ""


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) if j < 0 %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | map('string') | join }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ [0] * 10**10 }}",
        "{{ 9**(9**9) }}",
        "{{ 2 ** -(9**9) }}",
        "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}"
        "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a'.center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '\n'.expandtabs(10**10) }}",
        "{{ 'a'.zfill(width) }}",
        "{{ 'a\nb' | indent(10**10) }}",
        "{{ [1] | tojson(indent=10**10) }}",
        "{{ [1] | batch(10**10, 0) | list }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10000000000) }}",
        "{{ strftime_now('%10000000000Y') }}",
        "{{ lipsum(10**9) }}",
    ],
)
def test_costs_are_bounded(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(InvalidRequestError):
        render(source, width=10**10)
    assert time.monotonic() - start < 5


def test_long_conversations_fit_the_bounds() -> None:
    messages = [{"role": "user", "content": "word " * 200}] * 2000
    text = ChatTemplate(CASES["templates"]["llama3"], {"bos_token": ""}).render(messages)
    assert len(text) > 2_000_000
