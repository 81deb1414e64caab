"""top-k, top-p and min-p without sorting: each keeps the tokens at or above a threshold that bisection finds exactly.

A sort of [S, V] costs hundreds of passes over it, and a threshold is found in about a dozen. Ties are kept or dropped
together: top-k keeps every token as likely as the k-th (as vLLM and transformers do), and top-p keeps every token as
likely as the last one it needs, so the result never depends on the order in which tokens happen to stand. min_p is
applied first, then top_k, then top_p over what is left, renormalised (vLLM's order).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxserve.sampling.state import Filters

NEGLIGIBLE = 104.0
"""exp(-104) is 0 in float32: a token this far below the best (in units of temperature) is never drawn."""

_LINEAR_STEPS = 20
_SMALLEST_INT = -(2**31)


class _Bracket(NamedTuple):
    """The threshold lies in [low, high): mass(x >= low) reaches the target, mass(x >= high) does not."""

    low: Float[Array, " S"]
    high: Float[Array, " S"]
    count_low: Float[Array, " S"]
    count_high: Float[Array, " S"]
    step: Int32[Array, ""]


def filtered_weights(logits: Float[Array, "S V"], filters: Filters, random: Bool[Array, " S"]) -> Float[Array, "S V"]:
    """Unnormalised probabilities after temperature, min_p, top_k and top_p; 0 for tokens that are dropped.

    Args:
        logits: [S, V] float32.
        filters: Rows of [S].
        random: [S]; rows that are drawn at random; the weights of the others are unspecified, but finite or NaN by row.
    """
    best = jnp.max(logits, axis=1)
    temperature = jnp.where(random, filters.temperature, 1.0)
    weights = jnp.exp((logits - best[:, None]) / temperature[:, None])
    # Written as "not below" so that min_p = 0 keeps everything.
    weights = jnp.where(weights < jnp.where(random, filters.min_p, 0.0)[:, None], 0.0, weights)
    lowest = best - NEGLIGIBLE * temperature
    wants_k = random & (filters.top_k > 0) & (filters.top_k < logits.shape[1])
    weights = jax.lax.cond(
        jnp.any(wants_k),
        lambda w: _keep_top_k(logits, w, filters.top_k, wants_k, lowest),
        lambda w: w,
        weights,
    )
    wants_p = random & (filters.top_p < 1.0)
    kept: Float[Array, "S V"] = jax.lax.cond(
        jnp.any(wants_p),
        lambda w: _keep_top_p(logits, w, filters.top_p, wants_p, lowest),
        lambda w: w,
        weights,
    )
    return kept


def _keep_top_k(
    logits: Float[Array, "S V"],
    weights: Float[Array, "S V"],
    top_k: Int32[Array, " S"],
    wanted: Bool[Array, " S"],
    lowest: Float[Array, " S"],
) -> Float[Array, "S V"]:
    threshold = _threshold(logits, None, top_k.astype(jnp.float32), wanted, lowest)
    return jnp.where((logits < threshold[:, None]) & wanted[:, None], 0.0, weights)


def _keep_top_p(
    logits: Float[Array, "S V"],
    weights: Float[Array, "S V"],
    top_p: Float[Array, " S"],
    wanted: Bool[Array, " S"],
    lowest: Float[Array, " S"],
) -> Float[Array, "S V"]:
    target = top_p * jnp.sum(weights, axis=1)
    threshold = _threshold(logits, weights, target, wanted, lowest)
    return jnp.where((logits < threshold[:, None]) & wanted[:, None], 0.0, weights)


def _threshold(
    logits: Float[Array, "S V"],
    weights: Float[Array, "S V"] | None,
    target: Float[Array, " S"],
    wanted: Bool[Array, " S"],
    lowest: Float[Array, " S"],
) -> Float[Array, " S"]:
    """A value t of each row such that {x >= t} is the smallest set of likeliest tokens whose weights reach the target.

    Args:
        logits: [S, V].
        weights: [S, V]; None counts each token as 1.
        target: [S].
        wanted: [S]; rows to search for; the others stop at once.
        lowest: [S]; the search keeps everything from here up if even that does not reach the target.
    """

    def unfinished(bracket: _Bracket) -> Bool[Array, " S"]:
        one_left = bracket.count_low - bracket.count_high == 1.0
        # False for NaN too, so a row of NaN ends at once.
        apart = _from_ordered(_to_ordered(bracket.low) + 1) < bracket.high
        exact = (bracket.count_low <= target) if weights is None else jnp.zeros_like(wanted)
        return wanted & apart & ~one_left & ~exact

    def halve(bracket: _Bracket) -> _Bracket:
        middle = _middle(bracket)
        kept = logits >= middle[:, None]
        count = jnp.sum(kept.astype(jnp.float32), axis=1)
        mass = count if weights is None else jnp.sum(jnp.where(kept, weights, 0.0), axis=1)
        going = unfinished(bracket)
        reached = going & (mass >= target)
        missed = going & ~(mass >= target)
        return _Bracket(
            low=jnp.where(reached, middle, bracket.low),
            high=jnp.where(missed, middle, bracket.high),
            count_low=jnp.where(reached, count, bracket.count_low),
            count_high=jnp.where(missed, count, bracket.count_high),
            step=bracket.step + 1,
        )

    best = jnp.max(logits, axis=1)
    start = _Bracket(
        low=lowest,
        high=_from_ordered(_to_ordered(best) + 1),
        count_low=jnp.sum((logits >= lowest[:, None]).astype(jnp.float32), axis=1),
        count_high=jnp.zeros_like(lowest),
        step=jnp.int32(0),
    )
    return jax.lax.while_loop(lambda bracket: jnp.any(unfinished(bracket)), halve, start).low


def _middle(bracket: _Bracket) -> Float[Array, " S"]:
    """Between low and high: first by value, which closes in fast, then by float number, which surely ends."""
    by_value = bracket.low + (bracket.high - bracket.low) * 0.5
    low, high = _to_ordered(bracket.low), _to_ordered(bracket.high)
    by_number = _from_ordered((low >> 1) + (high >> 1) + (low & high & 1))
    inside = (by_value > bracket.low) & (by_value < bracket.high) & (bracket.step < _LINEAR_STEPS)
    return jnp.where(inside, by_value, by_number)


def _to_ordered(x: Float[Array, " S"]) -> Int32[Array, " S"]:
    """Numbers the floats in ascending order; +0 and -0 are both 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, _SMALLEST_INT - bits, bits)


def _from_ordered(number: Int32[Array, " S"]) -> Float[Array, " S"]:
    bits = jnp.where(number < 0, _SMALLEST_INT - number, number)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
