"""Tokenizer files that nobody's tool wrote: whatever the tokenizers library makes of them, one sentence comes out."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxserve.core.errors import CheckpointError, InvalidRequestError
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.library_errors import library_errors
from jaxserve.text.tokenizer import LONG_TEXT_CHARS, tokenizer_from_folder

DATA = Path(__file__).parent / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "llama3_folder", tmp_path / "model"))


def change(folder: Path, **parts: Any) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))


def charsmap(content: bytes) -> dict[str, str]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


# A token that is normalised to nothing is found within characters, which the library cuts in two.
SWALLOWED = {"id": 2000, "content": "\u03a9", "single_word": True, "lstrip": False, "rstrip": False, "normalized": True}
SWALLOWS = {"type": "Replace", "pattern": {"String": "\u03a9"}, "content": ""}


def test_a_panic_while_loading_is_one_sentence(folder: Path) -> None:
    change(folder, normalizer=charsmap(b""))
    with pytest.raises(CheckpointError, match=r"the tokenizers library can read: .*precompiled_charsmap"):
        tokenizer_from_folder(folder)


@pytest.mark.parametrize("length", [1, LONG_TEXT_CHARS])
def test_a_panic_over_a_text_is_the_requests_fault(folder: Path, length: int) -> None:
    change(folder, added_tokens=[{**SWALLOWED, "special": False}], normalizer=SWALLOWS, post_processor=None)
    (folder / "tokenizer_config.json").write_text("{}")
    tokenizer = tokenizer_from_folder(folder)
    with pytest.raises(InvalidRequestError, match="cannot tokenise this text"):
        tokenizer.encode("a \u4e2d" * length)
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc", "others are served on"


def test_other_exceptions_pass() -> None:
    with pytest.raises(KeyboardInterrupt), library_errors(CheckpointError):
        raise KeyboardInterrupt
    with pytest.raises(InvalidRequestError, match="mine"), library_errors(CheckpointError):
        raise InvalidRequestError("mine")
    with pytest.raises(CheckpointError, match=r"^theirs$"), library_errors(CheckpointError):
        raise ValueError("theirs\nmore")


def replaces(old: str, new: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


EXPRESSION = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 5000}


@pytest.mark.parametrize(
    ("part", "steps"),
    [
        ("normalizer", [replaces("a", "aa")] * 40),
        ("normalizer", [EXPRESSION]),
        ("normalizer", [{"type": "Prepend", "prepend": "x" * 2000}]),
        ("decoder", [replaces("a", "aa")] * 40),
        ("decoder", [replaces("", "x" * 2000)]),
    ],
)
def test_parts_that_make_a_text_absurdly_long(folder: Path, part: str, steps: list[dict[str, object]]) -> None:
    inner = {"normalizer": "normalizers", "decoder": "decoders"}[part]
    change(folder, **{part: {"type": "Sequence", inner: steps}})
    with pytest.raises(CheckpointError, match=rf"The {part} of tokenizer\.json can make a text more than 1024 times"):
        tokenizer_from_folder(folder)


def test_escaped_keys_are_keys(folder: Path) -> None:
    change(folder, normalizer={"type": "Sequence", "normalizers": [replaces("a", "aa")] * 40})
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"normalizer"', r'"\u006eormalizer"'))
    with pytest.raises(CheckpointError, match="can make a text more than 1024 times"):
        tokenizer_from_folder(folder)


def test_a_character_map_may_not_make_pages_of_a_character(folder: Path) -> None:
    change(folder, normalizer=charsmap(bytes(4) + b"x" * 5000 + b"\0"))
    with pytest.raises(CheckpointError, match="can make a text more than 1024 times"):
        tokenizer_from_folder(folder)


def test_stripping_takes_no_longer_for_a_large_number(folder: Path) -> None:
    strip = {"type": "Strip", "content": " ", "start": 1 << 60, "stop": 0}
    change(folder, decoder={"type": "Sequence", "decoders": [replaces("\u0120", " "), strip]})
    tokenizer = tokenizer_from_folder(folder)
    [space] = tokenizer.encode(" ", add_special_tokens=False)
    assert tokenizer.decode([space, space]) == ""


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"model": ' * 500, b'{"added_tokens": [' * 200_000],
)
def test_garbage_in_tokenizer_json(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer that"):
        tokenizer_from_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_what_is_no_file_is_one_sentence(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: it is not a regular file\."):
        tokenizer_from_folder(folder)


def test_templates_are_utf8(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"Gr\xfc\xdfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8"):
        tokenizer_from_folder(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"rag\.jinja is not UTF-8"):
        tokenizer_from_folder(folder)


def test_tokens_too_long_to_be_cut_in_two() -> None:
    tokens = ["<unk>", "<s>", "</s>", "x" * 30_000]
    keys = {"model": "llama", "tokens": tokens, "scores": [0.0] * 4}
    with pytest.raises(CheckpointError, match="too long to be a vocabulary"):
        tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
