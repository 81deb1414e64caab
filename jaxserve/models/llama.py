"""The Llama family: Llama 1 to 3.x, SmolLM2 and the many models trained in their shape."""

from __future__ import annotations

from jaxserve.models import dense
from jaxserve.models.config_reader import ConfigReader
from jaxserve.models.dense import DenseTraits, HFDefaults
from jaxserve.models.family import Family, GGUFHeader, WeightTable, dense_rules
from jaxserve.models.spec import ModelSpec

_HF_NAMES = {
    **dense.HF_NAMES,
    "gate.bias": "model.layers.{layer}.mlp.gate_proj.bias",
    "up.bias": "model.layers.{layer}.mlp.up_proj.bias",
    "down.bias": "model.layers.{layer}.mlp.down_proj.bias",
}
_GGUF_NAMES = {
    **dense.GGUF_NAMES,
    "gate.bias": "blk.{layer}.ffn_gate.bias",
    "up.bias": "blk.{layer}.ffn_up.bias",
    "down.bias": "blk.{layer}.ffn_down.bias",
}

_DEFAULTS = HFDefaults(
    num_key_value_heads=None,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    tie_word_embeddings=False,
)
"""Those of LlamaConfig in `transformers`."""


def _spec_from_hf(config: ConfigReader, generation: ConfigReader) -> ModelSpec:
    attention_bias = config.boolean("attention_bias", absent=False)
    dense.hf_no_sliding_window(config)
    traits = DenseTraits(
        family="llama",
        head_dim=dense.hf_head_dim(config),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=config.boolean("mlp_bias", absent=False),
        qk_norm=False,
        sliding_window=None,
    )
    return dense.spec_from_hf(config, generation, traits, _DEFAULTS)


def _spec_from_gguf(header: GGUFHeader) -> ModelSpec:
    return dense.spec_from_gguf(header, family="llama", qk_norm=False)


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    gguf_architecture="llama",
    spec_from_hf=_spec_from_hf,
    spec_from_gguf=_spec_from_gguf,
    hf_weights=WeightTable(
        rules=dense_rules(_HF_NAMES), ignored=dense.HF_IGNORED, ignored_if_tied=(_HF_NAMES["lm_head"],)
    ),
    gguf_weights=WeightTable(
        rules=dense_rules(_GGUF_NAMES, interleaved=True), ignored=dense.GGUF_IGNORED, ignored_if_tied=()
    ),
)
"""llama.cpp stores the query and key rows of this family permuted for a rope that rotates neighbours."""
