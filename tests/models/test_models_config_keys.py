"""Keys that say "nothing special" pass, what changes the mathematics does not; unknown ones are passed over by name."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from test_models_families import GGUF, LLAMA, QWEN2, QWEN3, SHAPES, read

from jaxserve.core.errors import CheckpointError
from jaxserve.models import config_keys
from jaxserve.models.registry import spec_from_gguf, spec_from_hf
from jaxserve.models.spec import Activation

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

# Keys of published configs beside those that every config has; the values are theirs, the sizes ours.
LLAMA_2 = {"_name_or_path": "meta-llama/Llama-2-7b-hf", "pretraining_tp": 1, "rope_scaling": None, "pad_token_id": 0}
VICUNA = {"max_sequence_length": 4096, "pad_token_id": -1, "use_cache": True, "transformers_version": "4.31.0.dev0"}
TINYLLAMA = {"attention_bias": False, "rope_theta": 500000.0, "rope_scaling": None, "initializer_range": 0.02}
SMOLLM2 = {
    "is_llama_config": True,
    "rope_interleaved": False,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "mlp_bias": False,
}
OWN_CODE = {
    "auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"},
    "_attn_implementation": "flash_attention_2",
    "use_flash_attn": True,
    "num_experts": 0,
    "qk_layernorm": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1,
    "clip_qkv": None,
}
MISTRAL_AS_LLAMA = {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 28, "head_dim": None}
WRITTEN_BY_TRANSFORMERS_5 = {
    "layer_types": ["full_attention"] * 4,
    "sliding_window": 4096,
    "partial_rotary_factor": 1.0,
    "rope_scaling": {"rope_type": "default"},
    "_from_model_config": True,
}
UNSLOTH = {"unsloth_fixed": True, "unsloth_version": "2024.9", "bos_token": "<s>", "padding_side": "left"}
QWEN2_5 = {"use_mrope": False, "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}
DISTILL_QWEN = {**QWEN2_5, "sliding_window": 4096, "tie_word_embeddings": False}
QWEN3_NEW = {"attention_bias": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 36}


@pytest.mark.parametrize(
    ("base", "more"),
    [
        *((LLAMA, more) for more in (LLAMA_2, VICUNA, TINYLLAMA, SMOLLM2, OWN_CODE, MISTRAL_AS_LLAMA, UNSLOTH)),
        (LLAMA, WRITTEN_BY_TRANSFORMERS_5),
        *((QWEN2, more) for more in (QWEN2_5, DISTILL_QWEN, OWN_CODE, WRITTEN_BY_TRANSFORMERS_5)),
        *((QWEN3, more) for more in (QWEN3_NEW, OWN_CODE, WRITTEN_BY_TRANSFORMERS_5)),
    ],
)
def test_what_says_nothing_special_passes(base: dict[str, Any], more: dict[str, Any]) -> None:
    assert read(base, **more) == read(base)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_types", ["full_attention"] * 3 + ["sliding_attention"]),
        ("layer_types", ["full_attention"] * 3),
        ("layer_types", ["linear_attention"] * 4),
        ("layer_types", "full_attention"),
        ("use_sliding_window", True),
        ("sliding_window", 4096),
        ("partial_rotary_factor", 0.5),
        ("embedding_multiplier", 12.0),
        ("qk_layernorm", True),
        ("num_local_experts", 8),
        ("dual_chunk_attention_config", {"chunk_size": 262144}),
        ("attn_logit_softcapping", 50.0),
        ("quantization", {"bits": 4}),
    ],
)
def test_what_changes_the_mathematics_does_not(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key):
        read(LLAMA, **{key: value})


def test_no_key_is_both_read_and_without_effect() -> None:
    """`fixed` and `take` would mark it as read, and the list would hide what they say."""
    assert not set(config_keys.NEUTRAL) & config_keys.IGNORED
    for config in (LLAMA, QWEN2, QWEN3):
        assert not (set(config) - {"architectures"}) & (config_keys.IGNORED | set(config_keys.NEUTRAL))


@pytest.mark.parametrize(
    ("base", "kv_heads", "max_position"), [(LLAMA, 64, 2048), (QWEN2, 32, 32768), (QWEN3, 32, 32768)]
)
def test_missing_keys_mean_what_transformers_says(base: dict[str, Any], kv_heads: int, max_position: int) -> None:
    """The defaults of LlamaConfig, Qwen2Config and Qwen3Config."""
    sizes = {key: base[key] for key in (*SIZES, "model_type", "architectures")}
    spec = read({**sizes, "num_attention_heads": 64, "hidden_size": 1024})
    assert (spec.num_kv_heads, spec.max_position, spec.norm_eps) == (kv_heads, max_position, 1e-6)
    assert (spec.activation, spec.tie_embeddings, spec.rope.theta) == (Activation.SILU, False, 10000.0)
    assert spec.head_dim == (128 if base is QWEN3 else 16)
    assert (spec.sliding_window, spec.qkv_bias, spec.mlp_bias) == (None, base is QWEN2, False)
    assert read({**sizes, "num_key_value_heads": None}).num_kv_heads == 8  # a null is as many as there are queries


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_no_default(size: str) -> None:
    with pytest.raises(CheckpointError, match=f"{size} must be a positive integer and is missing"):
        read(LLAMA, **{size: None})


def passing_over(config: dict[str, Any], *keys: str) -> object:
    return spec_from_hf(config, {}, "config.json", passed_over=keys)


def test_the_error_names_the_flag_that_passes_over_unknown_keys(caplog: pytest.LogCaptureFixture) -> None:
    odd = {**LLAMA, "router": "top2", "rope_scaling": {"rope_type": "default", "warmth": 3}}
    with pytest.raises(CheckpointError) as caught:
        read(odd)
    assert str(caught.value).endswith("passed over with --ignore-config-keys rope_scaling.warmth,router")
    with caplog.at_level(logging.WARNING):
        assert passing_over(odd, "router", "rope_scaling.warmth") == read(LLAMA)
    assert [record.getMessage() for record in caplog.records] == [
        "config.json rope_scaling: passing over warmth = 3, as asked",
        "config.json: passing over router = 'top2', as asked",
    ]
    with pytest.raises(CheckpointError, match=r"unknown key router = 'top2'.* --ignore-config-keys router$"):
        passing_over(odd, "rope_scaling.warmth")


def test_a_key_to_pass_over_that_is_not_there_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert passing_over(LLAMA, "ruoter", "rope_scaling.warmth") == read(LLAMA)
    assert [record.getMessage() for record in caplog.records] == [
        "config.json has no rope_scaling.warmth, ruoter to pass over"
    ]


def test_other_problems_name_no_flag() -> None:
    with pytest.raises(CheckpointError) as caught:
        read(LLAMA, hidden_act="relu2")
    assert "--ignore-config-keys" not in str(caught.value)


@pytest.mark.parametrize("key", ["rope_theta", "rope_scaling", "hidden_act", "layer_types", "rope_scaling.factor"])
def test_keys_that_are_read_cannot_be_passed_over(key: str) -> None:
    config = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}, "layer_types": ["full_attention"] * 4}
    with pytest.raises(CheckpointError, match=f"--ignore-config-keys cannot pass over {key}, which jaxserve reads"):
        passing_over(config, key)
    with pytest.raises(CheckpointError, match="quantization_config"):
        passing_over({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config")


def test_gguf_keys_are_passed_over_without_the_architecture() -> None:
    metadata = {**GGUF, "llama.attention.clamp_kqv": 8.0}

    def spec(*keys: str) -> object:
        return spec_from_gguf(
            metadata, SHAPES, rope_factors={}, dtype="bfloat16", origin="model.gguf", passed_over=keys
        )

    with pytest.raises(CheckpointError, match=r"--ignore-config-keys attention\.clamp_kqv$"):
        spec()
    assert spec("attention.clamp_kqv") == read(LLAMA)


@pytest.mark.parametrize(
    ("config", "generation", "problem"),
    [
        ({"eos_token_id": 100}, {}, r"eos_token_id 100 is outside the vocabulary \[0, 100\)"),
        ({"eos_token_id": [2, 1 << 31]}, {}, "eos_token_id 2147483648 is outside"),
        ({}, {"eos_token_id": [2, 151645, 151643]}, "eos_token_id 151645, 151643 is outside"),
        ({"bos_token_id": 128000}, {}, "bos_token_id 128000 is outside"),
        ({"eos_token_id": -1}, {}, "eos_token_id must be a token id"),
        ({"eos_token_id": 2.0}, {}, "eos_token_id must be a token id"),
    ],
)
def test_special_tokens_are_in_the_vocabulary(config: dict[str, Any], generation: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        read(LLAMA, generation, **config)
    assert read(LLAMA, eos_token_id=99).eos_token_ids == (99,)


@pytest.mark.parametrize("key", ["bos", "eos", "eot", "eom"])
def test_special_tokens_of_gguf_are_in_the_vocabulary(key: str) -> None:
    metadata = {**GGUF, f"tokenizer.ggml.{key}_token_id": 1 << 32}
    with pytest.raises(CheckpointError, match="token_id 4294967296 is outside the vocabulary"):
        spec_from_gguf(metadata, SHAPES, rope_factors={}, dtype="bfloat16", origin="model.gguf")


def test_no_window_in_a_gguf() -> None:
    metadata = {**GGUF, "llama.attention.sliding_window": 0}
    spec = spec_from_gguf(metadata, SHAPES, rope_factors={}, dtype="bfloat16", origin="model.gguf")
    assert spec.sliding_window is None
