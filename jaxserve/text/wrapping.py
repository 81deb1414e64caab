"""What a model expects around a prompt: a BOS token before it, perhaps an EOS token after it.

tokenizer.json says it in a post-processor. In tokenizer_config.json `add_bos_token` governs what is before the text and
`add_eos_token` what is after it; a key that is absent or null leaves its side to the post-processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import tokenizers

from jaxserve.core.errors import CheckpointError

Ids = tuple[int, ...]

_NUM_SAMPLES = 64


def wrapping_ids(
    backend: tokenizers.Tokenizer, config: Mapping[str, object], *, bos: int | None, eos: int | None
) -> tuple[Ids, Ids]:
    """The token ids before and after a text.

    Args:
        backend: Has the post-processor.
        config: tokenizer_config.json.
        bos: The BOS token, if the model has one.
        eos: The EOS token, if the model has one.

    Raises:
        CheckpointError: A key is neither true nor false, or the post-processor does something else.
    """
    prefix, suffix = _side(config, "add_bos_token", bos), _side(config, "add_eos_token", eos)
    if prefix is None or suffix is None:
        before, after = _added_by(backend)
        prefix, suffix = before if prefix is None else prefix, after if suffix is None else suffix
    return prefix, suffix


def _side(config: Mapping[str, object], key: str, token_id: int | None) -> Ids | None:
    """What a key puts on its side; None leaves that to the post-processor."""
    match config.get(key):
        case True:
            return None if token_id is None else (token_id,)
        case False:
            return ()
        case None:
            return None
        case other:
            raise CheckpointError(f"tokenizer_config.json has {key} = {other!r:.40}, which is neither true nor false.")


def _added_by(backend: tokenizers.Tokenizer) -> tuple[Ids, Ids]:
    """What the post-processor puts before and after a text, found by looking at what it does to one."""
    if backend.num_special_tokens_to_add(is_pair=False) == 0:
        return (), ()
    for text in _samples(backend):
        plain = backend.encode(text, add_special_tokens=False).ids
        if not plain:
            continue
        encoding = backend.encode(text, add_special_tokens=True)
        inside = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
        if inside:
            before, after = encoding.ids[: inside[0]], encoding.ids[inside[-1] + 1 :]
            if [*before, *plain, *after] == encoding.ids:
                return tuple(before), tuple(after)
        break
    raise CheckpointError(
        "The post-processor of tokenizer.json does something else than to put tokens before and after a text, which is "
        "not supported."
    )


def _samples(backend: tokenizers.Tokenizer) -> Iterator[str]:
    """Texts of which one has a token, whatever the vocabulary."""
    yield from ("a", "0")
    yield from (token.content for token in backend.get_added_tokens_decoder().values())
    yield from islice(backend.get_vocab(), _NUM_SAMPLES)
