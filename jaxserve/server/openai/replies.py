"""The shapes of answers, for the API's description; the answers themselves are written by `answer` and `choices`."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

FinishReason = Literal["stop", "length", "abort", "error"]


class Reply(Struct, kw_only=True, forbid_unknown_fields=True):
    """An object of an answer; fields that may be unset are there only if they were asked for."""


class ErrorDetail(Reply, kw_only=True):
    """What went wrong: a sentence that says what to do, and the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Reply, kw_only=True):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class PromptDetails(Reply, kw_only=True):
    """Prompt tokens found in the prefix cache."""

    cached_tokens: int


class Usage(Reply, kw_only=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Alternative(Reply, kw_only=True):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Alternative, kw_only=True):
    """A token of the answer and what could have stood there."""

    top_logprobs: list[Alternative]


class ChatLogprobs(Reply, kw_only=True):
    """Log-probabilities of a chat's tokens."""

    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(Reply, kw_only=True):
    """Log-probabilities of a text's tokens, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Reply, kw_only=True):
    """One token that could have stood in the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class Shown(Reply, kw_only=True):
    """What a choice shows if it was asked for."""

    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class AssistantMessage(Reply, kw_only=True):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Shown, kw_only=True):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class ChatAnswer(Reply, kw_only=True):
    """A whole answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Delta(Reply, kw_only=True):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Shown, kw_only=True):
    """What a chunk adds to an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType | None = UNSET


class ChatChunk(Reply, kw_only=True):
    """An event of a streamed chat; the last one is the text `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class TextChoice(Shown, kw_only=True):
    """One continuation of a prompt, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType | None = UNSET


class CompletionAnswer(Reply, kw_only=True):
    """A whole answer of `POST /v1/completions`, or an event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET


class TokenizeAnswer(Reply, kw_only=True):
    """Token ids of a prompt, and each one's text if it was asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(Reply, kw_only=True):
    """The text of token ids."""

    prompt: str


class TokenIdsAnswer(Reply, kw_only=True):
    """A prompt's token ids."""

    token_ids: list[int]


class Model(Struct, kw_only=True):
    """A name the model is served by."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class Models(Reply, kw_only=True):
    """Every name the model is served by."""

    object: Literal["list"]
    data: list[Model]


class Status(Reply, kw_only=True):
    """The server is well."""

    status: str


class Version(Reply, kw_only=True):
    """The server's version."""

    version: str
