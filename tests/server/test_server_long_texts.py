"""Long texts: refused at their length where that is enough, and otherwise tokenised where they hold up nobody."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from server_harness import CHAT, CHAT_TEMPLATE, COMPLETIONS, CONFIG, INFO, chat, client_of, completion, make_engine
from server_harness import TOKENIZER as PLAIN

from jaxserve.server.openai.app import create_app
from jaxserve.text.tokenizer import BackendTokenizer

LONGEST_TOKEN = len("<|assistant|>")
FAR_TOO_LONG = "a " * (LONGEST_TOKEN * INFO.max_model_len)


class Watched(BackendTokenizer):
    """Notes the length of each text it encodes, and the thread that asks."""

    def __init__(self) -> None:
        super().__init__(PLAIN.backend, PLAIN.facts)
        self.encoded: list[tuple[int, int]] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.encoded.append((len(text), threading.get_ident()))
        return super().encode(text, add_special_tokens=add_special_tokens)


async def answer(route: str, body: Any) -> tuple[int, Any, Watched]:
    tokenizer = Watched()
    engine = make_engine()
    app = create_app(engine, tokenizer, CHAT_TEMPLATE, CONFIG)
    async with client_of(app) as client:
        response = await client.post(route, json=body)
    await engine.close()
    return response.status_code, response.json(), tokenizer


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        (COMPLETIONS, completion(FAR_TOO_LONG), "prompt"),
        (COMPLETIONS, completion([FAR_TOO_LONG, "A"]), "prompt"),
        (CHAT, chat(FAR_TOO_LONG), "messages"),
        (CHAT, chat([{"type": "text", "text": FAR_TOO_LONG}]), "messages"),
        (COMPLETIONS, completion(["A"] * 1025), "prompt"),
        (COMPLETIONS, completion("A", n=129), "n"),
    ],
)
async def test_what_cannot_fit_is_refused_without_tokenising_it(route: str, body: Any, param: str) -> None:
    status, reply, tokenizer = await answer(route, body)
    assert (status, reply["error"]["param"]) == (400, param)
    assert reply["error"]["message"].startswith(param)
    assert tokenizer.encoded == []


async def test_what_is_refused_at_its_length_has_openais_code() -> None:
    _, reply, _ = await answer(COMPLETIONS, completion(FAR_TOO_LONG))
    assert reply["error"]["code"] == "context_length_exceeded"
    assert "at least 512 tokens" in reply["error"]["message"]


@pytest.mark.parametrize(
    ("route", "body", "status"),
    [
        (COMPLETIONS, completion(FAR_TOO_LONG * 2, truncate_prompt_tokens=5), 200),
        (CHAT, chat(FAR_TOO_LONG * 2, truncate_prompt_tokens=-1), 200),
        ("/tokenize", {"prompt": FAR_TOO_LONG * 2}, 200),
        ("/tokenize", {"messages": [{"role": "user", "content": FAR_TOO_LONG * 2}]}, 200),
        (COMPLETIONS, completion(["a" * 256] * 40), 400),
    ],
)
async def test_what_must_be_tokenised_is_so_beside_the_event_loop(route: str, body: Any, status: int) -> None:
    code, reply, tokenizer = await answer(route, body)
    assert code == status
    assert len(tokenizer.encoded) == 1
    assert threading.get_ident() not in {thread for _, thread in tokenizer.encoded}
    if route == "/tokenize":
        assert reply["count"] >= len(FAR_TOO_LONG) * 2


@pytest.mark.parametrize("num_chars", [254, 255])
async def test_what_may_fit_is_tokenised_and_counted(num_chars: int) -> None:
    """A BOS, the letters, and one token of output are at most 256."""
    status, reply, tokenizer = await answer(COMPLETIONS, completion("a" * num_chars, max_tokens=1))
    assert status == (200 if num_chars == 254 else 400)
    assert [length for length, _ in tokenizer.encoded] == [num_chars]
    if status == 400:
        assert reply["error"]["message"].startswith("prompt: 256 tokens leave no room for output in the context of 256")


async def test_a_tokenizer_of_which_nothing_is_known() -> None:
    class Unknown(Watched):
        def fewest_tokens(self, text: str) -> int:
            return 0

    engine = make_engine()
    app = create_app(engine, Unknown(), None, CONFIG)
    async with client_of(app) as client:
        response = await client.post(COMPLETIONS, json=completion(FAR_TOO_LONG))
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith(f"prompt: {len(FAR_TOO_LONG) + 1} tokens")
    await engine.close()
