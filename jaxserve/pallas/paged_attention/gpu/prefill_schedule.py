"""The order of a prefill's work: tiles of tokens, those that read the most context first.

It depends on the step's batch alone, so one schedule serves all of its layers; `api.prepared` makes it before them.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxserve.pallas.paged_attention.inputs import PrefillSchedule, RaggedBatch


def prefill_schedule(batch: RaggedBatch, tile_tokens: int) -> PrefillSchedule:
    """Cuts all chunks into tiles and sorts them by the position they reach.

    Args:
        batch: Sequences, pages and positions.
        tile_tokens: Tokens of a tile.
    """
    num_seqs, num_rows = batch.page_table.shape[0], batch.positions.shape[0]
    seq = jnp.arange(num_seqs, dtype=jnp.int32)
    is_chunk = (seq >= batch.num_decodes) & (seq < batch.num_seqs)
    length = jnp.where(is_chunk, batch.query_starts[1:] - batch.query_starts[:-1], 0)
    count = (length + (tile_tokens - 1)) // tile_tokens
    ends = jnp.cumsum(count, dtype=jnp.int32)
    tile = jnp.arange(num_rows // tile_tokens + num_seqs, dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(ends[None, :] <= tile[:, None], axis=1, dtype=jnp.int32), num_seqs - 1)
    offset = (tile - (ends - count)[owner]) * tile_tokens
    position = batch.context_lens[owner] - length[owner] + offset
    tokens = jnp.minimum(length[owner] - offset, tile_tokens)
    order = jnp.argsort(jnp.where(tile < ends[-1], -(position + tokens), 1))
    columns = (owner, batch.query_starts[owner] + offset, position, tokens, batch.context_lens[owner])
    return PrefillSchedule(jnp.stack(columns, axis=1)[order], ends[-1])
