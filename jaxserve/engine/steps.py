"""What a scheduler asks a device to do, and what comes back: plain host data.

A `ScheduledStep` lists sequences with one token first (decodes, and chunks of one token, which are the same to the
device), then longer chunks. A `StepResult` is aligned with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxserve.engine.logprobs import LogprobTable
from jaxserve.engine.policy import SchedulerConfig, trimmed_tokens
from jaxserve.engine.sequence import Sequence


class ScheduledSequence(NamedTuple):
    """A sequence's part in a step.

    Attributes:
        sequence: The sequence.
        epoch: The sequence's epoch when the step was made; the result is void if it has changed since.
        slot: Its row of the device's per-sequence state.
        start: Position of the first token computed.
        num_tokens: Tokens computed.
        samples: Whether the last of them yields a new token.
        page: The page of the last token computed: the only one that can be new since the sequence was admitted.
        page_index: Its place in the sequence's table.
    """

    sequence: Sequence
    epoch: int
    slot: int
    start: int
    num_tokens: int
    samples: bool
    page: int
    page_index: int

    @property
    def scores_prompt(self) -> bool:
        """Whether somebody wants to know how likely prompt tokens after this chunk's positions were."""
        sequence = self.sequence
        return sequence.prompt_logprobs is not None and self.start + 1 < sequence.num_prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledStep:
    """One launch of the model.

    Attributes:
        step_id: Counts up.
        items: Sequences with one token first, then longer chunks.
        num_decodes: How many of the items have one token.
        num_tokens: Tokens of all items.
        admitted: Sequences that got their slot in this step; the device loads their state first.
        scheduled_s: When it was made, on the scheduler's clock.
        page_copies: (source, destination) pages to copy before the step.
    """

    step_id: int
    items: tuple[ScheduledSequence, ...]
    num_decodes: int
    num_tokens: int
    admitted: tuple[Sequence, ...]
    scheduled_s: float
    page_copies: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step yielded.

    Attributes:
        token_ids: A token an item, in the items' order (0 where none was sampled); padding may follow.
        logprobs: A row an item, if any item asked.
        prompt: A row a token of the step: how likely the prompt's next token was; if any item asked.
    """

    token_ids: list[int]
    logprobs: LogprobTable | None = None
    prompt: LogprobTable | None = None


class Plan:
    """A step that is being filled.

    Attributes:
        budget: Tokens there is room for.
        chunks: Sequence, position of the first token, number of tokens.
        admitted: Sequences that get their slot in this step.
        copies: seq_id to the (source, destination) pages that its chunk wants copied first, where there are any.
        num_tokens: Tokens of all chunks.
        num_single: Chunks of one token.
    """

    __slots__ = ("admitted", "budget", "chunks", "copies", "num_single", "num_tokens")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: list[tuple[Sequence, int, int]] = []
        self.admitted: list[Sequence] = []
        self.copies: dict[int, tuple[tuple[int, int], ...]] = {}
        self.num_tokens = 0
        self.num_single = 0

    def add(self, sequence: Sequence, start: int, num_tokens: int, copies: tuple[tuple[int, int], ...]) -> None:
        """Gives a sequence part of the budget."""
        self.chunks.append((sequence, start, num_tokens))
        self.budget -= num_tokens
        self.num_tokens += num_tokens
        self.num_single += num_tokens == 1
        if copies:
            self.copies[sequence.seq_id] = copies

    def drop(self, sequence: Sequence) -> None:
        """Takes a sequence out again if it is in, for it has lost its pages."""
        for index, (planned, _, num_tokens) in enumerate(self.chunks):
            if planned is sequence:
                del self.chunks[index]
                self.budget += num_tokens
                self.num_tokens -= num_tokens
                self.num_single -= num_tokens == 1
                self.copies.pop(sequence.seq_id, None)
                return

    def trim(self, config: SchedulerConfig) -> None:
        """Cuts the last chunk at a bucket's edge where padding would be the larger part of the work."""
        sequence, start, num_tokens = self.chunks[-1]
        if num_tokens == 1:
            return
        kept = trimmed_tokens(
            self.num_tokens,
            self.num_single,
            buckets=config.token_buckets,
            overhead=config.step_overhead_tokens,
            continues=start + num_tokens < len(sequence.token_ids),
        )
        cut = self.num_tokens - kept
        if 0 < cut < num_tokens:
            self.chunks[-1] = (sequence, start, num_tokens - cut)
            self.num_tokens -= cut
