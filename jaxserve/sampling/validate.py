"""What a request may ask of the sampler: static room in the device state, and the check that a request fits it.

The engine builds one `SamplingLimits` from its model and calls `validate_sampling` when a request arrives, before it is
queued. Whatever passes here can be loaded into the sampler's fixed-shape rows and applied in full; whatever does not is
refused with an error that names the parameter. Host-only: no array library is imported.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from jaxserve.core.errors import InvalidRequestError
from jaxserve.core.types import MAX_LOGPROBS, SamplingParams

MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 100.0
MAX_PENALTY = 2.0
MAX_BIAS_VALUE = 100.0

MAX_STOP_IDS = 64
"""Most stop token ids a request may have, end-of-sequence tokens included."""

MAX_BIAS_IDS = 300
"""Most entries of `logit_bias`; OpenAI's bound."""

MAX_BAD_WORDS = 64
MAX_BAD_WORD_LEN = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingLimits:
    """Bounds that follow from the model and from the shapes of the sampler's state.

    Attributes:
        vocab_size: Token ids are in [0, vocab_size).
        max_model_len: Most tokens of prompt and output together.
        eos_token_ids: Tokens that end a sequence; `min_tokens` bans them too.
        max_stop_ids: Most stop token ids a request may have, end-of-sequence tokens included.
        max_bias_ids: Most entries of `logit_bias` (OpenAI's bound is 300).
        max_bad_words: Most bad words.
        max_bad_word_len: Most tokens of a bad word.
    """

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    max_stop_ids: int = MAX_STOP_IDS
    max_bias_ids: int = MAX_BIAS_IDS
    max_bad_words: int = MAX_BAD_WORDS
    max_bad_word_len: int = MAX_BAD_WORD_LEN

    def __post_init__(self) -> None:
        # They are scattered to with `min_tokens`: one outside would fail or spoil the whole step.
        outside = [token_id for token_id in self.eos_token_ids if not 0 <= token_id < self.vocab_size]
        if outside:
            raise ValueError(f"eos_token_ids {outside} are outside the vocabulary [0, {self.vocab_size})")


def validate_sampling(params: SamplingParams, limits: SamplingLimits) -> None:
    """Refuses parameters that are out of range or do not fit the sampler's state.

    Args:
        params: What the request asks for.
        limits: What this engine can hold.

    Raises:
        InvalidRequestError: A parameter cannot be applied; `param` names it.
    """
    _check_lengths(params, limits)
    _check_numbers(params)
    _check_token_ids(params, limits)
    _check_bad_words(params, limits)
    _check_something_allowed(params, limits)


def stop_ids(params: SamplingParams, eos_token_ids: Iterable[int]) -> tuple[int, ...]:
    """Token ids that `min_tokens` bans: the request's own and the model's, `ignore_eos` or not."""
    return tuple(dict.fromkeys((*params.stop_token_ids, *eos_token_ids)))


def _check_lengths(params: SamplingParams, limits: SamplingLimits) -> None:
    if params.max_tokens is not None:
        _integer("max_tokens", params.max_tokens, 1, None)
    _integer("min_tokens", params.min_tokens, 0, limits.max_model_len)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidRequestError(
            f"min_tokens ({params.min_tokens}) must not exceed max_tokens ({params.max_tokens}).", param="min_tokens"
        )
    if params.logprobs is not None:
        _integer("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    if params.prompt_logprobs is not None:
        _integer("prompt_logprobs", params.prompt_logprobs, 0, MAX_LOGPROBS)
    if "" in params.stop:
        raise InvalidRequestError("stop must not contain an empty string.", param="stop")


def _check_numbers(params: SamplingParams) -> None:
    _number("temperature", params.temperature, 0.0, MAX_TEMPERATURE)
    _number("top_p", params.top_p, 0.0, 1.0)
    if params.top_p == 0.0:
        raise InvalidRequestError("top_p must be greater than 0; use temperature 0 for greedy.", param="top_p")
    _number("min_p", params.min_p, 0.0, 1.0)
    _integer("top_k", params.top_k, 0, None)
    _number("repetition_penalty", params.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
    _number("frequency_penalty", params.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    _number("presence_penalty", params.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    if params.seed is not None:
        _integer("seed", params.seed, -(2**63), 2**63 - 1)


def _check_token_ids(params: SamplingParams, limits: SamplingLimits) -> None:
    _token_ids("stop_token_ids", params.stop_token_ids, limits.vocab_size)
    eos = frozenset(limits.eos_token_ids)
    own = frozenset(params.stop_token_ids) - eos
    _at_most("stop_token_ids", len(own), limits.max_stop_ids - len(eos), f"token ids beside the model's own {len(eos)}")
    _token_ids("logit_bias", params.logit_bias, limits.vocab_size)
    _at_most("logit_bias", len(params.logit_bias), limits.max_bias_ids, "entries")
    for value in params.logit_bias.values():
        _number("logit_bias", value, -MAX_BIAS_VALUE, MAX_BIAS_VALUE)
    if params.allowed_token_ids is not None:
        if not params.allowed_token_ids:
            raise InvalidRequestError("allowed_token_ids must not be empty.", param="allowed_token_ids")
        _token_ids("allowed_token_ids", params.allowed_token_ids, limits.vocab_size)


def _check_bad_words(params: SamplingParams, limits: SamplingLimits) -> None:
    _at_most("bad_words", len(params.bad_words), limits.max_bad_words, "words")
    for word in params.bad_words:
        if not word:
            raise InvalidRequestError("bad_words must not contain an empty word.", param="bad_words")
        _token_ids("bad_words", word, limits.vocab_size)
        _at_most("bad_words", len(word), limits.max_bad_word_len, "tokens in a word")


def _check_something_allowed(params: SamplingParams, limits: SamplingLimits) -> None:
    """A request whose first token is already impossible is refused rather than answered against its own wishes."""
    banned = {word[0] for word in params.bad_words if len(word) == 1}
    askers = ["bad_words"] if banned else []
    if params.min_tokens > 0:
        banned.update(stop_ids(params, limits.eos_token_ids))
        askers.append("min_tokens")
    who = " and ".join(askers)
    if params.allowed_token_ids is not None:
        if banned.issuperset(params.allowed_token_ids):
            raise InvalidRequestError(
                f"allowed_token_ids has no token beside those that {who} ban.",
                param="allowed_token_ids",
            )
    elif len(banned) >= limits.vocab_size:
        raise InvalidRequestError(f"{who} ban every token.", param=askers[0])


def _number(name: str, value: float, low: float, high: float) -> None:
    # The comparison is written so that NaN fails it.
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequestError(f"{name} must be a number in [{low:g}, {high:g}], not {value}.", param=name)


def _integer(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise InvalidRequestError(f"{name} must be {wanted}, not {value}.", param=name)


def _token_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    # There may be as many as the vocabulary has, and this is done for each prompt of a body.
    for token_id in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{name} contains token id {token_id}, which is outside the vocabulary [0, {vocab_size}).", param=name
            )


def _at_most(name: str, count: int, limit: int, what: str) -> None:
    if count > limit:
        raise InvalidRequestError(f"{name} may have at most {limit} {what}, not {count}.", param=name)
