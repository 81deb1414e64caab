"""What a committed step means for one sequence, as the events the API yields."""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.core.types import FinishReason, TokenEvent
from jaxserve.engine.logprobs import LogprobTable
from jaxserve.engine.sequence import Sequence
from jaxserve.engine.steps import ScheduledSequence, StepResult


def token_event(
    sequence: Sequence,
    result: StepResult,
    index: int,
    reason: FinishReason | None,
    clock: Callable[[], float],
) -> TokenEvent:
    """The event of a sequence's newest token, which has just been appended.

    Args:
        sequence: The sequence.
        result: The step's result.
        index: The sequence's row in it.
        reason: Why the sequence ends with this token, if it does.
        clock: Seconds, on the scheduler's clock.
    """
    request = sequence.request
    token_id = sequence.token_ids[-1]
    num_top = request.sampling.logprobs
    logprobs = None
    if num_top is not None:
        assert result.logprobs is not None, "the step was asked for log-probabilities"
        logprobs = (result.logprobs.row(index, num_top),)
    stop_token_id = token_id if reason is FinishReason.STOP else None
    first = sequence.first
    if first.sent:
        return TokenEvent(
            request_id=request.request_id,
            index=sequence.index,
            token_ids=(token_id,),
            logprobs=logprobs,
            finish_reason=reason,
            stop_token_id=stop_token_id,
        )
    first.sent = True
    prompt, sequence.prompt_logprobs = sequence.prompt_logprobs, None
    return TokenEvent(
        request_id=request.request_id,
        index=sequence.index,
        token_ids=(token_id,),
        logprobs=logprobs,
        prompt_logprobs=prompt,
        num_cached_tokens=max(first.num_cached_tokens, 0),
        finish_reason=reason,
        stop_token_id=stop_token_id,
        queue_s=first.started_s - sequence.arrival_s,
        prefill_s=clock() - first.started_s,
    )


def collect_prompt_logprobs(
    sequence: Sequence, item: ScheduledSequence, table: LogprobTable | None, first_row: int
) -> None:
    """Keeps what a chunk says of the prompt tokens after each of its positions.

    Args:
        sequence: A sequence that wants prompt log-probabilities.
        item: Its chunk.
        table: A row a token of the step.
        first_row: The chunk's first row.
    """
    collected, num_top = sequence.prompt_logprobs, sequence.request.sampling.prompt_logprobs
    assert collected is not None
    assert num_top is not None
    # The prompt's last position predicts output.
    count = min(item.num_tokens, sequence.num_prompt - 1 - item.start)
    if count <= 0:
        return
    assert table is not None, "the step was asked for prompt log-probabilities"
    collected.add(table.copy_of(first_row, first_row + count, num_top))
