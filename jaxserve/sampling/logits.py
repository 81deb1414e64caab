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
HISTORY_BLOCK = 64
"""Tokens of history that one turn of the counting loop reads, and compares with each other."""

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
        (_apply_lists, has_lists(state.constraints)),
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
    constraints: Constraints = state.constraints
    return (constraints.restricted > 0) | has_lists(constraints) | has_penalties(state.penalties)


def has_lists(constraints: Constraints) -> Bool[Array, " S_max"]:
    """Which slots name tokens one by one: bad words, stop ids to wait with, or biases."""
    has_words = constraints.bad_words[:, :, -1].max(axis=1) >= 0
    return has_words | (constraints.min_len > 0) | (constraints.bias_ids.max(axis=1) >= 0)


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


def _apply_lists(
    logits: Float[Array, "S V"],
    state: SamplingState,
    slots: Int32[Array, " S"],
    positions: Int32[Array, " S"],
    wanted: Bool[Array, " S"],
) -> Float[Array, "S V"]:
    """Bans and biases tokens that are named one by one, all in one go: each by itself takes longer to compile."""
    constraints: Constraints = take_rows(state.constraints, slots)
    early = wanted & (positions < constraints.min_len)
    logits = _ban(logits, _matched(state, slots, positions, wanted))
    logits = _ban(logits, jnp.where(early[:, None], constraints.stop_ids, -1))
    ids = jnp.where(wanted[:, None], constraints.bias_ids, -1)
    places = _places(ids, logits.shape[1])
    return logits.at[_row_index(ids), places].add(constraints.bias_values, mode="drop", unique_indices=True)


def _matched(
    state: SamplingState, slots: Int32[Array, " S"], positions: Int32[Array, " S"], wanted: Bool[Array, " S"]
) -> Int32[Array, "S W"]:
    """The last token of each bad word whose other tokens are the last ones of prompt and output; else -1."""
    words = take_rows(state.constraints.bad_words, slots)  # [S, W, n]
    n = words.shape[2]
    tail_positions = positions[:, None] + jnp.arange(1 - n, 0)[None, :]  # [S, n - 1]
    tail = state.history.at[slots[:, None], jnp.maximum(tail_positions, 0)].get(mode="clip")
    tail = jnp.where(tail_positions >= 0, tail, -2)
    prefix = words[:, :, :-1]
    matches = jnp.all((prefix == -1) | (prefix == tail[:, None, :]), axis=2)
    last = jnp.where(matches & wanted[:, None], words[:, :, -1], -1)
    return jnp.where(_is_repeated(last[:, :, None] == last[:, None, :]), -1, last)


def _ban(logits: Float[Array, "S V"], ids: Int32[Array, "S n"]) -> Float[Array, "S V"]:
    """Lowers tokens, each named once a row, to BANNED; -1 is no token, and -inf stays."""
    places = _places(ids, logits.shape[1])
    return logits.at[_row_index(ids), places].min(BANNED, mode="drop", unique_indices=True)


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
        counted = at < lengths[:, None]
        same = (ids[:, :, None] == ids[:, None, :]) & counted[:, None, :]
        in_prompt = jnp.any(same & (at < prompt_len)[:, None, :], axis=2).astype(jnp.int32)
        num_output = jnp.sum(same & (at >= prompt_len)[:, None, :], axis=2, dtype=jnp.int32)
        rows = _row_index(ids)
        added = 2 * num_output + (in_prompt & ~packed.at[rows, ids].get(mode="clip"))
        # A token that occurs more than once in the block is written where it occurs first.
        places = _places(jnp.where(counted & ~_is_repeated(same), ids, -1), vocab_size)
        return packed.at[rows, places].add(added, mode="drop", unique_indices=True)

    num_blocks = -(-jnp.max(lengths) // block)
    packed = jax.lax.fori_loop(0, num_blocks, count, jnp.zeros((slots.shape[0], vocab_size), jnp.int32))
    return packed > 0, packed >> 1


def _row_index(ids: Int32[Array, "S n"]) -> Int32[Array, "S 1"]:
    return jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]


def _is_repeated(same: Bool[Array, "S n n"]) -> Bool[Array, "S n"]:
    """Which columns are the same as an earlier one."""
    column = jnp.arange(same.shape[1], dtype=jnp.int32)
    return jnp.any(same & (column[None, None, :] < column[None, :, None]), axis=2)


def _places(ids: Int32[Array, "S n"], vocab_size: int) -> Int32[Array, "S n"]:
    """Where to scatter to: -1 would count from the end, so it goes out of range, to a place of its own, and is dropped.

    With all places of a row different the compiler need not sort them, which takes it and the device far longer than
    the scatter.
    """
    nowhere = vocab_size + jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    return jnp.where(ids < 0, nowhere, ids)
