"""Echoed prompts: offsets index the text that is sent, whatever the tokenizer does to a prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from server_harness import BOS, COMPLETIONS, CONFIG, INFO, TOKENIZER, USER, client_of, events_of, ids

from jaxserve.engine.fake import FakeEngine
from jaxserve.server.openai.app import create_app
from jaxserve.server.openai.echo import echo_of_text
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.tokenizer import Tokenizer, tokenizer_from_folder

DATA = Path(__file__).parents[1] / "text" / "data"
TEXTS: list[str] = json.loads((DATA / "hard_texts.json").read_text(encoding="utf-8"))


@cache
def tokenizers() -> dict[str, Tokenizer]:
    vocabularies = json.loads((DATA / "vocabularies.json").read_text(encoding="utf-8"))

    def toy(vocabulary: str, **fields: object) -> Tokenizer:
        given = {**vocabularies[vocabulary], "bos_token_id": 1, "eos_token_id": 2, **fields}
        return tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in given.items()})

    return {
        "bytes": TOKENIZER,
        "llama2": tokenizer_from_folder(DATA / "llama2_folder"),
        "llama3": tokenizer_from_folder(DATA / "llama3_folder"),
        "smollm": toy("byte_level", model="gpt2", pre="smollm"),
        "nfc": toy("byte_level", model="gpt2", pre="qwen2", add_bos_token=True),
        "sentencepiece": toy("sentence_piece", model="llama"),
        "no-space-prefix": toy("sentence_piece", model="llama", add_space_prefix=False),
    }


async def echoed(tokenizer: Tokenizer, prompt: object, *, stream: bool = False, **fields: Any) -> tuple[str, Any]:
    """The text of the answer, and its log-probabilities."""
    engine = FakeEngine(replace(INFO, vocab_size=tokenizer.vocab_size, max_model_len=4096))
    body = {"model": "fake", "prompt": prompt, "max_tokens": 3, "ignore_eos": True, "echo": True, "logprobs": 1}
    async with client_of(create_app(engine, tokenizer, None, CONFIG)) as client:
        response = await client.post(COMPLETIONS, json={**body, "stream": stream, **fields})
    await engine.close()
    assert response.status_code == 200, response.text
    if not stream:
        [choice] = response.json()["choices"]
        return choice["text"], choice["logprobs"]
    choices = [choice for event in events_of(response.text) for choice in event["choices"]]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
    return "".join(c["text"] for c in choices), {name: [v for p in parts for v in p[name]] for name in parts[0]}


def check_offsets(tokenizer: Tokenizer, text: str, logprobs: Any, *, hides: bool = True) -> None:
    """Every token that is whole characters stands where its offset says."""
    names, offsets = logprobs["tokens"], logprobs["text_offset"]
    assert offsets == sorted(offsets)
    control = {tokenizer.token_text(i) for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)}
    shown_yet = False
    for name, start, end in zip(names, offsets, [*offsets[1:], len(text)], strict=True):
        there = text[start:end]
        if name.startswith("bytes:") or "\ufffd" in there:
            continue
        hidden = hides and there == "" and name in control
        # The space that a tokenizer puts before a text is none of it.
        first = not shown_yet and name.endswith(there) and name.removesuffix(there).strip(" ") == ""
        assert there == name or hidden or first, (name, there)
        shown_yet = shown_yet or there != ""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", tokenizers())
async def test_offsets_index_the_text(name: str, stream: bool) -> None:
    tokenizer = tokenizers()[name]
    for given in TEXTS[:: 6 if stream else 3]:
        if not tokenizer.encode(given):
            continue
        text, logprobs = await echoed(tokenizer, given, stream=stream)
        check_offsets(tokenizer, text, logprobs)
        if name not in ("nfc", "llama2", "sentencepiece", "no-space-prefix"):
            assert text.startswith(given)


@pytest.mark.parametrize("name", tokenizers())
async def test_offsets_of_ids(name: str) -> None:
    tokenizer = tokenizers()[name]
    for given in TEXTS[::9]:
        prompt = tokenizer.encode(given)
        for kept in (prompt, prompt[len(prompt) // 2 :]):
            if kept:
                text, logprobs = await echoed(tokenizer, kept, skip_special_tokens=False)
                check_offsets(tokenizer, text, logprobs, hides=False)


async def test_control_tokens_written_in_a_text_are_shown() -> None:
    text, logprobs = await echoed(TOKENIZER, "A<|user|>C")
    assert text == "A<|user|>CDEF"
    assert logprobs["tokens"] == ["<s>", "A", "<|user|>", "C", "D", "E", "F"]
    assert logprobs["text_offset"] == [0, 0, 1, 9, 10, 11, 12]


async def test_control_tokens_put_around_a_text() -> None:
    """Hidden by default, even if the text begins with the same one; shown where control tokens are."""
    text, logprobs = await echoed(TOKENIZER, "<s>A")
    assert (text, logprobs["text_offset"]) == ("<s>ABCD", [0, 0, 3, 4, 5, 6])
    text, logprobs = await echoed(TOKENIZER, "A", skip_special_tokens=False)
    assert (text, logprobs["text_offset"]) == ("<s>ABCD", [0, 3, 4, 5, 6])
    text, logprobs = await echoed(TOKENIZER, "A", add_special_tokens=False)
    assert (text, logprobs["text_offset"]) == ("ABCD", [0, 1, 2, 3])


async def test_control_tokens_among_ids_are_as_in_the_output() -> None:
    prompt = [BOS, *ids("A"), USER, *ids("C")]
    text, logprobs = await echoed(TOKENIZER, prompt)
    assert (text, logprobs["text_offset"]) == ("ACDEF", [0, 0, 1, 1, 2, 3, 4])
    text, logprobs = await echoed(TOKENIZER, prompt, skip_special_tokens=False)
    assert (text, logprobs["text_offset"]) == ("<s>A<|user|>CDEF", [0, 3, 4, 12, 13, 14, 15])


async def test_the_space_before_a_text() -> None:
    tokenizer = tokenizers()["sentencepiece"]
    text, logprobs = await echoed(tokenizer, "Hello world")
    assert text.startswith("Hello world")
    assert logprobs["text_offset"][:2] == [0, 0]
    assert text[logprobs["text_offset"][2] :].startswith(logprobs["tokens"][2])


async def test_normal_form() -> None:
    """The text is as the model reads it, so that the offsets after it are true."""
    text, logprobs = await echoed(tokenizers()["nfc"], "Cafe\u0301 au")
    assert text.startswith("Caf\u00e9 au")
    check_offsets(tokenizers()["nfc"], text, logprobs)


async def test_a_prompt_that_ends_within_a_character() -> None:
    """Its rest is no part of the output's first character."""
    (head, _) = ids("ß")
    text, logprobs = await echoed(TOKENIZER, [*ids("A"), head], max_tokens=2)
    assert text.startswith("A\ufffd")
    assert logprobs["text_offset"][:3] == [0, 1, 2]


async def test_truncated_prompts() -> None:
    text, logprobs = await echoed(TOKENIZER, "XYA", truncate_prompt_tokens=2)
    assert (text, logprobs["text_offset"]) == ("YABCD", [0, 1, 2, 3, 4])


def test_tokens_after_a_text_are_found() -> None:
    echo = echo_of_text(
        TOKENIZER, "A</s>", [0, *ids("A</s>"), 1], num_kept=4, add_special_tokens=True, skip_special_tokens=True
    )
    assert (echo.text, echo.widths) == ("A</s>", (0, 1, 4, 0))
