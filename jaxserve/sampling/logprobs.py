"""Log-probabilities to report: log-softmax of the model's raw logits, before masks, biases, penalties and temperature.

These are the figures OpenAI's `logprobs` asks for (vLLM calls the mode `raw_logprobs`): of a given token, its rank, and
of the most likely alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxserve.core.types import MAX_LOGPROBS
from jaxserve.sampling.groups import grouped, take_group


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SampleOutput:
    """Tokens at T positions (one a row of a step, or a stretch of a prompt) and how likely they were."""

    # [T]
    token_ids: Int32[Array, " T"]
    # [T]; of token_ids
    logprob: Float[Array, " T"]
    # [T]; 1 + the number of tokens strictly more likely
    rank: Int32[Array, " T"]
    # [T, MAX_LOGPROBS]; the most likely tokens, most likely first, the lower id first among equals
    top_ids: Int32[Array, "T top"]
    # [T, MAX_LOGPROBS]; -inf where the vocabulary has fewer tokens
    top_logprobs: Float[Array, "T top"]


def prompt_logprobs(logits: Float[Array, "T V"], token_ids: Int32[Array, " T"]) -> SampleOutput:
    """Reports on given tokens, whether of a prompt or just sampled.

    Args:
        logits: [T, V] float32, raw; row t predicts the token at position t.
        token_ids: [T]; the token that stands there.
    """
    with jax.named_scope("logprobs"):
        normalizer = jax.nn.logsumexp(logits, axis=1)
        own = jnp.take_along_axis(logits, token_ids[:, None], axis=1, mode="clip")
        top, top_ids = _top(logits, min(MAX_LOGPROBS, logits.shape[1]))
        missing = ((0, 0), (0, MAX_LOGPROBS - top.shape[1]))
        return SampleOutput(
            token_ids=token_ids,
            logprob=own[:, 0] - normalizer,
            rank=1 + jnp.sum((logits > own).astype(jnp.int32), axis=1),
            top_ids=jnp.pad(top_ids, missing),
            top_logprobs=jnp.pad(top - normalizer[:, None], missing, constant_values=-jnp.inf),
        )


def _top(logits: Float[Array, "T V"], count: int) -> tuple[Float[Array, "T n"], Int32[Array, "T n"]]:
    """The likeliest tokens in order, the lower id first among equals: what `lax.top_k` gives.

    Takes one after another, each from the group that has the best one left. That reads the logits once, where a TPU's
    `top_k` is a long program that takes seconds to compile.
    """
    num_rows = logits.shape[0]
    groups = grouped(logits, -jnp.inf)
    lanes = jnp.arange(groups.shape[2], dtype=jnp.int32)[None, :]

    def take(i: Int32[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        left, top, top_ids = carry
        group = jnp.argmax(left, axis=1).astype(jnp.int32)
        ids = group[:, None] * groups.shape[2] + lanes
        taken = jnp.any(ids[:, :, None] == top_ids[:, None, :], axis=2)
        row = jnp.where(taken, -jnp.inf, take_group(groups, group))
        lane = jnp.argmax(row, axis=1).astype(jnp.int32)[:, None]
        best = jnp.take_along_axis(row, lane, axis=1)
        rest = jnp.max(jnp.where(lanes == lane, -jnp.inf, row), axis=1)
        here = jnp.arange(left.shape[1], dtype=jnp.int32)[None, :] == group[:, None]
        return (
            jnp.where(here, rest[:, None], left),
            jax.lax.dynamic_update_slice_in_dim(top, best, i, axis=1),
            jax.lax.dynamic_update_slice_in_dim(top_ids, jnp.take_along_axis(ids, lane, axis=1), i, axis=1),
        )

    start = (
        jnp.max(groups, axis=2),
        jnp.full((num_rows, count), -jnp.inf, jnp.float32),
        jnp.full((num_rows, count), -1, jnp.int32),
    )
    _, top, top_ids = jax.lax.fori_loop(0, count, take, start)
    return top, top_ids


def no_logprobs(token_ids: Int32[Array, " T"]) -> SampleOutput:
    """The tokens alone; zeros stand in for a report nobody asked for."""
    num_tokens = token_ids.shape[0]
    return SampleOutput(
        token_ids=token_ids,
        logprob=jnp.zeros((num_tokens,), jnp.float32),
        rank=jnp.zeros((num_tokens,), jnp.int32),
        top_ids=jnp.zeros((num_tokens, MAX_LOGPROBS), jnp.int32),
        top_logprobs=jnp.zeros((num_tokens, MAX_LOGPROBS), jnp.float32),
    )
