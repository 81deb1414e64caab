"""Whether what a body asks for fits: lengths against the context, and what multiplies as a product.

The engine knows a request only; these checks know the body, so that an error names the field that asked, or says that
it is a default.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.core.errors import ContextLengthError, InvalidRequestError
from jaxserve.core.types import SamplingParams
from jaxserve.server.openai.config import MAX_ALLOWED_IDS, MAX_PROMPT_LOGPROBS, MAX_STOP_SEQUENCES, AppConfig
from jaxserve.server.openai.schema import ChatBody, CompletionBody, GenerationBody

Prompts = Sequence[Sequence[int]]
"""Token ids of each of a body's prompts."""


def check_lengths(
    body: ChatBody | CompletionBody, sampling: SamplingParams, prompts: Prompts, max_model_len: int
) -> None:
    """Refuses what the context has no room for.

    Args:
        body: What was asked for.
        sampling: What it comes to.
        prompts: The prompts, as they will be sent to the engine.
        max_model_len: Most tokens of a prompt and its output.

    Raises:
        InvalidRequestError: At least as many tokens are asked for as there may be at most, and more.
        ContextLengthError: A prompt and its output are more than the context holds.
    """
    if sampling.max_tokens is None:
        return
    name, asked = "max_tokens", body.max_tokens
    if body.max_completion_tokens is not None:
        name, asked = "max_completion_tokens", body.max_completion_tokens
    told = f"{name}={asked}"
    if asked is None:
        told = f"the {sampling.max_tokens} tokens of output that there are where max_tokens is not given"
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequestError(f"min_tokens={sampling.min_tokens} is more than {told}.", param="min_tokens")
    longest = max(map(len, prompts))
    prompt = "messages" if isinstance(body, ChatBody) else "prompt"
    if longest >= max_model_len:
        raise ContextLengthError(
            f"{prompt}: {longest} tokens leave no room for output in the context of {max_model_len} tokens; shorten "
            "it.",
            param=prompt,
        )
    if longest + sampling.max_tokens > max_model_len:
        advice = f"give max_tokens of at most {max_model_len - longest}" if asked is None else f"lower {name}"
        raise ContextLengthError(
            f"{prompt}: {longest} tokens and {told} exceed the context of {max_model_len} tokens; shorten it, or "
            f"{advice}.",
            param=prompt if asked is None else name,
        )


def check_counts(body: GenerationBody, config: AppConfig, *, num_prompts: int, num_sequences: int) -> None:
    """Refuses more sequences than a request may have, and what is little for each sequence and too much for all.

    Args:
        body: What was asked for.
        config: Limits.
        num_prompts: Prompts it brings.
        num_sequences: Sequences a prompt, by `n` or `best_of`.

    Raises:
        InvalidRequestError: A number or a product passes its limit; `param` names what to lower.
    """
    param = "n" if num_sequences == (body.n or 1) else "best_of"
    if num_sequences > config.max_n:
        raise InvalidRequestError(f"{param} may be at most {config.max_n}.", param=param)
    if num_prompts > config.max_prompts:
        raise InvalidRequestError(f"prompt may hold at most {config.max_prompts} prompts.", param="prompt")
    total = num_prompts * num_sequences
    if total > config.max_sequences:
        raise InvalidRequestError(
            f"{num_prompts} prompts with {param}={num_sequences} are {total} sequences, more than the "
            f"{config.max_sequences} a request may ask for.",
            param=param,
        )
    num_stops = 1 if isinstance(body.stop, str) else len(body.stop or ())
    _check_product("stop", num_stops, "strings", total, MAX_STOP_SEQUENCES)
    _check_product("allowed_token_ids", len(body.allowed_token_ids or ()), "ids", total, MAX_ALLOWED_IDS)


def check_prompt_logprobs(body: ChatBody | CompletionBody, prompts: Prompts, num_sequences: int) -> None:
    """Refuses an answer with too many log-probabilities of prompt tokens.

    Args:
        body: What was asked for.
        prompts: The prompts.
        num_sequences: Of each prompt.

    Raises:
        InvalidRequestError: They are more than `MAX_PROMPT_LOGPROBS`.
    """
    echoed = body.logprobs if isinstance(body, CompletionBody) and body.echo else None
    asked = {"prompt_logprobs": body.prompt_logprobs, "logprobs": echoed}
    shown = {name: 1 + num_top for name, num_top in asked.items() if num_top is not None}
    num_tokens = sum(map(len, prompts)) * num_sequences
    if num_tokens * sum(shown.values()) > MAX_PROMPT_LOGPROBS:
        param = max(shown, key=lambda name: shown[name])
        raise InvalidRequestError(
            f"{param}: {num_tokens} prompt tokens with {sum(shown.values())} log-probabilities each are more than the "
            f"{MAX_PROMPT_LOGPROBS} of an answer; send fewer prompts a request, or ask for fewer alternatives.",
            param=param,
        )


def _check_product(param: str, number: int, what: str, num_sequences: int, most: int) -> None:
    if number * num_sequences > most:
        raise InvalidRequestError(
            f"{param}: {number} {what} for each of {num_sequences} sequences are more than the {most} of a request; "
            f"give fewer {what}, or ask for fewer sequences.",
            param=param,
        )
