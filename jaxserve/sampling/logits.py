"""Logit edits that come before temperature: allowed tokens, bad words, min_tokens, logit_bias and penalties.

Each edit runs under a `lax.cond` on whether any row that samples in this step asks for it, so a batch pays for what it
uses and one compiled program serves every mix. The order is vLLM's: masks, then logit_bias, then repetition, frequency
and presence penalties. `allowed_token_ids` sets the rest to -inf. Bad words and min_tokens lower a token to `BANNED`,
far below any logit yet above -inf: a sequence that has banned all it is allowed takes one of those, not of the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from jaxserve.sampling.state import Constraints, Penalties, SamplingState

BANNED = -1e30
HISTORY_BLOCK = 256
"""Tokens of history that one turn of the counting loop reads."""

_T = TypeVar("_T")


def take_rows(tree: _T, slots: Int32[Array, " S"]) -> _T:
    """The rows of each array of a state at `slots`; a slot out of range reads the last row and must be masked."""
    rows: _T = jax.tree.map(lambda x: x.at[slots].get(mode="clip"), tree)
    return rows


def adjust(
    logits: Float[Array, "S V"],
    state: SamplingState,
    slots: Int32[Array, " S"],
    positions: Int32[Array, " S"],
    active: Bool[Array, " S"],
) -> Float[Array, "S V"]:
    """Applies every edit that some active row asks for.

    Args:
        logits: [S, V] float32, as the model gives them.
        state: The sampler's state.
        slots: [S]; slot of each row.
        positions: [S]; position the token to be sampled will have.
        active: [S]; rows that sample; the others come back unspecified.
    """
    edits: tuple[tuple[Callable[..., Float[Array, "S V"]], Bool[Array, " S_max"]], ...] = (
        (_apply_allowed, state.constraints.restricted > 0),
        (_apply_bad_words, state.constraints.bad_words[:, :, -1].max(axis=1) >= 0),
        (_apply_min_tokens, state.constraints.min_len > 0),
        (_apply_bias, state.constraints.bias_ids.max(axis=1) >= 0),
        (_apply_penalties, has_penalties(state.penalties)),
    )
    for apply, wanted_by_slot in edits:
        wanted = active & take_rows(wanted_by_slot, slots)
        logits = jax.lax.cond(
            jnp.any(wanted),
            lambda x, apply=apply, wanted=wanted: apply(x, state, slots, positions, wanted),
            lambda x: x,
            logits,
        )
    return logits


def needs_adjusting(state: SamplingState) -> Bool[Array, " S_max"]:
    """Which slots ask for any edit at all."""
    c: Constraints = state.constraints
    return (
        (c.restricted > 0)
        | (c.bad_words[:, :, -1].max(axis=1) >= 0)
        | (c.min_len > 0)
        | (c.bias_ids.max(axis=1) >= 0)
        | has_penalties(state.penalties)
    )


def has_penalties(penalties: Penalties) -> Bool[Array, " S_max"]:
    """Which slots ask for any penalty."""
    return (penalties.repetition != 1.0) | (penalties.frequency != 0.0) | (penalties.presence != 0.0)


def _apply_allowed(
    logits: Float[Array, "S V"],
    state: SamplingState,
    slots: Int32[Array, " S"],
    positions: Int32[Array, " S"],
    wanted: Bool[Array, " S"],
) -> Float[Array, "S V"]:
    del positions
    vocab_size = logits.shape[1]
    words: UInt32[Array, "S words"] = take_rows(state.constraints.allowed, slots)
    bits = jnp.right_shift(words[:, :, None], jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & jnp.uint32(1)
    allowed = bits.reshape(words.shape[0], -1)[:, :vocab_size] == 1
    return jnp.where(allowed | ~wanted[:, None], logits, -jnp.inf)


def _apply_bad_words(
    logits: Float[Array, "S V"],
    state: SamplingState,
    slots: Int32[Array, " S"],
    positions: Int32[Array, " S"],
    wanted: Bool[Array, " S"],
) -> Float[Array, "S V"]:
    """Bans the last token of each word whose other tokens are the last ones of prompt and output."""
    words = take_rows(state.constraints.bad_words, slots)  # [S, W, n]
    n = words.shape[2]
    tail_positions = positions[:, None] + jnp.arange(1 - n, 0)[None, :]  # [S, n - 1]
    tail = state.history.at[slots[:, None], jnp.maximum(tail_positions, 0)].get(mode="clip")
    tail = jnp.where(tail_positions >= 0, tail, -2)
    prefix = words[:, :, :-1]
    matches = jnp.all((prefix == -1) | (prefix == tail[:, None, :]), axis=2)
    last = words[:, :, -1]
    return _ban(logits, jnp.where(matches & wanted[:, None], last, -1))


def _apply_min_tokens(
    logits: Float[Array, "S V"],
    state: SamplingState,
    slots: Int32[Array, " S"],
    positions: Int32[Array, " S"],
    wanted: Bool[Array, " S"],
) -> Float[Array, "S V"]:
    early = wanted & (positions < take_rows(state.constraints.min_len, slots))
    return _ban(logits, jnp.where(early[:, None], take_rows(state.constraints.stop_ids, slots), -1))


def _ban(logits: Float[Array, "S V"], ids: Int32[Array, "S n"]) -> Float[Array, "S V"]:
    """Lowers tokens to BANNED; -1 is no token, and -inf stays."""
    return logits.at[_row_index(ids), _or_nowhere(ids, logits.shape[1])].min(BANNED, mode="drop")


def _apply_bias(
    logits: Float[Array, "S V"],
    state: SamplingState,
    slots: Int32[Array, " S"],
    positions: Int32[Array, " S"],
    wanted: Bool[Array, " S"],
) -> Float[Array, "S V"]:
    del positions
    ids = jnp.where(wanted[:, None], take_rows(state.constraints.bias_ids, slots), -1)
    values = take_rows(state.constraints.bias_values, slots)
    return logits.at[_row_index(ids), _or_nowhere(ids, logits.shape[1])].add(values, mode="drop")


def _apply_penalties(
    logits: Float[Array, "S V"],
    state: SamplingState,
    slots: Int32[Array, " S"],
    positions: Int32[Array, " S"],
    wanted: Bool[Array, " S"],
) -> Float[Array, "S V"]:
    """Repetition divides or multiplies (prompt and output); frequency and presence subtract (output only)."""
    seen, counts = count_tokens(state, slots, jnp.where(wanted, positions, 0), logits.shape[1])
    rows = take_rows(state.penalties, slots)
    repetition = jnp.where(seen & wanted[:, None], rows.repetition[:, None], 1.0)
    frequency = jnp.where(wanted, rows.frequency, 0.0)[:, None]
    presence = jnp.where(wanted, rows.presence, 0.0)[:, None]
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    return logits - frequency * counts.astype(jnp.float32) - jnp.where(counts > 0, presence, 0.0)


def count_tokens(
    state: SamplingState, slots: Int32[Array, " S"], lengths: Int32[Array, " S"], vocab_size: int
) -> tuple[Bool[Array, "S V"], Int32[Array, "S V"]]:
    """Counts tokens over each row's history, in a loop as long as the longest history needs.

    Args:
        state: The sampler's state.
        slots: [S]; slot of each row.
        lengths: [S]; tokens of history to count; 0 counts none.
        vocab_size: V.

    Returns:
        Whether each token occurs in prompt or output, and how often in the output.
    """
    prompt_len = take_rows(state.prompt_len, slots)[:, None]
    block = min(HISTORY_BLOCK, state.history.shape[1])

    # One array holds both: bit 0 says "in the prompt", the bits above count the output.
    def count(i: Int32[Array, ""], packed: Int32[Array, "S V"]) -> Int32[Array, "S V"]:
        at = i * block + jnp.arange(block, dtype=jnp.int32)[None, :]
        ids = state.history.at[slots[:, None], at].get(mode="clip")
        in_prompt = (at < prompt_len) & (at < lengths[:, None])
        in_output = (at >= prompt_len) & (at < lengths[:, None])
        rows = _row_index(ids)
        packed = packed.at[rows, jnp.where(in_output, ids, vocab_size)].add(2, mode="drop")
        prompt_bit = packed.at[rows, jnp.where(in_prompt, ids, 0)].get(mode="clip") | 1
        return packed.at[rows, jnp.where(in_prompt, ids, vocab_size)].max(prompt_bit, mode="drop")

    num_blocks = -(-jnp.max(lengths) // block)
    packed = jax.lax.fori_loop(0, num_blocks, count, jnp.zeros((slots.shape[0], vocab_size), jnp.int32))
    return packed > 0, packed >> 1


def _row_index(ids: Int32[Array, "S n"]) -> Int32[Array, "S 1"]:
    return jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]


def _or_nowhere(ids: Int32[Array, "S n"], vocab_size: int) -> Int32[Array, "S n"]:
    """-1 would count from the end; V is out of range and dropped."""
    return jnp.where(ids < 0, vocab_size, ids)
