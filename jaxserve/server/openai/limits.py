"""Bounds on what multiplies: prompts, sequences, and what each of them costs again."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.core.errors import InvalidRequestError
from jaxserve.core.types import SamplingParams
from jaxserve.server.openai.config import MAX_ALLOWED_IDS, MAX_PROMPT_LOGPROBS, MAX_STOP_SEQUENCES, AppConfig
from jaxserve.server.openai.schema import CompletionBody, GenerationBody


def check_products(body: GenerationBody, config: AppConfig, *, num_prompts: int, num_sequences: int) -> None:
    """Refuses a request that asks for more sequences than it may, or for too much of each.

    Args:
        body: The request.
        config: Limits.
        num_prompts: Prompts it brings.
        num_sequences: Sequences a prompt, by `n` or `best_of`.

    Raises:
        InvalidRequestError: A number or a product passes its limit; `param` names what to lower.
    """
    best_of = body.best_of if isinstance(body, CompletionBody) else None
    param = "n" if best_of is None or best_of == (body.n or 1) else "best_of"
    if num_sequences > config.max_n:
        raise InvalidRequestError(f"{param} may be at most {config.max_n}.", param=param)
    if num_prompts > config.max_prompts:
        raise InvalidRequestError(f"prompt may hold at most {config.max_prompts} prompts.", param="prompt")
    total = num_prompts * num_sequences
    if total > config.max_sequences:
        raise InvalidRequestError(
            f"{num_prompts} prompts times {num_sequences} sequences are more than the {config.max_sequences} a "
            "request may ask for.",
            param=param,
        )
    num_stops = 1 if isinstance(body.stop, str) else len(body.stop or ())
    _check_product(num_stops, "stop strings", total, MAX_STOP_SEQUENCES, "stop")
    _check_product(len(body.allowed_token_ids or ()), "token ids", total, MAX_ALLOWED_IDS, "allowed_token_ids")


def check_prompt_logprobs(sampling: SamplingParams, prompts: Sequence[Sequence[int]]) -> None:
    """Refuses an answer with more log-probabilities of prompt tokens than may be gathered.

    Args:
        sampling: What each prompt is to be shown with.
        prompts: Token ids.

    Raises:
        InvalidRequestError: They are more than `MAX_PROMPT_LOGPROBS`.
    """
    if sampling.prompt_logprobs is not None:
        num_tokens = sum(len(prompt) for prompt in prompts)
        num_each = sampling.prompt_logprobs + 1
        _check_product(num_each, "log-probabilities a token", num_tokens, MAX_PROMPT_LOGPROBS, "prompt_logprobs")


def _check_product(number: int, what: str, times: int, most: int, param: str) -> None:
    if number * times > most:
        over = "prompt tokens" if param == "prompt_logprobs" else "sequences"
        raise InvalidRequestError(
            f"{param}: {number} {what} times {times} {over} are more than the {most} a request may ask for.",
            param=param,
        )
