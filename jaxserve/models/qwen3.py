"""The dense Qwen3 family: queries and keys are normalised over the head dimension before the rope."""

from __future__ import annotations

from jaxserve.models import dense
from jaxserve.models.config_reader import ConfigReader
from jaxserve.models.dense import DenseTraits, HFDefaults
from jaxserve.models.family import Family, GGUFHeader, WeightTable, dense_rules
from jaxserve.models.spec import ModelSpec

_HF_NAMES = {
    **dense.HF_NAMES,
    "q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
}
_GGUF_NAMES = {
    **dense.GGUF_NAMES,
    "q_norm": "blk.{layer}.attn_q_norm.weight",
    "k_norm": "blk.{layer}.attn_k_norm.weight",
}

_DEFAULTS = HFDefaults(
    num_key_value_heads=32,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    tie_word_embeddings=False,
)
"""Those of Qwen3Config in `transformers`."""


def _spec_from_hf(config: ConfigReader, generation: ConfigReader) -> ModelSpec:
    attention_bias = config.boolean("attention_bias", absent=False)
    traits = DenseTraits(
        family="qwen3",
        head_dim=config.integer("head_dim", absent=None if "head_dim" in config.values else 128),  # of Qwen3Config
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=False,
        qk_norm=True,
        sliding_window=dense.hf_sliding_window(config),
    )
    return dense.spec_from_hf(config, generation, traits, _DEFAULTS)


def _spec_from_gguf(header: GGUFHeader) -> ModelSpec:
    return dense.spec_from_gguf(header, family="qwen3", qk_norm=True)


QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    gguf_architecture="qwen3",
    spec_from_hf=_spec_from_hf,
    spec_from_gguf=_spec_from_gguf,
    hf_weights=WeightTable(
        rules=dense_rules(_HF_NAMES), ignored=dense.HF_IGNORED, ignored_if_tied=(_HF_NAMES["lm_head"],)
    ),
    gguf_weights=WeightTable(rules=dense_rules(_GGUF_NAMES), ignored=dense.GGUF_IGNORED, ignored_if_tied=()),
)
