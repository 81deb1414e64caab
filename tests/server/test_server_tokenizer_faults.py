"""Texts that a model's tokenizer fails on: the request's fault, told with its field, and nobody else's."""

from __future__ import annotations

from typing import Any

import pytest
from server_harness import CHAT, COMPLETIONS, INFO, TEMPLATE, TOKENIZER, chat, client_of, completion
from server_harness import CONFIG as APP_CONFIG
from tokenizers import AddedToken, Tokenizer, normalizers

from jaxserve.engine.fake import FakeEngine
from jaxserve.server.openai.app import create_app
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import BackendTokenizer


def panicking() -> BackendTokenizer:
    """The tests' tokenizer with a token that is normalised to nothing: the library panics over two-byte characters."""
    backend = Tokenizer.from_str(TOKENIZER.backend.to_str())
    backend.normalizer = normalizers.Replace("\u03a9", "")
    backend.add_tokens([AddedToken("\u03a9", normalized=True, single_word=True)])
    return BackendTokenizer(backend, TOKENIZER.facts)


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        (COMPLETIONS, completion("\u00df"), "prompt"),
        (COMPLETIONS, completion(["A", "\u00df"]), "prompt"),
        (COMPLETIONS, completion("A", bad_words=["\u00df"]), "bad_words"),
        (CHAT, chat("\u00df"), "messages"),
        ("/tokenize", {"prompt": "\u00df"}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "\u00df"}]}, "messages"),
    ],
)
async def test_a_panic_is_a_400_that_names_the_field(route: str, body: dict[str, Any], param: str) -> None:
    tokenizer = panicking()
    template = ChatTemplate(TEMPLATE, tokenizer.special_tokens)
    engine = FakeEngine(INFO)
    async with client_of(create_app(engine, tokenizer, template, APP_CONFIG)) as client:
        response = await client.post(route, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert "cannot tokenise this text" in response.json()["error"]["message"]
        whole = await client.post(COMPLETIONS, json=completion("A"))
        assert whole.json()["choices"][0]["text"] == "BCDE"
    assert engine.stats().num_running == engine.stats().num_waiting == 0
