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
        top, top_ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[1]))
        missing = ((0, 0), (0, MAX_LOGPROBS - top.shape[1]))
        return SampleOutput(
            token_ids=token_ids,
            logprob=own[:, 0] - normalizer,
            rank=1 + jnp.sum((logits > own).astype(jnp.int32), axis=1),
            top_ids=jnp.pad(top_ids, missing),
            top_logprobs=jnp.pad(top - normalizer[:, None], missing, constant_values=-jnp.inf),
        )


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
