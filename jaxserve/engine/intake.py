"""Intake: whether a request can ever be served, the sequences it becomes, when to come back if the queue is full."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from jaxserve.core.errors import ContextLengthError, InvalidRequestError, QueueFullError
from jaxserve.core.types import RANDOM_SEED, Request, SamplingParams
from jaxserve.engine.fairness import Account
from jaxserve.engine.policy import MAX_PRIORITY, QUEUE_SHARE, SchedulerConfig
from jaxserve.engine.sequence import Sequence, Terms
from jaxserve.kv.manager import KVManager

SEED_MASK = (1 << 64) - 1
"""Seeds are taken modulo 2**64: every signed and unsigned 64-bit seed has noise of its own."""

MAX_RETRY_S = 600
"""Longest wait that is asked of a client."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What is there when a request comes.

    Attributes:
        num_waiting: Sequences without a slot.
        num_running: Sequences with one.
        client_waiting: Of those without a slot, the client's; 0 for requests without a client, which have no share.
    """

    num_waiting: int
    num_running: int
    client_waiting: int


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


def check_room(
    num_new: int, load: Load, config: SchedulerConfig, *, seconds_until: Callable[[int], float], capacity: int
) -> None:
    """Refuses what must come back later. Those for whom a slot is free need no place in the queue.

    A client with nothing in the queue gets any place that is left. One that has something there gets no reserved place,
    and of the others it may have `QUEUE_SHARE` times as many as are left. So there is room for others, however many
    clients flood the queue.

    Args:
        num_new: Sequences that want to be let in.
        load: Who is here.
        config: Limits.
        seconds_until: Seconds until so many sequences have ended.
        capacity: Sequences of the client that fit when nobody else is here.

    Raises:
        QueueFullError: There are too few places, or the client would have more than its share of them.
    """
    num_here = load.num_waiting + load.num_running
    places = config.capacity - num_here
    shared = places - config.reserved_places
    num_queued = load.client_waiting + num_new - (config.max_num_seqs - load.num_running)
    if num_new > places:
        num_ends = num_new - places
        reason = (
            f"Beside the {num_here} sequences here there is no room for {num_new} more ({config.max_num_seqs} run, "
            f"{config.max_waiting} wait at most)"
        )
    elif load.client_waiting and num_queued > max(0, QUEUE_SHARE * shared):
        num_ends = math.ceil(num_queued / QUEUE_SHARE) - shared
        reason = (
            f"You have {load.client_waiting} sequences in the queue already, and it has {places} places left for all "
            "clients"
        )
    else:
        return
    retry_after_s = max(1, min(MAX_RETRY_S, math.ceil(seconds_until(num_ends))))
    raise QueueFullError(f"{reason}; try again later.", retry_after_s=retry_after_s, capacity=capacity)


def seed_of(sampling: SamplingParams, random: Random) -> int:
    """The seed that a request asks for, or one drawn for it; any integer."""
    return random.getrandbits(63) if sampling.seed in (None, RANDOM_SEED) else sampling.seed


def new_sequences(
    request: Request,
    config: SchedulerConfig,
    kv: KVManager,
    *,
    eos: frozenset[int],
    seed: int,
    arrival_s: float,
    first_id: int,
    account: Account,
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
        account: Its client's.
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
                account=account,
                rank=(rank, first_id + index),
                arrival_s=arrival_s,
                max_len=min(room, num_prompt + (sampling.max_tokens or room)),
                min_len=num_prompt + sampling.min_tokens,
                stop_ids=stop_ids,
            ),
        )
        for index in range(request.n)
    ]
