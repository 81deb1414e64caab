"""What the sampler should do, one row at a time in float64 numpy, sharing no code with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxserve.core.types import SamplingParams

BANNED = -1e30


def adjusted(
    params: SamplingParams, logits: np.ndarray, tokens: Sequence[int], num_prompt: int, eos: Sequence[int]
) -> np.ndarray:
    """Logits after masks, bias and penalties; `tokens` are prompt and output so far."""
    x = logits.astype(np.float64)
    if params.allowed_token_ids is not None:
        mask = np.ones(len(x), bool)
        mask[list(params.allowed_token_ids)] = False
        x[mask] = -np.inf
    for word in params.bad_words:
        prefix, last = list(word[:-1]), word[-1]
        if not prefix or list(tokens[-len(prefix) :]) == prefix:
            x[last] = min(x[last], BANNED)
    if len(tokens) - num_prompt < params.min_tokens:
        for token in (*params.stop_token_ids, *eos):
            x[token] = min(x[token], BANNED)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    output = list(tokens[num_prompt:])
    for token in set(tokens):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return x


def kept(params: SamplingParams, x: np.ndarray, *, slack: float = 0.0) -> np.ndarray:
    """Which tokens min_p, top_k and top_p leave; `slack` moves top_p's and min_p's borders to test near them."""
    weights = np.exp((x - x.max()) / params.temperature)
    keep = weights >= params.min_p * (1 - slack)
    if 0 < params.top_k < len(x):
        keep &= x >= np.sort(x)[-params.top_k]
    weights = np.where(keep, weights, 0.0)
    if params.top_p < 1.0:
        order = np.argsort(-x, kind="stable")
        mass = np.cumsum(weights[order])
        needed = int(np.argmax(mass >= min(1.0, params.top_p + slack) * mass[-1] * (1 - 1e-12)))
        keep &= x >= x[order[needed]]
    return keep & (weights > 0)


def probabilities(params: SamplingParams, x: np.ndarray) -> np.ndarray:
    """The distribution of the sampled token."""
    weights = np.where(kept(params, x), np.exp((x - x.max()) / params.temperature), 0.0)
    return weights / weights.sum()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - x.max() - np.log(np.sum(np.exp(x - x.max())))
