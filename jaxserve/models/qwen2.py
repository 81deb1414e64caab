"""The Qwen2 and Qwen2.5 family: a Llama with biases on queries, keys and values."""

from __future__ import annotations

from jaxserve.models import dense
from jaxserve.models.config_reader import ConfigReader
from jaxserve.models.dense import DenseTraits, HFDefaults
from jaxserve.models.family import Family, GGUFHeader, WeightTable, dense_rules
from jaxserve.models.spec import ModelSpec

_DEFAULTS = HFDefaults(
    num_key_value_heads=32,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    tie_word_embeddings=False,
)
"""Those of Qwen2Config in `transformers`."""


def _spec_from_hf(config: ConfigReader, generation: ConfigReader) -> ModelSpec:
    config.fixed("attention_bias", True)
    config.fixed("use_mrope", False)
    traits = DenseTraits(
        family="qwen2",
        head_dim=dense.hf_head_dim(config),
        qkv_bias=True,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=dense.hf_sliding_window(config),
    )
    return dense.spec_from_hf(config, generation, traits, _DEFAULTS)


def _spec_from_gguf(header: GGUFHeader) -> ModelSpec:
    return dense.spec_from_gguf(header, family="qwen2", qk_norm=False)


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    gguf_architecture="qwen2",
    spec_from_hf=_spec_from_hf,
    spec_from_gguf=_spec_from_gguf,
    hf_weights=WeightTable(
        rules=dense_rules(dense.HF_NAMES), ignored=dense.HF_IGNORED, ignored_if_tied=(dense.HF_NAMES["lm_head"],)
    ),
    gguf_weights=WeightTable(rules=dense_rules(dense.GGUF_NAMES), ignored=dense.GGUF_IGNORED, ignored_if_tied=()),
)
