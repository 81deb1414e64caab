"""The bound on a text's tokens holds for every text, is worth something, and is not given where it cannot hold."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxserve.text.coverage import coverage_of
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.token_bytes import byte_alphabet
from jaxserve.text.tokenizer import LONG_TEXT_CHARS, BackendTokenizer, TokenizerFacts, tokenizer_from_folder

DATA = Path(__file__).parent / "data"
VOCABULARIES = json.loads((DATA / "vocabularies.json").read_text(encoding="utf-8"))
LETTERS = sorted(byte_alphabet())


def toy(vocabulary: str, fields: Mapping[str, object]) -> BackendTokenizer:
    return tokenizer_from_gguf(
        {f"tokenizer.ggml.{key}": v for key, v in {**VOCABULARIES[vocabulary], **fields}.items()}
    )


TOKENIZERS = {
    "gpt-2": toy("byte_level", {"model": "gpt2", "pre": "smollm"}),
    "qwen2": toy("byte_level", {"model": "gpt2", "pre": "qwen2"}),
    "sentence piece": toy("sentence_piece", {"model": "llama", "bos_token_id": 1}),
    "no prefix": toy("sentence_piece", {"model": "llama", "bos_token_id": 1, "add_space_prefix": False}),
    "llama2 folder": tokenizer_from_folder(DATA / "llama2_folder"),
    "llama3 folder": tokenizer_from_folder(DATA / "llama3_folder"),
}


def byte_level(*, without: str = "", **model: Any) -> Backend:
    """Byte-level BPE of single letters, and one long token."""
    tokens = ["<unk>", *(letter for letter in LETTERS if letter not in without), "aa", "aaaa"]
    merges = [("a", "a"), ("aa", "aa")]
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, **model))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def bound(backend: Backend, text: str) -> int:
    coverage = coverage_of(backend, backend.get_vocab())
    assert coverage is not None
    return coverage.fewest_tokens(text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_it_is_known_of_all_that_are_served(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for text in ("a" * 100_000, "ab " * 50_000, "\u00e9\u4e2d" * 20_000):
        assert 100 < tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(pieces=st.lists(st.tuples(st.text(max_size=4), st.integers(1, 40)), max_size=4), data=st.data())
def test_it_holds_for_every_text(name: str, pieces: list[tuple[str, int]], data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    added = tokenizer.backend.get_added_tokens_decoder().values()
    special = ["", *sorted(token.content for token in added)]
    text = "".join(piece * count + data.draw(st.sampled_from(special)) for piece, count in pieces)
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_composition_is_allowed_for() -> None:
    """One letter may stand for four characters of a text that is written decomposed."""
    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("\u1f82", normalized=True)])
    text = "\u03b1\u0313\u0300\u0345" * 1000
    assert len(backend.encode(text).ids) == 1000
    assert bound(backend, text) <= 1000


def test_characters_without_a_token_do_not_count() -> None:
    controls = "\x04\x06"
    backend = byte_level(without="".join(letter for letter, byte in byte_alphabet().items() if chr(byte) in controls))
    text = controls * 1000 + "a" * 8
    assert len(backend.encode(text).ids) == 2
    assert bound(backend, text) == 2


def _strips() -> Backend:
    backend = byte_level()
    backend.normalizer = normalizers.Strip()
    return backend


def _shortens() -> Backend:
    backend = byte_level()
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("aa", "a")])
    return backend


def _replaces_patterns() -> Backend:
    backend = byte_level()
    backend.normalizer = normalizers.Replace(Regex("a+"), "a")
    return backend


def _removes() -> Backend:
    backend = byte_level()
    words = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def _cuts_at_blanks() -> Backend:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    return backend


def _swallows_blanks() -> Backend:
    backend = byte_level()
    backend.add_tokens([AddedToken("<mask>", lstrip=True)])
    return backend


def _truncates() -> Backend:
    backend = byte_level()
    backend.enable_truncation(5)
    return backend


def _folds_unknown_ones() -> Backend:
    return Backend(models.BPE(vocab={"a": 0, "<unk>": 1}, merges=[], unk_token="<unk>", fuse_unk=True))


def _knows_no_upper_bytes() -> Backend:
    return byte_level(without="".join(letter for letter, byte in byte_alphabet().items() if byte == 0x80))


def _composes_what_it_drops() -> Backend:
    backend = byte_level(without="K")
    backend.normalizer = normalizers.NFC()
    return backend


def _other_model() -> Backend:
    return Backend(models.WordPiece(vocab={"a": 0, "[UNK]": 1}, unk_token="[UNK]"))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_strips, " " * 1000 + "a"),
        (_shortens, "a" * 1000),
        (_replaces_patterns, "a" * 1000),
        (_removes, " " * 1000 + "a"),
        (_cuts_at_blanks, " " * 1000 + "a"),
        (_swallows_blanks, " " * 1000 + "<mask>"),
        (_truncates, "ab" * 1000),
        (_folds_unknown_ones, "z" * 1000),
        (_knows_no_upper_bytes, "\u0400" * 1000),
        (_composes_what_it_drops, "\u212a" * 1000),
        (_other_model, "a" * 1000),
    ],
)
def test_nothing_is_claimed_of_what_loses_text(make: Any, text: str) -> None:
    assert len(make().encode(text).ids) <= 1000
    backend = make()
    assert coverage_of(backend, backend.get_vocab()) is None


def test_a_tokenizer_without_a_bound_says_none() -> None:
    facts = TokenizerFacts(bos_token_id=None, eos_token_ids=(), special_tokens={})
    assert BackendTokenizer(_swallows_blanks(), facts).fewest_tokens(" " * 1000) == 0


def test_long_texts_are_encoded_as_short_ones() -> None:
    for tokenizer in TOKENIZERS.values():
        text = "aab \u00e9 12 " * LONG_TEXT_CHARS
        expected = tokenizer.backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False) == expected


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    tokenizer, text = TOKENIZERS["gpt-2"], "a " * 400_000
    worst_s = total_s = 0.0
    for _ in range(3):
        worker = threading.Thread(target=tokenizer.encode, args=(text,))
        start = last = time.perf_counter()
        worker.start()
        worst_s = 0.0
        while worker.is_alive():
            time.sleep(0.001)
            now = time.perf_counter()
            worst_s, last = max(worst_s, now - last), now
        total_s = last - start
        if worst_s < total_s / 2:
            return
    pytest.fail(f"nothing else ran for {worst_s:.2f} of {total_s:.2f} s")
