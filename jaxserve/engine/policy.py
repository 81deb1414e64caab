"""Scheduling policy: limits, order, and how a step's token budget is cut into chunks. Pure functions and frozen data.

A client's sequences are ordered by rank = arrival + priority * aging: a lower priority number runs first, equals run in
order of arrival, and one level of priority is worth `aging_s` seconds of waiting, so nobody waits for ever behind a
stream of favoured requests. The rank of a sequence never changes. `queue` says how clients take turns.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field

from jaxserve.core.errors import ConfigError
from jaxserve.engine.fairness import FairnessConfig

MAX_PRIORITY = 1_000_000
"""Largest absolute value of a request's priority."""

QUEUE_SHARE = 4
"""A client may have this many times the places that are left in the queue, those reserved not counted.

That is four fifths of all if it is alone there, and four ninths if there are two like it.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Limits of one replica's scheduler.

    Attributes:
        max_num_seqs: Most sequences that hold pages and a slot at once.
        max_num_batched_tokens: Most tokens a step computes.
        max_model_len: Most tokens of prompt and output together.
        token_buckets: Sizes, ascending, that steps with prefill chunks are padded to; the last bounds a step too.
        max_waiting: Most sequences in the queue beside those for whom there are slots; beyond it a submit is refused.
        long_prefill_token_threshold: Chunks of prompts longer than this share at most this many tokens of a step while
            other prompts wait.
        watermark: Share of the pool that admission leaves alone while sequences run, so that they can grow.
        aging_s: Seconds of waiting that outweigh one level of priority.
        step_overhead_tokens: What a step costs before its first token, in tokens; chunks are cut at a bucket's edge
            when two smaller steps are cheaper than one padded step.
        fairness: How the service of clients is measured.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    token_buckets: tuple[int, ...]
    max_waiting: int = 1024
    long_prefill_token_threshold: int = 256
    watermark: float = 0.05
    aging_s: float = 60.0
    step_overhead_tokens: int = 32
    fairness: FairnessConfig = field(default_factory=FairnessConfig)

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError("max_num_seqs must be at least 1", param="max_num_seqs")
        if self.max_model_len < 2:
            raise ConfigError("max_model_len must be at least 2", param="max_model_len")
        if not self.token_buckets or list(self.token_buckets) != sorted(set(self.token_buckets)):
            raise ConfigError("token_buckets must be ascending and not empty", param="token_buckets")
        if self.step_tokens < self.max_num_seqs:
            raise ConfigError(
                f"a step computes at most {self.step_tokens} tokens, fewer than max_num_seqs={self.max_num_seqs}: "
                "lower max_num_seqs or raise max_num_batched_tokens",
                param="max_num_batched_tokens",
            )
        if self.long_prefill_token_threshold < 1 or self.max_waiting < 0 or self.step_overhead_tokens < 0:
            raise ConfigError("long_prefill_token_threshold must be at least 1 and max_waiting at least 0")
        if not (0 <= self.watermark < 1 and 0 < self.aging_s < math.inf):
            raise ConfigError("watermark must be in [0, 1) and aging_s positive and finite")

    @property
    def capacity(self) -> int:
        """Most sequences there can be: one a slot, and the queue."""
        return self.max_num_seqs + self.max_waiting

    @property
    def client_capacity(self) -> int:
        """Most sequences there can be of one client that sends many requests, when nobody else is there."""
        return self.max_num_seqs + QUEUE_SHARE * (self.max_waiting - self.reserved_places + 1) // (QUEUE_SHARE + 1)

    @property
    def reserved_places(self) -> int:
        """Places in the queue for clients that have nothing in it."""
        return self.max_waiting // 10

    @property
    def step_tokens(self) -> int:
        """Most tokens a step computes, given the largest bucket."""
        return min(self.max_num_batched_tokens, self.token_buckets[-1])


def admission_reserve(num_running: int, num_pages: int, watermark: float) -> int:
    """Pages an admission leaves alone: one for each running sequence to grow by, at most `watermark` of the pool."""
    return min(num_running, math.ceil(watermark * num_pages))


def chunk_tokens(num_uncomputed: int, budget: int, config: SchedulerConfig, *, contended: bool) -> int:
    """Tokens of a prompt that a step computes.

    Args:
        num_uncomputed: Tokens of it that are left.
        budget: Tokens that the step has room for.
        config: Limits.
        contended: Whether other prompts wait; then a long one takes no more than its share.
    """
    size = min(num_uncomputed, budget)
    return min(size, config.long_prefill_token_threshold) if contended else size


def bucket_of(num_tokens: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `num_tokens`, which must not exceed the largest."""
    return buckets[bisect_left(buckets, num_tokens)]


def trimmed_tokens(
    num_tokens: int, num_decodes: int, *, buckets: tuple[int, ...], overhead: int, continues: bool
) -> int:
    """How many of a step's tokens to keep so that padding is not the larger part of the work.

    Args:
        num_tokens: Tokens the step would compute, decodes included.
        num_decodes: Of those, decodes.
        buckets: Sizes a step can have, ascending.
        overhead: Fixed cost of a step, in tokens.
        continues: Whether the prompt that would be cut needs another step anyway.

    Returns:
        `num_tokens`, or the next smaller bucket if cutting there is at least a fifth cheaper.
    """
    place = bisect_left(buckets, num_tokens)
    if place == 0 or buckets[place] == num_tokens:
        return num_tokens
    below = buckets[place - 1]
    rest = num_tokens - below
    if below <= num_decodes:
        return num_tokens
    whole = buckets[place] + overhead
    second = rest if continues else bucket_of(rest + num_decodes, buckets) + overhead
    return below if 5 * (below + overhead + second) <= 4 * whole else num_tokens
