"""Malformed requests, drawn at random from one seed: each breaks a rule of JSON, of the API, of HTTP or of manners."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from jaxserve.bench.abuse.wire import Attack, Ending, json_bytes, request

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
POSTED = (CHAT, COMPLETIONS, "/tokenize", "/detokenize")
GOTTEN = ("/v1/models", "/health", "/ready", "/version", "/metrics", "/")

_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "logit_bias", "logprobs", "stream", "max_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "stop_token_ids", "bad_words"),
    *(
        "allowed_token_ids",
        "prompt_logprobs",
        "stream_options",
        "chat_template_kwargs",
        "priority",
        "cache_salt",
        "user",
    ),
    *("tools", "tool_choice", "response_format", "structured_outputs", "echo", "best_of", "truncate_prompt_tokens"),
    *("prompt", "messages", "model", "metadata", "top_logprobs", "add_special_tokens", "kv_transfer_params"),
)
_LARGE = 20_000


class Malformed:
    """A source of malformed requests.

    Args:
        model: A name that the server knows its model by, so that what is wrong is something else.
        seed: Another seed, other requests.
        headers: Sent with each, such as the API key.
    """

    def __init__(self, model: str, seed: int, headers: dict[str, str]) -> None:
        self._model = model
        self._random = Random(seed)
        self._headers = headers
        self._kinds: tuple[Callable[[], Attack], ...] = (
            *(self.broken_json, self.wrong_type, self.deep, self.huge_number, self.unknown_field, self.odd_text),
            *(self.bad_header, self.bad_chunks, self.odd_encoding, self.oversize, self.bad_method, self.bad_path),
            *(self.half_body, self.early_leave, self.garbage, self.repeated, self.out_of_range),
        )

    def __iter__(self) -> Iterator[Attack]:
        """Requests without end."""
        while True:
            yield self._random.choice(self._kinds)()

    def broken_json(self) -> Attack:
        """A body cut short, with bytes changed, doubled or left out."""
        path, body = self._valid()
        data, draw = bytearray(json_bytes(body)), self._random
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(data))
            change = draw.randrange(4)
            if change == 0:
                del data[place:]
            elif change == 1:
                data[place] = draw.randrange(256)
            elif change == 2:
                data[place:place] = draw.choice((b",", b"]", b"}", b'"', b"\\u12", b"\x00", b"NaN", b"//"))
            else:
                del data[place]
            if not data:
                break
        return self._post("broken JSON", path, bytes(data))

    def wrong_type(self) -> Attack:
        """A field, or the whole body, of another type than it has."""
        path, body = self._valid()
        if self._random.random() < 0.1:
            return self._post("wrong type", path, json_bytes(self._value()))
        return self._post("wrong type", path, json_bytes({**body, self._random.choice(_FIELDS): self._value()}))

    def deep(self) -> Attack:
        """Arrays and objects in each other, up to twenty thousand deep."""
        path, body = self._valid()
        depth = self._random.choice((50, 130, 1000, _LARGE))
        opening, closing = self._random.choice(((b"[", b"]"), (b'{"a":', b"}")))
        nested = opening * depth + b"1" + closing * self._random.choice((depth, 0))
        field = self._random.choice(_FIELDS).encode()
        return self._post("deep nesting", path, json_bytes(body)[:-1] + b',"' + field + b'":' + nested + b"}")

    def huge_number(self) -> Attack:
        """A number that no type holds."""
        path, body = self._valid()
        number = self._random.choice(
            (
                b"1e999",
                b"-1e999",
                b"9" * 400,
                b"9" * _LARGE,
                b"0." + b"3" * _LARGE,
                b"1e-999",
                b"NaN",
                b"-0",
                b"2e9",
                b"0x10",
            )
        )
        field = self._random.choice(_FIELDS).encode()
        return self._post("huge number", path, json_bytes(body)[:-1] + b',"' + field + b'":' + number + b"}")

    def unknown_field(self) -> Attack:
        """Fields that nobody knows, one or very many."""
        path, body = self._valid()
        draw = self._random
        count = draw.choice((1, 3, 100, 2000))
        extras = {f"x{draw.getrandbits(32)}": self._value() if count < 100 else None for _ in range(count)}
        return self._post("unknown field", path, json_bytes({**body, **extras}))

    def odd_text(self) -> Attack:
        """Text of control characters, lone surrogates, joiners and the like where text belongs."""
        path, body = self._valid()
        letters = (
            "\0",
            "\ud800",
            "\udfff",
            "\u202e",
            "\ufeff",
            "\u200d",
            "\U0010ffff",
            "<|im_start|>",
            "\x1b[2J",
            "\r\n",
        )
        text = "".join(self._random.choice(letters) for _ in range(self._random.choice((1, 10, 500))))
        field = self._random.choice(("messages", "prompt", "stop", "user", "model", "cache_salt", "bad_words"))
        value = [{"role": "user", "content": text}] if field == "messages" else text
        return self._post("odd text", path, json_bytes({**body, "max_tokens": 1, field: value}))

    def out_of_range(self) -> Attack:
        """Numbers of the right type, one step or far beyond what is allowed."""
        path, body = self._valid()
        number = self._random.choice(
            (-1, -2, 0, 2, 3, 129, 301, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1, 1e308)
        )
        return self._post("out of range", path, json_bytes({**body, self._random.choice(_FIELDS): number}))

    def repeated(self) -> Attack:
        """A key twice, or a list of very many equal things."""
        path, body = self._valid()
        if self._random.random() < 0.5:
            return self._post("repeated", path, json_bytes(body)[:-1] + b',"model":"a","model":1}')
        item: Any = self._random.choice(("", None, {}, [], 0, {"role": "user"}, {"type": "text", "text": ""}))
        field = self._random.choice(("messages", "prompt", "stop", "bad_words", "stop_token_ids", "tools"))
        return self._post("repeated", path, json_bytes({**body, field: [item] * self._random.choice((70, 3000))}))

    def bad_header(self) -> Attack:
        """A head that is not HTTP, or says two things at once."""
        path, body = self._valid()
        data, draw = json_bytes(body), self._random
        line = draw.choice(
            (
                *(
                    "Content-Length: -1",
                    "Content-Length: 1e3",
                    "Content-Length: 99999999999999999999",
                    "Content-Length: 5",
                ),
                *(
                    "Transfer-Encoding: gzip",
                    "Transfer-Encoding: chunked, identity",
                    "Expect: 200-maybe",
                    "Upgrade: h2c",
                ),
                *(
                    "Content-Type: text/plain",
                    "Content-Type: ",
                    "Content-Encoding: gzip",
                    "Host: evil.example",
                    "Bad Name: 1",
                ),
                *(": none", "NoColon", " Folded: line", "X-Null: a\0b", "X-Raw: a\rb", "Authorization: Bearer \xff"),
                *("X-Request-Id: a\x1b[31m", "Cookie: " + "a" * 20_000, "Connection: upgrade, close, keep-alive"),
            )
        )
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{line}\r\nContent-Length: {len(data)}\r\n"
        lines = "".join(f"{name}: {value}\r\n" for name, value in self._headers.items())
        return self._sent("bad header", f"{head}{lines}Connection: close\r\n\r\n".encode("latin-1") + data)

    def bad_chunks(self) -> Attack:
        """A chunked body whose chunks are no chunks."""
        path, body = self._valid()
        data, draw = json_bytes(body), self._random
        size = draw.choice((b"%x" % len(data), b"-1", b"zz", b"FFFFFFFFFFFFFFFFFF", b"0", b"%x;ext=1" % len(data), b""))
        end = draw.choice((b"\r\n0\r\n\r\n", b"\r\n", b"0\r\n\r\n", b"\r\n0\r\nX-Trailer: 1\r\n\r\n", b""))
        head = request(path, method="POST", headers={**self._headers, "Transfer-Encoding": "chunked"})
        return self._sent("bad chunks", head + size + b"\r\n" + data + end)

    def odd_encoding(self) -> Attack:
        """A body that is not UTF-8, or says that it is something else."""
        path, body = self._valid()
        text, draw = json.dumps({**body, "user": "é"}, ensure_ascii=False), self._random
        encoding = draw.choice(("utf-16", "utf-32", "latin-1", "utf-8-sig", "cp037"))
        kind = draw.choice(("application/json", f"application/json; charset={encoding}", "multipart/form-data", "\x00"))
        data = text.encode(encoding)
        return self._sent("odd encoding", request(path, data, headers={**self._headers, "Content-Type": kind}))

    def oversize(self) -> Attack:
        """More than is allowed, said or sent."""
        path, body = self._valid()
        draw = self._random
        what = draw.randrange(4)
        if what == 0:
            head = request(path, headers={**self._headers, "Content-Length": str(draw.choice((2**30, 2**62)))})
            return self._sent("oversize", head + b"{}", Ending.LEAVE)
        if what == 1:
            headers = {f"X-{number}": "a" * 100 for number in range(draw.choice((50, 200, 1200)))}
            return self._sent("oversize", request(path, json_bytes(body), headers={**self._headers, **headers}))
        if what == 2:
            return self._sent("oversize", request("/" + "a" * draw.choice((1000, 9000, 80_000)), method="GET"))
        text = "a " * draw.choice((1000, _LARGE, 10 * _LARGE))
        field = {CHAT: "messages", "/detokenize": "tokens"}.get(path, "prompt")
        value = [{"role": "user", "content": text}] if field == "messages" else text
        return self._post("oversize", path, json_bytes({**body, field: value}))

    def bad_method(self) -> Attack:
        """A method that the path does not have, or that does not exist."""
        method = self._random.choice(
            ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "CONNECT", "post", "BREW", "P\tT", "")
        )
        path = self._random.choice((*POSTED, *GOTTEN))
        return self._sent("bad method", request(path, b"{}", method=method, headers=self._headers))

    def bad_path(self) -> Attack:
        """A path that is not there, or is hardly one."""
        path = self._random.choice(
            (
                *(
                    "/v1",
                    "/v1/",
                    "//v1/models",
                    "/v1/models/..%2f..%2fetc",
                    "/../../etc/passwd",
                    "/%00",
                    "/%0d%0aX: 1",
                    "/%ff",
                ),
                *(
                    "/v1/models/" + "a" * 4000,
                    "/health/",
                    "/health?x=%zz",
                    "*",
                    "http://evil.example/",
                    "nowhere",
                    "/\x7f",
                ),
                *("/v1/chat/completions;x=1", "/V1/models", "/é", "/?" + "a=b&" * 2000, "/static/../metrics"),
            )
        )
        method = self._random.choice(("GET", "POST"))
        return self._sent("bad path", request(path, b"{}", method=method, headers=self._headers))

    def half_body(self) -> Attack:
        """A body that ends before it is said to."""
        path, body = self._valid()
        data = json_bytes(body)
        headers = {**self._headers, "Content-Length": str(len(data) + self._random.choice((1, 1000, 10**6)))}
        return self._sent("half a body", request(path, data, headers=headers), Ending.LEAVE)

    def early_leave(self) -> Attack:
        """A good request whose client goes away, at once or at the first bytes of the answer."""
        path, body = self._valid()
        body = {**body, "stream": self._random.random() < 0.5} if path in (CHAT, COMPLETIONS) else body
        ending = self._random.choice((Ending.LEAVE, Ending.PEEK))
        return self._sent("early leave", request(path, json_bytes(body), headers=self._headers), ending)

    def garbage(self) -> Attack:
        """No HTTP at all, or HTTP of another version."""
        data = self._random.choice(
            (
                self._random.randbytes(self._random.choice((1, 100, 5000))),
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + self._random.randbytes(500),
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
                b"GET /health HTTP/9.9\r\n\r\n",
                b"GET /health\r\n\r\n",
                b"\r\n\r\n\r\n",
                b"GET /health HTTP/1.1\nHost: a\n\n",
            )
        )
        return self._sent("garbage", data, self._random.choice((Ending.LEAVE, Ending.PEEK)))

    def _valid(self) -> tuple[str, dict[str, Any]]:
        """A path and a body that is right."""
        path = self._random.choice(POSTED)
        fields: dict[str, dict[str, Any]] = {
            CHAT: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
            COMPLETIONS: {"prompt": "Hello", "max_tokens": 2},
            "/tokenize": {"prompt": "Hello"},
            "/detokenize": {"tokens": [3, 4, 5]},
        }
        return path, {"model": self._model, **fields[path]}

    def _value(self) -> Any:  # noqa: ANN401 - any JSON value
        draw = self._random
        return draw.choice(
            (None, True, False, -1, 0, 3.5, 10**20, "", "text", [], {}, [None], [[1]], {"a": 1}, ["a"] * 50, "x" * 3000)
        )

    def _post(self, kind: str, path: str, data: bytes) -> Attack:
        return self._sent(kind, request(path, data, headers=self._headers))

    def _sent(self, kind: str, data: bytes, ending: Ending = Ending.READ) -> Attack:
        return Attack(kind=kind, data=data, ending=ending)
