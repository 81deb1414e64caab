"""Answers made of token ids and their texts, which may be millions: written piece by piece, as they are made.

A piece is some thousand tokens. What fits one piece is an ordinary answer; the rest is made in a thread while the event
loop sends what is there, so that neither the loop nor the memory ever holds all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse

from jaxserve.server.openai.offload import Offload
from jaxserve.text.detokenize import IncrementalDetokenizer
from jaxserve.text.tokenizer import Tokenizer

PIECE_TOKENS = 8192
"""Tokens of a piece; they take some milliseconds."""

_JSON = "application/json"
_ENCODE = msgspec.json.Encoder().encode


async def pieces_response(offload: Offload, num_tokens: int, pieces: Iterator[bytes]) -> Response:
    """A JSON answer that is sent as it is made.

    Args:
        offload: Makes the pieces if there are many.
        num_tokens: Tokens in it.
        pieces: Makes the JSON.
    """
    if num_tokens <= PIECE_TOKENS:
        return Response(b"".join(pieces), media_type=_JSON)
    return StreamingResponse(offload.pieces(pieces), media_type=_JSON)


async def token_ids_response(offload: Offload, prompts: Sequence[Sequence[int]], *, listed: bool) -> Response:
    """The answer of the `render` endpoints: `{"token_ids": [...]}`.

    Args:
        offload: Makes the pieces if there are many.
        prompts: Token ids of each prompt.
        listed: A list of such objects, one a prompt; otherwise there is one prompt.
    """
    objects = (chain([b'{"token_ids":'], _list(prompt), [b"}"]) for prompt in prompts)
    pieces = chain([b"["], _joined(objects), [b"]"]) if listed else chain.from_iterable(objects)
    return await pieces_response(offload, sum(map(len, prompts)), iter(pieces))


def tokenized_json(
    token_ids: Sequence[int], max_model_len: int, tokenizer: Tokenizer, *, with_texts: bool
) -> Iterator[bytes]:
    """The answer of `/tokenize`.

    Args:
        token_ids: What the prompt became.
        max_model_len: Of the model.
        tokenizer: The model's.
        with_texts: Show each token's text.
    """
    yield f'{{"count":{len(token_ids)},"max_model_len":{max_model_len},"tokens":'.encode()
    yield from _list(token_ids)
    yield b',"token_strs":'
    if with_texts:
        yield from _list(token_ids, tokenizer.token_text)
    else:
        yield b"null"
    yield b"}"


def detokenized_json(token_ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[bytes]:
    """The answer of `/detokenize`: `Tokenizer.decode` of all tokens, control tokens included.

    Args:
        token_ids: Within the vocabulary.
        tokenizer: The model's.
    """
    yield b'{"prompt":"'
    head = token_ids[:PIECE_TOKENS]
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    # A whole decode may drop spaces at the start of the text, an incremental one never does.
    num_dropped = len(detokenizer.push(head) + detokenizer.flush())
    num_dropped -= len(tokenizer.decode(head, skip_special_tokens=False))
    for start in range(0, len(token_ids), PIECE_TOKENS):
        text = detokenizer.push(token_ids[start : start + PIECE_TOKENS])
        yield _ENCODE(text[num_dropped:])[1:-1]
        num_dropped = 0
    yield _ENCODE(detokenizer.flush()[num_dropped:])[1:-1]
    yield b'"}'


def _list(token_ids: Sequence[int], shown: Callable[[int], Any] | None = None) -> Iterator[bytes]:
    """A JSON list of the ids, or of what a function makes of each."""
    yield b"["
    for start in range(0, len(token_ids), PIECE_TOKENS):
        piece: Sequence[Any] = token_ids[start : start + PIECE_TOKENS]
        items = _ENCODE(piece if shown is None else [shown(token_id) for token_id in piece])[1:-1]
        yield b"," + items if start else items
    yield b"]"


def _joined(lists: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    """JSON values with commas between them."""
    for i, pieces in enumerate(lists):
        if i:
            yield b","
        yield from pieces
