"""The Jinja environment chat templates run in: what Hugging Face templates use, and nothing of Python's internals.

A chat template comes with a model, so it is code from the network. Jinja's immutable sandbox keeps it away from
Python's internals and from changing its inputs. What a template may cost is bounded by the process it runs in
(`template_worker`), not here: an estimate of what an operation will cost refuses harmless ones and misses others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_TEXT = 1 << 25
"""Most characters a template may write."""


class _Generation(Extension):
    """`{% generation %}` blocks mark what the model wrote, for training; here a block is only its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """A namespace that holds no underscored names, which lead into Python's internals."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        attributes: dict[str, object] = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and renders chat templates."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _SafeNamespace,
            "dict": _make_dict,
        }

    def render_chat(self, template: jinja2.Template, variables: Mapping[str, object]) -> str:
        """Renders a template, counting what it writes.

        Args:
            template: Made by `from_string`.
            variables: What the template sees.

        Raises:
            SecurityError: It reaches for Python's internals, or writes more than `MAX_TEXT` characters.
            Exception: Whatever the template raises.
        """
        pieces: list[str] = []
        num_chars = 0
        for piece in template.generate(variables):
            num_chars += len(piece)
            if num_chars > MAX_TEXT:
                raise SecurityError(f"the output grows past {MAX_TEXT} characters")
            pieces.append(piece)
        return "".join(pieces)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace attribute may not begin with an underscore: {name!r}")


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter, which a model would read literally."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _make_dict(
    entries: Mapping[str, object] | Iterable[tuple[str, object]] = (), **kwargs: object
) -> dict[str, object]:
    """`dict` as a function, so that templates do not get hold of the class."""
    return dict(entries, **kwargs)
