"""Added tokens and vocabularies with holes: every token has the id that the files give it, and its text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxserve.core.errors import CheckpointError
from jaxserve.text.detokenize import IncrementalDetokenizer
from jaxserve.text.tokenizer import BackendTokenizer, tokenizer_from_folder

DATA = Path(__file__).parent / "data"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "llama3_folder", tmp_path / "model"))


def write(folder: Path, vocab: dict[str, int], added: dict[str, int], **config: Any) -> BackendTokenizer:
    """A byte-level tokenizer of a few tokens, the added ones special."""
    file = folder / "tokenizer.json"
    entries = [{"id": i, "content": text, "special": True, **FLAGS} for text, i in added.items()]
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    document = {**json.loads(file.read_text()), "model": model, "added_tokens": entries, "post_processor": None}
    file.write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer_from_folder(folder)


def test_a_vocabulary_with_holes_keeps_its_text(folder: Path) -> None:
    tokenizer = write(folder, {"a": 0, "b": 7, "c": 1000}, {})
    assert tokenizer.vocab_size == 1001
    assert tokenizer.encode("abc") == [0, 7, 1000]
    assert tokenizer.decode([0, 7, 1000]) == "abc"
    assert IncrementalDetokenizer(tokenizer).push([0, 7, 500, 1000]) == "abc"
    assert tokenizer.token_bytes(1000) == b"c"
    assert tokenizer.token_bytes(500) == b""


def test_rows_of_a_model_beyond_the_tokenizer_have_no_text(folder: Path) -> None:
    tokenizer = write(folder, {"a": 0}, {"<x>": 5})
    padded = [0, 3, 5, 6, 1 << 20, (1 << 40) + 1]
    assert tokenizer.decode(padded, skip_special_tokens=False) == "a<x>"
    assert tokenizer.decode(padded) == "a"
    assert [tokenizer.token_text(token_id) for token_id in padded] == ["a", "", "<x>", "", "", ""]
    assert not any(tokenizer.is_special(token_id) for token_id in padded if token_id != 5)


def test_added_tokens_have_the_ids_that_the_file_gives_them(folder: Path) -> None:
    """The library alone makes them 4 and 5, one of which is another token's."""
    tokenizer = write(folder, {"a": 0, "b": 1, "c": 10, "d": 4}, {"<x>": 50, "<y>": 60})
    assert tokenizer.encode("a<x>d<y>c") == [0, 50, 4, 60, 10]
    assert tokenizer.decode([0, 50, 4, 60, 10], skip_special_tokens=False) == "a<x>d<y>c"
    assert tokenizer.decode([0, 50, 4]) == "ad"
    assert tokenizer.vocab_size == 61
    assert tokenizer.is_special(60)


def test_tokens_of_the_config_may_leave_holes(folder: Path) -> None:
    listed = {"9": {"content": "<x>", "special": True}, "12": {"content": "<y>", "special": False}}
    tokenizer = write(folder, {"a": 0, "b": 1}, {}, added_tokens_decoder=listed, eos_token="<x>")
    assert tokenizer.encode("a<x><y>") == [0, 9, 12]
    assert tokenizer.eos_token_ids == (9,)
    assert [tokenizer.is_special(token_id) for token_id in (9, 12)] == [True, False]


def test_tokens_that_both_files_list_are_one(folder: Path) -> None:
    listed = {"2": {"content": "<x>", "special": True, "lstrip": None}}
    tokenizer = write(folder, {"a": 0, "b": 1}, {"<x>": 2}, added_tokens_decoder=listed)
    assert tokenizer.encode("<x>a") == [2, 0]
    assert tokenizer.vocab_size == 3


@pytest.mark.parametrize(
    ("added", "listed", "message"),
    [
        ({"a": 5}, {}, r"tokenizer\.json gives the token 'a' the id 5, but the tokenizer makes it 0"),
        ({"<x>": 0}, {}, r"tokenizer\.json gives the token '<x>' the id 0, but"),
        ({}, {"5": {"content": "a"}}, r"tokenizer_config\.json gives the token 'a' the id 5, but"),
    ],
)
def test_ids_that_cannot_be_are_refused(
    folder: Path, added: dict[str, int], listed: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write(folder, {"a": 0, "b": 1}, added, added_tokens_decoder=listed)


@pytest.mark.parametrize(
    "listed",
    [
        {"x": {"content": "<x>"}},
        {"-1": {"content": "<x>"}},
        {"²": {"content": "<x>"}},
        {"9" * 5000: {"content": "<x>"}},
        {"4294967296": {"content": "<x>"}},
        {"5": "text"},
        {"5": None},
        {"5": {}},
        {"5": {"content": 3}},
        {"5": {"content": ""}},
        {"5": {"content": "<x>", "special": "yes"}},
        {"5": {"content": "<x>", "lstrip": [[]]}},
        [["5", "<x>"]],
        7,
    ],
)
def test_odd_lists_of_added_tokens_are_one_sentence(folder: Path, listed: object) -> None:
    with pytest.raises(CheckpointError, match=r"^tokenizer_config\.json has .*added_tokens_decoder"):
        write(folder, {"a": 0}, {}, added_tokens_decoder=listed)


def test_a_token_with_half_a_character_is_one_sentence(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="not a tokenizer that the tokenizers library can read"):
        write(folder, {"a": 0}, {}, added_tokens_decoder={"5": {"content": "\ud800"}})
    with pytest.raises(CheckpointError, match="not a tokenizer that the tokenizers library can read"):
        write(folder, {"a": 0}, {}, bos_token="\udfff")


def test_no_list_is_none(folder: Path) -> None:
    assert write(folder, {"a": 0}, {}, added_tokens_decoder=None).encode("a") == [0]
