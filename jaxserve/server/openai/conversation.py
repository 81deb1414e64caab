"""Messages of a request to the text the model reads.

A message is reduced to what chat templates expect (content a text, arguments of earlier tool calls objects) and the
model's template is rendered with them. Histories come from many engines: what stands in them without a meaning for a
template is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from jaxserve.core.errors import InvalidRequestError
from jaxserve.server.openai.decode import MAX_FREE_VALUES
from jaxserve.server.openai.faults import check_depth
from jaxserve.server.openai.outline import outline
from jaxserve.server.openai.schema import Message, ToolCall
from jaxserve.text.chat import ChatTemplate

_FIELDS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


def render_conversation(
    template: ChatTemplate,
    messages: Sequence[Message],
    kwargs: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> str:
    """The text of a conversation.

    Args:
        template: The model's.
        messages: At least one.
        kwargs: Further variables for the template.
        add_generation_prompt: End with the opening of an assistant message.
        continue_final_message: Leave the last message open.

    Raises:
        InvalidRequestError: A message is incomplete, or the template refuses the messages.
    """
    if clash := sorted(set(_FIELDS) & kwargs.keys()):
        raise InvalidRequestError(
            f"chat_template_kwargs may not set {', '.join(clash)}; use the field of that name.",
            param="chat_template_kwargs",
        )
    arguments = _Arguments()
    return template.render(
        [_template_message(message, i, arguments) for i, message in enumerate(messages)],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **kwargs,
    )


def content_text(message: Message) -> str:
    """A message's content as one text; parts stand on lines of their own, and a refusal stands in for no content."""
    if isinstance(message.content, list):
        return "\n".join((part.text if part.type == "text" else part.refusal) or "" for part in message.content)
    return message.refusal or "" if message.content is None else message.content


class _Arguments:
    """Reads the arguments of a conversation's tool calls, with a bound on what they hold together."""

    def __init__(self) -> None:
        self._num_values = 0

    def read(self, arguments: str | dict[str, Any] | None, path: str) -> dict[str, Any] | str:
        """The arguments as an object; text that is none, such as one cut off, as it is."""
        if not arguments or isinstance(arguments, dict):
            return arguments or {}
        if not arguments.lstrip().startswith("{"):
            return arguments
        text = arguments.encode()
        shape = outline(text)
        check_depth(shape.depth, path)
        self._num_values += shape.num_values
        if self._num_values > MAX_FREE_VALUES:
            raise InvalidRequestError(
                f"{path}: the arguments of all tool calls hold more than {MAX_FREE_VALUES} values; send fewer.",
                param=path,
            )
        try:
            return msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.DecodeError:
            return arguments


def _template_message(message: Message, index: int, arguments: _Arguments) -> dict[str, object]:
    path = f"messages.{index}"
    if message.content is None and message.role != "assistant":
        raise InvalidRequestError(f"{path}.content is missing.", param=f"{path}.content")
    plain: dict[str, object] = {"role": message.role, "content": content_text(message)}
    optional = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning if message.reasoning_content is None else message.reasoning_content,
    }
    plain |= {name: value for name, value in optional.items() if value is not None}
    if message.tool_calls:
        plain["tool_calls"] = [
            _template_call(call, f"{path}.tool_calls.{i}", arguments) for i, call in enumerate(message.tool_calls)
        ]
    return plain


def _template_call(call: ToolCall, path: str, arguments: _Arguments) -> dict[str, object]:
    function = {
        "name": call.function.name,
        "arguments": arguments.read(call.function.arguments, f"{path}.function.arguments"),
    }
    plain: dict[str, object] = {"type": "function", "function": function}
    return plain if call.id is None else {"id": call.id, **plain}
