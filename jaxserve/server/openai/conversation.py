"""Messages of a request to the text the model reads.

A message is reduced to what chat templates expect (content a text, arguments of earlier tool calls objects) and the
model's template is rendered with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.core.errors import InvalidRequestError
from jaxserve.server.openai.schema import Message
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
    return template.render(
        [_template_message(message, i) for i, message in enumerate(messages)],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **kwargs,
    )


def content_text(message: Message) -> str:
    """A message's content as one text; parts stand on lines of their own."""
    if isinstance(message.content, list):
        return "\n".join(part.text for part in message.content)
    return message.content or ""


def _template_message(message: Message, index: int) -> dict[str, object]:
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        path = f"messages.{index}.content"
        raise InvalidRequestError(f"{path} is missing.", param=path)
    plain: dict[str, object] = {"role": message.role, "content": content_text(message)}
    optional = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content,
    }
    plain |= {name: value for name, value in optional.items() if value is not None}
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(
                        call.function.arguments, f"messages.{index}.tool_calls.{i}.function.arguments"
                    ),
                },
            }
            for i, call in enumerate(message.tool_calls)
        ]
    return plain


def _arguments(text: str, param: str) -> dict[str, object]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{param} is not JSON: {error}.", param=param) from error
    if not isinstance(arguments, dict):
        raise InvalidRequestError(f"{param} must be a JSON object written as a text.", param=param)
    return arguments
