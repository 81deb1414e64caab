"""Ragged batches for the paged-attention suite, poisoned wherever nothing may be read, and a float64 oracle in numpy.

A case is built from the lengths of its sequences. Every element of the pool that no sequence owns is NaN (or, in
integers, garbage that differs from run to run), as are padded rows of q, k and v; padded page-table entries point at
such pages. The oracle shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch

NARROW_MAX = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
HELD_AS_BITS = {"uint16": "bfloat16", "uint8": "float8_e4m3fn"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Static sizes of a case."""

    max_seqs: int
    max_tokens: int
    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    pages_per_seq: int

    @property
    def max_context(self) -> int:
        return self.page_size * self.pages_per_seq


SHAPES = {
    "mha": Shape(max_seqs=4, max_tokens=16, num_kv_heads=4, group=1, head_dim=16, page_size=4, pages_per_seq=5),
    "gqa3": Shape(max_seqs=5, max_tokens=24, num_kv_heads=2, group=3, head_dim=128, page_size=8, pages_per_seq=4),
    "heads3": Shape(max_seqs=5, max_tokens=24, num_kv_heads=3, group=3, head_dim=64, page_size=8, pages_per_seq=4),
    "gqa5": Shape(max_seqs=3, max_tokens=20, num_kv_heads=2, group=5, head_dim=32, page_size=16, pages_per_seq=2),
    "mqa8": Shape(max_seqs=4, max_tokens=16, num_kv_heads=1, group=8, head_dim=128, page_size=16, pages_per_seq=3),
    "gqa16": Shape(max_seqs=3, max_tokens=12, num_kv_heads=2, group=16, head_dim=16, page_size=2, pages_per_seq=9),
    "page1": Shape(max_seqs=3, max_tokens=12, num_kv_heads=2, group=2, head_dim=16, page_size=1, pages_per_seq=20),
    "long": Shape(max_seqs=12, max_tokens=200, num_kv_heads=2, group=3, head_dim=128, page_size=16, pages_per_seq=45),
}


@dataclass(frozen=True, kw_only=True)
class Length:
    """One sequence: tokens already in its pages, and tokens of this step."""

    cached: int
    new: int

    @property
    def context(self) -> int:
        return self.cached + self.new


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the op, all in numpy, and what the checks need to know."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv_pages: np.ndarray
    page_table: np.ndarray
    lengths: tuple[Length, ...]
    layer_offset: int
    sinks: np.ndarray | None
    k_scale: np.ndarray | None
    v_scale: np.ndarray | None

    @property
    def num_tokens(self) -> int:
        return sum(length.new for length in self.lengths)

    def batch(self) -> RaggedBatch:
        max_tokens, max_seqs = self.q.shape[0], self.page_table.shape[0]
        num_new = np.array([length.new for length in self.lengths] + [0] * (max_seqs - len(self.lengths)), np.int32)
        contexts = np.zeros(max_seqs, np.int32)
        contexts[: len(self.lengths)] = [length.context for length in self.lengths]
        positions = np.zeros(max_tokens, np.int32)
        token_seq = np.full(max_tokens, max_seqs, np.int32)
        for s, rows in enumerate(self.rows()):
            positions[rows] = np.arange(self.lengths[s].cached, self.lengths[s].context)
            token_seq[rows] = s
        num_decodes = 0
        while num_decodes < len(self.lengths) and self.lengths[num_decodes].new == 1:
            num_decodes += 1
        return RaggedBatch(
            page_table=jnp.asarray(self.page_table),
            context_lens=jnp.asarray(contexts),
            query_starts=jnp.asarray(np.concatenate([[0], np.cumsum(num_new)]).astype(np.int32)),
            num_seqs=jnp.int32(len(self.lengths)),
            num_decodes=jnp.int32(num_decodes),
            positions=jnp.asarray(positions),
            token_seq=jnp.asarray(token_seq),
        )

    def layer(self) -> AttentionLayer:
        def device(x: np.ndarray | None) -> jnp.ndarray | None:
            return None if x is None else jnp.asarray(x)

        return AttentionLayer(
            page_offset=jnp.int32(self.layer_offset),
            sinks=device(self.sinks),
            k_scale=device(self.k_scale),
            v_scale=device(self.v_scale),
        )

    def rows(self) -> list[slice]:
        ends = np.cumsum([length.new for length in self.lengths])
        return [slice(int(end) - length.new, int(end)) for end, length in zip(ends, self.lengths, strict=True)]

    def places(self, s: int, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Page in the pool and place in the page of positions of sequence s."""
        at, size = np.asarray(positions, np.int64), self.kv_pages.shape[1]
        return self.page_table[s, at // size] + self.layer_offset, at % size


def build(
    shape: Shape,
    lengths: Sequence[Length],
    *,
    dtype: str = "float32",
    kv_dtype: str = "float32",
    sinks: bool = False,
    scales: bool = False,
    share: int = 0,
    seed: int = 0,
    poison_seed: int = 0,
) -> Case:
    """Makes a case.

    Args:
        shape: Static sizes.
        lengths: One a sequence, decodes first.
        dtype: Of q, k and v.
        kv_dtype: Of the pool's array.
        sinks: Whether heads have sinks.
        scales: Whether the pool is scaled.
        share: This many leading pages of sequence 0 serve every sequence that has cached that much.
        seed: Of everything that counts.
        poison_seed: Of what must not matter.
    """
    rng, poison = np.random.default_rng(seed), np.random.default_rng(1000 + poison_seed)
    num_layers, layer = 3, int(rng.integers(3))
    num_pages = shape.max_seqs * shape.pages_per_seq + 3
    row_shape = (2 * shape.num_kv_heads, shape.head_dim)
    pool_dtype = np.dtype(getattr(ml_dtypes, kv_dtype, kv_dtype))
    kv_pages = _garbage(poison, (num_layers * num_pages, shape.page_size, *row_shape), pool_dtype)
    k_scale = np.float32(0.031) if scales else np.float32(1)
    v_scale = np.float32(0.027) if scales else np.float32(1)

    page_ids = rng.permutation(num_pages).astype(np.int32)
    page_table = page_ids[-3:][poison.integers(3, size=(shape.max_seqs, shape.pages_per_seq))]
    for s, length in enumerate(lengths):
        owned = -(-length.context // shape.page_size)
        page_table[s, :owned] = page_ids[s * shape.pages_per_seq :][:owned]
        if s and share * shape.page_size <= min(length.cached, lengths[0].cached):
            page_table[s, :share] = page_table[0, :share]
        cached = rng.standard_normal((length.cached, *row_shape)).astype(np.float32)
        scale_rows = np.tile([k_scale, v_scale], shape.num_kv_heads)[None, :, None]
        pages, at = page_table[s, np.arange(length.cached) // shape.page_size], np.arange(length.cached)
        kv_pages[pages + layer * num_pages, at % shape.page_size] = to_pool(cached / scale_rows, pool_dtype)

    num_tokens = sum(length.new for length in lengths)
    token_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))

    def tokens(num_heads: int) -> np.ndarray:
        x = np.full((shape.max_tokens, num_heads, shape.head_dim), np.nan, np.float32)
        x[:num_tokens] = rng.standard_normal((num_tokens, num_heads, shape.head_dim))
        return x.astype(token_dtype)

    num_heads = shape.num_kv_heads * shape.group
    return Case(
        q=tokens(num_heads),
        k=tokens(shape.num_kv_heads),
        v=tokens(shape.num_kv_heads),
        kv_pages=kv_pages,
        page_table=page_table,
        lengths=tuple(lengths),
        layer_offset=layer * num_pages,
        sinks=rng.standard_normal(num_heads).astype(np.float32) if sinks else None,
        k_scale=k_scale if scales else None,
        v_scale=v_scale if scales else None,
    )


def to_pool(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds to the pool's number format, saturating in narrow ones."""
    held = HELD_AS_BITS.get(dtype.name, dtype.name)
    if held in NARROW_MAX:
        x = np.clip(x, -NARROW_MAX[held], NARROW_MAX[held])
    return (np.rint(x) if dtype == np.int8 else x).astype(getattr(ml_dtypes, held, held)).view(dtype)


def from_pool(x: np.ndarray) -> np.ndarray:
    """The numbers that elements of the pool stand for, unscaled, in float32."""
    held = HELD_AS_BITS.get(x.dtype.name, x.dtype.name)
    return x.view(np.dtype(getattr(ml_dtypes, held, held))).astype(np.float32)


def _garbage(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype == np.int8:
        return rng.integers(-128, 128, size=shape).astype(np.int8)
    return np.broadcast_to(to_pool(np.full((1,), np.nan, np.float32), dtype), shape).copy()


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Attention in float64, and how far rounding may take an implementation from it.

    Attributes:
        out: [T, N, H].
        bound: [T, N, H]; most an output may be off.
    """

    out: np.ndarray
    bound: np.ndarray


def oracle(case: Case, kv_pages: np.ndarray, config: AttentionConfig) -> np.ndarray:
    """Attention in float64 over a pool in which the new tokens already stand."""
    return exact(case, kv_pages, config).out


def exact(case: Case, kv_pages: np.ndarray, config: AttentionConfig) -> Exact:
    """The oracle, with the error that the dtypes allow, element by element.

    An output is o = sum_i w_i v_i. Its weights may be rounded to q's dtype before they meet the values and again in
    their sum: eps * sum_i w_i |v_i|. Queries may be rounded once they are scaled: every product of a logit is off by a
    random eps / sqrt(12) of itself, so logit i has a standard deviation s_i and the output one of
    sqrt(sum_i (w_i s_i (v_i - o))^2), of which 5 are allowed. float32 inside adds 64 of its eps (a sum of up to
    hundreds of terms), times the largest logit. The output is rounded to q's dtype: half an ulp of itself.
    """
    k_scale = 1.0 if case.k_scale is None else float(case.k_scale)
    v_scale = 1.0 if case.v_scale is None else float(case.v_scale)
    out, size, drift = (np.zeros(case.q.shape) for _ in range(3))
    peaks = np.zeros((*case.q.shape[:2], 1))
    eps = float(ml_dtypes.finfo(case.q.dtype).eps)
    group = case.q.shape[1] // case.k.shape[1]
    for s, rows in enumerate(case.rows()):
        kv = from_pool(kv_pages[case.places(s, range(case.lengths[s].context))]).astype(np.float64)
        for t in range(rows.start, rows.stop):
            position = case.lengths[s].cached + t - rows.start
            first = 0 if config.sliding_window is None else max(0, position - config.sliding_window + 1)
            for n in range(case.q.shape[1]):
                keys = kv[first : position + 1, 2 * (n // group)] * k_scale
                values = kv[first : position + 1, 2 * (n // group) + 1] * v_scale
                products = keys * case.q[t, n].astype(np.float64) * config.scale
                logits, spread = products.sum(axis=1), eps / np.sqrt(12) * np.linalg.norm(products, axis=1)
                if config.soft_cap is not None:
                    logits = config.soft_cap * np.tanh(logits / config.soft_cap)
                sink = [] if case.sinks is None else [float(case.sinks[n])]
                peak = max([*logits, *sink])
                weights = np.exp(logits - peak)
                weights /= weights.sum() + sum(np.exp(x - peak) for x in sink)
                out[t, n], size[t, n] = weights @ values, weights @ np.abs(values)
                drift[t, n] = np.linalg.norm((weights * spread)[:, None] * (values - out[t, n]), axis=0)
                peaks[t, n] = np.abs([*logits, *sink]).max()
    inside = 64 * float(np.finfo(np.float32).eps) * np.maximum(peaks, 1)
    return Exact(out=out, bound=size * (eps + inside) + 5 * drift + np.abs(out) * eps / 2)


def tolerance(case: Case) -> float:
    """Most an output may be off: float32 inside (sums of up to hundreds of terms), rounded once to q's dtype.

    Outputs are averages of values of magnitude up to about 5.
    """
    inside = 64 * float(np.finfo(np.float32).eps)
    outside = float(ml_dtypes.finfo(case.q.dtype).eps) / 2
    return 5 * (inside + outside)
