"""Added tokens: those that a tokenizer's files list beside the model's vocabulary, under the ids that they give them.

The `tokenizers` library numbers added tokens itself, from the number of tokens on, whatever ids the files give them. In
a vocabulary with holes that is an id too low, perhaps one that another token has. A token of the model's own vocabulary
keeps its id, so tokens that would be numbered wrongly are put there before the library reads the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import tokenizers

from jaxserve.core.errors import CheckpointError
from jaxserve.text.growth import require_bounded_growth

_MAX_TOKEN_ID = (1 << 31) - 1
_ESCAPED_LETTER = re.compile(rb"\\u00[2-7]")


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedToken:
    """A token of tokenizer_config.json's `added_tokens_decoder`.

    Attributes:
        token_id: Its id.
        token: The token.
    """

    token_id: int
    token: tokenizers.AddedToken


def listed_tokens(config: Mapping[str, object]) -> list[ListedToken]:
    """The tokens that tokenizer_config.json lists, by id.

    Raises:
        CheckpointError: The list, or an entry of it, is not of the form that `transformers` writes.
    """
    listed = config.get("added_tokens_decoder")
    if listed is None:
        return []
    if not isinstance(listed, dict):
        raise CheckpointError("tokenizer_config.json has an added_tokens_decoder that is not an object.")
    found = [_listed_token(key, entry) for key, entry in listed.items()]
    return sorted(found, key=lambda each: each.token_id)


def _listed_token(key: str, entry: object) -> ListedToken:
    match entry:
        case {"content": str(content), **rest} if key.isascii() and key.isdigit() and len(key) <= 10:
            flags = {name: rest.get(name) for name in ("special", "lstrip", "rstrip", "normalized", "single_word")}
            if content and int(key) <= _MAX_TOKEN_ID and all(isinstance(flag, bool | None) for flag in flags.values()):
                given = {name: flag for name, flag in flags.items() if flag is not None}
                return ListedToken(token_id=int(key), token=tokenizers.AddedToken(content, **given))
    raise CheckpointError(
        f"tokenizer_config.json has the added_tokens_decoder entry {key!r:.40}: {entry!r:.80}, which is not a token id "
        "with an object of content and flags."
    )


def load_backend(data: bytes, listed: Iterable[ListedToken], origin: str) -> tokenizers.Tokenizer:
    """A tokenizer with all added tokens under the ids that the files give them.

    Args:
        data: tokenizer.json.
        listed: The tokens of tokenizer_config.json; those whose ids tokenizer.json has already are passed over.
        origin: Name of tokenizer.json for errors.

    Raises:
        CheckpointError: A token cannot have its id.
        Exception: Whatever the library raises for a malformed file.
    """
    for normalizer in _values(data, "normalizer"):
        require_bounded_growth(normalizer, "normalizer")
    own = _own_ids(data)
    missing = [each for each in listed if each.token_id not in own.values()]
    wanted = own | {each.token.content: each.token_id for each in missing}
    backend = _backend(data, missing)
    wrong = _misplaced(backend, wanted)
    if wrong:
        backend = _backend(_with_ids(data, wrong), missing)
        wrong = _misplaced(backend, wanted)
    for text, token_id in wrong.items():
        raise CheckpointError(
            f"{origin if text in own else 'tokenizer_config.json'} gives the token {text!r:.60} the id {token_id}, but "
            f"the tokenizer makes it {backend.token_to_id(text)}."
        )
    return backend


def _own_ids(data: bytes) -> dict[str, int]:
    """Ids of the added tokens of a tokenizer.json by text."""
    return {
        entry["content"]: entry["id"]
        for listed in _values(data, "added_tokens")
        if isinstance(listed, list)
        for entry in listed
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and isinstance(entry.get("id"), int)
    }


def _values(data: bytes, key: str) -> list[object]:
    """The objects and lists under a key, wherever it is in a tokenizer.json; parsing all of it takes too long.

    A key within a text has escaped quotes. Where letters are escaped, which no tool does, all of it is parsed.
    """
    if _ESCAPED_LETTER.search(data):
        document = json.loads(data)
        return [document.get(key)] if isinstance(document, dict) else []
    places = re.finditer(rb'"%b"\s*:\s*(?=[\[{])' % key.encode(), data)
    return [json.JSONDecoder().raw_decode(data[place.end() :].decode())[0] for place in places]


def _backend(data: bytes, missing: Iterable[ListedToken]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_buffer(data)
    for each in missing:
        add = backend.add_special_tokens if each.token.special else backend.add_tokens
        add([each.token])
    return backend


def _misplaced(backend: tokenizers.Tokenizer, wanted: Mapping[str, int]) -> dict[str, int]:
    """Of some tokens those that have another id than the wanted one."""
    return {text: token_id for text, token_id in wanted.items() if backend.token_to_id(text) != token_id}


def _with_ids(data: bytes, tokens: Mapping[str, int]) -> bytes:
    """A tokenizer.json whose model has some tokens more, as far as neither their texts nor their ids are taken."""
    document = json.loads(data)
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, dict):
        taken = set(vocabulary.values())
        vocabulary |= {
            text: token_id for text, token_id in tokens.items() if text not in vocabulary and token_id not in taken
        }
    return json.dumps(document).encode()


def mark_special(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Makes role tokens of the plain vocabulary special, so that they are found in text and skipped in output."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for text in texts:
        if text not in special and backend.token_to_id(text) is not None:
            backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])
