"""Sizes that a model can have: bounds on what a config says, checked before anything is made that large."""

from __future__ import annotations

from collections.abc import Mapping

from jaxserve.core.errors import CheckpointError

_LAYERS, _WIDTH, _FFN, _HEADS, _VOCAB, _CONTEXT = 1 << 12, 1 << 20, 1 << 22, 1 << 14, 1 << 24, (1 << 31) - 1

# Bounds far above any model's; products of them still fit into 64 bits.
_MOST: Mapping[str, int] = {
    "num_hidden_layers": _LAYERS,
    "block_count": _LAYERS,
    "hidden_size": _WIDTH,
    "embedding_length": _WIDTH,
    "intermediate_size": _FFN,
    "feed_forward_length": _FFN,
    "num_attention_heads": _HEADS,
    "attention.head_count": _HEADS,
    "num_key_value_heads": _HEADS,
    "attention.head_count_kv": _HEADS,
    "head_dim": _HEADS,
    "attention.key_length": _HEADS,
    "attention.value_length": _HEADS,
    "vocab_size": _VOCAB,
    "max_position_embeddings": _CONTEXT,
    "context_length": _CONTEXT,
    "sliding_window": _CONTEXT,
    "attention.sliding_window": _CONTEXT,
}


def require_possible(config: Mapping[str, object], origin: str, *, prefix: str = "") -> None:
    """Makes sure that no size of a config is absurd.

    Args:
        config: config.json, or GGUF metadata.
        origin: Where it is from, for the error.
        prefix: What keys begin with.

    Raises:
        CheckpointError: One is; all are listed.
    """
    absurd = []
    for name, most in _MOST.items():
        value = config.get(prefix + name)
        values = value if isinstance(value, list) else [value]
        wrong = next((each for each in values if isinstance(each, int) and each > most), None)
        if wrong is not None:
            absurd.append(f"{prefix}{name} = {wrong if wrong < 1 << 64 else 'more than 2**64'}, at most {most}")
    if absurd:
        raise CheckpointError(f"{origin} describes a model that cannot be ({'; '.join(absurd)}); download it again.")
