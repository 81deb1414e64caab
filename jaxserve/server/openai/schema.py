"""Request bodies as strict models: what is applied, with its type and range.

A body is parsed from JSON by these models without any coercion. Fields they do not declare are kept aside and judged
by `parameters.refuse_unsupported`: known ones that are not built are refused unless they ask for nothing, unknown ones
are refused. Everywhere `null` means the default.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from jaxserve.core.types import MAX_LOGPROBS
from jaxserve.sampling.validate import (
    MAX_BAD_WORDS,
    MAX_BIAS_VALUE,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MIN_REPETITION_PENALTY,
)

MAX_TEMPERATURE = 2.0
"""OpenAI's bound."""

MAX_STOP_STRINGS = 64
"""Most stop strings of a request; each costs a comparison a token."""

MAX_STOP_CHARS = 1024
"""Longest stop string and bad word; each is prepared once a sequence, character by character."""

MAX_MESSAGES = 16_384
"""Most messages of a conversation, and most parts or tool calls of a message; each takes time even if it is empty."""

MAX_NAME_CHARS = 512
"""Longest name of an end user."""

MAX_SALT_CHARS = 1024
"""Longest cache salt."""

Prompt = str | tuple[int, ...]
"""One prompt, as text or as token ids."""

_PROMPT_FORMS: Final = (
    "must be a text, a list of texts, a list of token ids, or a list of lists of token ids, and not empty"
)


def _prompts(value: object) -> tuple[Prompt, ...]:
    """Any of the four forms a prompt may have, as a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return (tuple(value),)
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and item and all(type(i) is int for i in item) for item in value):
            return tuple(tuple(item) for item in value)
    raise PydanticCustomError("prompt_form", _PROMPT_FORMS)


Prompts = Annotated[tuple[Prompt, ...], PlainValidator(_prompts)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class Strict(BaseModel):
    """A body without coercion; NaN and infinity are no numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Body(Strict):
    """A request body; unsupported fields are kept for `refuse_unsupported` to judge."""

    model_config = ConfigDict(extra="allow")


class StreamOptions(Strict):
    """OpenAI's `stream_options`, with vLLM's `continuous_usage_stats`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationBody(Body):
    """What chat and text completions have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-MAX_BIAS_VALUE, le=MAX_BIAS_VALUE)]] | None = None
    user: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    bad_words: Annotated[list[StopString], Field(max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: NumLogprobs | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    priority: int | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    return_token_ids: bool | None = None


class TextPart(Strict):
    """A part of a message's content; other kinds than text are refused."""

    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    """A call an assistant message of the history made."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A tool call of the history, for the chat template."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Strict):
    """One message of a conversation; what it holds goes to the chat template.

    `type` is what lm-eval adds to each message; it says nothing else than that the message is text. The fields that may
    only be null stand in messages of earlier answers that clients send back.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_MESSAGES)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    type: Literal["text"] | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    safety_identifier: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Prompts
    logprobs: NumLogprobs | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None


class TokenizeBody(Body):
    """`POST /tokenize`: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds
