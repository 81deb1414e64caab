"""The vocabulary every package shares: a request goes in, token events come out.

All types are frozen. A `Request` holds token ids only: text is turned into ids before it and back into text after it,
so engines, schedulers and the wire never see a tokenizer.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

MAX_LOGPROBS = 20
"""Most alternatives a logprobs request may ask for (OpenAI's bound)."""

RANDOM_SEED = -1
"""The seed that asks for a random one, as in vLLM."""


class FinishReason(enum.StrEnum):
    """Why a sequence ended; the values are those of OpenAI's `finish_reason` where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop; every field is applied or the request is refused.

    Semantics follow OpenAI's API and, where it has no such parameter, vLLM's.

    Attributes:
        max_tokens: Most tokens to generate, >= 1; None means until the context is full.
        min_tokens: No end-of-sequence, stop token or stop string before this many tokens.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of most likely tokens whose probability reaches top_p, in (0, 1].
        min_p: Drop tokens less likely than min_p times the most likely one, in [0, 1].
        repetition_penalty: > 1 discourages tokens seen in the prompt or the output (CTRL, arXiv:1909.05858).
        frequency_penalty: Subtracted from a logit for each time its token occurs in the output, in [-2, 2].
        presence_penalty: Subtracted once from a logit if its token occurs in the output, in [-2, 2].
        logit_bias: Token id to a value added to its logit, in [-100, 100].
        allowed_token_ids: If given, only these tokens can be sampled.
        bad_words: Token-id sequences that are never completed.
        seed: Makes sampling reproducible; the i-th sequence of a request uses seed + i. None and
            `RANDOM_SEED` draw a seed for the request; of any other all 64 bits count.
        stop: Strings that end a sequence, found across token borders.
        stop_token_ids: Tokens that end a sequence.
        ignore_eos: Go on past the model's end-of-sequence tokens.
        include_stop_str_in_output: Keep the stop string in the text.
        skip_special_tokens: Leave control tokens out of the text.
        logprobs: How many alternatives to report for each output token, 0 to 20 (0: the sampled token only).
        prompt_logprobs: The same for each prompt token.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """What a model's makers advise where a request says nothing; None leaves it to `SamplingParams`.

    Attributes:
        temperature: As in `SamplingParams`, like the others.
        top_k: 0 keeps all.
        top_p: In (0, 1].
        min_p: In [0, 1].
        repetition_penalty: 1 changes nothing.
        max_tokens: Of answers to messages; never more than the context has room for.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def said(self) -> dict[str, float]:
        """Those that are not None, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def params(self) -> SamplingParams:
        """Parameters of a request that says nothing itself."""
        return SamplingParams(**self.said())  # type: ignore[arg-type]  # fields of the same names and types


NO_DEFAULTS = SamplingDefaults()
"""Nothing is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt and what to do with it.

    Attributes:
        request_id: Unique among the requests in flight.
        prompt: Token ids, at least one.
        sampling: How to sample and when to stop.
        n: How many sequences to generate from the prompt; they share the prompt's pages.
        priority: Lower runs first; ties run in order of arrival.
        cache_salt: Requests share prefix-cache pages only with requests of the same salt.
        client: Whose share of the service the request counts against; requests without one are a client of their own.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    priority: int = 0
    cache_salt: str = ""
    client: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position.

    Attributes:
        token_id: The token that stands at the position.
        logprob: Its natural-log probability.
        rank: Its rank among all tokens, 1 being the most likely.
        top: The most likely tokens with their log-probabilities, most likely first; as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """News of one sequence: new tokens, its end, or both.

    Each sequence of a request ends in exactly one event with a `finish_reason`; none follows it.

    Attributes:
        request_id: The request the sequence belongs to.
        index: Which of the request's n sequences.
        token_ids: New output tokens, in order; a stop token is included.
        logprobs: One entry a new token if the request asked for them.
        prompt_logprobs: With the first event of a request that asked for them: an entry for each prompt token; the
            first is None, for nothing precedes it.
        num_cached_tokens: Prompt tokens whose KV came from the prefix cache; set on the first event of a sequence.
        finish_reason: Set on the sequence's last event.
        stop_token_id: The token that caused FinishReason.STOP, or None if it was not a token.
        error: A sentence for the user when finish_reason is ERROR.
        queue_s: Seconds the sequence waited for its first step; set on its first event that has tokens.
        prefill_s: Seconds from its first step to its first token; set with queue_s.
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    num_cached_tokens: int | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    queue_s: float | None = None
    prefill_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class KVHandle:
    """A claim on pages that another worker holds.

    Attributes:
        engine_id: Which worker holds the pages.
        transfer_id: The worker's name for this claim.
        num_tokens: How many prompt tokens the pages cover.
        layout: Fingerprint of the pool's layout; both sides must agree on it.
        expires_unix_s: When the holder may free the pages, in seconds since the epoch.
    """

    engine_id: str
    transfer_id: str
    num_tokens: int
    layout: str
    expires_unix_s: float
