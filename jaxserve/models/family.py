"""What a model family consists of: two ways to read a spec, and two tables of weight names.

A family has no forward code. Its weight tables say, for each kind of tensor in a checkpoint, which parameter it
fills, how it is laid out on disk and where in the parameter it goes; `checkpoint/rules` turns that into reads.
Layouts are written in the dimension letters of the architecture (V D K G H F); "KGH" is one stored dimension of K * G
* H elements.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from jaxserve.models.config_reader import ConfigReader
from jaxserve.models.spec import ModelSpec


class Part(enum.Enum):
    """Which part of a fused parameter a tensor fills, along the dimension that its `order` marks.

    Query, key and value share a dimension of G + 2: [0, G) are queries, G is the key, G + 1 the value. Gate and up
    share one of 2.
    """

    WHOLE = enum.auto()
    QUERY = enum.auto()
    KEY = enum.auto()
    VALUE = enum.auto()
    GATE = enum.auto()
    UP = enum.auto()


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRule:
    """One kind of tensor in a checkpoint and the parameter it fills.

    Attributes:
        name: Its name; "{layer}" stands for the layer's number.
        param: Path of the parameter.
        stored: Letters of each stored dimension, outermost first.
        order: Letters in the order of the parameter's dimensions (without the layer); "." is a fused dimension in which
            this tensor takes one place.
        part: Its place in a fused parameter.
        interleaved: Heads are stored for a rope that rotates neighbours (llama.cpp's layout of Llama models) instead of
            halves.
    """

    name: str
    param: str
    stored: tuple[str, ...]
    order: str
    part: Part = Part.WHOLE
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightTable:
    """All tensors a family's checkpoints may hold in one format.

    Attributes:
        rules: Tensors that fill parameters; those of parameters a model does not have do not apply to it.
        ignored: Tensors without information of their own; "{layer}" stands for a layer's number.
        ignored_if_tied: Tensors that repeat the embedding when embeddings are tied.
    """

    rules: tuple[WeightRule, ...]
    ignored: tuple[str, ...]
    ignored_if_tied: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GGUFHeader:
    """What a family needs from a GGUF file to make a spec.

    Attributes:
        reader: The keys that begin with the architecture's name, without that prefix.
        metadata: All keys.
        shapes: Shape of each tensor, outermost dimension first.
        rope_factors: Contents of those of `rope_config.GGUF_FACTORS` that the file has, [H/2] float32 each.
        dtype: Floating-point type that best holds the stored weights.
    """

    reader: ConfigReader
    metadata: Mapping[str, object]
    shapes: Mapping[str, tuple[int, ...]]
    rope_factors: Mapping[str, NDArray[np.float32]]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family of models.

    Attributes:
        name: Its `model_type` in Hugging Face configs, and `ModelSpec.family`.
        architectures: Names in a config's `architectures` that this family runs.
        gguf_architecture: Its `general.architecture` in GGUF files.
        spec_from_hf: Reads config.json (first) and generation_config.json (second).
        spec_from_gguf: Reads a GGUF header.
        hf_weights: Tensors of its safetensors files.
        gguf_weights: Tensors of its GGUF files.
    """

    name: str
    architectures: tuple[str, ...]
    gguf_architecture: str
    spec_from_hf: Callable[[ConfigReader, ConfigReader], ModelSpec]
    spec_from_gguf: Callable[[GGUFHeader], ModelSpec]
    hf_weights: WeightTable
    gguf_weights: WeightTable


def dense_rules(names: Mapping[str, str], *, interleaved: bool = False) -> tuple[WeightRule, ...]:
    """The rules of a dense decoder whose projections are stored [out, in], as both formats do.

    Args:
        names: Tensor name of each slot ("embed", "attn_norm", "q", "k", "v", "o", "q_norm", "k_norm", "mlp_norm",
            "gate", "up", "down", "final_norm", "lm_head", and "X.bias" for biases); others are left out.
        interleaved: Query and key heads are stored for a rope that rotates neighbours.
    """
    unnamed = [
        (slot, replace(rule, interleaved=interleaved and rule.part in (Part.QUERY, Part.KEY)))
        for slot, rule in _DENSE.items()
    ]
    return tuple(replace(rule, name=names[slot]) for slot, rule in unnamed if slot in names)


def _rule(param: str, stored: tuple[str, ...], order: str, part: Part = Part.WHOLE) -> WeightRule:
    return WeightRule(name="", param=param, stored=stored, order=order, part=part)


_QKV = "layers.attn.qkv"
_GATE_UP = "layers.mlp.gate_up"
_DENSE: Mapping[str, WeightRule] = {
    "embed": _rule("embed.table", ("V", "D"), "VD"),
    "attn_norm": _rule("layers.attn_norm.scale", ("D",), "D"),
    "q": _rule(f"{_QKV}.kernel", ("KGH", "D"), "DKGH", Part.QUERY),
    "k": _rule(f"{_QKV}.kernel", ("KH", "D"), "DK.H", Part.KEY),
    "v": _rule(f"{_QKV}.kernel", ("KH", "D"), "DK.H", Part.VALUE),
    "q.bias": _rule(f"{_QKV}.bias", ("KGH",), "KGH", Part.QUERY),
    "k.bias": _rule(f"{_QKV}.bias", ("KH",), "K.H", Part.KEY),
    "v.bias": _rule(f"{_QKV}.bias", ("KH",), "K.H", Part.VALUE),
    "q_norm": _rule("layers.attn.q_norm.scale", ("H",), "H"),
    "k_norm": _rule("layers.attn.k_norm.scale", ("H",), "H"),
    "o": _rule("layers.attn.out.kernel", ("D", "KGH"), "KGHD"),
    "o.bias": _rule("layers.attn.out.bias", ("D",), "D"),
    "mlp_norm": _rule("layers.mlp_norm.scale", ("D",), "D"),
    "gate": _rule(f"{_GATE_UP}.kernel", ("F", "D"), "D.F", Part.GATE),
    "up": _rule(f"{_GATE_UP}.kernel", ("F", "D"), "D.F", Part.UP),
    "gate.bias": _rule(f"{_GATE_UP}.bias", ("F",), ".F", Part.GATE),
    "up.bias": _rule(f"{_GATE_UP}.bias", ("F",), ".F", Part.UP),
    "down": _rule("layers.mlp.down.kernel", ("D", "F"), "FD"),
    "down.bias": _rule("layers.mlp.down.bias", ("D",), "D"),
    "final_norm": _rule("final_norm.scale", ("D",), "D"),
    "lm_head": _rule("lm_head.table", ("V", "D"), "VD"),
}
