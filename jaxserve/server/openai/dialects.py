"""Where chat and text completions differ in their answers; everything else is shared."""

from __future__ import annotations

from typing import Any, Protocol

from jaxserve.server.openai.logprobs import ChatLogprobWriter, CompletionLogprobWriter, LogprobWriter
from jaxserve.text.tokenizer import Tokenizer


class Dialect(Protocol):
    """The names one endpoint uses in its answers."""

    @property
    def id_prefix(self) -> str:
        """How ids of answers begin."""
        ...

    @property
    def answer_object(self) -> str:
        """The `object` of a whole answer."""
        ...

    @property
    def chunk_object(self) -> str:
        """The `object` of a stream's chunks."""
        ...

    @property
    def prompt_at_top(self) -> bool:
        """Whether facts about the prompt also stand beside the choices, as vLLM has it for chat."""
        ...

    @property
    def opening(self) -> dict[str, Any] | None:
        """The payload of a choice's first chunk, before any text; None if there is no such chunk."""
        ...

    @property
    def ending(self) -> dict[str, Any]:
        """The payload of a choice's last chunk, which has the finish reason and no text."""
        ...

    def piece(self, text: str) -> dict[str, Any]:
        """The payload of a chunk that has some text."""
        ...

    def whole(self, text: str) -> dict[str, Any]:
        """The payload of a choice of a whole answer."""
        ...

    def logprob_writer(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, offset: int = 0) -> LogprobWriter:
        """Writes a choice's log-probabilities, from an offset in its text on."""
        ...


class ChatDialect:
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl-"
    answer_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prompt_at_top = True

    @property
    def opening(self) -> dict[str, Any] | None:
        """The chunk that names the role."""
        return {"delta": {"role": "assistant", "content": ""}}

    @property
    def ending(self) -> dict[str, Any]:
        """See `Dialect.ending`."""
        return {"delta": {}}

    def piece(self, text: str) -> dict[str, Any]:
        """See `Dialect.piece`."""
        return {"delta": {"content": text}}

    def whole(self, text: str) -> dict[str, Any]:
        """See `Dialect.whole`."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprob_writer(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, offset: int = 0) -> LogprobWriter:
        """See `Dialect.logprob_writer`."""
        return ChatLogprobWriter(tokenizer)


class CompletionDialect:
    """`/v1/completions`."""

    id_prefix = "cmpl-"
    answer_object = "text_completion"
    chunk_object = "text_completion"
    prompt_at_top = False

    @property
    def opening(self) -> dict[str, Any] | None:
        """Text needs no opening."""
        return None

    @property
    def ending(self) -> dict[str, Any]:
        """See `Dialect.ending`."""
        return {"text": ""}

    def piece(self, text: str) -> dict[str, Any]:
        """See `Dialect.piece`."""
        return {"text": text}

    def whole(self, text: str) -> dict[str, Any]:
        """See `Dialect.whole`."""
        return {"text": text}

    def logprob_writer(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, offset: int = 0) -> LogprobWriter:
        """See `Dialect.logprob_writer`."""
        return CompletionLogprobWriter(tokenizer, skip_special_tokens=skip_special_tokens, offset=offset)
