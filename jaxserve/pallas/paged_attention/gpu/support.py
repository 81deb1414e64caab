"""What the Hopper kernels can do; for the rest they raise NotImplementedError, and plain XLA takes over.

    chip               compute capability 9.0 (H100, H200, GH200)
    queries            bfloat16 or float16; not float32, which wgmma would round to tensor-float-32
    pages              the queries' dtype, or float8_e4m3fn, float8_e5m2 or int8, with scales or without
    head dim           multiples of 16 up to 256
    query heads        1 to 64 to a KV head, any number of KV heads
    page size          8, 16, 32, or any multiple of 64
    window, cap, sink  all, in any combination; pages outside a window are not read
    sequences          empty ones, padding, decodes and chunks in one batch

Both kernels can do the same, so a step never runs half of its attention elsewhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxserve.pallas.paged_attention.gpu.tiles import BLOCK_TOKENS, NUM_SMS, ROWS, swizzle_of

NARROW = ("float8_e4m3fn", "float8_e5m2", "int8")
"""Formats of the pool that are widened to the queries' dtype on their way to wgmma; all their values fit."""

MAX_HEAD_DIM = 256
"""Columns that a wgmma can have."""

MIN_PAGE = 8
"""Rows of a swizzled tile."""


def num_blocks() -> int:
    """Thread blocks of a persistent grid: one for each multiprocessor of the GPU that is here, or of an H100 (SXM)."""
    return int(jax.local_devices()[0].core_count) if jax.default_backend() == "gpu" else NUM_SMS


def check_support(q: Array, kv_pages: Array) -> None:
    """Checks that the kernels can do this.

    Args:
        q: [T, N, H].
        kv_pages: [P, page_size, 2 * K, H].

    Raises:
        NotImplementedError: They cannot.
    """
    page_size, heads2, head_dim = kv_pages.shape[1:]
    group, held = q.shape[1] * 2 // heads2, kv_pages.dtype
    if q.dtype not in (jnp.bfloat16, jnp.float16) or (held != q.dtype and held.name not in NARROW):
        raise NotImplementedError(
            f"q {q.dtype} with pages {held}: q must be bfloat16 or float16, pages so or of 8 bits"
        )
    if group > ROWS:
        raise NotImplementedError(f"{group} query heads to a KV head are more than {ROWS}")
    if not swizzle_of(head_dim * q.dtype.itemsize) or head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(f"head dim {head_dim} is not a multiple of 16 up to {MAX_HEAD_DIM}")
    if page_size < MIN_PAGE or (BLOCK_TOKENS % page_size and page_size % BLOCK_TOKENS):
        raise NotImplementedError(f"pages of {page_size} tokens: neither a power of two from 8 up nor a multiple of 64")
