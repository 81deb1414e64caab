"""Bodies are read as their types say, whatever JSON comes, and no body builds much more than it is worth."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import InvalidRequestError
from jaxserve.server.openai.body import body_decoder
from jaxserve.server.openai.decode import BodyDecoder
from jaxserve.server.openai.parameters import CHAT, COMPLETIONS, DETOKENIZE
from jaxserve.server.openai.schema import ChatBody, CompletionBody, DetokenizeBody

CHATS = body_decoder(ChatBody, CHAT)
TEXTS_BODIES = body_decoder(CompletionBody, COMPLETIONS)
DETOKENIZE_BODIES = body_decoder(DetokenizeBody, DETOKENIZE)

TEXTS = st.text(max_size=4) | st.sampled_from(["user", "text", "role", "content", "type", 'a\u00e9\\"'])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, -0.0, 1e300, 2**63, 10**30]) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
MESSAGES = [{"role": "user", "content": "hi"}]


def is_int(value: Any, low: float = -math.inf, high: float = 2**63 - 1) -> bool:
    return type(value) is int and low <= value <= high


def is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def is_text(value: Any, low: int = 0, high: float = math.inf) -> bool:
    return isinstance(value, str) and low <= len(value) <= high


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(is_int(each, 0) for each in value)


def is_stops(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(is_text(each, 1, 1024) for each in value)


def is_prompt(value: Any) -> bool:
    def ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(is_int(each, high=math.inf) for each in value)

    if isinstance(value, str) or ids(value):
        return True
    return isinstance(value, list) and bool(value) and (all(map(is_text, value)) or all(map(ids, value)))


# What each field takes, written down a second time.
RULES: dict[str, Callable[[Any], bool]] = {
    "max_tokens": lambda v: is_int(v, 0),
    "max_completion_tokens": lambda v: is_int(v, 1),
    "n": lambda v: is_int(v, 1),
    "temperature": lambda v: is_number(v, 0, 2),
    "top_p": lambda v: is_number(v, 0, 1) and v != 0,
    "min_p": lambda v: is_number(v, 0, 1),
    "top_k": lambda v: is_int(v, -1),
    "seed": lambda v: is_int(v, -(2**63), 2**63 - 1),
    "presence_penalty": lambda v: is_number(v, -2, 2),
    "repetition_penalty": lambda v: is_number(v, 0.01, 100),
    "stream": lambda v: isinstance(v, bool),
    "echo": lambda v: isinstance(v, bool),
    "user": lambda v: is_text(v, 0, 512),
    "cache_salt": lambda v: is_text(v, 1, 1024),
    "stop": lambda v: is_text(v, 1, 1024) or is_stops(v),
    "bad_words": is_stops,
    "stop_token_ids": is_ids,
    "allowed_token_ids": is_ids,
    "prompt_logprobs": lambda v: is_int(v, 0, 20),
    "logit_bias": lambda v: isinstance(v, dict) and all(x is None or is_number(x, -100, 100) for x in v.values()),
    "metadata": lambda v: isinstance(v, dict) and all(x is None or is_text(x, 0, 512) for x in v.values()),
    "chat_template_kwargs": lambda v: isinstance(v, dict),
    "store": lambda v: v is False,
    "nonsense": lambda v: False,
}


def read(bodies: BodyDecoder[Any], body: Any) -> Any:
    """The body, or the error that it gets."""
    try:
        return bodies.decode(body if isinstance(body, bytes) else json.dumps(body).encode())
    except InvalidRequestError as error:
        return error


@given(name=st.sampled_from(sorted(RULES)), value=VALUES)
def test_verdicts_follow_the_rules(name: str, value: Any) -> None:
    found = read(CHATS, {"model": "m", "messages": MESSAGES, name: value})
    if value is not None and not RULES[name](value):
        assert isinstance(found, InvalidRequestError)
        assert (found.param or "").split(".")[0] == name
        assert name in found.message
        return
    assert isinstance(found, ChatBody)
    kept = getattr(found, name, None)
    if isinstance(value, dict) and name != "chat_template_kwargs":
        value = {key: each for key, each in value.items() if each is not None}
    assert kept is None if name == "store" else kept == (tuple(value) if isinstance(kept, tuple) else value)


@given(value=VALUES)
def test_prompts(value: Any) -> None:
    found = read(TEXTS_BODIES, {"model": "m", "prompt": value})
    if not is_prompt(value):
        assert found.param == "prompt"
        return
    single = isinstance(value, str) or isinstance(value[0], int)
    assert found.prompt == tuple(tuple(p) if isinstance(p, list) else p for p in ([value] if single else value))


@given(value=VALUES)
def test_any_json_at_all(value: Any) -> None:
    """Whatever comes is a body or one error, also where messages are made of it."""
    message = {"role": "assistant", "content": value, "tool_calls": value}
    for body in (value, *({"model": "m", "messages": each} for each in (value, [value], [message]))):
        found = read(CHATS, body)
        if isinstance(found, InvalidRequestError):
            assert found.param
            assert found.message.endswith(".")
            assert found.message.isprintable()


@given(data=st.binary(max_size=40))
def test_any_bytes_at_all(data: bytes) -> None:
    assert read(CHATS, data).param


FULL: dict[str, Any] = {
    "model": "m",
    "stream": True,
    "stream_options": {"include_usage": True},
    "metadata": {"a": "b"},
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"deep": {"kept": None}}}}]},
        {"role": "tool", "content": "y", "tool_call_id": "1"},
    ],
    "chat_template_kwargs": {"kept": None, "inner": [{"kept": None}]},
}  # fmt: skip


def objects_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of our objects, which hold fields of ours, not a template's."""
    if isinstance(value, list):
        return [found for i, item in enumerate(value) for found in objects_in(item, (*path, i))]
    if not isinstance(value, dict):
        return []
    ours = {k: v for k, v in value.items() if k not in ("arguments", "cache_control", "chat_template_kwargs")}
    return [path, *(found for key, item in ours.items() for found in objects_in(item, (*path, key)))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


@given(data=st.data())
def test_a_null_changes_nothing_at_any_depth(data: st.DataObject) -> None:
    paths = objects_in(FULL)
    assert len(paths) == 9
    body = json.loads(json.dumps(FULL))
    for path in data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=4)):
        name = data.draw(st.sampled_from(["unknown", "refusal", "index", "user", "annotations", "seed", "reasoning"]))
        at(body, path).setdefault(name)
    assert read(CHATS, body) == read(CHATS, FULL)


def test_a_templates_values_keep_their_nulls() -> None:
    body = CHATS.decode(json.dumps({**FULL, "unknown": None}).encode())
    assert body.chat_template_kwargs == FULL["chat_template_kwargs"]
    calls = body.messages[1].tool_calls
    assert calls is not None
    assert calls[0].function.arguments == {"deep": {"kept": None}}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "user", "content": "", "x": 1}], "messages.0.x"),
        ([{"role": "user", "content": "", "x": None}, {"role": "user", "content": "", "y": 1}], "messages.1.y"),
        ([{"role": "user", "content": [{"type": "text", "text": "", "x": None, "y": 1}]}], "messages.0.content.0.y"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "messages.0.content.0.text"),
        ([{"role": None, "content": ""}], "messages.0.role"),
        ([None], "messages.0"),
    ],
)
def test_paths(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        CHATS.decode(json.dumps({"model": "m", "messages": messages}).encode())
    assert error.value.param == param


def test_the_first_fault_is_told() -> None:
    assert read(CHATS, b'{"n":"x","seed":"y","zzz":1,"messages":[{}]}').param == "n"
    assert read(CHATS, b'{"messages":[{},{"role":"x"},{"role":"y"}]}').param == "messages.0.role"


def test_long_names_are_cut_in_errors() -> None:
    for body in ({"z" * 10_000: 1}, {"messages": [{"role": "user", "content": "", "z" * 10_000: 1}]},
                 {"logit_bias": {"z" * 10_000: "x"}}, {"messages": [{"role": "z" * 10_000}]}):  # fmt: skip
        with pytest.raises(InvalidRequestError) as error:
            CHATS.decode(json.dumps(body).encode())
        assert len(error.value.message) < 400
        assert len(str(error.value.param)) < 400


def test_token_ids_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [*range(5000), 2**31]
    data = json.dumps({"tokens": ids}).encode()
    monkeypatch.setattr("jaxserve.server.openai.decode._PIECE_BYTES", 7)
    assert DETOKENIZE_BODIES.decode(data).tokens == tuple(ids)
    assert DETOKENIZE_BODIES.decode(b'{"tokens": [ ]}').tokens == ()
    assert read(DETOKENIZE_BODIES, {"tokens": [*ids, "x"]}).param == "tokens.5001"
    assert read(DETOKENIZE_BODIES, {"tokens": [*ids, -1]}).param == "tokens.5001"
    for tokens in ([1, 2, [3, 4, 5, 6, 7]], [1, "2,3,4,5,6,7,8"], {"1": 2}, "1,2"):
        assert read(DETOKENIZE_BODIES, {"tokens": tokens}).param.startswith("tokens")


HEAD = b'{"model":"m","messages":['
USER = HEAD + b'{"role":"user","content":"a"}],'
SIZE = 1_000_000


def filled(head: bytes, item: bytes, tail: bytes) -> bytes:
    return head + b",".join([item] * ((SIZE - len(head) - len(tail)) // (len(item) + 1))) + tail


CRAFTED: dict[str, bytes] = {
    "empty parts": filled(HEAD + b'{"role":"user","content":[', b"{}", b"]}]}"),
    "parts": filled(HEAD + b'{"role":"user","content":[', b'{"type":"text","text":""}', b"]}]}"),
    "parts over many messages": filled(HEAD, b'{"role":"user","content":[' + b"{}," * 99 + b"{}]}", b"]}"),
    "messages": filled(HEAD, b'{"role":"user","content":""}', b"]}"),
    "numbers for messages": filled(HEAD, b"0", b"]}"),
    "tool calls": filled(HEAD + b'{"role":"assistant","tool_calls":[', b"{}", b"]}]}"),
    "annotations": filled(HEAD + b'{"role":"assistant","content":"","annotations":[', b"[]", b"]}]}"),
    "arguments": filled(
        HEAD + b'{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":{"a":[', b"[]", b"]}}}]}]}"
    ),
    "template variables": filled(USER + b'"chat_template_kwargs":{"a":[', b"[]", b"]}}"),
    "nested template variables": USER + b'"chat_template_kwargs":{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}}",
    "fields": b"{" + b",".join(b'"%x":0' % i for i in range(100_000)) + b"}",
    "logit_bias": USER + b'"logit_bias":{' + b",".join(b'"%x":0' % i for i in range(100_000)) + b"}}",
    "metadata": USER + b'"metadata":{' + b",".join(b'"%x":""' % i for i in range(100_000)) + b"}}",
    "stop": filled(USER + b'"stop":[', b'"a"', b"]}"),
    "stream_options": filled(USER + b'"stream_options":{"x":[', b"[]", b"]}}"),
    "unknown field": filled(USER + b'"zzz":[', b"[]", b"]}"),
    "refused field": filled(USER + b'"response_format":[', b"[]", b"]}"),
    "scalar field": filled(USER + b'"seed":[', b"[]", b"]}"),
    "token ids": filled(USER + b'"stop_token_ids":[', b"3000", b"]}"),
    "digits": USER + b'"seed":' + b"9" * SIZE + b"}",
    "escapes": HEAD + b'{"role":"user","content":"' + b"\\u0041" * (SIZE // 6) + b'"}]}',
    "surrogates": HEAD + b'{"role":"user","content":"' + b"\\ud83d\\ude00" * (SIZE // 12) + b'"}]}',
    "brackets in a text": HEAD + b'{"role":"user","content":"' + b",[{" * (SIZE // 3) + b'"}]}',
    "quotes": b'"' * SIZE,
    "brackets": b"[" * SIZE,
    "blanks": b" " * SIZE,
}


@pytest.mark.parametrize("name", CRAFTED)
def test_no_body_builds_more_than_ten_times_its_size(name: str) -> None:
    """What is built is counted, not the time it takes: decoding holds Python's lock while it builds."""
    data = CRAFTED[name]
    assert len(data) >= 0.7 * SIZE
    tracemalloc.start()
    read(CHATS, data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * len(data)


def many(item: str, number: int) -> str:
    return ",".join([item] * number)


ONE = '"messages":[{"role":"user","content":""}],'
PARTS = '{"role":"user","content":[' + many('{"type":"text","text":""}', 100) + "]}"
CALLS = '{"role":"assistant","tool_calls":[' + many('{"function":{"name":""}}', 100) + "]}"
BOUNDS = {
    "16384 messages": '"messages":[' + many('{"role":"user","content":""}', 16_385) + "]",
    "16384 parts over all messages": '"messages":[' + many(PARTS, 164) + "]",
    "16384 tool calls over all messages": '"messages":[' + many(CALLS, 164) + "]",
    "more than 65536 values": ONE + '"chat_template_kwargs":{"a":[' + many("0", 65_537) + "]}",
    "at most 16 entries": ONE + '"metadata":{' + ",".join(f'"{i}":""' for i in range(17)) + "}",
    "at most 300 entries": ONE + '"logit_bias":{' + ",".join(f'"{i}":0' for i in range(301)) + "}",
    "128 levels": ONE + '"chat_template_kwargs":{"a":' + "[" * 127 + "]" * 127 + "}",
    "256 fields": ",".join(f'"field{i:08}":null' for i in range(257)),
}


@pytest.mark.parametrize("what", BOUNDS)
def test_bounds_are_told(what: str) -> None:
    assert what in read(CHATS, b'{"model":"m",' + BOUNDS[what].encode() + b"}").message


def test_large_conversations_are_read() -> None:
    """Within the bounds: as many calls as there may be, a text of a million commas."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": ",[" * 1000}] * 1000
    messages += [{"role": "assistant", "tool_calls": [call]}] * 15_000
    assert len(read(CHATS, {"model": "m", "messages": messages}).messages) == 16_000
