"""What dense decoder families share: the common keys of their configs and the usual names of their tensors.

Llama, Qwen2 and Qwen3 configs differ in a few keys; each family file reads those and passes them to `spec_from_hf` or
`spec_from_gguf` here. Hugging Face configs come in two dialects (`rope_theta` with `rope_scaling`, and
`rope_parameters`; `torch_dtype` and `dtype`); both are read. Which other keys mean nothing stands in `config_keys`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxserve.models.config_reader import ConfigReader
from jaxserve.models.family import GGUFHeader
from jaxserve.models.rope_config import GGUF_FACTORS, rope_from_gguf, rope_from_hf
from jaxserve.models.spec import Activation, ModelSpec

_HF_LAYER = "model.layers.{layer}"
HF_NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens.weight",
    "attn_norm": f"{_HF_LAYER}.input_layernorm.weight",
    "q": f"{_HF_LAYER}.self_attn.q_proj.weight",
    "k": f"{_HF_LAYER}.self_attn.k_proj.weight",
    "v": f"{_HF_LAYER}.self_attn.v_proj.weight",
    "q.bias": f"{_HF_LAYER}.self_attn.q_proj.bias",
    "k.bias": f"{_HF_LAYER}.self_attn.k_proj.bias",
    "v.bias": f"{_HF_LAYER}.self_attn.v_proj.bias",
    "o": f"{_HF_LAYER}.self_attn.o_proj.weight",
    "o.bias": f"{_HF_LAYER}.self_attn.o_proj.bias",
    "mlp_norm": f"{_HF_LAYER}.post_attention_layernorm.weight",
    "gate": f"{_HF_LAYER}.mlp.gate_proj.weight",
    "up": f"{_HF_LAYER}.mlp.up_proj.weight",
    "down": f"{_HF_LAYER}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
"""Tensor names in safetensors files."""

HF_IGNORED = (f"{_HF_LAYER}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
"""Buffers that older checkpoints saved beside the weights; they follow from the config."""

_GGUF_LAYER = "blk.{layer}"
GGUF_NAMES: Mapping[str, str] = {
    "embed": "token_embd.weight",
    "attn_norm": f"{_GGUF_LAYER}.attn_norm.weight",
    "q": f"{_GGUF_LAYER}.attn_q.weight",
    "k": f"{_GGUF_LAYER}.attn_k.weight",
    "v": f"{_GGUF_LAYER}.attn_v.weight",
    "q.bias": f"{_GGUF_LAYER}.attn_q.bias",
    "k.bias": f"{_GGUF_LAYER}.attn_k.bias",
    "v.bias": f"{_GGUF_LAYER}.attn_v.bias",
    "o": f"{_GGUF_LAYER}.attn_output.weight",
    "o.bias": f"{_GGUF_LAYER}.attn_output.bias",
    "mlp_norm": f"{_GGUF_LAYER}.ffn_norm.weight",
    "gate": f"{_GGUF_LAYER}.ffn_gate.weight",
    "up": f"{_GGUF_LAYER}.ffn_up.weight",
    "down": f"{_GGUF_LAYER}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}
"""Tensor names in GGUF files."""

GGUF_IGNORED = (*GGUF_FACTORS, "blk.{layer}.attn_rot_embd", "blk.{layer}.rope_freqs.weight")
"""Rotary tables; the spec is made from the first ones, the others follow from it."""

_DTYPES = ("float32", "bfloat16", "float16")
_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HFDefaults:
    """What a key means that a config.json lacks: the default that the family's config class in `transformers` has.

    The five sizes that every config gives (hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
    vocab_size) have none here.

    Attributes:
        num_key_value_heads: None means num_attention_heads, as a null does.
        max_position_embeddings: In tokens.
        rms_norm_eps: Epsilon of the norms.
        hidden_act: Name of the activation.
        tie_word_embeddings: Whether the embedding is the head.
    """

    num_key_value_heads: int | None
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseTraits:
    """What tells one dense model from another beyond the common keys."""

    family: str
    head_dim: int
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None


def spec_from_hf(
    config: ConfigReader, generation: ConfigReader, traits: DenseTraits, defaults: HFDefaults
) -> ModelSpec:
    """The spec of a dense model from its Hugging Face config; problems are left in `config`.

    Args:
        config: config.json.
        generation: generation_config.json, empty if there is none; its end-of-sequence tokens win.
        traits: What the family file read.
        defaults: What missing keys mean.
    """
    for key in ("tf_legacy_loss", "add_cross_attention", "is_decoder", "is_encoder_decoder", "use_bfloat16"):
        config.fixed(key, False)
    for key, unchanged in (("rope_interleaved", False), ("tie_encoder_decoder", False), ("pruned_heads", {})):
        config.fixed(key, unchanged)
    num_heads = config.integer("num_attention_heads")
    missing_kv_heads = num_heads if "num_key_value_heads" in config.values else defaults.num_key_value_heads
    num_kv_heads = config.integer("num_key_value_heads", absent=missing_kv_heads or num_heads)
    if num_heads % num_kv_heads:
        config.wrong(
            f"num_attention_heads = {num_heads} is not a multiple of num_key_value_heads = {num_kv_heads}",
            *("num_attention_heads", "num_key_value_heads"),
        )
    max_position = config.integer("max_position_embeddings", absent=defaults.max_position_embeddings)
    rope = rope_from_hf(config, head_dim=traits.head_dim, max_position=max_position)
    bos = config.token_ids("bos_token_id") or ()
    config_eos = config.token_ids("eos_token_id")
    eos = generation.token_ids("eos_token_id") or config_eos or ()
    return ModelSpec(
        family=traits.family,
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=config.integer("hidden_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=traits.head_dim,
        ffn_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_position=rope.max_position,
        norm_eps=config.number("rms_norm_eps", absent=defaults.rms_norm_eps),
        rope=rope.spec,
        activation=_activation(config, defaults.hidden_act),
        qkv_bias=traits.qkv_bias,
        out_bias=traits.out_bias,
        mlp_bias=traits.mlp_bias,
        qk_norm=traits.qk_norm,
        tie_embeddings=config.boolean("tie_word_embeddings", absent=defaults.tie_word_embeddings),
        sliding_window=traits.sliding_window,
        attention_soft_cap=None,
        logit_soft_cap=None,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
        dtype=_hf_dtype(config),
    )


def hf_head_dim(config: ConfigReader) -> int:
    """`head_dim`; configs without the key mean hidden_size / num_attention_heads."""
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if not config.has("head_dim") and hidden_size % num_heads:
        config.wrong(
            f"hidden_size = {hidden_size} is not a multiple of num_attention_heads = {num_heads}",
            *("hidden_size", "num_attention_heads"),
        )
    return config.integer("head_dim", absent=max(1, hidden_size // num_heads))


def hf_no_sliding_window(config: ConfigReader) -> None:
    """Reads the keys of sliding windows in families that have none: they may only say so."""
    config.fixed("use_sliding_window", False)
    types = config.take("layer_types")
    if isinstance(types, list):
        _check_layer_types(config, types, [False] * config.integer("num_hidden_layers"))
    elif types is not None:
        config.wrong("layer_types is no list")
    if config.values.get("use_sliding_window") is False or types is not None:
        for key in ("sliding_window", "max_window_layers"):
            config.take(key)  # of windows that no layer has


def hf_sliding_window(config: ConfigReader) -> int | None:
    """The window of Qwen configs, which say for each layer whether it slides; only all or none is supported.

    Missing keys mean what they mean to Qwen2Config and Qwen3Config in `transformers`.
    """
    use = config.boolean("use_sliding_window", absent=False)
    num_layers = config.integer("num_hidden_layers")
    first = config.integer("max_window_layers", absent=28) if config.values.get("max_window_layers") != 0 else 0
    config.take("max_window_layers")
    types = config.take("layer_types")
    without = use and "sliding_window" in config.values and not config.has("sliding_window")
    window = config.integer("sliding_window", absent=4096) if use else config.take("sliding_window")
    if not use or without:
        slides = [False] * num_layers
    elif isinstance(types, list):
        slides = [kind == "sliding_attention" for kind in types]
    else:
        slides = [layer >= first for layer in range(num_layers)]
    if isinstance(types, list):
        _check_layer_types(config, types, slides)
    if any(slides) and not all(slides):
        config.wrong(
            f"{sum(slides)} of {len(slides)} layers use sliding-window attention; a mix of windows is not supported"
        )
    return window if isinstance(window, int) and any(slides) else None


def _check_layer_types(config: ConfigReader, types: list[object], slides: list[bool]) -> None:
    unknown = sorted({repr(kind) for kind in types if kind not in ("full_attention", "sliding_attention")})
    if unknown:
        config.wrong(f"layer_types has {', '.join(unknown)}, which is not supported")
    elif [kind == "sliding_attention" for kind in types] != slides:
        config.wrong(
            "layer_types contradicts num_hidden_layers, use_sliding_window or sliding_window",
            *("num_hidden_layers", "use_sliding_window", "sliding_window"),
        )


def _activation(config: ConfigReader, absent: str) -> Activation:
    name = config.text("hidden_act", absent=absent)
    if name not in _ACTIVATIONS:
        config.wrong(f"hidden_act = {name!r} is not supported (only {', '.join(_ACTIVATIONS)})", "hidden_act")
    return _ACTIVATIONS.get(name, Activation.SILU)


def _hf_dtype(config: ConfigReader) -> str:
    older = config.text("torch_dtype", absent="float32")
    dtype = config.text("dtype", absent=older).removeprefix("torch.")
    if dtype not in _DTYPES:
        config.wrong(f"dtype = {dtype!r} is not supported (only {', '.join(_DTYPES)})", "dtype", "torch_dtype")
    return dtype


def spec_from_gguf(header: GGUFHeader, *, family: str, qk_norm: bool) -> ModelSpec:
    """The spec of a dense model from GGUF metadata; which biases it has shows in its tensors.

    Args:
        header: The file's header; problems are left in its reader.
        family: Name of the family.
        qk_norm: Whether the family normalises queries and keys.
    """
    keys, shapes = header.reader, header.shapes
    for key, unchanged in (("expert_count", 0), ("expert_used_count", 0), ("attention.causal", True)):
        keys.fixed(key, unchanged)
    for key in ("tensor_data_layout", "rope.scaling.finetuned"):
        keys.take(key)
    num_heads = _uniform(keys, "attention.head_count", None)
    hidden_size = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", absent=max(1, hidden_size // num_heads))
    keys.fixed("attention.value_length", head_dim)
    keys.fixed("rope.dimension_count", head_dim)
    embedding = shapes.get(GGUF_NAMES["embed"], (0,))
    vocab_size = keys.integer("vocab_size", absent=embedding[0])
    tokens = ConfigReader(header.metadata, keys.origin)
    tokens.problems = keys.problems
    bos = tokens.token_ids("tokenizer.ggml.bos_token_id") or ()
    rope = rope_from_gguf(header, head_dim=head_dim, max_position=keys.integer("context_length"))
    return ModelSpec(
        family=family,
        num_layers=keys.integer("block_count"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=_uniform(keys, "attention.head_count_kv", num_heads),
        head_dim=head_dim,
        ffn_size=_uniform(keys, "feed_forward_length", None),
        vocab_size=vocab_size,
        max_position=rope.max_position,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=rope.spec,
        activation=Activation.SILU,
        qkv_bias=GGUF_NAMES["q.bias"].format(layer=0) in shapes,
        out_bias=GGUF_NAMES["o.bias"].format(layer=0) in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        qk_norm=qk_norm,
        tie_embeddings=GGUF_NAMES["lm_head"] not in shapes,
        sliding_window=_gguf_window(keys),
        attention_soft_cap=None,
        logit_soft_cap=None,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=_gguf_eos(tokens),
        dtype=header.dtype,
    )


def _gguf_window(keys: ConfigReader) -> int | None:
    """The sliding window; 0 is none."""
    return keys.integer("attention.sliding_window") if keys.take("attention.sliding_window") else None


def _uniform(keys: ConfigReader, key: str, absent: int | None) -> int:
    """An integer that some files store once a layer."""
    value = keys.values.get(key)
    if not isinstance(value, list):
        return keys.integer(key, absent)
    if len(set(value)) == 1:
        return ConfigReader({key: keys.take(key) and value[0]}, keys.origin).integer(key)
    keys.take(key)
    keys.wrong(f"{key} differs between layers, which is not supported")
    return 1


def _gguf_eos(tokens: ConfigReader) -> tuple[int, ...]:
    """End of sequence, then end of turn and of message where a file tells them apart."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [token_id for key in keys for token_id in tokens.token_ids(f"tokenizer.ggml.{key}") or ()]
    return tuple(dict.fromkeys(found))
