"""The Jinja environment chat templates run in: what Hugging Face templates use, and bounds on what they can cost.

A chat template comes with a model, so it is code from the network. Jinja's immutable sandbox keeps it away from
Python's internals and from changing its inputs. This environment adds bounds: loops, calls and filters check a
deadline; operations that multiply text are refused before they run if the result would pass `MAX_TEXT`; the output is
counted while it is made.
"""

from __future__ import annotations

import json
import math
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEXT = 1 << 25
"""Most characters a template may write, or hold in one value."""

MAX_INTEGER_BITS = 1024
"""Most bits of an integer a template may compute."""

_LONG_WIDTH = re.compile(r"%(\([^)]*\))?[-+ #0\d.]*(\d{5}|\*)|\{[^{}]*:[^{}]*\d{5}|\{[^{}]*\{")
_WIDTH_FILTERS = frozenset({"center", "indent", "wordwrap", "truncate", "batch", "slice", "tojson"})


class _Generation(Extension):
    """`{% generation %}` blocks mark what the model wrote, for training; here a block is only its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _BudgetTransformer(NodeTransformer):
    """Passes what loops run over and what `~` joins through the environment's checks."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - named by Jinja
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_budgeted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - named by Jinja
        self.generic_visit(node)
        pieces = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(pieces, "join", [], [], None, None, lineno=node.lineno)


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
    """Compiles and renders chat templates; one thread renders at a time.

    Args:
        timeout_s: Longest a rendering may take, in seconds.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, timeout_s: float) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self._count_output
        )
        self._timeout_s = timeout_s
        self._deadline = math.inf
        self._num_written = 0
        self.filters["tojson"] = _tojson
        self.filters["join"] = self._join
        self.filters = {name: self._guarded(name, function) for name, function in self.filters.items()}
        self.filters["_budgeted"] = self._budgeted
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _SafeNamespace,
            "dict": _make_dict,
        }

    def compile_chat(self, source: str) -> jinja2.Template:
        """Compiles a template.

        Args:
            source: The template.

        Raises:
            jinja2.TemplateError: It is not valid Jinja.
        """
        tree = _BudgetTransformer().visit(self.parse(source))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def render_chat(self, template: jinja2.Template, variables: Mapping[str, object]) -> str:
        """Renders a template within the bounds.

        Args:
            template: Made by `compile_chat`.
            variables: What the template sees.

        Raises:
            Exception: Whatever the template raises, and SecurityError where it passes a bound.
        """
        self._num_written = 0
        self._deadline = time.monotonic() + self._timeout_s
        try:
            return template.render(variables)
        finally:
            self._deadline = math.inf

    # The names keep keyword arguments of the template apart from these, as in Jinja.
    def call(__self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:  # noqa: N805 - a template may pass any name by keyword
        """Calls something from a template: a global, a macro or a method."""
        __self._check_deadline()
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, str):
            args = _check_text_method(__obj.__self__, __obj.__name__, args)
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        """Looks at the pattern of `str.format` when a template takes that method."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and isinstance(value, types.BuiltinMethodType):
            _check_format(str(value.__self__))
        return wrapped

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """Computes `left operator right` after estimating how large the result is."""
        self._check_deadline()
        match operator:
            case "*":
                for factor, other in ((left, right), (right, left)):
                    if isinstance(factor, int) and isinstance(other, (str, list, tuple)):
                        _check_size(len(other) * factor)
            case "**" if isinstance(left, int) and isinstance(right, int):
                if left.bit_length() * abs(right) > MAX_INTEGER_BITS:
                    raise SecurityError("a power is too large")
            case "%" if isinstance(left, str):
                _check_format(left)
        return _checked(super().call_binop(context, operator, left, right))

    def _check_deadline(self) -> None:
        if time.monotonic() > self._deadline:
            raise SecurityError(f"rendering takes longer than {self._timeout_s:g} s")

    def _count_output(self, value: object) -> object:
        self._num_written += len(value) if isinstance(value, str) else 1
        _check_size(self._num_written)
        return value

    def _budgeted(self, items: Iterable[object]) -> Iterator[object]:
        for item in items:
            self._check_deadline()
            yield item

    def _join(self, value: Iterable[object], d: str = "", attribute: str | int | None = None) -> str:
        """Jinja's `join`, counting while it goes."""
        pieces: list[str] = []
        size = 0
        for item in self._budgeted(value):
            piece = str(item if attribute is None else self.getitem(item, attribute))
            size += len(piece) + len(d)
            _check_size(size)
            pieces.append(piece)
        return str(d).join(pieces)

    def _guarded(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        @wraps(function)
        def guarded(*args: object, **kwargs: object) -> object:
            self._check_deadline()
            texts = [arg for arg in args if isinstance(arg, str)]
            if name in _WIDTH_FILTERS:
                widths = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, int)]
                lines = 1 + (texts[0].count("\n") if texts else MAX_TEXT >> 8)
                _check_size(lines * max(widths, default=0))
            elif name == "replace" and len(texts) >= 2:
                _check_text_method(texts[0], "replace", (*texts[1:], *(str(value) for value in kwargs.values())))
            elif name == "format" and texts:
                _check_format(texts[0])
            return _checked(function(*args, **kwargs))

        return guarded


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace attribute may not begin with an underscore: {name!r}")


def _check_size(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(f"a value or the output grows past {MAX_TEXT} characters")


def _checked(value: object) -> object:
    if isinstance(value, (str, list, tuple)):
        _check_size(len(value))
    elif isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise SecurityError("an integer is too large")
    return value


def _check_format(pattern: str) -> None:
    if _LONG_WIDTH.search(pattern):
        raise SecurityError("a format asks for too wide a field")


def _check_text_method(text: str, name: str, args: tuple[object, ...]) -> tuple[object, ...]:
    """Estimates what a method of `str` would make; returns its arguments, of which it may have had to look at."""
    match name, args:
        case "replace", (str(old), str(new), *_):
            _check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
        case "join", (Iterable() as items,):
            pieces = list(items)
            _check_size(sum(len(piece) + len(text) for piece in pieces if isinstance(piece, str)))
            return (pieces,)
        case (("center" | "ljust" | "rjust" | "zfill" | "expandtabs"), (int(width), *_)):
            _check_size(width * (1 + (text.count("\t") if name == "expandtabs" else 0)))
        case "translate", _:
            raise SecurityError("str.translate is not available")
    return args


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
    if len(pattern) > 200 or re.search(r"%[^a-zA-Z%]*\d", pattern):
        raise SecurityError("strftime_now takes short formats without field widths")
    return datetime.now().strftime(pattern)


def _make_dict(
    entries: Mapping[str, object] | Iterable[tuple[str, object]] = (), **kwargs: object
) -> dict[str, object]:
    """`dict` as a function, so that templates do not get hold of the class."""
    return dict(entries, **kwargs)
