"""From logits to tokens, on the device, for any mix of requests in one program.

Raw logits come in, one row a sequence, with the slot that holds the sequence's state. Rows are edited (`logits`),
filtered (`filters`) and drawn from; the token is written into the slot's history, where the next step finds its input.
Whatever no active row asks for is skipped at run time: a greedy batch costs an argmax.

Noise is keyed by the sequence's seed and the token's position, by nothing else, so a request draws the same tokens in
any slot, row, batch or bucket. A draw is two Gumbel-max choices (arXiv:1611.01144): a group of neighbouring tokens by
its total weight, then a token within it. The result has exactly the distribution of one choice over the vocabulary, yet
needs a few hundred random numbers a row instead of one for each token.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from jaxserve.sampling.filters import filtered_weights
from jaxserve.sampling.groups import GROUP, grouped, take_group
from jaxserve.sampling.logits import adjust, needs_adjusting, take_rows
from jaxserve.sampling.logprobs import SampleOutput, no_logprobs, prompt_logprobs
from jaxserve.sampling.state import Filters, SamplingState


def sample(
    logits: Float[Array, "S V"],
    state: SamplingState,
    slots: Int32[Array, " S"],
    positions: Int32[Array, " S"],
    active: Bool[Array, " S"],
) -> tuple[SamplingState, SampleOutput]:
    """Draws one token a row and appends it to its slot's history. Jit with `state` donated.

    Args:
        logits: [S, V] float32, raw; rows that are not active may hold anything, NaN included.
        state: The sampler's state.
        slots: [S]; slot of each row; out of range (S_max) for padding.
        positions: [S]; position the sampled token will have in its sequence.
        active: [S]; rows that sample.

    Returns:
        The state with the tokens in its history, and the tokens: 0 in rows that are not active. Log-probabilities are
        of the raw logits, for all rows if any active row asked for them, else zeros.
    """
    with jax.named_scope("sample"):
        active = active & (slots >= 0) & (slots < state.history.shape[0])
        random = active & (take_rows(state.filters.temperature, slots) > 0.0)
        edited = active & take_rows(needs_adjusting(state), slots)
        token_ids = jax.lax.cond(
            jnp.any(random | edited),
            lambda x: _choose(x, state, slots, positions, active),
            _argmax,
            logits,
        )
        token_ids = jnp.where(active, token_ids, 0)
        reports = active & (take_rows(state.num_logprobs, slots) >= 0)
        output: SampleOutput = jax.lax.cond(jnp.any(reports), prompt_logprobs, _tokens_alone, logits, token_ids)
        # Rows that do not sample write out of range, each elsewhere, and so nothing.
        nowhere = state.history.shape[0] + jnp.arange(slots.shape[0], dtype=jnp.int32)
        target = jnp.where(active, slots, nowhere)
        history = state.history.at[target, positions].set(token_ids, mode="drop", unique_indices=True)
        return dataclasses.replace(state, history=history), output


def _tokens_alone(logits: Float[Array, "S V"], token_ids: Int32[Array, " S"]) -> SampleOutput:
    del logits
    return no_logprobs(token_ids)


def _choose(
    logits: Float[Array, "S V"],
    state: SamplingState,
    slots: Int32[Array, " S"],
    positions: Int32[Array, " S"],
    active: Bool[Array, " S"],
) -> Int32[Array, " S"]:
    logits = adjust(logits, state, slots, positions, active)
    filters: Filters = take_rows(state.filters, slots)
    random = active & (filters.temperature > 0.0)
    keys = take_rows(state.key, slots)
    best = _argmax(logits)

    def draw(x: Float[Array, "S V"]) -> Int32[Array, " S"]:
        return jnp.where(random, _draw(filtered_weights(x, filters, random), keys, positions), best)

    token_ids: Int32[Array, " S"] = jax.lax.cond(jnp.any(random), draw, lambda x: best, logits)
    return token_ids


def _argmax(logits: Float[Array, "S V"]) -> Int32[Array, " S"]:
    """The most likely token, the lowest id among equals.

    Goes by groups, for a maximum vectorises on every backend and an argmax over the whole row does not on the CPU.
    """
    groups = grouped(logits, -jnp.inf)
    group = jnp.argmax(jnp.max(groups, axis=2), axis=1).astype(jnp.int32)
    token = group * GROUP + jnp.argmax(take_group(groups, group), axis=1).astype(jnp.int32)
    return jnp.minimum(token, logits.shape[1] - 1)


def _draw(
    weights: Float[Array, "S V"], keys: UInt32[Array, "S 2"], positions: Int32[Array, " S"]
) -> Int32[Array, " S"]:
    """Draws a token in proportion to its weight."""
    groups = grouped(weights, 0.0)
    keys_of_position = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys, impl="threefry2x32"), positions)
    group_keys, token_keys = jnp.unstack(jax.vmap(jax.random.split)(keys_of_position), axis=1)
    group = _gumbel_max(jnp.sum(groups, axis=2), group_keys)
    token = group * GROUP + _gumbel_max(take_group(groups, group), token_keys)
    return jnp.minimum(token, weights.shape[1] - 1)


def _gumbel_max(weights: Float[Array, "S n"], keys: Array) -> Int32[Array, " S"]:
    noise = jax.vmap(lambda key: jax.random.gumbel(key, weights.shape[1:], jnp.float32))(keys)
    return jnp.argmax(jnp.log(weights) + noise, axis=1).astype(jnp.int32)
