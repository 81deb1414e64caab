"""JSON to the types of `schema`, stopping at the first fault, with bounds on what one call may build.

A body is split into its fields first, which builds nothing of what they hold, and each field is decoded by itself: by
its type after a count of its values, or in pieces where it may be long (messages one by one, token ids some thousand at
a time), so that other threads get Python's lock in between. Errors name the field by its path (`messages.0.content`).
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Final, Generic, TypeVar

import msgspec
from msgspec import Raw

from jaxserve.core.errors import InvalidRequestError
from jaxserve.sampling.validate import MAX_BIAS_IDS
from jaxserve.server.openai.faults import (
    WrongTypeError,
    check_depth,
    check_values,
    has_unknown_field,
    invalid,
    reason_of,
    shown,
    too_many,
)
from jaxserve.server.openai.outline import MAX_DEPTH, outline
from jaxserve.server.openai.schema import (
    MAX_MESSAGES,
    MAX_METADATA,
    Body,
    FreeForm,
    LogitBias,
    Message,
    Messages,
    Metadata,
    Part,
    Prompts,
    TokenId,
    TokenIds,
)

MAX_FIELDS = 256
"""Most fields of a body."""

MAX_FIELD_VALUES = 1024
"""Most values in a field for which nothing else is said."""

MAX_MESSAGES_VALUES = 1 << 18
"""Most values in all messages together."""

MAX_FREE_VALUES = 1 << 16
"""Most values of objects that go to the chat template as they are, such as chat_template_kwargs."""

MAX_LISTED_PROMPTS = 1 << 16
"""Most prompts in a list, however many the server is told to serve."""

Decode = Callable[[bytes, str], Any]
"""Decodes the JSON of one field, given its path."""

B = TypeVar("B", bound=Body)

_SMALL_BYTES = 4096
_PIECE_BYTES = 1 << 16
_PROMPT_FORMS: Final = (
    "must be a text, a list of texts, a list of token ids, or a list of lists of token ids, and not empty"
)
_OPENING = re.compile(rb"\[\s*(.?)", re.DOTALL)
_FREE_FORM = frozenset({"arguments", "cache_control"})


class BodyDecoder(Generic[B]):
    """Reads the bodies of one endpoint.

    Args:
        model: What the endpoint takes.
        judge: Told of each field the model does not declare, with its JSON; raises if it may not stand there.
    """

    def __init__(self, model: type[B], judge: Callable[[str, bytes], None]) -> None:
        self._model = model
        self._judge = judge
        self._split = msgspec.json.Decoder(dict[str, Raw])
        fields = msgspec.structs.fields(model)
        self._required = [field.name for field in fields if field.required]
        self._decoders = {field.name: decoder_of(field.type) for field in fields}

    def decode(self, data: bytes) -> B:
        """The body.

        Args:
            data: JSON text in UTF-8.

        Raises:
            InvalidRequestError: It is not JSON, does not fit the model, or is more than may be decoded.
        """
        values: dict[str, Any] = {}
        for name, raw in self._fields(data).items():
            field = bytes(raw)
            if field == b"null":
                continue
            decode = self._decoders.get(name)
            if decode is None:
                self._judge(name, field)
            else:
                values[name] = decode(field, name)
        for name in self._required:
            if name not in values:
                raise InvalidRequestError(f"{name} is missing.", param=name)
        return self._model(**values)

    def _fields(self, data: bytes) -> dict[str, Raw]:
        shape = None
        if len(data) > _SMALL_BYTES or data.count(b"[") + data.count(b"{") > MAX_DEPTH:
            shape = outline(data)
            check_depth(shape.depth, "body")
            if shape.num_fields > MAX_FIELDS:
                raise InvalidRequestError(f"The body has more than {MAX_FIELDS} fields; send fewer.", param="body")
        try:
            fields = self._split.decode(data)
        except msgspec.ValidationError as error:
            raise InvalidRequestError("The body must be a JSON object.", param="body") from error
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequestError(f"The body cannot be read as JSON: {reason_of(error)}.", param="body") from error
        # Written without spaces, each field takes its name, two quotes, a colon, its value and a comma or brace.
        if 1 + sum(len(name.encode()) + memoryview(raw).nbytes + 4 for name, raw in fields.items()) < len(data):
            shape = shape or outline(data)
            if shape.num_fields != len(fields):
                raise InvalidRequestError("The body has a field twice; send each once.", param="body")
        return fields


def decoder_of(kind: Any) -> Decode:  # noqa: ANN401 - a type, of which Python has no common class
    """What decodes a field of a body's model.

    Args:
        kind: The field's type; None within it is left out, since `null` never comes here.
    """
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        rest = [each for each in typing.get_args(kind) if each is not types.NoneType]
        kind = typing.Union[tuple(rest)]  # noqa: UP007 - made of types that are known only here
    if kind == Messages:
        return _Messages()
    if kind == Prompts:
        return _Prompts()
    if kind == TokenIds:
        return _TokenIds(TokenId)
    if kind == LogitBias:
        return _Entries(typing.get_args(LogitBias)[1], MAX_BIAS_IDS)
    if kind == Metadata:
        return _Entries(typing.get_args(Metadata)[1], MAX_METADATA)
    return _Typed(kind, MAX_FREE_VALUES if kind == FreeForm else MAX_FIELD_VALUES)


class _Typed:
    """A field of which the values are counted and then decoded at once."""

    def __init__(self, kind: Any, max_values: int) -> None:  # noqa: ANN401 - a type
        self._kind = kind
        self._max_values = max_values
        self._decoder = msgspec.json.Decoder(kind)

    def __call__(self, field: bytes, path: str) -> Any:  # noqa: ANN401 - of the type given
        check_values(field, path, self._max_values)
        try:
            return self._decoder.decode(field)
        except msgspec.ValidationError as error:
            if not has_unknown_field(error):
                raise invalid(error, path) from error
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequestError(f"{path} cannot be read as JSON: {reason_of(error)}.", param=path) from error
        # Fields nobody knows may stand there if they are null.
        try:
            return msgspec.convert(_without_nulls(msgspec.json.decode(field)), self._kind)
        except msgspec.ValidationError as error:
            raise invalid(error, path) from error
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequestError(f"{path} cannot be read as JSON: {reason_of(error)}.", param=path) from error


class _Messages:
    """Messages, one by one; parts and tool calls are counted over all of them."""

    def __init__(self) -> None:
        self._message = _Typed(Message, MAX_MESSAGES_VALUES)

    def __call__(self, field: bytes, path: str) -> Messages:
        check_values(field, path, MAX_MESSAGES_VALUES)
        items = _items(field, path)
        if not items:
            raise InvalidRequestError(f"{path} must have at least one message.", param=path)
        _check_count(len(items), path, "messages")
        messages: list[Message] = []
        num_parts, num_calls = 0, 0
        for i, raw in enumerate(items):
            message: Message = self._message(bytes(raw), f"{path}.{i}")
            if isinstance(message.content, list):
                num_parts += len(message.content)
                _check_count(num_parts, path, "parts over all messages")
                for j, part in enumerate(message.content):
                    _check_part(part, f"{path}.{i}.content.{j}")
            num_calls += len(message.tool_calls or ())
            _check_count(num_calls, path, "tool calls over all messages")
            messages.append(message)
        return tuple(messages)


class _Prompts:
    """Any of the four forms a prompt may have, as a tuple of prompts."""

    def __init__(self) -> None:
        self._text = _Typed(str, 1)
        self._texts = _Typed(tuple[str, ...], MAX_LISTED_PROMPTS)
        self._token_ids = _TokenIds(int)

    def __call__(self, field: bytes, path: str) -> Prompts:
        if field[:1] == b'"':
            return (self._text(field, path),)
        opening = _OPENING.match(field)
        try:
            match opening and opening[1]:
                case b'"':
                    return tuple(self._texts(field, path))
                case b"[":
                    if field.count(b"[") > MAX_LISTED_PROMPTS:
                        raise too_many(path, MAX_LISTED_PROMPTS)
                    return tuple(self._ids(bytes(raw), path) for raw in _items(field, path))
                case _:
                    return (self._ids(field, path),)
        except WrongTypeError as error:
            raise InvalidRequestError(f"{path} {_PROMPT_FORMS}.", param=path) from error

    def _ids(self, field: bytes, path: str) -> tuple[int, ...]:
        token_ids = self._token_ids(field, path)
        if not token_ids:
            raise InvalidRequestError(f"{path} {_PROMPT_FORMS}.", param=path)
        return token_ids


class _TokenIds:
    """A list of token ids, a piece at a time: it may be millions long."""

    def __init__(self, kind: Any) -> None:  # noqa: ANN401 - a type
        self._decoder: msgspec.json.Decoder[list[int]] = msgspec.json.Decoder(list[kind])

    def __call__(self, field: bytes, path: str) -> tuple[int, ...]:
        if field[:1] != b"[":
            raise WrongTypeError(f"{path} must be a list of token ids.", param=path)
        return tuple(chain.from_iterable(self._pieces(field, path)))

    def _pieces(self, field: bytes, path: str) -> Iterator[list[int]]:
        """Cuts at commas: where one lies within a text or an inner list, what is cut off is no list of numbers."""
        start, num_before = 1, 0
        while start < len(field):
            end = field.find(b",", start + _PIECE_BYTES)
            end = len(field) - 1 if end < 0 else end
            try:
                piece = self._decoder.decode(b"[" + field[start:end] + b"]")
            except msgspec.ValidationError as error:
                raise invalid(error, path, num_before=num_before) from error
            except (msgspec.DecodeError, RecursionError) as error:
                raise WrongTypeError(f"{path} must be a list of token ids.", param=path) from error
            yield piece
            num_before += len(piece)
            start = end + 1


class _Entries:
    """An object of equal values, each decoded by itself so that errors can name it."""

    def __init__(self, kind: Any, max_entries: int) -> None:  # noqa: ANN401 - a type
        self._value = _Typed(kind, 1)
        self._max_entries = max_entries
        self._split = _Typed(dict[str, Raw], 2 * max_entries + 2)

    def __call__(self, field: bytes, path: str) -> dict[str, Any]:
        entries = self._split(field, path)
        if len(entries) > self._max_entries:
            raise InvalidRequestError(f"{path} may have at most {self._max_entries} entries.", param=path)
        return {
            name: self._value(bytes(raw), f"{path}.{shown(name)}")
            for name, raw in entries.items()
            if bytes(raw) != b"null"
        }


def json_value(field: bytes, path: str) -> Any:  # noqa: ANN401 - any JSON value
    """A small field's value, whatever its type, without null fields.

    Args:
        field: JSON in UTF-8.
        path: The field's.

    Raises:
        InvalidRequestError: It is not JSON after all, as text that is not UTF-8.
    """
    try:
        return _without_nulls(msgspec.json.decode(field))
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequestError(f"{path} cannot be read as JSON: {reason_of(error)}.", param=path) from error


def _items(field: bytes, path: str) -> list[Raw]:
    """The items of a list, not yet decoded."""
    try:
        return msgspec.json.decode(field, type=list[Raw])
    except msgspec.ValidationError as error:
        raise invalid(error, path) from error


def _check_part(part: Part, path: str) -> None:
    """A part has the field that its type names."""
    if (part.text if part.type == "text" else part.refusal) is None:
        raise InvalidRequestError(f"{path}.{part.type} is missing.", param=f"{path}.{part.type}")


def _check_count(count: int, path: str, what: str) -> None:
    if count > MAX_MESSAGES:
        raise InvalidRequestError(f"{path} may have at most {MAX_MESSAGES} {what}.", param=path)


def _without_nulls(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """The value without null fields, except in objects that are not ours."""
    match value:
        case dict():
            return {
                name: item if name in _FREE_FORM else _without_nulls(item)
                for name, item in value.items()
                if item is not None
            }
        case list():
            return [_without_nulls(item) for item in value]
        case _:
            return value
