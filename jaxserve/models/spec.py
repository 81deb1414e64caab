"""ModelSpec: everything the decoder needs to know about a model, with no default for any hyper-parameter.

A family file turns a Hugging Face config or GGUF metadata into a spec; the decoder reads nothing else. A spec is
frozen and hashable, so it can be a static argument of a jitted function.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias


class Activation(enum.StrEnum):
    """The gate of the feed-forward block."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRopeScaling:
    """Positions divided by `factor` (position interpolation, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency-dependent scaling: low frequencies are divided by `factor`, high ones kept, a ramp between.

    Attributes:
        factor: Divisor of the low frequencies.
        low_freq_factor: Wavelengths above original_max_len / low_freq_factor are scaled fully.
        high_freq_factor: Wavelengths below original_max_len / high_freq_factor are not scaled.
        original_max_len: Context length the model was first trained with, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnRopeScaling:
    """YaRN (arXiv:2309.00071): low frequencies are divided by `factor`, high ones kept, a ramp over those between.

    Attributes:
        factor: Divisor of the low frequencies.
        original_max_len: Context length the model was first trained with, in tokens.
        beta_fast: Dimensions that turn more often than this in `original_max_len` are kept.
        beta_slow: Dimensions that turn less often than this are divided fully.
        truncate: Whether the ramp begins and ends at whole dimensions.
        attention_factor: What cosine and sine are multiplied by.
    """

    factor: float
    original_max_len: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRopeScaling:
    """LongRoPE (arXiv:2402.13753): a divisor for each frequency, of one list up to a length and of another beyond it.

    Which list holds for all positions is decided by the longest sequence that is served; see docs/adr/0009.

    Attributes:
        short_factors: H/2 divisors where no sequence is longer than `original_max_len`.
        long_factors: H/2 divisors where one may be.
        original_max_len: Context length the model was first trained with, in tokens.
        attention_factor: What cosine and sine are multiplied by, with either list.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_len: int
    attention_factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicRopeScaling:
    """Dynamic NTK: the base grows with the longest sequence that is served, beyond `original_max_len`; docs/adr/0009.

    Attributes:
        factor: How far: the base is multiplied by (factor * len / original_max_len - factor + 1) ** (H / (H - 2)).
        original_max_len: Context length the model was trained with, in tokens.
    """

    factor: float
    original_max_len: int


RopeScaling: TypeAlias = LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling | LongRopeScaling | DynamicRopeScaling


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary position embedding (arXiv:2104.09864), rotating the two halves of a head against each other.

    Attributes:
        theta: Base of the frequencies.
        scaling: How the frequencies are stretched for long contexts, or None.
    """

    theta: float
    scaling: RopeScaling | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only transformer.

    Attributes:
        family: Name of the family file that made this spec.
        num_layers: L.
        hidden_size: D.
        num_heads: N, query heads.
        num_kv_heads: K, divides N.
        head_dim: H.
        ffn_size: F.
        vocab_size: V, rows of the embedding.
        max_position: Longest context the model can be served with, in tokens.
        norm_eps: Epsilon of every RMS norm.
        rope: Position embedding.
        activation: Gate of the feed-forward block.
        qkv_bias: Biases on the query, key and value projections.
        out_bias: Bias on the attention's output projection.
        mlp_bias: Biases in the feed-forward block.
        qk_norm: RMS norm over the head dimension of queries and keys (Qwen3).
        tie_embeddings: The output projection is the embedding table.
        sliding_window: Each token sees this many tokens up to itself; None sees all.
        attention_soft_cap: Attention logits squashed to (-cap, cap), or None.
        logit_soft_cap: The same for output logits, or None.
        bos_token_id: Token a prompt begins with if the tokenizer adds one, or None.
        eos_token_ids: Tokens that end a sequence.
        dtype: Floating-point type the checkpoint is stored in ("float32", "bfloat16", "float16").
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope: RopeSpec
    activation: Activation
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    sliding_window: int | None
    attention_soft_cap: float | None
    logit_soft_cap: float | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str

    @property
    def default_max_len(self) -> int:
        """Longest context served unless a longer one is asked for: where longer ones change shorter ones, not those."""
        scaling = self.rope.scaling
        if isinstance(scaling, LongRopeScaling | DynamicRopeScaling):
            return min(self.max_position, scaling.original_max_len)
        return self.max_position

    @property
    def q_per_kv(self) -> int:
        """G, query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads
