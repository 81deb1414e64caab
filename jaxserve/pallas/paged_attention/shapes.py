"""Named problems of paged attention, shared by the tuner, the benchmarks and the tests.

A name says query heads, KV heads and tokens a page: `decode 32,8 p64`. 32,8 is Llama-3.1-8B or Qwen3-8B on one device;
8,1 a shard of a 70B model split over eight. Arguments come abstract, to compile for, or as random arrays, to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """A batch whose sequences all have the same context and the same number of new tokens, unless it is ragged.

    Attributes:
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        page_size: Tokens of a page.
        num_seqs: S.
        context: Tokens each sequence sees at the end, the new ones included.
        query_tokens: New tokens of each sequence; 1 is a decode.
        dtype: Of queries, new keys and values, and output.
        kv_dtype: Of the pool.
        lengths: New tokens and context of each sequence of a ragged batch; then the figures above are the most of any.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_seqs: int
    context: int
    query_tokens: int
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    lengths: tuple[tuple[int, int], ...] = ()

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """New tokens and context of each sequence."""
        return self.lengths or ((self.query_tokens, self.context),) * self.num_seqs

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one new token."""
        return self.query_tokens == 1

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(new for new, _ in self.sequences)

    @property
    def pages_per_seq(self) -> int:
        """Width of the page table."""
        return -(-self.context // self.page_size)

    @property
    def num_pages(self) -> int:
        """Pages of the pool: each sequence has its own."""
        return sum(-(-context // self.page_size) for _, context in self.sequences)

    @property
    def config(self) -> AttentionConfig:
        """No window, no cap."""
        return AttentionConfig(scale=self.head_dim**-0.5, sliding_window=None, soft_cap=None)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that a call must read at least."""
        row = 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.kv_dtype).itemsize
        return sum(context for _, context in self.sequences) * row

    @property
    def flops(self) -> float:
        """Operations that a call must do at least: two matmuls over what each token may see."""
        seen = sum(sum(range(context - new + 1, context + 1)) for new, context in self.sequences)
        return 4.0 * seen * self.num_heads * self.head_dim

    def arrays(self, rng: np.random.Generator) -> dict[str, jax.Array]:
        """Random q, k, v and pool, by name."""
        return {
            name: jnp.asarray(rng.standard_normal(each.shape, np.float32)).astype(each.dtype)
            for name, each in self.abstract_arrays().items()
        }

    def abstract_arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of q, k, v and pool, by name."""
        rows, dtype = self.num_tokens, jnp.dtype(self.dtype)
        pool = (self.num_pages, self.page_size, 2 * self.num_kv_heads, self.head_dim)
        return {
            "q": jax.ShapeDtypeStruct((rows, self.num_heads, self.head_dim), dtype),
            "k": jax.ShapeDtypeStruct((rows, self.num_kv_heads, self.head_dim), dtype),
            "v": jax.ShapeDtypeStruct((rows, self.num_kv_heads, self.head_dim), dtype),
            "kv_pages": jax.ShapeDtypeStruct(pool, jnp.dtype(self.kv_dtype)),
        }

    def batch(self, rng: np.random.Generator) -> RaggedBatch:
        """The batch, its pages scattered over the pool; numpy arrays, for a jitted function."""
        new, contexts = (np.array(column, np.int32) for column in zip(*self.sequences, strict=True))
        pages = -(-contexts // self.page_size)
        table = np.zeros((self.num_seqs, self.pages_per_seq), np.int32)
        table[np.arange(self.pages_per_seq) < pages[:, None]] = rng.permutation(self.num_pages)
        starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        token_seq = np.repeat(np.arange(self.num_seqs, dtype=np.int32), new)
        arrays: dict[str, Any] = {
            "page_table": table,
            "context_lens": contexts,
            "query_starts": starts,
            "num_seqs": np.array(self.num_seqs, np.int32),
            "num_decodes": np.array(self.num_seqs if self.is_decode else 0, np.int32),
            "positions": np.arange(self.num_tokens, dtype=np.int32) + (contexts - new - starts[:-1])[token_seq],
            "token_seq": token_seq,
        }
        return RaggedBatch(**arrays)

    def layer(self) -> AttentionLayer:
        """The pool's only layer, its values unscaled."""
        first: Any = np.zeros((), np.int32)
        return AttentionLayer(page_offset=first)


def _decode(num_heads: int, num_kv_heads: int, page_size: int, *, num_seqs: int, context: int) -> AttentionShape:
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        page_size=page_size,
        num_seqs=num_seqs,
        context=context,
        query_tokens=1,
    )


STATIC_SHAPES: Mapping[str, AttentionShape] = MappingProxyType(
    {
        **{
            f"decode {heads},{kv_heads} p{page}": _decode(heads, kv_heads, page, num_seqs=64, context=2048)
            for heads, kv_heads in ((32, 8), (8, 1))
            for page in (16, 64, 128)
        },
        "prefill 32,8 p128": AttentionShape(
            num_heads=32, num_kv_heads=8, head_dim=128, page_size=128, num_seqs=1, context=2048, query_tokens=512
        ),
    }
)
"""What schedules are read of: 2,048 tokens of context; a decode step of 64 sequences, a 512-token chunk."""

TUNED_SHAPES: Mapping[str, AttentionShape] = MappingProxyType(
    {
        **STATIC_SHAPES,
        **{
            f"prefill {heads},{kv_heads} p64": AttentionShape(
                num_heads=heads, num_kv_heads=kv_heads, head_dim=128, page_size=64, num_seqs=1, context=2048,
                query_tokens=512,
            )
            for heads, kv_heads in ((32, 8), (8, 1))
        },
    }
)  # fmt: skip
"""What tiles are tuned for."""

RAGGED = ((2048, 2048), (1024, 5120), (1000, 1000), (512, 4096), (300, 2348), (129, 129), (64, 7000), (17, 530))
"""New tokens and context of the sequences of a ragged batch: whole prompts, and chunks after what a cache holds."""

DEVICE_SHAPES: Mapping[str, AttentionShape] = MappingProxyType(
    {
        "decode 8 x 4k": _decode(32, 8, 64, num_seqs=8, context=4096),
        "decode 64 x 4k": _decode(32, 8, 64, num_seqs=64, context=4096),
        "prefill 8k": AttentionShape(
            num_heads=32, num_kv_heads=8, head_dim=128, page_size=64, num_seqs=1, context=8192, query_tokens=8192
        ),
        "prefill ragged": AttentionShape(
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            page_size=64,
            num_seqs=len(RAGGED),
            context=max(context for _, context in RAGGED),
            query_tokens=max(new for new, _ in RAGGED),
            lengths=RAGGED,
        ),
    }
)
"""What devices are timed on: 32,8 heads, pages of 64; decode steps, a prompt in one go, and eight at once."""
