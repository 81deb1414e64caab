"""What both TPU kernels are called with: scalars, sinks and the page table, in the form in which a core reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer
from jaxserve.pallas.paged_attention.tpu.prefill_tiles import LANES, Core

LOG2_E = math.log2(math.e)

CHIPS: Mapping[str, str] = MappingProxyType({"7": "tpu7x", "7x": "tpu7x"})
"""Chips that Pallas calls by other names than topologies."""

START = -1e30
"""Maximum of no logits; finite, so that a masked logit, -inf, weighs 0 beside it."""


def attention_factors(layer: AttentionLayer, config: AttentionConfig) -> Float[Array, " 2"]:
    """What dot products and outputs are multiplied with: logits come out in base 2, or ready for the soft cap.

    Args:
        layer: The layer's scales.
        config: Scale and soft cap.
    """
    query = jnp.float32(config.scale * LOG2_E if config.soft_cap is None else config.scale / config.soft_cap)
    value = jnp.float32(1)
    if layer.k_scale is not None:
        query = query * layer.k_scale
    if layer.v_scale is not None:
        value = value * layer.v_scale
    return jnp.stack([query, value])


def table_rows(table: Int32[Array, "S pages_per_seq"]) -> Int32[Array, "S 1 padded"]:
    """The page table as rows that can be copied one by one: SMEM has no room for a table of long sequences."""
    return jnp.pad(table, ((0, 0), (0, -table.shape[1] % LANES)))[:, None]


def sink_rows(sinks: Float[Array, " N"]) -> Float[Array, "N 128"]:
    """Base-2 logits of the sinks, in all lanes of a row a head."""
    base2 = sinks.astype(jnp.float32) * jnp.float32(LOG2_E)
    return jnp.broadcast_to(base2[:, None], (sinks.shape[0], LANES))


def matmul(a: Array, b: Array, contracted: int) -> Float[Array, "rows columns"]:
    """The product over a's columns and a dimension of b, summed in float32; float32 is multiplied exactly.

    Args:
        a: [rows, n].
        b: [n, columns] or [columns, n], of the same dtype.
        contracted: Which dimension of b is n.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32, precision=precision)


def current_core() -> Core:
    """The core that a kernel is traced for; where there is no TPU the interpreter does not care."""
    if not pltpu.is_tpu_device():
        return Core(wide_matmul=True, vmem_bytes=64 << 20)
    info = pltpu.get_tpu_info()
    version = str(info.chip_version)
    return Core(
        wide_matmul=info.mxu_column_size > LANES,
        vmem_bytes=info.vmem_capacity_bytes,
        chip=CHIPS.get(version, version),
    )
