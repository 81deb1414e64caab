"""Chat messages to the one text a model reads, by the model's own Jinja template.

A `ChatTemplate` is compiled once and rendered for each request. Messages are copied into plain JSON values first, so
a template sees no Python object and can change nothing. Semantics are those of `apply_chat_template` in transformers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import jinja2

from jaxserve.core.errors import InvalidRequestError
from jaxserve.text.sandbox import ChatEnvironment

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
# Ends in a space so that it shows whether the template strips the end of a message.
_CONTINUE_TAG = "<<<THE-FINAL-MESSAGE-CONTINUES-HERE>>> "


class ChatTemplate:
    """A model's chat template, compiled.

    Args:
        source: The template.
        special_tokens: Text of special tokens by role, which the template may read.
        tool_source: Another template for requests with tools, if the model has one ("tool_use").
        timeout_s: Longest a rendering may take, in seconds.

    Raises:
        InvalidRequestError: A template is not valid Jinja.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        tool_source: str | None = None,
        timeout_s: float = 5.0,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._lock = threading.Lock()
        self._environment = ChatEnvironment(timeout_s=timeout_s)
        self._template = self._compile(source)
        self._tool_template = self._template if tool_source is None else self._compile(tool_source)

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
            InvalidRequestError: The template refuses the messages or fails on them.
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
        final_text = _open_final_message(chat) if continue_final_message else ""
        variables = {
            **self._special_tokens,
            **{name: _plain(value, "chat_template_kwargs") for name, value in kwargs.items()},
            "messages": chat,
            "tools": None if tools is None else _plain(tools, "tools"),
            "documents": None if documents is None else _plain(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._render(self._template if tools is None else self._tool_template, variables)
        return _cut_at_tag(text, final_text) if continue_final_message else text

    def _compile(self, source: str) -> jinja2.Template:
        try:
            return self._environment.compile_chat(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InvalidRequestError(f"The chat template is not valid Jinja: {_sentence(error)}") from error

    def _render(self, template: jinja2.Template, variables: Mapping[str, object]) -> str:
        with self._lock:
            try:
                return self._environment.render_chat(template, variables)
            except jinja2.exceptions.SecurityError as error:
                raise InvalidRequestError(
                    f"The chat template does something it may not do: {_sentence(error)}", param="messages"
                ) from error
            except Exception as error:  # A template is code: it can raise whatever Python raises.
                raise InvalidRequestError(
                    f"The chat template cannot render these messages: {_sentence(error)}", param="messages"
                ) from error


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _plain_message(message: object, index: int) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"messages[{index}] must be an object with role and content.", param="messages")
    # OpenAI's clients send null for what a message lacks; templates test for a missing key.
    return {str(key): _plain(value, "messages") for key, value in message.items() if value is not None}


def _plain(value: object, param: str) -> object:
    """A copy of a value in JSON's own types, so that templates see no methods but those of str, list and dict."""
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            return {str(key): _plain(item, param) for key, item in value.items()}
        case Sequence() if not isinstance(value, (bytes, bytearray)):
            return [_plain(item, param) for item in value]
        case _:
            raise InvalidRequestError(
                f"{param} holds a {type(value).__name__}, which is not a JSON value.", param=param
            )


def _with_reasoning(message: dict[str, object]) -> dict[str, object]:
    """Reasoning under every name templates read it by, as transformers does."""
    reasoning = next((message[key] for key in _REASONING_KEYS if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _open_final_message(chat: list[dict[str, object]]) -> str:
    """Puts the tag behind the last message's text and returns that text."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_TAG
        return content
    if isinstance(content, list):
        for part in reversed(content):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text = part["text"]
                part["text"] = text + _CONTINUE_TAG
                return str(text)
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
