"""Chat templates: equal to transformers, safe, and one sentence when they fail."""

import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jaxserve.core.errors import InvalidRequestError
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.template_pool import TemplatePool

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "chat_cases.json").read_text(encoding="utf-8"))
GOLDENS = json.loads((DATA / "text_goldens.json").read_text(encoding="utf-8"))
HI = [{"role": "user", "content": "hi"}]
NESTED: list[Any] = []
for _ in range(5000):
    NESTED = [NESTED]
POOL = TemplatePool()
"""Shared, for each of its processes takes 0.1 s to start."""


def make(source: str, **options: Any) -> ChatTemplate:
    return ChatTemplate(source, GOLDENS["special_tokens"], pool=POOL, **options)


def render(source: str, messages: list[dict[str, Any]] = HI, **kwargs: Any) -> str:
    return make(source, refuse_dropped=False).render(messages, **kwargs)


@pytest.mark.parametrize(
    "case", GOLDENS["chats"], ids=lambda case: f"{case['template']}-{case['conversation']}-{case['options']}"
)
def test_texts_equal_transformers(case: Mapping[str, Any]) -> None:
    template = make(CASES["templates"][case["template"]], refuse_dropped=False)
    messages, options = CASES["conversations"][case["conversation"]], CASES["options"][case["options"]]
    if case["text"] is None:
        with pytest.raises(InvalidRequestError):
            template.render(messages, **options)
    else:
        assert template.render(messages, **options) == case["text"]


LOST = {"tools": '"weather"', "documents": "x < y", "messages.1.tool_calls": "Paris"}
"""What is missing in the text when a parameter is refused."""


@pytest.mark.parametrize("name", CASES["templates"])
def test_texts_equal_transformers_or_something_would_be_lost(name: str) -> None:
    template = make(CASES["templates"][name])
    for case in [case for case in GOLDENS["chats"] if case["template"] == name and case["text"] is not None]:
        messages, options = CASES["conversations"][case["conversation"]], CASES["options"][case["options"]]
        text, refused = "", ""
        try:
            text = template.render(messages, **options)
        except InvalidRequestError as error:
            refused = error.param or ""
        assert LOST[refused] not in case["text"] if refused else text == case["text"]


def test_inputs_are_not_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "x "}], "reasoning": "r"}]
    before = json.dumps(messages)
    render(CASES["templates"]["parts"], messages, add_generation_prompt=False, continue_final_message=True)
    assert json.dumps(messages) == before


def test_tool_template_is_used_with_tools() -> None:
    template = make("plain", tool_source="{{ tools[0].name }}")
    assert template.render(HI) == "plain"
    assert template.render(HI, tools=[{"name": "f"}]) == "f"


def test_values_that_are_not_of_plain_json() -> None:
    """What Python programs pass; transformers shows the same."""
    source = "{% for k, v in x.items() %}{{ k }}={{ v }};{% endfor %}"
    values = OrderedDict(
        big=10**30, half=0.5, nan=float("nan"), less=-float("inf"), pair=(1, "\ud800"), yes=True, no=None
    )
    assert render(source, x=values) == f"big={10**30};half=0.5;nan=nan;less=-inf;pair=[1, '\\ud800'];yes=True;no=None;"
    assert render("{{ x }}", x='\ud800é\n"') == '\ud800é\n"'


def test_kwargs_win_over_special_tokens() -> None:
    assert render("{{ bos_token }}{{ extra }}", bos_token="<b>", extra=1) == "<b>1"
    assert render("{{ other }}", other=[1, {"a": None}]) == "[1, {'a': None}]"


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_one_template_renders_again_and_again() -> None:
    template = make(CASES["templates"]["blocks"])
    assert template.render(HI) == template.render(HI)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 256 | tojson }}", "256"),
        ("{{ [100000, 1] | tojson }}", "[100000, 1]"),
        ("{{ {'max': 99999999} | tojson(indent=4) }}", '{\n    "max": 99999999\n}'),
        ("{{ 10**8 }} {{ 2 ** -40000 }}", "100000000 0.0"),
        ("{{ 'ab' | truncate(10**9) }}", "ab"),
        ("{{ 'ab' | wordwrap(10**9) }}", "ab"),
        ("{{ 'a' | indent(70000, true) | length }}", "70001"),
        ("{{ ('%05d %-12345s|' % (1, 'a')) | length }}", "12352"),
        ("{{ '{:>12345}'.format(1) | length }}", "12345"),
        ("{{ ('a' * 200000).replace('a', 'bc') | length }}", "400000"),
        ("{{ (2**2000) % 1000 }}", "376"),
        ("{{ [1, 2, 3] | batch(1000000) | list }}", "[[1, 2, 3]]"),
        ("{{ 'abc'.translate({97: 'x'}) }}", "xbc"),
    ],
)
def test_what_costs_little_is_rendered(source: str, text: str) -> None:
    """Large numbers are no attack; what is bounded is what a template takes and writes."""
    assert render(source) == text


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
def test_malformed_template_is_refused(source: str) -> None:
    template = make(source)
    with pytest.raises(InvalidRequestError, match="not valid Jinja"):
        template.check()
    with pytest.raises(InvalidRequestError, match=r"not valid Jinja: .* Use /v1/completions, or serve the model with"):
        template.render(HI)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["text"], r"messages\[0\] must be an object"),
        ([{"role": "user", "content": object()}], r"messages holds a object, which is not a JSON value"),
        ([{"role": "user", "content": b"x"}], r"holds a bytes"),
        ([], r"at least one"),
        ([{"role": "user", "content": 10**5000}], r"too many digits"),
        ([{"role": "user", "content": NESTED}], r"messages is nested too deeply"),
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
        make("x").render(HI, messages=[])


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


def test_long_conversations_are_rendered() -> None:
    messages = [{"role": "user", "content": "word " * 200}] * 8000
    assert len(make(CASES["templates"]["llama3"]).render(messages)) > 8_000_000
