"""Long texts are encoded in parts, to the tokens of the whole; what cannot be cut has a bound."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxserve.core.errors import InvalidRequestError
from jaxserve.text import cuts
from jaxserve.text.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf
from jaxserve.text.token_bytes import byte_alphabet
from jaxserve.text.tokenizer import BackendTokenizer, tokenizer_from_folder

DATA = Path(__file__).parent / "data"
VOCABULARIES = json.loads((DATA / "vocabularies.json").read_text(encoding="utf-8"))
HARD_TEXTS: list[str] = json.loads((DATA / "hard_texts.json").read_text(encoding="utf-8"))


def toy(vocabulary: str, fields: Mapping[str, object]) -> BackendTokenizer:
    return tokenizer_from_gguf(
        {f"tokenizer.ggml.{key}": v for key, v in {**VOCABULARIES[vocabulary], **fields}.items()}
    )


CUTTABLE = {name: toy("byte_level", {"model": "gpt2", "pre": name}) for name in PRE_TOKENIZERS} | {
    "llama3 folder": tokenizer_from_folder(DATA / "llama3_folder")
}
WHOLE = {
    "sentence piece": toy("sentence_piece", {"model": "llama", "bos_token_id": 1}),
    "llama2 folder": tokenizer_from_folder(DATA / "llama2_folder"),
}
PIECES = (
    "a", "b c", " d", " ", "  ", "\n", "\r\n", "\n\n", "'s", "'S", ".", ", ", "!\n", "12", "1234 ", "\u00e9", "e\u0301",
    "\u4e2d", "\u6587\uff0c", "\u3002", "\u3042\u3001", "\ud55c\uff01", "\t", "\u00a0", "_", "<|im_end|>", "\u0301",
    "x\n",
)  # fmt: skip


def in_one(tokenizer: BackendTokenizer, text: str, **options: bool) -> list[int]:
    return list(tokenizer.backend.encode(text, **options).ids)


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few characters, so that short texts have many."""
    monkeypatch.setattr("jaxserve.text.tokenizer.LONG_TEXT_CHARS", 0)
    monkeypatch.setattr("jaxserve.text.tokenizer.PART_CHARS", 0)
    monkeypatch.setattr(cuts, "PART_CHARS", 1)


@pytest.mark.parametrize("name", CUTTABLE)
def test_parts_give_the_tokens_of_the_whole(name: str) -> None:
    tokenizer = CUTTABLE[name]
    assert cuts.can_be_cut(tokenizer.backend)

    @given(pieces=st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=40), begin=st.integers(0, 3))
    def holds(pieces: list[str], begin: int) -> None:
        text = "".join(pieces)
        ids: list[int] = []
        start = 0
        for cut in list(cuts._CUT.finditer(text))[begin::2]:
            ids += in_one(tokenizer, text[start : cut.start()], add_special_tokens=False)
            start = cut.start()
        ids += in_one(tokenizer, text[start:], add_special_tokens=False)
        assert ids == in_one(tokenizer, text, add_special_tokens=False)

    holds()


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("name", CUTTABLE)
def test_hard_texts(name: str) -> None:
    tokenizer = CUTTABLE[name]
    text = " and then\nso".join(HARD_TEXTS)
    assert len(list(cuts.parts(text))) > len(HARD_TEXTS)
    assert tokenizer.encode(text, add_special_tokens=False) == in_one(tokenizer, text, add_special_tokens=False)


@pytest.mark.usefixtures("short_parts")
def test_special_tokens_stand_around_the_whole_only() -> None:
    tokenizer = CUTTABLE["llama3 folder"]
    ids = tokenizer.encode("one two three")
    assert ids == in_one(tokenizer, "one two three", add_special_tokens=True)
    assert ids[0] == 1
    assert 1 not in ids[1:]


def test_a_long_text_is_never_encoded_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = CUTTABLE["smollm"]
    longest: list[int] = []
    encode = BackendTokenizer._encode_long

    def spy(self: BackendTokenizer, text: str) -> list[int]:
        longest.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(BackendTokenizer, "_encode_long", spy)
    tokenizer.encode("hello you " * 50_000)
    assert max(longest) <= cuts.PART_CHARS + len(" hello")
    assert sum(longest) == 500_000


@pytest.mark.parametrize("tokenizer", [CUTTABLE["smollm"], *WHOLE.values()])
def test_what_cannot_be_cut_has_a_bound(tokenizer: BackendTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "MAX_UNCUT_CHARS" if cuts.can_be_cut(tokenizer.backend) else "MAX_WHOLE_CHARS"
    monkeypatch.setattr(f"jaxserve.text.tokenizer.{name}", 100_000)
    assert tokenizer.encode("a" * 100_000)
    with pytest.raises(InvalidRequestError, match="100001 characters that can only be tokenised together"):
        tokenizer.encode("a" * 100_001)


@pytest.mark.parametrize("name", WHOLE)
def test_of_others_nothing_is_claimed(name: str) -> None:
    assert not cuts.can_be_cut(WHOLE[name].backend)


def byte_level(**changes: Any) -> Backend:
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(sorted(byte_alphabet()))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": normalizers.Lowercase()},
        {"normalizer": normalizers.Replace("a b", "c")},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
        {"pre_tokenizer": pre_tokenizers.Split(Regex(r"[a-z ]+"), "isolated")},
        {"pre_tokenizer": pre_tokenizers.WhitespaceSplit()},
    ],
    ids=str,
)
def test_steps_that_look_across_a_cut(changes: dict[str, Any]) -> None:
    assert cuts.can_be_cut(byte_level())
    assert not cuts.can_be_cut(byte_level(**changes))


@pytest.mark.parametrize(
    ("token", "may"),
    [
        (AddedToken("<a>"), True),
        (AddedToken(" a"), True),
        (AddedToken("a b"), False),
        (AddedToken("\na"), False),
        (AddedToken("\u4e2d\uff0c"), False),
        (AddedToken("<a>", lstrip=True), False),
        (AddedToken("<a>", rstrip=True), False),
    ],
    ids=str,
)
def test_added_tokens_across_a_cut(token: AddedToken, may: bool) -> None:
    backend = byte_level()
    backend.add_tokens([token])
    assert cuts.can_be_cut(backend) is may
