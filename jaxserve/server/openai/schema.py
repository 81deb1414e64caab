"""Request bodies as strict types: what is applied, with its type and range.

`decode.BodyDecoder` reads a body into these types field by field, without any coercion. Fields they do not declare are
judged by `parameters.refuse_unsupported`: known ones that are not built are refused unless they ask for nothing,
unknown ones are refused. Everywhere `null` means the default. `openapi.document` describes the API from the same types.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

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
"""Longest stop string and bad word; each is prepared once a request, character by character."""

MAX_MESSAGES = 16_384
"""Most messages of a conversation, and most parts and tool calls of all its messages; each takes time even if empty."""

MAX_NAME_CHARS = 512
"""Longest name of an end user, and longest prompt_cache_key."""

MAX_SALT_CHARS = 1024
"""Longest cache salt."""

MAX_METADATA = 16
"""Most entries of metadata; OpenAI's bound."""

MAX_METADATA_CHARS = 512
"""Longest text of a metadata entry; OpenAI's bound."""

MAX_INTEGER = 2**63 - 1
"""Largest integer of a field for which nothing else is said."""

Prompt = str | tuple[int, ...]
"""One prompt, as text or as token ids."""

Prompts = tuple[Prompt, ...]
"""What any of the four forms of a prompt becomes: a text, texts, token ids, lists of token ids."""

TokenId = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
TokenIds = tuple[TokenId, ...]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Penalty = Annotated[float, Meta(ge=-MAX_PENALTY, le=MAX_PENALTY)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
LogitBias = dict[str, Annotated[float, Meta(ge=-MAX_BIAS_VALUE, le=MAX_BIAS_VALUE)]]
Metadata = dict[str, Annotated[str, Meta(max_length=MAX_METADATA_CHARS)]]
FreeForm = dict[str, Any]
"""An object whose values are the chat template's, not ours."""


class Strict(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object within a body; fields it does not declare are refused unless they are null."""


class Body(Struct, frozen=True, kw_only=True):
    """A request body; `BodyDecoder` judges the fields it does not declare."""


class StreamOptions(Strict, frozen=True, kw_only=True):
    """OpenAI's `stream_options`, with vLLM's `continuous_usage_stats`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(Body, frozen=True, kw_only=True):
    """What chat and text completions have in common."""

    model: str
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_INTEGER)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_INTEGER)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_INTEGER)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=MAX_INTEGER)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INTEGER)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_INTEGER)] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[StopString], Meta(max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: NumLogprobs | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=MAX_INTEGER)] | None = None
    priority: Annotated[int, Meta(ge=-MAX_INTEGER, le=MAX_INTEGER)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    prompt_cache_key: Name | None = None
    metadata: Metadata | None = None
    return_token_ids: bool | None = None


class Part(Strict, frozen=True, kw_only=True):
    """A part of a message's content: text, or a refusal of an earlier answer; other kinds are refused.

    `cache_control` and `annotations` stand in histories of other engines; they mean nothing to a chat template.
    """

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    cache_control: Any = None
    annotations: list[Any] | None = None


class FunctionCall(Strict, frozen=True, kw_only=True):
    """A call an assistant message of the history made; arguments are an object, or text as a model wrote it."""

    name: str
    arguments: str | FreeForm | None = None


class ToolCall(Strict, frozen=True, kw_only=True):
    """A tool call of the history, for the chat template; `index` is left over from a stream."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None
    cache_control: Any = None


class Message(Strict, frozen=True, kw_only=True):
    """One message of a conversation; what it holds goes to the chat template.

    `type` is what lm-eval adds to each message; it says nothing else than that the message is text. `refusal` is the
    content of an answer that has none. The fields that may only be null, and `annotations`, stand in messages of
    earlier answers that clients send back.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    cache_control: Any = None
    audio: None = None
    function_call: None = None
    type: Literal["text"] | None = None


Messages = tuple[Message, ...]


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: FreeForm | None = None


class CompletionBody(GenerationBody, frozen=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: Prompts
    logprobs: NumLogprobs | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_INTEGER)] | None = None


class TokenizeBody(Body, frozen=True, kw_only=True):
    """`POST /tokenize`: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: FreeForm | None = None


class DetokenizeBody(Body, frozen=True, kw_only=True):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds
