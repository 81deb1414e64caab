"""What a chat template shows of a conversation, found out by rendering short ones with texts that can be found again.

Many templates drop what they do not know without a word: messages of the role developer, tool calls of the history,
further system messages. A model would then answer a conversation that nobody had. `fitted` gives such messages the
form that the template does show, or refuses them:

    developer          becomes system if the template drops or refuses developer and shows system
    a dropped role     is refused (developer, system, a second or later system, tool)
    tool_calls         are refused if their arguments are not shown (of the names, some templates show only the id)
    name               is refused if it is not shown and tells speakers of one role apart; alone it is decoration
    tools, documents   are refused if they are not shown

Where a template raises, its own reason is the best answer, so nothing is decided for it. What a template shows of the
reasoning of earlier turns, and of a text beside tool calls, is the model's own convention and left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxserve.core.errors import InvalidRequestError

Message = dict[str, object]
Render = Callable[[list[Message]], str | None]
"""Renders a conversation; None if the template raises."""

_SYSTEM, _SECOND, _DEVELOPER, _NAME = "qsystemq", "qsecondq", "qdeveloperq", "qnameq"
_ARGUMENT, _RESULT, _OFFER, _DOCUMENT = "qargumentq", "qresultq", "qofferq", "qdocumentq"
_USER_MARK = "quserq"
_USER: Message = {"role": "user", "content": _USER_MARK}
_ASSISTANT: Message = {"role": "assistant", "content": "qassistantq"}

PROBE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _OFFER,
            "description": "d",
            "parameters": {"type": "object", "properties": {"p": {"type": "string", "description": "d"}}},
        },
    }
]
"""A tool that shows if a template knows tools."""

PROBE_DOCUMENTS = [{"title": _DOCUMENT, "text": _DOCUMENT, "content": _DOCUMENT, "doc_id": 1}]
"""A document that shows if a template knows documents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateTraits:
    """What a template drops: True if it does so without a word, False if it shows it, None if it raises.

    Attributes:
        developer: Messages of the role developer.
        system: A system message at the start.
        second_system: One of two system messages at the start.
        late_system: A system message behind others.
        tool_calls: Tool calls of an assistant message.
        tool: Messages of the role tool.
        name: Names of those who speak.
        tools: Tools that may be called.
        documents: Documents to answer from.
        wants_text_arguments: It takes arguments of tool calls only as JSON text.
    """

    developer: bool | None = None
    system: bool | None = None
    second_system: bool | None = None
    late_system: bool | None = None
    tool_calls: bool | None = None
    tool: bool | None = None
    name: bool | None = None
    tools: bool | None = None
    documents: bool | None = None
    wants_text_arguments: bool = False


def probe(render: Render) -> TemplateTraits:
    """Finds out what a template drops.

    Args:
        render: Renders with it.
    """
    system: Message = {"role": "system", "content": _SYSTEM}
    second: Message = {"role": "system", "content": _SECOND}
    late = [_USER, _ASSISTANT, second, _USER]
    plain = render([_USER])
    tool_calls, tool, wants_text_arguments = _probe_tool_calls(render)
    return TemplateTraits(
        developer=_drops(render([{"role": "developer", "content": _DEVELOPER}, _USER]), _DEVELOPER),
        system=_drops(render([system, _USER]), _SYSTEM),
        second_system=_drops(render([system, second, _USER]), _SYSTEM, _SECOND),
        late_system=_worst(_drops(render(late), _SECOND), _drops(render([system, *late]), _SYSTEM, _SECOND)),
        tool_calls=tool_calls,
        tool=tool,
        name=_drops(render([{**_USER, "name": _NAME}]), _NAME),
        tools=_drops(plain, _OFFER),
        documents=_drops(plain, _DOCUMENT),
        wants_text_arguments=wants_text_arguments,
    )


def fitted(chat: Sequence[Message], traits: TemplateTraits) -> list[Message]:
    """A conversation in the form that the template shows.

    Args:
        chat: Its messages.
        traits: What the template drops.

    Raises:
        InvalidRequestError: The template would drop a message, or a part of it that changes what the model knows.
    """
    names: dict[object, object] = {}
    fit: list[Message] = []
    num_system = 0  # system messages at the start
    for i, message in enumerate(chat):
        role, name = message.get("role"), message.get("name")
        is_mapped = role == "developer" and traits.developer is not False and traits.system is False
        fit.append({**message, "role": "system"} if is_mapped else message)
        if what := _dropped_role(fit[-1].get("role"), i, num_system, traits):
            raise _dropped(f"messages.{i}.role", what.format(role=role))
        num_system += num_system == i and fit[-1].get("role") == "system"
        if traits.tool_calls and message.get("tool_calls"):
            raise _dropped(f"messages.{i}.tool_calls", "tool calls of earlier messages")
        if traits.name and name is not None and role != "tool" and names.setdefault(role, name) != name:
            raise _dropped(f"messages.{i}.name", "names", f", and more than one {role} speaks here")
    if traits.wants_text_arguments:
        return [_with_text_arguments(message) for message in fit]
    return fit


def require_shown(traits: TemplateTraits, *, tools: bool, documents: bool) -> None:
    """Refuses what a request brings beside its messages if the template drops it.

    Args:
        traits: What the template drops, found with tools or documents of the probe.
        tools: The request has tools.
        documents: It has documents.

    Raises:
        InvalidRequestError: The template drops them.
    """
    if tools and traits.tools:
        raise _dropped("tools", "tools")
    if documents and traits.documents:
        raise _dropped("documents", "documents")


def _dropped_role(role: object, index: int, num_system: int, traits: TemplateTraits) -> str | None:
    """What the template drops if it drops a message of this role behind `num_system` that begin the conversation."""
    match role:
        case "tool" if traits.tool:
            return "messages of the role tool"
        case "developer" if traits.developer and traits.system is not False:
            return "messages of the role developer"
        case "system" if index == 0:
            return "messages of the role {role}" if traits.system else None
        case "system" if index == num_system:
            return "all but one message of the role {role}" if traits.second_system else None
        case "system" if traits.late_system:
            return "messages of the role {role} behind others"
    return None


def _dropped(param: str, what: str, why: str = "") -> InvalidRequestError:
    return InvalidRequestError(
        f"{param}: the model's chat template drops {what}{why}, so the model would not see them; leave them out, or "
        "write them into the content of another message.",
        param=param,
    )


def _drops(text: str | None, *marks: str) -> bool | None:
    """Whether a text lacks a mark; None if there is no text, or not even the user's. Templates may change the case."""
    if text is None or _USER_MARK not in text.lower():
        return None
    return not all(mark in text.lower() for mark in marks)


def _worst(*found: bool | None) -> bool | None:
    return max((each for each in found if each is not None), default=None)


def _probe_tool_calls(render: Render) -> tuple[bool | None, bool | None, bool]:
    """Whether tool calls and tool messages are dropped, and whether only text will do for arguments."""
    for wants_text in (False, True):
        caller = _caller("", wants_text=wants_text)
        result: Message = {"role": "tool", "tool_call_id": "qcallq123", "content": _RESULT}
        for rest in ([result, _ASSISTANT, _USER], [result], [_ASSISTANT, _USER], [_USER]):
            text = render([_USER, caller, *rest])
            if text is not None:
                shown = _drops(text, _ARGUMENT)
                return shown, _drops(text, _RESULT) if result in rest else None, wants_text and shown is False
    return None, None, False


def _caller(content: str, *, wants_text: bool) -> Message:
    arguments = {"p": _ARGUMENT}
    function = {"name": _OFFER, "arguments": json.dumps(arguments) if wants_text else arguments}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "qcallq123", "type": "function", "function": function}],
    }


def _with_text_arguments(message: Message) -> Message:
    """The message with each call's arguments as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence):
        return message
    fit = []
    for call in calls:
        match call:
            case {"function": {"arguments": Mapping() as arguments, **function}, **others}:
                text = json.dumps(arguments, ensure_ascii=False)
                fit.append({**others, "function": {**function, "arguments": text}})
            case _:
                fit.append(call)
    return {**message, "tool_calls": fit}
