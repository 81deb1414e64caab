"""Small checkpoints for the tests of this folder, and what their parameters must be, written out the long way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from jaxserve.models.spec import ModelSpec

Tensors = dict[str, NDArray[Any]]

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 40,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
QWEN2: dict[str, object] = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3: dict[str, object] = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def random_tensors(spec: ModelSpec, seed: int = 0) -> Tensors:
    """Tensors under their Hugging Face names, float32."""
    rng = np.random.default_rng(seed)
    d, f, h = spec.hidden_size, spec.ffn_size, spec.head_dim
    queries, keys = spec.num_heads * h, spec.num_kv_heads * h
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, d), "model.norm.weight": (d,)}
    if not spec.tie_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, d)
    for layer in range(spec.num_layers):
        own: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (queries, d),
            "self_attn.k_proj.weight": (keys, d),
            "self_attn.v_proj.weight": (keys, d),
            "self_attn.o_proj.weight": (d, queries),
            "mlp.gate_proj.weight": (f, d),
            "mlp.up_proj.weight": (f, d),
            "mlp.down_proj.weight": (d, f),
        }
        if spec.qkv_bias:
            own |= {"self_attn.q_proj.bias": (queries,)}
            own |= {"self_attn.k_proj.bias": (keys,), "self_attn.v_proj.bias": (keys,)}
        if spec.out_bias:
            own |= {"self_attn.o_proj.bias": (d,)}
        if spec.mlp_bias:
            own |= {"mlp.gate_proj.bias": (f,), "mlp.up_proj.bias": (f,), "mlp.down_proj.bias": (d,)}
        if spec.qk_norm:
            own |= {"self_attn.q_norm.weight": (h,), "self_attn.k_norm.weight": (h,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_folder(folder: Path, config: Mapping[str, object], tensors: Tensors, *, num_files: int = 1) -> Path:
    """A Hugging Face folder, its tensors spread over some files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    weight_map = {}
    for index in range(num_files):
        file = f"model-{index + 1:05}-of-{num_files:05}.safetensors"
        part = {name: tensors[name] for name in names[index::num_files]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face name."""
    if name.startswith("model.layers."):
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        module, kind = rest.rsplit(".", 1)
        return f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"
    module, kind = name.rsplit(".", 1)
    return f"{GGUF_NAMES[module]}.{kind}"


def write_gguf(
    path: Path,
    spec: ModelSpec,
    tensors: Tensors,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    keys: Mapping[str, object] | None = None,
    extra: Tensors | None = None,
) -> Path:
    """A GGUF file as llama.cpp's converter lays it out; matrices are stored as `kind`."""
    arch = spec.family
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.ffn_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (keys or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, list: writer.add_array}.get(
            type(value), writer.add_uint32
        )
        add(key, value)  # type: ignore[operator]  # a method of the writer or of its stand-in
    for name, array in tensors.items():
        stored = array
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            stored = interleave(array, spec.head_dim)
        if stored.ndim > 1:
            writer.add_tensor(gguf_name(name), gguf.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), stored)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleave(array: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Row 2i of a head is row i of its first half, row 2i + 1 is row i of its second half."""
    out = np.empty_like(array)
    for first in range(0, array.shape[0], head_dim):
        for i in range(head_dim // 2):
            out[first + 2 * i] = array[first + i]
            out[first + 2 * i + 1] = array[first + head_dim // 2 + i]
    return out


def expected_params(spec: ModelSpec, tensors: Tensors, kv_repeat: int = 1) -> Tensors:
    """The parameters that the tensors must become, element by element of the contract."""
    k, r, h, d = spec.num_kv_heads, kv_repeat, spec.head_dim, spec.hidden_size
    g = spec.q_per_kv // r

    def stack(name: str) -> NDArray[Any]:
        return np.stack([tensors[f"model.layers.{layer}.{name}"] for layer in range(spec.num_layers)])

    def fused(kind: str) -> NDArray[Any]:
        q, key, value = (stack(f"self_attn.{part}_proj.{kind}") for part in "qkv")
        rest = q.shape[2:]
        heads = np.empty((spec.num_layers, k * r, g + 2, h, *rest), q.dtype)
        for head in range(k * r):
            source = head // r
            for query in range(g):
                start = (head * g + query) * h
                heads[:, head, query] = q[:, start : start + h]
            heads[:, head, g] = key[:, source * h : (source + 1) * h]
            heads[:, head, g + 1] = value[:, source * h : (source + 1) * h]
        return heads

    out: Tensors = {
        "embed.table": tensors["model.embed_tokens.weight"],
        "final_norm.scale": tensors["model.norm.weight"],
        "layers.attn_norm.scale": stack("input_layernorm.weight"),
        "layers.mlp_norm.scale": stack("post_attention_layernorm.weight"),
        "layers.attn.qkv.kernel": np.moveaxis(fused("weight"), -1, 1),
        "layers.attn.out.kernel": stack("self_attn.o_proj.weight")
        .transpose(0, 2, 1)
        .reshape(spec.num_layers, k * r, g, h, d),
        "layers.mlp.gate_up.kernel": np.stack(
            [stack(f"mlp.{part}_proj.weight").transpose(0, 2, 1) for part in ("gate", "up")], axis=2
        ),
        "layers.mlp.down.kernel": stack("mlp.down_proj.weight").transpose(0, 2, 1),
    }
    if not spec.tie_embeddings:
        out["lm_head.table"] = tensors["lm_head.weight"]
    if spec.qkv_bias:
        out["layers.attn.qkv.bias"] = fused("bias")
    if spec.out_bias:
        out["layers.attn.out.bias"] = stack("self_attn.o_proj.bias")
    if spec.mlp_bias:
        out["layers.mlp.gate_up.bias"] = np.stack([stack(f"mlp.{part}_proj.bias") for part in ("gate", "up")], axis=1)
        out["layers.mlp.down.bias"] = stack("mlp.down_proj.bias")
    if spec.qk_norm:
        out["layers.attn.q_norm.scale"] = stack("self_attn.q_norm.weight")
        out["layers.attn.k_norm.scale"] = stack("self_attn.k_norm.weight")
    return out
