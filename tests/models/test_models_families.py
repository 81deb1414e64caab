"""Configs to specs: both dialects, every rope, GGUF metadata, and one error for everything that is wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from jaxserve.checkpoint.presets import default_presets_dir, preset_names, read_preset
from jaxserve.core.errors import CheckpointError
from jaxserve.models.layers.rope import inverse_frequencies
from jaxserve.models.registry import FAMILIES, family_named, spec_from_gguf, spec_from_hf
from jaxserve.models.spec import Activation, LinearRopeScaling, Llama3RopeScaling, ModelSpec, RopeSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_SPEC = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192)


def read(config: dict[str, Any], generation: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    return spec_from_hf({**config, **changes}, generation or {}, "config.json")


def test_llama_spec_in_full() -> None:
    assert read(LLAMA) == ModelSpec(
        family="llama",
        num_layers=4,
        hidden_size=64,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        ffn_size=128,
        vocab_size=100,
        max_position=512,
        norm_eps=1e-5,
        rope=RopeSpec(theta=500000.0, scaling=None),
        activation=Activation.SILU,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_embeddings=False,
        sliding_window=None,
        attention_soft_cap=None,
        logit_soft_cap=None,
        bos_token_id=1,
        eos_token_ids=(2,),
        dtype="bfloat16",
    )


def test_what_tells_the_families_apart() -> None:
    assert (read(QWEN2).qkv_bias, read(QWEN2).out_bias, read(QWEN2).qk_norm) == (True, False, False)
    assert (read(QWEN3).qkv_bias, read(QWEN3).qk_norm, read(QWEN3).head_dim) == (False, True, 16)
    biased = read(QWEN3, attention_bias=True)
    assert (biased.qkv_bias, biased.out_bias) == (True, True)
    biased = read(LLAMA, attention_bias=True, mlp_bias=True)
    assert (biased.qkv_bias, biased.out_bias, biased.mlp_bias) == (True, True, True)


def test_absent_keys_mean_what_the_format_says() -> None:
    config = dict(LLAMA)
    del config["num_key_value_heads"], config["rope_theta"], config["torch_dtype"], config["bos_token_id"]
    spec = read(config, eos_token_id=None, head_dim=None)
    assert spec.num_kv_heads == 8
    assert spec.rope.theta == 10000.0
    assert spec.dtype == "float32"
    assert spec.bos_token_id is None
    assert spec.eos_token_ids == ()


def test_both_dialects_give_the_same_spec() -> None:
    old = read(LLAMA, rope_scaling={"rope_type": "llama3", **LLAMA3_SCALING})
    older = read(LLAMA, rope_scaling={"type": "llama3", **LLAMA3_SCALING})
    config = dict(LLAMA)
    del config["rope_theta"], config["torch_dtype"]
    parameters = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_SCALING}
    new = read(config, rope_parameters=parameters, dtype="bfloat16")
    assert old == older == new
    assert old.rope == RopeSpec(theta=500000.0, scaling=LLAMA3_SPEC)
    default = read(config, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, dtype="bfloat16")
    assert default == read(LLAMA)


def test_linear_scaling() -> None:
    assert read(LLAMA, rope_scaling={"type": "linear", "factor": 4.0}).rope.scaling == LinearRopeScaling(factor=4.0)


def test_ropes_are_read_whole_or_refused() -> None:
    with pytest.raises(CheckpointError, match="unknown key beta_fast"):
        read(LLAMA, rope_scaling={"rope_type": "linear", "factor": 2.0, "beta_fast": 32})
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor = 0\.5"):
        read(LLAMA, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5})
    with pytest.raises(CheckpointError, match="low_freq_factor must be a number above zero and is missing"):
        read(LLAMA, rope_scaling={"rope_type": "llama3", "factor": 8.0})
    with pytest.raises(CheckpointError, match="rope_parameters and rope_scaling"):
        read(LLAMA, rope_scaling={"type": "linear", "factor": 4.0}, rope_parameters={"rope_type": "default"})


def test_end_of_sequence_tokens() -> None:
    assert read(LLAMA, eos_token_id=[5, 6]).eos_token_ids == (5, 6)
    assert read(LLAMA, {"eos_token_id": [7, 2]}).eos_token_ids == (7, 2)
    assert read(LLAMA, {"eos_token_id": 7}).eos_token_ids == (7,)
    assert read(LLAMA, {"temperature": 0.6}).eos_token_ids == (2,)
    with pytest.raises(CheckpointError, match="eos_token_id must be a token id or a list"):
        read(LLAMA, {"eos_token_id": "</s>"})


def test_everything_wrong_is_in_one_error() -> None:
    config = {**LLAMA, "hidden_act": "relu2", "rms_norm_eps": "small", "attn_logit_softcapping": 50.0, "num_experts": 8}
    del config["vocab_size"]
    with pytest.raises(CheckpointError) as caught:
        read(config)
    message = str(caught.value)
    for part in (
        "hidden_act = 'relu2' is not supported",
        "rms_norm_eps must be a number above zero and is 'small'",
        "unknown key attn_logit_softcapping = 50.0",
        "unknown key num_experts = 8",
        "vocab_size must be a positive integer and is missing",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq"}),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("num_key_value_heads", 3),
        ("rope_interleaved", True),
        ("hidden_size", True),
        ("hidden_size", 0),
        ("num_hidden_layers", 2.5),
        ("tie_word_embeddings", "yes"),
        ("dtype", "float8_e4m3fn"),
        ("hidden_size", 65),
    ],
)
def test_each_wrong_value_is_named(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key):
        read(LLAMA, **{key: value})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": "x"}, "hidden_size must be a positive integer and is 'x'"),
        ({"num_attention_heads": None}, "num_attention_heads must be a positive integer and is missing"),
        ({"hidden_act": 3}, "hidden_act must be a string and is 3"),
        (
            {"rope_scaling": {"rope_type": "3d", "factor": 4.0}},
            "rope type '3d' is not supported (only default, linear, dynamic, yarn, longrope, llama3)",
        ),
    ],
)
def test_one_mistake_is_one_problem(changes: dict[str, object], problem: str) -> None:
    """Not twice for a key that is read twice, and nothing that follows from it."""
    with pytest.raises(CheckpointError) as caught:
        read(LLAMA, **changes)
    assert str(caught.value).endswith(f"faithfully: {problem}.")


def test_keys_without_effect_are_ignored() -> None:
    surplus = {
        "transformers_version": "4.48.0",
        "use_cache": True,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "pad_token_id": None,
        "_name_or_path": "x",
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"dtype": "q4"},
        "some_null": None,
    }
    assert read(LLAMA, **surplus) == read(LLAMA)


def test_unknown_families_are_named() -> None:
    with pytest.raises(CheckpointError, match="model_type 'gpt2'; jaxserve runs llama, qwen2, qwen3"):
        read(LLAMA, model_type="gpt2")


@pytest.mark.parametrize("config", [QWEN2, QWEN3])
def test_sliding_windows(config: dict[str, Any]) -> None:
    off = {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 2}
    assert read(config, **off).sliding_window is None
    on = {"use_sliding_window": True, "sliding_window": 64}
    assert read(config, **on, max_window_layers=0).sliding_window == 64
    assert read(config, **on, max_window_layers=4).sliding_window is None
    assert read(config, **on, layer_types=["sliding_attention"] * 4).sliding_window == 64
    assert read(config, sliding_window=None, layer_types=["full_attention"] * 4).sliding_window is None
    with pytest.raises(CheckpointError, match="2 of 4 layers use sliding-window"):
        read(config, **on, max_window_layers=2)
    with pytest.raises(CheckpointError, match="layer_types has 'chunked_attention'"):
        read(config, layer_types=["chunked_attention"] * 4)
    with pytest.raises(CheckpointError, match="layer_types contradicts"):
        read(config, layer_types=["sliding_attention"] * 4)
    with pytest.raises(CheckpointError, match="layer_types contradicts"):
        read(config, layer_types=["full_attention"] * 3)
    assert read(config, **on).sliding_window is None  # the first 28 layers have none
    assert read(config, use_sliding_window=True, max_window_layers=0).sliding_window == 4096
    assert read(config, use_sliding_window=True, max_window_layers=0, sliding_window=None).sliding_window is None


GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "anything",
    "llama.block_count": 4,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 8,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
SHAPES = {"token_embd.weight": (100, 64), "output.weight": (100, 64)}


def read_gguf(
    keys: dict[str, Any] | None = None,
    *,
    shapes: dict[str, tuple[int, ...]] | None = None,
    rope_factors: dict[str, np.ndarray] | None = None,
) -> ModelSpec:
    return spec_from_gguf(
        {**GGUF, **(keys or {})},
        SHAPES if shapes is None else shapes,
        rope_factors=rope_factors or {},
        dtype="bfloat16",
        origin="model.gguf",
    )


def test_gguf_gives_the_same_spec_as_the_config() -> None:
    assert read_gguf() == read(LLAMA)


def test_gguf_biases_and_ties_show_in_the_tensors() -> None:
    shapes = {"token_embd.weight": (100, 64), "blk.0.attn_q.bias": (64,), "blk.0.ffn_up.bias": (128,)}
    spec = read_gguf(shapes=shapes)
    assert (spec.tie_embeddings, spec.qkv_bias, spec.out_bias, spec.mlp_bias) == (True, True, False, True)


def test_gguf_of_other_families() -> None:
    keys = {key.replace("llama.", "qwen3."): value for key, value in GGUF.items()}
    spec = spec_from_gguf(
        {**keys, "general.architecture": "qwen3", "qwen3.attention.key_length": 8, "qwen3.attention.value_length": 8},
        SHAPES,
        rope_factors={},
        dtype="bfloat16",
        origin="model.gguf",
    )
    assert (spec.family, spec.qk_norm) == ("qwen3", True)


def test_gguf_rope_factors_become_the_scaling_they_came_from() -> None:
    wide = {"llama.attention.key_length": 64, "llama.attention.value_length": 64, "llama.rope.dimension_count": 64}
    plain, scaled = RopeSpec(theta=500000.0, scaling=None), RopeSpec(theta=500000.0, scaling=LLAMA3_SPEC)
    factors = inverse_frequencies(plain, 64, 1) / inverse_frequencies(scaled, 64, 1)
    assert read_gguf(wide, rope_factors={"rope_freqs.weight": factors}).rope == scaled
    assert read_gguf(wide, rope_factors={"rope_freqs.weight": np.ones(32, np.float32)}).rope == plain
    with pytest.raises(CheckpointError, match="factors other than those of Llama 3"):
        read_gguf(wide, rope_factors={"rope_freqs.weight": np.linspace(1, 8, 32, dtype=np.float32)})
    with pytest.raises(CheckpointError, match="factors other than those of Llama 3"):
        read_gguf(wide, rope_factors={"rope_freqs.weight": factors[:16]})


def test_gguf_linear_scaling() -> None:
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert read_gguf(keys).rope.scaling == LinearRopeScaling(factor=4.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba'; jaxserve runs llama, qwen2, qwen3"),
        ({"llama.expert_count": 8}, "expert_count = 8"),
        ({"llama.rope.scaling.type": "mrope"}, "rope.scaling.type = 'mrope'"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count = 4"),
        ({"llama.attention.value_length": 16}, "attention.value_length = 16"),
        ({"llama.attention.head_count_kv": [2, 2, 4, 2]}, "attention.head_count_kv differs between layers"),
        ({"llama.attention.clamp_kqv": 8.0}, "unknown key attention.clamp_kqv"),
        ({"llama.block_count": None}, "block_count must be a positive integer and is missing"),
    ],
)
def test_gguf_keys_that_change_the_model_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_gguf(keys)


def test_gguf_values_stored_once_a_layer() -> None:
    assert read_gguf({"llama.attention.head_count_kv": [2, 2, 2, 2]}) == read_gguf()


def test_every_preset_is_a_model_we_run() -> None:
    names = preset_names(default_presets_dir())
    assert {"smollm2-135m", "llama-3.1-8b", "llama-3.3-70b", "qwen3-0.6b", "qwen3-8b", "qwen3-32b"} <= set(names)
    for name in names:
        preset = read_preset(name, default_presets_dir())
        assert preset is not None
        spec = spec_from_hf(preset.config, {}, name)
        assert spec.eos_token_ids
        assert dataclasses.is_dataclass(spec)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("smollm2-135m", 0.1345),
        ("llama-3.1-8b", 8.03),
        ("llama-3.3-70b", 70.55),
        ("qwen3-0.6b", 0.596),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.76),
    ],
)
def test_presets_have_as_many_parameters_as_published(name: str, billions: float) -> None:
    import jax.numpy as jnp

    from jaxserve.models.decoder import abstract_params

    preset = read_preset(name, default_presets_dir())
    assert preset is not None
    abstract = abstract_params(spec_from_hf(preset.config, {}, name), dtype=jnp.dtype(jnp.int8))
    assert sum(int(np.prod(info.shape)) for info in abstract.values()) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_rules_fill_every_parameter_once() -> None:
    for family in FAMILIES:
        assert family_named(family.name) is family
        for table in (family.hf_weights, family.gguf_weights):
            assert len({rule.name for rule in table.rules}) == len(table.rules)
            for rule in table.rules:
                assert sorted("".join(rule.stored)) == sorted(rule.order.replace(".", ""))
