"""Rotary embedding as checkpoints describe it: both dialects of config.json, and GGUF keys with their factor tensor.

GGUF files of Llama 3.1 and later say nothing of their rope scaling in keys; they carry the divisor of each frequency
in `rope_freqs.weight`. The spec is recovered from it and checked against it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from jaxserve.models.config_reader import ConfigReader
from jaxserve.models.family import GGUFHeader
from jaxserve.models.layers.rope import inverse_frequencies
from jaxserve.models.spec import LinearRopeScaling, Llama3RopeScaling, RopeSpec

HF_DEFAULT_THETA = 10000.0
"""What a config without `rope_theta` means: the base of the first Llama models, whose configs predate the key."""

_LLAMA3 = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192)
"""Llama 3.1's scaling; later models of the family change only the factor."""


def rope_from_hf(config: ConfigReader) -> RopeSpec:
    """The rope of a Hugging Face config in either dialect; problems are left in `config`."""
    theta = config.number("rope_theta", absent=HF_DEFAULT_THETA)
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    if new is not None and old is not None and new.values != old.values:
        config.wrong("rope_parameters and rope_scaling are both there and differ")
    section = new or old
    if section is None:
        return RopeSpec(theta=theta, scaling=None)
    theta = section.number("rope_theta", absent=theta)
    scaling = _hf_scaling(section)
    section.fixed("partial_rotary_factor", 1, 1.0)
    section.close()
    return RopeSpec(theta=theta, scaling=scaling)


def _hf_scaling(section: ConfigReader) -> LinearRopeScaling | Llama3RopeScaling | None:
    older = section.text("type", absent="default")
    kind = section.text("rope_type", absent=older)
    if kind == "default":
        section.fixed("factor", 1, 1.0)
        return None
    if kind == "linear":
        return LinearRopeScaling(factor=section.number("factor"))
    if kind == "llama3":
        return Llama3RopeScaling(
            factor=section.number("factor"),
            low_freq_factor=section.number("low_freq_factor"),
            high_freq_factor=section.number("high_freq_factor"),
            original_max_len=section.integer("original_max_position_embeddings"),
        )
    section.wrong(f"rope type {kind!r} is not supported (only default, linear, llama3)", "type", "rope_type")
    for key in section.values:  # whatever they mean to it
        section.take(key)
    return None


def rope_from_gguf(header: GGUFHeader, *, head_dim: int) -> RopeSpec:
    """The rope of a GGUF file; problems are left in the header's reader."""
    keys = header.reader
    theta = keys.number("rope.freq_base", absent=HF_DEFAULT_THETA)
    kind = keys.text("rope.scaling.type", absent="none")
    factor = keys.number("rope.scaling.factor", absent=keys.number("rope.scale_linear", absent=1.0))
    keys.take("rope.scaling.original_context_length")
    rope = RopeSpec(theta=theta, scaling=None)
    if kind not in ("none", "linear"):
        keys.wrong(f"rope.scaling.type = {kind!r} is not supported (only none, linear)")
    elif header.rope_factors is not None:
        return _rope_from_factors(header, header.rope_factors, rope, head_dim)
    elif kind == "linear" and factor != 1.0:
        return replace(rope, scaling=LinearRopeScaling(factor=factor))
    return rope


def _rope_from_factors(header: GGUFHeader, factors: NDArray[np.float32], rope: RopeSpec, head_dim: int) -> RopeSpec:
    if np.all(factors == 1):
        return rope
    scaling = replace(_LLAMA3, factor=float(np.max(factors)))
    expected = inverse_frequencies(rope, head_dim) / inverse_frequencies(replace(rope, scaling=scaling), head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        header.reader.wrong(
            "rope_freqs.weight holds frequency factors other than those of Llama 3, which is not supported"
        )
    return replace(rope, scaling=scaling)
