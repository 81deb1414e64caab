"""One generation in flight: its tokens, its pages, and how far its computation has got.

The scheduler owns every `Sequence` and is the only one to change it. Positions, with a step dispatched but not
committed:

    [0, num_computed)                              KV is in the pages, or will be once the dispatched steps have run
    [0, len(token_ids))                            ids the host knows: prompt and committed output
    [len(token_ids), len(token_ids)+num_in_flight)  ids only the device knows

so the next step computes [num_computed, len(token_ids) + num_in_flight).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from jaxserve.core.types import Request
from jaxserve.engine.fairness import Account
from jaxserve.engine.logprobs import PromptLogprobs
from jaxserve.kv.pages import PageTable

Rank = tuple[float, int]
"""(arrival plus an allowance for its priority, seq_id): lower runs first."""


class SequenceStatus(enum.Enum):
    """Where a sequence is in its life."""

    BLOCKED = "blocked"  # n > 1: waits for the prompt's KV of its request's first sequence
    WAITING = "waiting"  # in the queue: new, forked or preempted
    PREFILLING = "prefilling"  # holds a slot and pages; tokens the host knows are left to compute
    DECODING = "decoding"  # holds a slot and pages; each step computes the token sampled last
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What a sequence was promised at submission.

    Attributes:
        account: Its client's, which pays for its tokens.
        rank: Lower runs first.
        arrival_s: When it was submitted, on the scheduler's clock.
        max_len: Tokens of prompt and output at which it ends with FinishReason.LENGTH.
        min_len: Fewer tokens than this never end with FinishReason.STOP.
        stop_ids: Tokens that end it with FinishReason.STOP.
    """

    account: Account
    rank: Rank
    arrival_s: float
    max_len: int
    min_len: int
    stop_ids: frozenset[int]


@dataclass(slots=True)
class FirstEvent:
    """What the first event of a sequence reports besides its token.

    Attributes:
        started_s: When the sequence first got a slot, on the scheduler's clock; negative before.
        num_cached_tokens: Prompt tokens found in the prefix cache then; negative before.
        sent: Whether the event is out.
    """

    started_s: float = -1.0
    num_cached_tokens: int = -1
    sent: bool = False


class Sequence:
    """One of the n sequences of a request.

    Attributes:
        request: The request it belongs to.
        index: Which of the request's n sequences.
        seq_id: Unique in the life of the scheduler.
        seed: Unsigned 64-bit seed of its noise.
        slot: Row of the device's per-sequence state while it runs, in [0, max_num_seqs); -1 otherwise.
        token_ids: Prompt and committed output.
        num_prompt: Tokens of the prompt.
        num_computed: Tokens whose KV is, or after the dispatched steps will be, in the pages.
        num_in_flight: Sampled tokens that dispatched steps will deliver.
        table: Its pages.
        status: Where it is in its life.
        terms: Limits and rank.
        first: What its first event will report.
        epoch: Grows whenever results in flight become void (preemption, end).
        prompt_logprobs: What has been collected for the first event, or None if nothing is wanted (any more).
    """

    __slots__ = (
        "epoch",
        "first",
        "index",
        "num_computed",
        "num_in_flight",
        "num_prompt",
        "prompt_logprobs",
        "request",
        "seed",
        "seq_id",
        "slot",
        "status",
        "table",
        "terms",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        seq_id: int,
        seed: int,
        table: PageTable,
        terms: Terms,
    ) -> None:
        self.request = request
        self.index = index
        self.seq_id = seq_id
        self.seed = seed
        self.slot = -1
        self.token_ids: list[int] = list(request.prompt)
        self.num_prompt = len(request.prompt)
        self.num_computed = 0
        self.num_in_flight = 0
        self.table = table
        self.status = SequenceStatus.WAITING if index == 0 else SequenceStatus.BLOCKED
        self.terms = terms
        self.first = FirstEvent()
        self.epoch = 0
        wanted = index == 0 and request.sampling.prompt_logprobs is not None
        self.prompt_logprobs: PromptLogprobs | None = PromptLogprobs() if wanted else None

    @property
    def pages(self) -> list[int]:
        """Its page ids, in the order of its tokens."""
        return self.table.pages

    @property
    def account(self) -> Account:
        """Its client's, which pays for its tokens."""
        return self.terms.account

    @property
    def arrival_s(self) -> float:
        """When it was submitted, on the scheduler's clock."""
        return self.terms.arrival_s

    @property
    def num_output(self) -> int:
        """Committed output tokens."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Known tokens that no step has computed."""
        return len(self.token_ids) - self.num_computed


def rank_of(sequence: Sequence) -> Rank:
    """Sort key of a client's sequences, and of those that run."""
    return sequence.terms.rank
