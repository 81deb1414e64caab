"""Random weights of the right shapes, made on the devices: for benchmarks and tests that need no download.

Each element is a hash of its own indices, so the weights depend on neither the mesh nor the order of creation, and
making them costs one elementwise pass at memory speed. Kernels are uniform with a standard deviation of
1/sqrt(inputs), which keeps activations finite at any depth.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt32

from jaxserve.checkpoint.loader import Hold, as_loaded, scale_of
from jaxserve.checkpoint.tensors import Progress
from jaxserve.models.params import Held, ParamInfo
from jaxserve.models.spec import ModelSpec
from jaxserve.quant.qtensor import INT8_MAX
from jaxserve.sharding.rules import sharding_for

_BIAS_STD = 0.02


def random_params(
    spec: ModelSpec,
    abstract: Mapping[str, ParamInfo],
    *,
    mesh: Mesh,
    seed: int = 0,
    hold: Hold = as_loaded,
    progress: Progress | None = None,
) -> dict[str, Held]:
    """Fills all parameters with reproducible random values.

    Args:
        spec: The model.
        abstract: Every parameter to make.
        mesh: Where they go.
        seed: Another seed, other weights.
        hold: What is done with each as soon as it is there; they are made largest first.
        progress: Told about bytes of parameters as they are made.
    """
    total = sum(info.num_bytes for info in abstract.values())
    quantized = {scale_of(path) for path in abstract if scale_of(path) in abstract}
    params: dict[str, Held] = {}
    done = 0
    for path, info in sorted(abstract.items(), key=lambda item: -item[1].num_bytes):
        std = _std(spec, path)
        # An argument, not a constant: XLA would try to fold the whole parameter while compiling.
        key = np.uint32(zlib.crc32(f"{seed}:{path}".encode()))
        if path in quantized:
            kernel = next(other for other in abstract if scale_of(other) == path)
            make = partial(_constant, info.shape, info.dtype, _std(spec, kernel) * math.sqrt(3) / INT8_MAX)
        elif path.endswith(".scale"):
            make = partial(_constant, info.shape, info.dtype, 1.0)
        else:
            reach = INT8_MAX if scale_of(path) in abstract else std * math.sqrt(3)
            make = partial(_uniform, info.shape, info.dtype, reach)
        made = jax.jit(make, out_shardings=sharding_for(info.axes, info.shape, mesh))(key)
        params[path] = hold(path, made)
        done += info.num_bytes
        if progress is not None:
            progress("make random weights", done, total)
    return {path: params[path] for path in abstract}


def _std(spec: ModelSpec, path: str) -> float:
    inputs = {
        "layers.attn.qkv.kernel": spec.hidden_size,
        "layers.attn.out.kernel": spec.num_heads * spec.head_dim,
        "layers.mlp.gate_up.kernel": spec.hidden_size,
        "layers.mlp.down.kernel": spec.ffn_size,
        "embed.table": spec.hidden_size,
        "lm_head.table": spec.hidden_size,
    }
    return 1 / math.sqrt(inputs[path]) if path in inputs else _BIAS_STD


def _constant(shape: tuple[int, ...], dtype: jnp.dtype, value: float, key: UInt32[Array, ""]) -> jax.Array:
    return jnp.full(shape, value, dtype)


def _uniform(shape: tuple[int, ...], dtype: jnp.dtype, reach: float, key: UInt32[Array, ""]) -> jax.Array:
    """Values in [-reach, reach), each a hash of its indices (the finaliser of MurmurHash3)."""
    bits = jnp.broadcast_to(key, shape)
    for dim in range(len(shape)):
        bits = _mixed(bits ^ jax.lax.broadcasted_iota(jnp.uint32, shape, dim))
    unit = (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-23) - jnp.float32(1)
    values = unit * jnp.float32(reach)
    return jnp.round(values).astype(dtype) if jnp.issubdtype(dtype, jnp.integer) else values.astype(dtype)


def _mixed(bits: jax.Array) -> jax.Array:
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
