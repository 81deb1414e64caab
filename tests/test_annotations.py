"""Every annotation of the package evaluates, shapes included: one that does not is one that no checker checks."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest
from jaxtyping import TypeCheckError

from jaxserve.models.layers.linear import Linear, Numerics
from jaxserve.quant.qtensor import contract, int8_matmul, quantize_rows

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "jaxserve").rglob("*.py"))


def annotations(tree: ast.AST) -> Iterator[ast.expr]:
    """What stands behind a colon or an arrow, at any depth of functions and classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.returns
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation


def problem_of(annotation: ast.expr, names: dict[str, object]) -> str | None:
    """Why an annotation says nothing to a checker; None if it does."""
    try:
        for node in ast.walk(annotation):
            if isinstance(node, ast.Subscript) and is_array_type(evaluated(node.value, names)):
                match node.slice:
                    case ast.Tuple(elts=[_, ast.Constant(value=str(shape))]) if "*" not in shape.split():
                        pass
                    case _:
                        return "has a shape that is no string of dimensions"
        evaluated(annotation, names)
    except Exception as error:
        return f"does not evaluate: {type(error).__name__}: {error}"
    return None


def evaluated(expression: ast.expr, names: dict[str, object]) -> object:
    return eval(compile(ast.Expression(expression), "annotation", "eval"), names)


def is_array_type(value: object) -> bool:
    """Whether it is one of jaxtyping's (`Float`, `Shaped`), which take an array type and a shape."""
    return isinstance(value, type) and issubclass(value, jaxtyping.AbstractDtype)


class Named(type):
    """A class that has any attribute and takes any parameters."""

    def __getattr__(cls, name: str) -> type:
        return cls

    def __getitem__(cls, parameters: object) -> type:
        return cls


class Elsewhere(metaclass=Named):
    """Stands for what a module imports for type checkers only, or within a function."""


def names_elsewhere(tree: ast.Module) -> dict[str, object]:
    found: dict[str, object] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                found |= {alias.asname or alias.name: Elsewhere for alias in aliases}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_annotation_evaluates(path: Path) -> None:
    tree = ast.parse(path.read_text())
    found = list(annotations(tree))
    if not found:
        return
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    names = names_elsewhere(tree) | vars(module)
    problems = [
        f"{path.relative_to(ROOT)}:{each.lineno}: {ast.unparse(each)} {problem}"
        for each in found
        if (problem := problem_of(each, names)) is not None
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("annotation", "problem"),
    [
        ('Float[Array, "T *inputs"] | None', None),
        ("Float[Array, T * inputs]", "no string"),
        ("list[Float[Array, T]]", "no string"),
        ("Float[Array, ...]", "no string"),
        ('Float[Array, "T * inputs"]', "no string"),
        ("Nothing", "does not evaluate"),
    ],
)
def test_a_problem_is_seen(annotation: str, problem: str | None) -> None:
    names: dict[str, object] = {"Float": jaxtyping.Float, "Array": jaxtyping.Array}
    found = problem_of(ast.parse(annotation, mode="eval").body, names)
    assert found is None if problem is None else problem in (found or "")


def test_shapes_of_matmuls_are_checked() -> None:
    """Where an annotation would not evaluate, these calls would go through."""
    dtype = jnp.dtype(jnp.float32)
    flat, rows = jnp.zeros((), jnp.float32), jnp.zeros((2, 3), jnp.float32)
    with pytest.raises(TypeCheckError):
        contract(flat, rows, dtype)
    with pytest.raises(TypeCheckError):
        quantize_rows(rows.astype(jnp.int32))
    with pytest.raises(TypeCheckError):
        int8_matmul(rows, jnp.zeros((3, 4), jnp.float32), jnp.ones((4,), jnp.float32))
    layer = Linear({"embed": 3}, {"ffn": 4}, bias=False, numerics=Numerics(dtype=dtype, quantization=None))
    assert layer(rows).shape == (2, 4)
    with pytest.raises(TypeCheckError):
        layer(flat)
