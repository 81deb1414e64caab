"""Rotary embedding as checkpoints describe it: both dialects of config.json, and GGUF keys with their factor tensors.

What is read means what `transformers` (modeling_rope_utils) and llama.cpp make of it. GGUF files of Llama 3.1 and later
say nothing of their rope scaling in keys; they carry the divisor of each frequency in `rope_freqs.weight`. The spec is
recovered from it and checked against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from jaxserve.models.config_reader import ConfigReader
from jaxserve.models.family import GGUFHeader
from jaxserve.models.layers.rope import inverse_frequencies
from jaxserve.models.spec import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeScaling,
    RopeSpec,
    YarnRopeScaling,
)

HF_DEFAULT_THETA = 10000.0
"""What a config without `rope_theta` means: `default_theta` of RotaryEmbeddingConfigMixin in transformers."""

GGUF_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors of a GGUF file that the rope is made of."""

_LLAMA3 = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192)
"""Llama 3.1's scaling; later models of the family change only the factor."""

_BETA_FAST, _BETA_SLOW = 32.0, 1.0
"""What YaRN without them means, in transformers and llama.cpp."""

_HF_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_GGUF_KINDS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadRope:
    """A rope and how far it reaches.

    Attributes:
        spec: The rope.
        max_position: Longest context, in tokens: what the checkpoint says, or what the scaling stretches it to.
    """

    spec: RopeSpec
    max_position: int


def rope_from_hf(config: ConfigReader, *, head_dim: int, max_position: int) -> ReadRope:
    """The rope of a Hugging Face config in either dialect; problems are left in `config`.

    Args:
        config: config.json.
        head_dim: H.
        max_position: Its `max_position_embeddings`.
    """
    config.fixed("partial_rotary_factor", 1, 1.0)
    theta = config.number("rope_theta", absent=HF_DEFAULT_THETA)
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    if new is not None and old is not None and new.values != old.values:
        config.wrong("rope_parameters and rope_scaling are both there and differ")
    section = new or old
    scaling: RopeScaling | None = None
    if section is not None:
        if set(section.values) == {"full_attention"}:  # a section a kind of layer, of one kind
            section = section.section("full_attention") or section
        theta = section.number("rope_theta", absent=theta)
        section.fixed("partial_rotary_factor", 1, 1.0)
        scaling = _HFScaling(config, section, head_dim=head_dim, max_position=max_position).read()
        section.close()
    if config.has("original_max_position_embeddings") and not isinstance(
        scaling, Llama3RopeScaling | YarnRopeScaling | LongRopeScaling
    ):
        config.fixed("original_max_position_embeddings", max_position)
    rope = RopeSpec(theta=theta, scaling=scaling)
    _require_computable(config, rope, head_dim)
    return ReadRope(spec=rope, max_position=_reach(scaling, max_position))


class _HFScaling:
    """Reads the section of a config that describes a scaling."""

    def __init__(self, config: ConfigReader, section: ConfigReader, *, head_dim: int, max_position: int) -> None:
        self._config = config
        self._section = section
        self._head_dim = head_dim
        self._max_position = max_position

    def read(self) -> RopeScaling | None:
        section = self._section
        older = section.text("type", absent="default")
        kind = section.text("rope_type", absent=older)
        match "longrope" if kind == "su" else kind:
            case "default":
                section.fixed("factor", 1, 1.0)
                return None
            case "linear":
                return LinearRopeScaling(factor=section.number("factor"))
            case "dynamic":
                # transformers takes the length it was trained with from max_position_embeddings, whatever stands here.
                section.fixed("original_max_position_embeddings", self._max_position)
                return DynamicRopeScaling(factor=section.number("factor"), original_max_len=self._max_position)
            case "llama3":
                return self._llama3()
            case "yarn":
                return self._yarn()
            case "longrope":
                return self._longrope()
        section.wrong(f"rope type {kind!r} is not supported (only {', '.join(_HF_KINDS)})", "type", "rope_type")
        for key in section.values:  # whatever they mean to it
            section.take(key)
        return None

    def _original_max_len(self) -> int:
        """Of the config before the section's, as transformers has it; the whole context if neither says."""
        within = self._section.integer("original_max_position_embeddings", absent=self._max_position)
        return self._config.integer("original_max_position_embeddings", absent=within)

    def _factor(self, original_max_len: int) -> float:
        return self._section.number("factor", absent=self._max_position / original_max_len)

    def _attention_factor(self, otherwise: float) -> float:
        return self._section.number("attention_factor", absent=otherwise)

    def _llama3(self) -> Llama3RopeScaling:
        section = self._section
        low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
        if low >= high:
            section.wrong(
                f"low_freq_factor = {low:g} must be less than high_freq_factor = {high:g}",
                *("low_freq_factor", "high_freq_factor"),
            )
        return Llama3RopeScaling(
            factor=section.number("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_len=self._original_max_len(),
        )

    def _yarn(self) -> YarnRopeScaling:
        section, original = self._section, self._original_max_len()
        factor = self._factor(original)
        # What vLLM knows besides, as far as it says nothing, and what says how the model was made.
        for key in ("extrapolation_factor", "attn_factor"):
            section.fixed(key, 1, 1.0)
        section.take("finetuned")
        gains = [section.number(key) if section.values.get(key) else 0.0 for key in ("mscale", "mscale_all_dim")]
        for key in ("mscale", "mscale_all_dim"):
            section.take(key)
        gain = _yarn_gain(factor, gains[0]) / _yarn_gain(factor, gains[1]) if all(gains) else _yarn_gain(factor, 1.0)
        return YarnRopeScaling(
            factor=factor,
            original_max_len=original,
            beta_fast=section.number("beta_fast", absent=_BETA_FAST),
            beta_slow=section.number("beta_slow", absent=_BETA_SLOW),
            truncate=section.boolean("truncate", absent=True),
            attention_factor=self._attention_factor(gain),
        )

    def _longrope(self) -> LongRopeScaling:
        original = self._original_max_len()
        factor = self._factor(original)
        return LongRopeScaling(
            short_factors=_divisors(self._section, "short_factor", self._head_dim),
            long_factors=_divisors(self._section, "long_factor", self._head_dim),
            original_max_len=original,
            attention_factor=self._attention_factor(_longrope_gain(factor, original)),
        )


def _yarn_gain(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope_gain(factor: float, original_max_len: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(original_max_len)) if factor > 1 and original_max_len > 1 else 1.0


def _divisors(section: ConfigReader, key: str, head_dim: int) -> tuple[float, ...]:
    values = section.take(key)
    if not isinstance(values, list) or not all(
        isinstance(each, int | float) and not isinstance(each, bool) and 0 < each < math.inf for each in values
    ):
        section.wrong(f"{key} must be a list of numbers above zero")
        return (1.0,) * (head_dim // 2)
    if len(values) != head_dim // 2:
        section.wrong(f"{key} has {len(values)} numbers and a head has {head_dim // 2} frequencies")
    return tuple(float(each) for each in values)


def _reach(scaling: RopeScaling | None, max_position: int) -> int:
    """The longest context that can be served: configs with YaRN or dynamic NTK may give the one before the scaling."""
    if isinstance(scaling, YarnRopeScaling | DynamicRopeScaling):
        return max(max_position, int(scaling.original_max_len * scaling.factor))
    return max_position


def _require_computable(config: ConfigReader, rope: RopeSpec, head_dim: int) -> None:
    """Notes what would divide by zero or overflow."""
    if head_dim % 2:
        config.wrong(f"a head of {head_dim} dimensions cannot be rotated in halves", "head_dim", "hidden_size")
    elif isinstance(rope.scaling, YarnRopeScaling) and rope.theta <= 1:
        config.wrong(f"rope_theta = {rope.theta:g} must be above 1 with YaRN", "rope_theta")
    elif isinstance(rope.scaling, DynamicRopeScaling) and head_dim <= 2:
        config.wrong(f"dynamic NTK needs heads of more than {head_dim} dimensions", "head_dim")


def rope_from_gguf(header: GGUFHeader, *, head_dim: int, max_position: int) -> ReadRope:
    """The rope of a GGUF file; problems are left in the header's reader.

    Args:
        header: The file's header.
        head_dim: H.
        max_position: Its `context_length`.
    """
    keys = header.reader
    rope = RopeSpec(theta=keys.number("rope.freq_base", absent=HF_DEFAULT_THETA), scaling=None)
    kind = keys.text("rope.scaling.type", absent="none")
    factor = keys.number("rope.scaling.factor", absent=keys.number("rope.scale_linear", absent=1.0))
    original = keys.integer("rope.scaling.original_context_length", absent=max_position)
    gain = keys.number("rope.scaling.attn_factor", absent=1.0)
    used: Sequence[str] = ()
    if kind not in _GGUF_KINDS:
        used = tuple(header.rope_factors)
        keys.wrong(f"rope.scaling.type = {kind!r} is not supported (only {', '.join(_GGUF_KINDS)})")
    elif kind == "yarn":
        rope = replace(rope, scaling=_gguf_yarn(keys, factor, original, gain))
    elif kind == "longrope":
        used = GGUF_FACTORS[1:]
        short, long = (_gguf_divisors(header, name, head_dim) for name in used)
        scaling = LongRopeScaling(
            short_factors=short, long_factors=long, original_max_len=original, attention_factor=gain
        )
        rope = replace(rope, scaling=scaling)
    elif (factors := header.rope_factors.get(GGUF_FACTORS[0])) is not None:
        used = GGUF_FACTORS[:1]
        rope = _rope_from_factors(header, factors, rope, head_dim)
    elif kind == "linear" and factor != 1.0:
        rope = replace(rope, scaling=LinearRopeScaling(factor=factor))
    if unused := sorted(set(header.rope_factors) - set(used)):
        keys.wrong(f"rope.scaling.type = {kind!r} does not go with {', '.join(unused)}")
    if gain != 1.0 and kind not in ("yarn", "longrope"):
        keys.wrong(f"rope.scaling.attn_factor = {gain:g} is not supported with rope.scaling.type = {kind!r}")
    _require_computable(keys, rope, head_dim)
    return ReadRope(spec=rope, max_position=_reach(rope.scaling, max_position))


def _gguf_yarn(keys: ConfigReader, factor: float, original: int, gain: float) -> YarnRopeScaling:
    """As llama.cpp has it, which multiplies the paper's factor of attention by those of the file."""
    keys.fixed("rope.scaling.yarn_ext_factor", 1, 1.0)
    return YarnRopeScaling(
        factor=factor,
        original_max_len=original,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", absent=_BETA_FAST),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", absent=_BETA_SLOW),
        truncate=True,
        attention_factor=gain * keys.number("rope.scaling.yarn_attn_factor", absent=1.0) * _yarn_gain(factor, 1.0),
    )


def _gguf_divisors(header: GGUFHeader, name: str, head_dim: int) -> tuple[float, ...]:
    factors = header.rope_factors.get(name)
    if factors is None or factors.shape != (head_dim // 2,) or not np.all(factors > 0):
        header.reader.wrong(f"rope.scaling.type = 'longrope' needs {head_dim // 2} factors above zero in {name}")
        return (1.0,) * (head_dim // 2)
    return tuple(float(each) for each in factors)


def _rope_from_factors(header: GGUFHeader, factors: NDArray[np.float32], rope: RopeSpec, head_dim: int) -> RopeSpec:
    if np.all(factors == 1):
        return rope
    scaling = replace(_LLAMA3, factor=float(np.max(factors)))
    plain, scaled = (inverse_frequencies(each, head_dim, 1) for each in (rope, replace(rope, scaling=scaling)))
    if factors.shape != plain.shape or not np.allclose(factors, plain / scaled, rtol=1e-3):
        header.reader.wrong(
            "rope_freqs.weight holds frequency factors other than those of Llama 3, which is not supported"
        )
    return replace(rope, scaling=scaling)
