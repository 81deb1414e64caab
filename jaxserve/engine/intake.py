"""Intake: whether a request can ever be served, the sequences it becomes, when to come back if the queue is full."""

from __future__ import annotations

import math
from collections import deque

from jaxserve.core.errors import ContextLengthError, InvalidRequestError, QueueFullError
from jaxserve.core.types import Request
from jaxserve.engine.policy import MAX_PRIORITY, SchedulerConfig
from jaxserve.engine.sequence import Sequence, Terms
from jaxserve.kv.manager import KVManager

SEED_MASK = (1 << 63) - 1
"""Seeds are taken modulo 2**63, negative ones too."""

MAX_RETRY_S = 30
"""Longest wait that is asked of a client."""


class Departures:
    """When the last sequences ended: how fast the queue moves."""

    def __init__(self) -> None:
        self._ended_s: deque[float] = deque(maxlen=64)

    def note(self, now_s: float) -> None:
        """A sequence has ended."""
        self._ended_s.append(now_s)

    def retry_after_s(self, num_waiting: int, now_s: float) -> int:
        """Seconds until those who wait now are likely to have had their turn, in [1, MAX_RETRY_S].

        While nothing is known, because nothing has ended yet, that is 1.
        """
        if not self._ended_s:
            return 1
        seconds_each = (now_s - self._ended_s[0]) / len(self._ended_s)
        return max(1, min(MAX_RETRY_S, math.ceil(num_waiting * seconds_each)))


def check_fits(request: Request, config: SchedulerConfig, kv: KVManager) -> None:
    """Refuses what no queue and no patience could serve.

    Raises:
        InvalidRequestError: The priority is out of range, or there are more sequences than slots and queue hold.
        ContextLengthError: Prompt and output exceed the context or the pool.
    """
    if abs(request.priority) > MAX_PRIORITY:
        raise InvalidRequestError(f"priority must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}].", param="priority")
    if request.n > config.capacity:
        raise InvalidRequestError(
            f"n={request.n} sequences are more than the {config.capacity} there can be at once ({config.max_num_seqs} "
            f"that run, {config.max_waiting} that wait); ask for fewer, or start the server with more --max-waiting.",
            param="n",
        )
    num_prompt, asked = len(request.prompt), request.sampling.max_tokens
    room = min(config.max_model_len, kv.capacity_tokens)
    if num_prompt >= room:
        raise ContextLengthError(
            f"The prompt's {num_prompt} tokens leave no room for output in the context of {room} tokens; shorten it.",
            param="prompt",
        )
    if asked is not None and num_prompt + asked > room:
        raise ContextLengthError(
            f"The prompt's {num_prompt} tokens and max_tokens={asked} exceed the context of {room} tokens; shorten the "
            "prompt or lower max_tokens.",
            param="max_tokens",
        )


def check_room(num_new: int, num_here: int, config: SchedulerConfig, *, retry_after_s: int) -> None:
    """Refuses what must come back later. Those for whom a slot is free need no place in the queue.

    Args:
        num_new: Sequences that want to be let in.
        num_here: Sequences that have not ended, running or waiting.
        config: Limits.
        retry_after_s: When to come back.

    Raises:
        QueueFullError: They would be more than the slots and the queue hold.
    """
    if num_here + num_new > config.capacity:
        raise QueueFullError(
            f"Beside the {num_here} sequences here there is no room for {num_new} more ({config.max_num_seqs} run, "
            f"{config.max_waiting} wait at most); try again later.",
            retry_after_s=retry_after_s,
            capacity=config.capacity,
        )


def new_sequences(
    request: Request,
    config: SchedulerConfig,
    kv: KVManager,
    *,
    eos: frozenset[int],
    seed: int,
    arrival_s: float,
    first_id: int,
) -> list[Sequence]:
    """The n sequences of a request.

    Args:
        request: Has passed `check_fits`.
        config: Limits.
        kv: Makes their page tables.
        eos: Tokens that end a sequence unless it ignores them.
        seed: Of the first sequence; the i-th gets seed + i.
        arrival_s: Now, on the scheduler's clock.
        first_id: Id of the first sequence.
    """
    sampling, num_prompt = request.sampling, len(request.prompt)
    room = min(config.max_model_len, kv.capacity_tokens)
    rank = arrival_s + request.priority * config.aging_s
    stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos)
    return [
        Sequence(
            request,
            index,
            seq_id=first_id + index,
            seed=(seed + index) & SEED_MASK,
            table=kv.new_table(request.cache_salt),
            terms=Terms(
                rank=(rank, first_id + index),
                arrival_s=arrival_s,
                max_len=min(room, num_prompt + (sampling.max_tokens or room)),
                min_len=num_prompt + sampling.min_tokens,
                stop_ids=stop_ids,
            ),
        )
        for index in range(request.n)
    ]
