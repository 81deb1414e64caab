"""The second half of a decode on Hopper: partial results of a sequence's splits become its output rows.

A thread block takes one row and as many heads as fill a warpgroup's vector. It reads partial results in order of
position, several in flight at a time, and keeps them scaled to the largest logit so far; a sink joins last. Rows that
are no decodes become zeros. The order is fixed, so the result is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from jaxserve.pallas.paged_attention.gpu.agenda import Splits
from jaxserve.pallas.paged_attention.gpu.tiles import DecodeShape
from jaxserve.pallas.paged_attention.inputs import AttentionLayer, RaggedBatch

LOG2E = math.log2(math.e)

UNROLL = 8
"""Partial results in flight at a time."""

Ref: TypeAlias = Any
Scalar: TypeAlias = Int32[Array, ""]
Number: TypeAlias = Float[Array, ""]
Vector: TypeAlias = Float[Array, " lanes"]


class Partials(NamedTuple):
    """Unnormalised results of the splits; those of a sequence lie together, in order of position."""

    # [S * most splits, K, padded G, H]; sums of values weighted by exp2(logit - peak)
    values: Any
    # [S * most splits, K, 64]; largest logit a row, times log2(e)
    peaks: Any
    # [S * most splits, K, 64]; sum of the weights a row
    totals: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything static that the kernel knows.

    Attributes:
        shape: Static facts about the decode.
        splits: How contexts are split.
        lanes: Elements of a vector, a multiple of 128 that heads fill without rest.
        has_sinks: Whether heads have sinks.
    """

    shape: DecodeShape
    splits: Splits
    lanes: int
    has_sinks: bool

    @property
    def packed(self) -> int:
        """Heads in a vector."""
        return self.lanes // self.shape.head_dim

    def vector(self, x: Vector) -> Vector:
        """The vector, as a warpgroup's threads hold one."""
        held: Vector = plgpu.layout_cast(x, plgpu.Layout.WG_STRIDED((self.lanes,), vec_size=self.lanes // 128))
        return held

    def spread(self, scalars: Sequence[Number]) -> Vector:
        """A vector with each head's number in its lanes."""
        first = self.vector(jnp.full((self.lanes,), scalars[0], jnp.float32))
        if self.packed == 1:
            return first
        lane = self.vector(lax.iota(jnp.int32, self.lanes))
        for i, scalar in enumerate(scalars[1:], 1):
            first = jnp.where(lane >= i * self.shape.head_dim, scalar, first)
        return first


class Refs(NamedTuple):
    """Everything the kernel touches, all in GMEM."""

    # values as [S * most splits, K, padded G / packed, lanes]
    partials: Partials
    # [S]; [1]; [1]; [N], or [1] without sinks
    lens: Ref
    num_decodes: Ref
    v_scale: Ref
    sinks: Ref
    # [D, K, parts, lanes]
    out: Ref


class Sums(NamedTuple):
    """What has been added up: a vector, and a number for each of its heads."""

    values: Vector
    peaks: tuple[Number, ...]
    totals: tuple[Number, ...]


def combine(
    partials: Partials, batch: RaggedBatch, layer: AttentionLayer, shape: DecodeShape, splits: Splits, q: Array
) -> Float[Array, "D N H"]:
    """Adds each sequence's partial results up, in order of position.

    Args:
        partials: Of all splits.
        batch: Sequences, pages and positions.
        layer: The layer's sinks and its scale of values.
        shape: Static facts.
        splits: How contexts are split.
        q: [T, N, H]; whose dtype and first rows the result has.
    """
    num_rows = min(q.shape[0], shape.num_seqs)
    lanes = math.lcm(shape.head_dim, 128)
    plan = Plan(shape=shape, splits=splits, lanes=lanes, has_sinks=layer.sinks is not None)
    parts = -(-shape.group // plan.packed)

    def paged_decode_combine(
        values: Ref, peaks: Ref, totals: Ref, lens: Ref, num_decodes: Ref, v_scale: Ref, sinks: Ref, out: Ref
    ) -> None:
        _kernel(plan, Refs(Partials(values, peaks, totals), lens, num_decodes, v_scale, sinks, out))

    run = plgpu.kernel(
        paged_decode_combine,
        out_type=jax.ShapeDtypeStruct((num_rows, shape.num_kv_heads, parts, lanes), q.dtype),
        grid=(num_rows, shape.num_kv_heads, parts),
        grid_names=("row", "head", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    out: Array = run(
        partials.values.reshape(-1, shape.num_kv_heads, shape.padded_group // plan.packed, lanes),
        partials.peaks,
        partials.totals,
        batch.context_lens,
        batch.num_decodes[None],
        jnp.ones(1, jnp.float32) if layer.v_scale is None else layer.v_scale[None],
        jnp.zeros(1, jnp.float32) if layer.sinks is None else layer.sinks.astype(jnp.float32),
    )
    out = out.reshape(num_rows, shape.num_kv_heads, parts * plan.packed, shape.head_dim)
    return out[:, :, : shape.group].reshape(num_rows, -1, shape.head_dim)


def _kernel(plan: Plan, refs: Refs) -> None:
    row, head, part = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("part")
    count = jnp.where(row < refs.num_decodes[0], plan.splits.count(refs.lens[row]), 0)

    def chunk(c: Scalar, sums: Sums) -> Sums:
        at = [c * UNROLL + u for u in range(UNROLL)]
        there = [a < count for a in at]
        # Past the last one, the last one is read again and counts for nothing.
        places = [row * plan.splits.most + jnp.minimum(a, count - 1) for a in at]
        found = [plan.vector(refs.partials.values[place, head, part]) for place in places]
        fades, weights, peaks, totals = [], [], [], []
        for i in range(plan.packed):
            nth = part * plan.packed + i
            logits = [
                jnp.where(t, refs.partials.peaks[p, head, nth], -jnp.inf) for t, p in zip(there, places, strict=True)
            ]
            peak = sums.peaks[i]
            for logit in logits:
                peak = jnp.maximum(peak, logit)
            fade = jnp.exp2(sums.peaks[i] - peak)
            weight = [jnp.exp2(logit - peak) for logit in logits]
            total = sums.totals[i] * fade
            for w, p in zip(weight, places, strict=True):
                total = total + w * refs.partials.totals[p, head, nth]
            fades.append(fade)
            weights.append(weight)
            peaks.append(peak)
            totals.append(total)
        values = sums.values * plan.spread(fades)
        for u, partial in enumerate(found):
            values = values + partial * plan.spread([weight[u] for weight in weights])
        return Sums(values, tuple(peaks), tuple(totals))

    nothing = Sums(
        plan.vector(jnp.zeros((plan.lanes,), jnp.float32)),
        (jnp.float32(-jnp.inf),) * plan.packed,
        (jnp.float32(0),) * plan.packed,
    )
    sums = lax.fori_loop(0, lax.div(count + (UNROLL - 1), jnp.int32(UNROLL)), chunk, nothing)
    factors = [_factor(plan, refs, sums, head, part, i) for i in range(plan.packed)]
    scaled = sums.values * plan.spread([jnp.where(count > 0, factor, 0.0) for factor in factors])
    refs.out[row, head, part] = scaled.astype(refs.out.dtype)


def _factor(plan: Plan, refs: Refs, sums: Sums, head: Scalar, part: Scalar, i: int) -> Number:
    """What a head's sum is multiplied by to become its output."""
    v_scale: Number = refs.v_scale[0]
    if not plan.has_sinks:
        return v_scale / sums.totals[i]
    nth = jnp.minimum(part * plan.packed + i, plan.shape.group - 1)
    sink = refs.sinks[head * plan.shape.group + nth] * LOG2E
    # Either may be far above the other.
    peak = jnp.maximum(sums.peaks[i], sink)
    fade = jnp.exp2(sums.peaks[i] - peak)
    return v_scale * fade / (sums.totals[i] * fade + jnp.exp2(sink - peak))
