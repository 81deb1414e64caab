"""A device made of dictionaries: it remembers which token stands where, and proves that sequences read their own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from jaxserve.core.types import TokenLogprobs
from jaxserve.engine.logprobs import LogprobTable
from jaxserve.engine.steps import ScheduledStep, StepResult

VOCAB_SIZE = 50
EOS = 7


def next_token(history: Sequence[int], seed: int) -> int:
    """A token that depends on everything before it."""
    digest = hashlib.blake2b(repr((tuple(history), seed)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % VOCAB_SIZE


def score(history: Sequence[int]) -> float:
    """How likely the last of some tokens is after the others; tells histories apart."""
    digest = hashlib.blake2b(repr(list(history)).encode(), digest_size=2).digest()
    return -float(int.from_bytes(digest, "big"))


def prompt_scores(prompt: Sequence[int], num_top: int) -> tuple[TokenLogprobs | None, ...]:
    """What a request that asks for it is told of its prompt."""
    told: list[TokenLogprobs | None] = [None]
    for end in range(2, len(prompt) + 1):
        token, value = prompt[end - 1], score(prompt[:end])
        told.append(TokenLogprobs(token_id=token, logprob=value, rank=1, top=((token, value),)[:num_top]))
    return tuple(told)


class PageDevice:
    """Executes steps in the order they are dispatched, as the real device does.

    Args:
        page_size: Tokens a page holds.
        num_slots: Rows of per-sequence state.
    """

    def __init__(self, page_size: int, num_slots: int) -> None:
        self.page_size = page_size
        self.pages: dict[tuple[int, int], int] = {}
        self.history: list[dict[int, int]] = [{} for _ in range(num_slots)]
        self.tables: list[list[int]] = [[] for _ in range(num_slots)]
        self.num_computed = 0

    def execute(self, step: ScheduledStep) -> StepResult:
        """Loads admitted slots, copies pages, writes each token's KV, then reads every context back."""
        for sequence in step.admitted:
            self.history[sequence.slot] = dict(enumerate(sequence.token_ids))
            self.tables[sequence.slot] = list(sequence.pages)
        before = dict(self.pages)
        for source, target in step.page_copies:
            for offset in range(self.page_size):
                self.pages.pop((target, offset), None)
                if (source, offset) in before:
                    self.pages[target, offset] = before[source, offset]
        slots = [item.slot for item in step.items]
        assert len(set(slots)) == len(slots), "a slot runs twice in a step"
        lengths = [item.num_tokens for item in step.items]
        assert all(length == 1 for length in lengths[: step.num_decodes])
        assert all(length > 1 for length in lengths[step.num_decodes :])
        assert sum(lengths) == step.num_tokens
        for item in step.items:
            table = self.tables[item.slot]
            table[item.page_index : item.page_index + 1] = [item.page]
            for position in range(item.start, item.start + item.num_tokens):
                self.pages[self._place(item.slot, position)] = self.history[item.slot][position]
        self.num_computed += step.num_tokens
        prompt = self._score(step) if any(item.scores_prompt for item in step.items) else None
        return StepResult(token_ids=[self._sample(step, index) for index in range(len(step.items))], prompt=prompt)

    def _score(self, step: ScheduledStep) -> LogprobTable:
        """A row for each token of the step: what follows it, and how likely that is."""
        ids, values = [], []
        for item in step.items:
            history = self.history[item.slot]
            for position in range(item.start, item.start + item.num_tokens):
                ids.append(history.get(position + 1, 0))
                values.append(score([history[i] for i in range(position + 1)] + ids[-1:]))
        token_ids, logprob = np.array(ids, np.int32), np.array(values, np.float32)
        return LogprobTable(
            token_ids=token_ids,
            logprob=logprob,
            rank=np.ones_like(token_ids),
            top_ids=token_ids[:, None],
            top_logprobs=logprob[:, None],
        )

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        return self.tables[slot][position // self.page_size], position % self.page_size

    def _sample(self, step: ScheduledStep, index: int) -> int:
        item = step.items[index]
        stop = item.start + item.num_tokens
        history = [self.history[item.slot][position] for position in range(stop)]
        read = [self.pages.get(self._place(item.slot, position)) for position in range(stop)]
        assert read == history, f"sequence {item.sequence.seq_id} reads another's pages"
        if not item.samples:
            return 0
        token = next_token(history, item.sequence.seed)
        self.history[item.slot][stop] = token
        return token
