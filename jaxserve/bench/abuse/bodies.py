"""Requests that cost a server much more than they cost whoever sends them, each under a name.

All keep to the default limits on size (8 MiB of body) unless the name says otherwise. They are made one at a time, for
some are tens of megabytes.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from jaxserve.bench.abuse.cases import CHAT, COMPLETIONS
from jaxserve.bench.abuse.wire import Address, Attack, deliver, json_bytes, request

_MB = 1_000_000
_ROOM = 8_300_000
"""Bytes that a large body takes, a little less than the 8 MiB allowed."""

_HOLD_S = 3.0
"""How long connections that stand still are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """A request, or a handful of them, under a name.

    Attributes:
        name: What it is.
        run: Does it; the status that came of it.
    """

    name: str
    run: Callable[[], str]


def named_bodies(address: Address, model: str, headers: dict[str, str], *, timeout_s: float) -> Iterator[Named]:
    """Every one of them.

    Args:
        address: Where the server listens.
        model: A name it knows its model by.
        headers: Sent with each, such as the API key.
        timeout_s: Longest that one may take.
    """

    def posted(path: str, *parts: bytes) -> Callable[[], str]:
        def run() -> str:
            start = b'{"model":' + json_bytes(model) + (b',"max_tokens":1,' if path in (CHAT, COMPLETIONS) else b",")
            data = request(path, start + b"".join(parts) + b"}", headers=headers)
            return deliver(address, Attack(kind="named", data=data), timeout_s=timeout_s).status

        return run

    def raw(make: Callable[[], bytes]) -> Callable[[], str]:
        return lambda: deliver(address, Attack(kind="named", data=make()), timeout_s=timeout_s).status

    for name, path, parts in (*_parts_of_chats(), *_parts_of_completions()):
        yield Named(name=name, run=posted(path, *parts))
    yield Named(
        name="header of 64 MB", run=raw(lambda: request("/health", method="GET", headers={"X": "a" * 64 * _MB}))
    )
    yield Named(name="URL of 64 MB", run=raw(lambda: request("/" + "a" * 64 * _MB, method="GET")))
    yield Named(
        name="200,000 header lines",
        run=raw(lambda: request("/health", method="GET", headers={f"X{number}": "a" for number in range(200_000)})),
    )
    yield Named(name="chunks of one byte", run=raw(lambda: _tiny_chunks(headers)))
    yield Named(name="4 x 50,000 pipelined requests, unread", run=lambda: _standing(address, 4, _pipelined()))
    yield Named(name="60 half-sent bodies of 8 MB", run=lambda: _half_bodies(address, headers))
    yield Named(
        name="100 half-sent heads", run=lambda: _standing(address, 100, b"GET /health HTTP/1.1\r\nHost: a\r\nX-")
    )


def _filled(opening: bytes, item: bytes, closing: bytes, size: int = _ROOM) -> bytes:
    """As many items between commas as fit."""
    count = (size - len(opening) - len(closing)) // (len(item) + 1)
    return opening + _list(item, count) + closing


def _list(item: bytes, count: int) -> bytes:
    """The item so many times, between commas."""
    return ((item + b",") * count)[:-1]


def _parts_of_chats() -> Iterator[tuple[str, str, tuple[bytes, ...]]]:
    hello = b'"messages":[{"role":"user","content":"Hello"}],'
    message = b'{"content":[' + _list(b"{}", 16_000) + b"]}"
    yield "170 messages of 16,000 empty parts", CHAT, (b'"messages":[', _list(message, 170), b"]")
    message = message.replace(b'"content"', b'"role":"user","content"')
    yield "... with a role", CHAT, (b'"messages":[', _list(message, 170), b"]")
    part = b'{"type":"text","text":""}'
    for name, item in (
        ("empty messages", b"{}"),
        ("null messages", b"null"),
        ("messages of the least size", b'{"role":"user","content":""}'),
        ("messages with an unknown key each", b'{"role":"user","content":"","x":1}'),
    ):
        yield name, CHAT, (_filled(b'"messages":[', item, b"]"),)
    whole = b'{"role":"user","content":[' + _list(part, 16_000) + b"]}"
    yield "text parts of the least size", CHAT, (b'"messages":[', _list(whole, 19), b"]")
    calls = b'{"role":"assistant","tool_calls":[' + _list(b"{}", 16_000) + b"]}"
    yield "messages of 16,000 empty tool calls", CHAT, (b'"messages":[', _list(calls, 168), b"]")
    keys = b",".join(b'"%x":1' % number for number in range(650_000))
    yield "one message of very many unknown keys", CHAT, (b'"messages":[{"role":"user","content":"",' + keys + b"}]",)
    yield "very many unknown keys", CHAT, (hello, keys)
    yield "very many wrong keys of logit_bias", CHAT, (hello, b'"logit_bias":{' + keys + b"}")
    yield "very many wrong values of logit_bias", CHAT, (hello, b'"logit_bias":{' + keys.replace(b":1", b":[]") + b"}")
    yield (
        "chat_template_kwargs of very many lists",
        CHAT,
        (hello, _filled(b'"chat_template_kwargs":{"a":[', b"[0]", b"]}")),
    )
    yield "chat_template_kwargs of many keys", CHAT, (hello, b'"chat_template_kwargs":{' + keys + b"}")
    yield "tools of very many empty objects", CHAT, (hello, _filled(b'"tools":[', b"{}", b"]"))
    yield "metadata of very many keys", CHAT, (hello, b'"metadata":{' + keys + b"}")
    yield "a response_format of very many lists", CHAT, (hello, _filled(b'"response_format":{"type":[', b"[]", b"]}"))
    yield "a message of 8 MB", CHAT, (b'"messages":[{"role":"user","content":"' + b"a " * (_ROOM // 2) + b'"}]',)
    yield (
        "a message of escapes",
        CHAT,
        (b'"messages":[{"role":"user","content":"' + b"\\u00e9" * (_ROOM // 6) + b'"}]',),
    )
    yield "nested a million deep", CHAT, (hello, b'"x":' + b"[" * _MB + b"]" * _MB)
    stops = json_bytes([f"{number:02}" + "a" * 1022 for number in range(64)])
    yield "64 stop strings of 1,024 characters, n=128", CHAT, (hello, b'"n":128,"stop":' + stops)
    words = json_bytes([f"{number:02}" + "b" * 1022 for number in range(64)])
    yield "64 bad words of 1,024 characters, n=128", CHAT, (hello, b'"n":128,"bad_words":' + words)


def _parts_of_completions() -> Iterator[tuple[str, str, tuple[bytes, ...]]]:
    for name, item in (
        ("very many empty prompts", b'""'),
        ("very many prompts of a token", b"[5]"),
        ("a prompt of very many tokens", b"5"),
        ("a prompt of mixed items", b'5,""'),
        ("prompts of objects", b"{}"),
    ):
        yield name, COMPLETIONS, (_filled(b'"prompt":[', item, b"]"),)
    stops = json_bytes([f"{number:02}" + "c" * 1022 for number in range(64)])
    prompts = json_bytes(["Hello"] * 1024)
    yield "1,024 prompts with 64 stop strings", COMPLETIONS, (b'"prompt":' + prompts + b',"stop":' + stops,)
    for field, item in (
        ("stop", b'"a"'),
        ("stop", b"{}"),
        ("bad_words", b'"a"'),
        ("stop_token_ids", b"5"),
        ("allowed_token_ids", b"5"),
        ("allowed_token_ids", b'"a"'),
    ):
        parts = _filled(b'"prompt":"Hello","%s":[' % field.encode(), item, b"]")
        yield f"{field} of very many {item.decode()}", COMPLETIONS, (parts,)
    prompt = json_bytes([5 + number % 40 for number in range(2000)])
    yield "prompt_logprobs=20 of 2,000 tokens", COMPLETIONS, (b'"prompt":' + prompt + b',"prompt_logprobs":20',)
    echo = b',"echo":true,"logprobs":20'
    yield "echo and logprobs=20 of 2,000 tokens", COMPLETIONS, (b'"prompt":' + prompt + echo,)
    text = b'"prompt":"' + b"a b" * (_ROOM // 3) + b'"'
    yield "a prompt of 8 MB", COMPLETIONS, (text,)
    for name, path, parts in (
        ("/tokenize of 8 MB", "/tokenize", text),
        ("/tokenize of 8 MB with token strings", "/tokenize", text + b',"return_token_strs":true'),
        ("/tokenize of one word of 8 MB", "/tokenize", b'"prompt":"' + b"a" * _ROOM + b'"'),
        ("/detokenize of very many tokens", "/detokenize", _filled(b'"tokens":[', b"5", b"]")),
        ("/detokenize of very many texts", "/detokenize", _filled(b'"tokens":[', b'"a"', b"]")),
    ):
        yield name, path, (parts,)


def _tiny_chunks(headers: dict[str, str]) -> bytes:
    head = request(CHAT, headers={**headers, "Transfer-Encoding": "chunked", "Content-Type": "application/json"})
    return head + b"1\r\n \r\n" * 1_000_000 + b"0\r\n\r\n"


def _pipelined() -> bytes:
    return b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n" * 50_000


def _half_bodies(address: Address, headers: dict[str, str]) -> str:
    head = request(CHAT, headers={**headers, "Content-Type": "application/json", "Content-Length": str(_ROOM)})
    return _standing(address, 60, head + b" " * (_ROOM - 100_000))


def _standing(address: Address, count: int, data: bytes) -> str:
    """Connections that send the same and then stand still for a while; how many were hung up on."""
    with ExitStack() as stack:
        connections = []
        for _ in range(count):
            try:
                connection = stack.enter_context(socket.create_connection(address, timeout=_HOLD_S))
                connection.sendall(data)
            except OSError:
                # Not let in, or hung up on: what the server may do.
                continue
            connections.append(connection)
        time.sleep(_HOLD_S)
        return f"{len(connections)} of {count} sent"
