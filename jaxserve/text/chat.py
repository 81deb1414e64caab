"""Chat messages to the one text a model reads, by the model's own Jinja template.

A template is rendered by a process of a `TemplatePool`, to which messages go as JSON: it sees no Python object, can
change nothing, and is killed if it takes too long or too much. Semantics are those of `apply_chat_template` in
transformers, with one difference: what the template would drop without a word is mapped or refused
(`template_traits`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

from jaxserve.core.errors import InvalidRequestError
from jaxserve.text.plain_json import plain_json
from jaxserve.text.template_pool import Failure, TemplateFailedError, TemplatePool
from jaxserve.text.template_traits import (
    PROBE_DOCUMENTS,
    PROBE_TOOLS,
    TemplateTraits,
    fitted,
    probe,
    require_shown,
)
from jaxserve.text.template_worker import ENCODING

_LOG = logging.getLogger(__name__)
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
# Ends in a space so that it shows whether the template strips the end of a message.
_CONTINUE_TAG = "<<<THE-FINAL-MESSAGE-CONTINUES-HERE>>> "


class ChatTemplate:
    """A model's chat template. Threads may share it; `close` ends its processes, as does the end of this process.

    Args:
        source: The template.
        special_tokens: Text of special tokens by role, which the template may read.
        tool_source: Another template for requests with tools, if the model has one ("tool_use").
        timeout_s: Longest a rendering may take, in seconds.
        pool: Where it is rendered; by default a pool of its own, which it closes.
        refuse_dropped: Map or refuse what the template would drop; otherwise it is dropped, as transformers does.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        tool_source: str | None = None,
        timeout_s: float = 5.0,
        pool: TemplatePool | None = None,
        refuse_dropped: bool = True,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._tool_source = source if tool_source is None else tool_source
        self._timeout_s = timeout_s
        self._owns_pool = pool is None
        self._pool = pool or TemplatePool()
        self._refuse_dropped = refuse_dropped
        self._probing = threading.Lock()
        self._traits: dict[tuple[bool, bool], TemplateTraits] = {}

    def check(self) -> None:
        """Starts a process, compiles the template and finds out what it shows, so that the first chat need not wait.

        Raises:
            InvalidRequestError: The template is not valid.
            UnavailableError: No process can be started.
        """
        for source in dict.fromkeys((self.source, self._tool_source)):
            try:
                self._pool.compile(source, timeout_s=self._timeout_s)
            except TemplateFailedError as failure:
                raise InvalidRequestError(_not_valid(failure)) from failure
        self._traits_with(tools=False, documents=False)

    def close(self) -> None:
        """Ends the processes; nothing can be rendered any more. Idempotent."""
        if self._owns_pool:
            self._pool.close()

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        /,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: object,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: Objects with `role`, `content` and what else the template reads.
            tools: JSON schemas of tools the model may call.
            documents: Documents for templates with retrieval.
            add_generation_prompt: End with the beginning of an assistant message.
            continue_final_message: Leave the last message open, to be continued by the model.
            **kwargs: Further variables for the template; they win over special tokens.

        Raises:
            InvalidRequestError: The template is not valid, refuses the messages, fails on them, would drop a part of
                them, or takes too long or too much memory.
            UnavailableError: No process can be started, or all have been busy for long.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other; set one of them to false.",
                param="continue_final_message",
            )
        if clash := _RESERVED & kwargs.keys():
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {', '.join(sorted(clash))}; use the request field of that name.",
                param="chat_template_kwargs",
            )
        if not messages:
            raise InvalidRequestError("messages must have at least one message.", param="messages")
        chat = [_with_reasoning(_plain_message(message, i)) for i, message in enumerate(messages)]
        if self._refuse_dropped:
            traits = self._traits_with(tools=bool(tools), documents=bool(documents))
            require_shown(traits, tools=bool(tools), documents=bool(documents))
            chat = fitted(chat, traits)
        final_text = _open_final_message(chat) if continue_final_message else ""
        data = self._variables(chat, tools, documents, kwargs, add_generation_prompt=add_generation_prompt)
        text = self._render(self.source if tools is None else self._tool_source, data)
        return _cut_at_tag(text, final_text) if continue_final_message else text

    def _variables(
        self,
        chat: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None,
        documents: Sequence[Mapping[str, object]] | None,
        kwargs: Mapping[str, object],
        *,
        add_generation_prompt: bool,
    ) -> bytes:
        """JSON of what the template sees."""
        fields = {
            name: plain_json(value, name)
            for name, value in (("messages", chat), ("tools", tools), ("documents", documents))
        }
        others = {name: value for name, value in self._special_tokens.items() if name not in kwargs}
        members = {
            **{name: plain_json(value, "special_tokens") for name, value in others.items()},
            **{name: plain_json(value, "chat_template_kwargs") for name, value in kwargs.items()},
            **fields,
            "add_generation_prompt": plain_json(add_generation_prompt, "add_generation_prompt"),
        }
        pairs = ",".join(f"{plain_json(name, 'chat_template_kwargs')}:{value}" for name, value in members.items())
        return f"{{{pairs}}}".encode(*ENCODING)

    def _render(self, source: str, data: bytes) -> str:
        try:
            return self._pool.render(source, data, timeout_s=self._timeout_s)
        except TemplateFailedError as failure:
            raise _failed(failure) from failure

    def _traits_with(self, *, tools: bool, documents: bool) -> TemplateTraits:
        """What the template drops of conversations with or without tools and documents; found out once."""
        key = (tools, documents)
        if (known := self._traits.get(key)) is not None:
            return known
        with self._probing:
            if key not in self._traits:
                self._traits[key] = self._probe(
                    self._tool_source if tools else self.source,
                    PROBE_TOOLS if tools else None,
                    PROBE_DOCUMENTS if documents else None,
                )
            return self._traits[key]

    def _probe(
        self,
        source: str,
        tools: Sequence[Mapping[str, object]] | None,
        documents: Sequence[Mapping[str, object]] | None,
    ) -> TemplateTraits:
        def render(chat: list[dict[str, object]]) -> str | None:
            data = self._variables(chat, tools, documents, {}, add_generation_prompt=False)
            try:
                return self._pool.render(source, data, timeout_s=self._timeout_s)
            except TemplateFailedError as failure:
                if failure.kind in (Failure.INVALID, Failure.EXCEEDED):
                    raise
                return None

        try:
            return probe(render)
        except TemplateFailedError as failure:
            if failure.kind is Failure.INVALID:
                raise _failed(failure) from failure
            # A template that hangs on some conversations may do for others, and each attempt costs a process.
            _LOG.warning("what the chat template drops is not known: trying it out, %s", failure.reason)
            return TemplateTraits()


def _failed(failure: TemplateFailedError) -> InvalidRequestError:
    match failure.kind:
        case Failure.INVALID:
            what = "Use /v1/completions, or serve the model with another --chat-template."
            return InvalidRequestError(f"{_not_valid(failure)} {what}", param="messages")
        case Failure.FORBIDDEN:
            what = "The chat template does something it may not do"
        case Failure.EXCEEDED:
            what = "The chat template was stopped while it rendered these messages"
        case _:
            what = "The chat template cannot render these messages"
    return InvalidRequestError(f"{what}: {_sentence(failure.reason)}", param="messages")


def _not_valid(failure: TemplateFailedError) -> str:
    return f"The chat template is not valid Jinja: {_sentence(failure.reason)}"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _plain_message(message: object, index: int) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"messages[{index}] must be an object with role and content.", param="messages")
    # OpenAI's clients send null for what a message lacks; templates test for a missing key.
    return {str(key): value for key, value in message.items() if value is not None}


def _with_reasoning(message: dict[str, object]) -> dict[str, object]:
    """Reasoning under every name templates read it by, as transformers does."""
    reasoning = next((message[key] for key in _REASONING_KEYS if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _open_final_message(chat: list[dict[str, object]]) -> str:
    """Puts the tag behind the last message's text and returns that text."""
    last = chat[-1]
    match last.get("content"):
        case str(content):
            chat[-1] = {**last, "content": content + _CONTINUE_TAG}
            return content
        case [*parts]:
            for i, part in reversed(list(enumerate(parts))):
                match part:
                    case {"text": str(text), **others}:
                        opened = {**others, "text": text + _CONTINUE_TAG}
                        chat[-1] = {**last, "content": [*parts[:i], opened, *parts[i + 1 :]]}
                        return text
    raise InvalidRequestError(
        "continue_final_message needs a last message with text to continue.", param="continue_final_message"
    )


def _cut_at_tag(text: str, final_text: str) -> str:
    """The text up to the tag; if the template stripped the message's end, the end is stripped of white space."""
    position = text.rfind(_CONTINUE_TAG.strip())
    if position < 0 or final_text.strip() not in text:
        raise InvalidRequestError(
            "continue_final_message is set, but the chat template drops or changes the last message.",
            param="continue_final_message",
        )
    kept = text[:position]
    return kept if text.startswith(_CONTINUE_TAG, position) else kept.rstrip()
