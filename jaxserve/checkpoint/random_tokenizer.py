"""A tokenizer for models with random weights: every byte is a token, the rest of the vocabulary is made-up words."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from jaxserve.models.spec import ModelSpec
from jaxserve.text.tokenizer import BackendTokenizer, TokenizerFacts


def byte_tokenizer(spec: ModelSpec) -> BackendTokenizer:
    """A byte-level tokenizer with as many tokens as the model has.

    The model's BOS and end-of-sequence ids are control tokens; the lowest other ids are the bytes; the rest decode to
    " w123".
    """
    control = {*spec.eos_token_ids, *(() if spec.bos_token_id is None else (spec.bos_token_id,))}
    others = [token_id for token_id in range(spec.vocab_size) if token_id not in control]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # "Ġ" is how byte-level tokenizers write a space.
    words = [*alphabet, *(f"Ġw{token_id}" for token_id in others[len(alphabet) :])]
    vocab = dict(zip(words, others, strict=False)) | {_control_text(token_id): token_id for token_id in control}
    backend = Tokenizer(BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(_control_text(token_id), special=True) for token_id in sorted(control)])
    roles = {"eos_token": _control_text(spec.eos_token_ids[0])} if spec.eos_token_ids else {}
    return BackendTokenizer(
        backend,
        TokenizerFacts(bos_token_id=spec.bos_token_id, eos_token_ids=spec.eos_token_ids, special_tokens=roles),
    )


def _control_text(token_id: int) -> str:
    return f"<|{token_id}|>"
